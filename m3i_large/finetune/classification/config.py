"""What a recipe says of classification."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class ClassificationConfig(BaseModel):
    """Data, head and augmentation."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["classification"] = "classification"

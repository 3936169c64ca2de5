"""What a recipe says of detection."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class DetectionConfig(BaseModel):
    """Data, head and augmentation."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["detection"] = "detection"

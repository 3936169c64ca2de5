"""What a recipe says of segmentation."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class SegmentationConfig(BaseModel):
    """Data, head and augmentation."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["segmentation"] = "segmentation"

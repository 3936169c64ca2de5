"""What a recipe says of segmentation: where images and labels lie, how they are augmented, the head."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator


class SegmentationPart(BaseModel):
    """Base of the parts: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")


class SplitConfig(SegmentationPart):
    """One split; paths below the data directory. The labels of `a/b.jpg` are in `a/b.png`."""

    images: str = Field(description="folder of the pictures, below --data")
    labels: str = Field(description="folder of the label images, below --data")


class SegmentationDataConfig(SegmentationPart):
    """Both splits; the defaults are where ADEChallengeData2016 unpacks itself."""

    train: SplitConfig = SplitConfig(images="images/training", labels="annotations/training")
    evaluated: SplitConfig = SplitConfig(images="images/validation", labels="annotations/validation")
    num_classes: int = Field(150, ge=2, le=254, description="classes; others in a label image are ignored")
    first_label: int = Field(1, ge=0, le=1, description="of a class in the files; 1: 0 is what nobody labelled")


class AugmentConfig(SegmentationPart):
    """Of a training image, and the size at which images are evaluated."""

    size: PositiveInt = Field(512, multiple_of=32, description="side of the square, pixels; evaluation's shorter side")
    scale: tuple[float, float] = Field((0.5, 2.0), description="of the size at which the shorter side is the square's")
    flip: float = Field(0.5, ge=0, le=1, description="share of images that are mirrored")
    colour: float = Field(0.5, ge=0, le=1, description="probability of each of four changes of the colours")
    largest: float = Field(0.75, gt=0, le=1, description="of a crop, that one class may cover; ten crops are tried")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError("scale: needed: two positive numbers, the smaller one first")
        return self


class UPerNetConfig(SegmentationPart):
    """UPerNet (arXiv 1807.10221) of transformers, and the auxiliary convolutional head on the map at stride 16."""

    width: PositiveInt = Field(512, description="channels of its convolutions")
    maps: PositiveInt = Field(768, description="channels of the maps that are made of a ViT's")
    auxiliary: float = Field(0.4, ge=0, description="weight of the auxiliary head's loss; 0: no such head")
    auxiliary_width: PositiveInt = Field(256, description="channels of the auxiliary head")
    windows: bool = Field(False, description="evaluate squares of the training's size that overlap by a third")


class SegmentationConfig(SegmentationPart):
    """Data, augmentation and head."""

    kind: Literal["segmentation"] = Field("segmentation", description="of task")
    data: SegmentationDataConfig = SegmentationDataConfig()
    augment: AugmentConfig = AugmentConfig()
    head: UPerNetConfig = UPerNetConfig()

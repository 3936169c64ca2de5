"""What a recipe says of classification: where the images lie, how they are augmented and mixed, the head."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator


class ClassificationPart(BaseModel):
    """Base of the parts: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")


class ClassificationDataConfig(ClassificationPart):
    """Both splits, below the data directory: a directory with one directory a class, or a pattern of shards (.tar)
    whose samples have a `.cls`, the class's number."""

    train: str = Field("train", description="folder of classes, or pattern of shards, below --data")
    evaluated: str = Field("val", description="the same, of what is evaluated on")
    num_classes: PositiveInt | None = Field(None, description="of shards; folders are counted")


class AugmentConfig(ClassificationPart):
    """Of a training image; the defaults are MAE's published fine-tuning (arXiv 2111.06377, table 9)."""

    size: PositiveInt = Field(224, description="side of the square, pixels")
    scale: tuple[float, float] = Field((0.08, 1.0), description="area of the crop over the image's")
    flip: float = Field(0.5, ge=0, le=1, description="share of images that are mirrored")
    rand_augment: tuple[float, float] | None = Field((9.0, 0.5), description="magnitude (0 to 10) and its deviation")
    erase: float = Field(0.25, ge=0, le=1, description="share of images of which a rectangle becomes noise")
    mixup: float = Field(0.8, ge=0, description="alpha of Beta(alpha, alpha); 0: none")
    cutmix: float = Field(1.0, ge=0, description="alpha; where both are set each batch takes one at random")
    smoothing: float = Field(0.1, ge=0, lt=1, description="share of the target spread over all classes")
    evaluated_share: float = Field(0.875, gt=0, le=1, description="of the shorter side that the evaluated centre has")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError("scale: needed: 0 < lowest <= highest <= 1")
        return self


class ClassifierConfig(ClassificationPart):
    """A linear classifier on the mean of the last map."""

    std: float = Field(2.0e-5, gt=0, description="of its initial weights; MAE's")


class ClassificationConfig(ClassificationPart):
    """Data, augmentation and head."""

    kind: Literal["classification"] = Field("classification", description="of task")
    data: ClassificationDataConfig = ClassificationDataConfig()
    augment: AugmentConfig = AugmentConfig()
    head: ClassifierConfig = ClassifierConfig()

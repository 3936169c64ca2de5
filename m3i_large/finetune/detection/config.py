"""What a recipe says of detection: where the data lie, how images are augmented, which head stands on the backbone."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PositiveInt, Tag, model_validator


class DetectionPart(BaseModel):
    """Base of the parts: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")


class SplitConfig(DetectionPart):
    """One split, in COCO's format; paths below the data directory."""

    annotations: str = Field(description="JSON file in COCO's or LVIS's format, below --data")
    images: str = Field(description="folder of the pictures, below --data")


class DetectionDataConfig(DetectionPart):
    """Both splits; the defaults are where COCO 2017 unpacks itself."""

    train: SplitConfig = SplitConfig(annotations="annotations/instances_train2017.json", images="train2017")
    evaluated: SplitConfig = SplitConfig(annotations="annotations/instances_val2017.json", images="val2017")
    format: Literal["coco", "lvis"] = Field("coco", description="of the files, and so how detections are scored")
    keep_empty: bool = Field(False, description="train on images without objects too")
    repeat_threshold: float | None = Field(
        None, gt=0, le=1, description="images are repeated for categories that a smaller share of them shows (LVIS)"
    )


class AugmentConfig(DetectionPart):
    """Large-scale jitter (arXiv 2012.07177): a random scale, then a crop or padding to a square; and flips."""

    size: PositiveInt = Field(1024, multiple_of=32, description="side of the square, pixels; evaluation's longer side")
    scale: tuple[float, float] = Field((0.1, 2.0), description="of the size at which the image would just fit")
    flip: float = Field(0.5, ge=0, le=1, description="share of images that are mirrored")
    min_side: float = Field(1.0, ge=0, description="objects cut to less than this, pixels a side, are not trained")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError("scale: needed: two positive numbers, the smaller one first")
        return self


class RcnnConfig(DetectionPart):
    """Faster R-CNN, or Mask R-CNN with `masks`, of torchvision's parts over a feature pyramid."""

    kind: Literal["rcnn"] = Field("rcnn", description="of head: Faster or Mask R-CNN")
    masks: bool = Field(True, description="also predict masks (Mask R-CNN)")
    width: PositiveInt = Field(256, description="channels of the pyramid and of the heads' convolutions")
    rpn_convs: PositiveInt = Field(2, description="3x3 convolutions of the proposal network")
    box_convs: int = Field(4, ge=0, description="3x3 convolutions of the box head before its linear layers")
    box_width: PositiveInt = Field(
        1024, description="of the box head's linear layers: one, or two without convolutions"
    )
    mask_convs: PositiveInt = Field(4, description="convolutions of the mask head")
    anchors: tuple[PositiveInt, ...] = Field((32, 64, 128, 256, 512), description="side by level, pixels")
    classifier: Literal["softmax", "federated"] = Field("softmax", description="federated: sigmoids, for long tails")
    federated_categories: PositiveInt = Field(50, description="that enter a micro-step's federated loss")
    proposals: tuple[PositiveInt, PositiveInt] = Field((1000, 1000), description="kept in training, in evaluation")
    rpn_samples: PositiveInt = Field(256, description="anchors of an image that the proposal network learns from")
    box_samples: PositiveInt = Field(512, description="proposals of an image that the box head learns from")
    detections: PositiveInt = Field(100, description="most per image")
    min_score: float = Field(0.05, ge=0, lt=1, description="of a detection")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.anchors) not in (4, 5):
            raise ValueError("anchors: needed: one side for each of strides 4, 8, 16, 32, and perhaps of 64")
        return self


class DetrConfig(DetectionPart):
    """A detector of transformers' DETR family; what is not here is as it was published."""

    kind: Literal["rt_detr_v2", "d_fine"] = Field(description="of head: transformers' RT-DETRv2 or D-FINE")
    width: PositiveInt = Field(256, description="of queries and of the maps they look at")
    heads: PositiveInt = Field(8, description="of the attention")
    feedforward: PositiveInt = Field(1024, description="hidden width of a block's MLP")
    encoder_layers: PositiveInt = Field(1, description="on the map at stride 32")
    decoder_layers: int = Field(6, ge=2, description="blocks of the decoder")
    queries: PositiveInt = Field(300, description="boxes that are proposed for a picture")
    denoising: int = Field(100, ge=0, description="queries that begin at noisy boxes of the objects")
    detections: PositiveInt = Field(100, description="most per image")

    @property
    def masks(self) -> bool:
        """Boxes only."""
        return False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width {self.width}: needed: a multiple of 4 and of heads {self.heads}")
        return self


def _kind_of_head(value: Any) -> str:
    """Recipes may leave `kind` out; an unknown one is told by DetrConfig."""
    kind = value.get("kind", "rcnn") if isinstance(value, dict) else value.kind
    return "rcnn" if kind == "rcnn" else "detr"


Head = Annotated[Annotated[RcnnConfig, Tag("rcnn")] | Annotated[DetrConfig, Tag("detr")], Discriminator(_kind_of_head)]


class DetectionConfig(DetectionPart):
    """Data, augmentation and head."""

    kind: Literal["detection"] = Field("detection", description="of task")
    data: DetectionDataConfig = DetectionDataConfig()
    augment: AugmentConfig = AugmentConfig()
    head: Head = RcnnConfig()

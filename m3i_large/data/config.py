"""What is read and how it is augmented."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from m3i_large.data.decode import MAX_PIXELS
from m3i_large.data.source_config import SourceConfig

Share = tuple[float, float]


class ViewConfig(BaseModel):
    """Random crop, flip and colour of one of the two views. Probabilities in [0, 1]."""

    model_config = ConfigDict(extra="forbid")

    crop_scale: Share = Field((0.08, 1.0), description="area of the crop over the image's, lowest and highest")
    crop_ratio: Share = Field((3 / 4, 4 / 3), description="width over height of the crop, lowest and highest")
    flip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    jitter: tuple[float, float, float, float] = Field(
        (0.4, 0.4, 0.2, 0.1), description="strength of brightness, contrast, saturation (factor 1 +- s) and hue (turns)"
    )
    jitter_probability: float = Field(0.8, ge=0, le=1, description="probability of jitter")
    grey: float = Field(0.2, ge=0, le=1, description="probability of greyscale")
    blur: float = Field(0.1, ge=0, le=1, description="probability of Gaussian blur, sigma 0.1 to 2 pixels at 224")
    solarize: float = Field(0.2, ge=0, le=1, description="probability of inverting everything above one half")

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale: got {list(self.crop_scale)}; needed: 0 < lowest <= highest <= 1")
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise ValueError(f"crop_ratio: got {list(self.crop_ratio)}; needed: 0 < lowest <= highest")
        if min(self.jitter) < 0 or max(self.jitter[:3]) > 1 or self.jitter[3] > 0.5:
            raise ValueError(
                f"jitter: got {list(self.jitter)}; needed: three strengths in [0, 1] and a hue in [0, 0.5]"
            )
        return self


class BadSampleBudget(BaseModel):
    """How many samples of a source may be replaced, on each rank, before the run stops."""

    model_config = ConfigDict(extra="forbid")

    share: float = Field(0.01, ge=0, le=1, description="of the last `window` samples")
    window: int = Field(10_000, gt=0, description="samples of a source that the share is of")
    in_a_row: int = Field(32, gt=0, description="one after the other: the shard or the storage is at fault")


class DataConfig(BaseModel):
    """Sources, views and how they are read. The defaults of the views are SiameseIM's."""

    model_config = ConfigDict(extra="forbid")

    root: str = Field(description="directory that the sources' shards are relative to")
    embedded: bool = Field(False, description="build the embedded data set in `root` if it is not there")
    sources: list[SourceConfig] = Field(min_length=1)
    heldout: list[SourceConfig] = Field(
        [], description="pictures that are never trained on, which the run is watched by (train.picture_every)"
    )
    image_size: int = Field(224, gt=0, description="side of the square views in pixels")
    num_classes: int = Field(21841, gt=0, description="classes of the image-category sources together")
    lanes: int | None = Field(None, gt=0, description="V of the sampler; default: from global_batch alone")
    target_view: ViewConfig = ViewConfig(blur=0.1, solarize=0.2)
    other_view: ViewConfig = ViewConfig(blur=1.0, solarize=0.0)
    mean: tuple[float, float, float] = Field(
        (0.485, 0.456, 0.406), description="of the pixels in [0, 1], per channel, subtracted"
    )
    std: tuple[float, float, float] = Field(
        (0.229, 0.224, 0.225), description="of the pixels in [0, 1], per channel, divided by"
    )
    index: str | None = Field(None, description="directory of the shards' indexes; default: .m3i in a local root")
    threads: int = Field(2, ge=0, description="decoding threads of the loader's process; 0 = no process, for tests")
    io_threads: int = Field(8, gt=0, description="threads that read blocks ahead of time")
    prefetch: int = Field(2, gt=0, description="micro-steps prepared ahead")
    read: Literal["auto", "sample", "block"] = Field(
        "auto", description="a sample when it is needed (local disks), or blocks of them ahead of time (remote storage)"
    )
    cache_gib: float = Field(8.0, gt=0, description="GiB per rank for blocks that were read and wait to be used")
    retry_s: float = Field(300.0, ge=0, description="seconds that an outage of the storage is ridden out")
    timeout_s: float = Field(900.0, gt=0, description="seconds without a batch after which the run stops, with stacks")
    max_pixels: int = Field(MAX_PIXELS, gt=0, description="larger JPEG files are decoded smaller, others are bad")
    bad_samples: BadSampleBudget = Field(BadSampleBudget(), description="how much damage a run accepts")
    audit: bool = Field(False, description="write every sample drawn into the run's audit directory")

"""The models' own configs: a recipe is the sum of such parts (unknown keys are errors)."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from m3i_large.errors import UserError


class ModelConfig(BaseModel):
    """Base of all model configs: unknown keys are errors, values cannot be changed after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class BackboneConfig(ModelConfig):
    """The image encoder: a name that `create_model` knows and overrides of that model's own fields."""

    name: str = "vit_b16"
    arch: dict[str, Any] = Field(default_factory=dict)


class ViTConfig(ModelConfig):
    """A Vision Transformer's shape; sizes in pixels. The named models fix width, depth and heads."""

    width: PositiveInt
    depth: PositiveInt
    heads: PositiveInt
    image_size: PositiveInt = 224
    patch_size: PositiveInt = 16
    mlp_ratio: PositiveFloat = 4.0
    mask_token: bool = Field(False, description="a learned token that can stand in for hidden patches")


class TextConfig(ModelConfig):
    """The text tower: BERT-Base's shape over CLIP's vocabulary (METHOD 3), and the width both modalities meet in."""

    width: PositiveInt = 768
    layers: PositiveInt = 12
    heads: PositiveInt = 12
    context_length: PositiveInt = 77
    vocab_size: PositiveInt = 49408
    embed: PositiveInt = 512


class DecoderConfig(ModelConfig):
    """The dense decoder; `width: null` takes the backbone's."""

    width: PositiveInt | None = None
    layers: PositiveInt = 4
    heads: PositiveInt = 12


class PoolConfig(ModelConfig):
    """The attention pool: heads divide the backbone's width, `width` is that of the pooled vector."""

    heads: PositiveInt = 12
    width: PositiveInt = 768


def check_divides(what: str, width: int, *, by: int, field: str) -> None:
    """Raises UserError unless `by` (the value of `field`) divides `width` (of `what`)."""
    if width % by:
        raise UserError(f"{field}: got {by}, needed a divisor of {what} {width}")

"""The models' own configs: a recipe is the sum of such parts (unknown keys are errors)."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from m3i_large.errors import UserError


class ModelConfig(BaseModel):
    """Base of all model configs: unknown keys are errors, values cannot be changed after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class BackboneConfig(ModelConfig):
    """The image encoder: a name that `create_model` knows and overrides of that model's own fields."""

    name: str = Field(
        "vit_b16",
        description="a name of create_model: vit_s16, vit_b16, vit_l16, internimage_t to _g, or vit, internimage",
    )
    arch: dict[str, Any] = Field(
        default_factory=dict,
        description="fields of the model (ViTConfig, InternImageConfig) that differ from the name's",
    )
    weights: str | None = Field(None, description="file of `m3i import` or `m3i export` that the student starts from")


class ViTConfig(ModelConfig):
    """A Vision Transformer's shape; sizes in pixels. The named models fix width, depth and heads."""

    width: PositiveInt = Field(description="of the tokens")
    depth: PositiveInt = Field(description="blocks")
    heads: PositiveInt = Field(description="of the attention; they divide the width")
    image_size: PositiveInt = Field(224, description="pixels a side")
    patch_size: PositiveInt = Field(16, description="pixels a side of a patch")
    mlp_ratio: PositiveFloat = Field(4.0, description="hidden width of a block's MLP over its width")
    mask_token: bool = Field(False, description="a learned token that can stand in for hidden patches")
    drop_path: float = Field(0.0, ge=0, lt=1, description="of the last block, rising from 0 at the first; fine-tuning")
    window_size: PositiveInt | None = Field(
        None, description="tokens a side that attend to each other in `as_map`, but for four blocks; null: all do"
    )


class InternImageConfig(ModelConfig):
    """An InternImage's shape (facts of the official configurations); the named models fix all but the last four."""

    channels: PositiveInt = Field(description="of the first level; each further level has twice as many")
    depths: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = Field(description="blocks of each level")
    groups: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = Field(
        description="of the deformable convolution"
    )
    mlp_ratio: PositiveFloat = Field(4.0, description="hidden width of a block's MLP over its width")
    dw_kernel_size: PositiveInt = Field(3, description="depthwise convolution before offsets and masks; odd")
    offset_scale: PositiveFloat = Field(1.0, description="factor of the sampling offsets")
    layer_scale: PositiveFloat | None = Field(
        None, description="first value of a learned factor of each branch; null: none"
    )
    post_norm: bool = Field(False, description="norms behind the branches instead of before them")
    res_post_norm: bool = Field(False, description="a second norm behind each branch; needs post_norm false")
    level2_post_norm: tuple[int, ...] = Field((), description="blocks of the third level that a norm follows")
    center_feature_scale: bool = Field(False, description="mix what was sampled with the centre by a learned gate")
    head: Literal["conv", "pool"] = Field("conv", description="which official classifier num_classes adds")
    remove_center: bool = Field(False, description="8 points, without the middle one")
    bridge_width: PositiveInt | None = Field(
        None,
        description="of the tokens; null: 1024 from 320 channels on (official: H and G), else 768",
    )
    drop_path: float = Field(0.0, ge=0, lt=1, description="of the last block, rising from 0 at the first; fine-tuning")
    image_size: PositiveInt = Field(224, multiple_of=32, description="pixels a side, a multiple of 32")

    @model_validator(mode="after")
    def _fits_together(self) -> "InternImageConfig":
        if self.res_post_norm and (self.post_norm or self.layer_scale is not None):
            raise ValueError("res_post_norm without post_norm and layer_scale: official models then ignore it")
        if self.dw_kernel_size % 2 == 0:
            raise ValueError("an odd dw_kernel_size")
        if any(not 0 <= block < self.depths[2] for block in self.level2_post_norm):
            raise ValueError(f"level2_post_norm below depths[2] = {self.depths[2]}")
        return self


class TextConfig(ModelConfig):
    """The text tower: BERT-Base's shape over CLIP's vocabulary (METHOD 3), and the width both modalities meet in."""

    width: PositiveInt = Field(768, description="of the tokens")
    layers: PositiveInt = Field(12, description="blocks")
    heads: PositiveInt = Field(12, description="of the attention; they divide the width")
    context_length: PositiveInt = Field(77, description="tokens of a text, with start and end; longer ones are cut")
    vocab_size: PositiveInt = Field(49408, description="token ids of CLIP's vocabulary")
    embed: PositiveInt = Field(512, description="width of the space that images and texts share")


class DecoderConfig(ModelConfig):
    """The dense decoder; `width: null` takes the backbone's."""

    width: PositiveInt | None = Field(None, description="of the tokens; null: the backbone's")
    layers: PositiveInt = Field(4, description="blocks")
    heads: PositiveInt = Field(12, description="of the attention; they divide the width")


class PoolConfig(ModelConfig):
    """The attention pool: heads divide the backbone's width, `width` is that of the pooled vector."""

    heads: PositiveInt = Field(12, description="of the attention; they divide the backbone's width")
    width: PositiveInt = Field(768, description="of the pooled vector")


def check_divides(what: str, width: int, *, by: int, field: str) -> None:
    """Raises UserError unless `by` (the value of `field`) divides `width` (of `what`)."""
    if width % by:
        raise UserError(f"{field}: got {by}, needed a divisor of {what} {width}")

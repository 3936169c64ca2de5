"""`create_model`: the one door to every image backbone."""

from difflib import get_close_matches
from typing import Any, TypeVar

from pydantic import ValidationError
from torch import nn

from m3i_large.errors import UserError
from m3i_large.models.config import InternImageConfig, ViTConfig
from m3i_large.models.intern_image import InternImage
from m3i_large.models.vit import ViT

VIT_SIZES: dict[str, dict[str, Any]] = {
    "vit": {},
    "vit_s16": {"width": 384, "depth": 12, "heads": 6},
    "vit_b16": {"width": 768, "depth": 12, "heads": 12},
    "vit_l16": {"width": 1024, "depth": 24, "heads": 16},
}
_SCALED = {"layer_scale": 1e-5, "post_norm": True}
_GIANT = {"dw_kernel_size": 5, "center_feature_scale": True, "head": "pool"}
INTERN_IMAGE_SIZES: dict[str, dict[str, Any]] = {
    "internimage": {},
    "internimage_t": {"channels": 64, "depths": (4, 4, 18, 4), "groups": (4, 8, 16, 32)},
    "internimage_s": {"channels": 80, "depths": (4, 4, 21, 4), "groups": (5, 10, 20, 40)} | _SCALED,
    "internimage_b": {"channels": 112, "depths": (4, 4, 21, 4), "groups": (7, 14, 28, 56)} | _SCALED,
    "internimage_l": {"channels": 160, "depths": (5, 5, 22, 5), "groups": (10, 20, 40, 80), "offset_scale": 2.0}
    | _SCALED,
    "internimage_xl": {"channels": 192, "depths": (5, 5, 24, 5), "groups": (12, 24, 48, 96), "offset_scale": 2.0}
    | _SCALED,
    "internimage_h": {"channels": 320, "depths": (6, 6, 32, 6), "groups": (10, 20, 40, 80), "res_post_norm": True}
    | {"level2_post_norm": tuple(range(5, 32, 6))}
    | _GIANT,
    "internimage_g": {"channels": 512, "depths": (2, 2, 48, 4), "groups": (16, 32, 64, 128), "post_norm": True}
    | {"level2_post_norm": tuple(range(5, 48, 6))}
    | _GIANT,
}


def create_model(name: str, *, num_classes: int = 0, bridge: bool = False, **arch: Any) -> nn.Module:
    """Builds an image backbone, weights drawn from torch's global generator.

    `name`: vit_s16, vit_b16, vit_l16, or vit (width, depth and heads from `arch`); internimage_t, _s, _b, _l, _xl, _h,
    _g, or internimage (channels, depths and groups from `arch`). `arch` overrides fields of `ViTConfig` or
    `InternImageConfig`. `num_classes` > 0 adds the model's official classifier. `bridge` adds what `tokens` needs
    beyond the backbone: two convolutions for an InternImage, nothing for a ViT.

    The model called on image_BCHW returns its feature maps; `tokens(image_BCHW, keep_BK=None)` returns (B, L, D).
    Raises UserError on an unknown name or field and on a value that does not fit.
    """
    if num_classes < 0:
        raise UserError(f"num_classes: got {num_classes}, needed 0 (no classifier) or more")
    config = model_config(name, **arch)
    if isinstance(config, ViTConfig):
        return ViT(config, num_classes=num_classes)
    return InternImage(config, num_classes=num_classes, bridge=bridge)


def model_config(name: str, **arch: Any) -> ViTConfig | InternImageConfig:
    """What a name and overrides of its fields mean; raises as `create_model` does."""
    if name in VIT_SIZES:
        return _config(ViTConfig, name, VIT_SIZES[name] | arch)
    if name in INTERN_IMAGE_SIZES:
        return _config(InternImageConfig, name, INTERN_IMAGE_SIZES[name] | arch)
    raise UserError(f"backbone.name: got {name!r}, needed {_nearest(name, [*VIT_SIZES, *INTERN_IMAGE_SIZES])}")


Config = TypeVar("Config", ViTConfig, InternImageConfig)


def _config(kind: type[Config], name: str, values: dict[str, Any]) -> Config:
    fields = list(kind.model_fields)
    for key in values:
        if key not in fields:
            raise UserError(f"backbone.arch.{key}: {name} has no such field, needed {_nearest(key, fields)}")
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "*"
        got = "nothing" if first["type"] == "missing" else repr(first["input"])
        raise UserError(f"backbone.arch.{field}: got {got} for {name}, needed: {first['msg']}") from error


def _nearest(word: str, known: list[str]) -> str:
    close = get_close_matches(word, known, n=1, cutoff=0.5)
    return f"one of {', '.join(known)}" + (f" (did you mean {close[0]}?)" if close else "")

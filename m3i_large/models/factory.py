"""`create_model`: the one door to every image backbone."""

from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError
from torch import nn

from m3i_large.errors import UserError
from m3i_large.models.config import ViTConfig
from m3i_large.models.vit import ViT

VIT_SIZES: dict[str, dict[str, int]] = {
    "vit": {},
    "vit_s16": {"width": 384, "depth": 12, "heads": 6},
    "vit_b16": {"width": 768, "depth": 12, "heads": 12},
    "vit_l16": {"width": 1024, "depth": 24, "heads": 16},
}


def create_model(name: str, *, num_classes: int = 0, bridge: bool = False, **arch: Any) -> nn.Module:
    """Builds an image backbone, weights drawn from torch's global generator.

    `name`: vit_s16, vit_b16, vit_l16, or vit (width, depth and heads from `arch`). `arch` overrides fields of
    `ViTConfig`. `num_classes` > 0 adds the model's official classifier. `bridge` asks for what `tokens` needs beyond
    the backbone; a ViT needs nothing, so it changes nothing there.

    The model called on image_BCHW returns its feature maps; `tokens(image_BCHW, keep_BK=None)` returns (B, L, D).
    Build it as usual and shard it afterwards: initialisers do nothing on parameters that are already partitioned.
    Raises UserError on an unknown name or field and on a value that does not fit.
    """
    if name not in VIT_SIZES:
        raise UserError(f"backbone.name: got {name!r}, needed {_nearest(name, list(VIT_SIZES))}")
    if num_classes < 0:
        raise UserError(f"num_classes: got {num_classes}, needed 0 (no classifier) or more")
    return ViT(_vit_config(name, arch), num_classes=num_classes)


def _vit_config(name: str, arch: dict[str, Any]) -> ViTConfig:
    fields = list(ViTConfig.model_fields)
    for key in arch:
        if key not in fields:
            raise UserError(f"backbone.arch.{key}: {name} has no such field, needed {_nearest(key, fields)}")
    try:
        return ViTConfig(**(VIT_SIZES[name] | arch))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        got = "nothing" if first["type"] == "missing" else repr(first["input"])
        raise UserError(f"backbone.arch.{field}: got {got} for {name}, needed: {first['msg']}") from error


def _nearest(word: str, known: list[str]) -> str:
    close = get_close_matches(word, known, n=1, cutoff=0.5)
    return f"one of {', '.join(known)}" + (f" (did you mean {close[0]}?)" if close else "")

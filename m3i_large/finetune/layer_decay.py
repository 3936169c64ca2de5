"""Learning rates that fall from the head to the stem: which layer a parameter belongs to.

The official rule for InternImage reads `levels.2.post_norms.k` as if k were a block's number; here such a norm belongs
to the block that it follows.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from m3i_large.models.intern_image import InternImage
from m3i_large.models.vit import ViT

Layer = Callable[[str], int]


def layer_numbers(backbone: nn.Module) -> tuple[Layer, int]:
    """The layer of each of a backbone's parameters, by name, and the number of the layer above all of them.

    Stem and positions are 0, blocks count from 1 in the order of the forward pass. What follows a block belongs to it:
    norms of a level and `post_norms`. A downsampling belongs to the first block after it, as it feeds that one; a last
    norm to the layer above.
    """
    if isinstance(backbone, ViT):
        return _of_vit, len(backbone.blocks) + 1
    assert isinstance(backbone, InternImage)
    depths = [len(level.blocks) for level in backbone.levels]
    after = {k: block for block, k in backbone.levels[2].post_norm_after.items()}

    def of_intern_image(name: str) -> int:
        found = re.match(r"levels\.(\d)\.(blocks|post_norms|downsample|norm)\.?(\d*)", name)
        if found is None:
            return 0 if name.startswith("patch_embed.") else sum(depths) + 1
        level, part = int(found[1]), found[2]
        before = sum(depths[:level])
        if part == "blocks":
            return before + int(found[3]) + 1
        if part == "post_norms":
            return before + after[int(found[3])] + 1
        return before + depths[level] + (part == "downsample")

    return of_intern_image, sum(depths) + 1


def _of_vit(name: str) -> int:
    found = re.match(r"blocks\.(\d+)\.", name)
    if found is not None:
        return int(found[1]) + 1
    return 0 if name.startswith(("patch_embed.", "cls_token", "pos_embed")) else 10**6


def param_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    backbone: nn.Module,
    *,
    layer_decay: float,
    weight_decay: float,
    decays: Callable[[str, nn.Parameter], bool],
    offset_scale: float = 1.0,
) -> list[dict[str, Any]]:
    """One group for each layer, with and without weight decay; `lr_scale` = layer_decay^(top - layer).

    Args:
        named: (name in the model, parameter); the backbone's names begin with `backbone.`, all others are the top.
        decays: whether weight decay applies to a parameter.
        offset_scale: a further factor on DCNv3's offsets and centre scale (official: dcn_lr_mul).
    """
    layer_of, top = layer_numbers(backbone)
    groups: dict[tuple[int, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        own = name.removeprefix("backbone.") if name.startswith("backbone.") else None
        layer = top if own is None else min(layer_of(own), top)
        slow = offset_scale != 1 and own is not None and bool(re.search(r"\.dcn\.(offset|center_feature_scale)", own))
        groups.setdefault((layer, decays(name, parameter), slow), []).append(parameter)
    return [
        {
            "params": groups[key],
            "weight_decay": weight_decay if key[1] else 0.0,
            "lr_scale": layer_decay ** (top - key[0]) * (offset_scale if key[2] else 1.0),
        }
        for key in sorted(groups)
    ]

"""Feature pyramids over the exported backbones: maps at strides 4, 8, 16 and 32, all of one width.

Legend: B images, C channels, H W pixels of a map, D width of a backbone's map.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from m3i_large.errors import UserError
from m3i_large.models.vit import ViT

STRIDES = (4, 8, 16, 32)
LEVELS = ("p2", "p3", "p4", "p5")
NORM_GROUPS = 32  # most, of a GroupNorm
MIN_GROUP = 8  # channels of a group: on a map pooled to a pixel it has no other values


class SimplePyramid(nn.Module):
    """The simple feature pyramid of a plain ViT (arXiv 2203.16527, section 3): every level is made of its last map, by
    deconvolutions, as it is, or by pooling; then a 1x1 and a 3x3 convolution with a LayerNorm each.

    Args:
        width: D of the map.
        stride: of the map, 4 to 32 and a power of two.
        out: channels of every level.
        levels: strides of the levels.
    """

    def __init__(self, width: int, *, stride: int, out: int, levels: Sequence[int] = STRIDES) -> None:
        super().__init__()
        if stride not in STRIDES:
            raise UserError(f"backbone.arch.patch_size: got {stride}; needed: one of {STRIDES} for a feature pyramid")
        self.levels = nn.ModuleList(_level(width, round(math.log2(stride / level)), out) for level in levels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """[(B, D, H, W)] -> a map (B, out, ...) for each level, finest first."""
        return [level(maps[0]) for level in self.levels]


def _level(width: int, doublings: int, out: int) -> nn.Sequential:
    """From a ViT's map to one that is 2^doublings as large a side."""
    layers: list[nn.Module] = []
    for number in range(doublings):
        if number:
            layers += [LayerNorm2d(width), nn.GELU()]
        layers.append(nn.ConvTranspose2d(width, width // 2, 2, stride=2))
        width //= 2
    layers += [nn.MaxPool2d(2)] * max(0, -doublings)
    layers += [nn.Conv2d(width, out, 1, bias=False), LayerNorm2d(out)]
    layers += [nn.Conv2d(out, out, 3, padding=1, bias=False), LayerNorm2d(out)]
    return nn.Sequential(*layers)


class TopDownPyramid(nn.Module):
    """A feature pyramid network (torchvision's) over the four maps of an InternImage.

    Args:
        widths: channels of the four maps.
        out: channels of every level.
    """

    def __init__(self, widths: Sequence[int], *, out: int) -> None:
        super().__init__()
        self.fpn = FeaturePyramidNetwork(list(widths), out)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four maps (B, C_i, ...) -> four maps (B, out, ...), finest first."""
        return list(self.fpn(OrderedDict(zip(LEVELS, maps, strict=True))).values())


class OwnMaps(nn.Module):
    """A backbone's maps at some of its strides, as they are."""

    def __init__(self, strides: Sequence[int]) -> None:
        super().__init__()
        self.numbers = [STRIDES.index(stride) for stride in strides]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Those of the four maps, finest first."""
        return [maps[number] for number in self.numbers]


def widths(backbone: Any) -> list[int]:
    """Channels of the maps of a backbone from create_model."""
    if isinstance(backbone, ViT):
        return [backbone.width]
    return [backbone.channels * 2**level for level in range(len(STRIDES))]


def build_pyramid(backbone: Any, *, out: int) -> nn.Module:
    """The pyramid that fits a backbone: four maps of `out` channels."""
    if isinstance(backbone, ViT):
        return SimplePyramid(backbone.width, stride=backbone.token_stride, out=out)
    return TopDownPyramid(widths(backbone), out=out)


def build_levels(backbone: Any, *, out: int, strides: Sequence[int] = STRIDES) -> tuple[nn.Module, list[int]]:
    """Maps at these strides for a head that has a pyramid of its own, and their channels: those of InternImage as they
    are, those of a ViT made by a SimplePyramid, with `out` channels."""
    if isinstance(backbone, ViT):
        pyramid = SimplePyramid(backbone.width, stride=backbone.token_stride, out=out, levels=strides)
        return pyramid, [out] * len(strides)
    return OwnMaps(strides), [widths(backbone)[STRIDES.index(stride)] for stride in strides]


def without_batch_statistics(module: nn.Module) -> nn.Module:
    """Every BatchNorm2d inside becomes a GroupNorm: a few images a device are no statistics, and the weights' average
    and the checkpoint have none."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            most = max(1, min(NORM_GROUPS, child.num_features // MIN_GROUP))
            groups = max(g for g in range(1, most + 1) if child.num_features % g == 0)
            setattr(module, name, nn.GroupNorm(groups, child.num_features, eps=child.eps))
        else:
            without_batch_statistics(child)
    return module


def backbone_maps(backbone: nn.Module, image_BCHW: Tensor) -> list[Tensor]:
    """The backbone's maps of images of any size in multiples of 32; by a call of the module, as ZeRO-3 needs."""
    return backbone(image_BCHW, as_map=True) if isinstance(backbone, ViT) else backbone(image_BCHW)

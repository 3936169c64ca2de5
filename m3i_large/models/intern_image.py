"""InternImage (Wang et al., CVPR 2023) under the official checkpoints' names, and M3I's bridge from its maps to tokens.

Legend: B images, C channels (levels: C, 2C, 4C, 8C), H W pixels of a map, G groups, K points, L tokens, D width.

Activations are B, H, W, C throughout. Every layer draws its weights in its own constructor: inside `zero.Init` a child
is partitioned as soon as it exists, and its parent could initialise nothing.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from m3i_kernels.dcnv3 import dcnv3
from timm.layers import DropPath
from torch import Tensor, nn

from m3i_large.models.config import InternImageConfig, PoolConfig, check_divides
from m3i_large.models.init import init_linears, init_linears_xavier
from m3i_large.models.pool import EPS, MeanQueryAttention, indexed_norm

BRIDGE_HEADS, HEAD_WIDTH = 16, 768  # of the official classifier of H and G


class _Linear(nn.Linear):
    """The official default: weights normal with 0.02, cut at two units, biases 0."""

    def reset_parameters(self) -> None:
        init_linears(self)


class _XavierLinear(_Linear):
    def reset_parameters(self) -> None:
        init_linears_xavier(self)


class _ZeroLinear(_Linear):
    """Offsets and logits begin at 0: the regular grid, all points alike."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class _ToLast(nn.Module):
    """B, C, H, W -> B, H, W, C."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW.permute(0, 2, 3, 1)


class _ToFirst(nn.Module):
    """B, H, W, C -> B, C, H, W."""

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return x_BHWC.permute(0, 3, 1, 2)


def _norm_of_map(width: int, *, back: bool) -> nn.Sequential:
    """LayerNorm over the channels of a B, C, H, W map; the result is B, H, W, C unless `back`. Its index is then 1."""
    return nn.Sequential(_ToLast(), nn.LayerNorm(width, eps=EPS), *([_ToFirst()] if back else []))


class _DepthwiseConv(nn.Conv2d):
    """A convolution of every channel by itself, on CPUs in fp32.

    In bf16 torch's depthwise convolution on a CPU is 5 to 10 times slower than in fp32 with channels last.
    """

    def __init__(self, width: int, kernel_size: int) -> None:
        super().__init__(width, width, kernel_size, padding=(kernel_size - 1) // 2, groups=width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if x_BCHW.device.type != "cpu" or x_BCHW.dtype == torch.float64:
            return super().forward(x_BCHW)
        assert self.bias is not None
        out = self._conv_forward(x_BCHW.float(), self.weight.float(), self.bias.float())
        return out.to(x_BCHW.dtype)


class DCNv3(nn.Module):
    """Deformable convolution with its projections: value, offsets, softmax over points, centre blend (Eq. 2)."""

    def __init__(self, width: int, groups: int, config: InternImageConfig) -> None:
        super().__init__()
        self.groups, self.offset_scale, self.remove_center = groups, config.offset_scale, config.remove_center
        points = 9 - config.remove_center
        center = config.center_feature_scale
        weight, bias = (nn.Parameter(torch.zeros(s)) if center else None for s in ((groups, width), (groups,)))
        self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias = weight, bias
        depthwise = _DepthwiseConv(width, config.dw_kernel_size)
        self.dw_conv = nn.Sequential(depthwise, _norm_of_map(width, back=False), nn.GELU())
        self.offset = _ZeroLinear(width, groups * points * 2)
        self.mask = _ZeroLinear(width, groups * points)
        self.input_proj = _XavierLinear(width, width)
        self.output_proj = _XavierLinear(width, width)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """x_BHWC -> the same shape. The operator takes logits: its softmax and its sigmoid are inside."""
        local_BHWC = self.dw_conv(x_BHWC.permute(0, 3, 1, 2))
        center_BHWG = None
        if self.center_feature_scale_proj_weight is not None:
            weight, bias = self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias
            center_BHWG = F.linear(local_BHWC, weight, bias)
        out_BHWC = dcnv3(
            self.input_proj(x_BHWC),
            self.offset(local_BHWC),
            self.mask(local_BHWC),
            center_BHWG,
            groups=self.groups,
            offset_scale=self.offset_scale,
            remove_center=self.remove_center,
        )
        return self.output_proj(out_BHWC)


class _MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = _Linear(width, hidden), nn.GELU(), _Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """DCNv3 and MLP with residuals; where the norms stand depends on the size (pre, post, both sides)."""

    def __init__(self, width: int, groups: int, config: InternImageConfig, drop_path: float) -> None:
        super().__init__()
        self.post_norm = config.post_norm
        self.norm1 = indexed_norm(width)
        self.dcn = DCNv3(width, groups, config)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = indexed_norm(width)
        self.mlp = _MLP(width, int(width * config.mlp_ratio))
        scale = config.layer_scale
        self.gamma1 = None if scale is None else nn.Parameter(torch.full((width,), scale))
        self.gamma2 = None if scale is None else nn.Parameter(torch.full((width,), scale))
        self.res_post_norm1 = indexed_norm(width) if config.res_post_norm else nn.Identity()
        self.res_post_norm2 = indexed_norm(width) if config.res_post_norm else nn.Identity()

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """x_BHWC -> the same shape."""
        x_BHWC = self._add(x_BHWC, self.dcn, self.norm1, self.res_post_norm1, self.gamma1)
        return self._add(x_BHWC, self.mlp, self.norm2, self.res_post_norm2, self.gamma2)

    def _add(self, x: Tensor, layer: nn.Module, norm: nn.Module, behind: nn.Module, gamma: Tensor | None) -> Tensor:
        branch = norm(layer(x)) if self.post_norm else behind(layer(norm(x)))
        return x + self.drop_path(branch if gamma is None else gamma * branch)


class _Stem(nn.Module):
    """Two convolutions of stride 2: (B, 3, H, W) -> (B, H / 4, W / 4, C)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1)
        self.norm1 = _norm_of_map(width // 2, back=True)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(width // 2, width, 3, stride=2, padding=1)
        self.norm2 = _norm_of_map(width, back=False)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.act(self.norm1(self.conv1(image_BCHW)))))


class _Downsample(nn.Module):
    """(B, H, W, C) -> (B, H / 2, W / 2, 2C), odd sizes rounded up."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.norm = _norm_of_map(2 * width, back=False)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return self.norm(self.conv(x_BHWC.permute(0, 3, 1, 2)))


class _Level(nn.Module):
    """Blocks of one size, then norm; `downsample` is called by the model, after the map was tapped."""

    def __init__(self, index: int, config: InternImageConfig, drop_path: list[float]) -> None:
        super().__init__()
        width, groups = config.channels * 2**index, config.groups[index]
        check_divides(f"the width of level {index}", width, by=groups, field="backbone.arch.groups")
        self.blocks = nn.ModuleList(Block(width, groups, config, rate) for rate in drop_path)
        ids = config.level2_post_norm if index == 2 else []
        self.post_norm_after = {block: k for k, block in enumerate(ids)}
        has_norm = not config.post_norm or config.center_feature_scale
        self.norm = indexed_norm(width) if has_norm else nn.Identity()
        if ids:
            self.post_norms = nn.ModuleList(indexed_norm(width) for _ in ids)
        self.downsample = _Downsample(width) if index < 3 else None

    def forward(self, x_BHWC: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            x_BHWC = block(x_BHWC)
            if index in self.post_norm_after:
                x_BHWC = self.post_norms[self.post_norm_after[index]](x_BHWC)
        return self.norm(x_BHWC)


class InternImage(nn.Module):
    """The backbone; with `bridge` also M3I's tokens at stride 16, with `num_classes` the official classifier.

    `width` D of the tokens; `image_size` and `token_stride` in pixels; `grid` tokens a side; `blocks` are what
    activation checkpointing wraps.
    """

    token_stride = 16
    levels: Any  # torch would type what is in them as Tensor | Module

    def __init__(self, config: InternImageConfig, *, num_classes: int = 0, bridge: bool = False) -> None:
        super().__init__()
        channels, depths = config.channels, config.depths
        self.channels = channels
        self.image_size, self.grid = config.image_size, config.image_size // self.token_stride
        self.width = config.bridge_width or (1024 if channels >= 320 else 768)
        self.num_classes, self.has_pool_head = num_classes, config.head == "pool"
        rates = torch.linspace(0, config.drop_path, sum(depths), device="cpu").tolist()
        self.patch_embed = _Stem(channels)
        self.levels = nn.ModuleList(
            _Level(i, config, rates[sum(depths[:i]) : sum(depths[: i + 1])]) for i in range(len(depths))
        )
        self.has_bridge = bridge or (bool(num_classes) and self.has_pool_head)
        if num_classes and not self.has_pool_head:
            wide = int(1.5 * 8 * channels)
            conv = nn.Conv2d(8 * channels, wide, 1, bias=False)
            self.conv_head = nn.Sequential(conv, nn.Sequential(nn.BatchNorm2d(wide)), nn.GELU())
        if self.has_bridge:
            conv = nn.Conv2d(8 * channels, 4 * self.width, 1)
            self.dcnv3_head_x4 = nn.Sequential(conv, nn.PixelShuffle(2))
            self.dcnv3_head_x3 = nn.Conv2d(4 * channels, self.width, 1)
        if num_classes and self.has_pool_head:
            check_divides("the backbone's width", self.width, by=BRIDGE_HEADS, field="heads of the classifier's pool")
            pool = PoolConfig(heads=BRIDGE_HEADS, width=HEAD_WIDTH)
            self.clip_projector, self.fc_norm = (
                MeanQueryAttention(self.width, pool, linear=_Linear),
                indexed_norm(HEAD_WIDTH),
            )
        if num_classes:
            self.head = _Linear(HEAD_WIDTH if self.has_pool_head else wide, num_classes)

    @property
    def blocks(self) -> list[nn.Module]:
        return [block for level in self.levels for block in level.blocks]

    def forward(
        self,
        image_BCHW: Tensor,
        *,
        keep_BK: Tensor | None = None,
        hide_BL: Tensor | None = None,
        as_tokens: bool = False,
        as_logits: bool = False,
    ) -> list[Tensor] | Tensor:
        """image_BCHW (any H and W from 32) -> four maps (B, C_i, H_i, W_i) at strides 4, 8, 16, 32.

        Each is taken after its level's norm, before it is downsampled. With `as_tokens` what `tokens` returns, with
        `as_logits` what `logits` returns: both are calls of the module, because sharded parameters are present only
        inside one.
        """
        if image_BCHW.dim() != 4 or image_BCHW.shape[1] != 3 or min(image_BCHW.shape[2:]) < 32:
            raise ValueError(f"image_BCHW: got {tuple(image_BCHW.shape)}, needed (B, 3, H, W) with H and W from 32")
        if keep_BK is not None or hide_BL is not None:
            raise ValueError(
                "keep_BK, hide_BL: a convolution cannot leave tokens out, needed a ViT or mask none or mix"
            )
        maps_BHWC = list(self._maps(image_BCHW))
        if as_tokens:
            return self._tokens(maps_BHWC).flatten(1, 2)
        if as_logits:
            return self._logits(maps_BHWC)
        return [x.permute(0, 3, 1, 2) for x in maps_BHWC]

    def tokens(self, image_BCHW: Tensor, keep_BK: Tensor | None = None, hide_BL: Tensor | None = None) -> Tensor:
        """Tokens at stride 16, row-major -> (B, L, D): stage 4, widened and unfolded, plus stage 3 (METHOD 3).

        ValueError unless the model has its bridge and H and W are multiples of 32.
        """
        return self(image_BCHW, keep_BK=keep_BK, hide_BL=hide_BL, as_tokens=True)

    def logits(self, image_BCHW: Tensor) -> Tensor:
        """The official classifier -> (B, num_classes). ValueError without one."""
        return self(image_BCHW, as_logits=True)

    def _maps(self, image_BCHW: Tensor) -> Iterator[Tensor]:
        x_BHWC = self.patch_embed(image_BCHW)
        for level in self.levels:
            map_BHWC = level(x_BHWC)
            yield map_BHWC
            if level.downsample is not None:
                x_BHWC = level.downsample(map_BHWC)

    def _tokens(self, maps_BHWC: list[Tensor]) -> Tensor:
        """The last two maps as one, (B, H / 16, W / 16, D)."""
        if not self.has_bridge:
            raise ValueError("tokens: the model was built without its bridge, needed bridge=True")
        stage3_BCHW, stage4_BCHW = (x.permute(0, 3, 1, 2) for x in maps_BHWC[2:])
        fine, coarse = stage3_BCHW.shape[2:], stage4_BCHW.shape[2:]
        if fine != (2 * coarse[0], 2 * coarse[1]):
            raise ValueError(
                f"tokens: got an image whose stages 3 and 4 are {tuple(fine)} and {tuple(coarse)}, "
                "needed height and width in multiples of 32"
            )
        return (self.dcnv3_head_x4(stage4_BCHW) + self.dcnv3_head_x3(stage3_BCHW)).permute(0, 2, 3, 1)

    def _logits(self, maps_BHWC: list[Tensor]) -> Tensor:
        if not self.num_classes:
            raise ValueError("logits: the model was built with num_classes 0, needed 1 or more")
        if self.has_pool_head:
            return self.head(self.fc_norm(self.clip_projector(self._tokens(maps_BHWC).flatten(1, 2))))
        return self.head(self.conv_head(maps_BHWC[3].permute(0, 3, 1, 2)).mean((2, 3)))

"""The specification of `patch_mix`.

Legend: N rows, H W pixels, C = 3 channels, V = 2 views (0 target, 1 other), P = mask cells a side.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def patch_mix(
    target_NHWC: Tensor,
    other_NHWC: Tensor,
    *,
    colour_NV34: Tensor,
    solarize_NV: Tensor,
    flip_NV: Tensor,
    partner_N: Tensor,
    mask_NPP: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in op.py; every line is fp32 until the last."""
    normal_2C11 = torch.tensor([mean, std], dtype=torch.float32, device=target_NHWC.device)[..., None, None]
    target, other = (
        _view(x_NHWC, colour_NV34[:, v], solarize_NV[:, v], flip_NV[:, v], normal_2C11)
        for v, x_NHWC in enumerate((target_NHWC, other_NHWC))
    )
    H, W = target.shape[2:]
    P = mask_NPP.shape[-1]
    own_N1HW = mask_NPP.repeat_interleave(H // P, 1).repeat_interleave(W // P, 2)[:, None]
    # A partner's view brings its own colour and flip along; the mask lies in the frame of the result.
    mixed = torch.where(own_N1HW, target, other[partner_N])
    return mixed.to(dtype).contiguous(), target.to(dtype).contiguous()


def _view(x_NHWC: Tensor, colour_N34: Tensor, solarize_N: Tensor, flip_N: Tensor, normal_2C11: Tensor) -> Tensor:
    """One view's pixels: colour affine, clamp, solarize, normalise, flip."""
    x_NCHW = x_NHWC.permute(0, 3, 1, 2).contiguous().float()
    x_NCHW = x_NCHW / x_NCHW.new_full((), 255)  # CUDA would turn a Python 255 into a product with 1 / 255
    red, green, blue = x_NCHW.split(1, dim=1)
    A_N4C11 = colour_N34.transpose(1, 2)[..., None, None]
    # Spelled out, in this order: a matmul may run in TF32, and solarize turns a last-bit difference into a visible one.
    x_NCHW = (red * A_N4C11[:, 0] + green * A_N4C11[:, 1] + blue * A_N4C11[:, 2] + A_N4C11[:, 3]).clamp(0, 1)
    x_NCHW = torch.where(x_NCHW >= solarize_N[:, None, None, None], 1 - x_NCHW, x_NCHW)
    x_NCHW = (x_NCHW - normal_2C11[0]) / normal_2C11[1]
    return torch.where(flip_N[:, None, None, None], x_NCHW.flip(3), x_NCHW)

"""`patch_mix` as one Triton kernel: every byte is read once, where it is needed, and every output written once.

Legend: as in op.py; Q pixels of a program, consecutive in the row-major order of the output.
"""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3i_kernels.aot import Variant

BLOCK_Q = 512


@triton.jit
def _view(image, row, col, W, here, flip, colour, solarize, mean_r, mean_g, mean_b, std_r, std_g, std_b):
    """Red, green, blue (Q,) of one view at pixels of the output: flip, colour affine, clamp, solarize, normalise."""
    pixel = image + (row * W + tl.where(flip, W - 1 - col, col)) * 3
    red = tl.load(pixel, mask=here, other=0).to(tl.float32) / 255
    green = tl.load(pixel + 1, mask=here, other=0).to(tl.float32) / 255
    blue = tl.load(pixel + 2, mask=here, other=0).to(tl.float32) / 255
    threshold = tl.load(solarize)
    return (
        (_channel(red, green, blue, colour, threshold) - mean_r) / std_r,
        (_channel(red, green, blue, colour + 4, threshold) - mean_g) / std_g,
        (_channel(red, green, blue, colour + 8, threshold) - mean_b) / std_b,
    )


@triton.jit
def _channel(red, green, blue, colour, threshold):
    x = red * tl.load(colour) + green * tl.load(colour + 1) + blue * tl.load(colour + 2) + tl.load(colour + 3)
    x = tl.minimum(tl.maximum(x, 0.0), 1.0)
    return tl.where(x >= threshold, 1 - x, x)


@triton.jit
def _store(image, pixel, num_pixels, here, red, green, blue):
    tl.store(image + pixel, red.to(image.dtype.element_ty), mask=here)
    tl.store(image + num_pixels + pixel, green.to(image.dtype.element_ty), mask=here)
    tl.store(image + 2 * num_pixels + pixel, blue.to(image.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["H", "W", "P"])
def _patch_mix(
    target, other, colour, solarize, flip, partner, mask, mixed, own,
    H, W, P, mean_r, mean_g, mean_b, std_r, std_g, std_b,
    BLOCK_Q: tl.constexpr,
):  # fmt: skip
    num_pixels = H * W
    n = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    here = pixel < num_pixels
    row, col = pixel // W, pixel % W
    red, green, blue = _view(
        target + n * num_pixels * 3, row, col, W, here, tl.load(flip + n * 2), colour + n * 24, solarize + n * 2,
        mean_r, mean_g, mean_b, std_r, std_g, std_b,
    )  # fmt: skip
    _store(own + n * num_pixels * 3, pixel, num_pixels, here, red, green, blue)
    cell = row // (H // P) * P + col // (W // P)
    is_own = tl.load(mask + n * P * P + cell, mask=here, other=1) != 0
    # A partner's view brings its own colour and flip along. Pixels that stay are not read.
    j = tl.load(partner + n)
    theirs_r, theirs_g, theirs_b = _view(
        other + j * num_pixels * 3, row, col, W, here & ~is_own, tl.load(flip + j * 2 + 1), colour + j * 24 + 12,
        solarize + j * 2 + 1, mean_r, mean_g, mean_b, std_r, std_g, std_b,
    )  # fmt: skip
    red, green = tl.where(is_own, red, theirs_r), tl.where(is_own, green, theirs_g)
    _store(mixed + n * num_pixels * 3, pixel, num_pixels, here, red, green, tl.where(is_own, blue, theirs_b))


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
    """Arguments and results as in op.py."""
    N, H, W, C = target_NHWC.shape
    mixed, own = (target_NHWC.new_empty((N, C, H, W), dtype=dtype) for _ in range(2))
    if mixed.numel():
        given = (target_NHWC, other_NHWC, colour_NV34, solarize_NV, flip_NV, partner_N, mask_NPP)
        # No fused multiply-add: solarize turns a difference in the last bit into a visible one.
        _patch_mix[(triton.cdiv(H * W, BLOCK_Q), N)](
            *(x.contiguous() for x in given), mixed, own, H, W, mask_NPP.shape[-1], *mean, *std,
            BLOCK_Q=BLOCK_Q, enable_fp_fusion=False,
        )  # fmt: skip
    return mixed, own


def variants() -> Iterator[Variant]:
    """What to compile ahead of time."""
    for dtype in ("bf16", "fp32"):
        tensors = {"target": "*u8", "other": "*u8", "colour": "*fp32", "solarize": "*fp32", "flip": "*i1"}
        tensors |= {"partner": "*i64", "mask": "*i1", "mixed": f"*{dtype}", "own": f"*{dtype}"}
        numbers = dict.fromkeys(("H", "W", "P"), "i32")
        numbers |= {f"{kind}_{colour}": "fp32" for kind in ("mean", "std") for colour in "rgb"}
        yield Variant(f"mix_{dtype}", _patch_mix, tensors | numbers, {"BLOCK_Q": BLOCK_Q})

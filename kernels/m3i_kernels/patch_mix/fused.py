"""`patch_mix` in one pass over memory: each needed byte of the views is read once, each result written once.

Views are interleaved bytes and results are planes, so no access pattern suits both. Where a mask cell is a multiple of
four pixels wide (every usual size), a thread reads four pixels as three 32-bit words and writes four consecutive
values of each plane; elsewhere it reads one pixel as three bytes. Image sizes are run-time numbers: one compilation
serves all.

Legend: N rows, H W pixels, C = 3 channels, V = 2 views (0 target, 1 other), P = mask cells a side; a unit is what a
thread reads at once, STEP = 4 or 1 pixels.
"""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3i_kernels.aot import Variant

BLOCKS = {4: 1024, 1: 512}  # STEP: pixels a program
NUM_WARPS = 4
OPTIONS = {"enable_fp_fusion": False}  # solarize turns a difference in the last bit into a visible one
# byte / 255 without a division: x / 256 + x / 65280 is the correctly rounded quotient for all 256 bytes, with the fused
# multiply-add of a GPU and with the interpreter's, which rounds twice.
_BY_256 = tl.constexpr(1 / 256)
_BY_65280 = tl.constexpr(1 / 65280)
_SIZES = ["H", "row_units", "P", "cell_rows", "cell_units", "num_blocks"]


@triton.jit
def _four(first, second, third, fourth, flip):
    """Four bytes of each thread in the order in which the result has them, as floats in [0, 1]."""
    even = tl.interleave(tl.where(flip, fourth, first), tl.where(flip, second, third))
    odd = tl.interleave(tl.where(flip, third, second), tl.where(flip, first, fourth))
    return _unit_interval(tl.interleave(even, odd) & 255)


@triton.jit
def _unit_interval(byte):
    x = byte.to(tl.float32)
    return tl.fma(x, _BY_65280, x * _BY_256)


@triton.jit
def _load(image, unit, flip, wanted, STEP: tl.constexpr):
    """Red, green and blue of the wanted units; others are not read."""
    if STEP == 4:
        word = image.to(tl.pointer_type(tl.uint32), bitcast=True) + unit * 3
        a = tl.load(word, mask=wanted, other=0)  # r g b r, from the lowest byte up
        b = tl.load(word + 1, mask=wanted, other=0)  # g b r g
        c = tl.load(word + 2, mask=wanted, other=0)  # b r g b
        red = _four(a, a >> 24, b >> 16, c >> 8, flip)
        green = _four(a >> 8, b, b >> 24, c >> 16, flip)
        blue = _four(a >> 16, b >> 8, c, c >> 24, flip)
    else:
        byte = image + unit * 3
        red = _unit_interval(tl.load(byte, mask=wanted, other=0))
        green = _unit_interval(tl.load(byte + 1, mask=wanted, other=0))
        blue = _unit_interval(tl.load(byte + 2, mask=wanted, other=0))
    return red, green, blue


@triton.jit
def _channel(red, green, blue, colour, threshold, scale, shift):
    """One channel of a view: affine, clamp, solarize, normalise.

    Up to solarize bit by bit as the reference: in its order, and the launch forbids contraction. Then
    x / std - mean / std in one operation, which may differ in the last bits.
    """
    x = red * tl.load(colour) + green * tl.load(colour + 1) + blue * tl.load(colour + 2) + tl.load(colour + 3)
    x = tl.clamp(x, 0.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
    x = tl.where(x >= threshold, 1 - x, x)
    return tl.fma(x, scale, shift)


@triton.jit(do_not_specialize=_SIZES)
def _patch_mix_kernel(
    target_NHWC,
    other_NHWC,
    colour_NV34,
    solarize_NV,
    flip_NV,
    partner_N,
    mask_NPP,
    mixed_NCHW,
    out_NCHW,
    H,
    row_units,
    P,
    cell_rows,
    cell_units,
    num_blocks,
    scale_0,
    scale_1,
    scale_2,
    shift_0,
    shift_1,
    shift_2,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program makes BLOCK consecutive pixels of one row of both results."""
    n = (tl.program_id(0) // num_blocks).to(tl.int64)  # only an image's base may lie beyond 32 bits
    block = tl.program_id(0) % num_blocks
    image_units = H * row_units
    unit = block * (BLOCK // STEP) + tl.arange(0, BLOCK // STEP)
    inside = unit < image_units
    row = unit // row_units
    column = unit - row * row_units
    cell = (row // cell_rows) * P + column // cell_units
    own = tl.load(mask_NPP + n * P * P + cell, mask=inside, other=1).to(tl.int1)

    partner = tl.load(partner_N + n)
    flip = tl.load(flip_NV + n * 2).to(tl.int1)
    source = tl.where(flip, row * row_units + (row_units - 1 - column), unit)
    image_bytes = image_units * (3 * STEP)
    red, green, blue = _load(target_NHWC + n * image_bytes, source, flip, inside, STEP)
    flip = tl.load(flip_NV + partner * 2 + 1).to(tl.int1)
    source = tl.where(flip, row * row_units + (row_units - 1 - column), unit)
    red_2, green_2, blue_2 = _load(other_NHWC + partner * image_bytes, source, flip, inside & ~own, STEP)
    if STEP == 4:
        own = tl.interleave(tl.interleave(own, own), tl.interleave(own, own))

    colour, colour_2 = colour_NV34 + n * 24, colour_NV34 + partner * 24 + 12
    threshold, threshold_2 = tl.load(solarize_NV + n * 2), tl.load(solarize_NV + partner * 2 + 1)
    plane = image_units * STEP
    pixel = block * BLOCK + tl.arange(0, BLOCK)
    mixed, out = mixed_NCHW + n * 3 * plane + pixel, out_NCHW + n * 3 * plane + pixel
    inside = pixel < plane
    for c in tl.static_range(3):
        scale = scale_0 if c == 0 else (scale_1 if c == 1 else scale_2)
        shift = shift_0 if c == 0 else (shift_1 if c == 1 else shift_2)
        x = _channel(red, green, blue, colour + c * 4, threshold, scale, shift)
        y = _channel(red_2, green_2, blue_2, colour_2 + c * 4, threshold_2, scale, shift)
        tl.store(out + c * plane, x.to(out_NCHW.dtype.element_ty), mask=inside)
        tl.store(mixed + c * plane, tl.where(own, x, y).to(out_NCHW.dtype.element_ty), mask=inside)


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
    """Arguments and results as in op.py; inputs that are not contiguous are copied first."""
    views = [x.contiguous() for x in (target_NHWC, other_NHWC)]
    drawn = [x.contiguous() for x in (colour_NV34, solarize_NV, flip_NV, partner_N, mask_NPP)]
    N, H, W, C = target_NHWC.shape
    P = mask_NPP.shape[-1]
    mixed_NCHW, out_NCHW = (target_NHWC.new_empty((N, C, H, W), dtype=dtype) for _ in range(2))
    words = W // P % 4 == 0 and all(x.data_ptr() % 4 == 0 for x in views)
    STEP = 4 if words else 1
    num_blocks = triton.cdiv(H * W, BLOCKS[STEP])
    if mixed_NCHW.numel() == 0:
        return mixed_NCHW, out_NCHW
    with torch.cuda.device_of(target_NHWC):
        _patch_mix_kernel[(N * num_blocks,)](
            *views,
            *drawn,
            mixed_NCHW,
            out_NCHW,
            H,
            W // STEP,
            P,
            H // P,
            W // P // STEP,
            num_blocks,
            *(1 / s for s in std),
            *(-m / s for m, s in zip(mean, std, strict=True)),
            STEP=STEP,
            BLOCK=BLOCKS[STEP],
            num_warps=NUM_WARPS,
            **OPTIONS,
        )
    return mixed_NCHW, out_NCHW


def variants() -> Iterator[Variant]:
    """What to compile ahead of time: both ways to read, with results of 16 and of 32 bits."""
    numbers = dict.fromkeys(_SIZES, "i32")
    numbers |= {f"{kind}_{c}": "fp32" for kind in ("scale", "shift") for c in range(3)}
    tensors = {"target_NHWC": "*u8", "other_NHWC": "*u8", "colour_NV34": "*fp32", "solarize_NV": "*fp32"}
    tensors |= {"flip_NV": "*i1", "partner_N": "*i64", "mask_NPP": "*i1"}
    for STEP, BLOCK in BLOCKS.items():
        for dtype in ("bf16", "fp32"):
            results = {"mixed_NCHW": f"*{dtype}", "out_NCHW": f"*{dtype}"}
            name = f"{'words' if STEP == 4 else 'bytes'}_{dtype}"
            constants = {"STEP": STEP, "BLOCK": BLOCK}
            yield Variant(name, _patch_mix_kernel, tensors | results | numbers, constants, NUM_WARPS, OPTIONS)

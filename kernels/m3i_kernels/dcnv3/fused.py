"""`dcnv3` forward and backward as one Triton kernel each.

A program computes BLOCK_Q output pixels of one group: their offsets and logits are read once and serve all D channels,
which are read and written in vectors of 16 bytes. Softmax, bilinear weights and the centre blend stay in registers.
Image sizes, groups and batch are run-time numbers.

Legend: Q pixels of a program, D channels of a chunk, G groups, K points; x, y in pixels of the value.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3i_kernels.aot import Variant
from m3i_kernels.dcnv3 import reference
from m3i_kernels.dcnv3.geometry import Geometry

MAX_BLOCK_D = 128
WARPS = (1, 2, 4)
VECTOR_BYTES = 16
INT32_LIMIT = 2**31  # elements of an image from which its offsets in memory need 64 bits
# The sum of all contributions to one element, at most 2 ** 62, stays clear of a signed 64-bit integer's end.
FIXED_POINT_BITS = 62
# Any image size and number of groups runs the same code: all levels of a network share two compilations.
RUN_TIME = ["H", "W", "Wo", "num_pixels", "first_center", "G"]


@triton.jit
def _softmax_weights(logit, first, inside, K: tl.constexpr):
    """K vectors (Q,) of softmax over the K logits that begin at `first`."""
    values = ()
    largest = tl.full(first.shape, float("-inf"), tl.float32)
    for k in tl.static_range(K):
        value = tl.load(logit + first + k, mask=inside, other=0.0).to(tl.float32)
        values = values + (value,)  # type: ignore[assignment]  # noqa: RUF005
        largest = tl.maximum(largest, value)
    weights = ()
    total = tl.zeros(first.shape, tl.float32)
    for k in tl.static_range(K):
        weight = tl.exp(values[k] - largest)
        weights = weights + (weight,)  # type: ignore[assignment]  # noqa: RUF005
        total += weight
    normal = 1.0 / total
    normalised = ()
    for k in tl.static_range(K):
        normalised = normalised + (weights[k] * normal,)  # type: ignore[assignment]  # noqa: RUF005
    return normalised


@triton.jit
def _location(
    offset, first, inside, x_middle, y_middle, scale,
    k: tl.constexpr, SIZE: tl.constexpr, DILATION: tl.constexpr, REMOVE_CENTER: tl.constexpr,
):  # fmt: skip
    """Where point k of Q pixels samples: x, y in fp32. Points run column by column; an offset is (x, y)."""
    point: tl.constexpr = k + 1 if REMOVE_CENTER and k >= SIZE * SIZE // 2 else k
    half: tl.constexpr = DILATION * (SIZE - 1) // 2
    pair = offset + (first + 2 * k)[:, None] + tl.arange(0, 2)[None, :]
    x_offset, y_offset = tl.split(tl.load(pair, mask=inside[:, None], other=0.0).to(tl.float32))
    x = x_middle + (point // SIZE * DILATION - half + x_offset) * scale
    y = y_middle + (point % SIZE * DILATION - half + y_offset) * scale
    return x, y


@triton.jit
def _share(high_share, HIGH: tl.constexpr):
    """Bilinear weight of the integer above a coordinate, or of the one below."""
    return high_share if HIGH else 1 - high_share


@triton.jit
def _corner(x_low, y_low, RIGHT: tl.constexpr, BELOW: tl.constexpr, inside, H, W, WIDE: tl.constexpr):
    """Pixel index of a corner and whether it lies in the image. Compared as fp32: NaN and 1e30 are outside."""
    column, row = x_low + RIGHT, y_low + BELOW
    is_in = inside & (column >= 0) & (column <= W - 1) & (row >= 0) & (row <= H - 1)
    pixel = tl.where(is_in, row, 0.0).to(tl.int32) * W + tl.where(is_in, column, 0.0).to(tl.int32)
    return pixel.to(tl.int64) if WIDE else pixel, is_in


@triton.jit
def _pixels(num_pixels, Wo, first_center, G, STRIDE: tl.constexpr, WIDE: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Image, group, output pixels (Q,) of this program, which of them exist, and the middles of their grids."""
    program = tl.program_id(0)
    group = program % G  # neighbours share the lines of memory that hold their offsets
    block = program // G
    blocks_per_image = tl.cdiv(num_pixels, BLOCK_Q)
    pixel = block % blocks_per_image * BLOCK_Q + tl.arange(0, BLOCK_Q)
    x_middle = (pixel % Wo * STRIDE + first_center).to(tl.float32)
    y_middle = (pixel // Wo * STRIDE + first_center).to(tl.float32)
    inside = pixel < num_pixels
    if WIDE:
        pixel = pixel.to(tl.int64)
    return (block // blocks_per_image).to(tl.int64), group, pixel, inside, x_middle, y_middle


@triton.jit(do_not_specialize=RUN_TIME)
def _forward(
    value, offset, logit, center, out,
    H, W, Wo, num_pixels, first_center, G, scale,
    D: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
    REMOVE_CENTER: tl.constexpr, HAS_CENTER: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    C = G * D
    K: tl.constexpr = SIZE * SIZE - REMOVE_CENTER
    image, group, pixel, inside, x_middle, y_middle = _pixels(num_pixels, Wo, first_center, G, STRIDE, WIDE, BLOCK_Q)
    value += image * H * W * C
    out += image * num_pixels * C
    offset += image * num_pixels * (G * K * 2)
    logit += image * num_pixels * (G * K)
    first = (pixel * G + group) * K
    weights = _softmax_weights(logit, first, inside, K)
    for chunk in range(0, D, BLOCK_D):
        channel = chunk + tl.arange(0, BLOCK_D)[None, :]
        is_channel = channel < D
        channel += group * D
        total = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
        for k in tl.static_range(K):
            x, y = _location(offset, 2 * first, inside, x_middle, y_middle, scale, k, SIZE, DILATION, REMOVE_CENTER)
            x_low, y_low = tl.floor(x), tl.floor(y)
            for corner in tl.static_range(4):
                source, is_in = _corner(x_low, y_low, corner % 2, corner // 2, inside, H, W, WIDE)
                share = _share(x - x_low, corner % 2) * _share(y - y_low, corner // 2)
                mask = is_in[:, None]
                if D % BLOCK_D != 0:
                    mask = mask & is_channel
                corner_value = tl.load(value + source[:, None] * C + channel, mask=mask, other=0.0)
                total += (weights[k] * share)[:, None] * corner_value.to(tl.float32)
        place = pixel[:, None] * C + channel
        mask = inside[:, None]
        if D % BLOCK_D != 0:
            mask = mask & is_channel
        if HAS_CENTER:
            gate = tl.load(center + image * num_pixels * G + pixel * G + group, mask=inside, other=0.0)
            gate = tl.sigmoid(gate.to(tl.float32))[:, None]
            own = tl.load(value + place, mask=mask, other=0.0).to(tl.float32)
            total += gate * (own - total)
        tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _sample_backward(
    grad_tile, value, grad_value, x, y, weight, inside, is_channel, H, W, C, one,
    MASKED: tl.constexpr, WIDE: tl.constexpr, FIXED_POINT: tl.constexpr,
):  # fmt: skip
    """One point of Q pixels: <grad, sample>, its derivatives by x and y, and the sample's share of grad_value added."""
    x_low, y_low = tl.floor(x), tl.floor(y)
    sample, by_x, by_y = tl.zeros_like(x), tl.zeros_like(x), tl.zeros_like(x)
    for corner in tl.static_range(4):
        source, is_in = _corner(x_low, y_low, corner % 2, corner // 2, inside, H, W, WIDE)
        x_share, y_share = _share(x - x_low, corner % 2), _share(y - y_low, corner // 2)
        mask = is_in[:, None] & is_channel if MASKED else is_in[:, None]
        corner_value = tl.load(value + source[:, None] * C, mask=mask, other=0.0).to(tl.float32)
        dot = tl.sum(grad_tile * corner_value, 1)
        sample += dot * x_share * y_share
        by_x += dot * y_share * (corner % 2 * 2 - 1)
        by_y += dot * x_share * (corner // 2 * 2 - 1)
        share = weight * x_share * y_share
        _add(grad_value + source[:, None] * C, grad_tile * share[:, None], mask, one, FIXED_POINT)
    return sample, by_x, by_y


@triton.jit(do_not_specialize=RUN_TIME)
def _backward(
    grad, value, offset, logit, center, unit,
    grad_value, grad_offset, grad_logit, grad_center,
    H, W, Wo, num_pixels, first_center, G, scale,
    D: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
    REMOVE_CENTER: tl.constexpr, HAS_CENTER: tl.constexpr, WIDE: tl.constexpr, FIXED_POINT: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    C = G * D
    K: tl.constexpr = SIZE * SIZE - REMOVE_CENTER
    image, group, pixel, inside, x_middle, y_middle = _pixels(num_pixels, Wo, first_center, G, STRIDE, WIDE, BLOCK_Q)
    value += image * H * W * C
    grad_value += image * H * W * C
    grad += image * num_pixels * C
    offset += image * num_pixels * (G * K * 2)
    grad_offset += image * num_pixels * (G * K * 2)
    logit += image * num_pixels * (G * K)
    grad_logit += image * num_pixels * (G * K)
    first = (pixel * G + group) * K
    weights = _softmax_weights(logit, first, inside, K)
    one = tl.load(unit) if FIXED_POINT else 1.0
    zero = tl.zeros((BLOCK_Q,), tl.float32)
    own_dot, mean, gate, samples = zero, zero, zero, ()
    if HAS_CENTER:
        center += image * num_pixels * G + pixel * G + group
        gate = tl.sigmoid(tl.load(center, mask=inside, other=0.0).to(tl.float32))
    for k in tl.static_range(K):
        x, y = _location(offset, 2 * first, inside, x_middle, y_middle, scale, k, SIZE, DILATION, REMOVE_CENTER)
        sample, by_x, by_y = zero, zero, zero
        for chunk in range(0, D, BLOCK_D):
            channel = chunk + tl.arange(0, BLOCK_D)[None, :]
            is_channel = channel < D
            channel += group * D
            place = pixel[:, None] * C + channel
            here = inside[:, None] & is_channel if D % BLOCK_D != 0 else inside[:, None]
            grad_tile = tl.load(grad + place, mask=here, other=0.0).to(tl.float32)
            if HAS_CENTER and k == 0:
                own = tl.load(value + place, mask=here, other=0.0).to(tl.float32)
                own_dot += tl.sum(grad_tile * own, 1)
                _add(grad_value + place, grad_tile * gate[:, None], here, one, FIXED_POINT)
            parts = _sample_backward(
                grad_tile, value + channel, grad_value + channel, x, y, (1 - gate) * weights[k], inside, is_channel,
                H, W, C, one, D % BLOCK_D != 0, WIDE, FIXED_POINT,
            )  # fmt: skip
            sample, by_x, by_y = sample + parts[0], by_x + parts[1], by_y + parts[2]
        samples = samples + (sample,)  # type: ignore[assignment]  # noqa: RUF005 - Triton knows no (*samples, sample)
        mean += weights[k] * sample
        factor = (1 - gate) * weights[k] * scale
        pair = grad_offset + (2 * first + 2 * k)[:, None] + tl.arange(0, 2)[None, :]
        _store(pair, tl.join(factor * by_x, factor * by_y), inside[:, None])
    for k in tl.static_range(K):
        _store(grad_logit + first + k, (1 - gate) * weights[k] * (samples[k] - mean), inside)
    if HAS_CENTER:
        grad_center += image * num_pixels * G + pixel * G + group
        _store(grad_center, gate * (1 - gate) * (own_dot - mean), inside)


@triton.jit
def _store(pointer, value, mask):
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _add(pointer, value, mask, one, FIXED_POINT: tl.constexpr):
    """Adds to what other programs add to as well; integers that make up `one`, whose sum knows no order, or floats."""
    if FIXED_POINT:
        tl.atomic_add(pointer, tl.floor(value.to(tl.float64) * one + 0.5).to(tl.int64), mask=mask, sem="relaxed")
    else:
        tl.atomic_add(pointer, value, mask=mask, sem="relaxed")


def _one_vector_per_thread(configs: list[triton.Config], arguments: dict[str, Any], **more: Any) -> list[triton.Config]:
    """Of all pairs of pixels and warps those that give each thread 16 bytes of channels of one pixel."""
    arguments = arguments | more
    channels = VECTOR_BYTES // arguments["value"].element_size()
    threads_a_pixel = max(arguments["BLOCK_D"] // channels, 1)
    return [c for c in configs if c.kwargs["BLOCK_Q"] * threads_a_pixel == 32 * c.num_warps] or configs[:1]


def _tuned(kernel: Any, *, accumulated: list[str]) -> Any:
    """The kernel with its number of pixels and warps measured once for each operator shape, not for each image size."""
    configs = [triton.Config({"BLOCK_Q": 2**p}, num_warps=warps) for warps in WARPS for p in range(9)]
    if os.environ.get("TRITON_INTERPRET") == "1":  # nothing to measure, and no device to measure on
        return triton.autotune([triton.Config({"BLOCK_Q": 16})], key=[])(kernel)
    key = ["D", "SIZE", "STRIDE", "DILATION", "REMOVE_CENTER", "HAS_CENTER", "WIDE"]
    return triton.autotune(
        configs, key=key, reset_to_zero=accumulated, prune_configs_by={"early_config_prune": _one_vector_per_thread}
    )(kernel)


_tuned_forward = _tuned(_forward, accumulated=[])
_tuned_backward = _tuned(_backward, accumulated=["grad_value"])  # each trial adds to it


def dcnv3(value_BHWC: Tensor, offset: Tensor, logit: Tensor, center: Tensor | None, geometry: Geometry) -> Tensor:
    """Arguments and result as in op.py; fp64, which is for tests, goes to the reference."""
    if value_BHWC.dtype == torch.float64:
        return reference.dcnv3(value_BHWC, offset, logit, center, geometry)
    value, offset, logit = map(_aligned, (value_BHWC, offset, logit))
    center = None if center is None else _aligned(center)
    out = value.new_empty((*offset.shape[:3], value.shape[-1]))
    if out.numel():
        _tuned_forward[_grid(value, offset, geometry)](
            value, offset, logit, center, out, **_settings(value, offset, center, geometry)
        )
    return out


def dcnv3_backward(
    grad_BHWC: Tensor, value_BHWC: Tensor, offset: Tensor, logit: Tensor, center: Tensor | None, geometry: Geometry
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients by value, offset, logit and center.

    The gradient by the value is added up in fp32 in the order in which programs happen to run, or, under
    `torch.use_deterministic_algorithms(True)`, in 64-bit fixed point, whose sum is the same in any order (and closer to
    the true one). A gradient that is not finite makes all of that gradient NaN there.
    """
    if value_BHWC.dtype == torch.float64:
        return reference.dcnv3_backward(grad_BHWC, value_BHWC, offset, logit, center, geometry)
    grad, value, offset, logit = map(_aligned, (grad_BHWC, value_BHWC, offset, logit))
    center = None if center is None else _aligned(center)
    exact = torch.are_deterministic_algorithms_enabled()
    grad_value = torch.zeros_like(value, dtype=torch.int64 if exact else torch.float32)
    grad_offset, grad_logit = torch.empty_like(offset), torch.empty_like(logit)
    grad_center = None if center is None else torch.empty_like(center)
    unit = _fixed_point_unit(grad) if exact else None
    if grad.numel():
        _tuned_backward[_grid(value, offset, geometry)](
            grad, value, offset, logit, center, unit, grad_value, grad_offset, grad_logit, grad_center,
            FIXED_POINT=exact, **_settings(value, offset, center, geometry),
        )  # fmt: skip
    if unit is not None:
        grad_value = grad_value.double() / unit
    return grad_value.to(value.dtype), grad_offset, grad_logit, grad_center


def _fixed_point_unit(grad_BHWC: Tensor) -> Tensor:
    """How many integers make 1. An output pixel gives an element at most its own gradient: its weights sum to 1."""
    bound = grad_BHWC.abs().amax().double().clamp_min(1e-200) * (grad_BHWC.shape[1] * grad_BHWC.shape[2])
    return torch.exp2(torch.floor(FIXED_POINT_BITS - torch.log2(bound)))


def _aligned(x: Tensor) -> Tensor:
    """The tensor, contiguous and at a multiple of 16 bytes."""
    x = x.contiguous()
    return x if x.data_ptr() % VECTOR_BYTES == 0 else x.clone()


def _grid(value: Tensor, offset: Tensor, geometry: Geometry) -> Callable[[dict[str, Any]], tuple[int]]:
    num_images, num_pixels = len(value), offset.shape[1] * offset.shape[2]
    return lambda meta: (num_images * triton.cdiv(num_pixels, meta["BLOCK_Q"]) * geometry.groups,)


def _settings(value: Tensor, offset: Tensor, center: Tensor | None, geometry: Geometry) -> dict[str, Any]:
    _, H, W, C = value.shape
    _, Ho, Wo, per_pixel = offset.shape
    run_time = dict(zip(RUN_TIME, (H, W, Wo, Ho * Wo, geometry.first_center, geometry.groups), strict=True))
    wide = max(H * W * C, Ho * Wo * max(C, per_pixel)) >= INT32_LIMIT
    constants = _constants(C // geometry.groups, geometry, center is not None, wide)
    return run_time | {"scale": geometry.offset_scale} | constants


def _constants(width: int, geometry: Geometry, has_center: bool, wide: bool) -> dict[str, Any]:
    return {
        "D": width,
        "SIZE": geometry.kernel_size,
        "STRIDE": geometry.stride,
        "DILATION": geometry.dilation,
        "REMOVE_CENTER": geometry.remove_center,
        "HAS_CENTER": has_center,
        "WIDE": wide,
        "BLOCK_D": min(triton.next_power_of_2(width), MAX_BLOCK_D),
    }


def variants() -> Iterator[Variant]:
    """What to compile ahead of time: groups of 32 channels (InternImage-H and -G) and of 16 (T to XL)."""
    for width, dtype, passes in ((32, "bf16", ("forward", "backward", "exact")), (16, "bf16", ("forward", "backward"))):
        constants = _constants(width, Geometry(groups=10), width == 32, wide=False)
        # One 16-byte vector for each thread of four warps.
        constants["BLOCK_Q"] = 4 * 32 * (VECTOR_BYTES // 2) // width
        tensors = dict.fromkeys(("value", "offset", "logit", "center", "out", "grad"), f"*{dtype}")
        tensors |= {f"grad_{x}": f"*{dtype}" for x in ("offset", "logit", "center")}
        numbers = dict.fromkeys(RUN_TIME, "i32") | {"scale": "fp32"}
        for name in passes:
            if name == "forward":
                yield Variant(f"forward_{dtype}_D{width}", _forward, tensors | numbers, constants)
            else:
                sums = {"grad_value": "*i64" if name == "exact" else "*fp32", "unit": "*fp64"}
                fixed = {"FIXED_POINT": name == "exact"}
                yield Variant(f"{name}_{dtype}_D{width}", _backward, tensors | numbers | sums, constants | fixed)

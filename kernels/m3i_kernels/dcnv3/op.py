"""`dcnv3` as users call it: checks, then a torch custom operator (with its own backward operator) that dispatches.

Legend: B images, H W of the value, h w of the output, C = G * D channels, G groups, K points.
"""

from typing import Any

import torch
from torch import Tensor

from m3i_kernels.dcnv3.geometry import Geometry
from m3i_kernels.dispatch import implementation

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def dcnv3(
    value_BHWC: Tensor,
    offset: Tensor,
    logit: Tensor,
    center: Tensor | None = None,
    *,
    groups: int,
    kernel_size: int = 3,
    stride: int = 1,
    padding: int = 1,
    dilation: int = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
) -> Tensor:
    """Deformable convolution v3 of InternImage (Wang et al., CVPR 2023, Eq. 2), without its projections.

    Output pixel (row, col) of group g is sum over k of softmax(logit)_k * value(location_k), where location_k =
    (col * stride - padding + half, row * ...) + (point_k + offset_k) * offset_scale, read bilinearly with zeros
    outside (each corner by itself). Points run column by column, offsets are (x, y). With `center` the result is
    blended with the value at the same place: (1 - s) * result + s * value, s = sigmoid(center).

    Args:
        value_BHWC: C = groups * D, channel g * D + d.
        offset: (B, h, w, groups * K * 2), ordered group, point, (x, y); pixels.
        logit: (B, h, w, groups * K), before the softmax.
        center: (B, H, W, groups), before the sigmoid; needs h = H and w = W.
        kernel_size, stride, padding, dilation: as of a convolution, equal in both directions.
        offset_scale: multiplies the point and the offset.
        remove_center: leaves the middle point out, K = kernel_size ** 2 - 1; else K = kernel_size ** 2.

    Returns:
        (B, h, w, C) in the dtype of `value_BHWC`; coordinates, softmax and sums are fp32 (fp64 where the value is).
        The gradient by the value is a sum in no fixed order on a GPU, unless
        `torch.use_deterministic_algorithms(True)` is set.

    Raises:
        ValueError: a shape, dtype, device or number is not as above.
    """
    geometry = Geometry(groups, kernel_size, stride, padding, dilation, float(offset_scale), bool(remove_center))
    _check(value_BHWC, {"offset": offset, "logit": logit, "center": center}, geometry)
    return _dcnv3(value_BHWC, offset, logit, center, *geometry)


def _check(value: Tensor, given: dict[str, Tensor | None], geometry: Geometry) -> None:
    for name in ("groups", "kernel_size", "stride", "dilation"):
        if getattr(geometry, name) < 1:
            raise ValueError(f"{name} must be 1 or more, got {getattr(geometry, name)}")
    if geometry.padding < 0:
        raise ValueError(f"padding must be 0 or more, got {geometry.padding}")
    if geometry.remove_center and (geometry.kernel_size % 2 == 0 or geometry.kernel_size == 1):
        raise ValueError(f"remove_center needs an odd kernel_size of 3 or more, got {geometry.kernel_size}")
    if value.dim() != 4 or value.shape[-1] % geometry.groups:
        raise ValueError(
            f"value_BHWC must have shape (B, H, W, C) with C a multiple of groups = {geometry.groups}, "
            f"got {tuple(value.shape)}"
        )
    B, H, W, _ = value.shape
    h, w = geometry.output_size(H), geometry.output_size(W)
    if min(h, w) < 1:
        raise ValueError(f"value_BHWC of {H} x {W} is smaller than the kernel, needed an output of 1 x 1 or more")
    needed = {
        "offset": (B, h, w, geometry.groups * geometry.num_points * 2),
        "logit": (B, h, w, geometry.groups * geometry.num_points),
        "center": (B, H, W, geometry.groups),
    }
    for name, x in ({"value_BHWC": value} | given).items():
        if x is None:
            continue
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} must be one of {', '.join(map(str, DTYPES))}, got {x.dtype}")
        if x.device != value.device:
            raise ValueError(f"{name} must be on {value.device} as value_BHWC is, got {x.device}")
        if name in needed and tuple(x.shape) != needed[name]:
            raise ValueError(f"{name} must have shape {needed[name]}, got {tuple(x.shape)}")
    if given["center"] is not None and (h, w) != (H, W):
        raise ValueError(f"center needs an output as large as the value, {H} x {W}, got {h} x {w}")


# Geometry is spelled out: a custom operator's schema has numbers only.
@torch.library.custom_op("m3i::dcnv3", mutates_args=())
def _dcnv3(
    value: Tensor,
    offset: Tensor,
    logit: Tensor,
    center: Tensor | None,
    groups: int,
    kernel_size: int,
    stride: int,
    padding: int,
    dilation: int,
    offset_scale: float,
    remove_center: bool,
) -> Tensor:
    geometry = Geometry(groups, kernel_size, stride, padding, dilation, offset_scale, remove_center)
    return implementation("dcnv3", value.device)(value, offset, logit, center, geometry)


@torch.library.custom_op("m3i::dcnv3_backward", mutates_args=())
def _dcnv3_backward(
    grad: Tensor,
    value: Tensor,
    offset: Tensor,
    logit: Tensor,
    center: Tensor | None,
    groups: int,
    kernel_size: int,
    stride: int,
    padding: int,
    dilation: int,
    offset_scale: float,
    remove_center: bool,
) -> list[Tensor]:
    geometry = Geometry(groups, kernel_size, stride, padding, dilation, offset_scale, remove_center)
    backward = implementation("dcnv3", value.device, "dcnv3_backward")
    return [x for x in backward(grad, value, offset, logit, center, geometry) if x is not None]


@_dcnv3.register_fake
def _(value: Tensor, offset: Tensor, *_: Any) -> Tensor:
    return value.new_empty((*offset.shape[:3], value.shape[-1]))


@_dcnv3_backward.register_fake
def _(grad: Tensor, *given: Any) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in given[:4] if x is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.geometry = inputs[4:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # once: under activation checkpointing a second look is an error
    grads = _dcnv3_backward(grad, *saved, *ctx.geometry)
    return (*grads, *[None] * (len(saved) - len(grads) + len(ctx.geometry)))


_dcnv3.register_autograd(_backward, setup_context=_setup_context)

"""`ema_update` as users call it: checks, then a torch custom operator that dispatches."""

from collections.abc import Sequence

import torch
from torch import Tensor

from m3i_kernels.dispatch import implementation

OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def ema_update(
    ema: Sequence[Tensor],
    source: Sequence[Tensor],
    *,
    momentum: float,
    out: Sequence[Tensor] | None = None,
    skip: Tensor | None = None,
) -> None:
    """Updates exponential moving averages in place: ema = momentum * ema + (1 - momentum) * source, tensor by tensor.

    The average stays in fp32: in bf16 a step of 1 - momentum is below the rounding and the average stands still
    (M3I section 3.4 uses momentum 0.995 to 1). On a GPU all tensors are one launch. Not differentiable: autograd does
    not see the update.

    Args:
        ema: fp32 tensors of any shapes and strides, on one device.
        source: fp32, as many, of the same shapes.
        momentum: in [0, 1]; 1 leaves every bit of ema.
        out: receive the new averages rounded to their dtype (bf16, fp16 or fp32, one for all); as many elements each.
        skip: one bool on the device; where it is true nothing changes. Nobody waits for its value.

    Raises:
        ValueError: a shape, dtype, device, number of tensors or the momentum is not as above.
    """
    for name, given in (("ema", ema), ("source", source), ("out", out)):
        if isinstance(given, Tensor):
            raise ValueError(f"{name} must be a list of tensors, got one tensor of shape {tuple(given.shape)}")
    outs = [] if out is None else list(out)
    _check(list(ema), list(source), None if out is None else outs, skip)
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be in [0, 1], got {momentum}")
    if ema:
        _ema_update(list(ema), list(source), momentum, outs, skip)


def _check(ema: list[Tensor], source: list[Tensor], out: list[Tensor] | None, skip: Tensor | None) -> None:
    for name, given in (("source", source), ("out", out)):
        if given is not None and len(given) != len(ema):
            raise ValueError(f"{name} must have the {len(ema)} tensors of ema, got {len(given)}")
    for i, (e, s) in enumerate(zip(ema, source, strict=True)):
        for name, x in (("ema", e), ("source", s)):
            if x.dtype != torch.float32:
                raise ValueError(f"{name}[{i}] must be torch.float32, got {x.dtype}")
            if x.device != ema[0].device:
                raise ValueError(f"{name}[{i}] must be on {ema[0].device} as ema[0] is, got {x.device}")
        if e.shape != s.shape:
            raise ValueError(f"ema[{i}] and source[{i}] must have one shape, got {tuple(e.shape)} and {tuple(s.shape)}")
    for i, o in enumerate(out or []):
        if o.dtype not in OUT_DTYPES or o.dtype != (out or [])[0].dtype:
            raise ValueError(f"out[{i}] must be one of {', '.join(map(str, OUT_DTYPES))}, one for all, got {o.dtype}")
        if o.numel() != ema[i].numel():
            raise ValueError(f"out[{i}] must have the {ema[i].numel()} elements of ema[{i}], got {o.numel()}")
        if o.device != ema[0].device:
            raise ValueError(f"out[{i}] must be on {ema[0].device} as ema[0] is, got {o.device}")
    if skip is not None and (skip.dtype != torch.bool or skip.numel() != 1 or (ema and skip.device != ema[0].device)):
        raise ValueError(
            f"skip must be one bool on the device of ema, got {skip.numel()} {skip.dtype} on {skip.device}"
        )


@torch.library.custom_op("m3i::ema_update", mutates_args=("ema", "out"))
def _ema_update(
    ema: list[Tensor], source: list[Tensor], momentum: float, out: list[Tensor], skip: Tensor | None
) -> None:
    implementation("ema_update", ema[0].device)(ema, source, momentum=momentum, out=out, skip=skip)


@_ema_update.register_fake
def _(ema: list[Tensor], source: list[Tensor], momentum: float, out: list[Tensor], skip: Tensor | None) -> None:
    return None

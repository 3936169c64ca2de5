"""`ema_update` as users call it: checks, then a torch custom operator that dispatches."""

import torch
from torch import Tensor

from m3i_kernels.dispatch import implementation

OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def ema_update(ema: Tensor, source: Tensor, *, momentum: float, out: Tensor | None = None) -> None:
    """Updates an exponential moving average in place: ema = momentum * ema + (1 - momentum) * source.

    The average stays in fp32: in bf16 a step of 1 - momentum is below the rounding and the average stands still
    (M3I section 3.4 uses momentum 0.995 to 1). Not differentiable: autograd does not see the update.

    Args:
        ema: fp32, any shape, any strides.
        source: fp32, same shape.
        momentum: in [0, 1].
        out: receives the new average rounded to its dtype (bf16, fp16 or fp32); same number of elements, any shape.

    Raises:
        ValueError: a shape, dtype, device or the momentum is not as above.
    """
    for name, x in (("ema", ema), ("source", source)):
        if x.dtype != torch.float32:
            raise ValueError(f"{name} must be torch.float32, got {x.dtype}")
    if ema.shape != source.shape:
        raise ValueError(f"ema and source must have one shape, got {tuple(ema.shape)} and {tuple(source.shape)}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be in [0, 1], got {momentum}")
    if out is not None and out.dtype not in OUT_DTYPES:
        raise ValueError(f"out must be one of {', '.join(map(str, OUT_DTYPES))}, got {out.dtype}")
    if out is not None and out.numel() != ema.numel():
        raise ValueError(f"out must have the {ema.numel()} elements of ema, got {out.numel()}")
    for name, y in (("source", source), ("out", out)):
        if y is not None and y.device != ema.device:
            raise ValueError(f"{name} must be on {ema.device} as ema is, got {y.device}")
    _ema_update(ema, source, momentum, out)


@torch.library.custom_op("m3i::ema_update", mutates_args=("ema", "out"))
def _ema_update(ema: Tensor, source: Tensor, momentum: float, out: Tensor | None) -> None:
    implementation("ema_update", ema.device)(ema, source, momentum=momentum, out=out)


@_ema_update.register_fake
def _(ema: Tensor, source: Tensor, momentum: float, out: Tensor | None) -> None:
    return None

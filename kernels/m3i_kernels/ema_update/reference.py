"""The specification of `ema_update`."""

from torch import Tensor


def ema_update(ema: Tensor, source: Tensor, *, momentum: float, out: Tensor | None) -> None:
    """ema += (1 - momentum) * (source - ema), elementwise in fp32; `out` gets the result, rounded to nearest even."""
    # lerp, unlike momentum * ema + (1 - momentum) * source, leaves ema == source exactly where it is, returns source
    # exactly at momentum 0, and treats an element alike wherever a partition begins.
    ema.lerp_(source, 1 - momentum)
    if out is not None:
        out.copy_(ema.reshape(out.shape))

"""The specification of `ema_update`."""

from collections.abc import Sequence

import torch
from torch import Tensor


def ema_update(
    ema: Sequence[Tensor], source: Sequence[Tensor], *, momentum: float, out: Sequence[Tensor], skip: Tensor | None
) -> None:
    """ema += (1 - momentum) * (source - ema), elementwise in fp32; `out` gets the result, rounded to nearest even."""
    # lerp, unlike momentum * ema + (1 - momentum) * source, leaves ema == source exactly where it is and treats an
    # element alike wherever a partition begins. At both ends it would still compute: an infinite source would reach the
    # average at momentum 1, an infinite average would survive momentum 0, and -0 would become 0.
    ema, source, out = list(ema), list(source), list(out)
    # Skipping is a choice, not a product with 0: what is skipped may be NaN.
    kept = [] if skip is None else [x.clone() for x in (*ema, *out)]
    if momentum == 0:
        torch._foreach_copy_(ema, source)
    elif momentum < 1:
        torch._foreach_lerp_(ema, source, 1 - momentum)
    if out:
        torch._foreach_copy_(out, [e.reshape(o.shape) for e, o in zip(ema, out, strict=True)])
    if skip is not None:
        for x, before in zip((*ema, *out), kept, strict=True):
            x.copy_(torch.where(skip, before, x))

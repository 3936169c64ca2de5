"""The specification of `ema_update`."""

from collections.abc import Sequence

import torch
from torch import Tensor


def ema_update(
    ema: Sequence[Tensor], source: Sequence[Tensor], *, momentum: float, out: Sequence[Tensor], skip: Tensor | None
) -> None:
    """ema += (1 - momentum) * (source - ema), elementwise in fp32; `out` gets the result, rounded to nearest even."""
    nothing: list[Tensor | None] = [None] * len(ema)
    for e, s, o in zip(ema, source, out or nothing, strict=True):
        # lerp, unlike momentum * ema + (1 - momentum) * source, leaves ema == source exactly where it is and treats an
        # element alike wherever a partition begins. At both ends it would still compute: an infinite source would reach
        # the average at momentum 1, an infinite average would survive momentum 0, and -0 would become 0.
        # Skipping is a choice, not a product with 0: what is skipped may be NaN.
        kept = e.clone() if skip is not None else e
        if momentum == 0:
            e.copy_(s)
        elif momentum < 1:
            e.lerp_(s, 1 - momentum)
        if skip is not None:
            e.copy_(torch.where(skip, kept, e))
        if o is not None:
            new = e.reshape(o.shape)
            o.copy_(new if skip is None else torch.where(skip, o, new.to(o.dtype)))

"""What every operator's tests share: one table of tolerances, odd shapes, memory layouts."""

from collections.abc import Iterator

import torch
from torch import Tensor

# dtype of the result -> (absolute, relative); relative is about one unit in the last place for 16 bits (two
# implementations that differ in the last fp32 bit may round to neighbours) and a few dozen for 32 and 64 bits.
TOLERANCES = {
    torch.float64: (1e-12, 1e-10),
    torch.float32: (1e-6, 5e-6),
    torch.float16: (1e-4, 1e-3),
    torch.bfloat16: (1e-4, 8e-3),
}
# Numbers of elements: one, primes, powers of two and their neighbours (block borders).
ODD_SIZES = (1, 2, 3, 7, 31, 127, 128, 129, 1031, 4096, 5003)
# (N, H, W) of image batches: one pixel, primes, tall, wide, a square that blocks divide.
ODD_IMAGES = ((1, 1, 1), (2, 1, 7), (3, 5, 1), (2, 13, 11), (5, 31, 3), (4, 32, 32), (3, 12, 30))


def assert_close(actual: Tensor, expected: Tensor, *, scale: float = 1.0, what: str = "result") -> None:
    """Asserts equality within the tolerance of `actual`'s dtype; `expected` may be more precise.

    Args:
        actual, expected: same shape; NaN is never equal.
        scale: multiplies the absolute tolerance, for sums of values of about this size.
        what: name in the message.

    Raises:
        AssertionError: shapes differ or a value does.
        ValueError: no tolerance for the dtype.
    """
    if actual.dtype not in TOLERANCES:
        raise ValueError(f"no tolerance for {actual.dtype}, have {[str(d) for d in TOLERANCES]}")
    atol, rtol = TOLERANCES[actual.dtype]
    torch.testing.assert_close(
        actual.detach().double().cpu(),
        expected.detach().double().cpu(),
        atol=atol * scale,
        rtol=rtol,
        msg=lambda text: f"{what} ({actual.dtype}): {text}",
    )


def noncontiguous(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, copy) of `x` in awkward memory layouts: same shape, dtype, device and values."""
    yield "reversed strides", _filled(x, x.new_empty(x.shape[::-1]).permute(tuple(reversed(range(x.dim())))))
    yield "every second element", _filled(x, x.new_empty((*x.shape, 2))[..., 0])
    yield "odd storage offset", _filled(x, x.new_empty(x.numel() + 1)[1:].view(x.shape))
    if x.dim():
        yield "slice of a wider tensor", _filled(x, x.new_empty((*x.shape[:-1], x.shape[-1] + 3))[..., 1:-2])


def _filled(x: Tensor, layout: Tensor) -> Tensor:
    layout.copy_(x)
    return layout

"""`ema_update` as one Triton launch over any number of tensors: 12 bytes a parameter and those of the rounded copy."""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3i_kernels.aot import Variant

BLOCK = 4096
VECTOR_BYTES = 16
COLUMNS = 5  # addresses of ema, source and out; elements; whether all three begin at a multiple of 16 bytes
TABLES_KEPT = 4


@triton.jit
def _lerp(ema, source, weight):
    """torch.lerp's two forms: exact at both ends, and where both values are equal."""
    moved = tl.where(weight < 0.5, ema + weight * (source - ema), source - (source - ema) * (1 - weight))
    return tl.where(weight == 0, ema, moved)


@triton.jit
def _update(ema, source, out, here, place, weight, HAS_OUT: tl.constexpr):
    value = _lerp(tl.load(ema + place, mask=here), tl.load(source + place, mask=here), weight)
    tl.store(ema + place, value, mask=here)
    if HAS_OUT:
        tl.store(out + place, value.to(out.dtype.element_ty), mask=here)


@triton.jit
def _ema_update(
    table, skip, weight, OUT: tl.constexpr, HAS_OUT: tl.constexpr, HAS_SKIP: tl.constexpr, BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    table += tl.program_id(0).to(tl.int64) * COLUMNS
    ema = tl.load(table).to(tl.pointer_type(tl.float32))
    source = tl.load(table + 1).to(tl.pointer_type(tl.float32))
    out = tl.load(table + 2).to(tl.pointer_type(OUT))
    place = tl.arange(0, BLOCK)
    here = place < tl.load(table + 3)
    if HAS_SKIP:
        here = here & (tl.load(skip) == 0)
    if tl.load(table + 4) != 0:
        # A partition begins anywhere; vectors of 16 bytes only where all three tensors allow them.
        ema, source, out = tl.multiple_of(ema, 16), tl.multiple_of(source, 16), tl.multiple_of(out, 16)
        _update(ema, source, out, here, place, weight, HAS_OUT)
    else:
        _update(ema, source, out, here, place, weight, HAS_OUT)


_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_tables: dict[tuple[object, ...], Tensor] = {}


def ema_update(
    ema: Sequence[Tensor], source: Sequence[Tensor], *, momentum: float, out: Sequence[Tensor], skip: Tensor | None
) -> None:
    """Arguments as in op.py; `out` may be empty."""
    nothing: list[Tensor | None] = [None] * len(ema)
    rows = [row for row in zip(ema, source, out or nothing, strict=True) if row[0].numel()]
    if not rows:
        return
    # The kernel sees flat memory: what is not contiguous is updated in a copy and written back.
    flat = [tuple(None if x is None else x.contiguous() for x in row) for row in rows]
    table = _table(flat)
    dtype = out[0].dtype if out else torch.float32
    _ema_update[(len(table),)](
        table, skip, 1 - momentum,
        OUT=_TYPES[dtype], HAS_OUT=bool(out), HAS_SKIP=skip is not None, BLOCK=BLOCK, COLUMNS=COLUMNS,
    )  # fmt: skip
    for row, copies in zip(rows, flat, strict=True):
        for x, copy in zip(row[::2], copies[::2], strict=True):
            if x is not None and copy is not None and x is not copy:
                x.copy_(copy)


def _table(rows: list[tuple[Tensor | None, ...]]) -> Tensor:
    """(blocks, COLUMNS) int64 on the device, built once for the same memory: later calls copy nothing there."""
    device = rows[0][0].device  # type: ignore[union-attr]
    key = (device, *((x.data_ptr(), x.numel(), x.element_size()) if x is not None else None for r in rows for x in r))
    if key not in _tables:
        while len(_tables) >= TABLES_KEPT:
            del _tables[next(iter(_tables))]
        _tables[key] = torch.cat([_blocks(row) for row in rows]).to(device)
    return _tables[key]


def _blocks(row: tuple[Tensor | None, ...]) -> Tensor:
    """The rows of the table for one tensor."""
    count = row[0].numel()  # type: ignore[union-attr]
    first = torch.arange(0, count, BLOCK)
    addresses = [first * x.element_size() + x.data_ptr() if x is not None else first * 0 for x in row]
    aligned = all(x is None or x.data_ptr() % VECTOR_BYTES == 0 for x in row)
    return torch.stack([*addresses, (count - first).clamp_max(BLOCK), torch.full_like(first, aligned)], dim=1)


def variants() -> Iterator[Variant]:
    """What to compile ahead of time."""
    signature = {"table": "*i64", "skip": "*i1", "weight": "fp32"}
    for name, dtype in (("bf16", tl.bfloat16), ("fp32", tl.float32)):
        constants = {"OUT": dtype, "HAS_OUT": True, "HAS_SKIP": True, "BLOCK": BLOCK, "COLUMNS": COLUMNS}
        yield Variant(f"update_{name}", _ema_update, signature, constants, num_warps=8)

"""`ema_update` of any number of tensors in one launch and one pass: 14 bytes a parameter with a 16-bit copy.

A table on the device has one row a program: where its run begins in the average, in the source and in the copy, and
how long it is. Runs that are whole blocks and aligned alike come first and move 16 bytes an instruction; what a
partition begins and ends with, and tensors that are aligned differently, move an element at a time. Every element goes
through the same arithmetic, so its bits do not depend on where a partition begins. Tables are kept: while the tensors
stay where they are, a step copies nothing to the device and never waits.
"""

import functools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from m3i_kernels.aot import Variant

WHOLE, PART = 4096, 1024  # elements of a whole block, and of a run at most that is no whole, aligned block
NUM_WARPS = 8
KEPT_TABLES = 4  # 32 bytes a block: 8 MB for a billion parameters
_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _step(average, value, weight):
    """`lerp` as PyTorch computes it: from the nearer end; at both ends exact, whatever the other end holds."""
    base = tl.where(weight < 0.5, average, value)
    coefficient = tl.where(weight < 0.5, weight, weight - 1)
    # An explicit fma: left to the compiler, the two branches below might be contracted differently.
    moved = tl.fma(tl.zeros_like(average) + coefficient, value - average, base)
    return tl.where(coefficient == 0, base, moved)


@triton.jit
def _whole(row, weight, OUT: tl.constexpr, SIZE: tl.constexpr):
    """A whole block, all of whose vectors are aligned."""
    place = tl.arange(0, SIZE)
    average = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.float32)), 16) + place
    source = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(tl.float32)), 16) + place
    x = _step(tl.load(average), tl.load(source), weight)
    tl.store(average, x)
    if OUT is not None:
        # Four elements, not 16 bytes: all accesses then share one layout, and no value changes its thread.
        out = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(OUT)), 4 * OUT.primitive_bitwidth // 8)
        tl.store(out + place, x.to(OUT))


@triton.jit
def _part(row, weight, OUT: tl.constexpr, SIZE: tl.constexpr):
    """A run of at most SIZE elements, anywhere."""
    place = tl.arange(0, SIZE)
    inside = place < tl.load(row + 3)
    average = tl.load(row).to(tl.pointer_type(tl.float32)) + place
    source = tl.load(row + 1).to(tl.pointer_type(tl.float32)) + place
    x = _step(tl.load(average, mask=inside, other=0), tl.load(source, mask=inside, other=0), weight)
    tl.store(average, x, mask=inside)
    if OUT is not None:
        tl.store(tl.load(row + 2).to(tl.pointer_type(OUT)) + place, x.to(OUT), mask=inside)


@triton.jit(do_not_specialize=["num_whole"])
def _ema_update_kernel(
    table, num_whole, weight, skip, OUT: tl.constexpr, HAS_SKIP: tl.constexpr, WHOLE: tl.constexpr, PART: tl.constexpr
):
    """One program a row of the table: addresses of average, source and copy, number of elements."""
    runs = tl.load(skip).to(tl.int1) == 0 if HAS_SKIP else True
    row = table + tl.program_id(0) * 4
    if runs:
        # Two sizes, because accesses of one shape get one layout: the parts' would be strided, 4 bytes at a time.
        if tl.program_id(0) < num_whole:
            _whole(row, weight, OUT, WHOLE)
        else:
            _part(row, weight, OUT, PART)


def ema_update(
    ema: Sequence[Tensor], source: Sequence[Tensor], *, momentum: float, out: Sequence[Tensor], skip: Tensor | None
) -> None:
    """Arguments as in op.py; an empty `out` means none. Tensors that are not contiguous are copied there and back."""
    device = ema[0].device
    if triton.knobs.runtime.interpret and device.type != "cpu":
        raise ValueError(f"Triton's interpreter follows addresses on the CPU only, got tensors on {device}")
    dense = [[x.contiguous() for x in tensors] for tensors in (ema, source, out)]
    addresses = tuple(tuple(x.data_ptr() for x in tensors) for tensors in dense)
    dtype = out[0].dtype if out else None
    counts = tuple(x.numel() for x in ema)
    table, num_whole = _table(addresses, counts, dtype.itemsize if dtype else 0, device)
    if len(table):
        with torch.cuda.device_of(table):
            _ema_update_kernel[(len(table),)](
                table,
                num_whole,
                float(1 - momentum),
                table if skip is None else skip,
                OUT=_DTYPES[dtype] if dtype else None,
                HAS_SKIP=skip is not None,
                WHOLE=WHOLE,
                PART=PART,
                num_warps=NUM_WARPS,
            )
    for given, used in zip((*ema, *out), (*dense[0], *dense[2]), strict=True):
        if given is not used and not given.is_contiguous():
            given.copy_(used)


@functools.lru_cache(maxsize=KEPT_TABLES)
def _table(
    addresses: tuple[tuple[int, ...], ...], counts: tuple[int, ...], out_bytes: int, device: torch.device
) -> tuple[Tensor, int]:
    """Returns the kernel's table (rows, 4) and how many rows at its beginning are whole and aligned.

    It depends on nothing but the arguments: addresses that other tensors have taken over are still right.
    """
    ema, source, out = addresses
    whole, parts = [], []
    for average, value, copy, count in zip(ema, source, out or (0,) * len(ema), counts, strict=True):
        rows = functools.partial(_rows, average, value, copy, out_bytes)
        begin, end = _whole_run(average, value, copy, count, out_bytes)
        whole.append(rows(begin, end, WHOLE))
        parts += [rows(0, begin, PART), rows(end, count, PART)]
    table = torch.from_numpy(np.concatenate(whole + parts)).to(device)
    return table, sum(map(len, whole))


def _whole_run(average: int, value: int, copy: int, count: int, out_bytes: int) -> tuple[int, int]:
    """The elements (begin, end) that whole, aligned blocks cover; empty where the three are aligned differently."""
    begin = -average % 16 // 4
    aligned = (value + 4 * begin) % 16 == 0 and (not out_bytes or (copy + out_bytes * begin) % (4 * out_bytes) == 0)
    if not aligned or count < begin + WHOLE:
        return 0, 0
    return begin, begin + (count - begin) // WHOLE * WHOLE


def _rows(average: int, value: int, copy: int, out_bytes: int, begin: int, end: int, block: int) -> np.ndarray:
    """(rows, 4): the elements from `begin` to `end` in runs of `block`."""
    first = np.arange(begin, end, block, dtype=np.int64)
    columns = (average + 4 * first, value + 4 * first, copy + out_bytes * first, np.minimum(block, end - first))
    return np.stack(columns, axis=1)


def variants() -> Iterator[Variant]:
    """What to compile ahead of time: with a copy of 16 and of 32 bits, and without one."""
    signature = {"table": "*i64", "num_whole": "i32", "weight": "fp32", "skip": "*i1"}
    for name, out in (("bf16", tl.bfloat16), ("fp32", tl.float32), ("alone", None)):
        constants = {"OUT": out, "HAS_SKIP": True, "WHOLE": WHOLE, "PART": PART}
        wide_loads = 2 * WHOLE // (NUM_WARPS * 32 * 4)  # of whole blocks, average and source, four elements each
        yield Variant(f"update_{name}", _ema_update_kernel, signature, constants, NUM_WARPS, wide_loads=wide_loads)

"""One rank's safetensors file, written from front to back in one pass: 8 bytes length, JSON header, data.

The header needs names, dtypes and sizes only, which `State.layout()` gives without reading a value; so state that is
larger than memory streams through, and the checksum is made of the bytes on their way to the disk.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from m3i_large.parallel.state import Layout, State

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
PADDING = "padding/"
CHUNK = 8 << 20  # bytes hashed and written at a time


@dataclass(frozen=True)
class FilePlan:
    """Where everything lies in a rank file that is not written yet.

    Attributes:
        header: the file's first bytes.
        places: (dtype, first byte after the header, number of bytes) of each stored tensor, in order.
        data_bytes: number of bytes after the header.
    """

    header: bytes
    places: Mapping[str, tuple[torch.dtype, int, int]]
    data_bytes: int

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return len(self.header) + self.data_bytes


def plan_file(layout: Mapping[str, Layout]) -> FilePlan:
    """Lays a rank's slices out in the order of `layout`; empty ones are left out.

    Readers map the data as it is, so a tensor begins at a multiple of its element size. The format knows no gaps: where
    one would be needed, a few bytes are stored as `padding/<n>`.
    """
    entries: dict[str, dict[str, object]] = {}
    places: dict[str, tuple[torch.dtype, int, int]] = {}
    position = 0

    def add(name: str, dtype: torch.dtype, numel: int) -> None:
        nonlocal position
        end = position + numel * dtype.itemsize
        entries[name] = {"dtype": DTYPES[dtype], "shape": [numel], "data_offsets": [position, end]}
        position = end

    for name, piece in layout.items():
        if piece.numel == 0:
            continue
        if gap := -position % piece.dtype.itemsize:
            add(f"{PADDING}{len(entries)}", torch.uint8, gap)
        places[name] = (piece.dtype, position, piece.numel * piece.dtype.itemsize)
        add(name, piece.dtype, piece.numel)
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return FilePlan(len(text).to_bytes(8, "little") + text, places, position)


def write_file(path: Path, plan: FilePlan, data: Iterable[memoryview]) -> str:
    """Writes header and data to a new file and waits until they are on the disk; returns the file's sha256.

    Args:
        data: the bytes after the header, in pieces of any size.
    """
    digest, written = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for piece in chain([memoryview(plan.header)], _chunks(data)):
            digest.update(piece)
            written += len(piece)
            _write(descriptor, piece)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if written != plan.num_bytes:
        raise RuntimeError(f"{path}: got {written} bytes of state, its layout says {plan.num_bytes}")
    return digest.hexdigest()


def stream(plan: FilePlan, state: State) -> Iterator[memoryview]:
    """The data of a rank file, group by group: no more of it in memory than one group."""
    left, position = iter(plan.places.items()), 0
    for group in state.groups():
        for name, piece in group.items():
            if piece.values.numel() == 0:
                continue
            expected, (_, start, size) = next(left, ("", (None, 0, 0)))
            if name != expected:
                raise RuntimeError(f"state: the groups give {name} where the layout has {expected or 'no more'}")
            yield memoryview(bytes(start - position))
            yield as_bytes(piece.values)
            position = start + size


def as_bytes(values: Tensor) -> memoryview:
    """A flat tensor's bytes; copied only where it lies on a device."""
    return values.detach().cpu().contiguous().view(torch.uint8).numpy().data


def check_space(directory: Path, *, needed: int) -> None:
    """Raises OSError (no space left) where `needed` bytes do not fit beside what has been written into `directory`.

    Asked before the first byte, so that a save which cannot succeed does not take the last of the disk from others.
    """
    disk = os.statvfs(directory)
    with os.scandir(directory) as files:
        missing = needed - sum(_size(file) for file in files)
    free = disk.f_bavail * disk.f_frsize
    if free < missing:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {free} bytes are free, {missing} are needed")


def _size(file: os.DirEntry[str]) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # another rank's, renamed meanwhile
        return 0


def _chunks(data: Iterable[memoryview]) -> Iterator[memoryview]:
    for piece in data:
        for start in range(0, len(piece), CHUNK):
            yield piece[start : start + CHUNK]


def _write(descriptor: int, piece: memoryview) -> None:
    while piece:
        piece = piece[os.write(descriptor, piece) :]

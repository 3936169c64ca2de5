"""Where one micro-batch lies in memory: the fields of data/batch.py one after the other, as numpy arrays.

Without torch: the loader's process fills slots and has no other use for it.
"""

import mmap
import os
import tempfile
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

ALIGNMENT = 256  # bytes: of every field, more than any device asks for
Slot = dict[str, np.ndarray]


@dataclass(frozen=True)
class SlotLayout:
    """Sizes of a micro-batch: n rows, views of S x S pixels, masks of P x P cells, T tokens."""

    rows: int
    image_size: int
    cells: int
    tokens: int

    def fields(self) -> dict[str, tuple[Any, tuple[int, ...]]]:
        """Type and shape of every tensor of a Batch."""
        n, s, p = self.rows, self.image_size, self.cells
        pixels = (np.uint8, (n, s, s, 3))
        integers = dict.fromkeys(
            ("partner_N", "category_N", "source_N", "epoch_N", "id_N", "substitute_N"), (np.int64, (n,))
        )
        return {
            "target_NHWC": pixels,
            "other_NHWC": pixels,
            "box_NV4": (np.int32, (n, 2, 4)),
            "size_N2": (np.int32, (n, 2)),
            "flip_NV": (np.bool_, (n, 2)),
            "colour_NV34": (np.float32, (n, 2, 3, 4)),
            "solarize_NV": (np.float32, (n, 2)),
            "mask_NPP": (np.bool_, (n, p, p)),
            "text_NT": (np.int64, (n, self.tokens)),
            "text_valid_N": (np.bool_, (n,)),
            **integers,
        }

    @property
    def num_bytes(self) -> int:
        """Bytes of a slot."""
        return sum(_padded(np.dtype(kind).itemsize * prod(shape)) for kind, shape in self.fields().values())

    def slot(self, memory: Any, index: int = 0) -> Slot:
        """The arrays of slot `index` in a writable buffer."""
        offset, slot = index * self.num_bytes, {}
        for name, (kind, shape) in self.fields().items():
            slot[name] = np.ndarray(shape, kind, memory, offset)
            offset += _padded(slot[name].nbytes)
        return slot


class SharedMemory:
    """Anonymous memory behind a file descriptor, for a child process: no name, so nothing is left whatever dies.

    Args:
        descriptor: of memory that another process made; default: makes it.
    """

    def __init__(self, num_bytes: int, *, descriptor: int | None = None) -> None:
        self.num_bytes = num_bytes
        if descriptor is None:
            descriptor = _anonymous_file()
            os.ftruncate(descriptor, num_bytes)
        self.descriptor = descriptor
        self.buffer = mmap.mmap(descriptor, num_bytes)

    def close_descriptor(self) -> None:
        """Closes the file; the memory lives as long as an array or mapping of it."""
        os.close(self.descriptor)


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("m3i-batches")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT

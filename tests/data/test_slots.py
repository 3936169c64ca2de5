"""Slots: every field of a batch, apart from one another, aligned, and in memory that another process shares."""

import os
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch

from m3i_large.data import slots
from m3i_large.data.batch import Batch
from m3i_large.data.slots import ALIGNMENT, SharedMemory, SlotLayout

LAYOUTS = [SlotLayout(1, 1, 1, 2), SlotLayout(7, 5, 3, 77), SlotLayout(96, 16, 14, 8)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fields_are_a_batchs_tensors_aligned_and_apart(layout: SlotLayout) -> None:
    memory = bytearray(3 * layout.num_bytes)
    base = np.frombuffer(memory, np.uint8).ctypes.data
    taken = np.zeros(len(memory), int)
    tensors = [f.name for f in fields(Batch) if f.type is torch.Tensor]
    for index in range(3):
        slot = layout.slot(memory, index)
        assert sorted(slot) == sorted(tensors)
        for array in slot.values():
            start = array.ctypes.data - base
            assert start % ALIGNMENT == 0 and array.flags.c_contiguous and array.flags.writeable
            assert index * layout.num_bytes <= start and start + array.nbytes <= (index + 1) * layout.num_bytes
            taken[start : start + array.nbytes] += 1
    assert taken.max() == 1 and taken.sum() == 3 * sum(a.nbytes for a in layout.slot(memory).values())
    assert layout.num_bytes - taken.sum() / 3 < ALIGNMENT * len(tensors)
    with pytest.raises(TypeError):
        layout.slot(memory, 3)
    assert all(len(array) == layout.rows for array in slot.values())


def test_types_are_the_contracts() -> None:
    kinds = {name: np.dtype(kind).name for name, (kind, _) in LAYOUTS[0].fields().items()}
    expected = {"target_NHWC": "uint8", "other_NHWC": "uint8", "box_NV4": "int32", "size_N2": "int32"}
    expected |= {"flip_NV": "bool", "mask_NPP": "bool", "text_valid_N": "bool", "text_NT": "int64"}
    expected |= {"colour_NV34": "float32", "solarize_NV": "float32"}
    assert kinds == dict.fromkeys(kinds, "int64") | expected


def test_a_slot_becomes_tensors_without_a_copy() -> None:
    layout = LAYOUTS[1]
    slot = layout.slot(bytearray(layout.num_bytes))
    for array in slot.values():
        tensor = torch.from_numpy(array)
        array.reshape(-1)[-1] = 1
        assert tensor.reshape(-1)[-1] == 1


FILL = """
import sys
from m3i_large.data.slots import SharedMemory, SlotLayout
layout = SlotLayout(*map(int, sys.argv[2:]))
memory = SharedMemory(2 * layout.num_bytes, descriptor=int(sys.argv[1]))
for number, array in enumerate(layout.slot(memory.buffer, 1).values()):
    array[...] = number % 2 if array.dtype == bool else number
"""


@pytest.mark.parametrize("named", [True, False])
def test_memory_is_shared_with_another_process_and_outlives_its_file(
    named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not named:  # where the system has no memfd
        monkeypatch.delattr(os, "memfd_create")
    layout = LAYOUTS[1]
    memory = SharedMemory(2 * layout.num_bytes)
    mine = [layout.slot(memory.buffer, index) for index in range(2)]
    sizes = map(str, (memory.descriptor, *vars(layout).values()))
    subprocess.run([sys.executable, "-c", FILL, *sizes], pass_fds=[memory.descriptor], check=True)
    memory.close_descriptor()
    for number, name in enumerate(mine[1]):
        expected = number % 2 if mine[1][name].dtype == bool else number
        assert (mine[1][name] == expected).all() and not mine[0][name].any()
    with pytest.raises(OSError, match="Bad file descriptor"):
        memory.close_descriptor()


def test_sizes_are_rounded_up_to_the_alignment() -> None:
    assert [slots._padded(n) for n in (0, 1, 256, 257)] == [0, 256, 256, 512]

"""The safetensors file of a rank: the library reads what we write, whatever the dtypes, and nothing is misplaced."""

import errno
import hashlib
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from states import DiskState, memory_state, tensors

from m3i_large.checkpoint.rank_file import DTYPES, PADDING, check_space, plan_file, stream, write_file
from m3i_large.checkpoint.staging import Staging, available_memory
from m3i_large.parallel.state import Layout, MemoryState, Slice

GIB = 2**30


def staged(state: MemoryState | DiskState) -> list[memoryview]:
    return [Staging(torch.device("cpu"), local_ranks=1).fill(plan_file(state.layout()), state)]


def test_the_library_reads_every_dtype_as_it_was(tmp_path: Path) -> None:
    whole = tensors()
    state = memory_state(whole)
    digest = write_file(tmp_path / "a.safetensors", plan_file(state.layout()), stream(plan_file(state.layout()), state))
    assert digest == hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    read = {k: v for k, v in load_file(tmp_path / "a.safetensors").items() if not k.startswith(PADDING)}
    assert read.keys() == whole.keys() - {"master/empty"}
    for name, tensor in read.items():
        assert tensor.dtype == whole[name].dtype and torch.equal(tensor, whole[name].reshape(-1)), name


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(list(DTYPES)), st.integers(0, 9)), max_size=12))
def test_any_mixture_of_dtypes_and_sizes_is_read_back_by_slices(pieces: list[tuple[torch.dtype, int]]) -> None:
    whole = {f"t{i}": (torch.arange(n) % 2 + i % 2).to(dtype) for i, (dtype, n) in enumerate(pieces)}
    state = memory_state(whole)
    path = Path(f"/tmp/m3i_rank_file_{os.getpid()}.safetensors")
    try:
        write_file(path, plan_file(state.layout()), stream(plan_file(state.layout()), state))
        with safe_open(path, framework="pt") as file:
            assert {k for k in file.keys() if not k.startswith(PADDING)} == {k for k, v in whole.items() if len(v)}  # noqa: SIM118
            for name, tensor in whole.items():
                if len(tensor):
                    assert torch.equal(file.get_slice(name)[1:], tensor[1:])
    finally:
        path.unlink(missing_ok=True)


def test_streamed_and_staged_files_are_the_same_bytes(tmp_path: Path) -> None:
    whole = tensors()
    for name, state, data in (
        ("streamed", DiskState(whole), None),
        ("staged", memory_state(whole), staged(memory_state(whole))),
        ("staged_groups", DiskState(whole), staged(DiskState(whole))),
    ):
        plan = plan_file(state.layout())
        write_file(tmp_path / name, plan, stream(plan, state) if data is None else data)
    assert len({(tmp_path / n).read_bytes() for n in ("streamed", "staged", "staged_groups")}) == 1
    assert (tmp_path / "staged").stat().st_size == plan_file(memory_state(whole).layout()).num_bytes


def test_the_staged_copy_is_of_the_moment_and_its_buffer_is_used_again() -> None:
    values = torch.arange(6.0)
    state = MemoryState({"a": Slice((6,), 0, values)})
    plan, staging = plan_file(state.layout()), Staging(torch.device("cpu"), local_ranks=1)
    first = staging.fill(plan, state)
    values.fill_(-1)
    assert torch.frombuffer(first, dtype=torch.float32).tolist() == [0, 1, 2, 3, 4, 5]
    second = staging.fill(plan, state)
    assert torch.frombuffer(first, dtype=torch.float32).tolist() == [-1] * 6, "one buffer, not one per save"
    assert len(second) == 24


def test_groups_that_differ_from_the_layout_are_a_defect(tmp_path: Path) -> None:
    class Wrong(DiskState):
        def layout(self) -> dict[str, Layout]:
            return dict(reversed(super().layout().items()))

    state = Wrong(tensors())
    with pytest.raises(RuntimeError, match="the groups give master/a where the layout has ema/double"):
        write_file(tmp_path / "a", plan_file(state.layout()), stream(plan_file(state.layout()), state))
    plan = plan_file(memory_state(tensors()).layout())
    with pytest.raises(RuntimeError, match="its layout says"):
        write_file(tmp_path / "b", plan, [memoryview(b"short")])


def test_space_counts_what_is_already_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other_rank").write_bytes(bytes(600))
    disk = os.statvfs(tmp_path)
    free = os.statvfs_result((1, 1, *disk[2:4], 400, *disk[5:]))
    monkeypatch.setattr(os, "statvfs", lambda path: free)
    check_space(tmp_path, needed=1000)
    with pytest.raises(OSError, match="400 bytes are free, 401 are needed") as caught:
        check_space(tmp_path, needed=1001)
    assert caught.value.errno == errno.ENOSPC


def test_memory_for_the_copy_is_what_kernel_and_container_leave(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 900 kB\nMemAvailable: 512 kB\n")
    assert available_memory(meminfo=meminfo, cgroup=tmp_path / "none") == 512 * 1024
    assert available_memory(meminfo=tmp_path / "none", cgroup=tmp_path / "none") > 2**60
    (tmp_path / "memory.max").write_text("300000\n")
    (tmp_path / "memory.current").write_text("200000\n")
    (tmp_path / "memory.stat").write_text("anon 1000\ninactive_file 50000\n")
    assert available_memory(meminfo=meminfo, cgroup=tmp_path) == 150_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(meminfo=meminfo, cgroup=tmp_path) == 512 * 1024


def test_a_copy_must_leave_as_much_again_for_all_local_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m3i_large.checkpoint.staging.available_memory", lambda: 8 * GIB)
    plan = plan_file({"a": Layout((GIB // 4,), torch.float32, 0, GIB // 4)})
    assert Staging(torch.device("cpu"), local_ranks=4).fits(plan)
    assert not Staging(torch.device("cpu"), local_ranks=5).fits(plan)

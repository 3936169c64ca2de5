"""Saving: ranks that meet in the file system, a disk that fails, what stays and what goes."""

import errno
import json
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import PATIENCE_S
from safetensors import safe_open
from states import DiskState, at, memory_state, tensors

from m3i_large.checkpoint import Checkpoint, CheckpointWriter, complete_checkpoints, newest, reader, save
from m3i_large.checkpoint.directory import clean, expired, into_place, step_directory, temporary_directory
from m3i_large.errors import OutageError
from m3i_large.parallel.state import MemoryState, Slice


@contextmanager
def writers(root: Path, *, world: int = 1, **more: Any) -> Iterator[list[CheckpointWriter]]:
    """Every rank's writer, in one process."""
    all_of_them = [CheckpointWriter(root, rank=at(r, world), attempt=0, keep=2, **more) for r in range(world)]
    try:
        yield all_of_them
    finally:
        for writer in all_of_them:
            writer.__exit__()


def save_all(ranks: list[CheckpointWriter], step: int, whole: dict[str, torch.Tensor]) -> None:
    for rank, writer in enumerate(ranks):
        writer.save(step, state=memory_state(whole, rank=rank, world=len(ranks)), manifest={"applied_steps": step})
    for writer in ranks:
        writer.wait()


@pytest.mark.parametrize("background", [True, False])
def test_three_ranks_save_what_any_number_restores(tmp_path: Path, background: bool) -> None:
    whole = tensors(1)
    with writers(tmp_path, world=3, background=background) as ranks:
        save_all(ranks, 7, whole)
        assert [r.event for r in ranks[0].poll()] == ["save"] and ranks[1].poll() == []
    saved = Checkpoint(newest(tmp_path))
    assert saved.step == 7 and saved.manifest["applied_steps"] == 7
    files = {p.name: p.stat().st_size for p in saved.directory.glob("*.safetensors")}
    assert len(files) == 3 and saved.manifest["bytes"] == sum(files.values())
    assert {n: f["bytes"] for n, f in saved.manifest["files"].items()} == files
    assert sorted(p.name for p in saved.directory.iterdir()) == ["manifest.json", *sorted(files)]
    for name, tensor in whole.items():
        assert torch.equal(saved.read_full(name), tensor), name
    for world in (1, 2, 5):
        for rank in range(world):
            for make in (memory_state, DiskState):
                state = make(tensors(99), rank=rank, world=world)
                Checkpoint(saved.directory).restore(state)
                right = memory_state(whole, rank=rank, world=world)
                assert values(state) == values(right), (world, rank)


def values(state: Any) -> dict[str, list]:
    return {k: s.values.tolist() for group in state.groups() for k, s in group.items()}


def test_a_rank_opens_only_the_files_that_hold_its_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def noting(path: str, **more: Any) -> Any:
        opened.append(Path(path).name)
        return safe_open(path, **more)

    monkeypatch.setattr(reader, "safe_open", noting)
    whole = {"master/a": torch.arange(80.0)}
    with writers(tmp_path, world=8) as ranks:
        save_all(ranks, 1, whole)
    saved = Checkpoint(newest(tmp_path))
    saved.restore(memory_state(whole, rank=1, world=4))
    assert sorted(opened) == [f"rank_{r:05d}_of_00008.safetensors" for r in (2, 3)]


def test_the_caller_may_change_the_state_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from m3i_large.checkpoint import writer as module

    go, real = threading.Event(), module.write_file
    monkeypatch.setattr(module, "write_file", lambda *a: (go.wait(PATIENCE_S), real(*a))[1])
    values = torch.arange(5.0)
    with writers(tmp_path) as (writer,):
        held = writer.save(1, state=MemoryState({"a": Slice((5,), 0, values)}), manifest={})
        assert newest(tmp_path) is None and writer.poll() == []
        values.fill_(-1)
        go.set()
        writer.wait()
        (report,) = writer.poll()
        assert 0 < held == report.details["held_s"] < report.details["seconds"]
    assert Checkpoint(newest(tmp_path)).read_full("a").tolist() == [0, 1, 2, 3, 4]


def test_state_without_room_for_a_copy_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m3i_large.checkpoint.staging.available_memory", lambda: 100)
    monkeypatch.setattr("m3i_large.checkpoint.staging.Staging.fill", None)
    with writers(tmp_path) as (writer,):
        writer.save(1, state=DiskState(tensors()), manifest={})
        assert writer.finish() == ""
    assert torch.equal(Checkpoint(newest(tmp_path)).read_full("exp_avg/a"), tensors()["exp_avg/a"])


# -- failures ------------------------------------------------------------------------------------------------


def operations(monkeypatch: pytest.MonkeyPatch, fail_at: int, error: OSError) -> list[str]:
    """Makes the n-th file operation of the writer fail, and every later one of a kind that a full disk refuses."""
    done: list[str] = []
    for name in ("open", "write", "fsync", "rename", "replace", "mkdir"):
        real: Callable[..., Any] = getattr(os, name)

        def wrapped(*args: Any, real: Callable[..., Any] = real, name: str = name, **more: Any) -> Any:
            done.append(name)
            if len(done) == fail_at:
                raise error
            return real(*args, **more)

        monkeypatch.setattr(os, name, wrapped)
    return done


def test_an_error_at_any_file_operation_leaves_the_checkpoint_before_and_no_rubbish(tmp_path: Path) -> None:
    old, new = tensors(1), tensors(2)
    count = 0
    for n in range(1, 200):
        root = tmp_path / str(n)
        with writers(root, background=False) as (writer,):
            save_all([writer], 1, old)
            writer.poll()
            with pytest.MonkeyPatch.context() as patch:
                done = operations(patch, n, OSError(errno.ENOSPC, "No space left on device"))
                save_all([writer], 2, new)
            count = len(done)
            reports, reason = writer.poll(), writer.finish()
        if count < n:
            assert reason == "" and [r.event for r in reports] == ["save"]
            break
        found = Checkpoint(newest(root))
        expected = new if found.step == 2 else old
        assert all(torch.equal(found.read_full(k), v) for k, v in expected.items()), n
        if reason:
            (report,) = reports
            assert report.event == "incident" and report.details["what"] == "checkpoint"
            assert "No space left on device" in reason and report.details["reason"] == reason
            assert list(root.glob(".step_*")) == [], n
            with writers(root, background=False) as (again,):
                save_all([again], 3, new)
            assert Checkpoint(newest(root)).step == 3, "the next save works"
    assert 10 < count < 199, "the loop ends with a save that nothing disturbed"


def test_a_rank_that_fails_takes_the_save_with_it_on_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with writers(tmp_path, world=2) as ranks:
        save_all(ranks, 1, tensors(1))
        ranks[0].poll()
        with pytest.MonkeyPatch.context() as patch:
            from m3i_large.checkpoint import writer as module

            real = module.write_file

            def fails(path: Path, *more: Any) -> str:
                if path.name.startswith("rank_00001"):
                    path.write_bytes(b"part")
                    raise OSError(errno.EIO, "Input/output error")
                return real(path, *more)

            patch.setattr(module, "write_file", fails)
            save_all(ranks, 2, tensors(2))
        (report,) = ranks[0].poll()
        assert report.details["reason"] == "rank 1: Input/output error" and ranks[1].poll() == []
        assert newest(tmp_path) == step_directory(tmp_path, 1) and list(tmp_path.glob(".step_*")) == []
        save_all(ranks, 2, tensors(2))
        assert Checkpoint(newest(tmp_path)).step == 2


def test_a_rank_that_never_writes_is_given_up(tmp_path: Path) -> None:
    with writers(tmp_path, world=2, patience_s=0.1) as ranks:
        ranks[0].save(1, state=memory_state(tensors(), world=2), manifest={})
        ranks[0].wait()
        (report,) = ranks[0].poll()
    assert report.details["reason"] == "rank 1 has not written its part in 0 s"
    assert newest(tmp_path) is None and list(tmp_path.glob(".step_*")) == []


def test_a_failed_save_of_its_own_is_an_outage(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("a file in the way")
    with pytest.raises(OutageError, match=r"step 5 could not be saved .*: rank 0: "):
        save(tmp_path / "root", step=5, state=memory_state(tensors()), manifest={}, rank=at(0, 1), keep=2)


def test_defects_in_the_thread_are_not_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m3i_large.checkpoint.writer.write_file", lambda *a: 1 / 0)
    with writers(tmp_path) as (writer,):
        writer.save(1, state=memory_state(tensors()), manifest={})
        with pytest.raises(ZeroDivisionError):
            writer.wait()


@pytest.mark.slow
def test_a_full_file_system(tmp_path: Path) -> None:
    """A real one: what does not fit is found before it is written; what fills up meanwhile is survived."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not permitted")
    try:
        state = {"master/a": torch.arange(270_000.0)}
        root = disk / "checkpoints"
        with writers(root) as (writer,):
            save_all([writer], 1, state)
            save_all([writer], 2, state)
            save_all([writer], 3, state)
            reports = writer.poll()
            assert [r.event for r in reports] == ["save", "save", "incident"]
            assert re.search(r"No space left on device: \d+ bytes are free, \d+ are needed", reports[2].line)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("m3i_large.checkpoint.writer.check_space", lambda *a, **k: None)
                save_all([writer], 4, state)
                assert writer.poll()[0].details["reason"] == "rank 0: No space left on device"
            assert Checkpoint(newest(root)).step == 2 and list(root.glob(".step_*")) == []
    finally:
        subprocess.run(["umount", disk], check=True)


# -- what stays ----------------------------------------------------------------------------------------------


def test_retention_keeps_the_newest_the_marked_and_later_ones() -> None:
    steps = range(10, 110, 10)
    assert expired(steps, newest_step=100, keep=2, keep_every=None) == list(range(10, 90, 10))
    assert expired(steps, newest_step=100, keep=2, keep_every=30) == [10, 20, 40, 50, 70, 80]
    assert expired(steps, newest_step=50, keep=1, keep_every=None) == [10, 20, 30, 40]
    assert expired([10], newest_step=10, keep=3, keep_every=None) == []


def test_old_checkpoints_go_and_marked_ones_stay(tmp_path: Path) -> None:
    with writers(tmp_path, keep_every=4) as (writer,):
        for step in range(1, 10):
            save_all([writer], step, tensors())
    assert [p.name for p in complete_checkpoints(tmp_path)] == [f"step_{s:08d}" for s in (4, 8, 9)]
    assert (tmp_path / "latest").read_text() == "step_00000009\n" and list(tmp_path.glob(".*")) == []


def test_what_latest_names_is_never_removed(tmp_path: Path) -> None:
    with writers(tmp_path) as (writer,):
        for step in (10, 20, 30, 5):  # the last after a return to an earlier state
            save_all([writer], step, tensors(step))
        assert newest(tmp_path).name == "step_00000005"
        save_all([writer], 10, tensors(11))
        assert Checkpoint(newest(tmp_path)).read_full("master/a").tolist() == tensors(11)["master/a"].tolist()


def test_nothing_gets_its_name_before_its_bytes_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (seen.append(("fsync", Path(os.readlink(f"/proc/self/fd/{fd}")).name)), fsync(fd))[1]
    )
    monkeypatch.setattr(os, "rename", lambda a, b: (seen.append(("rename", Path(b).name)), rename(a, b))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(("rename", Path(b).name)), replace(a, b))[1])
    with writers(tmp_path) as (writer,):
        save_all([writer], 1, tensors())
    assert seen == [
        ("fsync", "rank_00000_of_00001.safetensors"),
        ("fsync", ".manifest.json.tmp"),
        ("rename", "manifest.json"),
        ("fsync", ".step_00000001.attempt_0_save_1.tmp"),
        ("rename", "step_00000001"),
        ("fsync", tmp_path.name),
        ("fsync", ".latest.tmp"),
        ("rename", "latest"),
        ("fsync", tmp_path.name),
    ]


def test_the_same_step_is_replaced_and_a_crash_between_the_two_moves_is_put_right(tmp_path: Path) -> None:
    final = step_directory(tmp_path, 1)
    with writers(tmp_path) as (writer,):
        save_all([writer], 1, tensors(1))
    os.rename(final, tmp_path / ".step_00000001.replaced")
    rubbish = temporary_directory(tmp_path, 1, "attempt_0_save_9")
    rubbish.mkdir()
    clean(tmp_path)
    assert Checkpoint(newest(tmp_path)).step == 1 and not rubbish.exists()
    rubbish.mkdir()
    (rubbish / "manifest.json").write_text(json.dumps({"step": 1}))
    into_place(rubbish, final)
    assert json.loads((final / "manifest.json").read_text()) == {"step": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000001"]

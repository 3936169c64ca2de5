"""kill -9 at every file operation of a save, one in the middle of a write too: the old or the new checkpoint stands."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
from patience import PATIENCE_S
from states import at, memory_state, tensors

from m3i_large.checkpoint import CheckpointWriter, newest_intact
from m3i_large.checkpoint.directory import step_directories
from m3i_large.checkpoint.reader import damage

OPERATIONS = ("open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


def save(root: Path, step: int, *, seed: int, world: int, keep: int) -> None:
    writers = [CheckpointWriter(root, rank=at(r, world), attempt=0, keep=keep) for r in range(world)]
    for r, writer in enumerate(writers):
        writer.save(step, state=memory_state(tensors(seed), rank=r, world=world), manifest={})
    for writer in writers:
        writer.wait()


def die_at(n: int) -> None:
    """Ends this process at its n-th file operation from now."""
    count = 0
    for name in OPERATIONS:
        real = getattr(os, name)

        def wrapped(*args: Any, real: Any = real, name: str = name, **more: Any) -> Any:
            nonlocal count
            count += 1
            if count == n:
                if name == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                os._exit(9)
            return real(*args, **more)

        setattr(os, name, wrapped)


def crash_everywhere(root: Path, step: int, *, world: int, keep: int) -> int:
    """For all n: a save that dies at its n-th file operation, then a start; returns how many n there are."""
    old, new = tensors(1), tensors(2)
    save(root / "old", 10, seed=1, world=world, keep=keep)
    for n in range(1, 400):
        run = root / str(n)
        shutil.copytree(root / "old", run)
        child = os.fork()
        if child == 0:
            die_at(n)
            save(run, step, seed=2, world=world, keep=keep)
            os._exit(0)
        finished = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        saved, reports = newest_intact(run, rank=at(0, 1))
        assert saved is not None and reports == [], n
        found = {name: saved.read_full(name) for name in old}
        states = [all(torch.equal(found[k], whole[k]) for k in whole) for whole in (old, new)]
        assert any(states) and (states[1] or not finished), n
        assert not list(run.glob(".*")), n
        assert [damage(path) for path in step_directories(run)] == [""] * len(step_directories(run)), n
        assert (run / "latest").read_text().strip() == saved.directory.name
        shutil.rmtree(run)
        if finished:
            return n
    raise AssertionError("the save never finished")


@pytest.mark.slow
@pytest.mark.parametrize(("step", "world", "keep"), [(20, 1, 1), (10, 1, 2), (20, 2, 2)])
def test_a_crash_at_any_operation_leaves_the_old_or_the_new(tmp_path: Path, step: int, world: int, keep: int) -> None:
    # Processes are forked from one that has no threads yet.
    arguments = [sys.executable, __file__, tmp_path, *map(str, (step, world, keep))]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=PATIENCE_S)
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(result.stdout) > 20


if __name__ == "__main__":
    print(crash_everywhere(Path(sys.argv[1]), int(sys.argv[2]), world=int(sys.argv[3]), keep=int(sys.argv[4])))

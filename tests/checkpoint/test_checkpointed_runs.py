"""Whole runs of the real command whose checkpoints are damaged, refused by the disk, or on another machine."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from patience import PATIENCE_S
from tiny import ROOT, command, environment, pretrain, recipe, write_data, write_recipe

from m3i_large.checkpoint import Checkpoint, newest
from m3i_large.errors import UserError
from m3i_large.metrics import read_metrics, read_rows
from m3i_large.parallel.comm import Rank
from m3i_large.recipe import load_recipe
from m3i_large.run import open_run, read_exit, resolve, resume_point

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe, and a finished run of it on two ranks that copied its checkpoints."""
    root = tmp_path_factory.mktemp("runs")
    values = recipe(write_data(root / "data"), picture_every=0, checkpoint_copy=str(root / "far"))
    path = write_recipe(root / "tiny.yaml", values)
    result = pretrain("--recipe", path, "--out", root / "whole", ranks=2)
    assert result.returncode == 0, result.stdout + result.stderr
    return path, root / "whole"


def test_saves_are_told_and_timed_and_copied(tiny: tuple[Path, Path]) -> None:
    _, run = tiny
    saves = [row for row in read_rows(run / "events.jsonl") if row["event"] == "save"]
    assert [row["step"] for row in saves] == [2, 4, 6]
    rows = {row["step"]: row for row in read_metrics(run)}
    for row in saves:
        assert 0 < row["held_s"] <= row["seconds"] and row["bytes"] > 1000
        if row["step"] in rows:  # counted in the step that follows
            assert rows[row["step"]]["time/checkpoint_s"] >= row["held_s"]
    assert all(rows[step]["time/checkpoint_s"] == 0 for step in (0, 1, 3, 5))
    assert sorted(p.name for p in (run.parent / "far").iterdir()) == ["step_00000004", "step_00000006"]


def test_a_damaged_newest_checkpoint_costs_its_steps_and_nothing_else(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    recipe_file, whole = tiny
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    broken = run / "checkpoints/step_00000006/rank_00001_of_00002.safetensors"
    os.truncate(broken, broken.stat().st_size - 1)
    result = pretrain("--recipe", recipe_file, "--out", run, ranks=2)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "step_00000006 is damaged: rank_00001_of_00002.safetensors has" in result.stdout
    (incident,) = (e for e in read_rows(run / "events.jsonl") if e["event"] == "incident")
    assert incident["what"] == "checkpoint" and "is damaged" in incident["reason"] and incident["attempt"] == 1
    assert (run / "checkpoints/damaged_step_00000006").is_dir()
    assert [row["loss"] for row in read_metrics(run)] == [row["loss"] for row in read_metrics(whole)]
    again, before = Checkpoint(newest(run / "checkpoints")), Checkpoint(newest(whole / "checkpoints"))
    assert all((again.read_full(k) == before.read_full(k)).all() for k in before.keys())  # noqa: SIM118


def test_a_new_machine_goes_on_from_the_copy(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    recipe_file, _ = tiny
    result = pretrain("--recipe", recipe_file, "--out", tmp_path / "run")
    assert result.returncode == 0, result.stdout + result.stderr
    (resumed,) = [row for row in read_rows(tmp_path / "run/events.jsonl") if row["event"] == "resume"]
    assert resumed["step"] == 6 and resumed["world"] == 1


def test_copies_of_another_recipe_are_refused(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    recipe_file, _ = tiny
    other = load_recipe(str(recipe_file), ["train.seed=9"])
    run = open_run(tmp_path / "run", resolve(other, tmp_path / "run", torch.device("cpu")), resume="auto")
    with pytest.raises(UserError, match=r"holds checkpoints of another recipe \(train.seed is 3 there, 9 here\)"):
        resume_point(run, resume="auto", rank=Rank(0, 1, torch.device("cpu")))


def test_a_named_checkpoint_that_is_damaged_is_refused(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    recipe_file, whole = tiny
    named = tmp_path / "step_00000006"
    shutil.copytree(whole / "checkpoints" / named.name, named)
    (named / "rank_00000_of_00002.safetensors").unlink()
    recipe = resolve(load_recipe(str(recipe_file)), tmp_path / "run", torch.device("cpu"))
    run = open_run(tmp_path / "run", recipe, resume=str(named))
    with pytest.raises(UserError, match=r"--resume: .*step_00000006 is damaged: rank_00000\S+ is missing"):
        resume_point(run, resume=str(named), rank=Rank(0, 1, torch.device("cpu")))
    assert named.is_dir() and not (tmp_path / "run").exists()


def test_a_last_checkpoint_that_fails_is_loud(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    recipe_file, _ = tiny
    run = tmp_path / "run"
    arguments = ["--recipe", recipe_file, "--out", run, "train.checkpoint_copy=null", "train.steps=2"]
    # Loaded at the start of the run's interpreter: no directory can be made where checkpoints lie.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, pathlib\n"
        f"target = {str(run / 'checkpoints')!r}\n"
        "real = os.mkdir\n"
        "def mkdir(path, *a, **k):\n"
        "    if str(path).startswith(target):\n"
        "        raise OSError(28, 'No space left on device')\n"
        "    return real(path, *a, **k)\n"
        "os.mkdir = mkdir\n"
    )
    variables = environment() | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        command(*arguments), env=variables, capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE_S
    )
    assert result.returncode == 1, result.stdout + result.stderr
    line = "checkpoint: the last one, step 2, could not be saved: rank 0: No space left on device"
    assert f"error: {line}" in result.stderr and "Traceback" not in result.stderr
    ended = read_exit(run)
    assert ended["outcome"] == "failed" and ended["message"] == line
    events = [(row["event"], row.get("what"), row.get("outcome")) for row in read_rows(run / "events.jsonl")]
    assert events == [("start", None, None), ("incident", "checkpoint", None), ("end", None, "failed")]

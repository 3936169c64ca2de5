"""The real command under the real launcher: a rank is killed, the supervisor goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from patience import PATIENCE_S
from tiny import ROOT, command, environment, pretrain, recipe, write_data, write_recipe

from m3i_large.checkpoint import Checkpoint, newest
from m3i_large.data.audit import audit_runs
from m3i_large.metrics import read_metrics, read_rows
from m3i_large.run import read_exit
from m3i_large.supervise.processes import marked

pytestmark = pytest.mark.slow
STEPS = 24


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("supervise")
    values = recipe(write_data(folder / "data"), steps=STEPS, picture_every=0, checkpoint_every=4)
    values["data"]["audit"] = True
    return write_recipe(folder / "tiny.yaml", values)


def kill_one_rank(run: Path, supervisor: subprocess.Popen[bytes]) -> None:
    """SIGKILL to rank 1 once the run has a checkpoint and is beyond it."""
    while not any(row["step"] >= 5 for row in read_rows(run / "metrics.jsonl")):
        assert supervisor.poll() is None, "ended too early"
        time.sleep(0.02)
    for pid in marked(run):
        if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            os.kill(pid, signal.SIGKILL)
            return
    raise AssertionError("there is no rank 1")


def supervised(tiny: Path, run: Path, *options: str) -> subprocess.Popen[bytes]:
    program = [sys.executable, "-c", "from m3i_large.cli import main; main()", "supervise", "--delay", "0.1", *options]
    training = command("--recipe", tiny, "--out", run, ranks=2)
    return subprocess.Popen([*program, "--", *training], env=environment(), cwd=ROOT)


def test_a_killed_rank_costs_nothing_but_time(tiny: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assert pretrain("--recipe", tiny, "--out", whole, ranks=2).returncode == 0
    run = tmp_path / "run"
    with supervised(tiny, run) as supervisor:
        kill_one_rank(run, supervisor)
        assert supervisor.wait(timeout=PATIENCE_S) == 0
    assert read_exit(run)["outcome"] == "finished" and not marked(run)
    rows = read_rows(run / "supervise.jsonl")
    assert [row["event"] for row in rows if row["event"] != "kill"] == ["start", "restart", "start", "finished"]
    assert [row["world"] for row in rows if row["event"] == "start"] == [2, 2]
    ours, theirs = (Checkpoint(newest(path / "checkpoints")) for path in (run, whole))
    assert set(ours.keys()) == set(theirs.keys()) and ours.step == theirs.step == STEPS
    assert all(torch.equal(ours.read_full(key), theirs.read_full(key)) for key in set(ours.keys()))
    assert [row["loss"] for row in read_metrics(run)] == [row["loss"] for row in read_metrics(whole)]


def test_goes_on_with_the_rank_that_is_left_and_stops_when_asked(tiny: Path, tmp_path: Path) -> None:
    run, ranks = tmp_path / "run", tmp_path / "ranks"
    ranks.write_text("2")
    with supervised(tiny, run, "--ranks-command", f"cat {ranks}") as supervisor:
        while not marked(run):
            time.sleep(0.02)
        ranks.write_text("1")
        kill_one_rank(run, supervisor)
        while not any(row["attempt"] == 1 for row in read_rows(run / "metrics.jsonl")):
            assert supervisor.poll() is None, "ended too early"
            time.sleep(0.02)
        supervisor.send_signal(signal.SIGTERM)
        assert supervisor.wait(timeout=PATIENCE_S) == 75 and not marked(run)
    assert [row["world"] for row in read_rows(run / "supervise.jsonl") if row["event"] == "start"] == [2, 1]
    stopped = read_exit(run)
    assert stopped["outcome"] == "interrupted" and stopped["step"] < STEPS
    assert Checkpoint(newest(run / "checkpoints")).step == stopped["step"]
    assert pretrain("--recipe", tiny, "--out", run).returncode == 0
    assert [row["step"] for row in read_metrics(run)] == list(range(STEPS))
    audit = audit_runs([run])
    assert audit.proven and [a["world"] for a in audit.attempts] == [2, 1, 1], audit.to_text()

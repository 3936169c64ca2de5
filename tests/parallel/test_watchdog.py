"""Who is behind, from the ranks' places; and real runs in which a rank sleeps, is stopped, or holds the lock."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from patience import PATIENCE_S
from ranks import free_port
from tiny import recipe, write_data, write_recipe

from m3i_large.metrics import read_rows
from m3i_large.parallel.watchdog import Beat, behind, describe
from m3i_large.run import read_exit

# How rank 1 comes to a halt in step 3.
SICK = """
import ctypes, os, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from m3i_large.objective import Objective
from m3i_large.parallel.comm import start_distributed
from m3i_large.recipe import load_recipe
from m3i_large.train import train
how, path, out, ds = sys.argv[1:]
rank = start_distributed(timeout_s=120)
forward = Objective.forward

def sick_forward(self, batch, **more):
    if batch.step == 3 and rank.rank == 1:
        (Path(out) / "sick").touch()
        if how == "sleep":
            time.sleep(600)
        if how == "lock":
            ctypes.PyDLL(None).sleep(600)
    return forward(self, batch, **more)

Objective.forward = sick_forward
train(load_recipe(path), ds=Path(ds), out=Path(out), resume="auto", rank=rank)
"""


def beat(rank: int, place: int, *, waiting: bool = False, silent_s: float = 0.0) -> Beat:
    return Beat(rank, f"host{rank}", place, 3, "forward", waiting, silent_s)


def test_those_behind_are_the_silent_or_the_least_far_that_do_not_wait() -> None:
    def ranks(*beats: Beat) -> list[int]:
        return [b.rank for b in behind(beats, silent_s=3.0)]

    assert ranks(beat(0, 7, waiting=True), beat(1, 6), beat(2, 7, waiting=True)) == [1]
    assert ranks(beat(0, 7, waiting=True), beat(1, 7), beat(2, 7, waiting=True)) == [1]
    assert ranks(beat(0, 7), beat(1, 7, silent_s=4.0), beat(2, 6)) == [1], "it cannot tell where it is"
    assert ranks(beat(0, 7, waiting=True), beat(1, 7, waiting=True)) == [0, 1], "a deadlock is everyone's"
    assert describe([beat(1, 6)]) == "rank 1 (host1) in forward of step 3"
    assert describe([beat(i, 6) for i in range(9)]).endswith("and 5 more")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sleep", "stop", "lock"])
def test_a_rank_that_hangs_is_named_and_the_run_ends_with_all_stacks(how: str, tmp_path: Path) -> None:
    values = recipe(write_data(tmp_path / "data"), steps=6, picture_every=0, timeout_s=15.0)
    path, out = write_recipe(tmp_path / "r.yaml", values), tmp_path / "run"
    ds = Path(__file__).parents[2] / "ds_configs/zero3.json"
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", SICK, how, str(path), str(out), str(ds)]
    ranks = [
        subprocess.Popen(command, env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.PIPE)
        for r in range(2)
    ]
    try:
        if how == "stop":
            while not any(row["step"] >= 3 for row in read_rows(out / "metrics.jsonl")):
                assert all(process.poll() is None for process in ranks)
                time.sleep(0.02)
            ranks[1].send_signal(signal.SIGSTOP)
        assert ranks[0].wait(timeout=PATIENCE_S) == 1
        if how != "stop":
            assert ranks[1].wait(timeout=PATIENCE_S) == 1
    finally:
        for process in ranks:
            process.kill()
    error = ranks[0].communicate()[1].decode()
    (incident,) = (e for e in read_rows(out / "events.jsonl") if e["event"] == "incident")
    assert incident["what"] == "hang" and [r["rank"] for r in incident["ranks"]] == [1], (incident, error)
    ended = read_exit(out)
    assert ended["outcome"] == "failed" and ended["message"].startswith("no progress: rank 1 ("), error
    assert "error: no progress: rank 1 (" in error
    if how == "sleep":  # the others' places are as old as their last beat
        assert "in forward of step 3" in ended["message"]
    for rank in (0,) if how == "stop" else (0, 1):
        assert "train.py" in (out / f"stacks/attempt_0_rank_{rank}.txt").read_text(), "the loop is in the stacks"
    if how == "sleep":
        assert "sick_forward" in (out / "stacks/attempt_0_rank_1.txt").read_text()

"""What a run tells of itself: times, distance of the average, slow ranks, traces, mirrors; it changes nothing."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from ranks import run_ranks
from tiny import ROOT, pretrain, recipe, write_data, write_recipe

from m3i_large import metrics
from m3i_large.checkpoint import Checkpoint
from m3i_large.errors import UserError
from m3i_large.goodput import goodput
from m3i_large.metrics import MetricsWriter, read_metrics, read_rows, require_wandb
from m3i_large.parallel.comm import Rank
from m3i_large.profiling import Window
from m3i_large.run import read_exit
from m3i_large.telemetry import Flops, StepClock, utilisation

PHASES = ("time/forward_s", "time/backward_s", "time/optimizer_s", "time/ema_s")


def test_phases_are_told_as_they_begin_and_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now, told = iter(range(100)), []
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))
    clock = StepClock(torch.device("cpu"), on_phase=lambda phase, step: told.append((phase, step)))
    clock.start(7)
    for phase in ("data", "forward", "forward", "checkpoint"):
        with clock(phase):
            next(now)
    row = clock.row()
    assert told == [("data", 7), ("forward", 7), ("forward", 7), ("checkpoint", 7)]
    assert (row["data/wait_s"], row["time/forward_s"], row["time/checkpoint_s"]) == (2, 4, 2)
    assert row["time/step_s"] == 13 and row["time/ema_s"] == 0
    assert clock.row()["time/forward_s"] == 0, "a row takes what it tells"


def test_utilisation_is_the_share_of_all_devices_peak() -> None:
    assert utilisation(100.0, world=4, flops=None) == {}
    assert utilisation(100.0, world=4, flops=Flops(model=2e9, hardware=3e9, peak=1e12)) == {
        "perf/mfu": pytest.approx(0.05),
        "perf/hfu": pytest.approx(0.075),
    }


def test_mirrors_are_optional_and_what_was_asked_for_must_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Window.parse("20:3") == Window(20, 3)
    for text in ("20", "20:0", "a:3", "1:2:3", "-1:2"):
        with pytest.raises(UserError, match="--profile: got"):
            Window.parse(text)
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    require_wandb(None)
    with pytest.raises(UserError, match=r"train.wandb_project: got 'x', but the package is not installed"):
        require_wandb("x")
    writer = MetricsWriter(tmp_path, attempt=0, enabled=True)
    writer.log({"step": 0, "loss": 1.0})
    writer.close()
    assert not writer.has_board and [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_wandb_continues_a_run_and_keeps_runs_of_one_name_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[dict] = []
    fake = SimpleNamespace(init=lambda **given: opened.append(given) or MagicMock())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for run in ("a/run", "a/run", "b/run"):
        MetricsWriter(tmp_path / run, attempt=0, enabled=True, tensorboard=False, wandb_project="p").close()
    first, again, other = (given["id"] for given in opened)
    assert first == again != other and {given["name"] for given in opened} == {"run"}


@pytest.mark.slow
def test_a_run_tells_where_its_time_went_and_deepspeeds_own_instruments_do_no_harm(tmp_path: Path) -> None:
    values = recipe(write_data(tmp_path / "data"), steps=5, checkpoint_every=4, picture_every=0, checkpoint_keep=9)
    path = write_recipe(tmp_path / "r.yaml", values)
    ds = json.loads((ROOT / "ds_configs/zero3.json").read_text())
    ds["flops_profiler"] = {"enabled": True, "profile_step": 2, "output_file": str(tmp_path / "flops.txt")}
    ds["comms_logger"] = {"enabled": True, "verbose": False, "prof_all": True}
    (tmp_path / "ds.json").write_text(json.dumps(ds))
    plain = pretrain("--recipe", path, "--out", tmp_path / "plain", "train.tensorboard=false")
    told = pretrain("--recipe", path, "--out", tmp_path / "told", "--ds", tmp_path / "ds.json", "--profile", "2:2")
    assert plain.returncode == told.returncode == 0, plain.stderr + told.stderr
    rows, same = read_metrics(tmp_path / "plain"), read_metrics(tmp_path / "told")
    assert [row["loss"] for row in rows] == [row["loss"] for row in same]
    assert "flops" in (tmp_path / "flops.txt").read_text()
    trace = json.loads((tmp_path / "told/profile/step_00000002_rank_0.json").read_text())
    assert any("addmm" in event["name"] for event in trace["traceEvents"])
    assert (tmp_path / "told/tensorboard").is_dir() and not (tmp_path / "plain/tensorboard").exists()

    for row in rows:
        assert all(row[phase] > 0 for phase in PHASES) and "perf/mfu" not in row
        assert sum(row[phase] for phase in PHASES) + row["data/wait_s"] <= row["time/step_s"]
        assert (row["time/checkpoint_s"] > 0) == (row["step"] == 4), "the save after step 3 counts in the next row"
    saved = Checkpoint(tmp_path / "plain/checkpoints/step_00000004")
    student, apart = 0.0, 0.0
    for key in saved.keys("ema/"):
        one = saved.read_full(key.replace("ema/target", "master/student")).double()
        student, apart = student + one.square().sum(), apart + (one - saved.read_full(key)).square().sum()
    assert rows[3]["optim/ema_distance"] == pytest.approx((apart / student).sqrt().item(), rel=1e-6) and apart > 0
    assert "optim/ema_distance" not in rows[1]

    ended, events = read_exit(tmp_path / "plain"), read_rows(tmp_path / "plain/events.jsonl")
    assert events[-1]["goodput"] == ended["goodput"] and "goodput " in plain.stdout
    spent = ended["goodput"]
    assert sum(v for k, v in spent.items() if k not in ("share", "wall_s")) == pytest.approx(spent["wall_s"], abs=0.01)
    assert goodput(tmp_path / "plain").productive > 0 and not (tmp_path / "plain/.beats").exists()


def slow_data(rank: Rank, path: Path, out: Path) -> str:
    from m3i_large.data.loader import Loader
    from m3i_large.recipe import load_recipe
    from m3i_large.train import train

    following = Loader.__next__

    def late(self: Loader):  # type: ignore
        time.sleep(5.0 if rank.rank == 1 else 0.0)
        return following(self)

    Loader.__next__ = late  # type: ignore
    return train(load_recipe(str(path)), ds=ROOT / "ds_configs/zero3.json", out=out, resume="auto", rank=rank)


@pytest.mark.slow
def test_a_slow_rank_is_named(tmp_path: Path) -> None:
    values = recipe(
        write_data(tmp_path / "data"), steps=4, picture_every=0, checkpoint_every=9, straggler=1.3, tensorboard=False
    )
    path, out = write_recipe(tmp_path / "r.yaml", values), tmp_path / "run"
    assert run_ranks(2, slow_data, path, out) == ["finished"] * 2
    (incident,) = (e for e in read_rows(out / "events.jsonl") if e["event"] == "incident")
    assert (incident["what"], incident["rank"]) == ("straggler", 1) and incident["host"]
    assert incident["step"] in (2, 3), "three looks in a row; the first step starts everything up"
    assert all(row["straggler/max_over_median"] > 1.3 for row in read_metrics(out)[1:4])

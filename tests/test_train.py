"""Whole runs of the real command: resume, world sizes, signals, and the losses of twenty steps."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import pytest
import torch
import webdataset as wds
from patience import PATIENCE_S
from tiny import ROOT, command, environment, picture, pretrain, recipe, write_data, write_recipe

from m3i_large.checkpoint import Checkpoint, newest
from m3i_large.data.audit import audit_runs
from m3i_large.errors import REQUEUE
from m3i_large.evaluate import KINDS, evaluate
from m3i_large.metrics import read_metrics, read_rows
from m3i_large.run import read_exit
from m3i_large.schedule import MomentumConfig, ema_momentum

pytestmark = pytest.mark.slow
MEASURED = ("time", "data/wait_s", "perf/", "straggler/")  # differ from run to run
LOSSES = ("loss", "loss/intra", "loss/inter", "loss/category", "loss/text")
GOLDEN = Path(__file__).parent / "golden_losses.json"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def tiny(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.yaml", recipe(data))


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of six steps."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    result = pretrain("--recipe", tiny, "--out", out)
    assert result.returncode == 0, result.stdout + result.stderr
    return out


def losses(run: Path) -> list[list[float]]:
    return [[row[name] for name in LOSSES] for row in read_metrics(run)]


def master(run: Path) -> dict:
    saved = Checkpoint(newest(run / "checkpoints"))
    return {key: saved.read_full(key) for key in saved.keys()}  # noqa: SIM118


def test_the_run_directory_holds_what_the_contract_says(whole: Path) -> None:
    for name in (
        "recipe.yaml",
        "env.json",
        "exit.json",
        "metrics.jsonl",
        "events.jsonl",
        "checkpoints/latest",
        "pictures/step_00000004/input.webp",
    ):
        assert (whole / name).is_file(), name
    rows = read_metrics(whole)
    assert [row["step"] for row in rows] == list(range(6)) and [row["samples"] for row in rows] == [
        16 * (i + 1) for i in range(6)
    ]
    expected = {
        *LOSSES,
        "attempt",
        "optim/lr",
        "optim/momentum_ema",
        "optim/grad_norm",
        "optim/skipped",
        "optim/temperature",
    }
    expected |= {"data/wait_s", "time/step_s", "perf/samples_per_s", "perf/mem_gib"}
    expected |= {"loss/text/first", "loss/text/second", "loss/category/labelled", "loss/intra/labelled"}
    assert expected <= rows[0].keys(), expected - rows[0].keys()
    assert {"collapse/intra/std", "collapse/intra/rank"} <= rows[0].keys() and "collapse/intra/std" not in rows[1]
    assert read_exit(whole)["outcome"] == "finished" and read_exit(whole)["step"] == 6
    assert next(e["event"] for e in read_rows(whole / "events.jsonl")) == "start"
    assert sorted(p.name for p in (whole / "checkpoints").glob("step_*")) == ["step_00000004", "step_00000006"]


def test_a_trained_run_evaluates_completely(whole: Path, data: Path) -> None:
    results = evaluate(list(KINDS), whole, data=data)
    assert [r["kind"] for r in results] == list(KINDS)
    for result in results:
        assert result["values"].keys() == result["chance"].keys() == result["untrained"].keys()
        assert all(0 <= v <= 1 for part in ("values", "chance", "untrained") for v in result[part].values())
        assert json.loads(json.dumps(result)) == result
    assert [row["kind"] for row in read_rows(whole / "eval.jsonl")] == list(KINDS)
    target = evaluate(["retrieval"], newest(whole / "checkpoints"), data=data, branch="target")
    assert target[0]["untrained"] == results[0]["untrained"] and target[0]["values"] != results[0]["values"]
    assert len(read_rows(whole / "eval.jsonl")) == len(KINDS), "a checkpoint is no run directory"


def test_a_finished_run_says_so_and_changes_nothing(tiny: Path, whole: Path) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    result = pretrain("--recipe", tiny, "--out", whole)
    assert result.returncode == 0 and "finished" in result.stdout
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_unreadable_samples_are_replaced_and_listed(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    with wds.TarWriter(str(data / "first-000001.tar")) as writer:
        for i in range(40):
            whole = cv2.imencode(".png", picture("red", "disc", i))[1].tobytes()
            writer.write({"__key__": f"broken{i}", "png": whole[:60], "txt": f"broken {i}"})
    path = write_recipe(tmp_path / "r.yaml", recipe(data, picture_every=0, checkpoint_every=100))
    result = pretrain("--recipe", path, "--out", tmp_path / "run")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = read_rows(tmp_path / "run/quarantine.jsonl")
    assert rows and {row["source"] for row in rows} == {"first"} and all(row["id"] >= 60 for row in rows)
    assert all("60 bytes of a damaged image" in row["reason"] and row["attempt"] == 0 for row in rows)
    assert all(row["shard"] == "first-000001.tar" and row["key"] == f"broken{row['id'] - 60}" for row in rows)


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*arguments), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    for _ in range(int(PATIENCE_S / 0.01)):
        if any(row["step"] >= step for row in read_rows(run / "metrics.jsonl")):
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    raise AssertionError(f"step {step} was never reached")


def test_a_stop_signal_while_a_run_sets_itself_up_is_requeued_too(tiny: Path, tmp_path: Path) -> None:
    code = "import os, sys, m3i_large.train as train; from m3i_large.cli_launch import pretrain\n"
    code += "train.build_engine = lambda *_, **__: os.kill(os.getpid(), 15)\nsys.exit(pretrain(sys.argv[1:]))"
    words = ["--ds", str(ROOT / "ds_configs/zero3.json"), "--recipe", str(tiny), "--out", str(tmp_path / "run")]
    result = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=environment(),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=PATIENCE_S,
    )
    assert result.returncode == REQUEUE, result.stdout + result.stderr
    assert "SIGTERM before the first step" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_stopped_and_resumed_ends_bit_identical(
    number: signal.Signals, tiny: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start("--recipe", tiny, "--out", out)
    wait_for_step(out, 2, process)
    os.kill(process.pid, number)
    output = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == (-number if number == signal.SIGKILL else REQUEUE), output
    if number != signal.SIGKILL:
        stopped = read_exit(out)
        assert stopped["outcome"] == "interrupted", output
        assert Checkpoint(newest(out / "checkpoints")).step == stopped["step"]
    result = pretrain("--recipe", tiny, "--out", out)
    assert result.returncode == 0, result.stdout + result.stderr
    assert losses(out) == losses(whole)
    first, second = master(out), master(whole)
    assert first.keys() == second.keys() and all((first[k] == second[k]).all() for k in first)
    assert {row["attempt"] for row in read_metrics(out)} == {0, 1}


def test_two_ranks_and_accumulation_train_the_same_losses(tiny: Path, data: Path, tmp_path: Path) -> None:
    values = recipe(data, steps=20, contrast_batch=8, checkpoint_every=100)
    values["data"]["audit"] = True
    path = write_recipe(tmp_path / "two.yaml", values)
    for ranks in (1, 2):
        result = pretrain("--recipe", path, "--out", tmp_path / f"w{ranks}", ranks=ranks)
        assert result.returncode == 0, result.stdout + result.stderr
    one, two = losses(tmp_path / "w1"), losses(tmp_path / "w2")
    assert two[0] == pytest.approx(one[0], rel=1e-5)
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-3)
    assert seen(tmp_path / "w1") == seen(tmp_path / "w2")
    for ranks in (1, 2):
        audit = audit_runs([tmp_path / f"w{ranks}"])
        assert audit.proven and audit.steps == 20 and audit.attempts[0]["world"] == ranks, audit.to_text()
        assert [(s.name, s.draws, s.epochs_finished) for s in audit.sources] == [
            ("first", 160, 2),
            ("second", 80, 1),
            ("labelled", 80, 1),
        ]


@pytest.mark.slow
def test_an_internimage_trains_the_same_losses_sharded_recomputed_and_resumed(data: Path, tmp_path: Path) -> None:
    values = recipe(data, steps=3, checkpoint_every=2, picture_every=0)
    arch = {"image_size": 32, "channels": 8, "depths": [1, 1, 2, 1], "groups": [1, 2, 4, 8], "bridge_width": 32}
    norms = {"res_post_norm": True, "level2_post_norm": [1], "center_feature_scale": True, "dw_kernel_size": 5}
    values["backbone"] = {"name": "internimage", "arch": arch | norms}
    values["objective"]["input"]["patch"] = 16
    for name, ranks, recompute in (("one", 1, False), ("two", 2, True)):
        values["train"]["activation_checkpointing"] = recompute
        path = write_recipe(tmp_path / f"{name}.yaml", values)
        result = pretrain("--recipe", path, "--out", tmp_path / name, ranks=ranks)
        assert result.returncode == 0, result.stdout + result.stderr
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one[0] == pytest.approx(two[0], rel=1e-5)
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-3)
    middle = tmp_path / "one" / "checkpoints" / "step_00000002"
    again = tmp_path / "again"
    assert pretrain("--recipe", tmp_path / "one.yaml", "--out", again, "--resume", middle).returncode == 0
    assert losses(again)[-1] == one[-1]


def test_cached_contrast_trains_the_direct_runs_losses_and_resumes_to_the_bit(data: Path, tmp_path: Path) -> None:
    """Chunk by chunk, with accumulation, on one and two ranks; every figure of the metrics is the direct run's."""
    values = recipe(data, steps=4, contrast_batch=8, checkpoint_every=2, picture_every=0, signals_every=2)
    values["objective"]["mix"] = {"block": 2}
    for name, ranks, more in (
        ("direct", 1, {}),
        ("one", 1, {"contrast": "cached", "chunk": 4, "activation_checkpointing": True}),
        ("two", 2, {"contrast": "cached", "chunk": 2}),
    ):
        path = write_recipe(tmp_path / f"{name}.yaml", values | {"train": values["train"] | more})
        result = pretrain("--recipe", path, "--out", tmp_path / name, ranks=ranks)
        assert result.returncode == 0, result.stdout + result.stderr
    rows = {name: read_metrics(tmp_path / name) for name in ("direct", "one", "two")}
    for name in ("one", "two"):
        for step, (got, wanted) in enumerate(zip(rows[name], rows["direct"], strict=True)):
            figures = [{k for k in row if not k.startswith(MEASURED)} for row in (got, wanted)]
            assert figures[0] == figures[1]
            for key in figures[0]:
                assert got[key] == pytest.approx(wanted[key], rel=1e-3 if step else 2e-5, abs=1e-6), (name, step, key)
    middle, again = tmp_path / "one/checkpoints/step_00000002", tmp_path / "again"
    assert pretrain("--recipe", tmp_path / "one.yaml", "--out", again, "--resume", middle).returncode == 0
    assert losses(again) == losses(tmp_path / "one")[2:]
    first, second = master(again), master(tmp_path / "one")
    assert first.keys() == second.keys() and all((first[k] == second[k]).all() for k in first)


def seen(run: Path) -> dict[int, list]:
    """Samples of every step, whatever rank read them."""
    steps: dict[int, list] = {}
    for path in (run / "audit").glob("*.jsonl"):
        for row in read_rows(path):
            steps.setdefault(row["step"], []).extend(map(tuple, row["samples"]))
    return {step: sorted(samples) for step, samples in steps.items()}


def test_the_target_is_the_moving_average_of_the_students_weights(data: Path, tmp_path: Path) -> None:
    """From one checkpoint to the next: target = m * target + (1 - m) * student, once a step, with the schedule's m."""
    values = recipe(data, steps=3, checkpoint_every=1, checkpoint_keep=9, picture_every=0, momentum_ema={"base": 0.7})
    result = pretrain("--recipe", write_recipe(tmp_path / "r.yaml", values), "--out", tmp_path / "run")
    assert result.returncode == 0, result.stdout + result.stderr
    saved = [Checkpoint(tmp_path / "run/checkpoints" / f"step_{step:08d}") for step in (1, 2, 3)]
    rows = read_metrics(tmp_path / "run")
    for before, after, row in zip(saved, saved[1:], rows[1:], strict=False):
        momentum = ema_momentum(row["step"], steps=3, config=MomentumConfig(base=0.7))
        assert row["optim/momentum_ema"] == momentum and 0.7 < momentum < 1
        for key in after.keys("ema/"):
            student = after.read_full(key.replace("ema/target.", "master/student."))
            expected = momentum * before.read_full(key) + (1 - momentum) * student
            torch.testing.assert_close(
                after.read_full(key), expected, rtol=1e-5, atol=1e-7, msg=lambda m, key=key: key + m
            )
    moved = [(a.read_full(k) - b.read_full(k)).abs().max() for a, b in [saved[:2]] for k in a.keys("ema/")]
    assert max(moved) > 1e-5


def test_resuming_on_two_ranks_or_in_other_batches_continues_the_run_of_one(data: Path, tmp_path: Path) -> None:
    values = recipe(data, steps=6, checkpoint_every=3)
    values["data"]["audit"] = True
    path = write_recipe(tmp_path / "r.yaml", values)
    result = pretrain("--recipe", path, "--out", tmp_path / "a")
    assert result.returncode == 0, result.stdout + result.stderr
    middle = tmp_path / "a" / "checkpoints" / "step_00000003"
    assert middle.is_dir()
    result = pretrain("--recipe", path, "--out", tmp_path / "b", "--resume", middle, ranks=2)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = losses(tmp_path / "b")
    assert len(rows) == 3
    for a, b in zip(losses(tmp_path / "a")[3:], rows, strict=True):
        assert b == pytest.approx(a, rel=1e-3)
    for source in values["data"]["sources"]:
        source["quota"] *= 2
    values["train"] |= {"global_batch": 32, "contrast_batch": 16, "steps": 9}
    result = pretrain(
        "--recipe", write_recipe(tmp_path / "c.yaml", values), "--out", tmp_path / "c", "--resume", tmp_path / "b"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    audit = audit_runs([tmp_path / name for name in "abc"])
    assert audit.proven and [(a["world"], a["begin"], a["end"]) for a in audit.attempts] == [
        (1, 0, 3),
        (2, 3, 6),
        (1, 6, 9),
    ]
    # 6 steps of 16 and 3 of 32: half of each from the first source, of 60 samples.
    assert (audit.sources[0].draws, audit.sources[0].epochs_finished) == (96, 1), audit.to_text()


def test_twenty_steps_match_the_golden_losses(data: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "golden.yaml", recipe(data, steps=20, checkpoint_every=100, picture_every=0))
    result = pretrain("--recipe", path, "--out", tmp_path / "golden")
    assert result.returncode == 0, result.stdout + result.stderr
    got = losses(tmp_path / "golden")
    if os.environ.get("M3I_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps({"losses": list(LOSSES), "steps": got}, indent=1) + "\n")
    for step, (a, b) in enumerate(zip(json.loads(GOLDEN.read_text())["steps"], got, strict=True)):
        assert b == pytest.approx(a, rel=1e-3), f"step {step}"

"""Runs that go wrong: gradients that are not finite, spikes, reloads; what becomes of weights, data and files."""

import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tiny import ROOT, pretrain, recipe, write_data, write_recipe

from m3i_large.checkpoint import Checkpoint, newest
from m3i_large.data.audit import audit_runs
from m3i_large.errors import DivergenceError
from m3i_large.metrics import read_metrics, read_rows
from m3i_large.parallel.comm import Rank
from m3i_large.run import read_exit

pytestmark = pytest.mark.slow
INTACT = ("loss", "optim/grad_norm", "optim/lr", "optim/momentum_ema", "optim/temperature")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "tiny")


@dataclass(frozen=True)
class Case:
    """A run whose loss is NaN in some steps, on the rank they are mapped to, and a multiple of itself in others."""

    recipe: Path
    out: Path
    nan: dict[int, int] = field(default_factory=dict)
    factor: dict[int, float] = field(default_factory=dict)
    stop: int = -1  # SIGTERM in this step


def trained(rank: Rank, cases: list[Case]) -> list[str]:
    """Trains one case after the other; how each ended."""
    from m3i_large.objective import Objective
    from m3i_large.recipe import load_recipe
    from m3i_large.train import train

    forward, outcomes = Objective.forward, []
    for case in cases:

        def hurt(self: Objective, batch, *, case=case, **more):  # type: ignore
            losses = forward(self, batch, **more)
            if batch.step == case.stop:
                os.kill(os.getpid(), signal.SIGTERM)
            scale = float("nan") if case.nan.get(batch.step) == rank.rank else case.factor.get(batch.step, 1.0)
            return losses | {"loss": losses["loss"] * scale}

        Objective.forward = hurt  # type: ignore
        try:
            recipe = load_recipe(str(case.recipe))
            outcomes.append(train(recipe, ds=ROOT / "ds_configs/zero3.json", out=case.out, resume="auto", rank=rank))
        except DivergenceError as error:
            outcomes.append(str(error))
    return outcomes


def state(run: Path) -> dict[str, torch.Tensor]:
    saved = Checkpoint(newest(run / "checkpoints"))
    return {key: saved.read_full(key) for key in saved.keys()}  # noqa: SIM118


def events(run: Path, kind: str) -> list[dict]:
    return [event for event in read_rows(run / "events.jsonl") if event["event"] == kind]


def same_end(a: Path, b: Path) -> None:
    first, second = state(a), state(b)
    assert first.keys() == second.keys()
    different = [key for key in first if not torch.equal(first[key], second[key])]
    assert not different, different[:5]
    assert all(value.isfinite().all() for value in first.values())
    manifests = [Checkpoint(newest(run / "checkpoints")).manifest for run in (a, b)]
    for key in ("step", "applied_steps", "skip_steps", "groups", "sampler"):
        assert manifests[0][key] == manifests[1][key], key


def write(data: Path, directory: Path, name: str, *, precision: str = "fp32", **train: object) -> Path:
    values = recipe(data, checkpoint_keep=9, picture_every=0, precision=precision, **({"steps": 10} | train))
    values["data"]["audit"] = True
    return write_recipe(directory / f"{name}.yaml", values)


@pytest.mark.parametrize(("ranks", "precision"), [(1, "fp32"), (2, "bf16")])
def test_after_k_bad_steps_the_run_goes_back_and_never_applies_them(
    ranks: int, precision: str, data: Path, tmp_path: Path
) -> None:
    """The oracle is a run that was told from its start to leave the steps out."""
    bad = {2: 0, 5: ranks - 1, 6: 0, 7: ranks - 1}  # one alone; then three in a row, on one rank each
    path = write(data, tmp_path, "hurt", max_skipped=3, precision=precision)
    oracle = write(data, tmp_path, "oracle", skip_steps=sorted(bad), precision=precision)
    cases = [Case(path, tmp_path / "hurt", bad), Case(oracle, tmp_path / "oracle", bad)]
    assert run_ranks(ranks, trained, cases) == [["finished", "finished"]] * ranks
    same_end(tmp_path / "hurt", tmp_path / "oracle")
    for a, b in zip(read_metrics(tmp_path / "hurt"), read_metrics(tmp_path / "oracle"), strict=True):
        left_out = a["step"] in bad
        assert left_out or [a[k] for k in INTACT] == [b[k] for k in INTACT], a["step"]
        assert left_out == ("loss" not in b) == (a.get("loss") is None)
        assert a["optim/skipped"] == b["optim/skipped"] == sum(s <= a["step"] for s in bad)

    found = events(tmp_path / "hurt", "skip")
    assert [(e["attempt"], e["step"], e["why"]) for e in found] == [
        *((0, step, "not finite") for step in (2, 5, 6, 7)),
        *((1, step, "listed") for step in (5, 6, 7)),
    ]
    reload = next(e for e in events(tmp_path / "hurt", "incident") if e["what"] == "reload")
    assert (reload["checkpoint"], reload["skip_steps"], reload["step"]) == (4, [2, 5, 6, 7], 7)
    assert [(e["step"], e["attempt"]) for e in events(tmp_path / "hurt", "resume")] == [(4, 1)]
    saves = [(e["attempt"], e["step"]) for e in events(tmp_path / "hurt", "save")]
    assert saves == [(0, 2), (0, 4), (1, 6), (1, 8), (1, 10)], "none within a streak"
    assert Checkpoint(newest(tmp_path / "hurt/checkpoints")).manifest["applied_steps"] == 6

    drawn = {tuple(s) for row in audit_rows(tmp_path / "hurt", attempt=1) if row["step"] == 6 for s in row["samples"]}
    assert {tuple(s) for s in found[2]["samples"]} == drawn and len(found[2]["samples"]) == 16
    for name in ("hurt", "oracle"):
        audit = audit_runs([tmp_path / name])
        assert audit.proven and audit.skipped == [2, 5, 6, 7], audit.to_text()
        assert [(s.name, s.draws, s.skipped) for s in audit.sources] == [
            ("first", 80, 32),
            ("second", 40, 16),
            ("labelled", 40, 16),
        ]


def audit_rows(run: Path, *, attempt: int) -> list[dict]:
    return [row for path in (run / "audit").glob(f"attempt_{attempt}_*.jsonl") for row in read_rows(path)]


def test_bad_steps_and_spikes_on_one_rank(data: Path, tmp_path: Path) -> None:
    """One start for what is looked at below."""
    spike = {"window": 10, "factor": 10}
    late, told, undone, early, oracle, single = (
        write(data, tmp_path, name, **train)
        for name, train in {
            "late": {"max_skipped": 2, "max_reloads": 1, "steps": 20},
            "told": {"steps": 12, "spike": spike | {"action": "warn"}},
            "undone": {"steps": 12, "spike": spike | {"action": "reload"}},
            "early": {"max_skipped": 2},
            "oracle": {"steps": 12, "spike": spike, "skip_steps": [8, 9]},
            "single": {"steps": 4, "checkpoint_every": 1},
        }.items()
    )
    cases = [
        Case(late, tmp_path / "late", nan=dict.fromkeys(range(5, 20), 0)),
        Case(told, tmp_path / "told", factor={8: 5.0, 9: 5.0}),
        Case(undone, tmp_path / "undone", factor={8: 5.0, 9: 5.0}),
        Case(early, tmp_path / "early", nan=dict.fromkeys(range(20), 0)),
        Case(oracle, tmp_path / "oracle"),
        Case(single, tmp_path / "single", nan={3: 0}),
        Case(undone, tmp_path / "stopped", factor={8: 5.0, 9: 5.0}, stop=8),
        Case(undone, tmp_path / "stopped", factor={8: 5.0, 9: 5.0}),
    ]
    outcomes = run_ranks(1, trained, cases)[0]
    assert [outcomes[i] for i in (1, 2, 4, 5, 6, 7)] == [*4 * ["finished"], "interrupted", "finished"]
    steps_that_stay_bad_end_the_run_with_one_line(tmp_path / "late", outcomes[0])
    assert outcomes[3].startswith("steps 0 to 1 are bad") and "no checkpoint lies before them" in outcomes[3]
    a_spike_is_told_or_undone(tmp_path)
    a_bad_step_changes_neither_weights_nor_average(tmp_path / "single")


def a_bad_step_changes_neither_weights_nor_average(run: Path) -> None:
    before, after = (Checkpoint(run / f"checkpoints/step_{step:08d}") for step in (3, 4))
    assert before.manifest["applied_steps"] == after.manifest["applied_steps"] == 3
    for key in before.keys():  # noqa: SIM118
        assert torch.equal(before.read_full(key), after.read_full(key)), key


def a_spike_is_told_or_undone(runs: Path) -> None:
    same_end(runs / "undone", runs / "oracle")
    same_end(runs / "stopped", runs / "oracle")
    assert [(e["step"], e["attempt"]) for e in events(runs / "stopped", "resume")] == [(8, 1), (8, 2)], "9 is spoiled"
    assert [(e["what"], e["step"]) for e in events(runs / "told", "incident")] == [("spike", 8)]
    assert audit_runs([runs / "undone"]).skipped == [8, 9] and audit_runs([runs / "told"]).skipped == []


def steps_that_stay_bad_end_the_run_with_one_line(run: Path, line: str) -> None:
    assert line.startswith("steps 7 to 8 are bad") and "for 1 reloads (train.max_reloads)" in line
    ended = read_exit(run)
    assert (ended["outcome"], ended["attempt"], ended["message"]) == ("failed", 1, line) and ended["step"] == 9
    assert events(run, "end")[0]["outcome"] == "failed"


def test_a_list_of_steps_survives_a_restart(data: Path, tmp_path: Path) -> None:
    """What a checkpoint's manifest lists is left out by whoever continues from it."""
    path = write(data, tmp_path, "r", max_skipped=2)
    assert run_ranks(1, trained, [Case(path, tmp_path / "whole", {4: 0, 5: 0})]) == [["finished"]]
    whole = Checkpoint(tmp_path / "whole/checkpoints/step_00000008")
    assert whole.manifest["skip_steps"] == [4, 5]
    result = pretrain("--recipe", path, "--out", tmp_path / "rest", "--resume", whole.directory)
    assert result.returncode == 0, result.stdout + result.stderr
    same_end(tmp_path / "whole", tmp_path / "rest")
    assert [row["optim/skipped"] for row in read_metrics(tmp_path / "rest")] == [2, 2]

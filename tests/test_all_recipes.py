"""Every shipped recipe at demo scale under ZeRO-3: a few steps, finite losses, a checkpoint, and on from there."""

import math
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tiny import ROOT, recipe, write_data

from m3i_large.build import build_objective
from m3i_large.checkpoint import Checkpoint, newest
from m3i_large.evaluate import evaluate
from m3i_large.metrics import read_metrics
from m3i_large.parallel.comm import Rank
from m3i_large.recipe import Recipe, load_recipe, recipe_header, recipe_names, validate
from m3i_large.report import write_report
from m3i_large.train import train

NAMES = recipe_names()


def at_tiny_scale(name: str, data: Path, *, steps: int) -> Recipe:
    """The recipe's objective and optimizer settings on the tests' data and towers."""
    values = recipe(data, steps=steps, checkpoint_every=2, picture_every=2, signals_every=1)
    return validate(values | {"name": name, "objective": load_recipe(name, ["scale=demo"]).objective.model_dump()})


def run_all(rank: Rank, data: Path, runs: Path, steps: int, names: list[str]) -> None:
    for name in names:
        out = runs / name
        settled = at_tiny_scale(name, data, steps=steps)
        assert train(settled, ds=ROOT / "ds_configs/zero3.json", out=out, resume="auto", rank=rank) == "finished"


@pytest.mark.parametrize("name", NAMES)
def test_builds_on_meta_at_full_size_with_the_parameters_its_header_says(name: str) -> None:
    with torch.device("meta"):
        objective = build_objective(load_recipe(name))
    trained = [(n, p) for n, p in objective.named_parameters() if p.requires_grad]
    student = sum(p.numel() for p in objective.student.parameters()) / 1e6
    total = sum(p.numel() for _, p in trained) / 1e6
    assert f"Parameters: {student:.1f} M student, {total:.1f} M trained." in recipe_header(name)
    assert not {n.split(".")[0] for n, _ in trained} & {"target", "target_pool"}


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_every_recipe_trains_saves_and_resumes(world: int, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    names = NAMES if world == 1 else ["m3i", "m3i_without_mix", "table2_a", "table2_f", "table2_l", "wsp_clip"]
    run_ranks(world, run_all, data, tmp_path / "runs", 3, names)
    for name in names:
        rows = read_metrics(tmp_path / "runs" / name)
        terms = {term.name for term in load_recipe(name).objective.terms}
        assert [row["step"] for row in rows] == [0, 1, 2]
        for row in rows:
            wanted = {"loss", *(f"loss/{t}" for t in terms), *(f"gradient/{t}" for t in terms)}
            assert wanted <= row.keys() and all(math.isfinite(row[k]) for k in wanted), (name, row)
            assert all(row[f"gradient/{t}"] > 0 for t in terms), (name, row)
        assert Checkpoint(newest(tmp_path / "runs" / name / "checkpoints")).step == 3
        assert (tmp_path / "runs" / name / "pictures/step_00000002/input.webp").is_file()
        html = write_report(tmp_path / "runs" / name).read_text(encoding="utf-8")
        objective = load_recipe(name).objective
        # Of 16 rows 4 have a class and 12 a text, on two ranks half of them: of fewer than 8 none is called the worst.
        enough = objective.dense or objective.has("global") or (objective.has("text") and world == 1)
        for title, there in (
            ("What the attention pool looks at", objective.pooled),
            ("From a text to pictures", objective.has("text")),
            ("Dense features through training", True),
            ("Worst losses", enough),
        ):
            assert (f"<h3>{title}</h3>" in html) == bool(there), (name, title)
    if world == 1:
        continue_and_evaluate(names, data, tmp_path)


def continue_and_evaluate(names: list[str], data: Path, tmp_path: Path) -> None:
    """From the checkpoint of step 2 in a new process: step 3 must repeat itself to the bit."""
    for name in names:
        (tmp_path / "again" / name).mkdir(parents=True)
    run_ranks(1, resume_all, data, tmp_path, names)
    for name in names:
        first, again = (read_metrics(tmp_path / where / name)[-1] for where in ("runs", "again"))
        assert (first["step"], again["step"]) == (2, 2) and first["loss"] == again["loss"], name
        (result,) = evaluate(["knn"], tmp_path / "runs" / name, data=data, train=data)
        assert set(result["values"]) == {"top1", "mean_per_class"}


def resume_all(rank: Rank, data: Path, tmp_path: Path, names: list[str]) -> None:
    for name in names:
        settled = at_tiny_scale(name, data, steps=3)
        start = tmp_path / "runs" / name / "checkpoints" / "step_00000002"
        outcome = train(
            settled, ds=ROOT / "ds_configs/zero3.json", out=tmp_path / "again" / name, resume=str(start), rank=rank
        )
        assert outcome == "finished"

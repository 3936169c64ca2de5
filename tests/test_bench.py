"""The bench of a step: its parts are those of the recipe, and add up."""

from pathlib import Path

import pytest
import torch
from tiny import recipe

from m3i_large.bench import bench_step, random_batch
from m3i_large.build import build_objective
from m3i_large.recipe import load_recipe, validate


def test_parts_add_up_to_the_step(tmp_path: Path) -> None:
    rows = {row["part"]: row for row in bench_step(validate(recipe(tmp_path)), rows=8, device=torch.device("cpu"))}
    assert list(rows) == ["student", "target encoder", "decoder", "text tower", "rest", "step", "CLIP-only step"]
    assert rows["step"]["share"] == 1 and all(row["ms"] > 0 for name, row in rows.items() if name != "rest")
    parts = sum(row["ms"] for name, row in rows.items() if name not in ("step", "CLIP-only step"))
    assert parts == pytest.approx(rows["step"]["ms"])


@pytest.mark.parametrize("name", ["demo", "table2_d", "table2_i", "sp_classification", "m3i_without_mix"])
def test_a_random_batch_fits_any_objective(name: str, tmp_path: Path) -> None:
    values = recipe(tmp_path) | {"objective": load_recipe(name, ["scale=demo"]).objective.model_dump()}
    resolved = validate(values)
    assert build_objective(resolved)(random_batch(resolved, 8))["loss"].isfinite()

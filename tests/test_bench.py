"""The bench of a step: its parts are those of the recipe, and each runs what it says."""

from pathlib import Path

import pytest
import torch
from tiny import recipe
from torch import nn

from m3i_large.bench import _parts, bench_step, random_batch
from m3i_large.build import build_objective
from m3i_large.recipe import load_recipe, validate


def test_parts_are_those_of_the_recipe(tmp_path: Path) -> None:
    rows = {row["part"]: row for row in bench_step(validate(recipe(tmp_path)), rows=8, device=torch.device("cpu"))}
    assert list(rows) == ["student", "target encoder", "decoder", "text tower", "rest", "step", "CLIP-only step"]
    assert rows["step"]["share"] == 1 and all(row["ms"] > 0 for row in rows.values())


def test_the_rest_is_the_objective_without_its_towers(tmp_path: Path) -> None:
    resolved = validate(recipe(tmp_path))
    whole, batch = build_objective(resolved), random_batch(resolved, 8)
    towers = ("student", "target", "decoder", "text")
    calls = dict.fromkeys(towers, 0)
    for name in towers:

        def count(module: nn.Module, args: object, kwargs: object, name: str = name) -> None:
            calls[name] += 1

        getattr(whole, name).register_forward_pre_hook(count, with_kwargs=True)
    parts = _parts(whole, batch)
    calls |= dict.fromkeys(towers, 0)
    parts["rest"]()
    assert set(calls.values()) == {0}
    for name, part in zip(towers, ("student", "target encoder", "decoder", "text tower"), strict=True):
        parts[part]()
        assert calls[name] == 1
    assert whole.pool.fc_norm[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["demo", "table2_d", "table2_i", "sp_classification", "m3i_without_mix"])
def test_a_random_batch_fits_any_objective(name: str, tmp_path: Path) -> None:
    values = recipe(tmp_path) | {"objective": load_recipe(name, ["scale=demo"]).objective.model_dump()}
    resolved = validate(values)
    assert build_objective(resolved)(random_batch(resolved, 8))["loss"].isfinite()

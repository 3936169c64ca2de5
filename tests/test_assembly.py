"""The whole objective under the engine against plain torch, one optimizer step."""

import copy
import json
from pathlib import Path

import pytest
import torch
from ranks import full, run_ranks
from tiny import recipe, write_data, write_recipe

from m3i_large.assembly import build_engine, training_state
from m3i_large.build import build_objective, use_plain_attention
from m3i_large.optim import decays
from m3i_large.parallel.comm import Rank
from m3i_large.parallel.ds_config import StepSizes, read_ds_config
from m3i_large.recipe import load_recipe
from m3i_large.run import open_run
from m3i_large.stream import make_loader, plan_mixture, prepare_sources

LR = 1e-3


def step_both_ways(rank: Rank, path: Path, directory: Path, zero: dict) -> dict:
    """One step by DeepSpeed and one by plain torch (on the first rank of one), from the same batch."""
    settings = load_recipe(str(path))
    sizes = StepSizes(micro_batch=16 // rank.world, accumulation=1, clip=1e9, bf16=False)
    ds = directory / f"ds_{rank.rank}.json"
    ds.write_text(json.dumps({"zero_optimization": zero}))
    sources = prepare_sources(settings, rank)
    mixture = plan_mixture(settings, [(s.num_samples, s.mean_bytes) for s in sources])
    run = open_run(directory / "run", settings, resume="never")
    with make_loader(settings, mixture, sources, rank, run) as stream:
        batch = copy.deepcopy(next(stream))
    engine, target = build_engine(settings, read_ds_config(ds, sizes, world=rank.world), rank)
    engine.set_lr(LR)
    engine.backward(engine(batch)["loss"])
    assert engine.step(after_update=lambda masters: target.update(masters, 0.9))
    found = {"engine": full(rank, training_state(engine, target))}
    if rank.world == 1:
        found["plain"] = plain_step(settings, batch)
    return found


def plain_step(settings, batch) -> dict:
    objective = build_objective(settings)
    use_plain_attention(objective)
    named = [(n, p) for n, p in objective.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if decays(n, tuple(p.shape)) == decay], "weight_decay": 0.1 * decay}
        for decay in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=settings.optim.betas, eps=settings.optim.eps)
    objective(batch)["loss"].backward()
    optimizer.step()
    # The first moments are the gradients, times 1 - beta1; the first step's weights would show little but their signs.
    return {f"exp_avg/{n}": optimizer.state[p]["exp_avg"] for n, p in named}


# 5 x 5 cells cannot be split in halves: own and foreign tokens differ in number, so that the decoder runs twice.
# A small bucket is reduced in the middle of a block.
@pytest.mark.slow
@pytest.mark.parametrize("bucket", [1000, 100_000_000])
@pytest.mark.parametrize("size", [32, 40])
def test_gradients_under_zero3_equal_plain_torch_also_where_a_tower_runs_twice(
    tmp_path: Path, size: int, bucket: int
) -> None:
    values = recipe(write_data(tmp_path / "data"), picture_every=0)
    values["backbone"]["arch"]["image_size"] = values["data"]["image_size"] = size
    path = write_recipe(tmp_path / "r.yaml", values)
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": bucket}
    one = run_ranks(1, step_both_ways, path, tmp_path, zero)[0]
    two = run_ranks(2, step_both_ways, path, tmp_path, zero)[0]
    for key, value in one["plain"].items():
        for world, result in ((1, one), (2, two)):
            atol = 1e-5 * value.abs().max().item() + 1e-9
            torch.testing.assert_close(
                result["engine"][key], value, rtol=1e-3, atol=atol, msg=f"{size} {bucket} {world} {key}"
            )

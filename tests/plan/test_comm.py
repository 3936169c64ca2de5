"""Collectives as planned, against what DeepSpeed logs in a real run of two ranks over gloo."""

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import recipe

from m3i_large.assembly import build_engine, training_state
from m3i_large.bench import random_batch
from m3i_large.build import build_objective
from m3i_large.data.batch import Batch
from m3i_large.ds_file import Zero, read_ds_file, zero_of
from m3i_large.micro_step import micro_step
from m3i_large.parallel.comm import ProcessGroupCollectives, Rank
from m3i_large.parallel.ds_config import StepSizes, read_ds_config
from m3i_large.plan.comm import collectives
from m3i_large.plan.devices import find_gpu
from m3i_large.plan.parameters import parameter_table
from m3i_large.plan.plan import make_plan
from m3i_large.plan.walk import walk
from m3i_large.recipe import Recipe, validate
from m3i_large.stream import chunk_rows

ROWS, STEPS = 16, 4  # first the order of modules is recorded, and steps come to repeat themselves
DECODER_TWICE = {"objective": {"input": {"ratio": 0.25}}}  # readings of two shapes
CHUNKS = {"train": {"contrast": "cached", "chunk": 2}, "objective": {"mix": {"block": 2}}}
# stage3_param_persistence_threshold, max_reuse_distance, prefetch bucket; accumulation; recomputation; more of a recipe
CASES: dict[str, tuple[int, int, int, int, bool, dict[str, Any]]] = {
    "gathered again": (0, 0, 0, 1, False, {}),
    "prefetched": (0, 0, 20_000, 1, True, {}),
    "kept and small ones whole": (100, 1_000_000, 20_000, 1, True, {}),
    "all small ones whole": (100_000, 1_000_000_000, 100_000_000, 1, False, {}),
    "two micro-steps": (100, 3000, 5000, 2, True, {}),
    "as shipped": (0, 3_000_000_000, 100_000_000, 1, True, {}),
    "decoder twice": (0, 3000, 5000, 1, True, DECODER_TWICE),
    "in chunks": (0, 3000, 5000, 1, True, CHUNKS),
    "in chunks as shipped": (0, 3_000_000_000, 100_000_000, 2, True, CHUNKS),
}


def tiny(accumulation: int, checkpointing: bool, more: dict[str, Any] | None = None) -> Recipe:
    sizes = {"global_batch": accumulation * ROWS, "contrast_batch": ROWS, "activation_checkpointing": checkpointing}
    values = recipe(Path("nowhere"), **sizes)
    values["text"]["vocab_size"] = 1000
    for part, fields in (more or {}).items():
        for key, value in fields.items():
            values[part][key] = values[part].get(key, {}) | value if isinstance(value, dict) else value
    return validate(values)


def chunk_of(plan: Recipe) -> int | None:
    return chunk_rows(plan, slots=ROWS, world=2)


def batch_of(plan: Recipe, seed: int) -> Batch:
    """A rank's rows, each with its partner in its own block of two."""
    return replace(random_batch(plan, ROWS // 2, seed=seed), partner_N=torch.arange(ROWS // 2) ^ 1)


def ds_file(directory: Path, case: str) -> Path:
    persistence, reuse, prefetch, *_ = CASES[case]
    zero = {"stage": 3, "stage3_param_persistence_threshold": persistence, "stage3_max_reuse_distance": reuse}
    zero |= {"stage3_prefetch_bucket_size": prefetch, "reduce_bucket_size": 20_000}
    path = directory / f"{os.getpid()}.json"
    logged = {"enabled": True, "verbose": False, "prof_all": True, "debug": False}
    path.write_text(json.dumps({"zero_optimization": zero, "comms_logger": logged}))
    return path


def logged() -> dict[str, Counter]:
    """Calls and bytes by operator so far."""
    from deepspeed.comm.comm import comms_logger

    calls: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for op, sizes in comms_logger.comms_dict.items():
        for size, (count, *_) in sizes.items():
            calls[op] += count
            nbytes[op] += size * count
    return {"calls": calls, "bytes": nbytes}


def real_steps(rank: Rank, directory: Path) -> dict[str, Any]:
    """What the last of some steps sent, by case."""
    results = {}
    for case in CASES:
        _, _, _, accumulation, checkpointing, more = CASES[case]
        plan = tiny(accumulation, checkpointing, more)
        sizes = StepSizes(micro_batch=ROWS // 2, accumulation=accumulation, clip=1.0, bf16=False)
        engine, target = build_engine(plan, read_ds_config(ds_file(directory, case), sizes, world=2), rank)
        run = micro_step(engine, plan, rows=chunk_of(plan))
        for step in range(STEPS):
            before = logged()
            for number in range(accumulation):
                run(batch_of(plan, 10 * step + number), signals=False)
                applied = engine.step(after_update=lambda masters, target=target: target.update(masters, 0.9))
            assert applied
        after = logged()
        saved = sum(entry.numel * entry.dtype.itemsize for entry in training_state(engine, target).layout().values())
        results[case] = {k: after[k] - before[k] for k in after} | {"saved": saved}
        engine.deepspeed.destroy()
    return results


def replicated_steps(rank: Rank, directory: Path) -> dict[tuple[int, int], dict[str, Counter]]:
    """The same under stages 1 and 2, by stage and micro-steps; plain DeepSpeed."""
    import deepspeed

    results = {}
    for stage in (1, 2):
        for accumulation in (1, 2):
            plan = tiny(accumulation, False)
            objective = build_objective(plan, collectives=ProcessGroupCollectives(rank))
            config = json.loads(ds_file(directory, "prefetched").read_text())
            config["zero_optimization"] = {"stage": stage, "reduce_bucket_size": 20_000}
            config |= {"train_micro_batch_size_per_gpu": ROWS // 2, "gradient_accumulation_steps": accumulation}
            optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad])
            engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=config)
            for step in range(2):
                before = logged()
                for _ in range(accumulation):
                    engine.backward(engine(random_batch(plan, ROWS // 2, seed=step))["loss"])
                    engine.step()
            after = logged()
            results[stage, accumulation] = {k: after[k] - before[k] for k in after}
    return results


def run_both(rank: Rank, directory: Path) -> dict[str, Any]:
    return {"sharded": real_steps(rank, directory), "replicated": replicated_steps(rank, directory)}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(2, run_both, tmp_path_factory.mktemp("ds"))


def planned(zero: Zero, accumulation: int, checkpointing: bool, more: dict | None = None) -> dict[str, tuple[int, int]]:
    """(calls, bytes) of ZeRO's collectives by operator; those of the objective itself have no calls."""
    plan = tiny(accumulation, checkpointing, more)
    seen = walk(plan, rows=ROWS // 2, world=2, chunk=chunk_of(plan))
    rows = collectives(seen, parameter_table(plan), zero, world=2, accumulation=accumulation)
    found: dict[str, tuple[int, int]] = {}
    for row in rows:
        if row.calls:
            calls, size = found.get(row.op, (0, 0))
            found[row.op] = (calls + row.calls, size + row.bytes)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_stage_3_sends_what_is_planned(case: str, real: list[dict[str, Any]], tmp_path: Path) -> None:
    got = real[0]["sharded"][case]
    calls, size = got["calls"], got["bytes"]
    # A gather is logged by the shard that a rank puts in.
    assert planned(zero_of(read_ds_file(ds_file(tmp_path, case))), *CASES[case][3:]) == {
        "all_gather": (calls["all_gather_into_tensor"], 2 * size["all_gather_into_tensor"]),
        "reduce_scatter": (calls["reduce_scatter_tensor"], size["reduce_scatter_tensor"]),
    }


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_stages_1_and_2_send_what_is_planned(stage: int, accumulation: int, real: list[dict[str, Any]]) -> None:
    size = real[0]["replicated"][stage, accumulation]["bytes"]
    plan = planned(Zero(stage=stage, reduce_bucket=20_000), accumulation, False)
    assert plan["all_gather"][1] == 2 * size["all_gather_into_tensor"]
    scalars = 100  # bytes of the norm and the like
    assert 0 <= size["all_reduce"] - plan["all_reduce"][1] < scalars


@pytest.mark.slow
def test_a_checkpoint_is_as_large_as_planned(real: list[dict[str, Any]]) -> None:
    saved = sum(rank["sharded"]["all small ones whole"]["saved"] for rank in real)
    plan = make_plan(tiny(1, False), gpus=2, gpu=find_gpu("h100"), zero=Zero())
    assert saved == plan.checkpoint_bytes


def test_one_rank_sends_nothing() -> None:
    plan = tiny(1, False)
    seen = walk(plan, rows=ROWS, world=1)
    assert collectives(seen, parameter_table(plan), Zero(), world=1, accumulation=1) == []

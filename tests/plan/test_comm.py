"""Collectives as planned, against what DeepSpeed logs in a real run of two ranks over gloo."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import recipe

from m3i_large.assembly import build_engine, training_state
from m3i_large.bench import random_batch
from m3i_large.parallel.comm import Rank
from m3i_large.parallel.engine import StepSizes, read_ds_config
from m3i_large.plan.comm import collectives
from m3i_large.plan.parameters import parameter_table
from m3i_large.plan.walk import walk
from m3i_large.plan.zero import read_zero
from m3i_large.recipe import Recipe, validate

ROWS, STEPS = 16, 5
# stage3_param_persistence_threshold, max_reuse_distance, prefetch bucket; accumulation; recomputation
CASES = {
    "gathered again": (0, 0, 0, 1, False),
    "prefetched": (0, 0, 20_000, 1, True),
    "kept and small ones whole": (100, 1_000_000, 20_000, 1, True),
    "as shipped": (100_000, 1_000_000_000, 100_000_000, 1, False),
    "two micro-steps": (100, 3000, 5000, 2, True),
}


def tiny(accumulation: int, checkpointing: bool) -> Recipe:
    sizes = {"global_batch": accumulation * ROWS, "contrast_batch": ROWS, "activation_checkpointing": checkpointing}
    return validate(recipe(Path("nowhere"), **sizes))


def ds_file(directory: Path, case: str) -> Path:
    persistence, reuse, prefetch, _, _ = CASES[case]
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


def real_steps(rank: Rank, directory: Path, cases: list[str]) -> dict[str, Any]:
    """What the last of some steps sent, by case."""
    results = {}
    for case in cases:
        _, _, _, accumulation, checkpointing = CASES[case]
        plan = tiny(accumulation, checkpointing)
        sizes = StepSizes(micro_batch=ROWS // 2, accumulation=accumulation, clip=1.0, bf16=False)
        engine, target = build_engine(plan, read_ds_config(ds_file(directory, case), sizes, world=2), rank)
        for step in range(STEPS):
            before = logged()
            for micro_step in range(accumulation):
                batch = random_batch(plan, ROWS // 2, seed=10 * step + micro_step)
                engine.backward(engine(batch)["loss"])
                applied = engine.step()
            assert applied
            if target:
                target.update(0.9)
        after = logged()
        saved = sum(entry.numel * entry.dtype.itemsize for entry in training_state(engine, target).layout().values())
        results[case] = {k: after[k] - before[k] for k in after} | {"saved": saved}
        engine.deepspeed.destroy()
    return results


@pytest.mark.slow
def test_stage_3_sends_what_is_planned(tmp_path: Path) -> None:
    real = run_ranks(2, real_steps, tmp_path, list(CASES))[0]
    for case, (_, _, _, accumulation, checkpointing) in CASES.items():
        plan = tiny(accumulation, checkpointing)
        seen = walk(plan, rows=ROWS // 2, world=2)
        rows = collectives(
            seen, parameter_table(plan), read_zero(ds_file(tmp_path, case)), world=2, accumulation=accumulation
        )
        planned = {op: sum(r.bytes for r in rows if r.op == op and r.calls) for op in ("all_gather", "reduce_scatter")}
        calls = {op: sum(r.calls for r in rows if r.op == op) for op in planned}
        # DeepSpeed logs a gather by the shard that a rank puts in.
        got = {
            "all_gather": 2 * real[case]["bytes"]["all_gather_into_tensor"],
            "reduce_scatter": real[case]["bytes"]["reduce_scatter_tensor"],
        }
        print(case, planned, got, calls, dict(real[case]["calls"]), dict(real[case]["bytes"]))


if __name__ == "__main__":
    import tempfile

    test_stage_3_sends_what_is_planned(Path(tempfile.mkdtemp()))
    torch.manual_seed(0)

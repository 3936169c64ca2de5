"""Every ZeRO stage, with and without offload, against plain torch; the average against its formula.

On a machine with a GPU what runs on one rank runs there: pytest tests/parallel -k "[1] or buffers or needs".
"""

import json
import math
from pathlib import Path

import pytest
import torch
from ranks import full, run_ranks
from test_engine import LR, MOMENTUM, STEPS, Pair, local_rows, plain_training

from m3i_large import checkpoint
from m3i_large.optim import OptimConfig
from m3i_large.parallel.comm import ProcessGroupCollectives, Rank
from m3i_large.parallel.ds_config import StepSizes, read_ds_config
from m3i_large.parallel.engine import Engine, build_param_groups, partition
from m3i_large.parallel.gathered_ema import CountedCollectives
from m3i_large.parallel.optimizer import build_optimizer
from m3i_large.parallel.sharded_ema import ShardedEMA
from m3i_large.parallel.state import JoinedState

CPU = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
# sub_group_size 60: several sub-groups of odd sizes.
VARIANTS = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero3_persistent": {"stage": 3, "stage3_param_persistence_threshold": 100_000, "sub_group_size": 60},
    "zero1_cpu": {"stage": 1, **CPU},
    "zero2_cpu": {"stage": 2, **CPU},
    "zero3_cpu": {"stage": 3, "sub_group_size": 60, **CPU},
    "zero3_param_cpu": {"stage": 3, **CPU, "offload_param": {"device": "cpu", "pin_memory": False}},
    "hpz": {"stage": 3, "stage3_param_persistence_threshold": 0, "zero_hpz_partition_size": 2},
    "hpz_persistent": {"stage": 3, "stage3_param_persistence_threshold": 100_000, "zero_hpz_partition_size": 2},
}
HPZ = ("hpz", "hpz_persistent")
PLAIN = tuple(name for name in VARIANTS if name not in HPZ)
BOTH = [(name, bf16) for name in PLAIN for bf16 in (False, True)]


def build(rank: Rank, directory: Path, name: str, *, bf16: bool) -> tuple[Engine, ShardedEMA]:
    path = directory / f"{name}_{rank.rank}_of_{rank.world}.json"
    path.write_text(json.dumps({"zero_optimization": VARIANTS[name]}))
    sizes = StepSizes(micro_batch=12 // rank.world, accumulation=1, clip=1.0, bf16=bf16)
    config = read_ds_config(path, sizes, world=rank.world)
    module = Pair().to(rank.device, torch.bfloat16 if bf16 else torch.float32)
    partition(module, config)
    trained = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    groups = build_param_groups(trained, weight_decay=0.1, decays=lambda name, shape: len(shape) > 1)
    offload = "offload_optimizer" in VARIANTS[name]
    # Fused on a GPU and for offloaded states; with the settings of plain_training.
    optimizer = build_optimizer(groups, OptimConfig(betas=(0.9, 0.999)), device=rank.device, offload=offload)
    engine = Engine(module, optimizer=optimizer, ds_config=config, rank=rank)
    return engine, ShardedEMA(engine, {"target": "student"})


def seen_by(engine: Engine, rank: Rank, dtype: torch.dtype) -> torch.Tensor:
    """What the target's forward pass computes, from every rank's weights as they are there."""
    return ProcessGroupCollectives(rank).all_gather(engine(local_rows(rank, 99).to(dtype))["seen"].float()).cpu()


def train_variant(rank: Rank, directory: Path, name: str, bf16: bool) -> dict:
    engine, target = build(rank, directory, name, bf16=bf16)
    dtype = torch.bfloat16 if bf16 else torch.float32
    average = full(rank, target)
    collectives, losses, sent = ProcessGroupCollectives(rank), [], {}

    def update(masters) -> None:
        with CountedCollectives() as counted:
            target.update(masters, MOMENTUM)
        sent.update(counted.calls)

    for step in range(STEPS):
        engine.set_lr(LR)
        loss = engine(local_rows(rank, step).to(dtype))["loss"]
        engine.backward(loss)
        assert engine.step(after_update=update)
        losses.append((collectives.all_reduce_sum(loss.float()) / rank.world).item())
        masters = full(rank, engine.state())
        for key in average:
            source = masters["master/student." + key.removeprefix("ema/target.")]
            average[key] = MOMENTUM * average[key] + (1 - MOMENTUM) * source
    state = JoinedState([engine.state(), target])
    manifest = {"applied_steps": engine.applied_steps}
    checkpoint.save(directory / f"{name}_{bf16}", step=STEPS, state=state, manifest=manifest, rank=rank, keep=1)
    weights = Pair().to(dtype)
    weights.target.load_state_dict({k.removeprefix("ema/target."): v for k, v in average.items()})
    with torch.no_grad():
        longhand = torch.cat([weights.target(part.to(dtype)).float() for part in rows_of(rank)])
    return {
        "losses": losses,
        "tensors": full(rank, state),
        "average": average,
        "seen": seen_by(engine, rank, dtype),
        "longhand": longhand,
        "sent": sent,
        "steps": engine.applied_steps,
    }


def rows_of(rank: Rank) -> list[torch.Tensor]:
    whole = torch.randn(12, 7, generator=torch.Generator().manual_seed(99))
    return list(whole.chunk(rank.world))


def step_with(rank: Rank, engine: Engine, target: ShardedEMA, x: torch.Tensor) -> bool:
    engine.set_lr(LR)
    engine.backward(engine(x.to(next(engine.module.parameters()).dtype))["loss"])
    return engine.step(after_update=lambda masters: target.update(masters, MOMENTUM))


def skip_steps(rank: Rank, directory: Path, which: list[tuple[str, bool]]) -> dict:
    """For every variant: steps with NaN on the last rank, the first one and a later one, each before a good one."""
    found = {}
    for name, bf16 in which:
        engine, target = build(rank, directory, name, bf16=bf16)
        dtype = torch.bfloat16 if bf16 else torch.float32
        state = JoinedState([engine.state(), target])
        told = []
        for step in range(2):
            before, seen = full(rank, state), seen_by(engine, rank, dtype)
            x = local_rows(rank, step)
            applied = step_with(rank, engine, target, x * float("nan") if rank.rank == rank.world - 1 else x)
            after = full(rank, state)
            same = all(torch.equal(after[key], value) for key, value in before.items())
            same &= torch.equal(seen_by(engine, rank, dtype), seen)
            told.append((applied, same, engine.grad_norm, engine.applied_steps, step_with(rank, engine, target, x)))
        found[name, bf16] = {"told": told, "tensors": full(rank, state)}
        fresh, average = build(rank, directory, name, bf16=bf16)
        for step in range(2):
            step_with(rank, fresh, average, local_rows(rank, step))
        found[name, bf16]["never skipped"] = full(rank, JoinedState([fresh.state(), average]))
    return found


def clamp_all(rank: Rank, directory: Path, which: list[tuple[str, bool]]) -> dict:
    """For every variant: what a clamped parameter is in fp32 and in the forward pass, and how far it was from it."""
    found = {}
    for name, bf16 in which:
        engine, target = build(rank, directory, name, bf16=bf16)
        x = local_rows(rank, 0).to(torch.bfloat16 if bf16 else torch.float32)
        step_with(rank, engine, target, x)
        before = full(rank, engine.state())["master/head.bias"]
        loss = engine(x)["loss"].item()
        engine.clamp("head.bias", -0.001, 0.002)
        after = full(rank, engine.state())["master/head.bias"]
        found[name, bf16] = {"before": before, "after": after, "moved": engine(x)["loss"].item() != loss}
    return found


def train_all(rank: Rank, directory: Path, which: list[tuple[str, bool]]) -> dict:
    return {(name, bf16): train_variant(rank, directory, name, bf16) for name, bf16 in which}


@pytest.mark.slow
# hpZ makes its process groups once in a process: one variant each.
@pytest.mark.parametrize(
    ("world", "which"),
    [(1, BOTH), (2, BOTH), (3, BOTH), (4, [("hpz", False)]), (4, [("hpz_persistent", False)])],
    ids=["1", "2", "3", "hpz", "hpz_persistent"],
)
def test_every_stage_equals_plain_torch_and_the_average_its_formula(
    tmp_path: Path, world: int, which: list[tuple[str, bool]]
) -> None:
    expected = plain_training()
    results = run_ranks(world, train_all, tmp_path, which)
    for (name, bf16), result in results[0].items():
        where = f"{name} bf16={bf16}"
        assert result["steps"] == STEPS, where
        for key, average in result["average"].items():
            # The formula in fp32, from the gathered master weights of every step.
            torch.testing.assert_close(result["tensors"][key], average, rtol=1e-6, atol=1e-7, msg=f"{where} {key}")
        # On every rank the forward pass sees the rounded average.
        for other in results:
            torch.testing.assert_close(other[name, bf16]["seen"], result["longhand"], rtol=2e-2, atol=2e-2, msg=where)
        # One gather for each of the two optimizer groups where weights are whole on every rank.
        gathers = 2 if VARIANTS[name]["stage"] < 3 and world > 1 else 0
        assert sum(result["sent"].values()) == gathers, (where, result["sent"])
        if bf16:
            # Rounding flips the sign of small gradients, and so first updates: all variants must agree, plain fp32 need
            # not, but for the first loss.
            torch.testing.assert_close(result["losses"][0], expected["losses"][0], rtol=1e-2, atol=1e-3, msg=where)
            same = results[0]["zero3", True]["losses"] if ("zero3", True) in results[0] else result["losses"]
            torch.testing.assert_close(result["losses"], same, rtol=3e-2, atol=1e-2, msg=where)
            continue
        torch.testing.assert_close(result["losses"], expected["losses"], rtol=1e-4, atol=1e-6, msg=where)
        for parameter, value in expected["module"].named_parameters():
            if value.requires_grad:
                mine = result["tensors"][f"master/{parameter}"]
                torch.testing.assert_close(mine, value.detach(), rtol=1e-3, atol=1e-5, msg=f"{where} {parameter}")


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_step_with_nan_on_one_rank_is_as_if_it_had_not_been(tmp_path: Path, world: int) -> None:
    for result in run_ranks(world, skip_steps, tmp_path, BOTH):
        for which, seen in result.items():
            assert seen["told"] == [(False, True, math.inf, step, True) for step in range(2)], which
            for key, value in seen["never skipped"].items():
                assert torch.equal(seen["tensors"][key], value), (which, key)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_clamped_parameter_is_clamped_in_fp32_and_in_the_forward_pass(tmp_path: Path, world: int) -> None:
    for result in run_ranks(world, clamp_all, tmp_path, BOTH):
        for which, seen in result.items():
            assert torch.equal(seen["after"], seen["before"].clamp(-0.001, 0.002)), which
            assert seen["moved"] and not torch.equal(seen["after"], seen["before"]), which


def cross(rank: Rank, directory: Path, saved: Path) -> dict:
    """Every variant takes over every variant's checkpoint."""
    found = {}
    for name in PLAIN:
        engine, target = build(rank, directory, name, bf16=False)
        for source in PLAIN:
            point = checkpoint.Checkpoint(saved / f"{source}_False" / f"step_{STEPS:08d}")
            state = JoinedState([engine.state(), target])
            point.restore(state)
            engine.restored(applied_steps=point.manifest["applied_steps"])
            tensors = full(rank, state)
            seen = seen_by(engine, rank, torch.float32)
            found[source, name] = {"tensors": tensors, "seen": seen, "steps": engine.applied_steps}
        loss = engine(local_rows(rank, STEPS))["loss"]
        engine.backward(loss)
        engine.step(after_update=lambda masters, target=target: target.update(masters, MOMENTUM))
        found["next", name] = {"tensors": full(rank, JoinedState([engine.state(), target]))}
    return found


@pytest.mark.slow
def test_a_checkpoint_of_any_stage_continues_under_any_other_at_another_world_size(tmp_path: Path) -> None:
    trained = run_ranks(2, train_all, tmp_path, BOTH)[0]
    for world in (1, 3):
        results = run_ranks(world, cross, tmp_path, tmp_path)[0]
        for source in PLAIN:
            for name in PLAIN:
                result = results[source, name]
                assert result["steps"] == STEPS
                for key, value in trained[source, False]["tensors"].items():
                    assert torch.equal(result["tensors"][key], value), (source, name, key)
                torch.testing.assert_close(result["seen"], trained[source, False]["seen"], rtol=1e-4, atol=1e-5)
        reference = results["next", "zero3"]["tensors"]
        for name in PLAIN:
            for key, value in results["next", name]["tensors"].items():
                torch.testing.assert_close(value, reference[key], rtol=1e-3, atol=1e-5, msg=f"{name} {key}")

"""Offload to NVMe: what DeepSpeed's asynchronous I/O must be told to be right. Needs a C++ compiler and libaio."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks import full, run_ranks
from torch import nn

from m3i_large import checkpoint
from m3i_large.errors import UserError
from m3i_large.parallel.comm import Rank
from m3i_large.parallel.ds_config import StepSizes, read_ds_config
from m3i_large.parallel.engine import Engine, build_param_groups, partition
from m3i_large.parallel.sharded_ema import ShardedEMA
from m3i_large.parallel.state import JoinedState

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler"),
    pytest.mark.skipif(not Path("/usr/include/libaio.h").exists(), reason="no libaio headers"),
]
MOMENTUM, LR, STEPS = 0.9, 0.01, 3
OFFLOAD = {
    "cpu": {"device": "cpu", "pin_memory": False},
    "nvme": {"device": "nvme", "pin_memory": False, "buffer_count": 4},
}


class Odd(nn.Module):
    """Sizes whose runs begin anywhere but at multiples of 512 bytes; several sub-groups large enough for the disk."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Sequential(*(nn.Linear(701, 701) for _ in range(4)), nn.LayerNorm(701))
        self.target = copy.deepcopy(self.student).requires_grad_(False)
        self.head = nn.Linear(701, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = self.target(x)
        seen = self.student(x)
        return (seen - wanted - 0.3).square().mean() + self.head(seen).square().mean()


def build(rank: Rank, directory: Path, kind: str, *, sub_group: int = 700_000) -> tuple[Engine, ShardedEMA]:
    offload = OFFLOAD[kind] | ({"nvme_path": str(directory / "swap")} if kind == "nvme" else {})
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": sub_group}
    path = directory / f"{kind}_{rank.rank}.json"
    path.write_text(json.dumps({"zero_optimization": {**zero, "offload_optimizer": offload}}))
    config = read_ds_config(path, StepSizes(micro_batch=4, accumulation=1, clip=1.0, bf16=True), world=rank.world)
    module = Odd().to(torch.bfloat16)
    partition(module, config)
    trained = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    groups = build_param_groups(trained, weight_decay=0.1, decays=lambda name, shape: len(shape) > 1)
    optimizer = torch.optim.AdamW(groups, lr=LR, fused=True)
    engine = Engine(module, optimizer=optimizer, ds_config=config, rank=rank)
    return engine, ShardedEMA(engine, {"target": "student"})


def step_once(rank: Rank, engine: Engine, target: ShardedEMA, step: int, *, spoil: bool = False) -> tuple[float, bool]:
    x = torch.randn(8, 701, generator=torch.Generator().manual_seed(step)).chunk(2)[rank.rank].bfloat16()
    loss = engine(x * float("nan") if spoil else x)
    engine.backward(loss)
    return loss.item(), engine.step(after_update=lambda masters: target.update(masters, MOMENTUM))


def train(rank: Rank, directory: Path, kind: str) -> dict:
    engine, target = build(rank, directory, kind)
    state = JoinedState([engine.state(), target])
    first = full(rank, state)
    losses = [step_once(rank, engine, target, step)[0] for step in range(STEPS)]
    tensors = full(rank, state)
    swapped = [engine.partitions.swapped(i) for i in range(engine.partitions.num_groups)]
    manifest = {"applied_steps": engine.applied_steps}
    checkpoint.save(directory / kind, step=STEPS, state=state, manifest=manifest, rank=rank, keep=1)
    _, applied = step_once(rank, engine, target, STEPS, spoil=True)
    same = full(rank, state)
    after = [step_once(rank, engine, target, step)[0] for step in range(STEPS, STEPS + 2)]
    files = [p.name for p in (directory / "swap").rglob("*") if "gradient" in p.name]
    return {
        "first": first,
        "losses": losses,
        "tensors": tensors,
        "swapped": swapped,
        "applied": applied,
        "unchanged": all(torch.equal(tensors[k], same[k]) for k in tensors),
        "after": after,
        "final": full(rank, state),
        "gradient_files": files,
    }


def resume(rank: Rank, directory: Path, kind: str, saved: str) -> dict:
    engine, target = build(rank, directory, kind)
    point = checkpoint.Checkpoint(directory / saved / f"step_{STEPS:08d}")
    state = JoinedState([engine.state(), target])
    point.restore(state)
    engine.restored(applied_steps=point.manifest["applied_steps"])
    tensors = full(rank, state)
    after = [step_once(rank, engine, target, step)[0] for step in range(STEPS, STEPS + 2)]
    return {"tensors": tensors, "after": after, "final": full(rank, state)}


@pytest.mark.parametrize("world", [1, 2])
def test_nvme_equals_cpu_offload_tensor_by_tensor_and_resumes(tmp_path: Path, world: int) -> None:
    cpu = run_ranks(world, train, tmp_path, "cpu")[0]
    nvme = run_ranks(world, train, tmp_path, "nvme")[0]
    assert any(nvme["swapped"]) and not any(cpu["swapped"]) and not nvme["gradient_files"]
    assert nvme["losses"] == cpu["losses"] and nvme["after"] == cpu["after"]
    for part in ("first", "tensors", "final"):
        for key, value in cpu[part].items():
            assert torch.equal(nvme[part][key], value), (part, key)
    assert (nvme["applied"], nvme["unchanged"]) == (False, True)
    assert not torch.equal(nvme["tensors"]["ema/target.0.weight"], nvme["first"]["ema/target.0.weight"])
    for kind, saved in (("nvme", "nvme"), ("nvme", "cpu"), ("cpu", "nvme")):
        again = run_ranks(world, resume, tmp_path, kind, saved)[0]
        assert again["after"] == cpu["after"], (kind, saved)
        for key, value in cpu["tensors"].items():
            assert torch.equal(again["tensors"][key], value), (kind, saved, key)
        for key, value in cpu["final"].items():
            assert torch.equal(again["final"][key], value), (kind, saved, key)


def refused(rank: Rank, directory: Path) -> str:
    try:
        build(rank, directory, "nvme", sub_group=100_000)
    except UserError as error:
        return str(error)
    return ""


def test_sub_groups_too_small_for_a_safe_block_are_refused(tmp_path: Path) -> None:
    assert "sub_group_size: got 100000; needed: at least" in run_ranks(1, refused, tmp_path)[0]

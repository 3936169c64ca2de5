"""The engine's local slices, the sharded average and the checkpoint format, on real ZeRO-3 over gloo."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from ranks import full, run_ranks
from torch import nn

from m3i_large import checkpoint
from m3i_large.assembly import restore, training_state
from m3i_large.parallel.comm import ProcessGroupCollectives, Rank
from m3i_large.parallel.ds_config import StepSizes, read_ds_config
from m3i_large.parallel.engine import Engine, build_param_groups, gather_whole, partition
from m3i_large.parallel.remat import rematerialize
from m3i_large.parallel.sharded_ema import ShardedEMA
from m3i_large.parallel.state import JoinedState

MOMENTUM, LR, STEPS = 0.9, 0.05, 4


class Tower(nn.Module):
    """Odd sizes on purpose: no parameter divides evenly over two ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(7, 7), nn.Linear(7, 7)])
        self.norm = nn.LayerNorm(7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.norm(x)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = Tower()
        self.target = copy.deepcopy(self.student).requires_grad_(False)
        self.head = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            wanted = self.target(x)
        seen = self.student(x)
        return {
            "loss": (seen - wanted.detach() - 0.3).square().mean() + self.head(seen).square().mean(),
            "seen": wanted,
        }


def rows(step: int) -> torch.Tensor:
    return torch.randn(12, 7, generator=torch.Generator().manual_seed(step))


def ds_file(directory: Path, *, persistence: int, **more: object) -> Path:
    path = directory / f"zero3_{persistence}_{os.getpid()}.json"  # every rank writes its own: none reads half a file
    path.write_text(
        json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": persistence}, **more})
    )
    return path


def build(rank: Rank, path: Path, *, remat: bool = False) -> tuple[Engine, ShardedEMA]:
    sizes = StepSizes(micro_batch=12 // rank.world, accumulation=1, clip=1.0, bf16=False)
    config = read_ds_config(path, sizes, world=rank.world)
    module = Pair().to(rank.device)
    if remat:
        rematerialize(module.student.blocks)
        for tower in (module.student, module.target):
            gather_whole(tower.blocks[1:])  # the first one's input needs no gradient
    partition(module, config)
    trained = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    groups = build_param_groups(trained, weight_decay=0.1, decays=lambda name, shape: len(shape) > 1)
    engine = Engine(module, optimizer=torch.optim.AdamW(groups, lr=LR), ds_config=config, rank=rank)
    return engine, ShardedEMA(engine, {"target": "student"})


def local_rows(rank: Rank, step: int) -> torch.Tensor:
    return rows(step).chunk(rank.world)[rank.rank].to(rank.device)


def step_once(rank: Rank, engine: Engine, target: ShardedEMA, step: int, *, spoil: bool = False) -> tuple[float, bool]:
    engine.set_lr(LR)
    x = local_rows(rank, step)
    out = engine(torch.full_like(x, float("nan")) if spoil else x)
    engine.backward(out["loss"])
    applied = engine.step(after_update=lambda masters: target.update(masters, MOMENTUM))
    loss = ProcessGroupCollectives(rank).all_reduce_sum(out["loss"]) / rank.world
    return loss.item(), applied


def train_and_save(rank: Rank, directory: Path, persistence: int, remat: bool) -> dict:
    engine, target = build(rank, ds_file(directory, persistence=persistence), remat=remat)
    losses = [step_once(rank, engine, target, s)[0] for s in range(STEPS)]
    state = JoinedState([engine.state(), target])
    manifest = {"applied_steps": engine.applied_steps}
    checkpoint.save(directory / f"w{rank.world}", step=STEPS, state=state, manifest=manifest, rank=rank, keep=2)
    seen = ProcessGroupCollectives(rank).all_gather(engine(local_rows(rank, 99))["seen"])
    tensors = full(rank, state)
    after = [step_once(rank, engine, target, s)[0] for s in range(STEPS, STEPS + 3)]
    return {"losses": losses, "tensors": tensors, "seen": seen, "after": after, "steps": engine.applied_steps}


def resume(rank: Rank, directory: Path, saved: Path, persistence: int) -> dict:
    engine, target = build(rank, ds_file(directory, persistence=persistence))
    point = checkpoint.Checkpoint(saved)
    point.restore(JoinedState([engine.state(), target]))
    engine.restored(applied_steps=point.manifest["applied_steps"])
    seen = ProcessGroupCollectives(rank).all_gather(engine(local_rows(rank, 99))["seen"])
    tensors = full(rank, JoinedState([engine.state(), target]))
    after = [step_once(rank, engine, target, s)[0] for s in range(STEPS, STEPS + 3)]
    return {"seen": seen, "tensors": tensors, "after": after}


def plain_training() -> dict:
    """The same steps in plain torch, one process, whole tensors, a moving average over a state dict."""
    module = Pair()
    trained = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    groups = build_param_groups(trained, weight_decay=0.1, decays=lambda name, shape: len(shape) > 1)
    optimizer = torch.optim.AdamW(groups, lr=LR)
    average = {n: p.detach().clone() for n, p in module.student.named_parameters()}
    losses = []
    for step in range(STEPS):
        loss = module(rows(step))["loss"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for _, p in trained], 1.0)
        optimizer.step()
        for name, parameter in module.student.named_parameters():
            average[name] = MOMENTUM * average[name] + (1 - MOMENTUM) * parameter.detach()
        module.target.load_state_dict(average)
        losses.append(loss.item())
    return {"losses": losses, "average": average, "module": module, "seen": module(rows(99))["seen"]}


@pytest.mark.slow
@pytest.mark.parametrize(("persistence", "remat"), [(0, True), (100_000, False)])
def test_zero3_equals_plain_torch_and_resumes_at_other_world_sizes(
    tmp_path: Path, persistence: int, remat: bool
) -> None:
    expected = plain_training()
    two = run_ranks(2, train_and_save, tmp_path, persistence, remat)
    torch.testing.assert_close(two[0]["losses"], expected["losses"], rtol=1e-4, atol=1e-6)
    tensors = two[0]["tensors"]
    for name, average in expected["average"].items():
        torch.testing.assert_close(tensors[f"ema/target.{name}"], average, rtol=1e-3, atol=1e-5)
    for name, parameter in expected["module"].named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(tensors[f"master/{name}"], parameter.detach(), rtol=1e-3, atol=1e-5)
    # The forward pass must see the average too, also where ZeRO-3 keeps a small parameter resident.
    torch.testing.assert_close(two[0]["seen"], expected["seen"], rtol=1e-3, atol=1e-4)

    saved = tmp_path / "w2" / f"step_{STEPS:08d}"
    point = checkpoint.Checkpoint(saved)
    assert point.manifest["applied_steps"] == STEPS == two[0]["steps"] - 3
    for key, tensor in tensors.items():
        assert torch.equal(point.read_full(key), tensor), key
    same = run_ranks(2, resume, tmp_path, saved, persistence)
    assert same[0]["after"] == two[0]["after"], "resuming must continue bit for bit"
    one = run_ranks(1, resume, tmp_path, saved, persistence)[0]
    for key, tensor in tensors.items():
        assert torch.equal(one["tensors"][key], tensor), key
    torch.testing.assert_close(one["seen"], two[0]["seen"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one["after"], two[0]["after"], rtol=1e-3, atol=1e-6)


def clamp_and_skip(rank: Rank, directory: Path) -> dict:
    engine, target = build(rank, ds_file(directory, persistence=100_000))
    step_once(rank, engine, target, 0)
    engine.clamp("head.bias", -0.01, 0.01)
    clamped = full(rank, engine.state())["master/head.bias"]
    before = full(rank, JoinedState([engine.state(), target]))
    _, applied = step_once(rank, engine, target, 1, spoil=rank.rank == 0)
    after = full(rank, JoinedState([engine.state(), target]))
    _, recovered = step_once(rank, engine, target, 2)
    unchanged = all(torch.equal(before[k], after[k]) for k in before)
    return {"clamped": clamped, "applied": applied, "unchanged": unchanged, "recovered": recovered}


@pytest.mark.slow
def test_a_nan_on_one_rank_changes_nothing_anywhere_and_clamping_reaches_the_master(tmp_path: Path) -> None:
    for result in run_ranks(2, clamp_and_skip, tmp_path):
        assert result["clamped"].abs().max() <= 0.01
        assert (result["applied"], result["unchanged"], result["recovered"]) == (False, True, True)


class Counted(Tower):
    """A tower with a buffer that its forward pass changes while it trains, and one that is in no state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(7))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            self.mean += x.mean(0)
            self.scratch += 1
        return super().forward(x)


def with_buffers(rank: Rank, directory: Path, stage: int) -> tuple[Engine, ShardedEMA]:
    path = directory / f"buffers_{stage}.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    config = read_ds_config(path, StepSizes(micro_batch=12, accumulation=1, clip=1.0, bf16=False), world=rank.world)
    module = Pair()
    module.student = Counted()
    module.target = copy.deepcopy(module.student).requires_grad_(False)
    partition(module.to(rank.device), config)
    trained = [p for p in module.parameters() if p.requires_grad]
    engine = Engine(module, optimizer=torch.optim.AdamW(trained, lr=LR), ds_config=config, rank=rank)
    return engine, ShardedEMA(engine, {"target": "student"})


def follow_buffers(rank: Rank, directory: Path) -> dict:
    found = {}
    for stage in (2, 3):
        engine, target = with_buffers(rank, directory, stage)
        for step in range(2):
            step_once(rank, engine, target, step)
        before = engine.module.target.mean.cpu()
        engine.backward(engine(local_rows(rank, 2) * float("nan"))["loss"])
        assert not engine.step(after_update=lambda masters, target=target: target.update(masters, MOMENTUM))
        root, state = directory / f"buffers_{stage}", training_state(engine, target)
        checkpoint.save(root, step=1, state=state, manifest={"applied_steps": 2}, rank=rank, keep=1)
        other, average = with_buffers(rank, directory, stage)
        restore(checkpoint.Checkpoint(root / "step_00000001"), other, average)
        found[stage] = {
            "target": before,
            "skipped": engine.module.target.mean.cpu(),
            "stored": sorted(key for key in state.layout() if key.startswith("buffer/")),
            "restored": other.module.target.mean.cpu(),
            "student": (engine.module.student.mean.cpu(), other.module.student.mean.cpu()),
            "steps": other.applied_steps,
        }
    return found


@pytest.mark.slow
def test_the_target_takes_over_buffers_and_checkpoints_hold_them(tmp_path: Path) -> None:
    mean = rows(0).mean(0) + rows(1).mean(0)
    for stage, found in run_ranks(1, follow_buffers, tmp_path)[0].items():
        torch.testing.assert_close(found["target"], mean)
        assert torch.equal(found["skipped"], found["target"]), stage
        assert found["stored"] == ["buffer/student.mean", "buffer/target.mean"]
        assert torch.equal(found["restored"], found["target"]) and found["steps"] == 2
        torch.testing.assert_close(*found["student"], rtol=0, atol=0, equal_nan=True)
        assert found["student"][0].isnan().all(), "the student's own saw the NaN: a later step brings it to the target"


def average_of_what_is_not_trained(rank: Rank, directory: Path) -> list[str]:
    said = []
    for name in ("student.norm", "target.norm"):
        module = Pair().to(rank.device)
        module.get_submodule(name).requires_grad_(name.startswith("target"))
        path = directory / "ds.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
        sizes = StepSizes(micro_batch=12, accumulation=1, clip=1.0, bf16=False)
        config = read_ds_config(path, sizes, world=rank.world)
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=LR)
        try:
            ShardedEMA(Engine(module, optimizer=optimizer, ds_config=config, rank=rank), {"target": "student"})
        except ValueError as error:
            said.append(str(error))
    return said


@pytest.mark.slow
def test_an_average_needs_a_trained_source_and_a_frozen_copy(tmp_path: Path) -> None:
    fixed, free = run_ranks(1, average_of_what_is_not_trained, tmp_path)[0]
    assert "sources of an average must be trained, got ['student.norm.weight'" in fixed
    assert "target parameters must not require gradients, got ['target.norm.weight'" in free


def gather_gradients(rank: Rank) -> dict:
    collectives = ProcessGroupCollectives(rank)
    x = torch.arange(6.0).reshape(3, 2).add(10 * rank.rank).requires_grad_()
    weight = torch.arange(12.0).reshape(6, 2) * (rank.rank + 1)
    (collectives.all_gather(x) * weight).sum().backward()
    ids = collectives.all_gather(torch.tensor([rank.rank]))
    return {"grad": x.grad, "ids": ids, "sum": collectives.all_reduce_sum(torch.tensor([1.0 + rank.rank]))}


@pytest.mark.slow
def test_gather_is_ordered_by_rank_and_its_gradient_sums_over_ranks() -> None:
    results = run_ranks(2, gather_gradients)
    total = torch.arange(12.0).reshape(6, 2) * 3
    for i, result in enumerate(results):
        assert torch.equal(result["grad"], total[3 * i : 3 * i + 3])
        assert result["ids"].tolist() == [0, 1] and result["sum"].item() == 3.0

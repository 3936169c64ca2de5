"""Kinds of AdamW: which package is taken, what each keeps, and that all of them train and resume alike."""

import json
from pathlib import Path

import pytest
import torch
from ranks import full, run_ranks
from test_engine import LR, Pair, local_rows

from m3i_large import checkpoint
from m3i_large.errors import UserError
from m3i_large.optim import OptimConfig
from m3i_large.parallel.comm import Rank
from m3i_large.parallel.ds_config import StepSizes, read_ds_config
from m3i_large.parallel.engine import Engine, build_param_groups, partition
from m3i_large.parallel.optimizer import applied_steps, build_optimizer, moments, set_applied_steps

GPU, CPU = torch.device("cuda"), torch.device("cpu")
# NVIDIA's as far as state goes: one count for each parameter group, raised by every call that finds parameters in it.
NVIDIA = """
import torch


class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params, *, lr, betas, eps, weight_decay, adam_w_mode=True):
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            first, second = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                m, v = state["exp_avg"], state["exp_avg_sq"]
                m.copy_(first * m + (1 - first) * p.grad)
                v.copy_(second * v + (1 - second) * p.grad**2)
                unbiased = m / (1 - first ** group["step"]), v / (1 - second ** group["step"])
                p -= group["lr"] * (unbiased[0] / (unbiased[1].sqrt() + group["eps"]) + group["weight_decay"] * p)
"""
# What is on PyPI under this name is a web toolkit that fails at an import of its own.
PYPI = "from pyramid_of_long_ago import sessions\n"
NO_CUDA = "class FusedAdam:\n    def __init__(self, *a, **k):\n        raise RuntimeError('requires cuda extensions')\n"


def package(root: Path, *, init: str, optimizers: str | None) -> Path:
    folder = root / "apex"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(init)
    if optimizers is not None:
        (folder / "optimizers.py").write_text(optimizers)
    return root


def groups() -> list[dict]:
    named = torch.nn.Linear(3, 2).named_parameters()
    return build_param_groups(named, weight_decay=0.1, decays=lambda name, shape: len(shape) > 1)


@pytest.fixture
def forget_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a test have its own package of that name, and no later one."""
    import sys

    for name in ("apex", "apex.optimizers"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(
    ("init", "optimizers", "reason"),
    [
        (None, None, "apex is not installed; needed: NVIDIA Apex built from"),
        (PYPI, None, r"apex/__init__.py is not NVIDIA's \(no FusedAdam\); needed: NVIDIA Apex"),
        ("", None, r"apex/__init__.py is not NVIDIA's"),
        ("", "class Other: ...\n", r"apex/__init__.py is not NVIDIA's"),
        ("", NO_CUDA, r"apex does not work here \(requires cuda extensions\); needed"),
    ],
)
def test_an_apex_that_is_missing_or_another_is_refused_by_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    forget_apex: None,
    init: str | None,
    optimizers: str | None,
    reason: str,
) -> None:
    if init is not None:
        monkeypatch.syspath_prepend(package(tmp_path, init=init, optimizers=optimizers))
    with pytest.raises(UserError, match=reason) as error:
        build_optimizer(groups(), OptimConfig(kind="apex"), device=GPU, offload=False)
    assert "\n" not in str(error.value)


def test_nvidias_apex_gets_the_recipes_settings_and_needs_the_states_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget_apex: None
) -> None:
    monkeypatch.syspath_prepend(package(tmp_path, init="from . import optimizers\n", optimizers=NVIDIA))
    config = OptimConfig(kind="apex", betas=(0.8, 0.7), eps=1e-5)
    optimizer = build_optimizer(groups(), config, device=GPU, offload=False)
    assert type(optimizer).__module__ == "apex.optimizers"
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.defaults["betas"] == (0.8, 0.7) and optimizer.defaults["eps"] == 1e-5
    for device, offload in ((GPU, True), (CPU, False)):
        with pytest.raises(UserError, match="apex needs the optimizer on a GPU; needed here: torch or deepspeed"):
            build_optimizer(groups(), config, device=device, offload=offload)


@pytest.mark.parametrize(("offload", "fused"), [(False, False), (True, True)])
def test_torchs_is_fused_where_the_cpu_updates_offloaded_states(offload: bool, fused: bool) -> None:
    optimizer = build_optimizer(groups(), OptimConfig(), device=CPU, offload=offload)
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"] is fused


@pytest.mark.parametrize("fused", [False, True])
def test_state_made_before_the_first_step_is_what_the_first_step_would_have_made(fused: bool) -> None:
    values = [torch.linspace(-1, 1, 7).requires_grad_() for _ in range(2)]
    made, usual = (torch.optim.AdamW([value], lr=0.1, fused=fused) for value in values)
    assert applied_steps(made) == 0
    for moment in moments(made, values[0]):
        assert moment.shape == (7,) and not moment.any()
    for _ in range(3):
        for value, optimizer in zip(values, (made, usual), strict=True):
            value.grad = value.detach() * 2 + 1
            optimizer.step()
    assert torch.equal(*values)
    assert applied_steps(made) == applied_steps(usual) == 3
    mine, theirs = made.state[values[0]], usual.state[values[1]]
    assert mine.keys() == theirs.keys() and mine["step"].dtype == theirs["step"].dtype
    set_applied_steps(made, 12)
    assert applied_steps(made) == 12


def build(rank: Rank, directory: Path, kind: str, zero: dict) -> Engine:
    path = directory / f"{kind}.json"
    path.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0, **zero}}))
    config = read_ds_config(path, StepSizes(micro_batch=12, accumulation=1, clip=1.0, bf16=False), world=1)
    module = Pair().to(rank.device)
    partition(module, config)
    trained = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    made = build_param_groups(trained, weight_decay=0.1, decays=lambda name, shape: len(shape) > 1)
    device = GPU if kind == "apex" else CPU
    optimizer = build_optimizer(made, OptimConfig(kind=kind), device=device, offload=False)
    return Engine(module, optimizer=optimizer, ds_config=config, rank=rank)


def steps(rank: Rank, engine: Engine, numbers: range) -> None:
    for number in numbers:
        engine.set_lr(LR)
        engine.backward(engine(local_rows(rank, number))["loss"])
        assert engine.step()


def train_and_resume(rank: Rank, directory: Path, kind: str) -> dict:
    """Four steps; the same from a checkpoint after two, and from one that was made before the first."""
    found = {}
    for stage in (1, 3):
        root = directory / f"{kind}_{stage}"
        engine = build(rank, directory, kind, {"stage": stage})
        for number in (0, 2):
            steps(rank, engine, range(max(0, number - 2), number))
            manifest = {"applied_steps": engine.applied_steps}
            checkpoint.save(root, step=number, state=engine.state(), manifest=manifest, rank=rank, keep=9)
        steps(rank, engine, range(2, 4))
        found[stage, "whole"] = full(rank, engine.state()), engine.applied_steps
        for number in (0, 2):
            again = build(rank, directory, kind, {"stage": stage})
            point = checkpoint.Checkpoint(root / f"step_{number:08d}")
            point.restore(again.state())
            again.restored(applied_steps=point.manifest["applied_steps"])
            steps(rank, again, range(number, 4))
            found[stage, number] = full(rank, again.state()), again.applied_steps
    return found


def refused(rank: Rank, directory: Path) -> str:
    try:
        build(rank, directory, "apex", {"stage": 3, "sub_group_size": 60})
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_apex_trains_and_resumes_as_torch_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Before DeepSpeed is imported, as it takes Apex's FusedAdam only if it is there then.
    monkeypatch.syspath_prepend(package(tmp_path / "site", init="from . import optimizers\n", optimizers=NVIDIA))
    apex, torchs = (run_ranks(1, train_and_resume, tmp_path, kind)[0] for kind in ("apex", "torch"))
    for (stage, start), (tensors, count) in apex.items():
        assert count == torchs[stage, start][1] == 4, (stage, start)
        for key, value in torchs[stage, "whole"][0].items():
            torch.testing.assert_close(tensors[key], value, rtol=1e-4, atol=1e-7, msg=f"{stage} {start} {key}")
            assert torch.equal(torchs[stage, start][0][key], value), (stage, start, key)
            assert torch.equal(tensors[key], apex[stage, "whole"][0][key]), (stage, start, key)
    said = run_ranks(1, refused, tmp_path)[0]
    assert "sub_group_size cuts a rank's states into" in said and "one a parameter group" in said

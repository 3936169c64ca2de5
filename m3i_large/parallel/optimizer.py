"""The AdamW that a recipe asks for, torch's, DeepSpeed's or NVIDIA Apex's, and the state that each of them keeps."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from m3i_large.errors import UserError
from m3i_large.optim import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
APEX = "apex"
NEEDED = "needed: NVIDIA Apex built from its repository (github.com/NVIDIA/apex), or optim.kind torch"


def build_optimizer(
    groups: list[dict[str, Any]], config: OptimConfig, *, device: torch.device, offload: bool
) -> torch.optim.Optimizer:
    """AdamW over parameter groups; the learning rate is set from the schedule before every step.

    Args:
        groups: from `build_param_groups`.
        device: where the parameters are.
        offload: whether optimizer states and their update are on the CPU instead.

    Raises:
        UserError: `kind: apex` without a GPU, with offload, or without a working NVIDIA Apex.
    """
    settings: dict[str, Any] = {
        "lr": config.lr.peak,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    on_gpu = device.type != "cpu" and not offload
    if config.kind == "torch":
        # Fused: one pass over weights and moments. On the CPU too where that is all that happens there.
        return torch.optim.AdamW(groups, fused=on_gpu or offload, **settings)
    if config.kind == "deepspeed":
        from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

        if on_gpu:
            return FusedAdam(groups, adam_w_mode=True, **settings)
        return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    if not on_gpu:
        raise UserError("optim.kind: apex needs the optimizer on a GPU; needed here: torch or deepspeed")
    fused_adam = _apex_fused_adam()
    try:
        return fused_adam(groups, adam_w_mode=True, **settings)
    except RuntimeError as error:  # built without its CUDA extensions
        raise UserError(f"optim.kind: apex does not work here ({error}); {NEEDED}") from None


def _apex_fused_adam() -> Any:
    """NVIDIA Apex's FusedAdam. The package `apex` on PyPI is another project; it is recognised and refused."""
    # Without importing it: PyPI's fails at its own imports, which would look like a package that is missing.
    found = find_spec(APEX)
    if found is None:
        raise UserError(f"optim.kind: apex is not installed; {NEEDED}")
    try:
        return import_module(f"{APEX}.optimizers").FusedAdam
    except (ImportError, AttributeError):
        where = found.origin or APEX
        raise UserError(f"optim.kind: the package apex at {where} is not NVIDIA's (no FusedAdam); {NEEDED}") from None


# -- what the kinds keep differently -----------------------------------------------------------------------------------


def has_moments(optimizer: torch.optim.Optimizer, flat: Tensor) -> bool:
    """Whether a parameter's moments exist; they do from the first applied step on, or once `moments` made them."""
    return bool(optimizer.state.get(flat))


def moments(optimizer: torch.optim.Optimizer, flat: Tensor) -> list[Tensor]:
    """A parameter's moments, in the order of MOMENTS, created as the optimizer's first step would."""
    state = optimizer.state[flat]
    if not state:
        if isinstance(optimizer, torch.optim.AdamW):
            fused = optimizer.defaults.get("fused")
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device if fused else "cpu")
        elif not _counts_by_group(optimizer):
            state["step"] = 0
        for key in MOMENTS:
            state[key] = torch.zeros_like(flat.detach())
    return [state[key] for key in MOMENTS]


def applied_steps(optimizer: torch.optim.Optimizer) -> int:
    """How many updates were applied, by the optimizer's own count."""
    counts = [state["step"] for state in optimizer.state.values() if "step" in state]
    counts += [group["step"] for group in optimizer.param_groups if "step" in group]
    return int(counts[0]) if counts else 0


def set_applied_steps(optimizer: torch.optim.Optimizer, count: int) -> None:
    """Sets the count of every parameter whose moments exist, or of every group."""
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"].fill_(count)
        elif "step" in state:
            state["step"] = count
    if _counts_by_group(optimizer):
        for group in optimizer.param_groups:
            group["step"] = count


def check_sub_groups(optimizer: torch.optim.Optimizer, *, num_sub_groups: int) -> None:
    """Refuses sub-groups that the optimizer would take for steps.

    Raises:
        UserError: `kind: apex` with more sub-groups than parameter groups.
    """
    if _counts_by_group(optimizer) and num_sub_groups > len(optimizer.param_groups):
        raise UserError(
            f"--ds: zero_optimization.sub_group_size cuts a rank's states into {num_sub_groups} sub-groups; needed "
            f"with optim.kind apex: {len(optimizer.param_groups)}, one a parameter group, as Apex takes each for a step"
        )


def _counts_by_group(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a parameter group has one count, which every call raises: Apex. Others count for each parameter."""
    return type(optimizer).__module__.partition(".")[0] == APEX

"""The AdamW that a recipe asks for: torch's, DeepSpeed's or NVIDIA Apex's."""

from importlib import import_module
from typing import Any

import torch

from m3i_large.errors import UserError
from m3i_large.optim import OptimConfig


def build_optimizer(
    groups: list[dict[str, Any]], config: OptimConfig, *, device: torch.device, offload: bool
) -> torch.optim.Optimizer:
    """AdamW over parameter groups; the learning rate is set from the schedule before every step.

    Args:
        groups: from `build_param_groups`.
        device: where the parameters are.
        offload: whether optimizer states and their update are on the CPU instead.

    Raises:
        UserError: `kind: apex` without a GPU, with offload, or without NVIDIA's Apex.
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
    return _apex_fused_adam()(groups, adam_w_mode=True, **settings)


def _apex_fused_adam() -> Any:
    """NVIDIA Apex's FusedAdam. The package `apex` on PyPI is another project; it is recognised and refused."""
    needed = "needed: NVIDIA Apex built from its repository (github.com/NVIDIA/apex), or optim.kind torch"
    try:
        apex = import_module("apex")
    except ImportError:
        raise UserError(f"optim.kind: apex is not installed; {needed}") from None
    try:
        return import_module("apex.optimizers").FusedAdam
    except (ImportError, AttributeError):
        where = getattr(apex, "__file__", None) or "apex"
        raise UserError(f"optim.kind: the package apex at {where} is not NVIDIA's (no FusedAdam); {needed}") from None

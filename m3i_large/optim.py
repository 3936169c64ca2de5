"""AdamW over the trainable parameters, with no decay on biases, norms and other one-dimensional tensors."""

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from m3i_large.schedule import LearningRateConfig


class OptimConfig(BaseModel):
    """AdamW and its schedule; the defaults are SiameseIM's published ViT-B recipe, as the paper is silent here."""

    model_config = ConfigDict(extra="forbid")

    lr: LearningRateConfig = LearningRateConfig()
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    clip: float = Field(1.0, gt=0, description="largest global gradient norm")


def decays(name: str, shape: tuple[int, ...]) -> bool:
    """Whether weight decay applies: matrices and kernels yes, anything with a single dimension above 1 no."""
    return sum(size > 1 for size in shape) > 1 and not name.endswith(("pos_embed", "cls_token"))


def build_optimizer(groups: Iterable[dict[str, Any]] | list[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """torch AdamW; the learning rate is set from the schedule before every step."""
    fused = torch.cuda.is_available()
    return torch.optim.AdamW(
        groups, lr=config.lr.peak, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=fused
    )

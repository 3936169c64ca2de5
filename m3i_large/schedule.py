"""Schedules as pure functions of the step: nothing to save, nothing to restore."""

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class LearningRateConfig(BaseModel):
    """Linear warm-up, then cosine decay or a constant."""

    model_config = ConfigDict(extra="forbid")

    peak: float = Field(1e-3, gt=0, description="highest learning rate")
    warmup: float = Field(0.1, ge=0, le=1, description="share of all steps spent warming up")
    final: float = Field(0.0, ge=0, description="learning rate of the last step")
    decay: Literal["cosine", "constant"] = Field(
        "cosine", description="after the warm-up: cosine to `final`, or constant at `peak`"
    )


class MomentumConfig(BaseModel):
    """Momentum of the target's moving average: cosine from `base` to `final` over the run."""

    model_config = ConfigDict(extra="forbid")

    base: float = Field(0.995, ge=0, le=1, description="at the first step")
    final: float = Field(1.0, ge=0, le=1, description="at the last step")


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def learning_rate(step: int, *, steps: int, config: LearningRateConfig) -> float:
    """Learning rate of optimizer step `step` (0-based) in a run of `steps`."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return config.peak * (step + 1) / warmup
    if config.decay == "constant":
        return config.peak
    return _cosine(config.peak, config.final, (step - warmup) / max(1, steps - warmup))


def ema_momentum(step: int, *, steps: int, config: MomentumConfig) -> float:
    """Momentum of the moving average after optimizer step `step` (0-based) in a run of `steps`."""
    return _cosine(config.base, config.final, step / max(1, steps))

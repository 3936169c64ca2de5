"""One micro-step of training: the losses of a micro-batch and its gradients, at once or chunk by chunk."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from torch import Tensor

from m3i_large.data.batch import Batch
from m3i_large.objective import Objective
from m3i_large.objective.cached import chunks, couple, replay, survey
from m3i_large.parallel.engine import Engine
from m3i_large.recipe import Recipe

# Measures phases: with clock("forward"): ...
Clock = Callable[[str], AbstractContextManager[Any]]


class MicroStep(Protocol):
    """Calls the objective through the engine and leaves its gradients there; the engine's step is the caller's."""

    def __call__(self, batch: Batch, *, signals: bool, clock: Clock = nullcontext) -> dict[str, Tensor]:
        """Losses, and with `signals` everything that `Objective.losses` and `gradient_signals` report."""
        ...


class Direct:
    """All rows in one forward and one backward pass."""

    def __init__(self, engine: Engine, *, accumulation: int) -> None:
        self.engine, self.accumulation = engine, accumulation

    def __call__(self, batch: Batch, *, signals: bool, clock: Clock = nullcontext) -> dict[str, Tensor]:
        with clock("forward"):
            losses = self.engine(batch, signals=signals)
        with clock("backward"):
            self.engine.backward(losses["loss"])
            return losses | objective_of(self.engine).gradient_signals(micro_steps=self.accumulation)


class Cached:
    """The same losses and gradients with the activations of `rows` rows at a time (objective/cached.py)."""

    def __init__(self, engine: Engine, *, accumulation: int, rows: int) -> None:
        self.engine, self.accumulation, self.rows = engine, accumulation, rows

    def __call__(self, batch: Batch, *, signals: bool, clock: Clock = nullcontext) -> dict[str, Tensor]:
        objective = objective_of(self.engine)
        with clock("forward"):
            parts, texts = chunks(objective, batch, rows=self.rows)
            seen = [self.engine(part, run=survey) for part in parts]
            given = couple(objective, batch, texts, seen, signals=signals)
        for part, needs in zip(parts, given, strict=True):
            with clock("forward"):
                share = self.engine(part, needs, run=replay)
            with clock("backward"):
                self.engine.backward(share, more=part is not parts[-1])
        return given[0].totals.losses() | objective.gradient_signals(micro_steps=self.accumulation)


def micro_step(engine: Engine, recipe: Recipe, *, rows: int | None) -> MicroStep:
    """How the recipe wants its micro-steps; `rows` from stream.py."""
    accumulation = recipe.train.accumulation
    if rows is None:
        return Direct(engine, accumulation=accumulation)
    return Cached(engine, accumulation=accumulation, rows=rows)


def objective_of(engine: Engine) -> Objective:
    """The engine's root module."""
    assert isinstance(engine.module, Objective)
    return engine.module

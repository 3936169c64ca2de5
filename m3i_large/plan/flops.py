"""FLOPs of a training sample, by part."""

from dataclasses import dataclass

from m3i_large.plan.walk import Walk, walk
from m3i_large.recipe import Recipe


@dataclass(frozen=True)
class Flops:
    """FLOPs per sample and step.

    Attributes:
        forward, backward: by part of the objective (student, target, text, decoder, ..., losses), without what is
            computed twice.
        recomputed: what activation checkpointing computes again.
        surveyed: what contrast cached computes once more: images and texts up to their shared space.
    """

    forward: dict[str, float]
    backward: dict[str, float]
    recomputed: float
    surveyed: float

    @property
    def model(self) -> float:
        """What the training step needs: forward and backward of what is trained, forward of the target."""
        return sum(self.forward.values()) + sum(self.backward.values())

    @property
    def hardware(self) -> float:
        """What the device computes."""
        return self.model + self.recomputed + self.surveyed


def flops_per_sample(recipe: Recipe) -> Flops:
    """Counts one walk over a whole contrast batch on one rank: a few seconds, no memory.

    Rows with a text and with a category follow the sources' nominal sizes or quotas; where a recipe has neither,
    every row counts as having one. Contrast cached is walked with one chunk: their number changes no row's FLOPs.
    """
    rows = recipe.train.contrast_batch
    return flops_of(walk(recipe, rows=rows, world=1, chunk=rows if recipe.train.contrast == "cached" else None))


def flops_of(seen: Walk) -> Flops:
    """What a walk counted, by sample."""
    forward, backward = ({k: n / seen.rows for k, n in c.items()} for c in (seen.forward, seen.backward))
    return Flops(forward, backward, seen.recomputed.total() / seen.rows, seen.surveyed.total() / seen.rows)

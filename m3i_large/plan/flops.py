"""FLOPs of a training sample, by part."""

from dataclasses import dataclass

from m3i_large.plan.walk import walk
from m3i_large.recipe import Recipe


@dataclass(frozen=True)
class Flops:
    """FLOPs per sample and step.

    Attributes:
        forward, backward: by part of the objective (student, target, text, decoder, ..., losses), without what is
            computed twice.
        recomputed: what activation checkpointing computes again.
    """

    forward: dict[str, float]
    backward: dict[str, float]
    recomputed: float

    @property
    def model(self) -> float:
        """What the training step needs: forward and backward of what is trained, forward of the target."""
        return sum(self.forward.values()) + sum(self.backward.values())

    @property
    def hardware(self) -> float:
        """What the device computes."""
        return self.model + self.recomputed


def flops_per_sample(recipe: Recipe) -> Flops:
    """Counts one walk over a whole contrast batch on one rank (1 to 5 seconds, no memory).

    Rows with a text and with a category follow the sources' nominal sizes or quotas; where a recipe has neither,
    every row counts as having one.
    """
    rows = recipe.train.contrast_batch
    plain = walk(recipe, rows=rows, world=1, checkpointing=False)
    again = walk(recipe, rows=rows, world=1) if recipe.train.activation_checkpointing else plain
    return Flops(
        forward={part: flops / rows for part, flops in plain.forward.items()},
        backward={part: flops / rows for part, flops in plain.backward.items()},
        recomputed=(again.flops() - plain.flops()) / rows,
    )

"""Parameters of a recipe's objective: by part, trained or frozen, and one by one."""

from dataclasses import dataclass
from functools import cached_property

from m3i_large.plan.walk import build_on_meta
from m3i_large.recipe import Recipe


@dataclass(frozen=True)
class Table:
    """Every parameter in the order in which it is made.

    Attributes:
        size: elements by name.
        trained: names of those that receive gradients.
        averaged: names of those that the moving average writes.
        buffers: bytes of persistent buffers.
        element: bytes of a weight in the forward pass.
    """

    size: dict[str, int]
    trained: frozenset[str]
    averaged: frozenset[str]
    buffers: int
    element: int

    @cached_property
    def position(self) -> dict[str, int]:
        """Index by name."""
        return {name: i for i, name in enumerate(self.size)}

    @property
    def num(self) -> int:
        """Elements of all."""
        return sum(self.size.values())

    @property
    def num_trained(self) -> int:
        """Elements of those trained."""
        return sum(self.size[name] for name in self.trained)

    @property
    def num_averaged(self) -> int:
        """Elements of those averaged."""
        return sum(self.size[name] for name in self.averaged)

    def by_part(self) -> dict[str, tuple[int, int]]:
        """(trained, frozen) elements of each part of the objective."""
        parts: dict[str, tuple[int, int]] = {}
        for name, size in self.size.items():
            part = name.split(".")[0]
            trained, frozen = parts.get(part, (0, 0))
            parts[part] = (trained + size, frozen) if name in self.trained else (trained, frozen + size)
        return parts


def parameter_table(recipe: Recipe) -> Table:
    """Builds the objective on meta and lists its parameters."""
    objective = build_on_meta(recipe)
    named = dict(objective.named_parameters())
    ema = recipe.objective.encoder == "ema"
    return Table(
        size={name: p.numel() for name, p in named.items()},
        trained=frozenset(name for name, p in named.items() if p.requires_grad),
        averaged=frozenset(n for n in named if ema and n.split(".")[0] in ("target", "target_pool")),
        buffers=sum(b.nbytes for b in objective.state_dict(keep_vars=True).values() if not b.requires_grad)
        - sum(p.nbytes for p in named.values() if not p.requires_grad),
        element=next(iter(named.values())).element_size(),
    )

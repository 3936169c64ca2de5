"""Two usual ways to average a model under ZeRO-3, which `m3i bench ema` sets beside ShardedEMA; not for training.

Both gather the student whole on every rank for each update and write into the gathered target. One keeps the whole
fp32 average on every rank and computes it there; the other, as InternImage's published training, on the first rank.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from m3i_large.parallel.engine import Engine
from m3i_large.parallel.partitions import full_shape


class GatheredEMA:
    """Exponential moving average of whole parameters.

    Args:
        engine: ZeRO-3.
        source: {name of an averaged parameter: name of its source}, both in the engine's module.
        everywhere: every rank keeps and computes the average; otherwise the first one alone.
    """

    def __init__(self, engine: Engine, source: Mapping[str, str], *, everywhere: bool) -> None:
        parameters = dict(engine.module.named_parameters())
        self._pairs = [(parameters[copy], parameters[name]) for copy, name in source.items()]
        keeps = everywhere or engine.rank.is_first
        with _gathered(copy for copy, _ in self._pairs):
            self._average = [copy.detach().float().clone() for copy, _ in self._pairs if keeps]

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """target = momentum * target + (1 - momentum) * student; what the first rank wrote is broadcast."""
        copies, sources = zip(*self._pairs, strict=True)
        with _gathered(sources), _gathered(copies, writer=0):
            # Without an average, on the other ranks of the second design, there is nothing to do but to take part.
            for average, copy, source in zip(self._average, copies, sources, strict=False):
                average.mul_(momentum).add_(source.float(), alpha=1 - momentum)
                copy.copy_(average)

    @property
    def resident_bytes(self) -> int:
        """What this rank holds between updates."""
        return sum(average.numel() * average.element_size() for average in self._average)

    @property
    def gathered_bytes(self) -> int:
        """What this rank holds during an update besides: student and target whole, in their own precision."""
        return sum(p.element_size() * torch.Size(full_shape(p)).numel() for pair in self._pairs for p in pair)


def _gathered(parameters: Any, *, writer: int | None = None) -> Any:
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=writer)


class CountedCollectives(TorchDispatchMode):
    """Counts this thread's collectives, whoever calls them: `calls` by name, and `bytes` of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._opname.strip("_")
            self.calls[name] = self.calls.get(name, 0) + 1
            results = [leaf for leaf in tree_leaves(args[0]) if isinstance(leaf, Tensor)]
            self.bytes += sum(result.numel() * result.element_size() for result in results)
        return func(*args, **(kwargs or {}))

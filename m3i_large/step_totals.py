"""A step's losses and signals, averaged over micro-steps and ranks."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from m3i_large.objective.totals import ROWS
from m3i_large.parallel.comm import ProcessGroupCollectives, Rank


class StepTotals:
    """Losses and signals of one step, averaged over micro-steps and ranks."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, losses: dict[str, Tensor]) -> None:
        """Takes one micro-step's output of the objective."""
        for key, value in losses.items():
            if key.startswith(ROWS):
                continue
            self._values[key].append(value.detach().double())

    def row(self, rank: Rank, sources: Iterable[str]) -> dict[str, float]:
        """The step's metrics: scalars as means, per-source losses from their sums and counts."""
        keys = sorted(self._values)
        means = [
            torch.stack(self._values[k]).sum(0) if k.startswith("source/") else torch.stack(self._values[k]).mean(0)
            for k in keys
        ]
        flat = ProcessGroupCollectives(rank).all_reduce_sum(torch.cat([m.flatten() for m in means])).cpu()
        row: dict[str, float] = {}
        for key, mean, total in zip(keys, means, flat.split([m.numel() for m in means]), strict=True):
            if not key.startswith("source/"):
                row[key] = total.item() / rank.world
                continue
            for name, (loss, count) in zip(sources, total.reshape(mean.shape).tolist(), strict=True):
                if count:
                    row[f"loss/{key.removeprefix('source/')}/{name}"] = loss / count
        return row

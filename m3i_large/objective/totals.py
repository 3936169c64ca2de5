"""The loss of a micro-batch and what is logged of it, added up over its rows.

Every loss is a mean over all valid rows of all ranks. A rank adds up world * (its rows) / (global count), so that the
mean over ranks, which ZeRO takes of the gradients, is the global mean.
"""

import torch
from torch import Tensor

from m3i_large.data.batch import Batch
from m3i_large.objective.collectives import Collectives
from m3i_large.objective.config import ObjectiveConfig
from m3i_large.objective.signals import Spread
from m3i_large.objective.terms import Rows, valid_rows

ROWS = "rows/"  # in front of a term's name: the losses of this rank's rows


class Totals:
    """Sums over the rows of one micro-batch, whether they come at once or in chunks.

    Args:
        batch: the whole micro-batch of this rank; every rank makes its totals at the same time.
        num_sources: sources of the recipe, for per-source losses.
        signals: whether spreads and cosines are wanted.
    """

    def __init__(
        self, config: ObjectiveConfig, batch: Batch, *, collectives: Collectives, num_sources: int, signals: bool
    ) -> None:
        self.collectives = collectives
        self._num_sources = num_sources
        self._terms = {term.name: term for term in config.terms}
        local = torch.stack([valid_rows(term, batch).sum() for term in config.terms]).float()
        counts = collectives.all_reduce_sum(local).clamp_min(1)
        self._counts = dict(zip(self._terms, counts, strict=True))
        self._sums: dict[str, Tensor] = {}
        self._metrics: dict[str, Tensor] = {}
        self._rows: dict[str, list[Tensor]] = {}
        self._spread = Spread() if signals else None

    def add(self, batch: Batch, rows: dict[str, Rows]) -> Tensor:
        """Takes the rows of some terms and returns their share of the weighted loss, with graph.

        Args:
            batch: where the rows come from, all of the micro-batch or a chunk of it.
        """
        share = torch.zeros((), device=batch.box_NV4.device)
        for name, row in rows.items():
            valid_N = valid_rows(self._terms[name], batch)
            loss_N = torch.where(valid_N, row.loss_N, torch.zeros_like(row.loss_N))
            loss = self.collectives.world * loss_N.sum() / self._counts[name]
            share = share + self._terms[name].weight * loss
            pairs = torch.stack([loss_N.detach(), valid_N.float()], dim=-1)
            self._add(f"loss/{name}", loss.detach())
            self._rows.setdefault(f"{ROWS}{name}", []).append(pairs[:, 0].masked_fill(~valid_N, torch.nan))
            self._add(f"source/{name}", pairs.new_zeros(self._num_sources, 2).index_add_(0, batch.source_N, pairs))
            self._metrics |= row.metrics
            if self._spread is not None:
                self._spread.add(name, row)
        self._add("loss", share.detach())
        return share

    def losses(self) -> dict[str, Tensor]:
        """Keyed as in metrics.jsonl: "loss", "loss/<term>", "source/<term>", the terms' own metrics and the spreads;
        beside them "rows/<term>" (N,), the losses of this rank's rows, NaN where a row has none.

        Once every row was added; every rank calls it.
        """
        spread = {} if self._spread is None else self._spread.collect(self.collectives)
        rows = {name: torch.cat(parts) for name, parts in self._rows.items()}
        return self._sums | self._metrics | spread | rows

    def _add(self, key: str, value: Tensor) -> None:
        self._sums[key] = self._sums[key] + value if key in self._sums else value

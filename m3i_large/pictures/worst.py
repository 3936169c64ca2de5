"""The training samples that a network finds hardest: where something is wrong with the data, it shows here."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from m3i_large.data.batch import Batch
from m3i_large.data.sources import Source
from m3i_large.data.tokenizer import Tokenizer
from m3i_large.objective.totals import ROWS
from m3i_large.parallel.comm import Rank, gather_objects, gather_on_first
from m3i_large.pictures.inputs import described
from m3i_large.pictures.sheet import Cell, Sheet, Strip, decoded, webp

KEPT = 8
LEAST_ROWS = 8  # of fewer valid rows in a batch a standard deviation says little


@dataclass(order=True)
class _Sample:
    key: tuple[float, int, int, int, int]  # excess; step, micro-step, rank and row
    note: str = field(compare=False)
    picture: bytes = field(compare=False)  # WebP: ranks send each other these


class Worst:
    """Keeps, for each term, the rows whose loss was furthest above their micro-batch's, in standard deviations.

    The loss itself falls while training goes on, so that the first steps would have all of the largest.

    Args:
        sources: to find a sample's name.
        rank: every rank keeps its own rows; the sheet is of all of them.
    """

    def __init__(self, sources: Sequence[Source], tokenizer: Tokenizer, rank: Rank) -> None:
        self._sources, self._tokenizer, self._rank = sources, tokenizer, rank
        self._kept: dict[str, list[_Sample]] = {}
        self._since = -1

    def add(self, batch: Batch, losses: Mapping[str, Tensor]) -> None:
        """Takes the row losses of a micro-batch, `rows/<term>` (N,), NaN where a row has none."""
        names = [name for name in losses if name.startswith(ROWS)]
        if not names:
            return
        self._since = batch.step if self._since < 0 else self._since
        all_rows = torch.stack([losses[name].float() for name in names]).cpu().numpy()
        for name, loss_N in zip(names, all_rows, strict=True):
            valid = loss_N[np.isfinite(loss_N)]
            if len(valid) < LEAST_ROWS or valid.std() == 0:
                continue
            excess_N = np.nan_to_num((loss_N - valid.mean()) / valid.std(), nan=-np.inf, posinf=-np.inf)
            kept = self._kept.setdefault(name.removeprefix(ROWS), [])
            for row in np.argsort(-excess_N)[:KEPT].tolist():
                if len(kept) == KEPT and excess_N[row] <= kept[0].key[0]:
                    break
                sample = self._sample(batch, row, float(excess_N[row]), float(loss_N[row]))
                (heapq.heappushpop if len(kept) == KEPT else heapq.heappush)(kept, sample)

    def sheet(self) -> Sheet | None:
        """The worst of all ranks since the last sheet, which are then forgotten; None where there are none, and on all
        ranks but the first. Every rank calls it."""
        kept, since = self._of_all_ranks(), self._since
        self._kept, self._since = {}, -1
        if not kept or not self._rank.is_first:
            return None
        strips = [
            Strip(name, tuple(Cell(decoded(sample.picture), sample.note) for sample in samples))
            for name, samples in kept.items()
        ]
        about = (
            f"The samples since step {since} whose loss was furthest above the mean of their micro-batch on one rank, "
            "in its standard deviations (sd), for each term: wrong texts and classes, broken and empty pictures gather "
            "here."
        )
        return Sheet("worst", "Worst losses", about, tuple(strips))

    def _of_all_ranks(self) -> dict[str, list[_Sample]]:
        """The worst first, by term. Ranks tell each other how bad theirs are, and send no more than what is shown."""
        told = gather_objects({name: [s.key for s in kept] for name, kept in self._kept.items()}, self._rank)
        shown = {name: heapq.nlargest(KEPT, chain(*(keys.get(name, []) for keys in told))) for name in chain(*told)}
        sent = {name: [s for s in kept if s.key in shown[name]] for name, kept in self._kept.items()}
        found = gather_on_first(sent, self._rank)
        return {name: sorted(chain(*(kept.get(name, []) for kept in found)), reverse=True) for name in shown}

    def _sample(self, batch: Batch, row: int, excess: float, loss: float) -> _Sample:
        source, number = self._sources[int(batch.source_N[row])], int(batch.id_N[row])
        place, index_row = source.locate(number)
        name = source.index(place)[0].key(index_row)
        replaced = int(batch.substitute_N[row])
        where = f"{name} in {source.shards[place].name}" + (f", its substitute {replaced}" if replaced else "")
        what = described(batch, row, self._tokenizer)
        note = f"loss {loss:.3g}, +{excess:.1f} sd; {what}; {where}; step {batch.step}"
        key = (excess, batch.step, batch.micro_step, self._rank.rank, row)
        return _Sample(key, note, webp(batch.target_NHWC[row].cpu().numpy()))

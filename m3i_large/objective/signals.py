"""What tells a healthy run from a collapsing one, computed now and then (METHOD section 2, "Scale").

All values are of the whole contrast batch, the same on every rank.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from m3i_large.objective.collectives import Collectives
from m3i_large.objective.config import ObjectiveConfig
from m3i_large.objective.posterior import effective_rank, second_moment
from m3i_large.objective.terms import Rows

# A target of less spread than this tells images no longer apart: an encoder starts with a rank of 4 and more, and
# with channels of standard deviation 0.5 and more.
LEAST_RANK, LEAST_STD = 1.5, 0.02


def collapsed(row: Mapping[str, float], config: ObjectiveConfig) -> list[str]:
    """Terms whose target, made by an encoder that is being trained, has collapsed according to a row of metrics."""
    found = []
    for term in config.terms:
        rank, std = (row.get(f"collapse/{term.name}/{kind}") for kind in ("rank", "std"))
        if term.encoder not in ("ema", "shared") or rank is None or std is None:
            continue
        if not (rank >= LEAST_RANK and std >= LEAST_STD):  # so that NaN counts
            found.append(term.name)
    return found


class Spread:
    """Standard deviation over rows and tokens (mean over channels) and effective rank of the terms' targets and
    predictions; mean cosine of positives and of negatives where pairs are contrasted."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, ...]] = {}  # the last of each is a count

    @torch.no_grad()
    def add(self, name: str, rows: Rows) -> None:
        """Takes some rows of a term."""
        for prefix, value in (("", rows.target), ("prediction_", rows.predicted)):
            if value is not None:
                flat_nLD = (value if value.dim() == 3 else value[:, None]).float()
                count = flat_nLD.new_tensor(flat_nLD.shape[0] * flat_nLD.shape[1])
                self._take(f"collapse/{name}/{prefix}", second_moment(flat_nLD), flat_nLD.sum((0, 1)), count)
        if rows.cosines is not None:
            cosine_nM, *pairs = rows.cosines
            for kind, chosen_nM in zip(("positive", "negative"), pairs, strict=True):
                self._take(f"cosine/{name}/{kind}", (cosine_nM * chosen_nM).sum(), chosen_nM.sum().float())

    def _take(self, key: str, *sums: Tensor) -> None:
        held = self._sums.get(key)
        self._sums[key] = sums if held is None else tuple(a + b for a, b in zip(held, sums, strict=True))

    @torch.no_grad()
    def collect(self, collectives: Collectives) -> dict[str, Tensor]:
        """Keyed "collapse/<term>/{std, rank, prediction_std, prediction_rank}", "cosine/<term>/{positive, negative}",
        over the rows of all ranks."""
        out: dict[str, Tensor] = {}
        for key, sums in self._sums.items():
            *totals, count = (collectives.all_reduce_sum(value) for value in sums)
            first, *more = (total / count.clamp_min(1) for total in totals)
            if not more:
                out[key] = first
                continue
            covariance_DD = first - torch.outer(more[0], more[0])
            out[f"{key}std"] = covariance_DD.diagonal().clamp_min(0).sqrt().mean()
            out[f"{key}rank"] = effective_rank(covariance_DD)
        return out


class GradientNorms:
    """Norm of each weighted term's gradient by the student's tokens, taken on the way through the backward pass.

    Terms are compared where their gradients meet: 20 times smaller here is 20 times less say in the encoder. Each term
    reads its own alias of the tokens, and a hook on the alias sees what flows back through that term alone. (A second
    backward pass for each term would find ZeRO-3's parameters already released.)
    """

    def __init__(self) -> None:
        self._squares: dict[str, Tensor] = {}

    def tap(self, name: str, token: Tensor) -> Tensor:
        """An alias of the tokens whose gradient is the term's."""
        if not token.requires_grad:
            return token
        self._squares.setdefault(name, token.new_zeros((), dtype=torch.float32))
        squares = self._squares

        def note(grad: Tensor) -> None:
            squares[name] += grad.float().square().sum()

        alias = token.view_as(token)
        alias.register_hook(note)
        return alias

    def collect(self, names: list[str], *, collectives: Collectives, scale: float) -> dict[str, Tensor]:
        """`gradient/<term>` over the tokens of all ranks, under the mean over ranks; call it after the backward pass.

        `scale` undoes what the backward pass was divided by (the number of micro-steps).
        """
        taken, self._squares = self._squares, {}
        names = [name for name in names if name in taken]
        if not names:
            return {}
        norms = collectives.all_reduce_sum(torch.stack([taken[n] for n in names])).sqrt() * scale / collectives.world
        return {f"gradient/{name}": norm for name, norm in zip(names, norms, strict=True)}

"""The terms: row losses of every kind of target (METHOD section 2).

Legend: n selected rows, N local rows, M rows of all ranks, L tokens, D width, E pooled width, F shared image-text
width, P pixels of a patch side, T text tokens.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m3i_large.data.batch import Batch
from m3i_large.objective.collectives import Collectives
from m3i_large.objective.config import TermConfig
from m3i_large.objective.posterior import boltzmann, gaussian


@dataclass(frozen=True)
class Rows:
    """A term's losses before averaging.

    Attributes:
        loss_N: one per local row; where not valid_N it counts for nothing.
        valid_N: bool.
        predicted, target: (..., D) of image features, for the collapse signals.
        cosines: (cosine_nM, positive_nM, negative_nM) of contrasted pairs, for the signals.
        metrics: scalars to log as they are.
    """

    loss_N: Tensor
    valid_N: Tensor
    predicted: Tensor | None = None
    target: Tensor | None = None
    cosines: tuple[Tensor, Tensor, Tensor] | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)


def pixel_targets(image_NCHW: Tensor, *, patch: int) -> Tensor:
    """The identity encoder: every patch's normalised pixels, row-major -> (N, L, P * P * C), float32."""
    cells = image_NCHW.float().unfold(2, patch, patch).unfold(3, patch, patch)  # N C G G P P
    return cells.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


def dense_rows(term: TermConfig, predicted_NLD: Tensor, target_NLD: Tensor, moment_DD: Tensor | None) -> Rows:
    """A regression at every patch, pixels or features."""
    target = target_NLD
    if term.normalize_pixels:
        target = F.layer_norm(target, target.shape[-1:], eps=1e-6)
    loss_N = gaussian(
        predicted_NLD,
        target,
        moment_DD=moment_DD if term.decorrelation else None,
        strength=term.decorrelation or 0.0,
        sigma=term.posterior.sigma,
    )
    return Rows(loss_N, _all(loss_N), predicted_NLD, target)


def global_rows(term: TermConfig, predicted_NE: Tensor, target_NE: Tensor, collectives: Collectives) -> Rows:
    """One feature per image: a regression on its LayerNorm, or a choice among the images of the batch."""
    if term.posterior.kind == "gaussian":
        target = F.layer_norm(target_NE.float(), target_NE.shape[-1:])
        loss_N = gaussian(
            predicted_NE[:, None], target[:, None], moment_DD=None, strength=0.0, sigma=term.posterior.sigma
        )
        return Rows(loss_N, _all(loss_N), predicted_NE, target)
    p, t = (F.normalize(x.float(), dim=-1) for x in (predicted_NE, target_NE))
    world = term.posterior.negatives == "global"
    candidates = collectives.all_gather(t) if world else t
    label_N = torch.arange(len(p), device=p.device) + (collectives.rank * len(p) if world else 0)
    cosine_NM = p @ candidates.T
    assert term.posterior.tau is not None, "checked with the recipe"
    loss_N = boltzmann(cosine_NM / term.posterior.tau, label_N)
    right_NM = F.one_hot(label_N, len(candidates)).bool()
    return Rows(loss_N, _all(loss_N), predicted_NE, target_NE, (cosine_NM.detach(), right_NM, ~right_NM))


def category_rows(term: TermConfig, batch: Batch, pooled: list[Tensor], head: Any) -> Rows:
    """Cross-entropy over the classifier's rows for images with a label, summed over readings."""
    valid_N = batch.category_N >= 0
    index_n, real_n = _select(valid_N, batch.category_rows)
    label_n = batch.category_N[index_n].clamp_min(0)
    logit = head(torch.cat([p[index_n] for p in pooled])) / term.posterior.tau
    loss_n = torch.stack([boltzmann(part, label_n) for part in logit.chunk(len(pooled))]).sum(0)
    return Rows(_scatter(loss_n, index_n, real_n, len(batch)), valid_N)


def text_rows(
    term: TermConfig, batch: Batch, pooled: list[Tensor], tower: Any, head: Any, collectives: Collectives
) -> Rows:
    """CLIP, symmetric, once for every reading: separate N x N losses, summed."""
    index_n, real_n = _select(batch.text_valid_N, batch.text_rows)
    token_nT = batch.text_NT[index_n]
    images, text_nF, scale = head(torch.cat([p[index_n] for p in pooled]), tower(token_nT))
    text_nF, scale = F.normalize(text_nF.float(), dim=-1), scale.float()
    world = term.posterior.negatives == "global"

    def gather(x: Tensor) -> Tensor:
        return collectives.all_gather(x) if world else x

    all_text, all_token, all_real = gather(text_nF), gather(token_nT), gather(real_n)
    label_n = torch.arange(len(index_n), device=index_n.device) + (collectives.rank * len(index_n) if world else 0)
    # Equal captions are no negatives of each other; padded rows are nobody's.
    same_nM = (token_nT[:, None] == all_token[None]).all(-1)
    other_nM = all_real[None] & ~same_nM
    allowed_nM = other_nM.scatter(1, label_n[:, None], True)
    loss_n = torch.zeros_like(text_nF[:, 0])
    for image_nF in F.normalize(images.float(), dim=-1).chunk(len(pooled)):
        cosine_nM = image_nF @ all_text.T
        to_text = boltzmann(scale * cosine_nM, label_n, allowed_nM=allowed_nM)
        to_image = boltzmann(scale * text_nF @ gather(image_nF).T, label_n, allowed_nM=allowed_nM)
        loss_n = loss_n + (to_text + to_image) / 2
    own_nM = (allowed_nM & ~other_nM) & real_n[:, None]
    return Rows(
        _scatter(loss_n, index_n, real_n, len(batch)),
        batch.text_valid_N,
        cosines=(cosine_nM.detach(), own_nM, other_nM & real_n[:, None]),
        metrics={"optim/temperature": (1 / scale).detach().squeeze()},
    )


def _all(loss_N: Tensor) -> Tensor:
    return torch.ones_like(loss_N, dtype=torch.bool)


def _select(valid_N: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Indices of the valid rows, padded with others to a fixed number, and which of them are real."""
    index = torch.argsort(valid_N.logical_not().to(torch.int8), stable=True)[:rows]
    return index, valid_N[index]


def _scatter(loss_n: Tensor, index_n: Tensor, real_n: Tensor, num_rows: int) -> Tensor:
    """Row losses back at their rows; padded ones add nothing (their graph stays, so every rank runs the same)."""
    kept = torch.where(real_n, loss_n, torch.zeros_like(loss_n))
    return kept.new_zeros(num_rows).index_add(0, index_n, kept)

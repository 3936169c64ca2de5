"""The terms: row losses of every kind of target (METHOD section 2).

Legend: n selected rows, N local rows, M rows of all ranks, R readings, L tokens, D width, E pooled width, F shared
image-text width, P pixels of a patch side, T text tokens.
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
        loss_N: one per local row; where the row is not valid for the term (`valid_rows`) it counts for nothing.
        predicted, target: (..., D) of image features, for the collapse signals.
        cosines: (cosine_nM, positive_nM, negative_nM) of contrasted pairs, for the signals.
        metrics: scalars to log as they are.
    """

    loss_N: Tensor
    predicted: Tensor | None = None
    target: Tensor | None = None
    cosines: tuple[Tensor, Tensor, Tensor] | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Texts:
    """The texts of a micro-batch, padded to a number that is the same on every rank.

    Attributes:
        index_n: their rows.
        real_n: bool, false for padding.
        token_nT: int64.
    """

    index_n: Tensor
    real_n: Tensor
    token_nT: Tensor


@dataclass(frozen=True)
class Vectors:
    """Images and texts in their shared space, not normalised, and the scale 1 / tau between them.

    Attributes:
        image_RNF: of every row, by every reading.
        text_nF: of `Texts`.
        scale: (1,).
    """

    image_RNF: Tensor
    text_nF: Tensor
    scale: Tensor


def valid_rows(term: TermConfig, batch: Batch) -> Tensor:
    """Which rows have what the term predicts -> (N,) bool."""
    if term.target == "category":
        return batch.category_N >= 0
    if term.target == "text":
        return batch.text_valid_N
    return torch.ones_like(batch.text_valid_N)


def select_texts(batch: Batch, *, chunks: int = 1) -> Texts:
    """The batch's texts, in the order of its rows; as many as `chunks` divides."""
    index_n, real_n = _select(batch.text_valid_N, -(-batch.text_rows // chunks) * chunks)
    return Texts(index_n, real_n, batch.text_NT[index_n])


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
    return Rows(loss_N, predicted_NLD, target)


def global_rows(
    term: TermConfig, predicted_NE: Tensor, target_NE: Tensor, candidate_ME: Tensor | None, *, first: int
) -> Rows:
    """One feature per image: a regression on its LayerNorm, or a choice among unit vectors of which row n's own is
    candidate first + n."""
    if term.posterior.kind == "gaussian":
        target = F.layer_norm(target_NE.float(), target_NE.shape[-1:])
        loss_N = gaussian(
            predicted_NE[:, None], target[:, None], moment_DD=None, strength=0.0, sigma=term.posterior.sigma
        )
        return Rows(loss_N, predicted_NE, target)
    assert candidate_ME is not None and term.posterior.tau is not None, "checked with the recipe"
    cosine_NM = F.normalize(predicted_NE.float(), dim=-1) @ candidate_ME.T
    label_N = torch.arange(len(cosine_NM), device=cosine_NM.device) + first
    loss_N = boltzmann(cosine_NM / term.posterior.tau, label_N)
    right_NM = F.one_hot(label_N, len(candidate_ME)).bool()
    return Rows(loss_N, predicted_NE, target_NE, (cosine_NM.detach(), right_NM, ~right_NM))


def category_rows(term: TermConfig, batch: Batch, pooled: list[Tensor], head: Any) -> Rows:
    """Cross-entropy over the classifier's rows for images with a label, summed over readings."""
    index_n, real_n = _select(valid_rows(term, batch), batch.category_rows)
    label_n = batch.category_N[index_n].clamp_min(0)
    logit = head(torch.cat([p[index_n] for p in pooled])) / term.posterior.tau
    loss_n = torch.stack([boltzmann(part, label_n) for part in logit.chunk(len(pooled))]).sum(0)
    return Rows(_scatter(loss_n, index_n, real_n, len(batch)))


def text_vectors(pooled: list[Tensor], token_nT: Tensor, tower: Any, head: Any) -> Vectors:
    """Images, by every reading, and texts in their shared space."""
    image, text_nF, scale = head(torch.cat(pooled), tower(token_nT))
    return Vectors(image.unflatten(0, (len(pooled), -1)), text_nF, scale)


def text_rows(term: TermConfig, texts: Texts, vectors: Vectors, collectives: Collectives) -> Rows:
    """CLIP, symmetric, once for every reading: separate N x N losses, summed."""
    index_n, real_n, token_nT = texts.index_n, texts.real_n, texts.token_nT
    text_nF, scale = F.normalize(vectors.text_nF.float(), dim=-1), vectors.scale.float()
    world = term.posterior.negatives == "global"

    def gather(x: Tensor) -> Tensor:
        return collectives.all_gather(x) if world else x

    all_text, all_token, all_real = gather(text_nF), gather(token_nT), gather(real_n)
    label_n = torch.arange(len(index_n), device=index_n.device) + (collectives.rank * len(index_n) if world else 0)
    # Equal captions are no negatives of each other; padded rows are nobody's.
    same_nM = _equal_rows(token_nT, all_token)
    other_nM = all_real[None] & ~same_nM
    allowed_nM = other_nM.scatter(1, label_n[:, None], True)
    loss_n = torch.zeros_like(text_nF[:, 0])
    for image_NF in vectors.image_RNF:
        image_nF = F.normalize(image_NF[index_n].float(), dim=-1)
        cosine_nM = image_nF @ all_text.T
        to_text = boltzmann(scale * cosine_nM, label_n, allowed_nM=allowed_nM)
        to_image = boltzmann(scale * text_nF @ gather(image_nF).T, label_n, allowed_nM=allowed_nM)
        loss_n = loss_n + (to_text + to_image) / 2
    own_nM = (allowed_nM & ~other_nM) & real_n[:, None]
    return Rows(
        _scatter(loss_n, index_n, real_n, vectors.image_RNF.shape[1]),
        cosines=(cosine_nM.detach(), own_nM, other_nM & real_n[:, None]),
        metrics={"optim/temperature": (1 / scale).detach().squeeze()},
    )


def _select(valid_N: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Indices of the valid rows, padded with others to a fixed number, and which of them are real."""
    index = torch.argsort(valid_N.logical_not().to(torch.int8), stable=True)[:rows]
    return index, valid_N[index]


def _equal_rows(a_nT: Tensor, b_MT: Tensor) -> Tensor:
    """Which rows are equal -> (n, M) bool; column by column, as n * M * T booleans can be gigabytes."""
    same_nM = torch.ones(len(a_nT), len(b_MT), dtype=torch.bool, device=a_nT.device)
    for a_n, b_M in zip(a_nT.T, b_MT.T, strict=True):
        same_nM &= a_n[:, None] == b_M
    return same_nM


def _scatter(loss_n: Tensor, index_n: Tensor, real_n: Tensor, num_rows: int) -> Tensor:
    """Row losses back at their rows; padded ones add nothing (their graph stays, so every rank runs the same)."""
    kept = torch.where(real_n, loss_n, torch.zeros_like(loss_n))
    return kept.new_zeros(num_rows).index_add(0, index_n, kept)

"""What the rows of a contrast batch need of each other, so that the towers may see them in any number of chunks.

Legend: N local rows, n texts, R readings of an image, M rows of all ranks, L tokens, D width, E pooled width, F shared
image-text width, T text tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from m3i_large.data.batch import Batch
from m3i_large.objective.collectives import Collectives
from m3i_large.objective.config import ObjectiveConfig
from m3i_large.objective.posterior import second_moment
from m3i_large.objective.terms import Texts


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Consecutive rows of a rank's micro-batch, the whole of it included, that pass through the towers together.

    Attributes:
        batch: the rows; their partners are among them.
        begin: number of the first one in the micro-batch.
        token_nT: the texts that pass through the text tower meanwhile, not necessarily those of these rows; None where
            no term needs any.
    """

    batch: Batch
    begin: int
    token_nT: Tensor | None


def cut(batch: Batch, texts: Texts | None, *, rows: int) -> list[Chunk]:
    """The micro-batch in chunks of `rows`, which must divide it; every chunk has equally many texts."""
    begins = range(0, len(batch), rows)
    token = [None] * len(begins) if texts is None else texts.token_nT.chunk(len(begins))
    return [
        Chunk(batch=batch.rows(begin, begin + rows), begin=begin, token_nT=part)
        for begin, part in zip(begins, token, strict=True)
    ]


@dataclass(frozen=True)
class Targets:
    """What is predicted of image features, no gradient flows into it; None where no term needs it.

    Attributes:
        feature_NLD: tokens of the target views.
        pooled_NE: their pooled vectors.
        moment_DD: sum of t t^T over these rows' normalised tokens t.
    """

    feature_NLD: Tensor | None = None
    pooled_NE: Tensor | None = None
    moment_DD: Tensor | None = None


def normalized(feature_NLD: Tensor) -> Tensor:
    """Features as targets: LayerNorm without affine, float32."""
    return F.layer_norm(feature_NLD.float(), feature_NLD.shape[-1:])


def token_moment(config: ObjectiveConfig, feature_NLD: Tensor | None) -> Tensor | None:
    """Sum of t t^T over these rows, where a term's decorrelation asks for it."""
    if feature_NLD is None or not any(term.decorrelation for term in config.terms):
        return None
    return second_moment(normalized(feature_NLD))


@dataclass(frozen=True)
class Shared:
    """What every row needs of all of them, without a gradient; None where no term needs it.

    Attributes:
        moment_DD: mean of t t^T over all target tokens of all ranks.
        candidate_ME: unit target vectors that a global feature is told from, and the place of this rank's first one.
    """

    moment_DD: Tensor | None = None
    candidate_ME: Tensor | None = None
    first: int = 0


def share(config: ObjectiveConfig, targets: Sequence[Targets], *, num_tokens: int, collectives: Collectives) -> Shared:
    """Brings together the targets of a micro-batch's chunks and of all ranks.

    Args:
        num_tokens: of all target views of this rank.
    """
    moment, candidates, first = None, None, 0
    moments = [t.moment_DD for t in targets if t.moment_DD is not None]
    if moments:
        moment = collectives.all_reduce_sum(torch.stack(moments).sum(0)) / (num_tokens * collectives.world)
    term = next((t for t in config.terms if t.target == "global" and t.posterior.kind == "boltzmann"), None)
    pooled = [t.pooled_NE for t in targets if t.pooled_NE is not None]
    if term is not None:
        candidates = F.normalize(torch.cat(pooled).float(), dim=-1)
        if term.posterior.negatives == "global":
            first = collectives.rank * len(candidates)
            candidates = collectives.all_gather(candidates)
    return Shared(moment, candidates, first)

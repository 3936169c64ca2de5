"""A contrast batch larger than memory: the gradient of one micro-batch, chunk by chunk (Gao et al. 2021, "Scaling Deep
Contrastive Learning Batch Size under Memory Limited Setup", section 3.2).

Rows need each other in few places only: texts and images as each other's negatives, the candidates of a global feature,
the second moment of the targets, and the number of valid rows. So every chunk goes through the towers twice: `survey`
keeps no graph and brings home those vectors; `couple` takes the loss between them and its gradient by them; `replay`
computes the chunk again, with a graph, and adds to its rows' own losses <vector, gradient>, whose gradient is that of
the whole. No term is approximated: what a chunk's graph does not hold is constant in it.

The chunks are as many and as large on every rank, and `replay` runs every module in each of them, as ZeRO-3 needs it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from m3i_large.data.batch import Batch
from m3i_large.objective.coupling import Chunk, Shared, Targets, cut
from m3i_large.objective.terms import Texts, Vectors, select_texts, text_rows
from m3i_large.objective.totals import Totals

if TYPE_CHECKING:
    from m3i_large.objective.objective import Objective


class Seen(NamedTuple):
    """What `survey` brings home of a chunk; a tuple, because DeepSpeed looks into what a root module returns."""

    targets: Targets
    vectors: Vectors | None


@dataclass(frozen=True)
class Given:
    """What `replay` is given of the others.

    Attributes:
        slope: the loss's gradient by the chunk's vectors; None where there is no text term.
        totals: of the micro-batch; the chunk adds its rows.
    """

    targets: Targets
    shared: Shared
    slope: Vectors | None
    totals: Totals


def chunks(objective: "Objective", batch: Batch, *, rows: int) -> tuple[list[Chunk], Texts | None]:
    """A micro-batch in chunks of `rows`, and its texts."""
    texts = select_texts(batch, chunks=len(batch) // rows) if objective.config.has("text") else None
    return cut(batch, texts, rows=rows), texts


@torch.no_grad()
def survey(objective: "Objective", chunk: Chunk) -> Seen:
    """First pass of a chunk, without a graph."""
    image, own = objective._images(chunk.batch)
    vectors = objective.vectors(chunk, image) if objective.config.has("text") else None
    return Seen(objective.targets(own), vectors)


def couple(
    objective: "Objective", batch: Batch, texts: Texts | None, seen: list[Seen], *, signals: bool
) -> list[Given]:
    """What each chunk is given of all others, of all ranks. No parameter is read: it needs no engine.

    Args:
        batch, texts, seen: the whole micro-batch, its texts, and what was seen of its chunks.
    """
    totals = objective.totals(batch, signals=signals)
    shared = objective.share([each.targets for each in seen], num_rows=len(batch))
    slopes: list[Vectors | None] = [None] * len(seen)
    if texts is not None:
        leaves = _joined([each.vectors for each in seen if each.vectors is not None])
        term = objective.config.text_term
        loss = totals.add(batch, {term.name: text_rows(term, texts, leaves, objective.collectives)})
        grads = torch.autograd.grad(loss, (leaves.image_RNF, leaves.text_nF, leaves.scale))
        slopes = _divided(Vectors(*grads), len(seen))
    return [Given(each.targets, shared, slope, totals) for each, slope in zip(seen, slopes, strict=True)]


def replay(objective: "Objective", chunk: Chunk, given: Given) -> Tensor:
    """Second pass of a chunk, with a graph: a scalar whose gradient is the chunk's part of the micro-batch's."""
    image, own = objective._images(chunk.batch)
    rows, vectors = objective.rows(chunk, image, own, given.targets, given.shared)
    loss = given.totals.add(chunk.batch, rows)
    if vectors is None or given.slope is None:
        return loss
    return loss + _inner(vectors, given.slope)


def _joined(parts: list[Vectors]) -> Vectors:
    """The vectors of all chunks, as leaves; the scale is the same in all."""
    image_RNF = torch.cat([part.image_RNF for part in parts], dim=1)
    text_nF = torch.cat([part.text_nF for part in parts])
    return Vectors(image_RNF.requires_grad_(), text_nF.requires_grad_(), parts[0].scale.detach().requires_grad_())


def _divided(slope: Vectors, num_chunks: int) -> list[Vectors | None]:
    """Each chunk's gradients. Every chunk reads the scale, so each has an equal part of that gradient."""
    images, texts = slope.image_RNF.chunk(num_chunks, dim=1), slope.text_nF.chunk(num_chunks)
    return [Vectors(image, text, slope.scale / num_chunks) for image, text in zip(images, texts, strict=True)]


def _inner(vectors: Vectors, slope: Vectors) -> Tensor:
    pairs = (
        (vectors.image_RNF, slope.image_RNF),
        (vectors.text_nF, slope.text_nF),
        (vectors.scale, slope.scale),
    )
    return torch.stack([(value.float() * grad.float()).sum() for value, grad in pairs]).sum()

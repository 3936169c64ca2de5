"""What models make of the pictures and names of a directory of shards.

Legend: N samples, H W C pixels, L tokens, D width, E pooled width, F shared width.
"""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from m3i_large.data.decode import decode_rgb, whole_square
from m3i_large.data.index import index_shard
from m3i_large.data.manifest import IndexDirectory
from m3i_large.data.source_config import Kind, SourceConfig
from m3i_large.data.sources import RawSample, Source
from m3i_large.data.storage import Storage
from m3i_large.data.tokenizer import Tokenizer
from m3i_large.errors import UserError
from m3i_large.evaluate.load import Encoder
from m3i_large.parallel.comm import Rank, gather_on_first

BATCH, READERS = 64, 4


@dataclass(frozen=True)
class Samples:
    """What is known of samples, apart from their pixels, which need not fit into memory.

    Attributes:
        captions: of image_text samples, else empty.
        labels_N: class of image_category samples, else empty.
        meta: the samples' `.json` (concept, style, ...).
    """

    captions: list[str]
    labels_N: Tensor
    meta: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.meta)


@dataclass(frozen=True)
class Features:
    """What a model makes of samples.

    Attributes:
        pooled_NE: image vectors of the attention pool, or of `mean_ND` where there is none.
        mean_ND: mean of the backbone's tokens, which every model has.
        image_NF, text_NF: the shared image-text space, both of length 1, where there is a text head.
        logit_NC: category logits, where there is a classifier.
        encoder: the model, for what else it is asked.
    """

    pooled_NE: Tensor
    mean_ND: Tensor
    image_NF: Tensor | None = None
    text_NF: Tensor | None = None
    logit_NC: Tensor | None = None
    encoder: Encoder | None = None


class Pictures:
    """All samples of one kind in a directory, whole pictures as squares; they are decoded as they are asked for.

    Args:
        image_size: side of the squares, pixels.

    Raises:
        UserError: no such directory, no shard, or none of that kind.
    """

    def __init__(self, directory: Path, kind: Kind, *, image_size: int) -> None:
        if not directory.is_dir():
            raise UserError(f"--data: got {directory}, which is no directory; needed: one with .tar shards")
        self._index = tempfile.TemporaryDirectory()  # never writes beside somebody's data
        self._source, self._size = _open(directory, kind, Path(self._index.name)), image_size

    def __len__(self) -> int:
        return len(self._source)

    def chunks(
        self, size: int = BATCH, *, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[int, Tensor, list[RawSample]]]:
        """This rank's runs of (number of the run, pixels uint8 (n, image_size, image_size, 3), samples)."""
        with ThreadPoolExecutor(READERS) as pool:
            for first in range(rank * size, len(self), world * size):
                read = list(pool.map(self._read, range(first, min(first + size, len(self)))))
                pixels_NHWC = torch.from_numpy(np.stack([pixels for pixels, _ in read]))
                yield first // size, pixels_NHWC, [raw for _, raw in read]

    def _read(self, number: int) -> tuple[np.ndarray, RawSample]:
        raw = self._source.read(number, meta=True)
        return whole_square(decode_rgb(raw.image), self._size), raw


def _open(directory: Path, kind: Kind, index: Path) -> Source:
    """All shards of a directory that have what `kind` needs, as one source."""
    names = sorted(path.name for path in directory.glob("*.tar"))
    needed = {"image_text": "txt", "image_category": "cls"}.get(kind)
    storage = Storage(directory)
    fitting = [n for n in names if needed is None or index_shard(n, storage).has(needed).any()]
    if not fitting:
        raise UserError(
            f"--data: got {directory}, which has no .tar shard with .{needed or 'json'}; needed: at least one"
        )
    config = SourceConfig(name="evaluation", kind=kind, shards=fitting)
    return Source.open(config, storage, IndexDirectory(directory, index))


@dataclass(frozen=True)
class _Run:
    """What is made of one run of pictures: of each model the pooled vectors and the means of tokens."""

    captions: list[str]
    labels: list[int]
    meta: list[dict[str, Any]]
    vectors: list[tuple[Tensor, Tensor]]


@torch.no_grad()
def encode(
    encoders: Sequence[Encoder], pictures: Pictures, *, rank: Rank | None = None
) -> tuple[Samples, list[Features]] | None:
    """Shows whole, unmixed pictures to several models at once, so that each is decoded once -> features of each.

    Args:
        rank: every rank shows its share; only the first is given the result, the same as of one rank.
    """
    place = {} if rank is None else {"rank": rank.rank, "world": rank.world}
    own: dict[int, _Run] = {}
    for number, pixels_NHWC, raws in pictures.chunks(**place):
        tokens = [(encoder, encoder.tokens(pixels_NHWC)) for encoder in encoders]
        own[number] = _Run(
            captions=[raw.text for raw in raws if raw.text is not None],
            labels=[raw.category for raw in raws if raw.category is not None],
            meta=[raw.meta for raw in raws],
            vectors=[(encoder.pool(x_NLD).cpu(), x_NLD.mean(1).cpu()) for encoder, x_NLD in tokens],
        )
    gathered = [own] if rank is None else gather_on_first(own, rank)
    if not gathered:
        return None
    runs = [run for _, run in sorted((pair for part in gathered for pair in part.items()), key=itemgetter(0))]
    samples = Samples(
        captions=[text for run in runs for text in run.captions],
        labels_N=torch.tensor([label for run in runs for label in run.labels], dtype=torch.int64),
        meta=[meta for run in runs for meta in run.meta],
    )
    features = []
    for model, encoder in enumerate(encoders):
        pooled, means = zip(*(run.vectors[model] for run in runs), strict=True)
        features.append(_features(encoder, torch.cat(pooled), torch.cat(means), samples.captions))
    return samples, features


def _features(encoder: Encoder, pooled_NE: Tensor, mean_ND: Tensor, captions: Sequence[str]) -> Features:
    image_NF = text_NF = logit_NC = None
    objective = encoder.objective
    if objective is not None and objective.category_head is not None:
        logit_NC = torch.cat([objective.category_head(x.to(encoder.device)).cpu() for x in pooled_NE.split(BATCH)])
    if objective is not None and objective.text_head is not None:
        image = [objective.text_head.image_projection(x.to(encoder.device)).cpu() for x in pooled_NE.split(BATCH)]
        image_NF = F.normalize(torch.cat(image), dim=-1)
        text_NF = encode_texts(encoder, captions) if captions else None
    return Features(pooled_NE, mean_ND, image_NF, text_NF, logit_NC, encoder)


@torch.no_grad()
def encode_texts(encoder: Encoder, texts: Sequence[str]) -> Tensor:
    """Texts in the shared space -> (len(texts), F), of length 1. UserError where the model has no text tower."""
    objective, recipe = encoder.objective, encoder.recipe
    if objective is None or recipe is None or objective.text_head is None or objective.text is None:
        raise UserError("evaluation: the model has no text tower, so pictures and names share no space")
    tokens = torch.from_numpy(Tokenizer(context_length=recipe.text.context_length).encode(texts))
    found: Iterable[Tensor] = (
        objective.text_head.text_projection(objective.text(x.to(encoder.device))).cpu() for x in tokens.split(BATCH)
    )
    return F.normalize(torch.cat(list(found)), dim=-1)

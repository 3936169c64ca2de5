"""Pictures, names and labels of a directory of shards, and what a model makes of them."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from m3i_large.data.decode import decode_rgb
from m3i_large.data.index import index_shard
from m3i_large.data.manifest import IndexDirectory
from m3i_large.data.source_config import Kind, SourceConfig
from m3i_large.data.sources import Source
from m3i_large.data.storage import Storage
from m3i_large.data.tokenizer import Tokenizer
from m3i_large.errors import UserError
from m3i_large.objective import Objective
from m3i_large.recipe import Recipe

BATCH = 64


@dataclass(frozen=True)
class Samples:
    """All samples of one kind in a directory, decoded and resized.

    Attributes:
        pixels_NHWC: uint8, image_size square.
        captions: of image_text samples, else empty.
        labels_N: class of image_category samples, else empty.
        meta: the samples' `.json` (concept, style, ...).
    """

    pixels_NHWC: Tensor
    captions: list[str]
    labels_N: Tensor
    meta: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.pixels_NHWC)


@dataclass(frozen=True)
class Features:
    """What a model makes of samples.

    Attributes:
        pooled_NE: image vectors of the attention pool, or of `mean_ND` where the objective has none.
        mean_ND: mean of the backbone's tokens, which every objective has.
        image_NF, text_NF: the shared image-text space, both of length 1, where there is a text head.
        logit_NC: category logits, where there is a classifier.
    """

    pooled_NE: Tensor
    mean_ND: Tensor
    image_NF: Tensor | None = None
    text_NF: Tensor | None = None
    logit_NC: Tensor | None = None


def read_samples(directory: Path, kind: Kind, *, image_size: int) -> Samples:
    """Reads every shard of `directory` whose samples have what `kind` needs.

    Raises:
        UserError: no such directory, no shard, or none of that kind.
    """
    if not directory.is_dir():
        raise UserError(f"--data: got {directory}, which is no directory; needed: one with .tar shards")
    with tempfile.TemporaryDirectory() as index:  # never writes beside somebody's data
        source = _open(directory, kind, Path(index))
        raws = [source.read(i, meta=True) for i in range(source.num_samples)]
    pixels = [_resize(decode_rgb(raw.image), image_size) for raw in raws]
    return Samples(
        pixels_NHWC=torch.from_numpy(np.stack(pixels)),
        captions=[raw.text for raw in raws if raw.text is not None],
        labels_N=torch.tensor([raw.category for raw in raws if raw.category is not None], dtype=torch.int64),
        meta=[raw.meta for raw in raws],
    )


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


def _resize(image_HWC: np.ndarray, size: int) -> np.ndarray:
    """The whole picture as a square: shorter side to `size`, then the centre."""
    height, width = image_HWC.shape[:2]
    scale = size / min(height, width)
    shape = (max(size, round(width * scale)), max(size, round(height * scale)))
    resized = cv2.resize(image_HWC, shape, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    return np.ascontiguousarray(resized[top : top + size, left : left + size])


@torch.no_grad()
def encode(
    objective: Objective, recipe: Recipe, samples: Samples, *, progress: Callable[[int], None] | None = None
) -> Features:
    """Reads the student's tokens of whole, unmixed pictures and applies the pool and heads that the objective has."""
    mean, std = torch.tensor(recipe.data.mean), torch.tensor(recipe.data.std)
    pooled, means = [], []
    for chunk in samples.pixels_NHWC.split(BATCH):
        image = ((chunk.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
        token_NLD = objective.student.tokens(image)
        means.append(token_NLD.mean(1))
        pooled.append(objective.pool(token_NLD) if objective.pool is not None else means[-1])
        if progress:
            progress(len(chunk))
    pooled_NE, mean_ND = torch.cat(pooled), torch.cat(means)
    logit_NC = objective.category_head(pooled_NE) if objective.category_head is not None else None
    if objective.text_head is None or not samples.captions:
        return Features(pooled_NE, mean_ND, logit_NC=logit_NC)
    tokens = torch.from_numpy(Tokenizer(context_length=recipe.text.context_length).encode(samples.captions))
    text_NW = torch.cat([objective.text(chunk) for chunk in tokens.split(BATCH)])
    image_NF, text_NF, _ = objective.text_head(pooled_NE, text_NW)
    return Features(pooled_NE, mean_ND, F.normalize(image_NF, dim=-1), F.normalize(text_NF, dim=-1), logit_NC)

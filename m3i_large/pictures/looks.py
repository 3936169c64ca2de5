"""What the student makes of the album at one step of its training.

Legend: N pictures, K of them looked at patch by patch, G tokens a side, L = G * G, D width, E pooled width, F shared
width, M heads.
"""

import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from m3i_large.data.tokenizer import Tokenizer
from m3i_large.pictures.album import Album

if TYPE_CHECKING:
    from m3i_large.objective import Objective

FILE = "look.npz"
CHUNK = 32  # pictures that pass the student at a time
DENSE = 8  # pictures of which every patch is looked at
# Of the values of a component, what is shown darkest and brightest: single patches do not decide how all look.
DARKEST, BRIGHTEST = 0.01, 0.99


@dataclass(frozen=True)
class Look:
    """What is kept of a look.

    Attributes:
        places: (K,) of the album's pictures, those whose patches were looked at.
        pca_KGG3: the three first principal components of their tokens, in [0, 1].
        attention_KGG: how much the pool looks at each token, mean over heads; None where there is no pool.
        pooled_NE: image vectors, of the pool or the mean of tokens; float16, of length 1.
        image_NF, text_NF: the shared space, of length 1, where there is a text head.
    """

    places: np.ndarray
    pca_KGG3: np.ndarray
    attention_KGG: np.ndarray | None
    pooled_NE: np.ndarray
    image_NF: np.ndarray | None
    text_NF: np.ndarray | None

    def replaced(self, **changes: Any) -> "Look":
        """The same look with other values."""
        return replace(self, **changes)

    def save(self, directory: Path) -> None:
        """Writes look.npz; OSError where the disk does not take it."""
        directory.mkdir(parents=True, exist_ok=True)
        arrays = {name: value for name, value in vars(self).items() if value is not None}
        with (directory / FILE).open("wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, directory: Path) -> "Look | None":
        """Reads what `save` wrote; None where there is none, or one that a crash has cut."""
        try:
            with np.load(directory / FILE) as arrays:
                return cls(**{name: arrays.get(name) for name in cls.__dataclass_fields__})
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
            return None


class Seen(NamedTuple):
    """What `see` brings home of some pictures; a tuple, because DeepSpeed looks into what a root module returns."""

    token_nLD: Tensor
    attention_nL: Tensor | None
    pooled_nE: Tensor
    image_nF: Tensor | None
    text_nF: Tensor | None


@torch.no_grad()
def see(objective: "Objective", pixels_NHWC: Tensor, token_NT: Tensor) -> Seen:
    """Some pictures and their texts, through student, pool and text tower; to be run by the engine."""
    from m3i_large.evaluate.load import as_image  # with it come timm and transformers: a report reads looks alone

    image = as_image(pixels_NHWC, mean=objective.mean, std=objective.std).to(objective.compute_dtype)
    token_nLD = objective.student.tokens(image)
    attention_nL = image_nF = text_nF = None
    pooled_nE = token_nLD.mean(1)
    if objective.pool is not None:
        heads: list[Tensor] = []
        pooled_nE = objective.pool(token_nLD, seen=heads)
        attention_nL = heads[0].mean(1)
    if objective.text_head is not None:
        image_nF, text_nF, _ = objective.text_head(pooled_nE, objective.text(token_NT))
    return Seen(token_nLD, attention_nL, pooled_nE, image_nF, text_nF)


def look(engine: Callable[..., Any], album: Album, tokenizer: Tokenizer, *, device: torch.device) -> Look:
    """Shows the album to the student. Every rank calls it, as each holds a part of the weights.

    Args:
        engine: runs a function of the objective, as `engine(*inputs, run=see)`.
    """
    pixels_NHWC = torch.from_numpy(album.pixels_NHWC)
    token_NT = torch.from_numpy(tokenizer.encode([item.text for item in album.items]))
    chunks = zip(pixels_NHWC.split(CHUNK), token_NT.split(CHUNK), strict=True)
    places = np.unique(np.linspace(0, len(album) - 1, min(DENSE, len(album))).round().astype(int))
    tokens: dict[int, Tensor] = {}
    attention: dict[int, Tensor] = {}
    vectors: list[tuple[Tensor | None, ...]] = []
    for number, chunk in enumerate(chunks):
        seen: Seen = engine(*(x.to(device) for x in chunk), run=see)
        vectors.append(tuple(None if x is None else x.float().cpu() for x in seen[2:]))
        for place in places:
            row = int(place) - number * CHUNK
            if 0 <= row < len(seen.token_nLD):
                tokens[place] = seen.token_nLD[row].float().cpu()
                if seen.attention_nL is not None:
                    attention[place] = seen.attention_nL[row].float().cpu()
    pooled, image, text = (_joined(parts) for parts in zip(*vectors, strict=True))
    assert pooled is not None
    side = round(len(tokens[places[0]]) ** 0.5)
    square = (len(places), side, side)
    maps = torch.stack([attention[p] for p in places]).reshape(square).numpy() if attention else None
    pca = principal_components(torch.stack([tokens[p] for p in places])).reshape(*square, 3)
    return Look(places, pca, maps, pooled, image, text)


def _joined(parts: Sequence[Tensor | None]) -> np.ndarray | None:
    """Vectors of length 1, in half precision: enough to order neighbours by."""
    found = [part for part in parts if part is not None]
    return F.normalize(torch.cat(found), dim=-1).half().numpy() if found else None


def principal_components(token_KLD: Tensor) -> np.ndarray:
    """The three first principal components over all tokens of all pictures -> (K, L, 3) in [0, 1], float16."""
    flat = token_KLD.flatten(0, 1).double()
    flat = flat - flat.mean(0)
    _, _, basis = torch.linalg.svd(flat, full_matrices=False)
    value_n3 = F.pad(flat @ basis[:3].T, (0, max(0, 3 - len(basis))))
    low, high = value_n3.quantile(DARKEST, dim=0), value_n3.quantile(BRIGHTEST, dim=0)
    shown = ((value_n3 - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return shown.unflatten(0, token_KLD.shape[:2]).half().numpy()


def aligned(pca_KGG3: np.ndarray, before_KGG3: np.ndarray | None) -> np.ndarray:
    """The same components, ordered and turned so that colours mean what they meant in the look before.

    A component's sign is arbitrary, and two may change places between steps.
    """
    if before_KGG3 is None or before_KGG3.shape != pca_KGG3.shape:
        return pca_KGG3
    now, before = (x.reshape(-1, 3).astype(np.float64) for x in (pca_KGG3, before_KGG3))
    now, before = now - now.mean(0), before - before.mean(0)
    norms = np.maximum(np.outer(np.linalg.norm(before, axis=0), np.linalg.norm(now, axis=0)), 1e-12)
    likeness_33 = (before.T @ now) / norms  # of the earlier component (row) and the later one (column)
    from scipy.optimize import linear_sum_assignment

    _, order = linear_sum_assignment(-np.abs(likeness_33))
    turned = [pca_KGG3[..., j] if likeness_33[i, j] >= 0 else 1 - pca_KGG3[..., j] for i, j in enumerate(order)]
    return np.stack(turned, -1)

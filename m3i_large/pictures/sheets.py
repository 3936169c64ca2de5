"""What looks at the album show: features through training, attention, what is found for a text or a picture."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np

from m3i_large.pictures.album import Album
from m3i_large.pictures.looks import FILE, Look
from m3i_large.pictures.sheet import Cell, Sheet, Strip

QUERIES, FOUND = 8, 6  # strips of a search, and pictures in each
LOOKS = 6  # columns of the features through training
PREFIX = "step_"


def step_directory(pictures: Path, step: int) -> Path:
    """Where the pictures of a step lie; a look is of the state after so many updates."""
    return pictures / f"{PREFIX}{step:08d}"


def look_steps(pictures: Path) -> list[int]:
    """Steps of a run that have a look, in order."""
    return sorted(int(path.parent.name.removeprefix(PREFIX)) for path in pictures.glob(f"{PREFIX}*/{FILE}"))


def looks_of(pictures: Path, steps: Iterable[int]) -> dict[int, Look]:
    """The looks of these steps, those that are whole."""
    found = {step: Look.load(step_directory(pictures, step)) for step in steps}
    return {step: look for step, look in found.items() if look is not None}


def album_sheets(album: Album, looks: dict[int, Look]) -> list[Sheet]:
    """All sheets that the looks of a run give; of the last one, but for the features through training."""
    if not looks:
        return []
    step, last = max(looks.items())
    sheets = [features(album, looks), attention(album, last, step), by_text(album, last, step)]
    sheets += [by_picture(album, last, step), across_styles(album, last, step)]
    return [sheet for sheet in sheets if sheet is not None]


def _shown(album: Album) -> str:
    return "pictures that are never trained on" if album.held_out else "pictures of the training data"


def chosen(steps: Sequence[int], most: int = LOOKS) -> list[int]:
    """The first, the last and some between, closer together where more changes: early."""
    steps = sorted(steps)
    if len(steps) <= most:
        return steps
    share = np.linspace(0, 1, most) ** 2
    return [steps[i] for i in sorted({round(s * (len(steps) - 1)) for s in share})]


def features(album: Album, looks: dict[int, Look]) -> Sheet:
    """Principal components of the dense features, step by step."""
    steps = chosen(list(looks))
    size = album.pixels_NHWC.shape[1]
    strips = []
    for row, place in enumerate(looks[steps[-1]].places):
        cells = [Cell(album.pixels_NHWC[place], "picture")]
        for step in steps:
            if row < len(looks[step].pca_KGG3):
                cells.append(Cell(_enlarged(looks[step].pca_KGG3[row], size), f"step {step}"))
        strips.append(Strip(album.items[place].label, tuple(cells)))
    about = (
        f"The student's tokens of {_shown(album)}: their three first principal components, over all pictures shown, as "
        "red, green and blue. Patches of one colour look alike to the network."
    )
    return Sheet("features", "Dense features through training", about, tuple(strips))


def attention(album: Album, look: Look, step: int) -> Sheet | None:
    """Where the attention pool looks."""
    if look.attention_KGG is None:
        return None
    strips = []
    for place, map_GG in zip(look.places, look.attention_KGG, strict=True):
        pixels = album.pixels_NHWC[place]
        uniform = map_GG.size
        most = f"up to {map_GG.max() * uniform:.1f} x uniform"
        strips.append(Strip(album.items[place].label, (Cell(pixels, "picture"), Cell(_heat(pixels, map_GG), most))))
    about = (
        f"How much of the pooled vector comes from each patch, mean over heads, after step {step}; of {_shown(album)}. "
        "Bright: most."
    )
    return Sheet("attention", "What the attention pool looks at", about, tuple(strips))


def by_text(album: Album, look: Look, step: int) -> Sheet | None:
    """For texts the pictures found."""
    if look.image_NF is None or look.text_NF is None or not any(item.text for item in album.items):
        return None
    texts = [i for i, item in enumerate(album.items) if item.text]
    first = {album.items[i].text: i for i in reversed(texts)}
    queries = _spread(sorted(first.values()))
    score_QN = look.text_NF[queries].astype(np.float32) @ look.image_NF.astype(np.float32).T
    strips = []
    for query, score_N in zip(queries, score_QN, strict=True):
        text = album.items[query].text
        best = np.argsort(-score_N, kind="stable")[:FOUND]
        cells = [_found(album, int(i), score_N[i], right=album.items[i].text == text) for i in best]
        strips.append(Strip(f"“{text}”", tuple(cells)))
    about = (
        f"The pictures nearest to a text, best first, by cosine, among {len(album)} {_shown(album)}, after step "
        f"{step}. Right is what has the same text."
    )
    return Sheet("retrieval", "From a text to pictures", about, tuple(strips))


def by_picture(album: Album, look: Look, step: int) -> Sheet:
    """For pictures the pictures found."""
    queries = _spread(range(len(album)))
    pooled = look.pooled_NE.astype(np.float32)
    score_QN = pooled[queries] @ pooled.T
    strips = []
    for query, score_N in zip(queries, score_QN, strict=True):
        best = [i for i in np.argsort(-score_N, kind="stable") if i != query][: FOUND - 1]
        cells = [Cell(album.pixels_NHWC[query], "asked for")]
        cells += [_found(album, int(i), score_N[i]) for i in best]
        strips.append(Strip(album.items[query].label, tuple(cells)))
    about = (
        f"The pictures nearest to a picture, best first, by cosine of the pooled vectors, among {len(album)} "
        f"{_shown(album)}, after step {step}."
    )
    return Sheet("neighbours", "From a picture to pictures", about, tuple(strips))


def across_styles(album: Album, look: Look, step: int) -> Sheet | None:
    """For pictures of one style the nearest ones of another; None where the album has one style, or none."""
    styles = sorted({item.style for item in album.items})
    if len(styles) < 2:
        return None
    pooled = look.pooled_NE.astype(np.float32)
    strips = []
    for number, query in enumerate(_spread([i for i, item in enumerate(album.items) if item.style == styles[0]])):
        other = styles[1 + number % (len(styles) - 1)]
        gallery = [i for i, item in enumerate(album.items) if item.style == other]
        score_M = pooled[gallery] @ pooled[query]
        asked = album.items[query]
        cells = [Cell(album.pixels_NHWC[query], f"asked for, {styles[0] or 'no style'}")]
        for j in np.argsort(-score_M, kind="stable")[: FOUND - 1]:
            item = album.items[gallery[j]]
            right = item.concept == asked.concept if asked.concept else item.label == asked.label
            cells.append(_found(album, gallery[j], score_M[j], right=right))
        strips.append(Strip(f"{asked.label}, in {other or 'no style'}", tuple(cells)))
    about = (
        f"The pictures of another style that are nearest to a picture, by cosine of the pooled vectors, after step "
        f"{step}; {_shown(album)}. Right is the same thing, which may not be in the album."
    )
    return Sheet("styles", "The same thing in another style", about, tuple(strips))


def _spread(places: Sequence[int], most: int = QUERIES) -> list[int]:
    """Some of them, evenly."""
    return [places[round(i)] for i in np.linspace(0, len(places) - 1, min(most, len(places)))]


def _found(album: Album, place: int, cosine: float, *, right: bool | None = None) -> Cell:
    return Cell(album.pixels_NHWC[place], f"{album.items[place].label} {cosine:.2f}", right)


def _enlarged(map_GG3: np.ndarray, size: int) -> np.ndarray:
    """Tokens as squares of pixels: nothing is drawn between them that was not computed."""
    pixels = (map_GG3.astype(np.float32) * 255).round().astype(np.uint8)
    return cv2.resize(pixels, (size, size), interpolation=cv2.INTER_NEAREST)


def _heat(pixels_HWC: np.ndarray, map_GG: np.ndarray) -> np.ndarray:
    """The map in colour over the grey picture."""
    size = pixels_HWC.shape[0]
    share = (map_GG.astype(np.float32) / max(float(map_GG.max()), 1e-12) * 255).round().astype(np.uint8)
    large = cv2.resize(share, (size, size), interpolation=cv2.INTER_NEAREST)
    colour = cv2.applyColorMap(large, cv2.COLORMAP_INFERNO)[..., ::-1]
    grey = cv2.cvtColor(cv2.cvtColor(pixels_HWC, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(np.ascontiguousarray(colour), 0.65, grey, 0.35, 0)

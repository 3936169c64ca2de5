"""A detection data set in COCO's format, composed of the embedded drawings: exact boxes and masks, nothing downloaded.

    <root>/{train,valid,heldout}/%06d.jpg        scenes: drawings of one style each, over textured paper
    <root>/annotations/instances_{train,valid,heldout}.json
    <root>/LICENSES.md, manifest.json

The eight classes are the drawings' groups. A split's scenes show drawings of that split of the embedded data set alone
(drawings.py): what is detected in `heldout` was in no scene of `train` and in no pre-training on the embedded data.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from m3i_large.data.demo import MANIFEST, building, draw, licences, write_json
from m3i_large.data.drawings import SPLIT_KEY, SPLITS, STYLES, find_drawings, read_concepts, read_group_names
from m3i_large.errors import UserError

FORMAT = 1
LEFT_OUT = ("Component", "Flags")  # groups with one drawing or none in a split
SCENES = {"train": 800, "valid": 300, "heldout": 500}
SIZE = 96  # pixels a side
OBJECTS = (1, 3)  # of a scene
SIDES = (0.3, 0.65)  # of an object's longer side, as a share of the scene's
DRAWN = 96  # pixels a side of a drawing before it is scaled
MAX_COVERED = 0.25  # of an object, by those placed after it
TRIES = 20
# Backgrounds are textured paper: the embedded data set's drawings are on white.
PAPER = 228.0  # darkest value of a channel
GRAIN = 3.0  # largest standard deviation of what differs from pixel to pixel
OPAQUE = 128
JPEG_QUALITY = 95

LICENSE_NOTE = """
The scenes of this directory are adaptations of these drawings: scaled and set over computed textures. Copies and
adaptations of them stay under CC BY-SA 4.0, OpenMoji's licence, and name both sources.
"""


@dataclass(frozen=True)
class Drawing:
    """A drawing cut to what is opaque, as BGRA uint8, with its class."""

    pixels_HW4: np.ndarray
    category: int


@dataclass(frozen=True)
class Placed:
    """One object of a scene: where its pixels are opaque and nothing lies over them, as a bool map of the scene."""

    mask_HW: np.ndarray
    category: int


def build_demo_detection(
    root: Path, *, scenes: dict[str, int] | None = None, progress: Callable[[str, int, int], None] | None = None
) -> bool:
    """Builds the data set in a temporary directory beside `root` and renames it; False where it is complete already.

    Two builds by the same package versions are byte-identical.

    Args:
        scenes: number of scenes by split; for tests.
        progress: called with (stage, done, total).

    Raises:
        UserError: `root` holds something else, or another number of scenes.
    """
    scenes = SCENES if scenes is None else scenes
    wanted = {"format": FORMAT, "size": SIZE, "split_key": SPLIT_KEY, "scenes": scenes}
    if root.exists() and any(root.iterdir()):
        manifest = root / MANIFEST
        found = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else "something else"
        if found != wanted:
            raise UserError(f"--root: {root} holds {found}; needed: {wanted}, or another directory")
        return False
    show = progress or (lambda stage, done, total: None)
    with building(root) as directory:
        (directory / "annotations").mkdir()
        for split, number in scenes.items():
            _write_split(directory, split, number, show)
        (directory / "LICENSES.md").write_text(licences(DRAWN) + LICENSE_NOTE, encoding="utf-8")
        write_json(directory / MANIFEST, wanted)
    return True


def _write_split(root: Path, split: str, number: int, show: Callable[[str, int, int], None]) -> None:
    groups = [group for group in read_group_names() if group not in LEFT_OUT]
    drawings = _drawings_of(split, groups)
    (root / split).mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(number):
        rng = np.random.default_rng([SPLITS.index(split), index])
        pixels_HW3, placed = compose(drawings, rng)
        name = f"{index:06d}.jpg"
        coded = cv2.imencode(".jpg", pixels_HW3, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
        (root / split / name).write_bytes(coded.tobytes())
        images.append({"id": index + 1, "file_name": name, "height": SIZE, "width": SIZE})
        for item in placed:
            annotations.append({"id": len(annotations) + 1, "image_id": index + 1, **_annotation(item)})
        show(split, index + 1, number)
    categories = [{"id": number, "name": name} for number, name in enumerate(groups, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    text = json.dumps(content, separators=(",", ":"))
    (root / "annotations" / f"instances_{split}.json").write_text(text, encoding="utf-8")


def _drawings_of(split: str, groups: list[str]) -> list[list[list[Drawing]]]:
    """The base drawings of a split, by style and class."""
    files = find_drawings()
    chosen: list[list[list[Drawing]]] = [[[] for _ in groups] for _ in STYLES]
    for concept in read_concepts():
        if concept.split != split or concept.tones or concept.group not in groups:
            continue
        for style, by_group in zip(STYLES, chosen, strict=True):
            if (style, concept.code) in files:
                number = groups.index(concept.group)
                by_group[number].append(Drawing(_cut(files[style, concept.code]), number + 1))
    return chosen


def _cut(file: Traversable) -> np.ndarray:
    """A drawing as BGRA, cut to the box of its opaque pixels."""
    pixels_HW4 = draw(file, size=DRAWN, background=None)
    rows, columns = np.nonzero(pixels_HW4[..., 3] >= OPAQUE)
    return pixels_HW4[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def compose(drawings: list[list[list[Drawing]]], rng: np.random.Generator) -> tuple[np.ndarray, list[Placed]]:
    """One scene, BGR uint8 (SIZE, SIZE, 3), and its objects in the order they were placed.

    Args:
        drawings: by style and class; a scene's style, and then each object's class, are uniform over what there is.
    """
    scene_HW3 = _texture(rng)
    classes = [group for group in drawings[rng.integers(len(drawings))] if group]
    placed: list[Placed] = []
    whole: list[int] = []  # opaque pixels of each before anything covered it
    for _ in range(int(rng.integers(OBJECTS[0], OBJECTS[1] + 1))):
        group = classes[rng.integers(len(classes))]
        drawing = group[rng.integers(len(group))]
        for _ in range(TRIES):
            pixels_HW4, top, left = _place(drawing.pixels_HW4, rng)
            mask_HW = np.zeros((SIZE, SIZE), bool)
            height, width = pixels_HW4.shape[:2]
            mask_HW[top : top + height, left : left + width] = pixels_HW4[..., 3] >= OPAQUE
            left_over = [item.mask_HW & ~mask_HW for item in placed]
            if all(rest.sum() >= (1 - MAX_COVERED) * pixels for rest, pixels in zip(left_over, whole, strict=True)):
                placed = [Placed(rest, item.category) for rest, item in zip(left_over, placed, strict=True)]
                placed.append(Placed(mask_HW, drawing.category))
                whole.append(int(mask_HW.sum()))
                _paint(scene_HW3[top : top + height, left : left + width], pixels_HW4)
                break
    return scene_HW3, placed


def _place(pixels_HW4: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, int, int]:
    """A drawing scaled, perhaps mirrored, and the corner where it goes; it lies inside the scene."""
    side = SIZE * float(rng.uniform(*SIDES))
    scale = side / max(pixels_HW4.shape[:2])
    height, width = (max(4, round(length * scale)) for length in pixels_HW4.shape[:2])
    colour_HW4 = pixels_HW4.astype(np.float32)
    colour_HW4[..., :3] *= colour_HW4[..., 3:] / 255  # so that transparent pixels do not bleed in
    scaled_HW4 = cv2.resize(colour_HW4, (width, height), interpolation=cv2.INTER_AREA)
    if rng.random() < 0.5:
        scaled_HW4 = scaled_HW4[:, ::-1]
    return scaled_HW4, int(rng.integers(SIZE - height + 1)), int(rng.integers(SIZE - width + 1))


def _paint(below_HW3: np.ndarray, pixels_HW4: np.ndarray) -> None:
    """Sets a drawing, whose colours are multiplied by its opacity, over a part of the scene, in place."""
    below_HW3[:] = (pixels_HW4[..., :3] + below_HW3 * (1 - pixels_HW4[..., 3:] / 255)).round().clip(0, 255)


def _texture(rng: np.random.Generator) -> np.ndarray:
    """A background: two colours blended by noise of several scales, and fine grain; BGR uint8."""
    noise_HW = np.zeros((SIZE, SIZE), np.float32)
    for cells in (2, 4, 8, 16, 32):
        coarse = rng.random((cells + 1, cells + 1), dtype=np.float32)
        noise_HW += cv2.resize(coarse, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC) * float(rng.random()) / cells**0.5
    noise_HW = (noise_HW - noise_HW.min()) / max(float(np.ptp(noise_HW)), 1e-6)
    first, second = rng.uniform(PAPER, 255, (2, 3))
    blended_HW3 = first + (second - first) * noise_HW[..., None]
    grain_HW3 = rng.normal(0, float(rng.uniform(0, GRAIN)), (SIZE, SIZE, 3))
    return (blended_HW3 + grain_HW3).clip(0, 255).astype(np.uint8)


def _annotation(item: Placed) -> dict[str, Any]:
    rows, columns = np.nonzero(item.mask_HW)
    left, top = int(columns.min()), int(rows.min())
    box = [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top]
    segmentation = {"size": list(item.mask_HW.shape), "counts": run_lengths(item.mask_HW)}
    return {
        "category_id": item.category,
        "bbox": box,
        "area": int(item.mask_HW.sum()),
        "iscrowd": 0,
        "segmentation": segmentation,
    }


def run_lengths(mask_HW: np.ndarray) -> list[int]:
    """COCO's uncompressed run lengths: column by column, beginning with the number of zeros."""
    flat = np.concatenate([[False], mask_HW.ravel(order="F")])
    ends = np.append(np.flatnonzero(flat[1:] != flat[:-1]), mask_HW.size)
    return np.diff(ends, prepend=0).tolist()

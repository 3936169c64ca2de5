"""Annotations in COCO's format, read with suspicion: what cannot be trained on is left out and counted, what cannot be
meant is refused in one line.

Legend: M objects of an image, H W pixels.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from m3i_large.data.decode import decode_rgb
from m3i_large.errors import UserError

REQUIRED = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}
LVIS_REQUIRED = {
    "images": ("id", "coco_url", "height", "width", "neg_category_ids", "not_exhaustive_category_ids"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name", "frequency"),
}
FREQUENCIES = ("r", "c", "f")


@dataclass(frozen=True, kw_only=True)
class Image:
    """One image and its objects.

    Attributes:
        boxes_M4: float32 (x0, y0, x1, y1) pixels, inside the image, of positive area.
        labels_M: int64, positions in `CocoSplit.categories`.
        segmentations: as in the file: polygons or run lengths; None where an object has none.
    """

    id: int
    path: Path
    height: int
    width: int
    boxes_M4: np.ndarray
    labels_M: np.ndarray
    segmentations: list[Any]


@dataclass(frozen=True, kw_only=True)
class CocoSplit:
    """One file of annotations.

    Attributes:
        path: the file.
        categories: (id, name), in the order of the ids; a label is a position here (C of them).
        left_out: how many objects or images were left out, by reason.
    """

    path: Path
    images: list[Image]
    categories: list[tuple[int, str]]
    left_out: dict[str, int]

    def images_C(self) -> np.ndarray:
        """int64, number of images that show each category."""
        shown = [np.unique(image.labels_M) for image in self.images]
        return np.bincount(np.concatenate(shown), minlength=len(self.categories))

    def repeats(self, threshold: float) -> np.ndarray:
        """Repeat factor of every image (LVIS, arXiv 1908.03195): max(1, sqrt(threshold / f)) of its rarest
        category, f the share of images that show it."""
        share_C = np.maximum(self.images_C(), 1) / len(self.images)
        factor_C = np.maximum(1.0, np.sqrt(threshold / share_C))
        return np.array([factor_C[image.labels_M].max(initial=1.0) for image in self.images])


def read_coco(path: Path, images: Path, *, masks: bool, keep_empty: bool, lvis: bool = False) -> CocoSplit:
    """Reads a file of annotations.

    Crowds (`iscrowd`) are left out, boxes are clipped to their image, and what has no area left is left out.

    Args:
        images: directory of the image files.
        masks: objects without a segmentation are left out too.
        keep_empty: keep images on which nothing is left.
        lvis: LVIS v1's files, whose images are those of COCO: <images>/train2017/000000000001.jpg.

    Raises:
        UserError: no such file or directory, no JSON, a key that is missing, an id twice, an object of an unknown
            image or category, sizes that are no numbers, nothing to use.
    """
    content = _content(path, LVIS_REQUIRED if lvis else REQUIRED)
    for row in content["categories"] if lvis else ():
        if row["frequency"] not in FREQUENCIES:
            raise UserError(f"{path}: category {row['id']} has frequency {row['frequency']!r}; needed: r, c or f")
    if not images.is_dir():
        raise UserError(f"--data: got {images}, which is no directory; needed: the images of {path.name}")
    categories = sorted((int(row["id"]), str(row["name"])) for row in content["categories"])
    numbers = {number: label for label, (number, _) in enumerate(categories)}
    rows = _unique(content["images"], path, "images")
    left_out: Counter[str] = Counter()
    kept: dict[Any, list[tuple[np.ndarray, int, Any]]] = {number: [] for number in rows}
    _unique(content["annotations"], path, "annotations")
    for row in content["annotations"]:
        if row["image_id"] not in rows:
            raise UserError(f"{path}: annotation {row['id']} is of image {row['image_id']}, which is not in the file")
        if row["category_id"] not in numbers:
            raise UserError(
                f"{path}: annotation {row['id']} has category {row['category_id']}; needed: one of the file's "
                f"{len(numbers)} categories"
            )
        box, reason = _box(row, rows[row["image_id"]], masks=masks)
        if box is None:
            left_out[reason] += 1
        else:
            kept[row["image_id"]].append((box, numbers[row["category_id"]], row.get("segmentation")))
    found = []
    for number, row in rows.items():
        objects = kept[number]
        if not objects and not keep_empty:
            left_out["images without objects"] += 1
            continue
        found.append(_image(number, row, objects, images))
    if not found:
        raise UserError(f"{path}: no image with an object to use; needed: at least one")
    return CocoSplit(path=path, images=found, categories=categories, left_out=dict(left_out))


def read_pixels(image: Image) -> np.ndarray:
    """The image as uint8 RGB (H, W, 3), in the orientation that its annotations are in.

    Its EXIF orientation is applied unless only the stored orientation has the annotated size.

    Raises:
        ValueError: missing, damaged, or of another size than annotated.
    """
    try:
        data = image.path.read_bytes()
        pixels_HW3 = decode_rgb(data)
    except (OSError, ValueError) as error:
        raise ValueError(f"{image.path}: {error.strerror if isinstance(error, OSError) else error}") from None
    wanted = (image.height, image.width)
    if pixels_HW3.shape[:2] != wanted:
        upright, pixels_HW3 = pixels_HW3.shape[:2], decode_rgb(data, upright=False)
        if pixels_HW3.shape[:2] != wanted:
            raise ValueError(
                f"{image.path}: got {upright[0]} x {upright[1]} pixels, annotated {wanted[0]} x {wanted[1]}"
            )
    return pixels_HW3


def object_mask(segmentation: Any, *, height: int, width: int) -> np.ndarray:
    """Polygons, or compressed or uncompressed run lengths -> bool (H, W). ValueError on anything else."""
    from pycocotools import mask as coder

    try:
        if isinstance(segmentation, list):
            coded = coder.merge(coder.frPyObjects(segmentation, height, width))
        elif isinstance(segmentation["counts"], list):
            coded = coder.frPyObjects(segmentation, height, width)
        else:
            coded = segmentation
        mask_HW = coder.decode(coded).astype(bool)
    except Exception as error:
        raise ValueError(
            f"segmentation: got {str(segmentation)[:60]} ({error}); needed: polygons or run lengths"
        ) from None
    if mask_HW.shape != (height, width):
        raise ValueError(f"segmentation: got a mask of {mask_HW.shape}, needed {(height, width)}")
    return mask_HW


def _content(path: Path, required: dict[str, tuple[str, ...]]) -> dict[str, list[dict[str, Any]]]:
    if not path.is_file():
        raise UserError(f"--data: {path} does not exist; needed: annotations in COCO's format")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}); needed: annotations in COCO's format") from None
    for part, keys in required.items():
        rows = content.get(part) if isinstance(content, dict) else None
        if not isinstance(rows, list):
            raise UserError(f"{path} has no list `{part}`; needed: annotations in COCO's format")
        for row in rows:
            if missing := [key for key in keys if not isinstance(row, dict) or key not in row]:
                raise UserError(f"{path}: an entry of {part} has no `{missing[0]}`: {str(row)[:60]}")
    return content


def _unique(rows: list[dict[str, Any]], path: Path, part: str) -> dict[Any, dict[str, Any]]:
    found = {row["id"]: row for row in rows}
    if len(found) != len(rows):
        twice = next(number for number, count in Counter(row["id"] for row in rows).items() if count > 1)
        raise UserError(f"{path}: id {twice} is in {part} twice; needed: every id once")
    return found


def _box(row: dict[str, Any], image: dict[str, Any], *, masks: bool) -> tuple[np.ndarray | None, str]:
    """The clipped box, or None and why the object is left out."""
    if row.get("iscrowd"):
        return None, "crowds"
    try:
        left, top, width, height = map(float, row["bbox"])
    except (TypeError, ValueError):
        return None, "boxes that are not four numbers"
    box = np.array([left, top, left + width, top + height])
    if not np.isfinite(box).all():
        return None, "boxes that are not finite"
    limits = np.array([image["width"], image["height"]] * 2, float)
    box = box.clip(0, limits)
    if (box[2:] <= box[:2]).any():
        return None, "boxes without area inside their image"
    if masks and not row.get("segmentation"):
        return None, "objects without a segmentation"
    return box.astype(np.float32), ""


def _image(number: Any, row: dict[str, Any], objects: list[tuple[np.ndarray, int, Any]], images: Path) -> Image:
    return Image(
        id=number,
        path=images / (row["file_name"] if "file_name" in row else "/".join(row["coco_url"].split("/")[-2:])),
        height=int(row["height"]),
        width=int(row["width"]),
        boxes_M4=np.stack([box for box, _, _ in objects]) if objects else np.zeros((0, 4), np.float32),
        labels_M=np.array([label for _, label, _ in objects], np.int64),
        segmentations=[segmentation for _, _, segmentation in objects],
    )

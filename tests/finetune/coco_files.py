"""Small detection sets in COCO's format."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

CATEGORIES = [{"id": 7, "name": "red"}, {"id": 3, "name": "blue"}]  # not in the order of their ids
COLOURS = {7: (220, 20, 20), 3: (20, 20, 220)}


def scene(number: int, *, size: tuple[int, int] = (64, 80)) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """An RGB image with one to three coloured rectangles on grey, and their annotations without ids."""
    rng = np.random.default_rng(number)
    height, width = size
    image = np.full((height, width, 3), 128, np.uint8)
    found: list[dict[str, Any]] = []
    free = np.ones((height, width), bool)
    for _ in range(int(rng.integers(1, 4))):
        w, h = (int(v) for v in rng.integers(14, 30, 2))
        left, top = int(rng.integers(width - w)), int(rng.integers(height - h))
        if not free[top : top + h, left : left + w].all():
            continue
        free[top : top + h, left : left + w] = False
        category = int(rng.choice([7, 3]))
        image[top : top + h, left : left + w] = COLOURS[category]
        corners = [left, top, left + w, top, left + w, top + h, left, top + h]
        box = {"category_id": category, "bbox": [left, top, w, h], "area": w * h, "iscrowd": 0}
        found.append(box | {"segmentation": [[float(v) for v in corners]]})
    return image, found


def write_split(root: Path, name: str, number: int, *, first: int = 0, **size: Any) -> dict[str, Any]:
    """Images <root>/<name>/*.png and annotations/instances_<name>.json; returns what is in the latter."""
    (root / name).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": CATEGORIES}
    for index in range(number):
        image, objects = scene(first + index, **size)
        file = f"{index:04d}.png"
        cv2.imwrite(str(root / name / file), image[..., ::-1])
        height, width = image.shape[:2]
        content["images"].append({"id": 100 + index, "file_name": file, "height": height, "width": width})
        for row in objects:
            content["annotations"].append(row | {"id": len(content["annotations"]) + 1, "image_id": 100 + index})
    rewrite(root, name, content)
    return content


def rewrite(root: Path, name: str, content: Any) -> Path:
    path = root / "annotations" / f"instances_{name}.json"
    path.write_text(json.dumps(content))
    return path


def write_set(root: Path, *, train: int = 8, evaluated: int = 4) -> Path:
    write_split(root, "train", train)
    write_split(root, "val", evaluated, first=1000)
    return root


DATA = {
    "train": {"annotations": "annotations/instances_train.json", "images": "train"},
    "evaluated": {"annotations": "annotations/instances_val.json", "images": "val"},
}
HEAD: dict[str, Any] = {
    "masks": False,
    "width": 16,
    "rpn_convs": 1,
    "box_convs": 0,
    "box_width": 32,
    "anchors": [8, 16, 32, 64],
    "proposals": [60, 40],
    "rpn_samples": 32,
    "box_samples": 32,
    "detections": 10,
}


FREQUENCIES = {11: "r", 12: "c", 13: "f", 14: "f", 15: "r"}


def write_lvis(root: Path, name: str, number: int, *, first: int = 0) -> dict[str, Any]:
    """The same scenes as LVIS has them, in five categories: <name>2017/*.png and annotations/lvis_<name>.json."""
    rng = np.random.default_rng(first)
    content: dict[str, Any] = {"images": [], "annotations": []}
    content["categories"] = [{"id": k, "name": f"thing {k}", "frequency": f} for k, f in FREQUENCIES.items()]
    (root / f"{name}2017").mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    for index in range(number):
        image, objects = scene(first + index)
        file = f"{name}2017/{index:012d}.png"
        cv2.imwrite(str(root / file), image[..., ::-1])
        shown = {int(k) for k in rng.choice(list(FREQUENCIES), 2, replace=False)}
        absent = sorted(set(FREQUENCIES) - shown)
        content["images"].append(
            {
                "id": 100 + index,
                "coco_url": f"http://images.example.org/{file}",
                "height": image.shape[0],
                "width": image.shape[1],
                "neg_category_ids": [int(k) for k in absent[:2]],
                "not_exhaustive_category_ids": [min(shown)] if index % 3 == 0 else [],
            }
        )
        for row in objects:
            own = {"id": len(content["annotations"]) + 1, "image_id": 100 + index}
            kept = {k: row[k] for k in ("bbox", "area", "segmentation")}  # LVIS has no crowds
            content["annotations"].append(own | kept | {"category_id": int(rng.choice(sorted(shown)))})
    (root / "annotations" / f"lvis_{name}.json").write_text(json.dumps(content))
    return content


LVIS_DATA = {
    "format": "lvis",
    "repeat_threshold": 0.5,
    "train": {"annotations": "annotations/lvis_train.json", "images": "."},
    "evaluated": {"annotations": "annotations/lvis_val.json", "images": "."},
}

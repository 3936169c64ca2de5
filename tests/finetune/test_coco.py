"""Annotations in COCO's format, and what real files have in them."""

import json
import math
from pathlib import Path
from typing import Any

import coco_files
import cv2
import numpy as np
import pytest
from pycocotools import mask as coder
from pycocotools.coco import COCO

from m3i_large.errors import UserError
from m3i_large.finetune.detection.coco import object_mask, read_coco, read_pixels

Content = dict[str, Any]


@pytest.fixture()
def data(tmp_path: Path) -> tuple[Path, Content]:
    return tmp_path, coco_files.write_split(tmp_path, "train", 4)


def read(root: Path, content: Content | None = None, **more: Any) -> Any:
    path = root / "annotations/instances_train.json"
    if content is not None:
        path = coco_files.rewrite(root, "train", content)
    return read_coco(path, root / "train", **({"masks": True, "keep_empty": False} | more))


def test_it_reads_what_pycocotools_reads(data: tuple[Path, Content]) -> None:
    root, _ = data
    split, other = read(root), COCO(str(root / "annotations/instances_train.json"))
    assert split.categories == [(3, "blue"), (7, "red")] and split.left_out == {}
    assert [image.id for image in split.images] == sorted(other.imgs)
    for image in split.images:
        rows = other.loadAnns(other.getAnnIds(image.id))
        assert [split.categories[label][0] for label in image.labels_M] == [row["category_id"] for row in rows]
        boxes = np.array([row["bbox"] for row in rows], np.float32)
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_array_equal(image.boxes_M4, boxes)
        for segmentation, row in zip(image.segmentations, rows, strict=True):
            mask = object_mask(segmentation, height=image.height, width=image.width)
            np.testing.assert_array_equal(mask, other.annToMask(row).astype(bool))
            assert mask.sum() == row["area"]


def test_all_three_ways_to_write_a_mask() -> None:
    mask = np.zeros((12, 15), bool)
    mask[3:8, 4:11] = True
    compressed = coder.encode(np.asfortranarray(mask.astype(np.uint8)))
    text = {"size": [12, 15], "counts": compressed["counts"].decode()}
    flat = mask.ravel(order="F")
    ends = np.flatnonzero(np.diff(flat.astype(int))) + 1
    lengths = np.diff(np.concatenate([[0], ends, [flat.size]])).tolist()
    polygon = [[4, 3, 11, 3, 11, 8, 4, 8]]
    for segmentation in (text, {"size": [12, 15], "counts": lengths}, polygon):
        np.testing.assert_array_equal(object_mask(segmentation, height=12, width=15), mask)
    for wrong in ([[1, 2]], {"counts": 5, "size": [1, 1]}, 3, {"size": [4, 4], "counts": [8, 8]}):
        with pytest.raises(ValueError, match="segmentation"):
            object_mask(wrong, height=12, width=15)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bbox": [10, 10, 0, 5]}, "boxes without area inside their image"),
        ({"bbox": [200, 10, 5, 5]}, "boxes without area inside their image"),
        ({"bbox": [10, 10, -4, 5]}, "boxes without area inside their image"),
        ({"bbox": [10, 10, math.nan, 5]}, "boxes that are not finite"),
        ({"bbox": [10, 10, 5]}, "boxes that are not four numbers"),
        ({"bbox": "10 10 5 5"}, "boxes that are not four numbers"),
        ({"iscrowd": 1}, "crowds"),
        ({"segmentation": []}, "objects without a segmentation"),
    ],
)
def test_what_cannot_be_trained_on_is_left_out_and_counted(
    data: tuple[Path, Content], change: Content, reason: str
) -> None:
    root, content = data
    before = sum(len(image.labels_M) for image in read(root).images)
    content["annotations"][0] |= change
    split = read(root, content, keep_empty=True)
    assert split.left_out == {reason: 1}
    assert sum(len(image.labels_M) for image in split.images) == before - 1


def test_a_box_over_the_edge_is_clipped(data: tuple[Path, Content]) -> None:
    root, content = data
    content["annotations"][0]["bbox"] = [-5, -7, 20, 500]
    np.testing.assert_array_equal(read(root, content).images[0].boxes_M4[0], [0, 0, 15, 64])


def test_images_without_objects(data: tuple[Path, Content]) -> None:
    root, content = data
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] != 101]
    split = read(root, content)
    assert [image.id for image in split.images] == [100, 102, 103] and split.left_out == {"images without objects": 1}
    kept = read(root, content, keep_empty=True)
    assert len(kept.images) == 4 and kept.images[1].boxes_M4.shape == (0, 4) and kept.left_out == {}


def without(content: Content, part: str, key: str) -> Content:
    return content | {part: [{k: v for k, v in row.items() if k != key} for row in content[part]]}


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda c: [c], "has no list `images`"),
        (lambda c: c | {"annotations": {}}, "has no list `annotations`"),
        (lambda c: without(c, "annotations", "bbox"), "an entry of annotations has no `bbox`"),
        (lambda c: without(c, "images", "height"), "an entry of images has no `height`"),
        (lambda c: c | {"images": c["images"] + c["images"][:1]}, "id 100 is in images twice"),
        (lambda c: c | {"annotations": c["annotations"] + c["annotations"][:1]}, "id 1 is in annotations twice"),
        (lambda c: c | {"categories": c["categories"][1:]}, "has category 7; needed: one of the file's 1 categories"),
        (lambda c: c | {"images": c["images"][1:]}, "is of image 100, which is not in the file"),
        (lambda c: c | {"annotations": []}, "no image with an object"),
    ],
)
def test_what_cannot_be_meant_is_refused(data: tuple[Path, Content], spoil: Any, line: str) -> None:
    root, content = data
    with pytest.raises(UserError, match=line) as told:
        read(root, spoil(content))
    assert "\n" not in str(told.value)


def test_missing_files_are_named(data: tuple[Path, Content], tmp_path: Path) -> None:
    root, _ = data
    with pytest.raises(UserError, match=r"nothing\.json does not exist"):
        read_coco(root / "nothing.json", root / "train", masks=True, keep_empty=False)
    with pytest.raises(UserError, match="which is no directory"):
        read_coco(root / "annotations/instances_train.json", root / "images", masks=True, keep_empty=False)
    (root / "x.json").write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        read_coco(root / "x.json", root / "train", masks=True, keep_empty=False)
    image = read(root).images[0]
    image.path.unlink()
    with pytest.raises(ValueError, match="No such file"):
        read_pixels(image)


def test_unusual_pictures_become_rgb_of_the_annotated_size(data: tuple[Path, Content]) -> None:
    root, content = data
    rgb, _ = coco_files.scene(0)
    deep = rgb[..., ::-1].astype(np.uint16) * 257
    alpha = np.dstack([rgb[..., ::-1], np.full(rgb.shape[:2], 255, np.uint8)])
    for encoded in (deep, alpha, rgb[..., ::-1]):
        cv2.imwrite(str(root / "train/0000.png"), encoded)
        np.testing.assert_array_equal(read_pixels(read(root).images[0]), rgb)
    cv2.imwrite(str(root / "train/0000.png"), rgb[..., 0])
    assert read_pixels(read(root).images[0]).shape == rgb.shape
    content["images"][0]["height"] = 63
    with pytest.raises(ValueError, match="got 64 x 80 pixels, annotated 63 x 80"):
        read_pixels(read(root, content).images[0])


def test_cmyk_and_orientation(data: tuple[Path, Content]) -> None:
    from PIL import Image as Pillow

    root, content = data
    rgb, _ = coco_files.scene(0)
    picture = Pillow.fromarray(rgb)
    content["images"][0]["file_name"] = "x.jpg"
    picture.convert("CMYK").save(root / "train/x.jpg", quality=95)
    got = read_pixels(read(root, content).images[0])
    assert np.abs(got.astype(int) - rgb).mean() < 8
    # Stored lying on its side, as annotated; and stored upright, annotated as shown.
    exif = Pillow.Exif()
    exif[0x0112] = 6
    picture.save(root / "train/x.jpg", quality=95, exif=exif)
    assert np.abs(read_pixels(read(root, content).images[0]).astype(int) - rgb).mean() < 8
    content["images"][0] |= {"height": 80, "width": 64}
    shown = read_pixels(read(root, content).images[0]).astype(int)
    assert np.abs(shown - np.rot90(rgb, 3)).mean() < 8


def test_the_file_is_not_changed(data: tuple[Path, Content]) -> None:
    root, content = data
    read(root)
    assert json.loads((root / "annotations/instances_train.json").read_text()) == json.loads(json.dumps(content))

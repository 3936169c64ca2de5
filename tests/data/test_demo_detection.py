"""The composed detection set: annotations are what the pictures show, and splits share no drawing."""

import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from m3i_large.data.demo_detection import MAX_COVERED, SIZE, Drawing, build_demo_detection, compose, run_lengths
from m3i_large.data.drawings import read_concepts
from m3i_large.errors import UserError

SCENES = {"train": 4, "heldout": 3}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("detection") / "set"
    assert build_demo_detection(root, scenes=SCENES)
    return root


def test_an_independent_reader_finds_masks_boxes_and_areas_that_agree(root: Path) -> None:
    for split, number in SCENES.items():
        coco = COCO(str(root / f"annotations/instances_{split}.json"))
        assert len(coco.imgs) == number and len(coco.cats) == 8
        assert len(coco.anns) >= number
        for image in coco.loadImgs(coco.imgs):
            pixels = cv2.imread(str(root / split / image["file_name"]))
            assert pixels.shape == (image["height"], image["width"], 3) == (SIZE, SIZE, 3)
            masks = []
            for annotation in coco.loadAnns(coco.getAnnIds(image["id"])):
                mask = coco.annToMask(annotation).astype(bool)
                rows, columns = np.nonzero(mask)
                left, top, width, height = annotation["bbox"]
                assert (columns.min(), rows.min()) == (left, top)
                assert (columns.max() + 1, rows.max() + 1) == (left + width, top + height)
                assert mask.sum() == annotation["area"]
                masks.append(mask)
            assert np.sum(masks, 0).max() == 1, "visible masks do not overlap"


def test_masks_mark_what_was_painted() -> None:
    # One class each of a pure red and a pure blue square: no texture has these colours over a whole patch.
    red, blue = (np.full((40, 40, 4), 255, np.uint8) for _ in range(2))
    red[..., :2], blue[..., 1:3] = 0, 0
    for seed in range(6):
        scene, placed = compose([[[Drawing(red, 1)], [Drawing(blue, 2)]]], np.random.default_rng(seed))
        for item in placed:
            channel = {1: 2, 2: 0}[item.category]
            inside = scene[item.mask_HW].astype(int)
            assert np.median(inside[:, channel]) == 255
            assert np.median(np.delete(inside, channel, 1)) == 0
        assert placed


def test_little_of_an_object_is_covered() -> None:
    disc = np.zeros((60, 60, 4), np.uint8)
    cv2.circle(disc, (30, 30), 29, (0, 0, 255, 255), -1)
    for seed in range(12):
        _, placed = compose([[[Drawing(disc, 1)]]], np.random.default_rng(seed))
        for item in placed:
            # Covering takes nothing from the box of a disc by much: its area is known from its sides.
            rows, columns = np.nonzero(item.mask_HW)
            side = max(np.ptp(rows), np.ptp(columns)) + 1
            assert item.mask_HW.sum() >= (1 - MAX_COVERED) * np.pi / 4 * (side - 2) ** 2 * 0.8


def test_run_lengths_are_read_back_by_pycocotools() -> None:
    from pycocotools import mask as coder

    rng = np.random.default_rng(0)
    for shape in ((1, 1), (3, 5), (7, 2)):
        for mask in (rng.random(shape) < 0.5, np.zeros(shape, bool), np.ones(shape, bool)):
            coded = coder.frPyObjects({"size": list(shape), "counts": run_lengths(mask)}, *shape)
            assert (coder.decode(coded) == mask).all()


def test_splits_share_no_thing() -> None:
    families = {split: {c.family for c in read_concepts() if c.split == split} for split in ("train", "heldout")}
    assert families["train"] and families["heldout"]
    assert not families["train"] & families["heldout"]


def test_two_builds_are_identical_and_a_finished_one_is_kept(root: Path, tmp_path: Path) -> None:
    def digest(directory: Path) -> dict[str, str]:
        files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
        return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    assert build_demo_detection(tmp_path / "again", scenes=SCENES)
    assert digest(root) == digest(tmp_path / "again")
    assert not build_demo_detection(root, scenes=SCENES)
    assert "CC BY-SA" in (root / "LICENSES.md").read_text()


def test_anything_else_in_its_place_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needed"):
        build_demo_detection(root, scenes={"train": 5})
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="something else"):
        build_demo_detection(tmp_path, scenes=SCENES)
    assert json.loads((root / "manifest.json").read_text())["scenes"] == SCENES

"""Average precision by hand and by a second library; result files as COCO's server takes them."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import coco_files
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from m3i_large.finetune.detection.batch import Detections
from m3i_large.finetune.detection.coco import CocoSplit, read_coco
from m3i_large.finetune.detection.scores import score_coco, server_rows


@pytest.fixture()
def split(tmp_path: Path) -> CocoSplit:
    coco_files.write_split(tmp_path, "val", 12)
    return read_coco(tmp_path / "annotations/instances_val.json", tmp_path / "val", masks=True, keep_empty=True)


def detections(boxes: Any, labels: Any, scores: Any, masks: Any = None) -> Detections:
    return Detections(
        boxes_K4=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels_K=torch.tensor(labels, dtype=torch.int64),
        scores_K=torch.tensor(scores, dtype=torch.float32),
        masks_Kmm=masks,
    )


def guesses(split: CocoSplit, *, scale: float = 1.0) -> list[dict[str, Any]]:
    """Shifted boxes, some of a wrong class, some missing, some that are nowhere."""
    rng, rows = np.random.default_rng(0), []
    for image in split.images:
        boxes, labels = [], []
        for box, label in zip(image.boxes_M4, image.labels_M, strict=True):
            if rng.random() < 0.85:
                boxes.append(box + rng.normal(0, 1.5, 4))
                labels.append(int(label) if rng.random() < 0.8 else 1 - int(label))
        boxes.append(np.array([3, 3, 20, 20.0]))
        labels.append(0)
        masks = torch.ones(len(boxes), 28, 28, dtype=torch.float16)
        found = detections(np.array(boxes) * scale, labels, rng.random(len(boxes)), masks)
        rows += server_rows(found, image, scale=(scale, scale), categories=split.categories)
    return rows


def test_scores_are_pycocotools(split: CocoSplit, tmp_path: Path) -> None:
    rows = guesses(split)
    got = score_coco(split, rows, tmp_path / "results", masks=True, detections=100)
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(str(split.path))
            judged = COCOeval(truth, truth.loadRes(str(tmp_path / f"results/results_{kind}.json")), kind)
            judged.evaluate()
            judged.accumulate()
            judged.summarize()
        for figure, value in zip(("AP", "AP50", "AP75", "APs"), judged.stats[:4], strict=True):
            assert got[f"{name}/{figure}"] == pytest.approx(value, abs=1e-9), figure
        assert 0.1 < got[f"{name}/AP"] < 0.9
    assert "box/APl" not in got, "there is no large object"


def test_the_detectors_scale_is_undone(split: CocoSplit, tmp_path: Path) -> None:
    one = score_coco(split, guesses(split), tmp_path / "a", masks=True, detections=100)
    two = score_coco(split, guesses(split, scale=2.5), tmp_path / "b", masks=True, detections=100)
    assert two == pytest.approx(one, abs=2e-3)


def test_average_precision_by_hand(split: CocoSplit, tmp_path: Path) -> None:
    """One class asked for: found at rank 1, a mistake at rank 2, found at rank 3, of n objects. Interpolated precision
    is 1 up to recall 1/n and 2/3 up to 2/n; 101 recall levels."""
    blue = [
        (image, box) for image in split.images for box, x in zip(image.boxes_M4, image.labels_M, strict=True) if x == 0
    ]
    red = sum(int((image.labels_M == 1).sum()) for image in split.images)
    rows: list[dict[str, Any]] = []
    for (image, box), score in zip(blue[:2], (0.9, 0.7), strict=True):
        rows += server_rows(detections([box], [0], [score]), image, scale=(1, 1), categories=split.categories)
    nowhere = detections([[0, 0, 3, 3]], [0], [0.8])
    rows += server_rows(nowhere, blue[0][0], scale=(1, 1), categories=split.categories)
    got = score_coco(split, rows, tmp_path / "results", masks=False, detections=100)
    levels = np.linspace(0, 1, 101)
    precision = np.where(levels <= 1 / len(blue), 1.0, np.where(levels <= 2 / len(blue), 2 / 3, 0.0))
    assert red > 0 and got["box/AP"] == pytest.approx((precision.mean() + 0) / 2, abs=1e-6)


def test_rows_are_the_servers(split: CocoSplit) -> None:
    image = split.images[0]
    found = detections([[-4.0, 2.0, 1000.0, 20.004]], [1], [0.123456789], torch.ones(1, 28, 28, dtype=torch.float16))
    (row,) = server_rows(found, image, scale=(1, 1), categories=split.categories)
    assert row["image_id"] == 100 and row["category_id"] == 7
    assert row["bbox"] == [0, 2, 80, 18] and row["score"] == 0.12346
    assert row["segmentation"]["size"] == [64, 80] and isinstance(row["segmentation"]["counts"], str)
    json.dumps(row)


def test_nothing_found_is_zero_and_files_are_there(split: CocoSplit, tmp_path: Path) -> None:
    got = score_coco(split, [], tmp_path / "results", masks=True, detections=100)
    assert got["box/AP"] == got["mask/AP"] == 0
    assert json.loads((tmp_path / "results/results_bbox.json").read_text()) == []


def test_keys_that_files_leave_out_are_filled_in(split: CocoSplit, tmp_path: Path) -> None:
    whole = score_coco(split, guesses(split), tmp_path / "a", masks=False, detections=100)
    content = json.loads(split.path.read_text())
    for row in content["annotations"]:
        del row["iscrowd"], row["area"]
    split.path.write_text(json.dumps(content))
    assert score_coco(split, guesses(split), tmp_path / "b", masks=False, detections=100) == whole

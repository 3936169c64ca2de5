"""LVIS: its files, repeat factors and federated loss written out, its scores by brute force."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import coco_files
import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from m3i_large.errors import UserError
from m3i_large.finetune.detection.coco import CocoSplit, read_coco, read_pixels
from m3i_large.finetune.detection.federated import PRIOR, federated_loss
from m3i_large.finetune.detection.scores import score_coco

THRESHOLDS = np.linspace(0.5, 0.95, 10)


@pytest.fixture()
def given(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    return tmp_path, coco_files.write_lvis(tmp_path, "val", 30)


def read(root: Path, content: Any = None, *, masks: bool = True) -> CocoSplit:
    path = root / "annotations/lvis_val.json"
    if content is not None:
        path.write_text(json.dumps(content))
    return read_coco(path, root, masks=masks, keep_empty=True, lvis=True)


def test_images_are_found_by_their_url(given: tuple[Path, dict[str, Any]]) -> None:
    root, content = given
    split = read(root)
    assert [name for name, _ in split.categories] == [11, 12, 13, 14, 15]
    assert split.images[3].path == root / "val2017/000000000003.png"
    assert read_pixels(split.images[3]).shape == (64, 80, 3)
    assert sum(len(image.labels_M) for image in split.images) == len(content["annotations"])


@pytest.mark.parametrize(
    ("part", "key", "value", "line"),
    [
        ("categories", "frequency", "x", "category 11 has frequency 'x'; needed: r, c or f"),
        ("categories", "frequency", None, "an entry of categories has no `frequency`"),
        ("images", "coco_url", None, "an entry of images has no `coco_url`"),
        ("images", "neg_category_ids", None, "an entry of images has no `neg_category_ids`"),
    ],
)
def test_a_file_of_another_kind_is_refused(
    given: tuple[Path, dict[str, Any]], part: str, key: str, value: Any, line: str
) -> None:
    root, content = given
    content[part][0] |= {key: value}
    if value is None:
        del content[part][0][key]
    with pytest.raises(UserError, match=line):
        read(root, content)


def test_repeat_factors_written_out(given: tuple[Path, dict[str, Any]]) -> None:
    root, content = given
    split, threshold = read(root), 0.4
    shown = {row["id"]: set() for row in content["images"]}
    for row in content["annotations"]:
        shown[row["image_id"]].add(row["category_id"])
    counts = Counter(k for found in shown.values() for k in found)
    assert split.images_C().tolist() == [counts[k] for k in sorted(coco_files.FREQUENCIES)]
    wanted = [max([1.0, *(math.sqrt(threshold / (counts[k] / len(shown))) for k in found)]) for found in shown.values()]
    assert split.repeats(threshold).tolist() == pytest.approx(wanted)
    assert max(wanted) > 1.05 and min(wanted) == 1.0


def longhand_loss(logit: Tensor, label: Tensor, categories: set[int]) -> float:
    total = 0.0
    for row, own in zip(logit.tolist(), label.tolist(), strict=True):
        for k in categories:
            probability = 1 / (1 + math.exp(-row[k]))
            total -= math.log(probability if own == k + 1 else 1 - probability)
    return total / len(logit)


def test_the_federated_loss_written_out() -> None:
    torch.manual_seed(0)
    logit, label = torch.randn(9, 6).double().requires_grad_(), torch.tensor([0, 0, 3, 3, 1, 0, 0, 0, 0])
    only_one_left = torch.tensor([5.0, 0, 7, 0, 2, 0])  # of those that no proposal has, 4 alone may be drawn
    got = federated_loss(logit, label, weight_C=only_one_left, num_categories=5)
    assert got.item() == pytest.approx(longhand_loss(logit, label, {0, 2, 4}), rel=1e-9)
    got.backward()
    assert (logit.grad[:, [1, 3, 5]] == 0).all() and (logit.grad[:, [0, 2, 4]] != 0).all()
    # As many as asked for are there already: none is drawn.
    got = federated_loss(logit, label, weight_C=only_one_left, num_categories=2)
    assert got.item() == pytest.approx(longhand_loss(logit, label, {0, 2}), rel=1e-9)
    # No proposal: no NaN.
    assert federated_loss(logit[:0], label[:0], weight_C=only_one_left, num_categories=2).item() == 0


def test_categories_are_drawn_in_proportion_to_their_weights() -> None:
    torch.manual_seed(0)
    logit, label = torch.zeros(1, 4, requires_grad=True), torch.tensor([1])
    drawn, weight_C = torch.zeros(4), torch.tensor([9.0, 1, 2, 5])
    for _ in range(2000):
        (grad,) = torch.autograd.grad(federated_loss(logit, label, weight_C=weight_C, num_categories=2), logit)
        drawn += (grad[0] != 0).float()
    assert drawn[0] == 2000
    assert (drawn[1:] / 2000 - torch.tensor([1, 2, 5]) / 8).abs().max() < 0.04


def guesses(split: CocoSplit) -> list[dict[str, Any]]:
    """Right and wrong detections of every category."""
    rng, rows, ids = np.random.default_rng(1), [], [number for number, _ in split.categories]
    for image in split.images:
        found = [
            (box + rng.normal(0, 2, 4), int(label if rng.random() < 0.8 else rng.integers(5)))
            for box, label in zip(image.boxes_M4, image.labels_M, strict=True)
        ]
        found += [(np.array([4, 4, 30, 30]) + rng.normal(0, 3, 4), int(k)) for k in rng.integers(0, 5, 3)]
        for (x0, y0, x1, y1), label in found:
            box = [float(v) for v in (x0, y0, x1 - x0, y1 - y0)]
            score = float(rng.random())
            rows.append({"image_id": image.id, "category_id": ids[label], "bbox": box, "score": score})
    return rows


def brute_force(content: dict[str, Any], rows: list[dict[str, Any]]) -> dict[int, float | None]:
    """Average precision of each category by LVIS's rules: no library, one decision after the other."""

    def corners(row: dict[str, Any]) -> list[float]:
        x, y, w, h = row["bbox"]
        return [x, y, x + w, y + h]

    out: dict[int, float | None] = {}
    for category in (row["id"] for row in content["categories"]):
        truth = {image["id"]: [] for image in content["images"]}
        for row in content["annotations"]:
            if row["category_id"] == category:
                truth[row["image_id"]].append(corners(row))
        if not any(truth.values()):
            out[category] = None
            continue
        images = {image["id"]: image for image in content["images"]}
        own = [row for row in rows if row["category_id"] == category]
        own = [r for r in own if truth[r["image_id"]] or category in images[r["image_id"]]["neg_category_ids"]]
        own.sort(key=lambda row: -row["score"])
        precisions = []
        for threshold in THRESHOLDS:
            taken: set[tuple[int, int]] = set()
            right: list[bool] = []
            for row in own:
                best, at = threshold, None
                for index, box in enumerate(truth[row["image_id"]]):
                    overlap = float(box_iou(torch.tensor([corners(row)]), torch.tensor([box]))[0, 0])
                    if (row["image_id"], index) not in taken and overlap >= best:
                        best, at = overlap, index
                if at is not None:
                    taken.add((row["image_id"], at))
                    right.append(True)
                elif category not in images[row["image_id"]]["not_exhaustive_category_ids"]:
                    right.append(False)
            hits = np.cumsum(right)
            recall = hits / sum(map(len, truth.values()))
            precision = hits / np.arange(1, len(right) + 1)
            at_recall = [
                max([p for p, r in zip(precision, recall, strict=True) if r >= level], default=0.0)
                for level in np.linspace(0, 1, 101)
            ]
            precisions.append(np.mean(at_recall))
        out[category] = float(np.mean(precisions))
    return out


def test_scores_are_lvis_by_brute_force(given: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    root, content = given
    split = read(root)
    rows = guesses(split)
    by_category = brute_force(content, rows)
    got = score_coco(split, rows, tmp_path / "out", masks=False, detections=300, lvis=True)
    for name, group in (("AP", "rcf"), ("APr", "r"), ("APc", "c"), ("APf", "f")):
        wanted = [v for k, v in by_category.items() if coco_files.FREQUENCIES[k] in group and v is not None]
        assert got[f"box/{name}"] == pytest.approx(np.mean(wanted), abs=1e-4), name
    # By COCO's rules they are others, so the rules of LVIS are there.
    coco = score_coco(split, rows, tmp_path / "out", masks=False, detections=300)
    assert coco["box/AP"] < got["box/AP"] - 0.01 and "box/APr" not in coco
    assert json.loads((tmp_path / "out/results_bbox.json").read_text()) == rows


def test_a_category_without_objects_counts_for_no_figure(given: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    root, content = given
    content["annotations"] = [row for row in content["annotations"] if row["category_id"] not in (11, 15)]
    split = read(root, content)
    got = score_coco(split, guesses(split), tmp_path / "out", masks=False, detections=300, lvis=True)
    assert "box/APr" not in got and got["box/APf"] > 0


def test_a_detector_of_sigmoids_begins_at_the_prior_and_keeps_no_graph() -> None:
    from m3i_large.finetune.detection.batch import DetectionBatch, Target
    from m3i_large.finetune.detection.config import RcnnConfig
    from m3i_large.finetune.detection.rcnn import RCNN
    from m3i_large.models import create_model

    torch.manual_seed(0)
    backbone = create_model("vit", image_size=32, patch_size=8, width=16, depth=1, heads=2)
    head = RcnnConfig.model_validate(
        coco_files.HEAD | {"classifier": "federated", "federated_categories": 3, "min_score": 0.0, "detections": 7}
    )
    images_C = torch.tensor([100.0, 1, 9, 4])
    model = RCNN(backbone, head, images_C=images_C, mean=(0.5,) * 3, std=(0.25,) * 3)
    assert model.heads.weight_C.tolist() == [10, 1, 3, 2]
    target = Target(boxes_M4=torch.tensor([[4.0, 4, 30, 30]]), labels_M=torch.tensor([2]))
    image = torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8)
    sizes = torch.tensor([[64, 64], [50, 60]])
    losses = model(DetectionBatch(image_BCHW=image, size_B2=sizes, targets=(target, target)))
    # Three categories' sigmoids at the prior: nearly -3 log(1 - prior) for a background, more for an object.
    assert 3 * -math.log(1 - PRIOR) * 0.9 < losses["classifier"].item() < -math.log(PRIOR)
    sum(losses.values()).backward()
    assert model.heads._logit_PC is None
    model.eval()
    with torch.no_grad():
        found = model(DetectionBatch(image_BCHW=image, size_B2=sizes))
    for one, (height, width) in zip(found, sizes.tolist(), strict=True):
        assert len(one.scores_K) == 7 and set(one.labels_K.tolist()) <= set(range(4))
        assert (one.scores_K.diff() <= 0).all() and abs(one.scores_K[0] - PRIOR) < 0.01
        assert (one.boxes_K4 >= 0).all() and (one.boxes_K4[:, [0, 2]] <= width).all()
        assert (one.boxes_K4[:, [1, 3]] <= height).all()

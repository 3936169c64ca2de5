"""Segmentation: one geometry for images and labels, figures by brute force, both backbones through the launcher."""

import itertools
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tuned
import written
from tiny import launch
from torch import nn

from m3i_large.errors import UserError
from m3i_large.finetune.segmentation.config import AugmentConfig, SegmentationConfig, UPerNetConfig
from m3i_large.finetune.segmentation.images import UNLABELLED, Images, Sample, augmented, cropped, recoloured, resized
from m3i_large.finetune.segmentation.model import SegmentationBatch, UPerNet, _starts, pixel_loss
from m3i_large.finetune.segmentation.task import SegmentationTask, figures
from m3i_large.metrics import read_rows
from m3i_large.models import create_model

COLOURS = np.array([(200, 30, 30), (20, 190, 40), (30, 40, 200)], np.uint8)
HEAD = {"width": 16, "maps": 16, "auxiliary_width": 8}


def scene(number: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """RGB of three colours in rectangles, and labels 1 to 3, 0 in a corner that nobody labelled."""
    rng = np.random.default_rng(number)
    label = np.full(size, 1 + rng.integers(3), np.uint8)
    for _ in range(4):
        top, left = (int(rng.integers(side - 16)) for side in size)
        label[top : top + int(rng.integers(12, 40)), left : left + int(rng.integers(12, 40))] = 1 + rng.integers(3)
    image = COLOURS[label - 1]
    label[:6, :6] = 0
    return image, label


def write_set(root: Path, *, train: int = 6, evaluated: int = 3, size: tuple[int, int] = (70, 90)) -> Path:
    for split, count, first in (("training", train, 0), ("validation", evaluated, 100)):
        (root / "images" / split).mkdir(parents=True)
        (root / "annotations" / split).mkdir(parents=True)
        for index in range(count):
            image, label = scene(first + index, size)
            cv2.imwrite(str(root / f"images/{split}/{index:04d}.png"), image[..., ::-1])
            cv2.imwrite(str(root / f"annotations/{split}/{index:04d}.png"), label)
    return root


def task_on(root: Path, **augment: Any) -> SegmentationTask:
    config = {"data": {"num_classes": 3}, "augment": {"size": 64} | augment, "head": HEAD}
    return SegmentationTask(SegmentationConfig.model_validate(config), data=root)


def test_images_and_labels_go_through_the_same_geometry() -> None:
    """The colour of a pixel tells its label; edges alone may differ after scaling."""
    image, label = scene(3, (70, 90))
    sample = Sample(image_HW3=image, label_HW=np.where(label == 0, UNLABELLED, label - 1), size=label.shape)
    for seed in range(30):
        out = augmented(sample, AugmentConfig(size=64, colour=0.0), np.random.default_rng(seed))
        assert out.image_HW3.shape[:2] == out.label_HW.shape and max(out.label_HW.shape) <= 64
        nearest = np.abs(out.image_HW3[:, :, None].astype(int) - COLOURS).sum(3).argmin(2)
        inside = cv2.erode((out.label_HW[..., None] == range(3)).astype(np.uint8), np.ones((3, 3))).any(2)
        assert (nearest == out.label_HW)[inside].all() and inside.mean() > 0.5
    again = augmented(sample, AugmentConfig(size=64), np.random.default_rng(5))
    assert (again.image_HW3 == augmented(sample, AugmentConfig(size=64), np.random.default_rng(5)).image_HW3).all()


def test_sizes() -> None:
    sample = Sample(image_HW3=np.zeros((50, 100, 3), np.uint8), label_HW=np.zeros((50, 100), np.uint8), size=(50, 100))
    evaluated = resized(sample, shorter=64, labels=False)
    assert evaluated.image_HW3.shape == (64, 128, 3) and evaluated.label_HW.shape == (50, 100)
    assert resized(sample, shorter=64, factor=0.5).label_HW.shape == (32, 64)


def test_crops_of_one_class_are_drawn_again() -> None:
    label = np.zeros((64, 640), np.uint8)
    label[:, 600:] = 1
    sample = Sample(image_HW3=np.zeros((64, 640, 3), np.uint8), label_HW=label, size=label.shape)
    config = AugmentConfig(size=64, largest=0.75)
    mixed = [len(np.unique(cropped(sample, config, np.random.default_rng(s)).label_HW)) == 2 for s in range(200)]
    # One crop in nine shows both classes; ten tries find one that no class covers in about a third of the cases.
    assert 0.3 < np.mean(mixed) < 0.9
    assert np.mean(mixed) > 2 * np.mean([540 < left < 600 for left in range(577)])


def test_colours_change_by_their_probability() -> None:
    image = scene(1, (32, 32))[0]
    assert (recoloured(image, 0.0, np.random.default_rng(0)) == image).all()
    changed = recoloured(image, 1.0, np.random.default_rng(0))
    assert changed.dtype == np.uint8 and changed.shape == image.shape and (changed != image).mean() > 0.5


def test_figures_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    label, found = rng.integers(0, 4, 500), rng.integers(0, 5, 500)  # 4 is predicted only; 5 never occurs
    confusion = np.zeros((6, 6), np.int64)
    np.add.at(confusion, (label, found), 1)
    ious, accuracies = [], []
    for k in range(5):
        both, either = np.sum((label == k) & (found == k)), np.sum((label == k) | (found == k))
        ious.append(both / either)
        if (label == k).any():
            accuracies.append(both / np.sum(label == k))
    got = figures(confusion)
    assert got["mIoU"] == pytest.approx(np.mean(ious))
    assert got["mean_accuracy"] == pytest.approx(np.mean(accuracies)) and len(accuracies) == 4
    assert got["accuracy"] == pytest.approx(np.mean(label == found))


def test_a_perfect_prediction_scores_one_and_its_files_are_the_labels(tmp_path: Path) -> None:
    task = task_on(write_set(tmp_path / "data"))
    digests = {}
    for index in range(3):
        label = task.evaluated.images.read(index).label_HW
        digests[index] = task.digest(index, torch.from_numpy(np.where(label == UNLABELLED, 0, label)))
    got = task.score(digests, tmp_path / "out")
    assert got == {"mIoU": 1.0, "accuracy": 1.0, "mean_accuracy": 1.0}
    for index in range(3):
        mine = cv2.imread(str(tmp_path / f"out/{index:04d}.png"), cv2.IMREAD_UNCHANGED)
        theirs = cv2.imread(str(tmp_path / f"data/annotations/validation/{index:04d}.png"), cv2.IMREAD_UNCHANGED)
        assert (mine == theirs)[theirs != 0].all() and mine.shape == (70, 90)


def test_the_loss_leaves_out_what_nobody_labelled() -> None:
    torch.manual_seed(0)
    logit, label = torch.randn(2, 3, 4, 6), torch.randint(0, 3, (2, 8, 12))
    label[0, :3], label[1, 5:, 4:] = UNLABELLED, UNLABELLED
    large = F.interpolate(logit, (8, 12), mode="bilinear", align_corners=False).log_softmax(1)
    picked = [
        -large[b, label[b, y, x], y, x].item()
        for b, y, x in itertools.product(range(2), range(8), range(12))
        if label[b, y, x] != UNLABELLED
    ]
    assert pixel_loss(logit, label).item() == pytest.approx(np.mean(picked), rel=1e-5)
    assert pixel_loss(logit, torch.full_like(label, UNLABELLED)).item() == 0


@pytest.mark.parametrize(("length", "window"), [(64, 64), (40, 64), (65, 64), (150, 64), (683, 512), (2048, 512)])
def test_windows_cover_everything_and_overlap(length: int, window: int) -> None:
    starts = _starts(length, window)
    assert starts[0] == 0 and (length <= window or starts[-1] == length - window)
    assert all(0 < b - a <= window * 2 / 3 + 1 for a, b in itertools.pairwise(starts))


def network(backbone: str, **head: Any) -> UPerNet:
    torch.manual_seed(0)
    arch: dict[str, Any] = {"image_size": 64, "patch_size": 8, "width": 32, "depth": 2, "heads": 2}
    if backbone == "internimage":
        arch = {"image_size": 64, "channels": 8, "depths": [1, 1, 1, 1], "groups": [1, 2, 4, 8]}
    config = UPerNetConfig.model_validate(HEAD | head)
    pixels = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    return UPerNet(create_model(backbone, **arch), config, num_classes=3, size=64, **pixels)


@pytest.mark.parametrize("backbone", ["vit", "internimage"])
def test_every_parameter_learns_and_predictions_have_the_files_size(backbone: str) -> None:
    model = network(backbone)
    image = torch.randint(0, 255, (2, 3, 64, 96), dtype=torch.uint8)
    sizes, files = torch.tensor([[64, 90], [50, 64]]), torch.tensor([[128, 180], [25, 32]])
    label = torch.randint(0, 3, (2, 64, 96), dtype=torch.uint8)
    losses = model(SegmentationBatch(image_BCHW=image, size_B2=sizes, file_B2=files, label_BHW=label))
    assert losses.keys() == {"pixel", "auxiliary"}
    sum(losses.values()).backward()
    assert {n for n, p in model.named_parameters() if p.grad is None} <= {"backbone.cls_token"}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    with torch.no_grad():
        found = model.eval()(SegmentationBatch(image_BCHW=image, size_B2=sizes, file_B2=files))
    assert [tuple(x.shape) for x in found] == [(128, 180), (25, 32)] and found[0].dtype == torch.uint8
    assert "auxiliary_head" not in dict(network(backbone, auxiliary=0.0).named_children())


def test_windows_are_averaged_where_they_overlap() -> None:
    """A head that answers by its window's first pixel: the mean of the windows over each pixel, by hand."""
    model = network("vit", windows=True).eval()
    model._head = lambda image: image[:, :1, :1, :1].expand(-1, 3, 16, 16)  # type: ignore[method-assign]
    image = torch.rand(1, 3, 64, 150)
    got = model._logits(image)
    for column in (0, 30, 60, 90, 149):
        values = [image[0, 0, 0, left].item() for left in _starts(150, 64) if left <= column < left + 64]
        assert got[0, 1, 5, column].item() == pytest.approx(np.mean(values), rel=1e-5)
    assert len(_starts(150, 64)) == 4


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda root: (root / "annotations/training/0002.png").unlink(), r"0002\.png has no labels"),
        (lambda root: (root / "images").rename(root / "pictures"), "which is no directory"),
        (lambda root: [p.unlink() for p in (root / "images/training").iterdir()], "has no image"),
    ],
)
def test_data_that_cannot_be_meant(tmp_path: Path, spoil: Any, line: str) -> None:
    spoil(write_set(tmp_path))
    with pytest.raises(UserError, match=line):
        task_on(tmp_path)


@pytest.mark.parametrize(
    ("label", "line"),
    [
        (np.full((70, 90), 4, np.uint8), "got label 4; needed: 1 to 3"),
        (np.ones((70, 91), np.uint8), "needed: the image's"),
        (np.ones((70, 90, 3), np.uint8), "got 3 channels; needed: a PNG of one channel"),
    ],
)
def test_labels_that_cannot_be_meant(tmp_path: Path, label: np.ndarray, line: str) -> None:
    write_set(tmp_path)
    cv2.imwrite(str(tmp_path / "annotations/training/0001.png"), label)
    with pytest.raises(ValueError, match=line):
        task_on(tmp_path).train.read(1, None)


def test_labels_that_count_from_zero(tmp_path: Path) -> None:
    write_set(tmp_path)
    path = tmp_path / "annotations/training/0001.png"
    cv2.imwrite(str(path), np.tile(np.array([0, 2, 255], np.uint8), (70, 30)))
    split = SegmentationConfig().data.train
    got = Images(tmp_path, split, num_classes=3, first_label=0).read(1).label_HW
    assert np.unique(got).tolist() == [0, 2, UNLABELLED]


@pytest.mark.slow
def test_it_learns_colours_continues_and_runs_on_two_ranks(tmp_path: Path) -> None:
    write_set(tmp_path / "data")
    weights = tuned.write_weights(tmp_path, written.VIT)
    task = {"kind": "segmentation", "data": {"num_classes": 3}, "augment": {"size": 64}, "head": HEAD}
    recipe = tuned.write_recipe(tmp_path / "recipe.yaml", task)
    options = ["--data", tmp_path / "data", "--recipe", recipe, "--weights", weights]
    run = tmp_path / "first"

    def first() -> Any:
        return launch(tuned.command("segmentation", *options, "--out", run))

    done = first()
    assert done.returncode == 0, done.stderr
    (scored,) = read_rows(run / "eval.jsonl")
    assert scored["values"].keys() == {"mIoU", "accuracy", "mean_accuracy"} and scored["num_samples"] == 3
    assert len(list((run / "results/step_00000006").glob("*.png"))) == 3
    tuned.assert_continues(run, first)
    more = ["train.steps=30", "train.checkpoint_every=30", "train.ema=0", "optim.lr.peak=3e-3"]
    more += ["task.augment.colour=0", "task.head.windows=true", "--ds", tuned.ROOT / "ds_configs/zero3.json"]
    done = launch(tuned.command("segmentation", *options, *more, "--out", tmp_path / "two", ranks=2))
    assert done.returncode == 0, done.stderr
    assert read_rows(tmp_path / "two/eval.jsonl")[-1]["values"]["mIoU"] > 0.6

"""Boxes and masks follow the pixels: objects are painted, transformed, and found again in the picture."""

import numpy as np
import pytest

from m3i_large.finetune.detection.config import AugmentConfig
from m3i_large.finetune.detection.transforms import Sample, augmented, cropped, fitted, mirrored, resized


def painted(height: int = 60, width: int = 90) -> Sample:
    """Three rectangles, each in its own channel, so that each can be found by its colour."""
    image = np.zeros((height, width, 3), np.uint8)
    boxes = np.array([[5, 8, 30, 28], [40, 10, 75, 50], [12, 35, 36, 55]], np.float32)
    masks = np.zeros((3, height, width), bool)
    for number, (x0, y0, x1, y1) in enumerate(boxes.astype(int)):
        image[y0:y1, x0:x1, number] = 255
        masks[number, y0:y1, x0:x1] = True
    return Sample(image_HW3=image, boxes_M4=boxes, labels_M=np.arange(3), masks_MHW=masks)


def check(sample: Sample, *, tolerance: float) -> None:
    assert sample.masks_MHW is not None and sample.masks_MHW.shape[1:] == sample.image_HW3.shape[:2]
    for box, label, mask in zip(sample.boxes_M4, sample.labels_M, sample.masks_MHW, strict=True):
        rows, columns = np.nonzero(sample.image_HW3[..., label] > 127)
        seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(box, seen, atol=tolerance)
        shown = sample.image_HW3[..., label] > 127
        assert (mask & shown).sum() / (mask | shown).sum() > 0.9
    assert (sample.boxes_M4 >= 0).all()
    assert (sample.boxes_M4[:, [2, 3]] <= np.array(sample.image_HW3.shape[:2])[::-1]).all()


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.7])
def test_resizing(factor: float) -> None:
    sample = resized(painted(), size=96, factor=factor)
    assert max(sample.image_HW3.shape[:2]) == round(96 * factor)
    check(sample, tolerance=1.0)
    assert sample.scale == pytest.approx((sample.image_HW3.shape[1] / 90, sample.image_HW3.shape[0] / 60))


def test_mirroring_twice_changes_nothing() -> None:
    once = mirrored(painted())
    check(once, tolerance=0)
    np.testing.assert_array_equal(once.boxes_M4[0], [60, 8, 85, 28])
    twice = mirrored(once)
    np.testing.assert_array_equal(twice.image_HW3, painted().image_HW3)
    np.testing.assert_array_equal(twice.boxes_M4, painted().boxes_M4)


def test_cropping_clips_and_drops() -> None:
    sample = cropped(painted(), top=20, left=20, size=32, min_side=1)
    assert sample.image_HW3.shape == (32, 32, 3)
    check(sample, tolerance=0)
    assert sample.labels_M.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(sample.boxes_M4, [[0, 0, 10, 8], [20, 0, 32, 30], [0, 15, 16, 32]])
    sample = cropped(painted(), top=0, left=0, size=38, min_side=1)
    assert sample.labels_M.tolist() == [0, 2], "the second lies outside"
    assert cropped(painted(), top=0, left=0, size=38, min_side=3).labels_M.tolist() == [0], "the third is 3 pixels high"


def test_large_scale_jitter_keeps_everything_together() -> None:
    config = AugmentConfig(size=64, scale=(0.3, 2.0), flip=0.5)
    sides, kinds = [], set()
    for seed in range(60):
        sample = augmented(painted(), config, np.random.default_rng(seed))
        height, width = sample.image_HW3.shape[:2]
        assert height <= 64 and width <= 64
        if len(sample.labels_M):
            check(sample, tolerance=1.5)
        sides.append(width)
        kinds.add((len(sample.labels_M), width == 64))
        again = augmented(painted(), config, np.random.default_rng(seed))
        np.testing.assert_array_equal(again.image_HW3, sample.image_HW3)
    assert min(sides) < 30 and max(sides) == 64 and len(kinds) > 2


def test_flips_happen_as_often_as_said() -> None:
    config = AugmentConfig(size=96, scale=(1.0, 1.0), flip=0.25)
    left = [augmented(painted(), config, np.random.default_rng(s)).boxes_M4[0, 0] < 40 for s in range(400)]
    assert 0.68 < np.mean(left) < 0.82


def test_evaluation_only_scales() -> None:
    sample = fitted(painted(), AugmentConfig(size=192))
    assert sample.image_HW3.shape == (128, 192, 3) and sample.scale == (192 / 90, 128 / 60)
    check(sample, tolerance=1.5)


def test_an_image_without_objects_passes() -> None:
    empty = Sample(
        image_HW3=np.zeros((50, 70, 3), np.uint8),
        boxes_M4=np.zeros((0, 4), np.float32),
        labels_M=np.zeros(0, np.int64),
        masks_MHW=np.zeros((0, 50, 70), bool),
    )
    for seed in range(5):
        sample = augmented(empty, AugmentConfig(size=64), np.random.default_rng(seed))
        assert sample.boxes_M4.shape == (0, 4) and sample.masks_MHW is not None and len(sample.masks_MHW) == 0

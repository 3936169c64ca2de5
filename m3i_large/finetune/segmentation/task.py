"""Semantic segmentation as a task of the fine-tuning loop: samples, collation, scores.

Legend: B images, H W pixels, C classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from m3i_large.finetune.segmentation.config import AugmentConfig, SegmentationConfig, SplitConfig
from m3i_large.finetune.segmentation.images import UNLABELLED, Images, Sample, augmented, resized
from m3i_large.finetune.segmentation.model import SegmentationBatch, UPerNet
from m3i_large.finetune.task import TaskModel

MULTIPLE = 32  # of a batch's height and width: the coarsest stride


@dataclass(frozen=True, kw_only=True)
class Digest:
    """Of one image.

    Attributes:
        png: the predicted labels as the file of the benchmark's server.
        pairs, counts: label * C + prediction of the labelled pixels, and how many have it.
    """

    png: bytes
    pairs: np.ndarray
    counts: np.ndarray


class SegmentationSamples:
    """One split, read and transformed image by image."""

    def __init__(self, images: Images, config: AugmentConfig) -> None:
        self.images, self._config = images, config

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int, rng: np.random.Generator | None) -> Sample:
        """See Samples. ValueError where the image or its labels cannot be read."""
        sample = self.images.read(index)
        if rng is None:
            return resized(sample, shorter=self._config.size, labels=False)
        return augmented(sample, self._config, rng)

    def repeats(self) -> np.ndarray | None:
        """Every image once an epoch."""
        return None


class SegmentationTask:
    """ADE20k's format, UPerNet; see Task."""

    notes: Sequence[str] = ()

    def __init__(self, config: SegmentationConfig, *, data: Path) -> None:
        self._config = config
        self.train = SegmentationSamples(self._images(data, config.data.train), config.augment)
        self.evaluated = SegmentationSamples(self._images(data, config.data.evaluated), config.augment)

    def _images(self, data: Path, split: SplitConfig) -> Images:
        where = self._config.data
        return Images(data, split, num_classes=where.num_classes, first_label=where.first_label)

    def build(self, backbone: nn.Module, *, mean: Sequence[float], std: Sequence[float]) -> TaskModel:
        """See Task."""
        classes, size = self._config.data.num_classes, self._config.augment.size
        return UPerNet(backbone, self._config.head, num_classes=classes, size=size, mean=mean, std=std)

    def collate(self, samples: Sequence[Sample], rng: np.random.Generator | None) -> SegmentationBatch:
        """See Task; in training all batches are as large as the square, as accelerators like it."""
        side = self._config.augment.size if rng is not None else 0
        height, width = (max(side, *(s.image_HW3.shape[axis] for s in samples)) for axis in (0, 1))
        shape = (len(samples), height + -height % MULTIPLE, width + -width % MULTIPLE)
        image_BHW3 = torch.zeros((*shape, 3), dtype=torch.uint8)
        label_BHW = torch.full(shape, UNLABELLED, dtype=torch.uint8)
        for row, sample in enumerate(samples):
            rows, columns = sample.image_HW3.shape[:2]
            image_BHW3[row, :rows, :columns] = torch.from_numpy(np.ascontiguousarray(sample.image_HW3))
            if rng is not None:
                label_BHW[row, :rows, :columns] = torch.from_numpy(np.ascontiguousarray(sample.label_HW))
        return SegmentationBatch(
            image_BCHW=image_BHW3.permute(0, 3, 1, 2).contiguous(),
            size_B2=torch.tensor([sample.image_HW3.shape[:2] for sample in samples]),
            file_B2=torch.tensor([sample.size for sample in samples]),
            label_BHW=None if rng is None else label_BHW,
        )

    def digest(self, index: int, prediction: Tensor) -> Digest:
        """See Task."""
        found_HW = prediction.numpy()
        label_HW = self.evaluated.images.labels(index)
        known = label_HW != UNLABELLED
        pair = label_HW[known].astype(np.int64) * self._config.data.num_classes + found_HW[known]
        pairs, counts = np.unique(pair, return_counts=True)
        _, png = cv2.imencode(".png", found_HW + np.uint8(self._config.data.first_label))
        return Digest(png=png.tobytes(), pairs=pairs, counts=counts)

    def score(self, digests: Mapping[int, Digest], directory: Path) -> dict[str, float]:
        """See Task: the figures of `figures`, and one PNG of labels for each image."""
        classes = self._config.data.num_classes
        confusion_CC = np.zeros(classes * classes, np.int64)
        for index, digest in digests.items():
            path = directory / f"{self.evaluated.images.names[index]}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(digest.png)
            confusion_CC[digest.pairs] += digest.counts
        return figures(confusion_CC.reshape(classes, classes))


def figures(confusion_CC: np.ndarray) -> dict[str, float]:
    """`mIoU`, `accuracy` (of pixels) and `mean_accuracy` (of classes), from all images' pixels by (label, prediction).

    Means are over the classes that occur: in labels or predictions for mIoU, in labels for accuracy.
    """
    right_C, labelled_C, predicted_C = np.diag(confusion_CC), confusion_CC.sum(1), confusion_CC.sum(0)
    union_C = labelled_C + predicted_C - right_C
    return {
        "mIoU": float(np.mean(right_C[union_C > 0] / union_C[union_C > 0])),
        "accuracy": float(right_C.sum() / confusion_CC.sum()),
        "mean_accuracy": float(np.mean(right_C[labelled_C > 0] / labelled_C[labelled_C > 0])),
    }


def build_task(config: SegmentationConfig, *, data: Path) -> Any:
    """The task of a recipe's `task` section on the data in a directory."""
    return SegmentationTask(config, data=data)

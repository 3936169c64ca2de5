"""Classification as a task of the fine-tuning loop: samples, mixing, scores.

Legend: H W pixels.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from m3i_large.data.decode import decode_rgb
from m3i_large.errors import UserError
from m3i_large.finetune.classification.config import AugmentConfig, ClassificationConfig
from m3i_large.finetune.classification.images import Folders, Shards, open_images, same_classes
from m3i_large.finetune.classification.model import ClassificationBatch, Classifier, Mix
from m3i_large.finetune.classification.transforms import augmented, centred
from m3i_large.finetune.task import TaskModel
from m3i_large.models.vit import ViT

PREDICTIONS = "predictions.csv"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An image, uint8 RGB, and its class."""

    image_HW3: np.ndarray
    label: int


class ClassificationSamples:
    """One split, read and transformed image by image."""

    def __init__(self, images: Folders | Shards, config: AugmentConfig) -> None:
        self.images, self._config = images, config

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int, rng: np.random.Generator | None) -> Sample:
        """See Samples. ValueError where the image cannot be read."""
        data, label = self.images.read(index)
        try:
            image_HW3 = decode_rgb(data)
        except ValueError as error:
            raise ValueError(f"{self.images.name(index)}: {error}") from None
        image_HW3 = centred(image_HW3, self._config) if rng is None else augmented(image_HW3, self._config, rng)
        return Sample(image_HW3=image_HW3, label=label)

    def repeats(self) -> np.ndarray | None:
        """Every image once an epoch."""
        return None


class ClassificationTask:
    """Folders or shards, a linear classifier; see Task."""

    notes: Sequence[str] = ()

    def __init__(self, config: ClassificationConfig, *, data: Path) -> None:
        self._config = config
        where, classes = config.data, config.data.num_classes
        train = open_images(data, where.train, name="train", num_classes=classes)
        evaluated = open_images(data, where.evaluated, name="evaluated", num_classes=classes)
        same_classes(train.classes, evaluated.classes)
        self.classes = train.classes
        self.train = ClassificationSamples(train, config.augment)
        self.evaluated = ClassificationSamples(evaluated, config.augment)

    def build(self, backbone: nn.Module, *, mean: Sequence[float], std: Sequence[float]) -> TaskModel:
        """See Task. UserError where a ViT is of another size than the images."""
        size = self._config.augment.size
        if isinstance(backbone, ViT) and backbone.image_size != size:
            raise UserError(
                f"task.augment.size: got {size} for a ViT of {backbone.image_size} pixels; "
                f"needed: backbone.arch.image_size={size}, which resizes its position table"
            )
        smoothing, head = self._config.augment.smoothing, self._config.head
        return Classifier(backbone, head, num_classes=len(self.classes), smoothing=smoothing, mean=mean, std=std)

    def collate(self, samples: Sequence[Sample], rng: np.random.Generator | None) -> ClassificationBatch:
        """See Task."""
        image_BHWC = torch.from_numpy(np.stack([sample.image_HW3 for sample in samples]))
        return ClassificationBatch(
            image_BCHW=image_BHWC.permute(0, 3, 1, 2).contiguous(),
            label_B=torch.tensor([sample.label for sample in samples]),
            mix=None if rng is None else draw_mix(self._config.augment, rng),
        )

    def digest(self, index: int, prediction: tuple[int, list[int]]) -> tuple[int, list[int]]:
        """See Task: small already."""
        return prediction

    def score(self, digests: Mapping[int, tuple[int, list[int]]], directory: Path) -> dict[str, float]:
        """See Task: `top1` and `top5`, and predictions.csv with every image's class and its best five."""
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / PREDICTIONS).open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["image", "class", "predicted"])
            for index, (label, found) in sorted(digests.items()):
                predicted = " ".join(self.classes[k] for k in found)
                table.writerow([self.evaluated.images.name(index), self.classes[label], predicted])
        right = [[label == k for k in found] for label, found in digests.values()]
        return {"top1": float(np.mean([r[0] for r in right])), "top5": float(np.mean([any(r) for r in right]))}


def draw_mix(config: AugmentConfig, rng: np.random.Generator) -> Mix | None:
    """Mixup, CutMix, each with probability one half where both are on, or nothing."""
    kinds = [kind for kind in ("mixup", "cutmix") if getattr(config, kind) > 0]
    if not kinds:
        return None
    kind = kinds[int(rng.integers(len(kinds)))]
    alpha = getattr(config, kind)
    share = float(rng.beta(alpha, alpha))
    if kind == "mixup":
        return Mix(share=share, box=None)
    # A box of 1 - share of the area around a random point, cut at the edges; the share is then what is left.
    side = config.size
    half = side * (1 - share) ** 0.5 / 2
    row, column = rng.integers(side, size=2)
    (top, left), (bottom, right) = (
        [int(np.clip(round(point + offset), 0, side)) for point in (row, column)] for offset in (-half, half)
    )
    height, width = bottom - top, right - left
    return Mix(share=1 - height * width / side**2, box=(top, left, height, width))


def build_task(config: ClassificationConfig, *, data: Path) -> Any:
    """The task of a recipe's `task` section on the data in a directory."""
    return ClassificationTask(config, data=data)

"""Detection as a task of the fine-tuning loop: samples, collation, model, scores.

Legend: M objects, H W pixels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from m3i_large.errors import UserError
from m3i_large.finetune.detection.batch import DetectionBatch, Detections, Target
from m3i_large.finetune.detection.coco import CocoSplit, object_mask, read_coco, read_pixels
from m3i_large.finetune.detection.config import AugmentConfig, DetectionConfig, RcnnConfig, SplitConfig
from m3i_large.finetune.detection.rcnn import RCNN
from m3i_large.finetune.detection.scores import coco_library, score_coco, server_rows
from m3i_large.finetune.detection.transforms import Sample, augmented, fitted
from m3i_large.finetune.task import TaskModel

MULTIPLE = 32  # of a batch's height and width: the coarsest stride


class DetectionSamples:
    """One split, read and transformed image by image.

    Args:
        repeat_threshold: see CocoSplit.repeats; None: every image once an epoch.
    """

    def __init__(
        self, split: CocoSplit, config: AugmentConfig, *, masks: bool, repeat_threshold: float | None = None
    ) -> None:
        self.split, self._config, self._masks, self._threshold = split, config, masks, repeat_threshold

    def __len__(self) -> int:
        return len(self.split.images)

    def read(self, index: int, rng: np.random.Generator | None) -> Sample:
        """See Samples. ValueError where the image or a segmentation cannot be read."""
        image = self.split.images[index]
        masks_MHW = None
        if self._masks and rng is not None:
            size = {"height": image.height, "width": image.width}
            masks = [object_mask(segmentation, **size) for segmentation in image.segmentations]
            masks_MHW = np.stack(masks) if masks else np.zeros((0, image.height, image.width), bool)
        sample = Sample(
            image_HW3=read_pixels(image), boxes_M4=image.boxes_M4, labels_M=image.labels_M, masks_MHW=masks_MHW
        )
        return fitted(sample, self._config) if rng is None else augmented(sample, self._config, rng)

    def repeats(self) -> np.ndarray | None:
        """See Samples."""
        return None if self._threshold is None else self.split.repeats(self._threshold)


class DetectionTask:
    """COCO's and LVIS's format, torchvision's and transformers' detectors; see Task."""

    def __init__(self, config: DetectionConfig, *, data: Path) -> None:
        coco_library()
        self._config, self._masks = config, config.head.masks
        self._lvis = config.data.format == "lvis"
        self.train = self._samples(config.data.train, data, keep_empty=config.data.keep_empty)
        # Evaluated is every image: a detection where there is nothing is a mistake too.
        self.evaluated = self._samples(config.data.evaluated, data, keep_empty=True)
        train, evaluated = self.train.split.categories, self.evaluated.split.categories
        if train != evaluated:
            odd = sorted(set(train) ^ set(evaluated))[0]
            raise UserError(f"--data: the splits differ in category {odd}; needed: the same categories in both")

    def _samples(self, split: SplitConfig, data: Path, *, keep_empty: bool) -> DetectionSamples:
        where = {"masks": self._masks, "keep_empty": keep_empty, "lvis": self._lvis}
        found = read_coco(data / split.annotations, data / split.images, **where)
        threshold = self._config.data.repeat_threshold
        return DetectionSamples(found, self._config.augment, masks=self._masks, repeat_threshold=threshold)

    @property
    def notes(self) -> list[str]:
        """See Task."""
        split = self.train.split
        return [f"{split.path.name}: {number} {reason} left out" for reason, number in sorted(split.left_out.items())]

    def build(self, backbone: nn.Module, *, mean: Sequence[float], std: Sequence[float]) -> TaskModel:
        """See Task."""
        images_C = torch.from_numpy(self.train.split.images_C())
        head = self._config.head
        if isinstance(head, RcnnConfig):
            return RCNN(backbone, head, images_C=images_C, mean=mean, std=std)
        from m3i_large.finetune.detection.detr import Detr  # transformers takes seconds to import

        return Detr(backbone, head, images_C=images_C, mean=mean, std=std)

    def collate(self, samples: Sequence[Sample], rng: np.random.Generator | None) -> DetectionBatch:
        """See Task; in training all batches are as large as the square, as accelerators like it."""
        side = self._config.augment.size if rng is not None else 0
        height = max(side, *(s.image_HW3.shape[0] for s in samples))
        width = max(side, *(s.image_HW3.shape[1] for s in samples))
        shape = (len(samples), 3, height + -height % MULTIPLE, width + -width % MULTIPLE)
        image_BCHW = torch.zeros(shape, dtype=torch.uint8)
        for out_CHW, sample in zip(image_BCHW, samples, strict=True):
            rows, columns = sample.image_HW3.shape[:2]
            out_CHW[:, :rows, :columns] = torch.from_numpy(np.ascontiguousarray(sample.image_HW3)).permute(2, 0, 1)
        sizes = torch.tensor([sample.image_HW3.shape[:2] for sample in samples])
        targets = () if rng is None else tuple(_target(sample) for sample in samples)
        return DetectionBatch(image_BCHW=image_BCHW, size_B2=sizes, targets=targets)

    def digest(self, index: int, prediction: Detections) -> list[dict[str, Any]]:
        """See Task: rows of the result file."""
        split = self.evaluated.split
        return server_rows(prediction, split.images[index], scale=self._scale(index), categories=split.categories)

    def score(self, digests: Mapping[int, list[dict[str, Any]]], directory: Path) -> dict[str, float]:
        """See Task."""
        rows = [row for _, found in sorted(digests.items()) for row in found]
        detections = self._config.head.detections
        split = self.evaluated.split
        return score_coco(split, rows, directory, masks=self._masks, detections=detections, lvis=self._lvis)

    def _scale(self, index: int) -> tuple[float, float]:
        """Pixels of the evaluated image per pixel of the file: what `fitted` does to it."""
        image = self.evaluated.split.images[index]
        scale = self._config.augment.size / max(image.height, image.width)
        return max(1, round(image.width * scale)) / image.width, max(1, round(image.height * scale)) / image.height


def _target(sample: Sample) -> Target:
    masks = None if sample.masks_MHW is None else torch.from_numpy(np.ascontiguousarray(sample.masks_MHW))
    return Target(
        boxes_M4=torch.from_numpy(np.ascontiguousarray(sample.boxes_M4)),
        labels_M=torch.from_numpy(np.ascontiguousarray(sample.labels_M)),
        masks_MHW=masks,
    )


def build_task(config: DetectionConfig, *, data: Path) -> Any:
    """The task of a recipe's `task` section on the data in a directory."""
    return DetectionTask(config, data=data)

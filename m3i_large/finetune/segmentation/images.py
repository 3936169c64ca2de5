"""Images and their labels in ADE20k's format, through the same geometry; every draw comes from the generator.

Legend: H W pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from torchvision.transforms import functional as colours

from m3i_large.data.decode import decode_rgb
from m3i_large.errors import UserError
from m3i_large.finetune.segmentation.config import AugmentConfig, SplitConfig

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
UNLABELLED = 255  # in a Sample
TRIES = 10  # crops, until none of the classes covers too much
# Largest changes: factors 1 +- s of brightness, contrast and saturation, turns of hue (mmsegmentation's, in its order).
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.125, 0.5, 0.5, 0.1


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An image and its labels.

    Attributes:
        image_HW3: uint8 RGB.
        label_HW: uint8, classes from 0; UNLABELLED where nobody labelled.
        size: (height, width) of the file.
    """

    image_HW3: np.ndarray
    label_HW: np.ndarray
    size: tuple[int, int]


class Images:
    """The pairs of a split, in the order of their names.

    Attributes:
        names: of the images, without extension.

    Raises:
        UserError: no such directory, no image, or one without labels.
    """

    def __init__(self, data: Path, split: SplitConfig, *, num_classes: int, first_label: int) -> None:
        images, labels = data / split.images, data / split.labels
        for directory in (images, labels):
            if not directory.is_dir():
                raise UserError(f"--data: got {directory}, which is no directory; needed: as ADEChallengeData2016")
        paths = sorted(path for path in images.rglob("*") if path.suffix.lower() in EXTENSIONS)
        if not paths:
            raise UserError(f"--data: {images} has no image; needed: one of {', '.join(EXTENSIONS)}")
        self.names = [str(path.relative_to(images).with_suffix("")) for path in paths]
        self._pairs = [(path, labels / f"{name}.png") for path, name in zip(paths, self.names, strict=True)]
        for path, label in self._pairs:
            if not label.is_file():
                raise UserError(f"--data: {path} has no labels; needed: {label}")
        self._num_classes, self._first = num_classes, first_label

    def __len__(self) -> int:
        return len(self._pairs)

    def read(self, index: int) -> Sample:
        """A pair. ValueError naming the file: unreadable, of two sizes, or with a label beyond the classes."""
        path, labels = self._pairs[index]
        try:
            image_HW3 = decode_rgb(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None
        label_HW = self.labels(index)
        if label_HW.shape != image_HW3.shape[:2]:
            raise ValueError(f"{labels}: got {label_HW.shape} pixels; needed: the image's {image_HW3.shape[:2]}")
        return Sample(image_HW3=image_HW3, label_HW=label_HW, size=label_HW.shape)

    def labels(self, index: int) -> np.ndarray:
        """Labels (H, W) as in Sample. ValueError as `read`."""
        _, path = self._pairs[index]
        label_HW = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        if label_HW is None or label_HW.ndim != 2:
            got = "nothing that OpenCV reads" if label_HW is None else f"{label_HW.shape[2]} channels"
            raise ValueError(f"{path}: got {got}; needed: a PNG of one channel")
        # Beyond the classes is UNLABELLED only where the files say so: 0 where they count from 1, or 255.
        found = label_HW.astype(np.int64) - self._first
        known = (found >= 0) & (found < self._num_classes)
        odd = label_HW[~known & (found != -1) & (label_HW != UNLABELLED)]
        if odd.size:
            last = self._num_classes - 1 + self._first
            raise ValueError(f"{path}: got label {odd[0]}; needed: {self._first} to {last}, or {UNLABELLED}")
        return np.where(known, found, UNLABELLED).astype(np.uint8)


def augmented(sample: Sample, config: AugmentConfig, rng: np.random.Generator) -> Sample:
    """Scaled at random, a random square of it or what there is of one, perhaps mirrored, colours changed."""
    sample = resized(sample, shorter=config.size, factor=float(rng.uniform(*config.scale)))
    sample = cropped(sample, config, rng)
    if rng.random() < config.flip:
        image_HW3, label_HW = sample.image_HW3[:, ::-1], sample.label_HW[:, ::-1]
        sample = replace(sample, image_HW3=np.ascontiguousarray(image_HW3), label_HW=np.ascontiguousarray(label_HW))
    return replace(sample, image_HW3=recoloured(sample.image_HW3, config.colour, rng))


def resized(sample: Sample, *, shorter: int, factor: float = 1.0, labels: bool = True) -> Sample:
    """Scaled, keeping its proportions, so that the shorter side is factor * shorter; `labels` too, to the nearest."""
    height, width = sample.image_HW3.shape[:2]
    scale = factor * shorter / min(height, width)
    to = max(1, round(width * scale)), max(1, round(height * scale))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    image_HW3 = cv2.resize(sample.image_HW3, to, interpolation=how)
    label_HW = cv2.resize(sample.label_HW, to, interpolation=cv2.INTER_NEAREST_EXACT) if labels else sample.label_HW
    return replace(sample, image_HW3=image_HW3, label_HW=label_HW)


def cropped(sample: Sample, config: AugmentConfig, rng: np.random.Generator) -> Sample:
    """A random square; the first of ten of which no class covers more than `largest` of the labelled pixels."""
    height, width = sample.label_HW.shape
    size = config.size
    for _ in range(TRIES):
        top = int(rng.integers(max(0, height - size) + 1))
        left = int(rng.integers(max(0, width - size) + 1))
        label_HW = sample.label_HW[top : top + size, left : left + size]
        counts = np.bincount(label_HW[label_HW != UNLABELLED])
        if len(np.flatnonzero(counts)) > 1 and counts.max() < config.largest * counts.sum():
            break
    return replace(sample, image_HW3=sample.image_HW3[top : top + size, left : left + size], label_HW=label_HW)


def recoloured(image_HW3: np.ndarray, probability: float, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast, saturation and hue, each changed with this probability."""
    changes: list[tuple[Callable[..., torch.Tensor], float]] = [
        (colours.adjust_brightness, 1 + BRIGHTNESS * rng.uniform(-1, 1)),
        (colours.adjust_contrast, 1 + CONTRAST * rng.uniform(-1, 1)),
        (colours.adjust_saturation, 1 + SATURATION * rng.uniform(-1, 1)),
        (colours.adjust_hue, HUE * rng.uniform(-1, 1)),
    ]
    image_3HW = torch.from_numpy(np.ascontiguousarray(image_HW3)).permute(2, 0, 1)
    for change, strength in changes:
        if rng.random() < probability:
            image_3HW = change(image_3HW, strength)
    return image_3HW.permute(1, 2, 0).numpy()

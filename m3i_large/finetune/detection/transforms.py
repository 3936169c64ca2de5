"""Image, boxes and masks through the same geometry; every draw comes from the generator that is handed in.

Legend: H W pixels, M objects.
"""

from dataclasses import dataclass, replace

import cv2
import numpy as np

from m3i_large.finetune.detection.config import AugmentConfig

HALF = 127  # of a mask's 255


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An image and its objects, as in batch.py's Target, in numpy.

    Attributes:
        image_HW3: uint8 RGB.
        masks_MHW: bool; None where masks are not used.
        scale: pixels here per pixel of the file, in x and y.
    """

    image_HW3: np.ndarray
    boxes_M4: np.ndarray
    labels_M: np.ndarray
    masks_MHW: np.ndarray | None
    scale: tuple[float, float] = (1.0, 1.0)


def augmented(sample: Sample, config: AugmentConfig, rng: np.random.Generator) -> Sample:
    """Large-scale jitter: scaled to (random factor) x (the size that just fits the square), then a random crop where it
    is larger; what is smaller is padded when the batch is made. Then perhaps mirrored."""
    factor = float(rng.uniform(*config.scale))
    sample = resized(sample, size=config.size, factor=factor)
    height, width = sample.image_HW3.shape[:2]
    top = int(rng.integers(max(0, height - config.size) + 1))
    left = int(rng.integers(max(0, width - config.size) + 1))
    sample = cropped(sample, top=top, left=left, size=config.size, min_side=config.min_side)
    return mirrored(sample) if rng.random() < config.flip else sample


def fitted(sample: Sample, config: AugmentConfig) -> Sample:
    """As it is evaluated: the longer side is the square's."""
    return resized(sample, size=config.size, factor=1.0)


def resized(sample: Sample, *, size: int, factor: float) -> Sample:
    """Scaled, keeping its proportions, so that the longer side is factor * size."""
    height, width = sample.image_HW3.shape[:2]
    scale = factor * size / max(height, width)
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    if (new_height, new_width) == (height, width):
        return sample
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    image_HW3 = cv2.resize(sample.image_HW3, (new_width, new_height), interpolation=how)
    x, y = new_width / width, new_height / height  # after rounding, so boxes stay on their pixels
    masks_MHW = None
    if sample.masks_MHW is not None:
        masks_MHW = np.zeros((len(sample.masks_MHW), new_height, new_width), bool)
        # As the image and cut at one half: OpenCV's nearest pixel is up to half a pixel beside it.
        for mask_HW, out_HW in zip(sample.masks_MHW, masks_MHW, strict=True):
            grey_HW = np.ascontiguousarray(mask_HW).view(np.uint8) * np.uint8(255)
            out_HW[:] = cv2.resize(grey_HW, (new_width, new_height), interpolation=how) > HALF
    boxes_M4 = sample.boxes_M4 * np.array([x, y, x, y], np.float32)
    return replace(sample, image_HW3=image_HW3, boxes_M4=boxes_M4, masks_MHW=masks_MHW, scale=(x, y))


def cropped(sample: Sample, *, top: int, left: int, size: int, min_side: float) -> Sample:
    """The square at (top, left), or what there is of it; objects with a side of `min_side` pixels or less are gone."""
    image_HW3 = sample.image_HW3[top : top + size, left : left + size]
    height, width = image_HW3.shape[:2]
    boxes_M4 = sample.boxes_M4 - np.array([left, top, left, top], np.float32)
    boxes_M4 = boxes_M4.clip(0, np.array([width, height] * 2, np.float32))
    kept = ((boxes_M4[:, 2:] - boxes_M4[:, :2]) > min_side).all(1)
    masks_MHW = sample.masks_MHW
    if masks_MHW is not None:
        masks_MHW = masks_MHW[:, top : top + size, left : left + size]
        kept &= masks_MHW.any((1, 2))
        masks_MHW = masks_MHW[kept]
    return replace(
        sample, image_HW3=image_HW3, boxes_M4=boxes_M4[kept], labels_M=sample.labels_M[kept], masks_MHW=masks_MHW
    )


def mirrored(sample: Sample) -> Sample:
    """Left and right exchanged."""
    width = sample.image_HW3.shape[1]
    boxes_M4 = sample.boxes_M4.copy()
    boxes_M4[:, [0, 2]] = width - boxes_M4[:, [2, 0]]
    masks_MHW = None if sample.masks_MHW is None else sample.masks_MHW[:, :, ::-1]
    return replace(sample, image_HW3=sample.image_HW3[:, ::-1], boxes_M4=boxes_M4, masks_MHW=masks_MHW)

"""Augmentation of one image; every draw comes from the generator that is handed in.

RandAugment's operations are timm's; which ones, how strong and in which direction is drawn here, as timm draws from
Python's global generator, which a run that continues could not set back, nor threads share.

Legend: H W pixels.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP

from m3i_large.data.config import ViewConfig
from m3i_large.data.decode import crop_resize
from m3i_large.data.views import NUM_DRAWS, crop_box
from m3i_large.finetune.classification.config import AugmentConfig

FULL = 10.0  # the largest magnitude
OPERATIONS = 2  # of RandAugment on an image
APPLIED = 0.5  # probability of each of them
FILL = (128, 128, 128)  # where a picture was moved away
ERASED = ((0.02, 1 / 3), (0.3, 1 / 0.3))  # area over the image's, aspect ratio (arXiv 1708.04896)
TRIES = 10

# Arguments of timm's operations at a strength of 0 to 1 and a sign: its "increasing" set, in its order.
RAND_AUGMENT: dict[str, Callable[[float, int], tuple[Any, ...]]] = {
    "AutoContrast": lambda strength, sign: (),
    "Equalize": lambda strength, sign: (),
    "Invert": lambda strength, sign: (),
    "Rotate": lambda strength, sign: (sign * strength * 30,),
    "PosterizeIncreasing": lambda strength, sign: (4 - int(strength * 4),),
    "SolarizeIncreasing": lambda strength, sign: (256 - min(256, int(strength * 256)),),
    "SolarizeAdd": lambda strength, sign: (min(128, int(strength * 110)),),
    "ColorIncreasing": lambda strength, sign: (max(0.1, 1 + sign * strength * 0.9),),
    "ContrastIncreasing": lambda strength, sign: (max(0.1, 1 + sign * strength * 0.9),),
    "BrightnessIncreasing": lambda strength, sign: (max(0.1, 1 + sign * strength * 0.9),),
    "SharpnessIncreasing": lambda strength, sign: (max(0.1, 1 + sign * strength * 0.9),),
    "ShearX": lambda strength, sign: (sign * strength * 0.3,),
    "ShearY": lambda strength, sign: (sign * strength * 0.3,),
    "TranslateXRel": lambda strength, sign: (sign * strength * 0.45,),
    "TranslateYRel": lambda strength, sign: (sign * strength * 0.45,),
}


def augmented(image_HW3: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """A random crop, mirrored or not, RandAugment, a rectangle of noise -> uint8 (size, size, 3)."""
    view = ViewConfig(crop_scale=config.scale)
    height, width = image_HW3.shape[:2]
    box = crop_box(rng.random(NUM_DRAWS), height, width, view)
    image_HW3 = crop_resize(image_HW3, box, config.size)
    if rng.random() < config.flip:
        image_HW3 = image_HW3[:, ::-1]
    if config.rand_augment is not None:
        image_HW3 = rand_augment(image_HW3, *config.rand_augment, rng=rng)
    return erased(image_HW3, rng) if rng.random() < config.erase else np.ascontiguousarray(image_HW3)


def centred(image_HW3: np.ndarray, config: AugmentConfig) -> np.ndarray:
    """As it is evaluated: the central square of `evaluated_share` of the shorter side -> uint8 (size, size, 3)."""
    height, width = image_HW3.shape[:2]
    side = max(1, round(min(height, width) * config.evaluated_share))
    return crop_resize(image_HW3, ((height - side) // 2, (width - side) // 2, side, side), config.size)


def rand_augment(image_HW3: np.ndarray, magnitude: float, deviation: float, *, rng: np.random.Generator) -> np.ndarray:
    """RandAugment (arXiv 1909.13719) as timm's rand-m{magnitude}-mstd{deviation}-inc1: two operations with one half
    probability each, normally distributed magnitudes."""
    image = Image.fromarray(np.ascontiguousarray(image_HW3))
    for name in rng.choice(list(RAND_AUGMENT), OPERATIONS):
        strength = float(np.clip(rng.normal(magnitude, deviation), 0, FULL)) / FULL
        sign = 1 if rng.random() < 0.5 else -1
        if rng.random() < APPLIED:
            arguments = RAND_AUGMENT[name](strength, sign)
            operation: Any = NAME_TO_OP[name]
            image = operation(image, *arguments, fillcolor=FILL, resample=Image.Resampling.BICUBIC)
    return np.asarray(image)


def erased(image_HW3: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A copy with noise in a random rectangle that fits, as it was where none of ten does."""
    height, width = image_HW3.shape[:2]
    out_HW3 = np.array(image_HW3)
    (low, high), (flat, tall) = ERASED
    for _ in range(TRIES):
        area = height * width * rng.uniform(low, high)
        aspect = math.exp(rng.uniform(math.log(flat), math.log(tall)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < h < height and 0 < w < width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            out_HW3[top : top + h, left : left + w] = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
            break
    return out_HW3

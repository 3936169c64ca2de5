"""Pictures of what the student sees, written during training."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from m3i_kernels.patch_mix import patch_mix
from torch import Tensor

from m3i_large.data.batch import Batch
from m3i_large.objective.readings import visible_NL
from m3i_large.recipe import Recipe

HIDDEN = np.uint8(128)


def write_input_picture(directory: Path, batch: Batch, recipe: Recipe, *, columns: int = 8) -> None:
    """Writes input.png: rows of images, one column a sample.

    Rows: target view, the other view (in a mix: the partner's), what the student sees (hidden cells grey), and the mask
    (white = visible; in a mix: own).
    """
    mean, std, shown = recipe.data.mean, recipe.data.std, recipe.objective.input
    settings: dict[str, Any] = {
        "colour_NV34": batch.colour_NV34,
        "solarize_NV": batch.solarize_NV,
        "flip_NV": batch.flip_NV,
    }
    settings |= {"partner_N": batch.partner_N, "mean": mean, "std": std, "dtype": torch.float32}
    views = (batch.target_NHWC, batch.other_NHWC)
    mask_NPP = batch.mask_NPP if shown.mask != "none" else torch.ones_like(batch.mask_NPP)
    mixed, target = patch_mix(*views, mask_NPP=mask_NPP, **settings)
    other, _ = patch_mix(*views, mask_NPP=torch.zeros_like(mask_NPP), **settings)
    mask_NHWC = _enlarged(mask_NPP, mixed.shape[-1])
    seen = _pixels(mixed, mean, std)
    if shown.mask != "mix":
        seen = np.where(mask_NHWC, _pixels(target if shown.view == "target" else other, mean, std), HIDDEN)
    rows = [_pixels(target, mean, std), _pixels(other, mean, std), seen, mask_NHWC.astype(np.uint8) * 255]
    picture = np.concatenate(
        [np.concatenate([_bordered(cell) for cell in row[:columns]], axis=1) for row in rows], axis=0
    )
    directory.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(directory / "input.png"), picture[..., ::-1])


def _enlarged(mask_NPP: Tensor, size: int) -> np.ndarray:
    """The mask as images (N, H, W, 3) of booleans."""
    mask_NHW = visible_NL(mask_NPP, size).unflatten(1, (size, size))
    return mask_NHW[..., None].expand(-1, -1, -1, 3).numpy()


def _pixels(image_NCHW: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    image = image_NCHW * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    return (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _bordered(cell_HWC: np.ndarray) -> np.ndarray:
    return np.pad(cell_HWC, ((2, 2), (2, 2), (0, 0)), constant_values=255)

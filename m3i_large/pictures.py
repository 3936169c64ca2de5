"""Pictures of what the student sees, written during training."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from m3i_kernels.patch_mix import patch_mix
from torch import Tensor

from m3i_large.data.batch import Batch
from m3i_large.recipe import Recipe


def write_mix_picture(directory: Path, batch: Batch, recipe: Recipe, *, columns: int = 8) -> None:
    """Writes mix.png: four rows of images, one column a sample.

    Rows: own image (target view), partner's image (other view), the mixed input, and the mask (white = own).
    """
    mean, std = recipe.data.mean, recipe.data.std
    settings: dict[str, Any] = {
        "colour_NV34": batch.colour_NV34,
        "solarize_NV": batch.solarize_NV,
        "flip_NV": batch.flip_NV,
    }
    settings |= {"partner_N": batch.partner_N, "mean": mean, "std": std, "dtype": torch.float32}
    views = (batch.target_NHWC, batch.other_NHWC)
    mixed, own = patch_mix(*views, mask_NPP=batch.mask_NPP, **settings)
    foreign, _ = patch_mix(*views, mask_NPP=torch.zeros_like(batch.mask_NPP), **settings)
    size = mixed.shape[-1]
    mask = batch.mask_NPP.repeat_interleave(size // batch.mask_NPP.shape[-1], 1)
    mask = mask.repeat_interleave(size // batch.mask_NPP.shape[-1], 2)[:, None].expand(-1, 3, -1, -1)
    rows = [_pixels(x, mean, std) for x in (own, foreign, mixed)] + [
        mask.permute(0, 2, 3, 1).numpy().astype(np.uint8) * 255
    ]
    picture = np.concatenate(
        [np.concatenate([_bordered(cell) for cell in row[:columns]], axis=1) for row in rows], axis=0
    )
    directory.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(directory / "mix.png"), picture[..., ::-1])


def _pixels(image_NCHW: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    image = image_NCHW * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    return (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _bordered(cell_HWC: np.ndarray) -> np.ndarray:
    return np.pad(cell_HWC, ((2, 2), (2, 2), (0, 0)), constant_values=255)

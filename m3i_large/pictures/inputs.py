"""What the student sees, beside what it was made of and what is asked of it."""

from typing import Any

import numpy as np
import torch
from m3i_kernels.patch_mix import patch_mix
from torch import Tensor

from m3i_large.data.batch import Batch
from m3i_large.data.tokenizer import Tokenizer
from m3i_large.objective.readings import visible_NL
from m3i_large.pictures.sheet import Cell, Sheet, Strip
from m3i_large.recipe import Recipe

HIDDEN = np.uint8(128)
SHOWN = 8


def input_sheet(batch: Batch, recipe: Recipe, tokenizer: Tokenizer, *, shown: int = SHOWN) -> Sheet:
    """The first rows of a batch.

    In a mix a strip has the row's target view y, the partner's other view x, the mask (white = own), the student's
    input and the partner's target view, which the foreign patches predict; else target view, other view, mask (white =
    visible) and input, hidden cells grey.
    """
    mean, std, given = recipe.data.mean, recipe.data.std, recipe.objective.input
    settings: dict[str, Any] = {
        "colour_NV34": batch.colour_NV34,
        "solarize_NV": batch.solarize_NV,
        "flip_NV": batch.flip_NV,
        "mean": mean,
        "std": std,
        "dtype": torch.float32,
    }
    views = (batch.target_NHWC, batch.other_NHWC)
    mask_NPP = batch.mask_NPP if given.mask != "none" else torch.ones_like(batch.mask_NPP)
    mixed, target = patch_mix(*views, mask_NPP=mask_NPP, partner_N=batch.partner_N, **settings)
    other, _ = patch_mix(*views, mask_NPP=torch.zeros_like(mask_NPP), partner_N=batch.partner_N, **settings)
    y, x, seen = (_pixels(image, mean, std) for image in (target, other, mixed))
    mask_NHWC = _enlarged(mask_NPP, mixed)
    if given.mask != "mix":
        seen = np.where(mask_NHWC, y if given.view == "target" else x, HIDDEN)
    strips = []
    for row in range(min(shown, len(batch))):
        partner = int(batch.partner_N[row])
        label = described(batch, row, tokenizer)
        if given.mask == "mix":
            label = f"{label} mixed with {described(batch, partner, tokenizer)}"
            cells = [Cell(y[row], "own view y"), Cell(x[row], "partner's view x"), _mask_cell(mask_NHWC[row], "own")]
            cells += [Cell(seen[row], "mixed input"), Cell(y[partner], "partner's view y")]
        else:
            cells = [Cell(y[row], "target view"), Cell(x[row], "other view"), _mask_cell(mask_NHWC[row], "visible")]
            cells.append(Cell(seen[row], "input"))
        strips.append(Strip(label, tuple(cells)))
    about = "What the student is shown, hidden cells grey, and what it was made of."
    if given.mask == "mix":
        about = (
            "Own patches of the mixed input predict the features of the own view y, the others those of the partner's "
            "view y; both predict what the label says: text or class of the own picture, and of the partner's."
        )
    return Sheet("input", "What the student sees", about, tuple(strips))


def described(batch: Batch, row: int, tokenizer: Tokenizer) -> str:
    """A row's text, or class, or number."""
    if batch.text_valid_N[row]:
        return f"“{tokenizer.decode(batch.text_NT[row].cpu().numpy())}”"
    if batch.category_N[row] >= 0:
        return f"class {int(batch.category_N[row])}"
    return f"sample {int(batch.id_N[row])}"


def _mask_cell(mask_HWC: np.ndarray, white: str) -> Cell:
    return Cell(mask_HWC.astype(np.uint8) * 255, f"mask, white: {white}")


def _enlarged(mask_NPP: Tensor, image_NCHW: Tensor) -> np.ndarray:
    """The mask as images (N, H, W, 3) of booleans."""
    size = image_NCHW.shape[-1]
    mask_NHW = visible_NL(mask_NPP, size).unflatten(1, (size, size))
    return mask_NHW[..., None].expand(-1, -1, -1, 3).numpy()


def _pixels(image_NCHW: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    image = image_NCHW * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    return (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()

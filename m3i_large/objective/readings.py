"""What the student's tokens show: which tokens stand for which image, in which view (M3I section 3.4).

Legend: N local rows, L = G * G tokens of a whole image, K tokens of a reading, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reading:
    """The part of each row's tokens that shows one image.

    Attributes:
        view: TARGET_VIEW or OTHER_VIEW of that image.
        token_NKD: the tokens.
        cell_NK: their places in the student's grid, row-major.
        image_N: which image row n shows; None: its own.
    """

    view: int
    token_NKD: Tensor
    cell_NK: Tensor
    image_N: Tensor | None = None

    def by_image(self, value: Tensor) -> Tensor:
        """Puts values of rows (N, ...) in the order of the images they are about."""
        return value if self.image_N is None else value[torch.argsort(self.image_N)]

    def of_image(self, value: Tensor) -> Tensor:
        """What holds for images (N, ...), in the order of the rows that show them."""
        return value if self.image_N is None else value[self.image_N]


def visible_NL(mask_NPP: Tensor, grid: int) -> Tensor:
    """The mask, one boolean per token."""
    repeat = grid // mask_NPP.shape[-1]
    return mask_NPP.repeat_interleave(repeat, 1).repeat_interleave(repeat, 2).flatten(1)


def split_cells(mask_NPP: Tensor, *, grid: int, num_visible: int) -> tuple[Tensor, Tensor]:
    """Places of the visible (own) and of the hidden (foreign) tokens, each row-major -> (N, K), (N, L - K)."""
    order_NL = torch.argsort(visible_NL(mask_NPP, grid).logical_not().to(torch.int8), dim=1, stable=True)
    return order_NL[:, :num_visible], order_NL[:, num_visible:]


def take(token_NLD: Tensor, cell_NK: Tensor) -> Tensor:
    """The tokens at some places -> (N, K, D)."""
    return token_NLD.take_along_dim(cell_NK[..., None], dim=1)

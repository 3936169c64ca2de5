"""Where the patches of a target view lie in the coordinates of an input view (METHOD section 4).

Legend: N samples, V views, G patches a side, L = G * G patches in row-major order, 4 = (row, col, 10 ln dh, 10 ln dw).
"""

import torch
from torch import Tensor


def grid_position(grid: int, *, device: torch.device | None = None) -> Tensor:
    """Positions of a view's own patches -> (L, 4) float32: row and column in patches, equal scales."""
    cell = torch.arange(grid, dtype=torch.float32, device=device)
    row, col = torch.meshgrid(cell, cell, indexing="ij")
    return torch.stack([row, col, torch.zeros_like(row), torch.zeros_like(col)], dim=-1).flatten(0, 1)


def relative_position(
    box_NV4: Tensor, size_N2: Tensor, flip_NV: Tensor, *, grid: int, input_view: int, target_view: int
) -> Tensor:
    """Positions of the target view's patches in the input view's patch coordinates -> (N, L, 4) float32.

    Args:
        box_NV4: (top, left, height, width) of each crop in the UNFLIPPED image, pixels.
        size_N2: (height, width) of the image, pixels.
        flip_NV: whether the crop is shown mirrored.

    A mirrored view is a crop of the mirrored image, whose left edge is W - left - width there. In these coordinates
    row = dh (g + 1/2) + di G - 1/2, and likewise for columns, mirrored where the two views' flips differ.
    """
    box, width_N = box_NV4.double(), size_N2[:, 1].double()
    top, left, height, width = box.unbind(-1)
    left = torch.where(flip_NV, width_N[:, None] - left - width, left)
    i1, j1, h1, w1 = (x[:, input_view] for x in (top, left, height, width))
    i2, j2, h2, w2 = (x[:, target_view] for x in (top, left, height, width))
    scale_h, scale_w = h2 / h1, w2 / w1
    cell = torch.arange(grid, dtype=torch.float64, device=box.device) + 0.5
    row_NG = scale_h[:, None] * cell + ((i2 - i1) / h1)[:, None] * grid - 0.5
    same_NG = scale_w[:, None] * cell + ((j2 - j1) / w1)[:, None] * grid - 0.5
    mirrored_NG = -scale_w[:, None] * cell + ((width_N - j1 - j2) / w1)[:, None] * grid - 0.5
    differ = flip_NV[:, input_view] != flip_NV[:, target_view]
    col_NG = torch.where(differ[:, None], mirrored_NG, same_NG)
    shape = (len(box), grid, grid)
    parts = (
        row_NG[:, :, None],
        col_NG[:, None, :],
        10 * scale_h.log()[:, None, None],
        10 * scale_w.log()[:, None, None],
    )
    return torch.stack([p.expand(shape) for p in parts], dim=-1).flatten(1, 2).float()

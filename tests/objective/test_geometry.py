"""Relative positions against the pixels themselves: every patch centre is looked up in two really cropped views."""

import numpy as np
import pytest
import torch

from m3i_large.data.batch import OTHER_VIEW, TARGET_VIEW
from m3i_large.data.config import ViewConfig
from m3i_large.data.views import FLIP, SampleKeys, crop_box
from m3i_large.objective.geometry import grid_position, relative_position

GRID, SIZE = 4, 64


def seen(box: tuple[int, int, int, int], flip: bool) -> np.ndarray:
    """What a view shows, as image coordinates (y, x) of every one of its SIZE x SIZE pixels: crop, resize, flip."""
    top, left, height, width = box
    y = top + (np.arange(SIZE) + 0.5) / SIZE * height
    x = left + (np.arange(SIZE) + 0.5) / SIZE * width
    view = np.stack(np.meshgrid(y, x, indexing="ij"), axis=-1)
    return view[:, ::-1] if flip else view


@pytest.mark.parametrize("flips", [(False, False), (True, True), (False, True), (True, False)])
def test_positions_find_the_same_pixels_in_both_views(flips: tuple[bool, bool]) -> None:
    rng = np.random.default_rng(0)
    checked = 0
    for number in range(60):
        height, width = (int(v) for v in rng.integers(80, 200, 2))
        draws = SampleKeys(1, 0, 0, number, 0).draws()[0]
        boxes = [crop_box(d, height, width, ViewConfig(crop_scale=(0.3, 1.0))) for d in draws]
        assert all(0 <= d[FLIP] < 1 for d in draws)
        views = [seen(box, flip) for box, flip in zip(boxes, flips, strict=True)]
        position = relative_position(
            torch.tensor([boxes], dtype=torch.int32),
            torch.tensor([[height, width]], dtype=torch.int32),
            torch.tensor([flips]),
            grid=GRID,
            input_view=OTHER_VIEW,
            target_view=TARGET_VIEW,
        )[0].numpy()
        cell = SIZE // GRID
        for n in range(GRID * GRID):
            r, c = divmod(n, GRID)
            centre = views[TARGET_VIEW][r * cell : (r + 1) * cell, c * cell : (c + 1) * cell].reshape(-1, 2).mean(0)
            other = views[OTHER_VIEW]
            (ti, li, hi, wi) = boxes[OTHER_VIEW]
            if not (ti < centre[0] < ti + hi and li < centre[1] < li + wi):
                continue  # outside the input view: nothing to look up
            nearest = np.abs(other - centre).sum(-1).argmin()
            row, col = divmod(int(nearest), SIZE)
            found = (np.array([row, col]) + 0.5) / cell - 0.5
            assert np.abs(position[n, :2] - found).max() < 0.6 / cell * 1.5, (number, n)
            checked += 1
        scale = [10 * np.log(boxes[0][k] / boxes[1][k]) for k in (2, 3)]
        assert np.abs(position[:, 2:] - scale).max() < 1e-4
    assert checked > 300


def test_a_view_relative_to_itself_is_the_plain_grid() -> None:
    box = torch.tensor([[[3, 5, 40, 60], [3, 5, 40, 60]]], dtype=torch.int32)
    for flip in (False, True):
        same = relative_position(
            box, torch.tensor([[90, 80]]), torch.tensor([[flip, flip]]), grid=GRID, input_view=1, target_view=0
        )
        torch.testing.assert_close(same[0], grid_position(GRID), rtol=0, atol=1e-6)

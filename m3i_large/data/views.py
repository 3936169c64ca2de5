"""Every random choice of a sample's two views, drawn from keys: fields of data/batch.py.

Legend: N samples, V = 2 views (0 target, 1 other), 4 = (top, left, height, width), 34 = colour affine on RGB.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from m3i_large.data.config import ViewConfig
from m3i_large.data.keyed import feistel, key, uniform
from m3i_large.errors import UserError

# One number per purpose, so that no two purposes share a key.
VIEW, MASK, PARTNER = 101, 102, 103
# Places of a view's draws; a new purpose goes to the end, or every earlier run's augmentation changes.
AREA, RATIO, TOP, LEFT, FLIP, JITTER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GREY, BLUR, SIGMA, SOLARIZE, NUM_DRAWS = (
    range(15)
)
LUMA = np.array([0.299, 0.587, 0.114])
TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
SOLARIZE_ABOVE, NO_SOLARIZE = 0.5, 2.0
DRAWN_AT_ONCE = 8  # rectangles of a blockwise mask; few masks need more


@dataclass(frozen=True)
class SampleKeys:
    """What the augmentation of N samples depends on, and nothing else: integers, or int64 arrays of one length."""

    seed: int
    epoch_N: np.ndarray | int
    source_N: np.ndarray | int
    id_N: np.ndarray | int
    substitute_N: np.ndarray | int

    def draws(self) -> np.ndarray:
        """NUM_DRAWS uniform numbers for each of the two views -> (N, V, NUM_DRAWS) float64."""
        return uniform(self._view_keys(), NUM_DRAWS)

    def mask_keys(self) -> np.ndarray:
        """One key a sample for its mask -> (N,) uint64."""
        return key(MASK, self.seed, *self._parts())

    def _view_keys(self) -> np.ndarray:
        columns = (np.atleast_1d(part)[:, None] for part in self._parts())
        return key(VIEW, self.seed, *columns, np.arange(2)[None])

    def _parts(self) -> tuple[np.ndarray | int, ...]:
        return self.epoch_N, self.source_N, self.id_N, self.substitute_N


def crop_box(draws: np.ndarray, height: int, width: int, config: ViewConfig) -> tuple[int, int, int, int]:
    """A random crop (top, left, height, width): area uniform in the scale, aspect ratio log-uniform.

    RandomResizedCrop retries a crop that does not fit and in the end takes a central one; here the side that does not
    fit is cut to the image, which needs one set of draws whatever the image's shape.

    Args:
        draws: (NUM_DRAWS,) of one view of one sample.
    """
    low, high = config.crop_scale
    area = height * width * (low + (high - low) * float(draws[AREA]))
    log_low, log_high = math.log(config.crop_ratio[0]), math.log(config.crop_ratio[1])
    ratio = math.exp(log_low + (log_high - log_low) * float(draws[RATIO]))
    w = min(width, max(1, round(math.sqrt(area * ratio))))
    h = min(height, max(1, round(math.sqrt(area / ratio))))
    return int(draws[TOP] * (height - h + 1)), int(draws[LEFT] * (width - w + 1)), h, w


def colour_affine(draws_ND: np.ndarray, grey_mean_N: np.ndarray, config: ViewConfig) -> np.ndarray:
    """The colour change of one view of N samples as affine maps on RGB in [0, 1] -> (N, 3, 4) float32.

    Brightness, contrast about the crop's grey mean, saturation, hue (a rotation in YIQ), then greyscale. The mean is
    that of the crop before brightness, so it is scaled by the brightness first.

    Args:
        grey_mean_N: mean luma of each crop, in [0, 1].
    """
    draw = np.ascontiguousarray(draws_ND.T)
    jittered = draw[JITTER] < config.jitter_probability
    factors = [
        np.where(jittered, 1 + strength * (2 * draw[place] - 1), 1.0)
        for strength, place in zip(config.jitter, (BRIGHTNESS, CONTRAST, SATURATION), strict=False)
    ]
    brightness, contrast, saturation = (factor[:, None, None] for factor in factors)
    angle = np.where(jittered, 2 * np.pi * config.jitter[3] * (2 * draw[HUE] - 1), 0.0)
    matrix = brightness * np.eye(3, 4)
    offset = (1 - contrast) * brightness * grey_mean_N[:, None, None]
    matrix = contrast * matrix + offset * np.array([0.0, 0, 0, 1])
    # Maps without an offset of their own act on the offset column as on a colour.
    matrix = (saturation * np.eye(3) + (1 - saturation) * LUMA) @ matrix
    matrix = np.where((jittered & (config.jitter[3] > 0))[:, None, None], hue_rotation(angle) @ matrix, matrix)
    grey = draw[GREY] < config.grey
    return np.where(grey[:, None, None], np.tile(LUMA, (3, 1)) @ matrix, matrix).astype(np.float32)


def hue_rotation(angle_N: np.ndarray) -> np.ndarray:
    """Rotations of the chroma plane by `angle_N` radians as maps on RGB -> (N, 3, 3); luma is unchanged."""
    cos, sin = np.cos(angle_N), np.sin(angle_N)
    turn = np.zeros((*np.shape(angle_N), 3, 3))
    turn[..., 0, 0] = 1
    turn[..., 1, 1], turn[..., 1, 2], turn[..., 2, 1], turn[..., 2, 2] = cos, -sin, sin, cos
    return np.linalg.inv(TO_YIQ) @ turn @ TO_YIQ


def blur_sigma(draws: np.ndarray, image_size: int, config: ViewConfig) -> float:
    """Standard deviation of the view's blur in pixels, 0 for none; 0.1 to 2 pixels at 224 px, in proportion else."""
    return (0.1 + 1.9 * draws[SIGMA]) * image_size / 224 if draws[BLUR] < config.blur else 0.0


@dataclass(frozen=True, kw_only=True)
class MaskSpec:
    """Which cells of the student's input stay visible, and whether other images fill the rest.

    Attributes:
        cells: P, mask cells a side.
        ratio: share of visible cells.
        blockwise: hide rectangles of cells instead of single ones.
        mix: whether rows get a partner; else every row is its own.
        mix_block: rows that exchange partners; default a lane's.
    """

    cells: int
    ratio: float
    blockwise: bool = False
    mix: bool = True
    mix_block: int | None = None


def draw_masks(keys_N: np.ndarray, spec: MaskSpec) -> np.ndarray:
    """(N, cells, cells) booleans, each with exactly round(ratio * cells^2) True (visible), the others at random places.

    Args:
        keys_N: SampleKeys.mask_keys().
    """
    size = spec.cells**2
    visible = round(spec.ratio * size)
    if spec.blockwise:
        draws_NA4 = uniform(keys_N[:, None] + np.arange(DRAWN_AT_ONCE, dtype=np.uint64), 4)
        rows = zip(keys_N, draws_NA4.tolist(), strict=True)
        return ~np.stack([_blocks(one, draws, spec.cells, hidden=size - visible) for one, draws in rows])
    places = feistel(np.arange(size)[None], size, keys_N[:, None])
    return (places < visible).reshape(-1, spec.cells, spec.cells)


def _blocks(one: np.uint64, draws_A4: list[list[float]], cells: int, *, hidden: int) -> np.ndarray:
    """Random rectangles until exactly `hidden` cells are covered; the last one is cut in reading order.

    As in BEiT: at least 16 of 196 cells each (in proportion on other grids), at most what is left; sides 0.3 to 1 / 0.3
    to one another, log-uniform.

    Args:
        one: the key of the mask.
        draws_A4: its first draws; further ones are made here.
    """
    covered = np.zeros((cells, cells), bool)
    least = max(1.0, 16 * cells * cells / 196)
    attempt, left = 0, hidden
    while left > 0:
        if attempt < len(draws_A4):
            area, ratio, y, x = draws_A4[attempt]
        else:
            area, ratio, y, x = uniform(np.atleast_1d(one) + np.uint64(attempt), 4)[0].tolist()
        area = least + area * max(0.0, left - least)
        aspect = math.exp((2 * ratio - 1) * math.log(1 / 0.3))
        h = min(cells, max(1, round(math.sqrt(area * aspect))))
        w = min(cells, max(1, round(math.sqrt(area / aspect))))
        top, start = int(y * (cells - h + 1)), int(x * (cells - w + 1))
        block = covered[top : top + h, start : start + w]
        rows, columns = np.nonzero(~block)
        block[rows[:left], columns[:left]] = True
        left -= min(left, len(rows))
        attempt += 1
    return covered


def draw_partners(
    lanes: Sequence[int] | np.ndarray, *, seed: int, step: int, slots: int, block: int | None
) -> np.ndarray:
    """Local row of every row's mixing partner: one random cycle inside each block of a lane -> int64 (N,).

    A cycle is a derangement: nobody is mixed with itself. Rows are whole lanes of `slots` rows in order, so that the
    partners depend on (seed, step, lane) only and never on the number of ranks.

    Args:
        lanes: the lane of each local row.
        block: rows per block; default a lane's.

    Raises:
        UserError: the block is no divisor of a lane's rows, or a single row.
    """
    block = slots if block is None else block
    if block < 2 or slots % block:
        fitting = [b for b in range(2, slots + 1) if slots % b == 0]
        raise UserError(
            f"objective.mix.block: got {block}; needed: a divisor, 2 or more, of the {slots} rows of a lane: {fitting}"
        )
    partner = np.empty(len(lanes), np.int64)
    for start in range(0, len(lanes), block):
        keys = key(PARTNER, seed, step, int(lanes[start]), start % slots // block)
        order = np.argsort(uniform(keys, block)[0], kind="stable")
        partner[start + order] = start + np.roll(order, -1)
    return partner

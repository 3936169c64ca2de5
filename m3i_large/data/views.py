"""Every random choice of a sample's two views, drawn from keys: fields of data/batch.py.

Legend: N samples, V = 2 views (0 target, 1 other), 4 = (top, left, height, width), 34 = colour affine on RGB.
"""

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


@dataclass(frozen=True)
class SampleKey:
    """What the augmentation of one sample depends on, and nothing else."""

    seed: int
    epoch: int
    source: int
    id: int
    substitute: int

    def draws(self, view: int) -> np.ndarray:
        """NUM_DRAWS uniform numbers for one view."""
        keys = key(VIEW, self.seed, self.epoch, self.source, self.id, self.substitute, view)
        return uniform(keys, NUM_DRAWS)[0]


def crop_box(draws: np.ndarray, height: int, width: int, config: ViewConfig) -> tuple[int, int, int, int]:
    """A random crop (top, left, height, width): area uniform in the scale, aspect ratio log-uniform.

    RandomResizedCrop retries a crop that does not fit and in the end takes a central one; here the side that does not
    fit is cut to the image, which needs one set of draws whatever the image's shape.
    """
    low, high = config.crop_scale
    area = height * width * (low + (high - low) * draws[AREA])
    log_low, log_high = np.log(config.crop_ratio)
    ratio = np.exp(log_low + (log_high - log_low) * draws[RATIO])
    w = min(width, max(1, round(float(np.sqrt(area * ratio)))))
    h = min(height, max(1, round(float(np.sqrt(area / ratio)))))
    return int(draws[TOP] * (height - h + 1)), int(draws[LEFT] * (width - w + 1)), h, w


def colour_affine(draws: np.ndarray, grey_mean: float, config: ViewConfig) -> np.ndarray:
    """The view's colour change as one affine map (3, 4) on RGB in [0, 1].

    Brightness, contrast about the crop's grey mean, saturation, hue (a rotation in YIQ), then greyscale. The mean is
    that of the crop before brightness, so it is scaled by the brightness first.

    Args:
        grey_mean: mean luma of the crop, in [0, 1].
    """
    matrix = np.eye(4)
    if draws[JITTER] < config.jitter_probability:
        brightness, contrast, saturation = (
            1 + s * (2 * draws[d] - 1) for s, d in zip(config.jitter, (BRIGHTNESS, CONTRAST, SATURATION), strict=False)
        )
        angle = 2 * np.pi * config.jitter[3] * (2 * draws[HUE] - 1)
        matrix = _linear(brightness * np.eye(3)) @ matrix
        matrix = _linear(contrast * np.eye(3), (1 - contrast) * brightness * grey_mean) @ matrix
        matrix = _linear(saturation * np.eye(3) + (1 - saturation) * LUMA) @ matrix
        matrix = _linear(hue_rotation(angle)) @ matrix
    if draws[GREY] < config.grey:
        matrix = _linear(np.tile(LUMA, (3, 1))) @ matrix
    return matrix[:3].astype(np.float32)


def hue_rotation(angle: float) -> np.ndarray:
    """Rotation of the chroma plane by `angle` radians as a 3x3 map on RGB; luma is unchanged."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.linalg.inv(TO_YIQ) @ np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]) @ TO_YIQ


def _linear(matrix_33: np.ndarray, offset: float = 0.0) -> np.ndarray:
    out = np.eye(4)
    out[:3, :3], out[:3, 3] = matrix_33, offset
    return out


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


def draw_mask(sample: SampleKey, spec: MaskSpec) -> np.ndarray:
    """cells x cells booleans with exactly round(ratio * cells^2) True (visible), the others at random places."""
    size = spec.cells**2
    keys = key(MASK, sample.seed, sample.epoch, sample.source, sample.id, sample.substitute)
    visible = round(spec.ratio * size)
    if spec.blockwise:
        return ~_blocks(keys, spec.cells, hidden=size - visible)
    return (feistel(np.arange(size), size, keys) < visible).reshape(spec.cells, spec.cells)


def _blocks(keys: np.ndarray, cells: int, *, hidden: int) -> np.ndarray:
    """Random rectangles until exactly `hidden` cells are covered; the last one is cut in reading order.

    As in BEiT: at least 16 of 196 cells each (in proportion on other grids), at most what is left; sides 0.3 to 1 / 0.3
    to one another, log-uniform.
    """
    covered = np.zeros((cells, cells), bool)
    least = max(1.0, 16 * cells * cells / 196)
    attempt = 0
    while (left := hidden - int(covered.sum())) > 0:
        area, ratio, y, x = uniform(keys + np.uint64(attempt), 4)[0]
        area = least + area * max(0.0, left - least)
        aspect = np.exp((2 * ratio - 1) * np.log(1 / 0.3))
        h = min(cells, max(1, round(float(np.sqrt(area * aspect)))))
        w = min(cells, max(1, round(float(np.sqrt(area / aspect)))))
        top, start = int(y * (cells - h + 1)), int(x * (cells - w + 1))
        block = np.zeros_like(covered)
        block[top : top + h, start : start + w] = True
        new = np.flatnonzero(block & ~covered)[:left]
        covered.reshape(-1)[new] = True
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

"""The content of a letterbox against img2dataset's `border` mode, re-implemented from its description.

img2dataset scales the longer side to S and pads to S x S with white, both by albumentations: sides are rounded half to
even (in early versions cut), and the padding before the content is half of it, rounded down.
"""

import random

import numpy as np
import pytest

from m3i_large.data.letterbox import content_box, content_size


def border_mode(ow: int, oh: int, side: int, *, cut: bool = False) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the content, as img2dataset puts it there."""
    scale = side / float(max(ow, oh))
    width, height = (int(d * scale) if cut else round(d * scale) for d in (ow, oh))
    return int((side - height) / 2.0), int((side - width) / 2.0), height, width


def sizes() -> list[tuple[int, int, int]]:
    rng = random.Random(7)
    odd = [
        (640, 480),
        (480, 640),
        (500, 333),
        (257, 256),
        (256, 257),
        (1000, 30),
        (30, 1000),
        (3, 256),
        (128, 2),
        (5, 4),
    ]
    # Rounded halves: 3 x 512 to 256, 5 x 512 to 256 and so on are x.5 exactly.
    halves = [(512, odd_side) for odd_side in range(7, 512, 36)] + [(odd_side, 512) for odd_side in range(9, 512, 36)]
    drawn = [(rng.randint(20, 5000), rng.randint(20, 5000)) for _ in range(1500)]
    return [(ow, oh, side) for ow, oh in odd + halves + drawn for side in (224, 256, 331, 512)]


def test_the_size_is_exact_and_the_box_inside_it() -> None:
    tested = 0
    for ow, oh, side in sizes():
        top, left, height, width = border_mode(ow, oh, side)
        if ow == oh or min(height, width) < 1:
            continue
        tested += 1
        got = content_size(*(np.array(v) for v in (side, side, ow, oh)))
        assert (int(got[0]), int(got[1])) == (width, height), (ow, oh, side)
        t, le, h, w = content_box(side, side, (ow, oh))
        assert t >= top and le >= left and t + h <= top + height and le + w <= left + width, (ow, oh, side)
        lost = [n for n, inner in ((height - h, height), (width - w, width)) if 3 <= inner < side]
        assert all(n == 2 for n in lost) and (t - top) * 2 == height - h and (le - left) * 2 == width - w
        # The full side is not padded and loses nothing.
        assert (h if oh > ow else w) == side
    assert tested > 5000


def test_early_versions_cut_where_later_ones_round() -> None:
    """No padding is let in beside the content, but for one pixel of pictures that are square to the pixel."""
    for ow, oh, side in sizes():
        top, left, height, width = border_mode(ow, oh, side, cut=True)
        if ow == oh or min(height, width) < 3 or round(min(ow, oh) * side / max(ow, oh)) == side:
            continue
        t, le, h, w = content_box(side, side, (ow, oh))
        if ow > oh:
            assert t >= top and t + h <= top + height and h >= height - 2, (ow, oh, side)
        else:
            assert le >= left and le + w <= left + width and w >= width - 2, (ow, oh, side)


@pytest.mark.parametrize(
    ("stored", "original"),
    [
        ((256, 256), (640, 640)),  # square: nothing to cut
        ((256, 192), (640, 480)),  # not padded
        ((256, 256), (0, 0)),  # not known
        ((256, 256), (0, 480)),
        ((256, 256), (640, 0)),
        ((100, 80), (100, 80)),  # smaller than the side and left as it was (resize_only_if_bigger)
    ],
)
def test_what_is_no_letterbox_stays_whole(stored: tuple[int, int], original: tuple[int, int]) -> None:
    width, height = stored
    assert content_box(width, height, original) == (0, 0, height, width)


def test_extreme_shapes_keep_at_least_a_pixel() -> None:
    for original in ((100_000, 1), (1, 100_000), (256, 1), (256, 2), (256, 3), (2, 256)):
        top, left, height, width = content_box(256, 256, original)
        assert height >= 1 and width >= 1 and top >= 0 and top + height <= 256 and left >= 0 and left + width <= 256


def test_arrays_of_the_kinds_an_index_has() -> None:
    columns = [np.array(v, np.uint32) for v in ([256, 64, 9], [256, 64, 7], [640, 4_000_000_000, 0], [480, 1, 0])]
    width, height = content_size(*columns)
    assert (width.tolist(), height.tolist()) == ([256, 64, 9], [192, 1, 7]) and width.dtype == np.int64

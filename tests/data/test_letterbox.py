"""The content of img2dataset's letterboxes: its own arithmetic, and never a pixel of padding."""

import cv2
import numpy as np
import pytest

from m3i_large.data.letterbox import content_box, content_size


def letterboxed(width: int, height: int, size: int) -> np.ndarray:
    """The longer side scaled to `size`, the other padded evenly: 0 is content, 255 padding."""
    scale = size / max(width, height)
    inner_h, inner_w = (max(1, round(side * scale)) for side in (height, width))
    image = np.full((size, size), 255, np.uint8)
    top, left = int((size - inner_h) / 2.0), int((size - inner_w) / 2.0)
    image[top : top + inner_h, left : left + inner_w] = cv2.resize(
        np.zeros((height, width), np.uint8), (inner_w, inner_h)
    )
    return image


@pytest.mark.parametrize("size", [1, 2, 16, 255, 256])
@pytest.mark.parametrize(
    "original", [(500, 375), (375, 500), (640, 480), (1, 5000), (5000, 1), (100, 99), (257, 256), (7, 3), (256, 255)]
)
def test_a_box_holds_the_content_and_no_padding(original: tuple[int, int], size: int) -> None:
    image = letterboxed(*original, size)
    top, left, height, width = content_box(size, size, original)
    assert top >= 0 and left >= 0 and height >= 1 and width >= 1 and top + height <= size and left + width <= size
    content = image[top : top + height, left : left + width]
    assert content.shape == (height, width)
    inner = int((image == 0).any(1).sum()), int((image == 0).any(0).sum())
    assert not content.any()
    # One pixel at each end of a padded side is given up, and nothing of the other.
    for got, there in zip((height, width), inner, strict=True):
        assert got == (there - 2 if 3 <= there < size else there)


@pytest.mark.parametrize(
    ("stored", "original"), [((256, 192), (500, 375)), ((256, 256), (300, 300)), ((256, 256), (0, 0)), ((9, 9), (0, 5))]
)
def test_what_is_no_letterbox_is_whole(stored: tuple[int, int], original: tuple[int, int]) -> None:
    assert content_box(*stored, original) == (0, 0, stored[1], stored[0])


def test_sizes_of_many_are_sizes_of_each() -> None:
    rng = np.random.default_rng(0)
    width = rng.integers(1, 400, 200)
    height = np.where(rng.random(200) < 0.5, width, rng.integers(1, 400, 200))
    original = rng.integers(0, 2000, (2, 200)) * (rng.random(200) < 0.9)
    together = content_size(width, height, *original)
    assert together[0].dtype == np.int64 and (together[0] <= width).all() and (together[1] <= height).all()
    for n in range(200):
        one = content_size(*(np.array(v) for v in (width[n], height[n], original[0, n], original[1, n])))
        assert (int(one[0]), int(one[1])) == (together[0][n], together[1][n])

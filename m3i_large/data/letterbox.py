"""The picture inside a letterbox: img2dataset's default `border` mode scales the longer side to S and pads with white
to S x S, and its .json keeps the size before that. So the content's place is known exactly, without looking at pixels.
"""

import numpy as np


def content_size(
    width: np.ndarray, height: np.ndarray, original_width: np.ndarray, original_height: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(width, height) without the padding, in pixels, int64; unchanged where the picture is no letterbox.

    Args:
        width, height: of the stored picture, integers of any one shape.
        original_width, original_height: before it was resized; 0 where not known.
    """
    width, height, ow, oh = (np.asarray(x, np.int64) for x in (width, height, original_width, original_height))
    longer = np.maximum(np.maximum(ow, oh), 1)
    padded = (width == height) & (ow != oh) & (ow > 0) & (oh > 0)
    inner_width = np.maximum(1, np.rint(ow * (width / longer))).astype(np.int64)
    inner_height = np.maximum(1, np.rint(oh * (height / longer))).astype(np.int64)
    return np.where(padded, inner_width, width), np.where(padded, inner_height, height)


def content_box(width: int, height: int, original: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the content in a stored picture; the padding is split as evenly as it goes.

    A padded side loses one pixel more at each end: JPEG mixes the edge with the padding, and rounding has changed
    between versions of img2dataset.
    """
    inner = content_size(*(np.array(v) for v in (width, height, *original)))
    inner_width, inner_height = int(inner[0]), int(inner[1])
    across, down = int(3 <= inner_width < width), int(3 <= inner_height < height)
    top, left = (height - inner_height) // 2 + down, (width - inner_width) // 2 + across
    return top, left, inner_height - 2 * down, inner_width - 2 * across

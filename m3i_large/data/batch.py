"""The contract between data and objective: one micro-batch, every random choice already drawn.

Legend: n (in N) = local rows, H W = pixels, V = 2 views (0 target, 1 other), P = mask cells a side, T = text tokens.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

TARGET_VIEW, OTHER_VIEW = 0, 1


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's rows of one micro-step.

    Rows come in the canonical order (lane-major, then source), so concatenating the ranks' batches gives the same
    global batch at every world size.
    """

    target_NHWC: Tensor  # uint8, target view y: cropped and resized, NOT yet flipped or coloured
    other_NHWC: Tensor  # uint8, other view x
    box_NV4: Tensor  # int32 (top, left, height, width) in the unflipped decoded image, pixels
    size_N2: Tensor  # int32 (height, width) of the decoded image, pixels
    flip_NV: Tensor  # bool, horizontal flip applied after the crop
    colour_NV34: Tensor  # float32 affine on RGB in [0, 1]
    solarize_NV: Tensor  # float32 threshold in [0, 1]; above 1 means off
    partner_N: Tensor  # int64 local row whose other view is mixed in; the row itself where nothing is mixed
    mask_NPP: Tensor  # bool, True = visible; in a mix: where the row's own target view shows
    category_N: Tensor  # int64 class index, -1 = none
    text_NT: Tensor  # int64 token ids
    text_valid_N: Tensor  # bool, the row has a text
    source_N: Tensor  # int64 index of the source in the recipe
    epoch_N: Tensor  # int64 epoch of that source
    id_N: Tensor  # int64 sample id within the source (before substitution)
    substitute_N: Tensor  # int64, 0 = the sample itself, j > 0 = its j-th substitute was read
    step: int
    micro_step: int
    # The most rows with a text (a category) that any micro-step has on a rank of this world size: the towers behind
    # them run on exactly this many rows, padded and masked, so that every rank does the same work in every step.
    text_rows: int
    category_rows: int

    def __len__(self) -> int:
        return self.target_NHWC.shape[0]

    def rows(self, begin: int, end: int) -> "Batch":
        """Rows begin to end - 1, whose partners must be among them."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        cut: dict[str, Any] = {k: v[begin:end] if isinstance(v, Tensor) else v for k, v in values.items()}
        cut |= {"partner_N": cut["partner_N"] - begin}
        cut |= {name: min(cut[name], end - begin) for name in ("text_rows", "category_rows")}
        return Batch(**cut)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """Returns a copy whose tensors are on `device`."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {
            k: v.to(device, non_blocking=non_blocking) if isinstance(v, Tensor) else v for k, v in values.items()
        }
        return Batch(**moved)

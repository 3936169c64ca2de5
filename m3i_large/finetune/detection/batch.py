"""What passes between the detection data, the detectors and the scores.

Legend: B images, H W pixels, M objects, K detections, m side of a mask grid.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Target:
    """The annotated objects of one image, in pixels of the image that the detector sees.

    Attributes:
        boxes_M4: float32 (x0, y0, x1, y1), inside the image, of positive area.
        labels_M: int64, 0 to number of classes - 1 in the order of the category ids.
        masks_MHW: bool, as large as the unpadded image; None where masks are not trained.
    """

    boxes_M4: Tensor
    labels_M: Tensor
    masks_MHW: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class DetectionBatch:
    """One rank's images and what is on them.

    Attributes:
        image_BCHW: uint8 RGB, padded with zeros at the bottom and on the right, to multiples of 32 at least.
        size_B2: int64 (height, width) of each image without padding.
        targets: of each image; empty in evaluation.
    """

    image_BCHW: Tensor
    size_B2: Tensor
    targets: tuple[Target, ...] = ()

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "DetectionBatch":
        """The same on another device."""

        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=non_blocking)

        targets = tuple(
            Target(
                boxes_M4=move(t.boxes_M4),
                labels_M=move(t.labels_M),
                masks_MHW=None if t.masks_MHW is None else move(t.masks_MHW),
            )
            for t in self.targets
        )
        return replace(self, image_BCHW=move(self.image_BCHW), size_B2=move(self.size_B2), targets=targets)


@dataclass(frozen=True, kw_only=True)
class Detections:
    """What a detector finds in one image, best first, on the CPU.

    Attributes:
        boxes_K4: float32 (x0, y0, x1, y1) in pixels of the image that the detector saw.
        scores_K: float32, 0 to 1.
        labels_K: int64, as in `Target`.
        masks_Kmm: float16, probability of the object on an m x m grid over its box (torchvision's
            `paste_masks_in_image` spreads it over the image); None without a mask head.
    """

    boxes_K4: Tensor
    scores_K: Tensor
    labels_K: Tensor
    masks_Kmm: Tensor | None = None

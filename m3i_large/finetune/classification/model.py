"""A linear classifier on a backbone, and the mixing of its images.

Legend: B images, H W pixels, C classes, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3i_large.finetune.backbones import widths
from m3i_large.finetune.classification.config import ClassifierConfig
from m3i_large.finetune.pixels import Normalize
from m3i_large.finetune.task import TaskModel

TOP = 5  # classes of a prediction


@dataclass(frozen=True, kw_only=True)
class Mix:
    """What a batch's images are mixed with: the same images in reversed order.

    Attributes:
        share: of an image that stays its own.
        box: (top, left, height, width) that CutMix replaces; None: mixup, all pixels are blended.
    """

    share: float
    box: tuple[int, int, int, int] | None


@dataclass(frozen=True, kw_only=True)
class ClassificationBatch:
    """One rank's images.

    Attributes:
        image_BCHW: uint8 RGB.
        label_B: int64.
        mix: None in evaluation, and where there is no mixing.
    """

    image_BCHW: Tensor
    label_B: Tensor
    mix: Mix | None = None

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "ClassificationBatch":
        """The same on another device."""
        image_BCHW = self.image_BCHW.to(device, non_blocking=non_blocking)
        return replace(self, image_BCHW=image_BCHW, label_B=self.label_B.to(device, non_blocking=non_blocking))


def mixed(image_BCHW: Tensor, mix: Mix) -> Tensor:
    """Images blended with those of the reversed batch (mixup, arXiv 1710.09412), or with a box of theirs (CutMix,
    arXiv 1905.04899)."""
    other_BCHW = image_BCHW.flip(0)
    if mix.box is None:
        return mix.share * image_BCHW + (1 - mix.share) * other_BCHW
    top, left, height, width = mix.box
    inside = (..., slice(top, top + height), slice(left, left + width))
    out_BCHW = image_BCHW.clone()
    out_BCHW[inside] = other_BCHW[inside]
    return out_BCHW


def target_of(label_B: Tensor, mix: Mix | None, *, num_classes: int, smoothing: float) -> Tensor:
    """Probabilities (B, C), float32: one class's, smoothed, or two images' by their shares."""
    target_BC = F.one_hot(label_B, num_classes).float() * (1 - smoothing) + smoothing / num_classes
    return target_BC if mix is None else mix.share * target_BC + (1 - mix.share) * target_BC.flip(0)


class Classifier(TaskModel):
    """A backbone, the mean of its last map (the last norm included), a linear classifier.

    Args:
        smoothing: of the targets.
        mean, std: of the pixels (0 to 1, RGB) that the backbone was trained on.
    """

    def __init__(
        self,
        backbone: nn.Module,
        config: ClassifierConfig,
        *,
        num_classes: int,
        smoothing: float,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.backbone, self.normalize = backbone, Normalize(mean, std)
        self.num_classes, self.smoothing = num_classes, smoothing
        width = widths(backbone)[-1]
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=config.std)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: ClassificationBatch) -> dict[str, Tensor] | list[tuple[int, list[int]]]:
        """See TaskModel; the loss `class`, or for each image its class and the (at most) five that it seems to be."""
        image_BCHW = self.normalize(batch.image_BCHW)
        if batch.mix is not None:
            image_BCHW = mixed(image_BCHW, batch.mix)
        # Not backbone_maps: a ViT's class token takes part in its attention here, as in the pre-training.
        feature_BD = self.backbone(image_BCHW)[-1].mean((2, 3))
        logit_BC = self.head(self.norm(feature_BD)).float()
        if self.training:
            target_BC = target_of(batch.label_B, batch.mix, num_classes=self.num_classes, smoothing=self.smoothing)
            return {"class": F.cross_entropy(logit_BC, target_BC)}
        best = logit_BC.topk(min(TOP, self.num_classes)).indices
        return list(zip(batch.label_B.tolist(), best.tolist(), strict=True))

"""UPerNet over an exported backbone, of transformers' heads.

Legend: B images, H W pixels, h w pixels of a window, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

from m3i_large.finetune.backbones import backbone_maps, build_levels, without_batch_statistics
from m3i_large.finetune.pixels import Normalize
from m3i_large.finetune.segmentation.config import UPerNetConfig
from m3i_large.finetune.segmentation.images import UNLABELLED
from m3i_large.finetune.task import TaskModel

STRIDE_16 = 2  # number of that map


@dataclass(frozen=True, kw_only=True)
class SegmentationBatch:
    """One rank's images.

    Attributes:
        image_BCHW: uint8 RGB, padded with zeros at the bottom and on the right, to multiples of 32.
        size_B2: int64 (height, width) of each image without padding.
        label_BHW: uint8, UNLABELLED in the padding; None in evaluation.
        file_B2: int64 (height, width) of each image's file, for which labels are predicted.
    """

    image_BCHW: Tensor
    size_B2: Tensor
    file_B2: Tensor
    label_BHW: Tensor | None = None

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "SegmentationBatch":
        """The same on another device."""
        label_BHW = None if self.label_BHW is None else self.label_BHW.to(device, non_blocking=non_blocking)
        return replace(self, image_BCHW=self.image_BCHW.to(device, non_blocking=non_blocking), label_BHW=label_BHW)


class UPerNet(TaskModel):
    """A backbone, UPerNet's head on its maps at strides 4 to 32, an auxiliary head on the one at 16.

    Args:
        size: side of the windows of an evaluation, pixels; the training's.
        mean, std: of the pixels (0 to 1, RGB) that the backbone was trained on.
    """

    def __init__(
        self,
        backbone: nn.Module,
        config: UPerNetConfig,
        *,
        num_classes: int,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.backbone, self.normalize, self.size = backbone, Normalize(mean, std), size
        self.windows, self.weight = config.windows, config.auxiliary
        self.levels, channels = build_levels(backbone, out=config.maps)
        settings = UperNetConfig(  # type: ignore[call-arg]  # num_labels is of its base
            hidden_size=config.width,
            num_labels=num_classes,
            auxiliary_channels=config.auxiliary_width,
            auxiliary_in_channels=channels[STRIDE_16],
        )
        self.decode_head: nn.Module = without_batch_statistics(UperNetHead(settings, in_channels=channels))
        self.auxiliary_head: nn.Module | None = None
        if config.auxiliary:
            self.auxiliary_head = without_batch_statistics(UperNetFCNHead(settings, in_channels=channels))
        for module in (self.decode_head, self.auxiliary_head):
            for part in module.modules() if module is not None else ():
                if isinstance(part, nn.Conv2d):
                    nn.init.trunc_normal_(part.weight, std=0.02)

    def forward(self, batch: SegmentationBatch) -> dict[str, Tensor] | list[Tensor]:
        """See TaskModel; losses `pixel` and `auxiliary`, or each image's classes, uint8, of its file's size."""
        image_BCHW = self.normalize(batch.image_BCHW, batch.size_B2)
        if not self.training:
            return [
                _classes(logit_CHW, size=tuple(size), file=tuple(file))
                for logit_CHW, size, file in zip(
                    self._logits(image_BCHW), batch.size_B2.tolist(), batch.file_B2.tolist(), strict=True
                )
            ]
        assert batch.label_BHW is not None
        maps = self.levels(backbone_maps(self.backbone, image_BCHW))
        label_BHW = batch.label_BHW.long()
        losses = {"pixel": pixel_loss(self.decode_head(maps), label_BHW)}
        if self.auxiliary_head is not None:
            losses["auxiliary"] = self.weight * pixel_loss(self.auxiliary_head(maps), label_BHW)
        return losses

    def _logits(self, image_BCHW: Tensor) -> Tensor:
        """(B, C, H, W); all windows in one call, as ranks must call modules equally often under ZeRO-3."""
        height, width = image_BCHW.shape[2:]
        if not self.windows or max(height, width) <= self.size:
            return _upsampled(self._head(image_BCHW), (height, width))
        places = [(top, left) for top in _starts(height, self.size) for left in _starts(width, self.size)]
        h, w = min(self.size, height), min(self.size, width)
        cut = torch.cat([image_BCHW[..., top : top + h, left : left + w] for top, left in places])
        logits = _upsampled(self._head(cut), (h, w)).chunk(len(places))
        total = logits[0].new_zeros((len(image_BCHW), logits[0].shape[1], height, width))
        times_HW = total.new_zeros((height, width))
        for (top, left), one in zip(places, logits, strict=True):
            total[..., top : top + h, left : left + w] += one
            times_HW[top : top + h, left : left + w] += 1
        return total / times_HW

    def _head(self, image_BCHW: Tensor) -> Tensor:
        return self.decode_head(self.levels(backbone_maps(self.backbone, image_BCHW)))


def pixel_loss(logit_BChw: Tensor, label_BHW: Tensor) -> Tensor:
    """Cross entropy at the labels' resolution, mean over labelled pixels; zero where there is none."""
    logit_BCHW = _upsampled(logit_BChw, (label_BHW.shape[1], label_BHW.shape[2]))
    total = F.cross_entropy(logit_BCHW, label_BHW, ignore_index=UNLABELLED, reduction="sum")
    return total / (label_BHW != UNLABELLED).sum().clamp_min(1)


def _upsampled(logit_BChw: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logit_BChw.float(), size, mode="bilinear", align_corners=False)


def _starts(length: int, window: int) -> list[int]:
    """Where windows begin that overlap by a third at least and cover the length."""
    if length <= window:
        return [0]
    number = 1 + -(-(length - window) // (window * 2 // 3))
    return [round(k * (length - window) / (number - 1)) for k in range(number)]


def _classes(logit_CHW: Tensor, *, size: tuple[int, int], file: tuple[int, int]) -> Tensor:
    height, width = size
    return _upsampled(logit_CHW[None, :, :height, :width], file)[0].argmax(0).to(torch.uint8).cpu()

"""Box classification for long tails: one sigmoid for each category and the federated loss.

Which categories are in an image is known of a few only, so the others are no negatives: a step's loss takes the
categories that it has and a random few besides (arXiv 2103.07461; settings of ViTDet's LVIS
configurations).

Legend: B images, P proposals of all images, C categories, K detections of an image.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes

PRIOR = 0.01  # probability of every category before training
POWER = 0.5  # a category is drawn in proportion to (its number of images) ** POWER
MIN_SIDE = 1e-2  # of a detected box, pixels


def federated_loss(logit_PC: Tensor, label_P: Tensor, *, weight_C: Tensor, num_categories: int) -> Tensor:
    """Binary cross entropy over some categories, summed over them, mean over proposals.

    Args:
        label_P: int64, 0 for the background, then 1 to C.
        weight_C: in proportion to which categories are drawn that no proposal has; 0 is never drawn.
        num_categories: that enter the loss, at least; those that proposals have always do.
    """
    target_PC = F.one_hot(label_P, logit_PC.shape[1] + 1)[:, 1:].to(logit_PC.dtype)
    chosen_C = target_PC.any(0)
    left_C = weight_C.masked_fill(chosen_C, 0)
    missing = min(num_categories - int(chosen_C.sum()), int((left_C > 0).sum()))
    if missing > 0:
        chosen_C[torch.multinomial(left_C, missing)] = True
    loss_PC = F.binary_cross_entropy_with_logits(logit_PC, target_PC, reduction="none")
    return (loss_PC * chosen_C).sum() / max(1, len(logit_PC))


class FederatedHeads(RoIHeads):
    """torchvision's heads with sigmoids; output 0 of the classifier, the background's, is not used.

    Args:
        images_C: number of training images that show each category.
        num_categories: of a step's loss, see `federated_loss`.
    """

    weight_C: Tensor

    def __init__(self, *args: Any, images_C: Tensor, num_categories: int, **more: Any) -> None:
        super().__init__(*args, **more)
        self.num_categories = num_categories
        self.register_buffer("weight_C", images_C.float() ** POWER, persistent=False)
        torch.nn.init.constant_(self.box_predictor.cls_score.bias, -math.log((1 - PRIOR) / PRIOR))
        self.box_predictor.register_forward_hook(self._keep_logits)
        self._logit_PC: Tensor | None = None
        self._labels: list[Tensor] = []

    def _keep_logits(self, module: Any, inputs: Any, outputs: tuple[Tensor, Tensor]) -> None:
        self._logit_PC = outputs[0][:, 1:].float()

    def select_training_samples(self, *args: Any) -> Any:
        """As the base's; its labels are kept for the loss."""
        samples = super().select_training_samples(*args)
        self._labels = samples[2]
        return samples

    def forward(self, *args: Any) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """As the base's with another loss of the classifier: the base's forward knows one only."""
        found, losses = super().forward(*args)
        if self.training:
            assert self._logit_PC is not None
            losses["loss_classifier"] = federated_loss(
                self._logit_PC, torch.cat(self._labels), weight_C=self.weight_C, num_categories=self.num_categories
            )
        self._logit_PC, self._labels = None, []  # no graph outlives its step
        return found, losses

    def postprocess_detections(
        self,
        class_logits: Tensor,
        box_regression: Tensor,
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Boxes (K, 4), scores (K,) and labels (K,) from 1 of every image, best first; as the base's, by sigmoids."""
        counts = [len(own) for own in proposals]
        box_PC4 = self.box_coder.decode(box_regression, proposals)[:, 1:]
        score_PC = class_logits[:, 1:].float().sigmoid()
        out: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        for own_PC4, own_PC, size in zip(box_PC4.split(counts), score_PC.split(counts), image_shapes, strict=True):
            rows, labels = torch.where(own_PC > self.score_thresh)
            boxes, scores = clip_boxes_to_image(own_PC4[rows, labels], size), own_PC[rows, labels]
            kept = remove_small_boxes(boxes, MIN_SIDE)
            kept = kept[
                batched_nms(boxes[kept], scores[kept], labels[kept], self.nms_thresh)[: self.detections_per_img]
            ]
            for held, value in zip(out, (boxes[kept], scores[kept], labels[kept] + 1), strict=True):
                held.append(value)
        return out

"""Faster and Mask R-CNN of torchvision's parts over a feature pyramid.

torchvision's own transform is left out: batches arrive scaled and padded. Backbone and pyramid run in the precision of
the surrounding autocast; what is compared with coordinates (anchors, boxes, losses, suppression) in fp32.

Legend: B images, C channels, H W pixels, M objects, K detections.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign

from m3i_large.finetune.backbones import LEVELS, backbone_maps, build_pyramid
from m3i_large.finetune.detection.batch import DetectionBatch, Detections
from m3i_large.finetune.detection.config import RcnnConfig
from m3i_large.finetune.detection.federated import FederatedHeads
from m3i_large.finetune.pixels import Normalize
from m3i_large.finetune.task import TaskModel

ASPECTS = (0.5, 1.0, 2.0)
BOX_GRID, MASK_GRID = 7, 14
TOP = "pool"  # the level at stride 64, of anchors only


class RCNN(TaskModel):
    """A detector around a backbone.

    Args:
        backbone: from create_model; images of any size in multiples of 32 must suit it.
        config: the head.
        images_C: number of training images that show each of the C categories.
        mean, std: of the pixels (0 to 1, RGB) that the backbone was trained on.
    """

    def __init__(
        self, backbone: nn.Module, config: RcnnConfig, *, images_C: Tensor, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.backbone, self.normalize = backbone, Normalize(mean, std)
        self.pyramid = build_pyramid(backbone, out=config.width)
        self.rpn = _proposals(config)
        self.heads = _heads(config, images_C)
        self.has_top = len(config.anchors) > len(LEVELS)

    def forward(self, batch: DetectionBatch) -> dict[str, Tensor] | list[Detections]:
        """See TaskModel; losses: classifier, box_reg, objectness, rpn_box_reg and, with masks, mask."""
        sizes = [(int(height), int(width)) for height, width in batch.size_B2.tolist()]
        images = ImageList(self.normalize(batch.image_BCHW, batch.size_B2), sizes)
        levels = [level.float() for level in self.pyramid(backbone_maps(self.backbone, images.tensors))]
        features = OrderedDict(zip(LEVELS, levels, strict=True))
        if self.has_top:
            features[TOP] = F.max_pool2d(levels[-1], 1, 2, 0)
        targets = [_target(target) for target in batch.targets] if self.training else None
        proposals, rpn_losses = self.rpn(images, features, targets)
        found, losses = self.heads(features, proposals, sizes, targets)
        if self.training:
            return {name.removeprefix("loss_"): x.float() for name, x in {**losses, **rpn_losses}.items()}
        return [_detections(one) for one in found]


def _target(target: Any) -> dict[str, Tensor]:
    """As torchvision has it: label 0 is the background."""
    found = {"boxes": target.boxes_M4, "labels": target.labels_M + 1}
    return found if target.masks_MHW is None else found | {"masks": target.masks_MHW.to(torch.uint8)}


def _detections(found: dict[str, Tensor]) -> Detections:
    masks = found["masks"][:, 0].half().cpu() if "masks" in found else None
    return Detections(
        boxes_K4=found["boxes"].float().cpu(),
        scores_K=found["scores"].float().cpu(),
        labels_K=found["labels"].cpu() - 1,
        masks_Kmm=masks,
    )


def _proposals(config: RcnnConfig) -> nn.Module:
    anchors = AnchorGenerator(tuple((side,) for side in config.anchors), (ASPECTS,) * len(config.anchors))
    train, evaluation = config.proposals
    kept = {"training": train, "testing": evaluation}
    return RegionProposalNetwork(
        anchors,
        _in_fp32(RPNHead(config.width, len(ASPECTS), conv_depth=config.rpn_convs)),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=config.rpn_samples,
        positive_fraction=0.5,
        pre_nms_top_n={name: 2 * number for name, number in kept.items()},
        post_nms_top_n=kept,
        nms_thresh=0.7,
    )


def _heads(config: RcnnConfig, images_C: Tensor) -> nn.Module:
    grid, width, outputs = (BOX_GRID, BOX_GRID), config.width, len(images_C) + 1  # the background comes first
    box_head: nn.Module = TwoMLPHead(width * BOX_GRID**2, config.box_width)
    if config.box_convs:
        box_head = FastRCNNConvFCHead(
            (width, *grid), [width] * config.box_convs, [config.box_width], norm_layer=LayerNorm2d
        )
    more: dict[str, Any] = {}
    if config.masks:
        more["mask_roi_pool"] = MultiScaleRoIAlign(list(LEVELS), MASK_GRID, 2)
        more["mask_head"] = MaskRCNNHeads(width, [width] * config.mask_convs, 1, norm_layer=LayerNorm2d)
        more["mask_predictor"] = _in_fp32(MaskRCNNPredictor(width, width, outputs))
    kind = RoIHeads
    if config.classifier == "federated":
        kind = partial(FederatedHeads, images_C=images_C, num_categories=config.federated_categories)
    return kind(
        MultiScaleRoIAlign(list(LEVELS), BOX_GRID, 2),
        box_head,
        _in_fp32(FastRCNNPredictor(config.box_width, outputs)),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=config.box_samples,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=config.min_score,
        nms_thresh=0.5,
        detections_per_img=config.detections,
        **more,
    )


def _in_fp32(module: nn.Module) -> nn.Module:
    """The module, whose results are turned into fp32: coordinates in bf16 are wrong by pixels."""
    module.register_forward_hook(_turned)
    return module


def _turned(module: nn.Module, inputs: Any, output: Any) -> Any:
    turn: Callable[[Any], Any] = lambda x: x.float() if isinstance(x, Tensor) else type(x)(map(turn, x))  # noqa: E731
    return turn(output)

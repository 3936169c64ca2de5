"""The detector: equal to torchvision's own where that exists, and able to learn."""

from collections import OrderedDict
from typing import Any

import coco_files
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign, box_iou

from m3i_large.finetune.backbones import backbone_maps, build_pyramid
from m3i_large.finetune.detection.batch import DetectionBatch, Target
from m3i_large.finetune.detection.config import RcnnConfig
from m3i_large.finetune.detection.rcnn import RCNN, LayerNorm2d
from m3i_large.models import create_model

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
CLASSES = 2
SIZES = [(64, 96), (48, 80)]


def backbone(kind: str = "vit") -> Any:
    torch.manual_seed(0)
    if kind == "vit":
        return create_model("vit", width=32, depth=2, heads=2, image_size=64, patch_size=8)
    return create_model("internimage", channels=8, depths=(1, 1, 1, 1), groups=(1, 2, 4, 8))


def detector(kind: str = "vit", **more: Any) -> RCNN:
    config = RcnnConfig(**(coco_files.HEAD | more))
    return RCNN(backbone(kind), config, images_C=torch.ones(CLASSES), mean=MEAN, std=STD)


def batch(*, masks: bool = False, empty: bool = False) -> DetectionBatch:
    keyed = torch.Generator().manual_seed(1)
    image = torch.zeros(2, 3, 64, 96, dtype=torch.uint8)
    for one, (height, width) in zip(image, SIZES, strict=True):
        one[:, :height, :width] = torch.randint(0, 256, (3, height, width), generator=keyed, dtype=torch.uint8)
    boxes = [torch.tensor([[4.0, 5, 40, 33], [50, 20, 90, 60]]), torch.tensor([[10.0, 8, 50, 40]])]
    labels = [torch.tensor([0, 1]), torch.tensor([1])]
    if empty:
        boxes[1], labels[1] = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    targets = []
    for box, label, (height, width) in zip(boxes, labels, SIZES, strict=True):
        mask = torch.zeros(len(box), height, width, dtype=torch.bool)
        for one, (x0, y0, x1, y1) in zip(mask, box.int().tolist(), strict=True):
            one[y0:y1, x0:x1] = True
        targets.append(Target(boxes_M4=box, labels_M=label, masks_MHW=mask if masks else None))
    return DetectionBatch(image_BCHW=image, size_B2=torch.tensor(SIZES), targets=tuple(targets))


class Levels(nn.Module):
    """Backbone and pyramid as torchvision wants them."""

    def __init__(self, net: Any, pyramid: nn.Module, width: int) -> None:
        super().__init__()
        self.net, self.pyramid, self.out_channels = net, pyramid, width

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict(zip(("p2", "p3", "p4", "p5"), self.pyramid(backbone_maps(self.net, x)), strict=True))


def torchvisions(masks: bool) -> Any:
    """The whole of torchvision's detector with our head's sizes; its transform neither scales nor pads further."""
    head = coco_files.HEAD
    net = backbone()
    levels = Levels(net, build_pyramid(net, out=head["width"]), head["width"])
    more: dict[str, Any] = {}
    if masks:
        more["mask_roi_pool"] = MultiScaleRoIAlign(["p2", "p3", "p4", "p5"], 14, 2)
        more["mask_head"] = MaskRCNNHeads(head["width"], [head["width"]] * 2, 1, norm_layer=LayerNorm2d)
        more["mask_predictor"] = MaskRCNNPredictor(head["width"], head["width"], CLASSES + 1)
    kind: Any = MaskRCNN if masks else FasterRCNN
    return kind(
        levels,
        min_size=64,
        max_size=96,
        image_mean=MEAN,
        image_std=STD,
        rpn_anchor_generator=AnchorGenerator(((8,), (16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 4),
        rpn_head=RPNHead(head["width"], 3),
        rpn_pre_nms_top_n_train=120,
        rpn_post_nms_top_n_train=60,
        rpn_pre_nms_top_n_test=80,
        rpn_post_nms_top_n_test=40,
        rpn_batch_size_per_image=32,
        box_roi_pool=MultiScaleRoIAlign(["p2", "p3", "p4", "p5"], 7, 2),
        box_head=TwoMLPHead(head["width"] * 49, head["box_width"]),
        box_predictor=FastRCNNPredictor(head["box_width"], CLASSES + 1),
        box_batch_size_per_image=32,
        box_detections_per_img=10,
        size_divisible=32,
        **more,
    )


@pytest.mark.parametrize("masks", [False, True])
def test_losses_and_detections_are_torchvisions(masks: bool) -> None:
    ours, theirs = detector(masks=masks, mask_convs=2), torchvisions(masks)
    names = {"backbone.": "backbone.net.", "pyramid.": "backbone.pyramid.", "rpn.": "rpn.", "heads.": "roi_heads."}
    state = {
        new + key.removeprefix(old): x
        for key, x in ours.state_dict().items()
        for old, new in names.items()
        if key.startswith(old)
    }
    theirs.load_state_dict(state, strict=True)
    given = batch(masks=masks)
    images = [x[:, :h, :w].float() / 255 for x, (h, w) in zip(given.image_BCHW, SIZES, strict=True)]
    targets = [{"boxes": t.boxes_M4, "labels": t.labels_M + 1, "masks": t.masks_MHW} for t in given.targets]
    for target in targets:
        if masks:
            target["masks"] = target["masks"].to(torch.uint8)
        else:
            del target["masks"]

    def unscaled(image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        return image, target

    theirs.transform.resize = unscaled  # its second image would be enlarged
    torch.manual_seed(5)
    mine: Any = ours.train()(given)
    torch.manual_seed(5)
    wanted = theirs.train()(images, targets)
    assert {f"loss_{name}" for name in mine} == set(wanted)
    for name, value in mine.items():
        torch.testing.assert_close(value, wanted[f"loss_{name}"], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        found: Any = ours.eval()(DetectionBatch(image_BCHW=given.image_BCHW, size_B2=given.size_B2))
        there = theirs.eval()(images)
    for mine_1, theirs_1 in zip(found, there, strict=True):
        torch.testing.assert_close(mine_1.boxes_K4, theirs_1["boxes"], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(mine_1.scores_K, theirs_1["scores"], rtol=1e-4, atol=1e-5)
        assert mine_1.labels_K.tolist() == (theirs_1["labels"] - 1).tolist()


@pytest.mark.parametrize("kind", ["vit", "internimage"])
@pytest.mark.parametrize("head", [{}, {"box_convs": 1, "rpn_convs": 2, "anchors": [8, 16, 32, 64, 128], "masks": True}])
def test_every_parameter_gets_a_gradient(kind: str, head: dict[str, Any]) -> None:
    model = detector(kind, **head).train()
    with torch.no_grad():
        for x in model.parameters():
            x.add_(0.02 * torch.randn_like(x))  # offsets and masks begin at 0, where nothing behind them has a gradient
    losses: Any = model(batch(masks=True))
    sum(losses.values()).backward()
    # No object here is large enough for the coarsest levels; a class token has no place in a map.
    unused = ("backbone.cls_token", "pyramid.levels.3.", "pyramid.fpn.layer_blocks.3.")
    named = [(name, x) for name, x in model.named_parameters() if not name.startswith(unused)]
    idle = [name for name, x in named if x.grad is None or not x.grad.abs().any()]
    assert not idle and len(named) > 20, idle


def test_images_without_objects_train_too() -> None:
    model = detector(masks=True).train()
    losses: Any = model(batch(masks=True, empty=True))
    assert all(x.isfinite() for x in losses.values())


def test_padding_does_not_matter() -> None:
    """The same image alone and beside a larger one, under a small network whose last block sees no padding."""
    model = detector("internimage").eval()
    given = batch()
    with torch.no_grad():
        noise = given.image_BCHW.clone()
        noise[1, :, 48:] = 200
        noise[1, :, :, 80:] = 90
        a: Any = model(DetectionBatch(image_BCHW=given.image_BCHW, size_B2=given.size_B2))
        b: Any = model(DetectionBatch(image_BCHW=noise, size_B2=given.size_B2))
    torch.testing.assert_close(a[1].boxes_K4, b[1].boxes_K4)
    assert len(a[1].boxes_K4) and (a[1].boxes_K4[:, 2] <= 80).all() and (a[1].boxes_K4[:, 3] <= 48).all()


def test_under_autocast_losses_are_fp32_and_near() -> None:
    model = detector(masks=True).train()
    torch.manual_seed(2)
    exact: Any = model(batch(masks=True))
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16):
        rounded: Any = model(batch(masks=True))
    assert all(x.dtype == torch.float32 for x in rounded.values())
    for name, value in exact.items():
        torch.testing.assert_close(rounded[name], value, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("kind", ["vit", "internimage"])
def test_it_learns_two_images(kind: str) -> None:
    model = detector(kind).train()
    given = batch()
    for one, target in zip(given.image_BCHW, given.targets, strict=True):
        one.copy_(one // 8)
        for (x0, y0, x1, y1), label in zip(target.boxes_M4.int().tolist(), target.labels_M.tolist(), strict=True):
            one[label, y0:y1, x0:x1] = 255
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = last = 0.0
    for step in range(90):
        torch.manual_seed(step)
        losses: Any = model(given)
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        first, last = first or float(total.detach()), float(total.detach())
    assert last < first / 3
    with torch.no_grad():
        found: Any = model.eval()(DetectionBatch(image_BCHW=given.image_BCHW, size_B2=given.size_B2))
    for one, target in zip(found, given.targets, strict=True):
        best = box_iou(target.boxes_M4, one.boxes_K4)
        right = best * (target.labels_M[:, None] == one.labels_K[None])
        assert (right.max(1).values > 0.6).all(), right

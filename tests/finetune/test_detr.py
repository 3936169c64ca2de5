"""Detectors of transformers over our backbones: they learn, their boxes are where they should be, nothing hides."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from coco_files import scene
from torch import Tensor, nn
from torchvision.ops import box_iou
from transformers import RTDetrImageProcessor

from m3i_large.errors import UserError
from m3i_large.finetune.backbones import without_batch_statistics
from m3i_large.finetune.detection.batch import DetectionBatch, Target
from m3i_large.finetune.detection.config import DetectionConfig, RcnnConfig
from m3i_large.finetune.detection.detr import Detr, _detections
from m3i_large.finetune.recipe import load_finetune_recipe
from m3i_large.models import create_model

KINDS = ("rt_detr_v2", "d_fine")
HEAD = {"width": 32, "heads": 2, "feedforward": 64, "decoder_layers": 2, "queries": 20, "denoising": 10}
BACKBONES: dict[str, dict[str, Any]] = {
    "vit": {"image_size": 64, "patch_size": 8, "width": 32, "depth": 2, "heads": 2},
    "internimage": {"image_size": 64, "channels": 8, "depths": [1, 1, 1, 1], "groups": [1, 2, 4, 8]},
}


def detector(kind: str = "rt_detr_v2", backbone: str = "vit", **head: Any) -> Detr:
    torch.manual_seed(0)
    config = DetectionConfig.model_validate({"head": {"kind": kind, **HEAD, **head}}).head
    network = create_model(backbone, **BACKBONES[backbone])
    return Detr(network, config, images_C=torch.ones(2), mean=(0.5,) * 3, std=(0.25,) * 3)


def batch_of(numbers: list[int]) -> DetectionBatch:
    """Scenes of 64 x 80 pixels, padded to 64 x 96."""
    image, targets = torch.zeros(len(numbers), 3, 64, 96, dtype=torch.uint8), []
    for row, number in enumerate(numbers):
        pixels, objects = scene(number)
        image[row, :, :, :80] = torch.from_numpy(pixels).permute(2, 0, 1)
        boxes = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in (o["bbox"] for o in objects)]).float()
        labels = torch.tensor([int(o["category_id"] == 7) for o in objects])
        targets.append(Target(boxes_M4=boxes, labels_M=labels))
    return DetectionBatch(image_BCHW=image, size_B2=torch.tensor([[64, 80]] * len(numbers)), targets=tuple(targets))


@pytest.mark.parametrize("backbone", list(BACKBONES))
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns_and_boxes_stay_inside_the_image(kind: str, backbone: str) -> None:
    model, batch = detector(kind, backbone), batch_of([0, 1])
    losses = model(batch)
    assert {"vfl", "bbox", "giou"} <= losses.keys() and all(math.isfinite(x) for x in map(Tensor.item, losses.values()))
    sum(losses.values()).backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None}
    assert idle <= {"backbone.cls_token"}  # it is not part of a map
    assert all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert not model.detector.model.backbone.model.handed
    assert not any("backbone" in name and not name.startswith("backbone.") for name, _ in model.named_parameters())
    found = model.eval()(replace(batch, targets=()))
    for one in found:
        assert len(one.scores_K) == 40 and (one.scores_K.diff() <= 0).all()
        assert (one.boxes_K4 >= 0).all() and (one.boxes_K4 <= torch.tensor([80.0, 64, 80, 64])).all()


def test_the_loss_is_transformers_own_sum() -> None:
    """Grouping by kind loses nothing, at the same draws."""
    model, batch = detector(), batch_of([2, 3])
    torch.manual_seed(7)
    total = sum(model(batch).values())
    seen: dict[str, Tensor] = {}
    model.detector.register_forward_hook(lambda module, inputs, output: seen.update(loss=output.loss))
    torch.manual_seed(7)
    model(batch)
    assert total.item() == pytest.approx(seen["loss"].item(), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_finds_the_objects_of_the_scenes_that_it_was_shown(kind: str) -> None:
    """Boxes of another format, or of another scale than the padded image's, would be elsewhere."""
    model, batch, overlaps = detector(kind, width=64, queries=10), batch_of([0, 1, 2]), []
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(150):
        torch.manual_seed(step)
        losses = model(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        found = model.eval()(replace(batch, targets=()))
    for one, target in zip(found, batch.targets, strict=True):
        first = 2 * len(target.labels_M)
        overlap = box_iou(target.boxes_M4, one.boxes_K4[:first])
        overlap[target.labels_M[:, None] != one.labels_K[:first]] = 0
        overlaps += overlap.amax(1).tolist()
    assert min(overlaps) > 0.3 and np.mean(overlaps) > 0.6, overlaps


def test_detections_are_those_of_transformers_post_processing() -> None:
    torch.manual_seed(0)
    logit_QC, box_Q4 = torch.randn(6, 3), torch.rand(6, 4) * 0.2 + 0.4
    mine = _detections(logit_QC, box_Q4, torch.tensor([64, 96]), scale_4=torch.tensor([96.0, 64, 96, 64]), most=6)
    outputs = SimpleNamespace(logits=logit_QC[None], pred_boxes=box_Q4[None])
    (theirs,) = RTDetrImageProcessor().post_process_object_detection(outputs, 0.0, target_sizes=[(64, 96)])
    torch.testing.assert_close(mine.boxes_K4, theirs["boxes"])
    torch.testing.assert_close(mine.scores_K, theirs["scores"])
    assert mine.labels_K.tolist() == theirs["labels"].tolist()


def test_a_batch_without_objects_uses_all_parameters_and_teaches_nothing() -> None:
    model, batch = detector(), batch_of([0, 1])
    used: list[set[str]] = []
    none = Target(boxes_M4=torch.zeros(0, 4), labels_M=torch.zeros(0, dtype=torch.int64))
    for targets in (batch.targets, (none, none), (none, batch.targets[1])):
        model.zero_grad(set_to_none=True)
        losses = model(replace(batch, targets=targets))
        sum(losses.values()).backward()
        used.append({name for name, p in model.named_parameters() if p.grad is not None})
        if targets[1] is none:
            assert all(p.grad.abs().max() == 0 for p in model.parameters() if p.grad is not None)
            assert all(loss.item() == 0 for loss in losses.values())
    assert used[0] == used[1] == used[2]


def test_group_norms_take_the_place_of_batch_norms() -> None:
    module = without_batch_statistics(nn.Sequential(nn.Conv2d(3, 48, 1), nn.Sequential(nn.BatchNorm2d(48, eps=1e-4))))
    norm = module[1][0]
    assert isinstance(norm, nn.GroupNorm) and norm.num_groups == 6 and norm.eps == 1e-4


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("task.head={kind: detr}", "task.head.kind: Input should be 'rt_detr_v2' or 'd_fine'"),
        ("task.head={kind: d_fine, masks: true}", "task.head.masks: unknown key"),
        ("task.head={kind: d_fine, width: 30}", "a multiple of 4 and of heads"),
        ("task.head={kind: d_fine, queires: 30}", "did you mean 'queries'"),
        ("task.head={hed: 1}", "task.head.hed: unknown key"),
    ],
)
def test_mistakes_name_the_field_as_it_was_written(override: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        load_finetune_recipe("ft_coco_25ep", [override])


def test_a_head_without_a_kind_is_an_rcnn() -> None:
    assert isinstance(load_finetune_recipe("demo_detection").task.head, RcnnConfig)
    assert np.isclose(load_finetune_recipe("demo_detection").task.head.min_score, 0.05)

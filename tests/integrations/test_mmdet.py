"""mmdetection's own configurations with our backbone; runs where mmdet and mmcv (with its operators) are installed."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mmdet")
pytest.importorskip("mmcv.ops")
import written
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.structures import InstanceData

import m3i_large.integrations
from m3i_large.errors import UserError
from m3i_large.export import export

CONFIGS = Path(m3i_large.integrations.__file__).parent / "mmdet_configs"
WIDTHS = {"cascade_mask_rcnn_internimage_h_coco": [16, 32, 64, 128], "dino_internimage_h_coco": [32, 64, 128]}


def small(name: str, **backbone: Any) -> Config:
    """The shipped configuration over a backbone of 16 channels."""
    register_all_modules()
    config = Config.fromfile(str(CONFIGS / f"{name}.py"))
    arch = dict(written.HUGE["backbone"]["arch"])
    own = {"type": "M3IInternImage", "name": "internimage", **arch, "with_cp": True, "drop_path": 0.1, **backbone}
    own["out_indices"] = (1, 2, 3) if len(WIDTHS[name]) == 3 else (0, 1, 2, 3)
    config.model.backbone = own
    config.model.neck.in_channels = WIDTHS[name]
    if "num_queries" in config.model:
        config.model.num_queries = 20  # of an image of 96 pixels, which has fewer than 900 places
    return config


def example() -> list[DetDataSample]:
    sample = DetDataSample()
    boxes, labels = torch.tensor([[8.0, 8, 60, 70]]), torch.tensor([3])
    from mmdet.structures.mask import BitmapMasks

    masks = BitmapMasks([torch.ones(96, 96, dtype=torch.uint8).numpy()], 96, 96)
    sample.gt_instances = InstanceData(bboxes=boxes, labels=labels, masks=masks)
    shape = {"img_shape": (96, 96), "ori_shape": (96, 96), "pad_shape": (96, 96), "batch_input_shape": (96, 96)}
    sample.set_metainfo(shape | {"scale_factor": (1.0, 1.0)})
    return [sample]


@pytest.mark.parametrize("name", sorted(WIDTHS))
def test_a_shipped_configuration_trains_from_an_export(name: str, tmp_path: Path) -> None:
    written.write(tmp_path / "run", written.HUGE)
    export(tmp_path / "run", to="mmdet", out=tmp_path / "weights.pth")
    config = small(name, weights=str(tmp_path / "weights.pth"))
    model = MODELS.build(config.model)
    model.init_weights()
    state = torch.load(tmp_path / "weights.pth", weights_only=True)["state_dict"]
    own = {f"backbone.{k}": v for k, v in model.backbone.state_dict().items()}
    assert own.keys() == state.keys() and all(torch.equal(own[k], state[k]) for k in own)
    losses = model.train().loss(torch.randn(1, 3, 96, 96), example())
    total = sum(sum(x) if isinstance(x, list) else x for key, x in losses.items() if "loss" in key)
    total.backward()
    assert torch.isfinite(total)
    learned = [p.grad is not None and p.grad.abs().sum() > 0 for p in model.backbone.parameters()]
    assert sum(learned) > 0.9 * len(learned)


def test_rates_fall_from_the_head_to_the_stem() -> None:
    config = small("cascade_mask_rcnn_internimage_h_coco")
    model = MODELS.build(config.model)
    wrapper = config.optim_wrapper.to_dict() | {"type": "OptimWrapper"}
    wrapper.pop("dtype")
    optimizer = build_optim_wrapper(model, wrapper)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert {id(p) for p in named.values() if p.requires_grad} <= rates.keys()
    top = 1 + 5  # five blocks
    assert rates[id(named["backbone.patch_embed.conv1.weight"])] == pytest.approx(1e-4 * 0.94**top)
    assert rates[id(named["backbone.levels.0.blocks.0.mlp.fc1.weight"])] == pytest.approx(1e-4 * 0.94 ** (top - 1))
    assert rates[id(named["roi_head.bbox_head.0.fc_cls.weight"])] == 1e-4


def test_stages_are_frozen_and_wrong_weights_refused(tmp_path: Path) -> None:
    model = MODELS.build(small("dino_internimage_h_coco", frozen_stages=2).model.backbone)
    frozen = {name.split(".")[0:2][-1] for name, p in model.named_parameters() if not p.requires_grad}
    assert {"0", "1"} <= frozen and not {"2", "3"} & frozen
    torch.save({"state_dict": {"backbone.levels.0.norm.0.weight": torch.ones(3)}}, tmp_path / "wrong.pth")
    with pytest.raises(UserError):
        MODELS.build(
            small("dino_internimage_h_coco", weights=str(tmp_path / "wrong.pth")).model.backbone
        ).init_weights()

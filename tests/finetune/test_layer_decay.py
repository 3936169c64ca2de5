"""Layers and learning rates, written out by hand."""

from typing import Any

import pytest
import torch

from m3i_large.finetune.layer_decay import layer_numbers, param_groups
from m3i_large.models import create_model


def test_layers_of_a_vit() -> None:
    model = create_model("vit", width=16, depth=3, heads=2, image_size=16, patch_size=8)
    layer, top = layer_numbers(model)
    assert top == 4
    wanted = {"cls_token": 0, "pos_embed": 0, "patch_embed.proj.weight": 0, "blocks.0.attn.qkv.bias": 1}
    wanted |= {"blocks.2.mlp.fc2.weight": 3}
    assert {name: layer(name) for name in wanted} == wanted
    assert min(layer("norm.weight"), top) == top


def test_layers_of_internimage_h() -> None:
    """6, 6, 32 and 6 blocks; the k-th of post_norms follows block 5, 11, 17, 23 or 29 of the third level, which the
    official rule takes for blocks 0 to 4."""
    with torch.device("meta"):
        model = create_model("internimage_h")
    layer, top = layer_numbers(model)
    assert top == 51
    wanted = {
        "patch_embed.conv1.weight": 0,
        "levels.0.blocks.0.norm1.0.weight": 1,
        "levels.0.blocks.5.mlp.fc1.weight": 6,
        "levels.0.norm.0.weight": 6,
        "levels.0.downsample.conv.weight": 7,
        "levels.1.blocks.0.dcn.offset.weight": 7,
        "levels.1.blocks.5.mlp.fc2.bias": 12,
        "levels.2.blocks.0.norm1.0.weight": 13,
        "levels.2.post_norms.0.0.weight": 18,
        "levels.2.post_norms.1.0.bias": 24,
        "levels.2.post_norms.4.0.weight": 42,
        "levels.2.blocks.31.mlp.fc2.bias": 44,
        "levels.2.norm.0.bias": 44,
        "levels.2.downsample.norm.1.weight": 45,
        "levels.3.blocks.5.norm2.0.weight": 50,
        "levels.3.norm.0.weight": 50,
    }
    assert {name: layer(name) for name in wanted} == wanted
    assert {layer(name) for name, _ in model.named_parameters()} == set(range(51)), "no parameter is beyond its layers"


@pytest.mark.parametrize("name", ["vit", "internimage"])
def test_groups_cover_every_parameter_once_with_its_own_rate(name: str) -> None:
    arch: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2, "image_size": 16, "patch_size": 8}
    if name == "internimage":
        arch = {"channels": 8, "depths": (1, 1, 2, 1), "groups": (1, 2, 4, 8), "center_feature_scale": True}
    backbone = create_model(name, **arch)
    root = torch.nn.Module()
    root.backbone, root.head = backbone, torch.nn.Linear(4, 4)  # type: ignore[assignment]
    named = dict(root.named_parameters())
    groups = param_groups(
        named.items(),
        backbone,
        layer_decay=0.5,
        weight_decay=0.1,
        decays=lambda name, p: p.dim() > 1,
        offset_scale=0.1,
    )
    layer, top = layer_numbers(backbone)
    seen: dict[int, tuple[float, float]] = {}
    for group in groups:
        for parameter in group["params"]:
            assert id(parameter) not in seen
            seen[id(parameter)] = (group["lr_scale"], group["weight_decay"])
    assert len(seen) == len(named) and len(groups) < len(named)
    for key, parameter in named.items():
        scale = 0.5 ** (top - min(top, layer(key.removeprefix("backbone.")))) if key.startswith("backbone.") else 1.0
        slow = "dcn.offset" in key or "center_feature_scale" in key
        assert seen[id(parameter)] == pytest.approx((scale * (0.1 if slow else 1), 0.1 if parameter.dim() > 1 else 0))

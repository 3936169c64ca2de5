"""A ViT on images of any size: positions as timm resizes them, windows as a mask over full attention."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from m3i_large.finetune.backbones import STRIDES, backbone_maps, build_pyramid
from m3i_large.models import create_model
from m3i_large.models.vit import in_windows


def vit(**more: Any) -> Any:
    torch.manual_seed(0)
    model = create_model("vit", **({"width": 32, "depth": 8, "heads": 2, "image_size": 32, "patch_size": 8} | more))
    with torch.no_grad():
        for x in model.parameters():
            x.add_(0.1 * torch.randn_like(x))
    return model.eval()


def masked_block(block: Any, x_BLD: Tensor, allowed_LL: Tensor) -> Tensor:
    """A pre-norm block longhand, whose attention sees only what `allowed` says."""
    attn = block.attn
    num, length, width = x_BLD.shape
    q, k, v = attn.qkv(block.norm1(x_BLD)).reshape(num, length, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    score = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    seen = score.masked_fill(~allowed_LL, -math.inf).softmax(-1) @ v
    x_BLD = x_BLD + attn.proj(seen.transpose(1, 2).reshape(num, length, width))
    return x_BLD + block.mlp(block.norm2(x_BLD))


@pytest.mark.parametrize(("height", "width"), [(6, 9), (5, 7), (3, 3), (2, 10)])
def test_windows_are_a_mask_over_full_attention(height: int, width: int) -> None:
    size, block = 3, vit().blocks[0]
    x = torch.randn(2, height, width, 32)
    down, across = -height % size, -width % size
    rows, columns = height + down, width + across
    padded = torch.zeros(2, rows, columns, 32)
    padded[:, :height, :width] = x
    place = torch.stack(torch.meshgrid(torch.arange(rows) // size, torch.arange(columns) // size, indexing="ij"), -1)
    window = place.reshape(-1, 2)
    allowed = (window[:, None] == window[None]).all(-1)
    with torch.no_grad():
        wanted = masked_block(block, padded.flatten(1, 2), allowed).unflatten(1, (rows, columns))[:, :height, :width]
        torch.testing.assert_close(in_windows(block, x, size), wanted, rtol=0, atol=1e-5)


def test_four_blocks_of_a_windowed_model_are_global() -> None:
    """A pixel far away changes a token only through the global blocks, and those are the last of each quarter."""
    model = vit(window_size=2)
    assert model.global_blocks == {1, 3, 5, 7}
    assert create_model("vit", width=8, depth=12, heads=2, image_size=16).global_blocks == {2, 5, 8, 11}
    plain = vit()
    image = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        assert not torch.allclose(model(image, as_map=True)[0], plain(image, as_map=True)[0], atol=1e-3)
        model.global_blocks = set(range(8))
        torch.testing.assert_close(model(image, as_map=True)[0], plain(image, as_map=True)[0])


def test_positions_are_interpolated_and_nothing_else_changes() -> None:
    model = vit()
    image = torch.randn(1, 3, 48, 64)
    table = model.pos_embed[:, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    wide = torch.nn.functional.interpolate(table, (6, 8), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    with torch.no_grad():
        x = model.patch_embed(image) + wide
        for block in model.blocks:
            x = block(x)
        wanted = model.norm(x).transpose(1, 2).unflatten(2, (6, 8))
        torch.testing.assert_close(model(image, as_map=True)[0], wanted)
        with pytest.raises(ValueError, match="needed"):
            model(image)
        with pytest.raises(ValueError, match="multiples of 8"):
            model(torch.randn(1, 3, 44, 64), as_map=True)


@pytest.mark.parametrize("patch", [4, 8, 16, 32])
def test_pyramids_have_their_strides(patch: int) -> None:
    backbone = vit(patch_size=patch, image_size=64)
    pyramid = build_pyramid(backbone, out=12)
    with torch.no_grad():
        levels = pyramid(backbone_maps(backbone, torch.randn(1, 3, 96, 64)))
    assert [tuple(x.shape) for x in levels] == [(1, 12, 96 // s, 64 // s) for s in STRIDES]


def test_pyramid_of_an_internimage() -> None:
    arch: dict[str, Any] = {"channels": 8, "depths": (1, 1, 1, 1), "groups": (1, 2, 4, 8)}
    backbone = create_model("internimage", **arch)
    with torch.no_grad():
        levels = build_pyramid(backbone, out=12)(backbone_maps(backbone, torch.randn(1, 3, 96, 64)))
    assert [tuple(x.shape) for x in levels] == [(1, 12, 96 // s, 64 // s) for s in STRIDES]

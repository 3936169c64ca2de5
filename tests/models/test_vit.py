import pytest
import timm
import torch
from torch import Tensor, nn

from m3i_large.errors import UserError
from m3i_large.models import create_model

TINY = {"image_size": 16, "patch_size": 4, "width": 32, "depth": 3, "heads": 4}


def timm_twin(num_classes: int = 0) -> nn.Module:
    return timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=4, num_classes=num_classes
    )


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_keys_and_shapes_are_timms() -> None:
    with torch.device("meta"):
        ours = create_model("vit_b16").state_dict()
        theirs = timm.create_model("vit_base_patch16_224", num_classes=0).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


@pytest.mark.parametrize(
    ("name", "count", "depth"), [("vit_s16", 21_665_664, 12), ("vit_b16", 85_798_656, 12), ("vit_l16", 303_301_632, 24)]
)
def test_named_sizes(name: str, count: int, depth: int) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == count
    assert isinstance(model.blocks, nn.ModuleList)
    assert (len(model.blocks), model.image_size, model.token_stride, model.grid) == (depth, 224, 16, 14)


def test_overrides_of_a_named_size() -> None:
    with torch.device("meta"):
        model = create_model("vit_s16", image_size=64, patch_size=8, depth=2, mlp_ratio=2)
    assert (model.width, model.grid, model.token_stride, len(model.blocks)) == (384, 8, 8, 2)
    assert model.blocks[0].mlp.fc1.out_features == 768
    assert model.pos_embed.shape == (1, 65, 384)


def test_tokens_and_map_equal_timms_features() -> None:
    theirs, ours = timm_twin(), create_model("vit", **TINY)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    expected = theirs.forward_features(image())[:, 1:]
    torch.testing.assert_close(ours.tokens(image()), expected, rtol=0, atol=1e-6)
    (feature_map,) = ours(image())
    assert feature_map.shape == (2, 32, 4, 4)
    assert torch.equal(feature_map[1, :, 2, 3], ours.tokens(image())[1, 2 * 4 + 3])


def test_logits_equal_timms() -> None:
    theirs, ours = timm_twin(num_classes=5), create_model("vit", num_classes=5, **TINY)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(ours.logits(image()), theirs(image()), rtol=0, atol=1e-6)


def test_bridge_adds_nothing() -> None:
    with torch.device("meta"):
        assert (
            create_model("vit", bridge=True, **TINY).state_dict().keys()
            == create_model("vit", **TINY).state_dict().keys()
        )


def test_kept_tokens_are_those_gathered_before_the_blocks() -> None:
    model = create_model("vit", **TINY)
    keep_BK = torch.tensor([[5, 0, 11], [2, 15, 3]])
    patches = model.patch_embed(image()) + model.pos_embed[:, 1:]
    rows = []
    for row, keep in enumerate(keep_BK.tolist()):
        x = torch.cat([model.cls_token[0] + model.pos_embed[0, :1], *(patches[row, i : i + 1] for i in keep)])[None]
        for block in model.blocks:
            x = block(x)
        rows.append(model.norm(x)[0, 1:])
    torch.testing.assert_close(model.tokens(image(), keep_BK), torch.stack(rows), rtol=1e-5, atol=1e-6)


def test_keeping_all_tokens_changes_nothing_but_their_order() -> None:
    model = create_model("vit", **TINY)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3)).expand(2, -1)
    torch.testing.assert_close(model.tokens(image(), order), model.tokens(image())[:, order[0]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "arch", "message"),
    [
        ("vit_b61", {}, r"backbone.name: got 'vit_b61'.*did you mean vit_b16\?"),
        ("vit_b16", {"image_sise": 64}, r"image_sise.*did you mean image_size\?"),
        ("vit_b16", {"image_size": 100}, r"patch_size: got 16, needed a divisor of .*image_size 100"),
        ("vit_b16", {"heads": 7}, r"heads: got 7, needed a divisor of .*width 768"),
        ("vit_b16", {"depth": 0}, r"arch.depth: got 0 for vit_b16, needed: .*greater than 0"),
        ("vit", {"width": 64, "depth": 2}, r"arch.heads: got nothing for vit, needed"),
    ],
)
def test_a_wrong_model_is_one_clear_line(name: str, arch: dict[str, int], message: str) -> None:
    with torch.device("meta"), pytest.raises(UserError, match=message) as caught:
        create_model(name, **arch)
    assert "\n" not in str(caught.value)


def test_wrong_calls_are_refused() -> None:
    model = create_model("vit", **TINY)
    with pytest.raises(ValueError, match=r"got shape \(2, 3, 16, 20\), needed \(B, 3, 16, 16\)"):
        model.tokens(torch.zeros(2, 3, 16, 20))
    with pytest.raises(ValueError, match="keep_BK"):
        model(image(), keep_BK=torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="num_classes 0"):
        model.logits(image())
    with pytest.raises(UserError, match="num_classes: got -1"):
        create_model("vit", num_classes=-1, **TINY)

"""InternImage against its official key list and against a functional re-statement in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import Tensor

from m3i_large.build import build_objective
from m3i_large.errors import UserError
from m3i_large.models import create_model
from m3i_large.models.factory import INTERN_IMAGE_SIZES
from m3i_large.parallel.comm import Rank
from m3i_large.parallel.remat import rematerialize
from m3i_large.recipe import load_recipe

# Tensors and parameters with 1,000 classes, as the official classes have them.
OFFICIAL = {
    "t": (633, 29_918_424),
    "s": (751, 50_079_880),
    "b": (751, 97_461_832),
    "l": (839, 223_334_810),
    "xl": (883, 334_819_780),
    "h": (1357, 1_089_636_760),
    "g": (1295, 3_076_373_352),
}
NANO: dict[str, Any] = {"channels": 8, "depths": (1, 1, 2, 1), "groups": (1, 2, 4, 8), "image_size": 64}
GIANT = {"dw_kernel_size": 5, "center_feature_scale": True, "head": "pool"}
VARIANTS: dict[str, dict[str, Any]] = {
    "t": {},
    "s": {"layer_scale": 0.3, "post_norm": True},
    "l": {"layer_scale": 0.3, "post_norm": True, "offset_scale": 2.0},
    "h": {"res_post_norm": True, "level2_post_norm": (0, 1)} | GIANT,
    "g": {"post_norm": True, "level2_post_norm": (1,)} | GIANT,
    "remove_center": {"remove_center": True},
    "pre-norm with scale": {"layer_scale": 0.3, "mlp_ratio": 2.0},
}


def nano(variant: str = "h", *, drawn: bool = True, **more: Any) -> Any:
    """A model of four levels; `drawn` fills every parameter, so that zero-initialised ones take part."""
    torch.manual_seed(0)
    bridge = {"bridge": True, "bridge_width": 16}
    model = create_model("internimage", **(NANO | bridge | VARIANTS[variant] | more))
    if drawn:
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(
                    torch.randn(parameter.shape) * 0.3 + (1.0 if "norm" in key and "weight" in key else 0.0)
                )
    return model


def longhand(state: dict[str, Tensor], image: Tensor, options: dict[str, Any]) -> tuple[list[Tensor], Tensor]:
    """Maps (B, C, H, W) and tokens, from the names of the checkpoint and the papers' formulas alone."""

    def norm(x: Tensor, name: str) -> Tensor:  # over dimension 1
        x = x - x.mean(1, keepdim=True)
        x = x / torch.sqrt((x * x).mean(1, keepdim=True) + 1e-6)
        return x * state[f"{name}.weight"].view(1, -1, 1, 1) + state[f"{name}.bias"].view(1, -1, 1, 1)

    def linear(x: Tensor, name: str) -> Tensor:
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return torch.einsum("bchw,oc->bohw", x, weight) + bias.view(1, -1, 1, 1)

    def gelu(x: Tensor) -> Tensor:
        return x * 0.5 * (1 + torch.erf(x / 2**0.5))

    def deform(x: Tensor, name: str, groups: int) -> Tensor:
        _, C, H, W = x.shape
        kernel = state[f"{name}.dw_conv.0.weight"]
        local = F.conv2d(x, kernel, state[f"{name}.dw_conv.0.bias"], padding=kernel.shape[-1] // 2, groups=C)
        local = gelu(norm(local, f"{name}.dw_conv.1.1"))
        value, scale = linear(x, f"{name}.input_proj"), options.get("offset_scale", 1.0)
        points = [(dx, dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1)]  # column by column
        if options.get("remove_center"):
            points.remove((0, 0))
        K = len(points)
        offset, logit = linear(local, f"{name}.offset"), linear(local, f"{name}.mask")
        rows, columns = torch.arange(H).double().view(-1, 1), torch.arange(W).double().view(1, -1)
        parts = []
        for g in range(groups):
            part = value[:, g * C // groups : (g + 1) * C // groups]
            share = logit[:, g * K : (g + 1) * K].exp()
            share = share / share.sum(1, keepdim=True)
            total = torch.zeros_like(part)
            for k, (dx, dy) in enumerate(points):
                at_x = columns + (dx + offset[:, (g * K + k) * 2]) * scale
                at_y = rows + (dy + offset[:, (g * K + k) * 2 + 1]) * scale
                grid = torch.stack([(2 * at_x + 1) / W - 1, (2 * at_y + 1) / H - 1], -1)
                total = total + share[:, k : k + 1] * F.grid_sample(part, grid, align_corners=False)
            if f"{name}.center_feature_scale_proj_weight" in state:
                weight = state[f"{name}.center_feature_scale_proj_weight"][g]
                gate = torch.einsum("bchw,c->bhw", local, weight) + state[f"{name}.center_feature_scale_proj_bias"][g]
                gate = torch.sigmoid(gate)[:, None]
                total = total * (1 - gate) + part * gate
            parts.append(total)
        return linear(torch.cat(parts, 1), f"{name}.output_proj")

    def block(x: Tensor, name: str, groups: int) -> Tensor:
        def mlp(x: Tensor) -> Tensor:
            return linear(gelu(linear(x, f"{name}.mlp.fc1")), f"{name}.mlp.fc2")

        for k, layer in ((1, lambda x: deform(x, f"{name}.dcn", groups)), (2, mlp)):
            if options.get("post_norm"):
                y = norm(layer(x), f"{name}.norm{k}.0")
            else:
                y = layer(norm(x, f"{name}.norm{k}.0"))
                if options.get("res_post_norm"):
                    y = norm(y, f"{name}.res_post_norm{k}.0")
            if f"{name}.gamma{k}" in state:
                y = y * state[f"{name}.gamma{k}"].view(1, -1, 1, 1)
            x = x + y
        return x

    def conv(x: Tensor, name: str) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), stride=2, padding=1)

    x = gelu(norm(conv(image, "patch_embed.conv1"), "patch_embed.norm1.1"))
    x = norm(conv(x, "patch_embed.conv2"), "patch_embed.norm2.1")
    maps = []
    for level, (depth, groups) in enumerate(zip(NANO["depths"], NANO["groups"], strict=True)):
        for k in range(depth):
            x = block(x, f"levels.{level}.blocks.{k}", groups)
            ids = options.get("level2_post_norm", ())
            if level == 2 and k in ids:
                x = norm(x, f"levels.2.post_norms.{ids.index(k)}.0")
        if f"levels.{level}.norm.0.weight" in state:
            x = norm(x, f"levels.{level}.norm.0")
        maps.append(x)
        if level < 3:
            x = norm(conv(x, f"levels.{level}.downsample.conv"), f"levels.{level}.downsample.norm.1")
    wide = F.conv2d(maps[3], state["dcnv3_head_x4.0.weight"], state["dcnv3_head_x4.0.bias"])
    B, D4, h, w = wide.shape
    fine = wide.view(B, D4 // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(B, D4 // 4, 2 * h, 2 * w)
    fine = fine + F.conv2d(maps[2], state["dcnv3_head_x3.weight"], state["dcnv3_head_x3.bias"])
    return maps, fine.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_maps_and_tokens_equal_the_formulas(variant: str) -> None:
    model, options = nano(variant).double(), VARIANTS[variant]
    image = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    maps, tokens = longhand(model.state_dict(), image, options)
    for actual, expected in zip(model(image), maps, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(model.tokens(image), tokens, rtol=1e-7, atol=1e-8)
    assert tokens.shape == (2, 4 * 6, 16)


@pytest.mark.parametrize("size", OFFICIAL)
def test_every_size_has_the_official_tensors_and_parameters_within_seconds(size: str) -> None:
    with torch.device("meta"):
        model = create_model(f"internimage_{size}", num_classes=1000)
    assert (len(model.state_dict()), sum(p.numel() for p in model.parameters())) == OFFICIAL[size]


def test_the_keys_of_h_are_the_official_ones_in_order_and_shape() -> None:
    text = (Path(__file__).parent / "internimage_h_keys.txt").read_text(encoding="utf-8")
    with torch.device("meta"):
        model, alone = create_model("internimage_h", num_classes=1000), create_model("internimage_h")
        bridged = create_model("internimage_h", bridge=True)
    assert [f"{key} {tuple(x.shape)}" for key, x in model.state_dict().items()] == text.splitlines()
    assert (len(alone.state_dict()), sum(p.numel() for p in alone.parameters())) == (1335, 1_073_122_480)
    extra = bridged.state_dict().keys() - alone.state_dict().keys()
    assert extra == {f"dcnv3_head_{x}.{y}" for x in ("x4.0", "x3") for y in ("weight", "bias")}
    assert (bridged.width, len(bridged.blocks)) == (1024, 50)


def test_smaller_sizes_fit_the_defaults_of_decoder_and_pool() -> None:
    with torch.device("meta"):
        objective = build_objective(load_recipe("m3i", ["backbone.name=internimage_t", "backbone.arch={}"]))
    assert objective.student.width == 768


@pytest.mark.parametrize(("height", "width"), [(64, 64), (33, 47), (101, 64), (32, 250)])
def test_four_maps_at_strides_four_to_thirty_two_for_any_size(height: int, width: int) -> None:
    maps = nano("t")(torch.randn(1, 3, height, width))
    for level, x in enumerate(maps):
        stride = 4 * 2**level
        assert x.shape == (1, 8 * 2**level, -(-height // stride), -(-width // stride))


def test_initial_values_are_the_official_ones() -> None:
    model = nano("h", drawn=False, channels=32, num_classes=10, layer_scale=None)
    for key, x in model.named_parameters():
        if any(part in key for part in (".offset.", ".mask.", "center_feature_scale_proj")):
            assert not x.any(), key
        elif key.endswith(("input_proj.weight", "output_proj.weight")):
            bound = (6 / sum(x.shape)) ** 0.5
            assert x.abs().max() <= bound and x.std().item() == pytest.approx(bound / 3**0.5, rel=0.1), key
        elif ".mlp." in key and key.endswith("weight"):
            assert x.std().item() == pytest.approx(0.02, rel=0.1), key
        elif key.endswith(".bias") and x.dim() == 1 and "conv" not in key and "dcnv3_head" not in key:
            assert not x.any(), key
    scaled = nano("s", drawn=False)
    assert (scaled.levels[0].blocks[0].gamma1 == 0.3).all()


@pytest.mark.parametrize(("variant", "head"), [("t", "conv_head.0.weight"), ("h", "clip_projector.norm1_q.0.weight")])
def test_the_official_classifiers(variant: str, head: str) -> None:
    width = {"bridge_width": 32} if variant == "h" else {}
    model = nano(variant, num_classes=7, **width).eval()
    assert head in model.state_dict()
    assert model.logits(torch.randn(2, 3, 64, 64)).shape == (2, 7)
    with pytest.raises(ValueError, match="num_classes 0"):
        nano(variant).logits(torch.randn(2, 3, 64, 64))


def classify(state: dict[str, Tensor], maps: list[Tensor], tokens: Tensor, *, heads: int) -> Tensor:
    """The official classifiers in evaluation, from the names of the checkpoint alone."""

    def norm(x: Tensor, name: str) -> Tensor:  # over the last dimension
        x = x - x.mean(-1, keepdim=True)
        x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)
        return x * state[f"{name}.0.weight"] + state[f"{name}.0.bias"]

    if "conv_head.0.weight" in state:
        x = torch.einsum("bchw,oc->bohw", maps[3], state["conv_head.0.weight"][:, :, 0, 0])
        mean, variance, weight, bias = (
            state[f"conv_head.1.0.{name}"].view(-1, 1, 1) for name in ("running_mean", "running_var", "weight", "bias")
        )
        x = (x - mean) / torch.sqrt(variance + 1e-5) * weight + bias
        x = (x * 0.5 * (1 + torch.erf(x / 2**0.5))).sum((2, 3)) / (x.shape[2] * x.shape[3])
    else:
        name = "clip_projector.cross_dcn"
        query, key, value = (
            norm(t, f"clip_projector.norm1_{k}") @ state[f"{name}.{k}.weight"].T + state[f"{name}.{k}_bias"]
            for k, t in (("q", tokens.mean(1, keepdim=True)), ("k", tokens), ("v", tokens))
        )
        parts = []
        for q, k, v in zip(*(t.chunk(heads, dim=2) for t in (query, key, value)), strict=True):
            share = (torch.einsum("bqd,bld->bql", q, k) / q.shape[-1] ** 0.5).exp()
            parts.append(torch.einsum("bql,bld->bd", share / share.sum(-1, keepdim=True), v))
        x = norm(torch.cat(parts, 1) @ state[f"{name}.proj.weight"].T + state[f"{name}.proj.bias"], "fc_norm")
    return x @ state["head.weight"].T + state["head.bias"]


@pytest.mark.parametrize("variant", ["t", "l", "h", "g"])
def test_logits_equal_the_formulas(variant: str) -> None:
    model = nano(variant, num_classes=7, bridge_width=32).double().eval()
    if variant in "tl":
        model.conv_head[1][0].running_mean.normal_()
        model.conv_head[1][0].running_var.uniform_(0.5, 2)
    image = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = classify(model.state_dict(), *longhand(model.state_dict(), image, VARIANTS[variant]), heads=16)
    torch.testing.assert_close(model.logits(image), expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    ("size", "offset_scale", "layer_scale", "norms_after"),
    [
        *((size, 1.0, None, []) for size in "t"),
        *((size, 1.0, 1e-5, []) for size in "sb"),
        *((size, 2.0, 1e-5, []) for size in ("l", "xl")),
        ("h", 1.0, None, [5, 11, 17, 23, 29]),
        ("g", 1.0, None, [5, 11, 17, 23, 29, 35, 41, 47]),
    ],
)
def test_what_no_tensor_shape_shows_is_the_official_configuration(
    size: str, offset_scale: float, layer_scale: float | None, norms_after: list[int]
) -> None:
    config = INTERN_IMAGE_SIZES[f"internimage_{size}"]
    assert config.get("offset_scale", 1.0) == offset_scale and config.get("layer_scale") == layer_scale
    assert list(config.get("level2_post_norm", ())) == norms_after
    assert bool(config.get("post_norm")) == (size not in "th") and bool(config.get("res_post_norm")) == (size == "h")


@pytest.mark.parametrize("variant", ["t", "s", "h"])
def test_bf16_is_close_to_fp32_and_the_depthwise_convolution_runs_in_fp32_on_a_cpu(variant: str) -> None:
    model, image = nano(variant, drawn=False), torch.randn(2, 3, 64, 64)
    expected = model.tokens(image)
    actual = model.bfloat16().tokens(image.bfloat16())
    assert actual.dtype == torch.bfloat16
    assert (actual.float() - expected).norm() < 0.03 * expected.norm()


def test_recomputed_blocks_give_the_same_gradients() -> None:
    image, grads = torch.randn(2, 3, 64, 64), []
    for remat in (False, True):
        model = nano("h")
        if remat:
            rematerialize(model.blocks)
        model.tokens(image).square().mean().backward()
        grads.append({key: p.grad for key, p in model.named_parameters()})
    assert all(torch.equal(grads[0][key], grads[1][key]) for key in grads[0])
    assert all(grad.abs().max() > 0 for grad in grads[0].values())


@pytest.mark.parametrize("variant", ["s", "h"])
def test_compiles_without_a_graph_break(variant: str) -> None:
    model, image = nano(variant), torch.randn(1, 3, 64, 64)
    compiled = torch.compile(model.tokens, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(image), model.tokens(image), rtol=1e-4, atol=1e-5)


def built_in_partitions(rank: Rank) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of every parameter of a model whose parts are partitioned as soon as they exist."""
    import deepspeed

    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 2, "zero_optimization": {"stage": 3}}):
        model = nano("h", drawn=False)
    found = {}
    for key, parameter in model.named_parameters():
        assert parameter.ds_tensor.numel() < parameter.ds_numel or parameter.ds_numel == 1, key
        with deepspeed.zero.GatheredParameters([parameter]):
            found[key] = (parameter.mean().item(), parameter.std(unbiased=False).item())
    return found


@pytest.mark.slow
def test_initialisation_survives_being_partitioned_at_birth() -> None:
    usual = {k: (x.mean().item(), x.std(unbiased=False).item()) for k, x in nano("h", drawn=False).named_parameters()}
    for found in run_ranks(2, built_in_partitions):
        assert found.keys() == usual.keys()
        for key, (mean, std) in found.items():
            if usual[key][1] == 0:  # constant: zeros and ones
                assert (mean, std) == usual[key], key
            else:
                assert std == pytest.approx(usual[key][1], rel=0.5) and abs(mean) < 2 * std, key


def test_drop_path_rises_to_the_last_block_and_is_off_in_evaluation() -> None:
    model, image = nano("t", drop_path=0.5), torch.randn(8, 3, 64, 64)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0, 0.125, 0.25, 0.375, 0.5])
    assert not torch.equal(model.tokens(image), model.tokens(image))
    model.eval()
    assert torch.equal(model.tokens(image), model.tokens(image))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.zeros(1, 3, 31, 64)), r"got \(1, 3, 31, 64\), needed \(B, 3, H, W\) with H and W from 32"),
        (lambda m: m(torch.zeros(1, 1, 64, 64)), r"got \(1, 1, 64, 64\)"),
        (lambda m: m.tokens(torch.zeros(1, 3, 48, 64)), r"\(3, 4\) and \(2, 2\), needed height and width in multiples"),
        (lambda m: m.tokens(torch.zeros(1, 3, 64, 64), torch.zeros(1, 2)), "a convolution cannot leave tokens out"),
        (lambda m: create_model("internimage", **NANO).tokens(torch.zeros(1, 3, 64, 64)), "needed bridge=True"),
    ],
)
def test_a_wrong_call_is_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(nano("t"))


@pytest.mark.parametrize(
    ("name", "arch", "message"),
    [
        ("internimage", {}, "backbone.arch.channels: got nothing for internimage"),
        ("internimage_t", {"width": 3}, "backbone.arch.width: internimage_t has no such field"),
        ("internimage_hh", {}, "did you mean internimage_h"),
        ("internimage_t", {"groups": (3, 8, 16, 32)}, "backbone.arch.groups: got 3, needed a divisor of .*level 0 64"),
        ("internimage_s", {"res_post_norm": True}, "res_post_norm without post_norm and layer_scale"),
        ("internimage_t", {"dw_kernel_size": 4}, "an odd dw_kernel_size"),
        ("internimage_t", {"level2_post_norm": (18,)}, r"below depths\[2\] = 18"),
        ("internimage_t", {"image_size": 100}, "backbone.arch.image_size: got 100"),
    ],
)
def test_a_wrong_field_is_named(name: str, arch: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught, torch.device("meta"):
        create_model(name, **arch)
    assert "\n" not in str(caught.value)

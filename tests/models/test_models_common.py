"""What every model promises: seeded and complete initialisation, meta construction, bf16, gradients, ZeRO-3's rule."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from m3i_large.models import (
    AttentionPool,
    CategoryHead,
    DecoderConfig,
    DenseDecoder,
    PoolConfig,
    TextConfig,
    TextHead,
    TextTower,
    create_model,
)

WIDTH = 32


def vit() -> nn.Module:
    return create_model("vit", image_size=16, patch_size=4, width=WIDTH, depth=2, heads=4)


def intern_image() -> nn.Module:
    sizes = {"channels": 8, "depths": (1, 1, 2, 1), "groups": (1, 2, 4, 8), "dw_kernel_size": 5, "image_size": 32}
    norms = {"res_post_norm": True, "center_feature_scale": True, "level2_post_norm": (1,), "bridge_width": 16}
    return create_model("internimage", bridge=True, **sizes, **norms)


def text_tower() -> nn.Module:
    return TextTower(TextConfig(width=WIDTH, layers=2, heads=4, context_length=9, vocab_size=50))


def decoder() -> nn.Module:
    return DenseDecoder(WIDTH, DecoderConfig(width=24, layers=2, heads=3))


def position(batch: int, length: int) -> Tensor:
    return torch.linspace(-3, 17, batch * length * 4).reshape(batch, length, 4)


BUILD: dict[str, Callable[[], nn.Module]] = {
    "vit": vit,
    "vit_tokens": vit,
    "intern_image": intern_image,
    "text": text_tower,
    "pool": lambda: AttentionPool(WIDTH, PoolConfig(heads=4, width=20)),
    "category_head": lambda: CategoryHead(20, 7),
    "text_head": lambda: TextHead(20, WIDTH, 12),
    "decoder": decoder,
}


def run(name: str, module: nn.Module, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Calls the module on fixed inputs; positions stay float32 at every dtype."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    if name == "vit":
        return module(draw(2, 3, 16, 16))
    if name == "vit_tokens":
        return [module.tokens(draw(2, 3, 16, 16), torch.tensor([[3, 0, 9], [15, 2, 7]]))]
    if name == "intern_image":
        return [module.tokens(draw(2, 3, 64, 64)), *module(draw(2, 3, 64, 64))]
    if name == "text":
        return [module(torch.tensor([[47, 1, 2, 49, 0, 0, 0], [47, 0, 5, 6, 7, 8, 49]]))]
    if name == "pool":
        return [module(draw(2, 5, WIDTH))]
    if name == "category_head":
        return [module(draw(3, 20))]
    if name == "text_head":
        return list(module(draw(3, 20), draw(2, WIDTH)))
    return [module(draw(2, 5, WIDTH), position(2, 5), position(2, 6))]


@pytest.fixture
def uninitialised_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", BUILD)
def test_every_parameter_is_initialised(name: str, uninitialised_memory_is_nan: None) -> None:
    assert torch.empty(3).isnan().all()
    for key, tensor in BUILD[name]().state_dict().items():
        assert tensor.isfinite().all(), key


@pytest.mark.parametrize("name", BUILD)
def test_a_seed_fixes_every_weight(name: str) -> None:
    def build(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return BUILD[name]().state_dict()

    first, again, other = build(0), build(0), build(1)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", BUILD)
def test_construction_on_meta_has_the_same_tensors(name: str) -> None:
    with torch.device("meta"):
        on_meta = BUILD[name]()
    assert all(p.is_meta for p in on_meta.parameters())
    shapes = {key: tensor.shape for key, tensor in on_meta.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in BUILD[name]().state_dict().items()}


@pytest.mark.parametrize("name", BUILD)
def test_no_state_but_parameters_and_none_without_a_dimension(name: str) -> None:
    module = BUILD[name]()
    assert set(module.state_dict()) == {key for key, _ in module.named_parameters()}
    assert all(p.dim() >= 1 for p in module.parameters())


@pytest.mark.parametrize("name", BUILD)
def test_bf16_is_close_to_fp32(name: str) -> None:
    torch.manual_seed(0)
    module = BUILD[name]()
    expected = run(name, module)
    actual = run(name, module.to(torch.bfloat16), torch.bfloat16)
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        is_scale = name == "text_head" and index == 2
        assert a.dtype == (torch.float32 if is_scale else torch.bfloat16)
        assert (a.float() - e).norm() <= 0.03 * e.norm()


@pytest.mark.parametrize("name", BUILD)
def test_gradients_reach_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    module = BUILD[name]()
    # A linear function of the outputs: a sum of squares behind a LayerNorm would be constant.
    sum((out * torch.randn(out.shape)).sum() for out in run(name, module)).backward()
    for key, parameter in module.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        # Softmax does not see a constant added to all keys: such a bias has no gradient but rounding's.
        # What feeds zero-initialised layers (offsets, masks) gets a gradient from the second step on.
        if not key.endswith(("key.bias", "k_bias", "norm1_k.0.bias")) and ".dw_conv." not in key:
            assert parameter.grad.abs().max() > 1e-7, key


@pytest.mark.parametrize("name", BUILD)
def test_parameters_are_used_only_while_their_own_module_runs(name: str) -> None:
    """As under ZeRO-3: outside of its module's call, each parameter holds NaN."""
    module = BUILD[name]()
    expected = run(name, module)
    kept = {parameter: parameter.detach().clone() for parameter in module.parameters()}

    def fetch(child: nn.Module, args: object) -> None:
        for parameter in child.parameters(recurse=False):
            parameter.data = kept[parameter]

    def release(child: nn.Module, args: object, output: object) -> None:
        for parameter in child.parameters(recurse=False):
            parameter.data = torch.full_like(parameter, torch.nan)

    for child in module.modules():
        release(child, None, None)
        child.register_forward_pre_hook(fetch)
        child.register_forward_hook(release)
    with torch.no_grad():
        actual = run(name, module)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert all(p.isnan().all() for p in module.parameters())

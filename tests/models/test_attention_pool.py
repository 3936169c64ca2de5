import math

import numpy as np
import pytest
import torch

from m3i_large.errors import UserError
from m3i_large.models import AttentionPool, PoolConfig

NAMES = [
    *(f"clip_projector.norm1_{x}.0.{kind}" for x in "qkv" for kind in ("weight", "bias")),
    *(f"clip_projector.cross_dcn.{x}.weight" for x in "qkv"),
    *(f"clip_projector.cross_dcn.{x}_bias" for x in "qkv"),
    "clip_projector.cross_dcn.proj.weight",
    "clip_projector.cross_dcn.proj.bias",
    "fc_norm.0.weight",
    "fc_norm.0.bias",
]


def test_keys_and_shapes_are_internimages() -> None:
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in AttentionPool(1024, PoolConfig(heads=16)).state_dict().items()}
    assert sorted(shapes) == sorted(NAMES)
    for name, shape in shapes.items():
        last = name.removeprefix("clip_projector.cross_dcn.")
        if last.startswith(("proj", "fc_norm")):
            assert shape == ((768, 1024) if last == "proj.weight" else (768,)), name
        else:
            assert shape == ((1024, 1024) if last in ("q.weight", "k.weight", "v.weight") else (1024,)), name


def longhand(token_LD: np.ndarray, state: dict[str, np.ndarray], heads: int) -> np.ndarray:
    """One image, one head at a time, in float64."""

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return scaled * state[f"{name}.0.weight"] + state[f"{name}.0.bias"]

    def project(x: np.ndarray, which: str) -> np.ndarray:
        normed = norm(x, f"clip_projector.norm1_{which}")
        dcn = "clip_projector.cross_dcn"
        return normed @ state[f"{dcn}.{which}.weight"].T + state[f"{dcn}.{which}_bias"]

    query = project(token_LD.mean(0, keepdims=True), "q")[0]
    key, value = project(token_LD, "k"), project(token_LD, "v")
    size = token_LD.shape[1] // heads
    out = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        score = np.exp(key[:, part] @ query[part] / math.sqrt(size))
        out.append((score / score.sum()) @ value[:, part])
    projected = state["clip_projector.cross_dcn.proj.weight"] @ np.concatenate(out)
    return norm(projected + state["clip_projector.cross_dcn.proj.bias"], "fc_norm")


def test_equals_longhand() -> None:
    torch.manual_seed(0)
    pool = AttentionPool(24, PoolConfig(heads=3, width=10)).double()
    for parameter in pool.parameters():  # biases and norms too must matter
        torch.nn.init.normal_(parameter)
    token_BLD = torch.randn(2, 7, 24, dtype=torch.float64) * 3 + 1
    state = {name: value.numpy() for name, value in pool.state_dict().items()}
    expected = np.stack([longhand(token_LD.numpy(), state, 3) for token_LD in token_BLD])
    np.testing.assert_allclose(pool(token_BLD).detach().numpy(), expected, rtol=1e-9, atol=1e-9)


def test_order_of_tokens_does_not_matter() -> None:
    pool = AttentionPool(24, PoolConfig(heads=3, width=10))
    token_BLD = torch.randn(2, 7, 24)
    torch.testing.assert_close(pool(token_BLD), pool(token_BLD.flip(1)), rtol=1e-4, atol=1e-5)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(UserError, match=r"pool.heads: got 5, needed a divisor of the backbone's width 24"):
        AttentionPool(24, PoolConfig(heads=5))


def test_what_is_looked_at_makes_the_vector() -> None:
    """The weights that a list is given, applied by hand to the values, are what `forward` returns."""
    torch.manual_seed(1)
    pool, token_BLD = AttentionPool(24, PoolConfig(heads=3, width=10)).double(), torch.randn(2, 7, 24).double()
    for parameter in pool.parameters():
        torch.nn.init.normal_(parameter)
    seen: list[torch.Tensor] = []
    pooled_BE = pool(token_BLD, seen=seen)
    (weight_BML,), projector = seen, pool.clip_projector
    assert weight_BML.shape == (2, 3, 7)
    torch.testing.assert_close(weight_BML.sum(-1), torch.ones(2, 3))
    attention = projector.cross_dcn
    value_BLMd = (attention.v(projector.norm1_v(token_BLD)) + attention.v_bias).unflatten(2, (3, 8))
    mixed_BMd = torch.einsum("bml,blmd->bmd", weight_BML.double(), value_BLMd)
    torch.testing.assert_close(pool.fc_norm(attention.proj(mixed_BMd.flatten(1))), pooled_BE, rtol=1e-5, atol=1e-6)
    assert weight_BML.amax() > 0.2, "far from uniform, so that a wrong scale would show"

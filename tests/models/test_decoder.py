import numpy as np
import pytest
import torch
from torch import Tensor, nn

from m3i_large.errors import UserError
from m3i_large.models import DecoderConfig, DenseDecoder, PositionEmbedding


def position(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, 4, generator=torch.Generator().manual_seed(seed)) * 5


def decoder(width: int | None = 24, backbone: int = 32) -> DenseDecoder:
    torch.manual_seed(0)
    return DenseDecoder(backbone, DecoderConfig(width=width, layers=2, heads=3)).double()


def inputs(backbone: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    context = torch.randn(2, 5, backbone, generator=torch.Generator().manual_seed(2)).double()
    return context, position(2, 5), position(2, 6, seed=1)


def longhand_features(position_4: np.ndarray, width: int) -> np.ndarray:
    feature = []
    for number in position_4:
        angles = [number * 10000 ** (-k / (width / 4)) for k in range(width // 4)]
        feature += [np.sin(a) for a in angles] + [np.cos(a) for a in angles]
    return np.array(feature)


def test_position_embedding_equals_longhand() -> None:
    embedding = PositionEmbedding(12)
    position_BL4 = position(2, 3)
    feature = [[longhand_features(p.astype(np.float64), 12) for p in row] for row in position_BL4.numpy()]
    weight, bias = embedding.linear.weight.detach().numpy(), embedding.linear.bias.detach().numpy()
    actual = embedding(position_BL4, dtype=torch.float32)
    assert actual.shape == (2, 3, 12)
    np.testing.assert_allclose(actual.detach().numpy(), np.array(feature) @ weight.T + bias, rtol=1e-4, atol=1e-5)


def test_position_features_stay_float32_in_bf16() -> None:
    """100.3 is 100.5 in bf16."""
    embedding = PositionEmbedding(12).to(torch.bfloat16)
    nn.init.eye_(embedding.linear.weight)
    nn.init.zeros_(embedding.linear.bias)
    out = embedding(torch.tensor([[[100.3, 0, 0, 0], [100.5, 0, 0, 0]]]), dtype=torch.bfloat16)
    assert out.dtype == torch.bfloat16
    for row, number in enumerate([100.3, 100.5]):
        expected = longhand_features(np.array([number, 0, 0, 0]), 12)[:12]
        np.testing.assert_allclose(out[0, row].detach().float().numpy(), expected, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("width", [24, 48, None])
def test_prediction_has_the_backbones_width(width: int | None) -> None:
    backbone = 36
    model = decoder(width, backbone)
    assert model(*inputs(backbone)).shape == (2, 6, backbone)
    assert model.width == (width or backbone)
    assert isinstance(model.project_in, nn.Linear) == (width is not None)
    assert len(model.blocks) == 2


def test_equals_longhand() -> None:
    model = decoder()
    nn.init.normal_(model.mask_token)
    context, context_position, query_position = inputs()
    rows = []
    for b in range(2):
        pairs = zip(context[b], context_position[b], strict=True)
        tokens = [model.project_in(c) + model.position(p, dtype=c.dtype) for c, p in pairs]
        tokens += [model.mask_token[0, 0] + model.position(p, dtype=torch.float64) for p in query_position[b]]
        x = torch.stack(tokens)[None]
        for block in model.blocks:
            x = block(x)
        rows.append(model.project_out(model.norm(x))[0, 5:])
    torch.testing.assert_close(model(*inputs()), torch.stack(rows))


def test_order_of_context_does_not_matter_but_its_positions_do() -> None:
    model = decoder()
    context, context_position, query_position = inputs()
    expected = model(context, context_position, query_position)
    order = [3, 0, 4, 1, 2]
    torch.testing.assert_close(model(context[:, order], context_position[:, order], query_position), expected)
    assert (model(context[:, order], context_position, query_position) - expected).abs().max() > 1e-3


def test_each_query_follows_its_own_position() -> None:
    model = decoder()
    context, context_position, query_position = inputs()
    expected = model(context, context_position, query_position)
    order = [5, 1, 0, 3, 2, 4]
    torch.testing.assert_close(model(context, context_position, query_position[:, order]), expected[:, order])


def test_bad_shapes_are_refused() -> None:
    context, context_position, query_position = inputs()
    with pytest.raises(ValueError, match=r"context_position_BK4: got shape \(2, 4, 4\), needed \(2, 5, 4\)"):
        decoder()(context, context_position[:, :4], query_position)
    with pytest.raises(UserError, match=r"decoder.heads: got 3, needed a divisor of decoder.width 32"):
        DenseDecoder(32, DecoderConfig(heads=3))
    with pytest.raises(UserError, match=r"position frequencies: got 4, needed a divisor of decoder.width 30"):
        DenseDecoder(30, DecoderConfig(heads=3))

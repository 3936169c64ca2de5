"""ema_update against float64, and why the average is kept in fp32."""

import numpy as np
import pytest
import torch
from m3i_kernels.dispatch import implementation
from m3i_kernels.ema_update import ema_update
from m3i_kernels.testing import ODD_SIZES, assert_close, noncontiguous


def pair(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g), torch.randn(shape, generator=g)


def longhand(ema: torch.Tensor, source: torch.Tensor, momentum: float) -> torch.Tensor:
    values = [
        momentum * e + (1 - momentum) * s
        for e, s in zip(ema.flatten().tolist(), source.flatten().tolist(), strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64).view(ema.shape)


@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.7, 0.995, 1.0])
def test_matches_the_loop(size: int, momentum: float) -> None:
    ema, source = pair(size)
    expected = longhand(ema, source, momentum)
    before = source.clone()
    assert ema_update(ema, source, momentum=momentum) is None
    assert_close(ema, expected)
    assert torch.equal(source, before)


@pytest.mark.parametrize("shape", [(), (0,), (3, 5, 7), (1, 1)], ids=str)
def test_any_shape(shape: tuple[int, ...]) -> None:
    ema, source = pair(*shape)
    expected = longhand(ema, source, 0.9)
    ema_update(ema, source, momentum=0.9)
    assert_close(ema, expected)


def test_ends_are_exact() -> None:
    ema, source = pair(1031)
    kept, big = ema.clone(), ema * 1e6
    ema_update(ema, source, momentum=1.0)
    assert torch.equal(ema, kept)
    ema_update(big, source, momentum=0.0)
    assert torch.equal(big, source)
    ema_update(source, source.clone(), momentum=0.37)
    assert torch.equal(source, big)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("out_shape", [(6, 7), (42,), (2, 3, 7)], ids=str)
def test_out_is_the_rounded_average(dtype: torch.dtype, out_shape: tuple[int, ...]) -> None:
    ema, source = pair(6, 7)
    alone = ema.clone()
    ema_update(alone, source, momentum=0.9)
    out = torch.full(out_shape, torch.nan, dtype=dtype)
    ema_update(ema, source, momentum=0.9, out=out)
    assert torch.equal(ema, alone)
    assert torch.equal(out.flatten(), alone.flatten().to(dtype))


def test_layout_does_not_matter() -> None:
    ema, source = pair(5, 7)
    expected, out = ema.clone(), torch.empty(5, 7, dtype=torch.bfloat16)
    ema_update(expected, source, momentum=0.9)
    for (layout, a), (_, b), (_, c) in zip(noncontiguous(ema), noncontiguous(source), noncontiguous(out), strict=True):
        ema_update(a, b, momentum=0.9, out=c)
        assert torch.equal(a, expected), layout
        assert torch.equal(c, expected.bfloat16()), layout


def test_bits_do_not_depend_on_where_a_partition_begins() -> None:
    ema, source = pair(5003)
    whole = ema.clone()
    ema_update(whole, source, momentum=0.9991)
    for cuts in ([1, 7, 300, 4695], [2501, 2502], [17] * 294 + [5]):
        parts = [part.clone() for part in ema.split(cuts)]
        for part, values in zip(parts, source.split(cuts), strict=True):
            ema_update(part, values, momentum=0.9991)
        assert torch.equal(torch.cat(parts), whole)


def test_fp32_follows_the_closed_form_for_a_thousand_steps() -> None:
    g = torch.Generator().manual_seed(1)
    start, sources = torch.randn(257, generator=g), torch.randn(1000, 257, generator=g) + 2
    ema, m = start.clone(), 0.999
    for source in sources:
        ema_update(ema, source, momentum=m)
    weights = (1 - m) * m ** np.arange(999, -1, -1)
    expected = m**1000 * start.double().numpy() + weights @ sources.double().numpy()
    np.testing.assert_allclose(ema.numpy(), expected, rtol=0, atol=5e-6)


def test_a_bf16_average_would_stand_still() -> None:
    start, goal = torch.full((64,), 1.0), torch.linspace(0.5, 3, 64)
    ema, low = start.clone(), start.bfloat16()
    reference = implementation("ema_update", "cpu")
    for _ in range(1000):
        ema_update(ema, goal, momentum=0.999)
        reference(low, goal.bfloat16(), momentum=0.999, out=None)
    assert torch.equal(low, start.bfloat16())  # each step is below half a unit in the last place
    expected = goal.double() + 0.999**1000 * (start - goal).double()  # fp32 has covered 63 % of the way
    np.testing.assert_allclose(ema.numpy(), expected.numpy(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("factor", [1.001, 0.999])
def test_comparison_notices_a_wrong_twin(factor: float) -> None:
    ema, source = pair(31)
    expected = longhand(ema, source, 0.9)
    implementation("ema_update", "cpu")(ema, source, momentum=0.9 * factor, out=None)
    with pytest.raises(AssertionError):
        assert_close(ema, expected)


def test_is_never_differentiated() -> None:
    ema, source = (torch.nn.Parameter(x) for x in pair(7))
    out = torch.nn.Parameter(torch.zeros(7, dtype=torch.bfloat16))
    expected = longhand(ema.detach(), source.detach(), 0.5)
    ema_update(ema, source, momentum=0.5, out=out)
    assert_close(ema, expected)
    assert ema.is_leaf and out.is_leaf and ema.grad_fn is None


@pytest.mark.parametrize(
    "out", [None, torch.zeros(3, 5, dtype=torch.bfloat16), torch.zeros(15)], ids=["none", "bf16", "flat"]
)
def test_is_a_sound_custom_operator(out: torch.Tensor | None) -> None:
    report = torch.library.opcheck(torch.ops.m3i.ema_update.default, (*pair(3, 5), 0.9, out))
    assert set(report.values()) == {"SUCCESS"}, report


def test_compiles_without_a_graph_break_for_a_changing_momentum() -> None:
    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(ema: torch.Tensor, source: torch.Tensor, momentum: float, out: torch.Tensor) -> torch.Tensor:
        ema_update(ema, source, momentum=momentum, out=out)
        return out.float() + 1

    for momentum in (0.9, 0.95, 0.99, 1.0):
        ema, source = pair(33)
        eager, out = ema.clone(), torch.empty(33, dtype=torch.bfloat16)
        ema_update(eager, source, momentum=momentum)
        assert torch.equal(step(ema, source, momentum, out), eager.bfloat16().float() + 1)
        assert torch.equal(ema, eager) and torch.equal(out, eager.bfloat16())


def test_meta_tensors_pass() -> None:
    ema, source = (x.to("meta") for x in pair(3, 5))
    ema_update(ema, source, momentum=0.9, out=torch.empty(15, dtype=torch.bfloat16, device="meta"))
    assert ema.shape == (3, 5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ema": torch.zeros(4, dtype=torch.bfloat16)}, "ema must be torch.float32, got torch.bfloat16"),
        ({"source": torch.zeros(4, dtype=torch.float64)}, "source must be torch.float32, got torch.float64"),
        ({"source": torch.zeros(2, 2)}, r"one shape, got \(4,\) and \(2, 2\)"),
        ({"momentum": 1.5}, r"momentum must be in \[0, 1\], got 1.5"),
        ({"momentum": float("nan")}, "momentum must be in"),
        ({"out": torch.zeros(5)}, "out must have the 4 elements of ema, got 5"),
        ({"out": torch.zeros(4, dtype=torch.float64)}, "out must be one of"),
        ({"out": torch.zeros(4, device="meta")}, "out must be on cpu as ema is, got meta"),
        ({"source": torch.zeros(4, device="meta")}, "source must be on cpu"),
    ],
)
def test_bad_input_is_one_clear_line(changed: dict, message: str) -> None:
    given = {"ema": torch.ones(4), "source": torch.zeros(4), "momentum": 0.5, "out": None} | changed
    ema = given.pop("ema")
    kept = ema.clone()
    with pytest.raises(ValueError, match=message):
        ema_update(ema, given.pop("source"), **given)
    assert torch.equal(kept, ema)

"""ema_update against float64, and why the average is kept in fp32."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from m3i_kernels.dispatch import implementation, use_backend
from m3i_kernels.ema_update import ema_update
from m3i_kernels.ema_update.reference import ema_update as reference
from m3i_kernels.testing import ODD_SIZES, assert_close, noncontiguous

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["reference", "triton"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test holds for both implementations: on a GPU where there is one, else in Triton's interpreter."""
    with use_backend(request.param):
        yield request.param


def pair(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g).to(DEVICE), torch.randn(shape, generator=g).to(DEVICE)


def update(ema: torch.Tensor, source: torch.Tensor, *, out: torch.Tensor | None = None, **more: object) -> None:
    """One tensor at a time, which is what most tests are about."""
    ema_update([ema], [source], out=None if out is None else [out], **more)


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
    assert ema_update([ema], [source], momentum=momentum) is None
    assert_close(ema, expected)
    assert torch.equal(source, before)


@pytest.mark.parametrize("shape", [(), (0,), (3, 5, 7), (1, 1)], ids=str)
def test_any_shape(shape: tuple[int, ...]) -> None:
    ema, source = pair(*shape)
    expected = longhand(ema, source, 0.9)
    update(ema, source, momentum=0.9)
    assert_close(ema, expected)


def test_ends_are_exact() -> None:
    ema, source = pair(1031)
    kept, big = ema.clone(), ema * 1e6
    update(ema, source, momentum=1.0)
    assert torch.equal(ema, kept)
    update(big, source, momentum=0.0)
    assert torch.equal(big, source)
    update(source, source.clone(), momentum=0.37)
    assert torch.equal(source, big)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("out_shape", [(6, 7), (42,), (2, 3, 7)], ids=str)
def test_out_is_the_rounded_average(dtype: torch.dtype, out_shape: tuple[int, ...]) -> None:
    ema, source = pair(6, 7)
    alone = ema.clone()
    update(alone, source, momentum=0.9)
    out = torch.full(out_shape, torch.nan, dtype=dtype, device=DEVICE)
    update(ema, source, momentum=0.9, out=out)
    assert torch.equal(ema, alone)
    assert torch.equal(out.flatten(), alone.flatten().to(dtype))


def test_layout_does_not_matter() -> None:
    ema, source = pair(5, 7)
    expected, out = ema.clone(), torch.empty(5, 7, dtype=torch.bfloat16, device=DEVICE)
    update(expected, source, momentum=0.9)
    for (layout, a), (_, b), (_, c) in zip(noncontiguous(ema), noncontiguous(source), noncontiguous(out), strict=True):
        update(a, b, momentum=0.9, out=c)
        assert torch.equal(a, expected), layout
        assert torch.equal(c, expected.bfloat16()), layout


def test_bits_do_not_depend_on_where_a_partition_begins() -> None:
    ema, source = pair(5003)
    whole = ema.clone()
    update(whole, source, momentum=0.9991)
    for cuts in ([1, 7, 300, 4695], [2501, 2502], [17] * 294 + [5]):
        parts = [part.clone() for part in ema.split(cuts)]
        for part, values in zip(parts, source.split(cuts), strict=True):
            update(part, values, momentum=0.9991)
        assert torch.equal(torch.cat(parts), whole)


def test_fp32_follows_the_closed_form_for_a_thousand_steps() -> None:
    g = torch.Generator().manual_seed(1)
    start, sources = torch.randn(257, generator=g).to(DEVICE), (torch.randn(1000, 257, generator=g) + 2).to(DEVICE)
    ema, m = start.clone(), 0.999
    for source in sources:
        update(ema, source, momentum=m)
    weights = (1 - m) * m ** np.arange(999, -1, -1)
    expected = m**1000 * start.double().cpu().numpy() + weights @ sources.double().cpu().numpy()
    np.testing.assert_allclose(ema.cpu().numpy(), expected, rtol=0, atol=5e-6)


def test_a_bf16_average_would_stand_still() -> None:
    start, goal = torch.full((64,), 1.0, device=DEVICE), torch.linspace(0.5, 3, 64, device=DEVICE)
    ema, low = start.clone(), start.bfloat16()
    for _ in range(1000):
        update(ema, goal, momentum=0.999)
        reference([low], [goal.bfloat16()], momentum=0.999, out=[], skip=None)
    assert torch.equal(low, start.bfloat16())  # each step is below half a unit in the last place
    expected = goal.double() + 0.999**1000 * (start - goal).double()  # fp32 has covered 63 % of the way
    np.testing.assert_allclose(ema.cpu().numpy(), expected.cpu().numpy(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("factor", [1.001, 0.999])
def test_comparison_notices_a_wrong_twin(factor: float) -> None:
    ema, source = pair(31)
    expected = longhand(ema, source, 0.9)
    implementation("ema_update", DEVICE)([ema], [source], momentum=0.9 * factor, out=[], skip=None)
    with pytest.raises(AssertionError):
        assert_close(ema, expected)


def test_is_never_differentiated() -> None:
    ema, source = (torch.nn.Parameter(x) for x in pair(7))
    out = torch.nn.Parameter(torch.zeros(7, dtype=torch.bfloat16, device=DEVICE))
    expected = longhand(ema.detach(), source.detach(), 0.5)
    update(ema, source, momentum=0.5, out=out)
    assert_close(ema, expected)
    assert ema.is_leaf and out.is_leaf and ema.grad_fn is None


@pytest.mark.parametrize(
    "out", [None, torch.zeros(3, 5, dtype=torch.bfloat16), torch.zeros(15)], ids=["none", "bf16", "flat"]
)
def test_is_a_sound_custom_operator(out: torch.Tensor | None) -> None:
    ema, source = pair(3, 5)
    report = torch.library.opcheck(
        torch.ops.m3i.ema_update.default, ([ema], [source], 0.9, [] if out is None else [out.to(DEVICE)], None)
    )
    assert set(report.values()) == {"SUCCESS"}, report


def test_compiles_without_a_graph_break_for_a_changing_momentum() -> None:
    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(ema: torch.Tensor, source: torch.Tensor, momentum: float, out: torch.Tensor) -> torch.Tensor:
        update(ema, source, momentum=momentum, out=out)
        return out.float() + 1

    for momentum in (0.9, 0.95, 0.99, 1.0):
        ema, source = pair(33)
        eager, out = ema.clone(), torch.empty(33, dtype=torch.bfloat16, device=DEVICE)
        update(eager, source, momentum=momentum)
        assert torch.equal(step(ema, source, momentum, out), eager.bfloat16().float() + 1)
        assert torch.equal(ema, eager) and torch.equal(out, eager.bfloat16())


def test_meta_tensors_pass() -> None:
    ema, source = (x.to("meta") for x in pair(3, 5))
    update(ema, source, momentum=0.9, out=torch.empty(15, dtype=torch.bfloat16, device="meta"))
    assert ema.shape == (3, 5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ema": torch.zeros(4, dtype=torch.bfloat16)}, r"ema\[0\] must be torch.float32, got torch.bfloat16"),
        ({"source": torch.zeros(4, dtype=torch.float64)}, r"source\[0\] must be torch.float32, got torch.float64"),
        ({"source": torch.zeros(2, 2)}, r"one shape, got \(4,\) and \(2, 2\)"),
        ({"momentum": 1.5}, r"momentum must be in \[0, 1\], got 1.5"),
        ({"momentum": float("nan")}, "momentum must be in"),
        ({"out": torch.zeros(5)}, r"out\[0\] must have the 4 elements of ema\[0\], got 5"),
        ({"out": torch.zeros(4, dtype=torch.float64)}, r"out\[0\] must be one of"),
        ({"out": torch.zeros(4, device="meta")}, r"out\[0\] must be on cpu as ema\[0\] is, got meta"),
        ({"source": torch.zeros(4, device="meta")}, r"source\[0\] must be on cpu"),
    ],
)
def test_bad_input_is_one_clear_line(changed: dict, message: str) -> None:
    given = {"ema": torch.ones(4), "source": torch.zeros(4), "momentum": 0.5, "out": None} | changed
    ema = given.pop("ema")
    kept = ema.clone()
    with pytest.raises(ValueError, match=message):
        update(ema, given.pop("source"), **given)
    assert torch.equal(kept, ema)


def many(count: int = 9) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Tensors of odd sizes that begin anywhere in their memory, as partitions do."""
    sizes = [5003, 1, 0, 4096, 4097, 7, 128, 33, 1031][:count]
    pairs = [pair(n + 3, seed=n) for n in sizes]
    ema = [e.to(DEVICE)[i % 4 : i % 4 + n] for i, ((e, _), n) in enumerate(zip(pairs, sizes, strict=True))]
    source = [s.to(DEVICE)[i % 3 : i % 3 + n] for i, ((_, s), n) in enumerate(zip(pairs, sizes, strict=True))]
    return ema, source, [torch.full((n,), torch.nan, dtype=torch.bfloat16, device=DEVICE) for n in sizes]


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.995, 1.0])
def test_many_tensors_are_updated_as_one_by_one(momentum: float) -> None:
    ema, source, out = many()
    expected = [longhand(e, s, momentum) for e, s in zip(ema, source, strict=True)]
    alone = [e.clone() for e in ema]
    ema_update(ema, source, momentum=momentum, out=out)
    for e, o, x, a, s in zip(ema, out, expected, alone, source, strict=True):
        assert_close(e, x)
        update(a, s, momentum=momentum)
        assert torch.equal(e, a) and torch.equal(o, e.bfloat16())


def test_nothing_beside_the_tensors_is_written() -> None:
    """Views into larger memory, as partitions are: with heads and tails, aligned and not."""
    room = [torch.full((20000,), 7.0, dtype=dtype, device=DEVICE) for dtype in (torch.float32, torch.bfloat16)]
    for begin, begin_out, count in ((0, 0, 8192), (3, 3, 8199), (5, 9, 4999), (2, 1, 9000), (1, 0, 1)):
        average, copy = (x.clone() for x in room)
        source = torch.randn(20000, device=DEVICE)
        ema, out = average[begin : begin + count], copy[begin_out : begin_out + count]
        update(ema, source[begin : begin + count], momentum=0.5, out=out)
        assert_close(ema, 3.5 + 0.5 * source[begin : begin + count].double())
        assert torch.equal(out, ema.bfloat16())
        ema.fill_(7)
        out.fill_(7)
        assert torch.equal(average, room[0]) and torch.equal(copy, room[1])


def test_both_implementations_stay_together_over_steps() -> None:
    averages = []
    for name in ("reference", "triton"):
        ema, source, out = many()
        with use_backend(name):
            for momentum in (0.9, 0.2, 0.9991):
                ema_update(ema, source, momentum=momentum, out=out)
        averages.append(ema)
    for a, b in zip(*averages, strict=True):
        assert_close(b, a)


def test_skipping_leaves_everything_whatever_the_source_is() -> None:
    ema, source, out = many()
    kept = [x.clone() for x in ema]
    for s in source:
        s.fill_(torch.nan)
    ema_update(ema, source, momentum=0.5, out=out, skip=torch.tensor(True, device=DEVICE))
    assert all(torch.equal(e, k) for e, k in zip(ema, kept, strict=True))
    assert all(o.isnan().all() for o in out)
    ema_update(ema, [k + 1 for k in kept], momentum=0.5, out=out, skip=torch.tensor([False], device=DEVICE))
    for o, e, k in zip(out, ema, kept, strict=True):
        assert_close(e, k + 0.5)
        assert torch.equal(o, e.bfloat16())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter: the sum that is not chosen overflows
def test_at_both_ends_every_bit_is_kept_whatever_the_other_side_holds() -> None:
    odd = torch.tensor([-0.0, 0.0, torch.inf, -torch.inf, 3e38, 1e-45, -1e-40, 1.0], device=DEVICE)
    for other in (torch.nan, torch.inf, -3e38, 0.0):
        ema, source = odd.clone(), torch.full_like(odd, other)
        update(ema, source, momentum=1.0)
        assert torch.equal(ema.view(torch.int32), odd.view(torch.int32))
        update(source, odd, momentum=0.0)
        assert torch.equal(source.view(torch.int32), odd.view(torch.int32))


@pytest.fixture
def fused():
    return pytest.importorskip("m3i_kernels.ema_update.fused")


def test_the_table_of_addresses_is_built_once_for_the_same_memory(fused) -> None:
    fused._table.cache_clear()
    ema, source, out = many(5)
    with use_backend("triton"):
        for momentum in (0.9, 0.99, 0.999):
            ema_update(ema, source, momentum=momentum, out=out)
        assert (fused._table.cache_info().misses, fused._table.cache_info().hits) == (1, 2)
        for _ in range(fused.KEPT_TABLES + 2):
            e, s, o = many(2)
            ema_update(e, s, momentum=0.9, out=o)
            ema.append(e[0])  # keeps the memory from being reused
    assert fused._table.cache_info().currsize <= fused.KEPT_TABLES


@pytest.mark.parametrize("out_bytes", [0, 2, 4])
@pytest.mark.parametrize(
    ("begins", "alike", "copy_alike"),
    [((0, 0, 0), True, True), ((4, 4, 1), True, True), ((8, 4, 0), False, False), ((0, 0, 1), True, False)],
)
def test_a_table_covers_every_element_once_and_whole_blocks_are_aligned(
    fused, begins: tuple, alike: bool, copy_alike: bool, out_bytes: int
) -> None:
    count = 3 * fused.WHOLE + 5
    average, value, copy = 1024 + begins[0], 4096 + begins[1], 8192 + begins[2] * out_bytes
    table, num_whole = fused._table(
        ((average,), (value,), (copy,) if out_bytes else ()), (count,), out_bytes, torch.device("cpu")
    )
    rows = table.tolist()
    seen = [(a - average) // 4 + i for a, _, _, length in rows for i in range(length)]
    assert sorted(seen) == list(range(count))
    for a, v, c, length in rows:
        assert v - value == a - average and (not out_bytes or (c - copy) * 4 == (a - average) * out_bytes)
        assert 0 < length <= fused.WHOLE
    assert num_whole == (3 if (copy_alike if out_bytes else alike) else 0)
    for a, v, c, length in rows[:num_whole]:
        assert length == fused.WHOLE and a % 16 == v % 16 == 0 and (not out_bytes or c % (4 * out_bytes) == 0)
    assert all(length <= fused.PART for *_, length in rows[num_whole:])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"ema": torch.zeros(4)}, r"ema must be a list of tensors, got one tensor of shape \(4,\)"),
        ({"source": []}, "source must have the 1 tensors of ema, got 0"),
        ({"out": [torch.zeros(4), torch.zeros(4)]}, "out must have the 1 tensors of ema, got 2"),
        ({"skip": torch.zeros(2, dtype=torch.bool)}, "skip must be one bool on the device of ema, got 2"),
        ({"skip": torch.zeros(1)}, "skip must be one bool"),
    ],
)
def test_lists_that_do_not_match_are_named(more: dict, message: str) -> None:
    given = {"ema": [torch.zeros(4)], "source": [torch.zeros(4)], "momentum": 0.5} | more
    with pytest.raises(ValueError, match=message):
        ema_update(given.pop("ema"), given.pop("source"), **given)


def test_no_tensor_is_no_work() -> None:
    assert ema_update([], [], momentum=0.5) is None

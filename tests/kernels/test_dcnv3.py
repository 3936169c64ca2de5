"""dcnv3 against one sample at a time in float64, finite differences, and its Triton twin against the reference.

The twin runs on a GPU where there is one, else in Triton's interpreter, whose cost decides how small these shapes are.
"""

import math
from typing import Any

import pytest
import torch
from m3i_kernels.dcnv3 import dcnv3, reference
from m3i_kernels.dcnv3.geometry import Geometry
from m3i_kernels.dispatch import use_backend
from m3i_kernels.testing import assert_close, noncontiguous
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# (H, W), channels of a group, with centre blend, options: every option, odd sizes, one pixel.
CASES = [
    ((5, 7), 8, True, {"groups": 2}),
    ((1, 1), 1, True, {"groups": 1}),
    ((4, 6), 3, False, {"groups": 2, "offset_scale": 2.0}),
    ((7, 6), 4, False, {"groups": 1, "stride": 2, "padding": 2, "dilation": 2}),
    ((6, 5), 5, True, {"groups": 1, "remove_center": True}),
    ((4, 4), 2, True, {"groups": 1, "kernel_size": 5, "padding": 2}),
    ((5, 4), 2, False, {"groups": 3, "kernel_size": 2, "padding": 0}),
]


def draw(size: tuple[int, int], width: int, center: bool, options: dict, *, seed: int = 0) -> list[Tensor | None]:
    """Random value, offset, logit and center in float64; a third of the points fall outside the value."""
    g, geometry = torch.Generator().manual_seed(seed), Geometry(**options)
    h, w = (geometry.output_size(n) for n in size)
    shapes = [(*size, options["groups"] * width)]
    shapes += [(h, w, options["groups"] * geometry.num_points * n) for n in (2, 1)]
    shapes += [(*size, options["groups"])] if center else []
    drawn: list[Tensor | None] = [torch.randn((2, *shape), generator=g, dtype=torch.float64) for shape in shapes]
    drawn[1] = 1.7 * drawn[1]
    return drawn if center else [*drawn, None]


def longhand(value: Tensor, offset: Tensor, logit: Tensor, center: Tensor | None, options: dict) -> Tensor:
    """The equations of InternImage's DCNv3, one image, pixel, group, point and corner after the other."""
    G, S = options["groups"], options.get("kernel_size", 3)
    stride, pad, dil = options.get("stride", 1), options.get("padding", 1), options.get("dilation", 1)
    scale, removed = options.get("offset_scale", 1.0), options.get("remove_center", False)
    B, H, W, C = value.shape
    h, w = offset.shape[1:3]
    D, half = C // G, (dil * (S - 1)) // 2
    points = [(i, j) for i in range(S) for j in range(S) if not (removed and i == j == S // 2)]
    K = len(points)
    out = torch.zeros(B, h, w, C, dtype=torch.float64)
    for b in range(B):
        for row in range(h):
            for col in range(w):
                for g in range(G):
                    logits = [float(logit[b, row, col, g * K + k]) for k in range(K)]
                    total = sum(math.exp(v) for v in logits)
                    for k, (i, j) in enumerate(points):
                        dx, dy = (float(offset[b, row, col, (g * K + k) * 2 + n]) for n in (0, 1))
                        x = (col * stride - pad + half) + (-half + i * dil + dx) * scale
                        y = (row * stride - pad + half) + (-half + j * dil + dy) * scale
                        for yy in (math.floor(y), math.floor(y) + 1):
                            for xx in (math.floor(x), math.floor(x) + 1):
                                if 0 <= yy < H and 0 <= xx < W:
                                    share = math.exp(logits[k]) / total * (1 - abs(x - xx)) * (1 - abs(y - yy))
                                    out[b, row, col, g * D : (g + 1) * D] += (
                                        share * value[b, yy, xx, g * D : (g + 1) * D]
                                    )
                    if center is not None:
                        s = 1 / (1 + math.exp(-float(center[b, row, col, g])))
                        own = value[b, row, col, g * D : (g + 1) * D]
                        part = out[b, row, col, g * D : (g + 1) * D]
                        part.copy_(part * (1 - s) + own * s)
    return out


def run(given: list[Tensor | None], dtype: torch.dtype, options: dict, *, backend: str) -> list[Tensor]:
    """Output and the gradients by every argument, for a fixed gradient of the output."""
    arguments = [None if x is None else x.to(DEVICE, dtype).detach().clone().requires_grad_() for x in given]
    with use_backend(backend):
        out = dcnv3(*arguments, **options)
        grad = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape)
        out.backward(grad.to(DEVICE, dtype))
    return [out.detach(), *[x.grad for x in arguments if x is not None]]


@pytest.mark.parametrize(("size", "width", "center", "options"), CASES, ids=str)
def test_the_reference_equals_the_equations(size: tuple, width: int, center: bool, options: dict) -> None:
    given = draw(size, width, center, options)
    with use_backend("reference"):
        assert_close(dcnv3(*given, **options), longhand(*given, options))


@pytest.mark.parametrize(("size", "width", "center", "options"), CASES, ids=str)
def test_gradients_equal_finite_differences(size: tuple, width: int, center: bool, options: dict) -> None:
    given = draw((min(size[0], 4), min(size[1], 5)), min(width, 2), center, options, seed=1)
    arguments = [None if x is None else x.requires_grad_() for x in given]
    with use_backend("reference"):
        assert torch.autograd.gradcheck(lambda *x: dcnv3(*x, **options), arguments)


@pytest.mark.parametrize(("size", "width", "center", "options"), CASES, ids=str)
def test_the_fused_twin_equals_the_reference(size: tuple, width: int, center: bool, options: dict) -> None:
    given = [None if x is None else x.float().double() for x in draw(size, width, center, options)]
    expected = run(given, torch.float64, options, backend="reference")
    for name, a, e in zip(
        ("out", *"vol", "center"), run(given, torch.float32, options, backend="triton"), expected, strict=False
    ):
        assert_close(a, e, scale=10, what=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_sixteen_bits_lose_only_the_last_rounding(dtype: torch.dtype, backend: str) -> None:
    """Coordinates, softmax and sums are fp32: offsets of 16 bits are exact numbers, not rounded locations."""
    given = [x.to(dtype).double() for x in draw((4, 6), 16, True, {"groups": 2})]
    expected = run(given, torch.float64, {"groups": 2}, backend="reference")
    for actual, exact in zip(run(given, dtype, {"groups": 2}, backend=backend), expected, strict=True):
        assert actual.dtype == dtype
        assert (actual.double().cpu() - exact.cpu()).norm() < 1.5 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("wrong", ["transposed points", "y before x", "no scale of the grid", "softmax over groups"])
def test_the_comparison_notices_a_wrong_twin(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"groups": 2, "offset_scale": 2.0}
    value, offset, logit, _ = draw((5, 4), 3, False, options)
    exact = longhand(value, offset, logit, None, options)
    if wrong == "transposed points":
        points = Geometry(groups=2).points()
        monkeypatch.setattr(Geometry, "points", lambda self: [(y, x) for x, y in points])
    elif wrong == "y before x":
        offset = offset.view(2, 5, 4, 18, 2).flip(-1).flatten(3)
    elif wrong == "no scale of the grid":
        points = Geometry(groups=2).points()
        monkeypatch.setattr(Geometry, "points", lambda self: [(x / 2, y / 2) for x, y in points])
    else:
        logit = logit.view(2, 5, 4, 2, 9).softmax(3).log().flatten(3)
    with use_backend("reference"), pytest.raises(AssertionError):
        assert_close(dcnv3(value, offset, logit, **options), exact)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_memory_layout_does_not_matter(backend: str) -> None:
    given = [x.float().to(DEVICE) for x in draw((3, 4), 4, True, {"groups": 1})]
    with use_backend(backend):
        expected = dcnv3(*given, groups=1)
        for layouts in zip(*(noncontiguous(x) for x in given), strict=True):
            assert torch.equal(dcnv3(*(x for _, x in layouts), groups=1), expected), layouts[0][0]


def test_large_images_are_addressed_with_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = pytest.importorskip("m3i_kernels.dcnv3.fused")
    given = draw((3, 5), 4, True, {"groups": 2})
    narrow = run(given, torch.float32, {"groups": 2}, backend="triton")
    monkeypatch.setattr(fused, "INT32_LIMIT", 1)
    wide = run(given, torch.float32, {"groups": 2}, backend="triton")
    for a, b in zip(narrow, wide, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("width", [4, 130])
def test_the_deterministic_backward_pass_is_exact(width: int) -> None:
    """The fixed-point sum is the true sum, rounded once: closer than fp32's, and the same in any order."""
    given = [x.float().double() for x in draw((3, 4), width, True, {"groups": 1})]
    expected = run(given, torch.float64, {"groups": 1}, backend="reference")
    torch.use_deterministic_algorithms(True)
    try:
        first = run(given, torch.float32, {"groups": 1}, backend="triton")
        again = run(given, torch.float32, {"groups": 1}, backend="triton")
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b, e in zip(first, again, expected, strict=True):
        assert torch.equal(a, b)
        assert_close(a, e, scale=5)


def test_the_fixed_point_survives_huge_tiny_zero_and_infinite_gradients() -> None:
    fused = pytest.importorskip("m3i_kernels.dcnv3.fused")
    for size in (1e38, 1e-38, 0.0):
        unit = fused._fixed_point_unit(torch.full((1, 64, 64, 4), size))
        assert unit.isfinite() and unit * size * 64 * 64 <= 2.0**62
    assert fused._fixed_point_unit(torch.full((1, 2, 2, 1), torch.inf)) == 0  # and 0 / 0 is NaN
    assert fused._fixed_point_unit(torch.full((1, 2, 2, 1), torch.nan)).isnan()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_far_and_undefined_locations(backend: str) -> None:
    value, offset, logit, _ = (
        None if x is None else x.float().to(DEVICE) for x in draw((3, 3), 4, False, {"groups": 1})
    )
    with use_backend(backend):
        far = dcnv3(value, torch.full_like(offset, 1e30), logit, groups=1)
        assert torch.equal(far, torch.zeros_like(far))
        offset[0, 1, 2, 5] = torch.nan
        out = dcnv3(value, offset, logit, groups=1)
    assert out[0, 1, 2].isnan().all() and out.isnan().sum() == 4


@pytest.mark.parametrize("center", [True, False])
def test_is_a_sound_custom_operator(center: bool) -> None:
    arguments = [None if x is None else x.float().requires_grad_() for x in draw((3, 4), 2, center, {"groups": 1})]
    report = torch.library.opcheck(torch.ops.m3i.dcnv3.default, (*arguments, 1, 3, 1, 1, 1, 1.0, False))
    assert set(report.values()) == {"SUCCESS"}, report


def test_compiles_without_a_graph_break_and_works_on_meta() -> None:
    given = [x.float().requires_grad_() for x in draw((3, 4), 2, True, {"groups": 1})]

    def step(*arguments: Tensor) -> Tensor:
        return dcnv3(*arguments, groups=1).square().sum()

    torch.compile(step, backend="aot_eager", fullgraph=True)(*given).backward()
    compiled = [x.grad.clone() for x in given]
    for x in given:
        x.grad = None
    step(*given).backward()
    for x, grad in zip(given, compiled, strict=True):
        assert_close(grad, x.grad)
    out = dcnv3(*(x.to("meta") for x in given), groups=1)
    assert out.is_meta and out.shape == given[0].shape


def test_an_empty_batch_is_an_empty_batch() -> None:
    for backend in ("reference", "triton"):
        given = [x[:0].float().to(DEVICE).requires_grad_() for x in draw((3, 4), 2, True, {"groups": 1})]
        with use_backend(backend):
            dcnv3(*given, groups=1).sum().backward()
        assert given[0].grad.shape == given[0].shape


def arguments(**changes: Any) -> dict[str, Any]:
    names = ("value_BHWC", "offset", "logit", "center")
    given = dict(zip(names, (x.float() for x in draw((3, 4), 2, True, {"groups": 2})), strict=True))
    return given | {"groups": 2} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": 3}, r"C a multiple of groups = 3, got \(2, 3, 4, 4\)"),
        ({"groups": 0}, "groups must be 1 or more, got 0"),
        ({"stride": 0}, "stride must be 1 or more, got 0"),
        ({"padding": -1}, "padding must be 0 or more, got -1"),
        ({"kernel_size": 2, "remove_center": True}, "odd kernel_size of 3 or more, got 2"),
        ({"kernel_size": 9, "padding": 0}, "3 x 4 is smaller than the kernel"),
        ({"offset": torch.zeros(2, 3, 4, 18)}, r"offset must have shape \(2, 3, 4, 36\), got \(2, 3, 4, 18\)"),
        ({"logit": torch.zeros(2, 3, 3, 18)}, r"logit must have shape \(2, 3, 4, 18\), got \(2, 3, 3, 18\)"),
        ({"center": torch.zeros(2, 3, 4, 4)}, r"center must have shape \(2, 3, 4, 2\), got \(2, 3, 4, 4\)"),
        ({"logit": torch.zeros(2, 3, 4, 18, dtype=torch.int64)}, "logit must be one of .*, got torch.int64"),
        ({"logit": torch.zeros(2, 3, 4, 18, device="meta")}, "logit must be on cpu as value_BHWC is, got meta"),
        ({"value_BHWC": torch.zeros(3, 4, 4)}, r"must have shape \(B, H, W, C\)"),
    ],
)
def test_a_wrong_argument_is_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dcnv3(**arguments(**changes))


def test_a_centre_blend_needs_an_output_as_large_as_the_value() -> None:
    value, offset, logit, _ = draw((4, 4), 2, False, {"groups": 1, "stride": 2})
    with pytest.raises(ValueError, match="as large as the value, 4 x 4, got 2 x 2"):
        dcnv3(value, offset, logit, torch.zeros(2, 4, 4, 1), groups=1, stride=2)


def test_the_scatter_is_the_gradient_of_an_embedding_bag() -> None:
    g = torch.Generator().manual_seed(0)
    row, share = torch.randint(0, 7, (4, 11, 3), generator=g), torch.rand(4, 11, 3, generator=g)
    grad = torch.randn(11, 5, generator=g)
    expected = torch.zeros(9, 5)
    for c in range(4):
        for n in range(11):
            for k in range(3):
                expected[row[c, n, k]] += share[c, n, k] * grad[n]
    assert_close(reference._scatter(row, share, grad, 9), expected, scale=10)

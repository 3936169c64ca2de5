"""patch_mix against a longhand per-pixel loop written from its contract."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from m3i_kernels.dispatch import implementation, use_backend
from m3i_kernels.patch_mix import patch_mix
from m3i_kernels.testing import ODD_IMAGES, assert_close, noncontiguous
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DRAWN = ("colour_NV34", "solarize_NV", "flip_NV", "partner_N", "mask_NPP")


def arguments(N: int, H: int, W: int, *, P: int = 1, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict:
    """Random arguments; thresholds on, off and in between, colours that leave [0, 1]."""
    g = torch.Generator().manual_seed(seed)
    views = (torch.randint(0, 256, (N, H, W, 3), generator=g, dtype=torch.uint8) for _ in range(2))
    return {
        "target_NHWC": next(views),
        "other_NHWC": next(views),
        "colour_NV34": torch.eye(3, 4) + 0.4 * torch.randn(N, 2, 3, 4, generator=g),
        "solarize_NV": torch.rand(N, 2, generator=g) * 1.6,
        "flip_NV": torch.rand(N, 2, generator=g) < 0.5,
        "partner_N": torch.randperm(N, generator=g),
        "mask_NPP": torch.rand(N, P, P, generator=g) < 0.5,
        "mean": MEAN,
        "std": STD,
        "dtype": dtype,
    }


@pytest.fixture(params=["reference", "triton"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test holds for both implementations: on a GPU where there is one, else in Triton's interpreter."""
    with use_backend(request.param):
        yield request.param


def call(function, given: dict) -> tuple[Tensor, Tensor]:
    given = {k: v.to(DEVICE) if isinstance(v, Tensor) and not v.is_meta else v for k, v in given.items()}
    mixed, target = function(given.pop("target_NHWC"), given.pop("other_NHWC"), **given)
    return (mixed, target) if mixed.is_meta else (mixed.cpu(), target.cpu())


def longhand(given: dict) -> tuple[Tensor, Tensor]:
    """The contract, one pixel at a time, in float64."""
    views = [given["target_NHWC"].numpy(), given["other_NHWC"].numpy()]
    colour, solarize, flip, partner, mask = (given[name].numpy() for name in DRAWN)
    N, H, W, _ = views[0].shape
    P = mask.shape[-1]

    def pixel(n: int, v: int, row: int, col: int) -> np.ndarray:
        """The pixel that shows at (row, col) of view v after its flip."""
        source_col = W - 1 - col if flip[n, v] else col
        rgb = [int(value) / 255 for value in views[v][n, row, source_col]]
        result = np.empty(3)
        for c in range(3):
            value = sum(float(colour[n, v, c, k]) * rgb[k] for k in range(3)) + float(colour[n, v, c, 3])
            value = min(max(value, 0.0), 1.0)
            if value >= float(solarize[n, v]):
                value = 1 - value
            result[c] = (value - given["mean"][c]) / given["std"][c]
        return result

    mixed, target = np.empty((N, 3, H, W)), np.empty((N, 3, H, W))
    for n in range(N):
        for row in range(H):
            for col in range(W):
                target[n, :, row, col] = pixel(n, 0, row, col)
                own = mask[n, row // (H // P), col // (W // P)]
                mixed[n, :, row, col] = target[n, :, row, col] if own else pixel(int(partner[n]), 1, row, col)
    return torch.from_numpy(mixed), torch.from_numpy(target)


def assert_matches(given: dict, **changed: object) -> None:
    given = given | changed
    for what, result, expected in zip(("mixed", "target"), call(patch_mix, given), longhand(given), strict=True):
        assert result.dtype == given["dtype"] and result.is_contiguous()
        assert_close(result, expected, what=what)


@pytest.mark.parametrize("shape", ODD_IMAGES, ids=str)
def test_matches_the_loop_on_odd_shapes(shape: tuple[int, int, int]) -> None:
    for P in [p for p in range(1, min(shape[1:]) + 1) if shape[1] % p == shape[2] % p == 0][:4]:
        assert_matches(arguments(*shape, P=P, seed=P))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rounds_only_the_result(dtype: torch.dtype) -> None:
    given = arguments(4, 6, 10, P=2, dtype=dtype)
    assert_matches(given)
    for result, exact in zip(call(patch_mix, given), call(patch_mix, given | {"dtype": torch.float32}), strict=True):
        assert torch.equal(result, exact.to(dtype))


@pytest.mark.parametrize("size", [(2, 8, 2), (16, 48, 4), (12, 24, 1), (33, 36, 3)], ids=str)
def test_cells_of_whole_words(size: tuple[int, int, int]) -> None:
    """Cells a multiple of four pixels wide, which the fused kernel reads as words; more pixels than a block has."""
    H, W, P = size
    for seed in range(2):
        assert_matches(arguments(3, H, W, P=P, seed=seed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_implementations_and_ways_to_read_agree(dtype: torch.dtype) -> None:
    """Words, bytes (a view that begins at an odd address) and the reference, over every byte and threshold."""
    given = arguments(4, 32, 48, P=4, dtype=dtype)
    given["solarize_NV"] = torch.tensor([[0.2, 0.4], [0.6, 0.8], [1.0, 1.0], [2.0, 0.0]])
    given["colour_NV34"] = torch.eye(3, 4).expand(4, 2, 3, 4).contiguous()  # thresholds are met exactly
    with use_backend("reference"):
        expected = call(patch_mix, given)
    shifted = {k: dict(noncontiguous(given[k].to(DEVICE)))["odd storage offset"] for k in ("target_NHWC", "other_NHWC")}
    for views in ({}, shifted):
        for result, want in zip(call(patch_mix, given | views), expected, strict=True):
            assert_close(result, want)


@pytest.mark.parametrize("flips", [(False, False), (False, True), (True, False), (True, True)])
def test_each_view_has_its_own_flip(flips: tuple[bool, bool]) -> None:
    assert_matches(arguments(3, 4, 6, P=2), flip_NV=torch.tensor([flips] * 3))


def test_partner_brings_its_own_colour_flip_and_threshold() -> None:
    given = arguments(3, 4, 4, P=2) | {
        "mask_NPP": torch.zeros(3, 2, 2, dtype=torch.bool),
        "partner_N": torch.tensor([1, 2, 0]),
        "flip_NV": torch.tensor([[True, False], [False, True], [False, False]]),
    }
    assert_matches(given)
    mixed, _ = call(patch_mix, given)
    reversed_roles = given | {"target_NHWC": given["other_NHWC"], "mask_NPP": torch.ones(3, 2, 2, dtype=torch.bool)}
    for name in ("colour_NV34", "solarize_NV", "flip_NV"):
        reversed_roles[name] = given[name].flip(1)
    _, other = call(patch_mix, reversed_roles)
    assert torch.equal(mixed, other[[1, 2, 0]])


def test_mask_lies_in_the_flipped_frame() -> None:
    black = torch.zeros(1, 2, 4, 3, dtype=torch.uint8)
    given = arguments(1, 2, 4, P=2) | {
        "target_NHWC": black + 255,
        "other_NHWC": black,
        "mean": (0, 0, 0),
        "std": (1, 1, 1),
    }
    given |= {"colour_NV34": torch.eye(3, 4).expand(1, 2, 3, 4), "solarize_NV": torch.full((1, 2), 2.0)}
    given |= {
        "flip_NV": torch.ones(1, 2, dtype=torch.bool),
        "mask_NPP": torch.tensor([[[True, False], [False, False]]]),
    }
    mixed, _ = call(patch_mix, given)
    assert mixed[0, 0].tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]


def test_solarize_threshold_belongs_to_the_inverted_side_and_above_one_is_off() -> None:
    grey = torch.tensor([0, 51, 102, 255], dtype=torch.uint8)[None, None, :, None].expand(1, 1, 4, 3)
    given = arguments(1, 1, 4) | {"target_NHWC": grey, "other_NHWC": grey, "mean": (0, 0, 0), "std": (1, 1, 1)}
    given |= {"colour_NV34": torch.eye(3, 4).expand(1, 2, 3, 4), "flip_NV": torch.zeros(1, 2, dtype=torch.bool)}
    level = torch.tensor([51.0]).div(255).item()
    for threshold, expected in ((level, [0, 0.8, 0.6, 0]), (1.0, [0, 0.2, 0.4, 0]), (1.01, [0, 0.2, 0.4, 1])):
        _, target = call(patch_mix, given | {"solarize_NV": torch.full((1, 2), threshold)})
        assert_close(target[0, 0, 0], torch.tensor(expected, dtype=torch.float64))


def test_bytes_meet_the_threshold_that_is_their_own_value() -> None:
    """To the last bit: a product with 1 / 255 in place of the quotient is another number for half of the bytes."""
    byte = torch.arange(256, dtype=torch.uint8)[1::7]
    N = len(byte)
    assert bool((byte.float() * (1 / 255) != byte.float() / 255).any())
    image = byte[:, None, None, None].expand(N, 1, 4, 3)
    given = arguments(N, 1, 4) | {"target_NHWC": image, "other_NHWC": image, "mean": (0, 0, 0), "std": (1, 1, 1)}
    given |= {"colour_NV34": torch.eye(3, 4).expand(N, 2, 3, 4), "flip_NV": torch.zeros(N, 2, dtype=torch.bool)}
    level = byte.float() / 255
    for threshold, expected in ((level, 1 - level), (torch.nextafter(level, torch.tensor(2.0)), level)):
        _, target = call(patch_mix, given | {"solarize_NV": threshold[:, None].repeat(1, 2)})
        assert torch.equal(target, expected[:, None, None, None].expand(N, 3, 1, 4))


@pytest.mark.parametrize("name", ["target_NHWC", "other_NHWC", *DRAWN])
def test_layout_of_inputs_does_not_matter(name: str) -> None:
    given = arguments(3, 4, 6, P=2)
    expected = call(patch_mix, given)
    for layout, value in noncontiguous(given[name].to(DEVICE)):
        for result, want in zip(call(patch_mix, given | {name: value}), expected, strict=True):
            assert torch.equal(result, want), layout


@pytest.mark.parametrize("wrong", ["flip", "partner", "mask", "solarize", "mean", "order"])
def test_comparison_notices_a_wrong_twin(wrong: str) -> None:
    given = arguments(4, 6, 6, P=3)
    changed = {
        "flip": {"flip_NV": ~given["flip_NV"]},
        "partner": {"partner_N": given["partner_N"].roll(1)},
        "mask": {"mask_NPP": given["mask_NPP"].transpose(1, 2)},
        "solarize": {"solarize_NV": given["solarize_NV"] + 0.05},
        "mean": {"mean": (0.4851, 0.456, 0.406)},
        "order": {"colour_NV34": given["colour_NV34"].flip(2)},
    }[wrong]
    perturbed = call(implementation("patch_mix", DEVICE), given | changed)
    with pytest.raises(AssertionError):
        for result, expected in zip(perturbed, longhand(given), strict=True):
            assert_close(result, expected)


@pytest.mark.parametrize("shape", [(3, 4, 6), (1, 1, 1)], ids=str)
def test_is_a_sound_custom_operator(shape: tuple[int, int, int]) -> None:
    given = arguments(*shape, dtype=torch.bfloat16).values()
    given = tuple(x.to(DEVICE) if isinstance(x, Tensor) else x for x in given)
    report = torch.library.opcheck(torch.ops.m3i.patch_mix.default, given)
    assert set(report.values()) == {"SUCCESS"}, report


def test_compiles_without_a_graph_break_for_changing_batches() -> None:
    compiled = torch.compile(lambda given: call(patch_mix, given)[0] * 2, backend="aot_eager", fullgraph=True)
    for N in (2, 3, 5):
        given = arguments(N, 4, 6, P=2)
        assert torch.equal(compiled(given), call(patch_mix, given)[0] * 2)


def test_meta_tensors_give_shapes() -> None:
    given = {
        k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments(3, 4, 6, dtype=torch.bfloat16).items()
    }
    for result in call(patch_mix, given):
        assert (result.device.type, result.shape, result.dtype) == ("meta", (3, 3, 4, 6), torch.bfloat16)
        assert result.is_contiguous()


def test_gradient_is_refused() -> None:
    given = arguments(2, 2, 2)
    mixed, _ = call(patch_mix, given | {"colour_NV34": given["colour_NV34"].requires_grad_()})
    with pytest.raises(RuntimeError, match="no autograd formula"):
        mixed.sum().backward()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"target_NHWC": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}, r"target_NHWC must have shape \(N, H, W, 3\)"),
        ({"target_NHWC": torch.zeros(2, 4, 6, 3)}, "target_NHWC must be torch.uint8"),
        (
            {"other_NHWC": torch.zeros(2, 4, 5, 3, dtype=torch.uint8)},
            r"other_NHWC must be .*\(2, 4, 6, 3\).*\(2, 4, 5, 3\)",
        ),
        ({"colour_NV34": torch.zeros(2, 2, 3, 3)}, "colour_NV34 must be"),
        ({"solarize_NV": torch.zeros(2, 2, dtype=torch.float64)}, "solarize_NV must be torch.float32"),
        ({"flip_NV": torch.zeros(2, 2, dtype=torch.uint8)}, "flip_NV must be torch.bool"),
        ({"partner_N": torch.zeros(3, dtype=torch.int64)}, "partner_N must be"),
        ({"partner_N": torch.tensor([0, 2])}, r"partner_N must be in \[0, 2\), got \[0, 2\]"),
        ({"partner_N": torch.tensor([-1, 0])}, r"partner_N must be in \[0, 2\)"),
        ({"mask_NPP": torch.zeros(2, 4, 4, dtype=torch.bool)}, "P must divide H = 4 and W = 6, got 4"),
        ({"mask_NPP": torch.zeros(2, 0, 0, dtype=torch.bool)}, "P must divide"),
        ({"mask_NPP": torch.zeros(2, 2, dtype=torch.bool)}, "mask_NPP must be"),
        ({"mask_NPP": torch.zeros(2, 2, 1, dtype=torch.bool)}, "mask_NPP must be"),
        ({"flip_NV": torch.zeros(2, 2, dtype=torch.bool, device="meta")}, "flip_NV must be on cpu"),
        ({"mean": (0.5,)}, "mean must have 3 values, got 1"),
        ({"std": (0.2, 0.0, 0.2)}, "std must be positive"),
        ({"dtype": torch.float64}, "dtype must be one of"),
    ],
)
def test_bad_input_is_one_clear_line(changed: dict, message: str) -> None:
    given = arguments(2, 4, 6, P=2) | changed
    # On the CPU everywhere, by the reference: partners elsewhere are not looked at.
    with use_backend("reference"), pytest.raises(ValueError, match=message) as caught:
        patch_mix(given.pop("target_NHWC"), given.pop("other_NHWC"), **given)
    assert "\n" not in str(caught.value)

"""Augmentation: distributions, exactness of the colour maps, and partners that form one cycle."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tf

from m3i_large.data import views
from m3i_large.data.config import ViewConfig
from m3i_large.data.views import MaskSpec, SampleKeys, crop_box, draw_masks, draw_partners
from m3i_large.errors import UserError

PLAIN = ViewConfig(jitter_probability=0, grey=0, blur=0, solarize=0, flip=0)


def draws(n: int, *, view: int = 0) -> np.ndarray:
    return SampleKeys(1, 0, 0, np.arange(n), 0).draws()[:, view]


def test_every_part_of_the_key_matters_and_rows_do_not_see_each_other() -> None:
    base = SampleKeys(1, 2, 3, 4, 5)
    spec = MaskSpec(cells=8, ratio=0.5)
    for place in range(5):
        other = SampleKeys(*(9 if i == place else v for i, v in enumerate((1, 2, 3, 4, 5))))
        assert not np.isclose(base.draws(), other.draws()).any()
        assert (draw_masks(base.mask_keys(), spec) != draw_masks(other.mask_keys(), spec)).any()
    draws = base.draws()
    assert draws.shape == (1, 2, views.NUM_DRAWS) and not np.isclose(draws[0, 0], draws[0, 1]).any()
    columns = [np.array([2, 7, 2]), np.array([3, 3, 1]), np.array([4, 10**9, 4]), np.array([5, 0, 1])]
    together, blocks = SampleKeys(1, *columns), MaskSpec(cells=8, ratio=0.4, blockwise=True)
    for i in range(3):
        alone = SampleKeys(1, *(column[i : i + 1] for column in columns))
        assert (together.draws()[i] == alone.draws()[0]).all()
        for chosen in (spec, blocks):
            assert (draw_masks(together.mask_keys(), chosen)[i] == draw_masks(alone.mask_keys(), chosen)[0]).all()


@pytest.mark.parametrize(("height", "width"), [(100, 100), (60, 200), (300, 40), (1, 1), (7, 3)])
def test_crops_lie_inside_the_image(height: int, width: int) -> None:
    for d in draws(300):
        top, left, h, w = crop_box(d, height, width, ViewConfig())
        assert top >= 0 and left >= 0 and 1 <= h <= height - top and 1 <= w <= width - left


def test_crops_follow_the_distribution_of_random_resized_crop() -> None:
    config, side = ViewConfig(crop_scale=(0.2, 0.6)), 400
    ours = np.array([crop_box(d, side, side, config) for d in draws(4000)], float)
    torch.manual_seed(0)
    reference = [
        v2.RandomResizedCrop(side, scale=(0.2, 0.6)).make_params([torch.empty(3, side, side)]) for _ in range(4000)
    ]
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in reference], float)
    for a, b in zip(figures(ours), figures(theirs), strict=True):
        assert np.quantile(a, [0.1, 0.5, 0.9]) == pytest.approx(np.quantile(b, [0.1, 0.5, 0.9]), rel=0.06, abs=0.02)


def figures(box: np.ndarray) -> tuple[np.ndarray, ...]:
    top, left, h, w = box.T
    return h * w, w / h, (top + 1) / (401 - h), (left + 1) / (401 - w)


def pixels() -> torch.Tensor:
    return torch.rand(3, 9, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def apply(matrix_34: np.ndarray, image: torch.Tensor) -> torch.Tensor:
    m = torch.from_numpy(matrix_34.astype(np.float64))
    return torch.einsum("ck,khw->chw", m[:, :3], image) + m[:, 3, None, None]


def affine(d: np.ndarray, grey: float, config: ViewConfig) -> np.ndarray:
    return views.colour_affine(d[None], np.array([grey]), config)[0]


def one_factor(index: int, factor: float) -> tuple[np.ndarray, ViewConfig]:
    """Draws that apply one factor of brightness, contrast or saturation and leave the others at 1."""
    strength = [0.0, 0.0, 0.0, 0.0]
    strength[index] = abs(factor - 1)
    d = np.full(views.NUM_DRAWS, 0.5)
    d[[views.BRIGHTNESS, views.CONTRAST, views.SATURATION][index]] = 1.0 if factor > 1 else 0.0
    d[views.JITTER], d[views.GREY] = 0.0, 1.0
    return d, ViewConfig(jitter=tuple(strength), jitter_probability=1, grey=0)


@pytest.mark.parametrize("factor", [0.7, 1.3])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_brightness_contrast_and_saturation_equal_torchvision(index: int, factor: float) -> None:
    image = pixels()
    grey = (torch.tensor(views.LUMA)[:, None, None] * image).sum(0).mean().item()
    d, config = one_factor(index, factor)
    ours = apply(affine(d, grey, config), image).clamp(0, 1)
    function = (tf.adjust_brightness, tf.adjust_contrast, tf.adjust_saturation)[index]
    # torchvision's luma weights are rounded to (0.2989, 0.587, 0.114)
    torch.testing.assert_close(ours, function(image, factor), rtol=1e-3, atol=1e-3)


def test_hue_turns_the_colour_and_keeps_the_luma() -> None:
    image = pixels()
    for angle in (-0.6, 0.2, 1.0):
        turned = torch.einsum("ck,khw->chw", torch.from_numpy(views.hue_rotation(angle)), image)
        luma = [(torch.tensor(views.LUMA)[:, None, None] * x).sum(0) for x in (image, turned)]
        torch.testing.assert_close(luma[0], luma[1], rtol=1e-6, atol=1e-6)
        assert (turned - image).abs().max() > 0.05
    back = views.hue_rotation(0.7) @ views.hue_rotation(-0.7)
    assert np.allclose(back, np.eye(3)) and np.allclose(views.hue_rotation(2 * math.pi), np.eye(3))


def test_contrast_after_brightness_is_about_the_brightened_mean() -> None:
    image = pixels() * 0.4 + 0.2
    grey = (torch.tensor(views.LUMA)[:, None, None] * image).sum(0).mean().item()
    d = np.full(views.NUM_DRAWS, 0.5)
    d[views.BRIGHTNESS], d[views.CONTRAST], d[views.JITTER] = 1.0, 0.0, 0.0
    config = ViewConfig(jitter=(0.2, 0.3, 0, 0), jitter_probability=1, grey=0)
    expected = 0.7 * (1.2 * image) + 0.3 * (1.2 * grey)
    torch.testing.assert_close(apply(affine(d, grey, config), image), expected, rtol=1e-5, atol=1e-6)


def test_probabilities_and_greyscale() -> None:
    config = ViewConfig(jitter_probability=0.8, grey=0.2)
    matrices = views.colour_affine(draws(3000), np.full(3000, 0.5), config)
    assert (matrices[7] == affine(draws(3000)[7], 0.5, config)).all()
    unchanged = np.mean([np.allclose(m, np.eye(3, 4)) for m in matrices])
    grey = np.mean([np.allclose(m[0], m[1]) and np.allclose(m[1], m[2]) for m in matrices])
    assert unchanged == pytest.approx(0.2 * 0.8, abs=0.02) and grey == pytest.approx(0.2, abs=0.025)
    sigma = np.array([views.blur_sigma(d, 224, ViewConfig(blur=0.3)) for d in draws(3000)])
    assert (sigma > 0).mean() == pytest.approx(0.3, abs=0.03) and sigma[sigma > 0].min() >= 0.1 and sigma.max() <= 2.0
    assert views.blur_sigma(draws(1)[0], 64, ViewConfig(blur=1.0)) == pytest.approx(
        views.blur_sigma(draws(1)[0], 224, ViewConfig(blur=1.0)) * 64 / 224
    )


@pytest.mark.parametrize(("cells", "ratio"), [(8, 0.5), (14, 0.5), (4, 0.25), (7, 0.4), (1, 0.9)])
def test_masks_have_an_exact_size_and_no_preferred_place(cells: int, ratio: float) -> None:
    masks = draw_masks(SampleKeys(1, 0, 0, np.arange(800), 0).mask_keys(), MaskSpec(cells=cells, ratio=ratio))
    assert (masks.sum((1, 2)) == round(ratio * cells * cells)).all()
    expected = round(ratio * cells * cells) / cells**2
    assert np.abs(masks.mean(0) - expected).max() < 5 * math.sqrt(max(expected * (1 - expected), 1e-9) / 800)


@pytest.mark.parametrize("block", [2, 4, None])
def test_partners_form_one_cycle_inside_every_block(block: int | None) -> None:
    slots = 8
    lanes = np.repeat([3, 5, 11], slots)
    partner = draw_partners(lanes, seed=1, step=9, slots=slots, block=block)
    size = block or slots
    for start in range(0, len(lanes), size):
        seen, at = set(), start
        while at not in seen:
            seen.add(at)
            at = int(partner[at])
        assert seen == set(range(start, start + size))


def test_all_cycles_are_equally_likely_and_depend_on_the_lane_alone() -> None:
    count = Counter(
        tuple(draw_partners([lane] * 4, seed=2, step=s, slots=4, block=None)) for lane in range(30) for s in range(60)
    )
    assert len(count) == math.factorial(3) and max(count.values()) < 1.25 * 300 and min(count.values()) > 0.75 * 300
    lanes = np.repeat(np.arange(6), 4)
    whole = draw_partners(lanes, seed=2, step=1, slots=4, block=None)
    half = draw_partners(lanes[12:], seed=2, step=1, slots=4, block=None)
    assert (half + 12 == whole[12:]).all()
    assert (whole != draw_partners(lanes, seed=2, step=2, slots=4, block=None)).any()


@pytest.mark.parametrize("block", [1, 3, 16])
def test_a_block_that_does_not_fit_is_refused(block: int) -> None:
    with pytest.raises(UserError, match=r"objective.mix.block: got .*\[2, 4, 8\]"):
        draw_partners([0] * 8, seed=0, step=0, slots=8, block=block)


def test_view_settings_out_of_range_are_refused() -> None:
    for values, message in [
        ({"crop_scale": (0.5, 0.2)}, "crop_scale"),
        ({"crop_ratio": (2, 1)}, "crop_ratio"),
        ({"jitter": (0, 0, 0, 0.7)}, "hue"),
    ]:
        with pytest.raises(ValueError, match=message):
            ViewConfig(**values)


# -- longhand ---------------------------------------------------------------------------------------------------------

MASK64 = (1 << 64) - 1


def mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK64
    return x ^ (x >> 31)


def longhand_key(*parts: int) -> int:
    h = 0
    for part in parts:
        h = mix(((h ^ part) * 0x94D049BB133111EB + 0x9E3779B97F4A7C15) & MASK64)
    return h


def longhand_uniform(k: int, num: int) -> list[float]:
    return [(mix((k + i * 0x9E3779B97F4A7C15) & MASK64) >> 11) * 2.0**-53 for i in range(1, num + 1)]


def test_draws_are_those_of_keys_in_plain_integers() -> None:
    epochs, sources, ids = np.array([0, 3, 3]), np.array([1, 0, 2]), np.array([5, 10**12, 7])
    substitutes = np.array([0, 0, 2])
    draws = SampleKeys(11, epochs, sources, ids, substitutes).draws()
    masks = SampleKeys(11, epochs, sources, ids, substitutes).mask_keys()
    for n in range(3):
        parts = (11, int(epochs[n]), int(sources[n]), int(ids[n]), int(substitutes[n]))
        for view in range(2):
            assert draws[n, view].tolist() == longhand_uniform(longhand_key(101, *parts, view), 14)
        assert int(masks[n]) == longhand_key(102, *parts)


def longhand_colour(d: list[float], mean: float, config: ViewConfig) -> list[list[float]]:
    """Where the map sends black and the three primaries, one operation at a time on single colours."""
    luma = [0.299, 0.587, 0.114]
    jittered = d[5] < config.jitter_probability

    def change(colour: list[float]) -> list[float]:
        if jittered:
            brightness, contrast, saturation = (1 + s * (2 * d[6 + i] - 1) for i, s in enumerate(config.jitter[:3]))
            colour = [brightness * c for c in colour]
            colour = [contrast * c + (1 - contrast) * brightness * mean for c in colour]
            grey = sum(w * c for w, c in zip(luma, colour, strict=True))
            colour = [saturation * c + (1 - saturation) * grey for c in colour]
            angle = 2 * math.pi * config.jitter[3] * (2 * d[9] - 1)
            y, i, q = (sum(w * c for w, c in zip(row, colour, strict=True)) for row in views.TO_YIQ.tolist())
            turned = [y, math.cos(angle) * i - math.sin(angle) * q, math.sin(angle) * i + math.cos(angle) * q]
            colour = np.linalg.solve(views.TO_YIQ, turned).tolist()
        if d[10] < config.grey:
            colour = 3 * [sum(w * c for w, c in zip(luma, colour, strict=True))]
        return colour

    zero = change([0.0, 0.0, 0.0])
    columns = [change([float(i == j) for j in range(3)]) for i in range(3)]
    return [[columns[j][i] - zero[i] for j in range(3)] + [zero[i]] for i in range(3)]


@pytest.mark.parametrize(
    "config",
    [
        ViewConfig(),
        ViewConfig(jitter=(0.4, 0.4, 0.2, 0.0), grey=0.5),
        ViewConfig(jitter=(1.0, 1.0, 1.0, 0.5), jitter_probability=1, grey=0),
        ViewConfig(jitter=(0, 0, 0, 0.3), jitter_probability=0.5, grey=0),
    ],
)
def test_colour_maps_of_many_rows_are_those_of_one_colour_at_a_time(config: ViewConfig) -> None:
    drawn, means = draws(200, view=1), np.linspace(0, 1, 200)
    together = views.colour_affine(drawn, means, config)
    assert together.dtype == np.float32 and together.shape == (200, 3, 4)
    for n in range(200):
        expected = longhand_colour(drawn[n].tolist(), float(means[n]), config)
        assert together[n] == pytest.approx(np.array(expected), abs=2e-6)
    # Rows do not see each other, whatever order they come in.
    order = np.random.default_rng(0).permutation(200)
    assert (views.colour_affine(drawn[order], means[order], config) == together[order]).all()


def test_blur_and_crop_use_their_own_draws() -> None:
    base = np.full(views.NUM_DRAWS, 0.5)
    chosen = ViewConfig(blur=0.6, crop_scale=(0.2, 0.6), crop_ratio=(0.5, 2))
    for place in range(views.NUM_DRAWS):
        d = base.copy()
        d[place] = 0.9
        assert (crop_box(d, 300, 400, chosen) != crop_box(base, 300, 400, chosen)) == (place in (0, 1, 2, 3))
        assert (views.blur_sigma(d, 224, chosen) != views.blur_sigma(base, 224, chosen)) == (place in (11, 12))
    assert crop_box(base, 300, 400, chosen) == (41, 91, 219, 219)  # sqrt(0.4 * 120000), in the middle
    assert views.blur_sigma(base, 224, chosen) == pytest.approx(1.05)


@pytest.mark.parametrize(
    ("cells", "ratio"), [(14, 0.25), (14, 0.5), (7, 0.4), (4, 0.75), (1, 0.0), (3, 1.0), (16, 0.0)]
)
def test_blockwise_masks_hide_an_exact_number_in_rectangles(cells: int, ratio: float) -> None:
    masks = draw_masks(
        SampleKeys(1, 0, 0, np.arange(300), 0).mask_keys(), MaskSpec(cells=cells, ratio=ratio, blockwise=True)
    )
    assert masks.dtype == bool and (masks.sum((1, 2)) == round(ratio * cells * cells)).all()
    if cells == 14:
        # Neighbours go together far more often than in a mask of single cells.
        same = (masks[:, 1:] == masks[:, :-1]).mean()
        assert same > 0.85
        single = draw_masks(SampleKeys(1, 0, 0, np.arange(300), 0).mask_keys(), MaskSpec(cells=cells, ratio=ratio))
        assert (single[:, 1:] == single[:, :-1]).mean() < 0.7
        # No place is left out, and no side is preferred to its mirror image.
        hidden = 1 - masks.mean(0)
        assert hidden.min() > 0.02 and np.abs(hidden - hidden[::-1]).max() < 0.2


def test_the_partners_of_a_block_depend_on_every_part_of_their_key() -> None:
    def of(**changes: object) -> list[int]:
        chosen = {"lanes": [4] * 16, "seed": 1, "step": 2, "slots": 16, "block": 8} | changes
        return draw_partners(chosen.pop("lanes"), **chosen).tolist()

    base = of()
    assert [j - 8 for j in base[8:]] != base[:8], "blocks of a lane have partners of their own"
    for changes in ({"seed": 2}, {"step": 3}, {"lanes": [5] * 16}):
        assert of(**changes) != base


@pytest.mark.parametrize("at_once", [0, 1, 3])
def test_how_many_rectangles_are_drawn_at_once_changes_no_mask(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, spec = SampleKeys(1, 0, 0, np.arange(50), 0).mask_keys(), MaskSpec(cells=14, ratio=0.2, blockwise=True)
    masks = draw_masks(keys, spec)
    monkeypatch.setattr(views, "DRAWN_AT_ONCE", at_once)
    assert (draw_masks(keys, spec) == masks).all()


def test_a_rectangle_has_at_least_16_of_196_cells() -> None:
    """So where 16 cells are hidden one rectangle does it, but for what rounding leaves."""
    masks = draw_masks(
        SampleKeys(1, 0, 0, np.arange(400), 0).mask_keys(), MaskSpec(cells=14, ratio=180 / 196, blockwise=True)
    )
    together = 0
    for hidden in ~masks:
        rows, columns = np.nonzero(hidden)
        together += int(np.ptp(rows) + 1) * int(np.ptp(columns) + 1) <= 20
    assert together > 200

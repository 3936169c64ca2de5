"""Curves are what they say: points by brute force, and read back from the drawing by the axes' own labels."""

import numpy as np
import pytest
from drawn import curve, figures

from m3i_large.report.charts import POINTS, Line, Panel, binned, figure, short


@pytest.mark.parametrize("size", [1, 2, 159, 160, 161, 320, 321, 1000, 4801])
def test_long_curves_are_means_between_their_lowest_and_highest(size: int) -> None:
    draw = np.random.default_rng(size)
    steps, values = np.cumsum(draw.integers(1, 4, size)), draw.normal(size=size)
    middle, means, low, high = binned(steps, values)
    assert len(means) <= POINTS
    each = -(-size // POINTS)
    parts = [slice(i, i + each) for i in range(0, size, each)]
    np.testing.assert_allclose(middle, [steps[part].mean() for part in parts])
    np.testing.assert_allclose(means, [values[part].mean() for part in parts])
    np.testing.assert_array_equal(low, [values[part].min() for part in parts])
    np.testing.assert_array_equal(high, [values[part].max() for part in parts])


def test_a_curve_is_read_back_from_its_drawing() -> None:
    steps = np.arange(0, 3000, 3)
    panel = Panel(
        "T <1>", "loss", (Line("a & b", steps, np.cos(steps / 300) * 4 + 6, 0), Line("c", steps, steps / 500, 1))
    )
    html = figure(panel, name="one")
    svg = figures(html)["loss"]
    for number, line in enumerate(panel.lines):
        middle, means, _, _ = binned(line.steps, line.values)
        got = np.array(curve(svg, number))
        np.testing.assert_allclose(got[:, 0], middle, atol=1.0)
        np.testing.assert_allclose(got[:, 1], means, atol=0.01)
    assert "a &amp; b from 10 to " in html and "T &lt;1&gt;" in html and svg.get("role") == "img"
    assert "#fe0" not in html, "a stand-in colour was left"


def test_figures_of_one_page_share_no_identifier() -> None:
    import re

    panel = Panel("T", "m", (Line("a", np.arange(400), np.arange(400.0), 0),), restarts=(5,), incidents=(9,))
    html = figure(panel, name="one") + figure(panel, name="two")
    names = re.findall(r'\bid="([^"]+)"', html)
    assert len(names) == len(set(names)) > 10
    used = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', html))
    assert used and all((a or b) in names for a, b in used)


@pytest.mark.parametrize("log", [False, True])
def test_single_points_constants_and_tiny_values_are_drawn(log: bool) -> None:
    for values in ([3.0], [2.0] * 5, [1e-9, 2e-9, 5e-9], [1e-6, 10.0]):
        steps = np.arange(len(values))
        html = figure(Panel("T", "m", (Line("a", steps, np.array(values), 0),), log=log), name="x")
        assert "nan" not in html.lower() and short(values[0]) in html


def test_numbers_are_short() -> None:
    given = {0.0: "0", 6.38512: "6.385", 0.0007946: "7.9e-4", -0.25: "-0.25", 123456.0: "1.235e+05", 3e9: "3.0e9"}
    assert {value: short(value) for value in given} == given
    assert all(float(short(value)) == pytest.approx(value, rel=0.05) for value in given)

"""The report in a real browser: at a desk and on a phone, light, dark and printed. Needs Debian's chromium."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import ROOT, pretrain, recipe, write_data, write_recipe

from m3i_large.evaluate import evaluate
from m3i_large.metrics import append_row
from m3i_large.report import write_report

CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium")]
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
# Where the screenshots of the last test are kept for a person to look at.
SHOTS = Path(os.environ.get("M3I_SCREENSHOTS", ROOT / "build/screenshots"))

# Texts and pictures that are seen, and the boxes around them.
OVERLAPS = """() => {
  const parts = [...document.querySelectorAll("h1,h2,h3,h4,p,figcaption,td,th,img,svg,summary,nav a")]
    .filter((e) => e.checkVisibility() && !e.closest("nav.skip"));
  const boxes = parts.map((e) => [e, e.getBoundingClientRect()]).filter(([, b]) => b.width && b.height);
  const said = (e) => `${e.tagName} "${(e.textContent || e.alt || "").trim().slice(0, 40)}"`;
  const found = [];
  for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++) {
    const [a, x] = boxes[i], [b, y] = boxes[j];
    if (a.contains(b) || b.contains(a) || a.closest("nav") || b.closest("nav")) continue;
    const across = Math.min(x.right, y.right) - Math.max(x.left, y.left);
    const down = Math.min(x.bottom, y.bottom) - Math.max(x.top, y.top);
    if (across > 1 && down > 1) found.push(`${said(a)} over ${said(b)}`);
  }
  return found.slice(0, 20);
}"""
# Text that its own box cuts off, or that the page does, outside of what can be scrolled.
CLIPPED = """() => {
  const found = [];
  const wide = document.documentElement.clientWidth;
  for (const e of document.querySelectorAll("h1,h2,h3,h4,p,figcaption,td,th,pre,a,button,.bar,.legend")) {
    if (!e.checkVisibility()) continue;
    const box = e.getBoundingClientRect();
    const said = `${e.tagName}.${e.className} "${e.textContent.trim().slice(0, 40)}"`;
    if (e.scrollWidth > e.clientWidth + 1 && e.clientWidth) found.push(`${said} is cut`);
    if (box.right > wide + 1 && !e.closest(".wide")) found.push(`${said} leaves the page`);
  }
  for (const text of document.querySelectorAll("svg text")) {
    const box = text.getBoundingClientRect(), svg = text.closest("figure").getBoundingClientRect();
    if (box.left < svg.left - 1 || box.right > svg.right + 1) found.push(`"${text.textContent}" leaves its panel`);
  }
  return found.slice(0, 20);
}"""
# Labels of one drawing that lie over each other.
LABELS = """() => {
  const found = [];
  for (const svg of document.querySelectorAll("svg")) {
    const boxes = [...svg.querySelectorAll("text")].map((t) => [t.textContent, t.getBoundingClientRect()]);
    boxes.forEach(([a, x], i) => boxes.slice(i + 1).forEach(([b, y]) => {
      const apart = x.left >= y.right || y.left >= x.right || x.top >= y.bottom || y.top >= x.bottom;
      if (!apart) found.push(`"${a}" over "${b}"`);
    }));
  }
  return found;
}"""


def train(root: Path, name: str, **changes: object) -> Path:
    values = recipe(root / "data", steps=8, picture_every=4, checkpoint_every=4, **changes)
    ended = pretrain("--recipe", write_recipe(root / f"{name}.yaml", values), "--out", root / name)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return root / name


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of a run with everything in it, and of two runs beside each other."""
    root = tmp_path_factory.mktemp("browser")
    write_data(root / "data")
    one, two = train(root, "one"), train(root, "two", seed=4)
    evaluate(["retrieval", "categories", "styles"], one, data=root / "data")
    append_row(one / "events.jsonl", {"event": "incident", "step": 5, "attempt": 0, "what": "spike", "loss": 1e4})
    bad = {"source": "first", "shard": "first-000000.tar", "key": "k" * 60, "id": 1, "step": 2, "attempt": 0}
    for reason in ("source first: sample k of a.tar: got bytes that are no picture", "truncated JPEG"):
        append_row(one / "quarantine.jsonl", bad | {"reason": reason})
    return {"one": write_report(one), "both": write_report([one, two], out=root / "both.html")}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


def opened(browser: Any, report: Path, width: str, scheme: str = "light") -> tuple[Any, list[str]]:
    """The page, and whatever it complains of or asks the network for."""
    across, down = WIDTHS[width]
    page = browser.new_page(viewport={"width": across, "height": down}, color_scheme=scheme)
    trouble: list[str] = []
    page.on("console", lambda message: trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on(
        "request", lambda asked: trouble.append(asked.url) if not asked.url.startswith(("file:", "data:")) else None
    )
    page.goto(report.as_uri())
    return page, trouble


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["one", "both"])
def test_nothing_is_clipped_overlaps_or_complains(
    browser: Any, reports: dict[str, Path], name: str, width: str
) -> None:
    page, trouble = opened(browser, reports[name], width)
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert page.evaluate(OVERLAPS) == [] and page.evaluate(CLIPPED) == [] and page.evaluate(LABELS) == []
    unloaded = "[...document.images].filter((i) => !i.complete || !i.naturalWidth || i.alt.length < 10).length"
    assert page.evaluate(unloaded) == 0 and page.evaluate("document.images.length") > 100
    smallest = "Math.min(...[...document.querySelectorAll('svg text')].map((t) => t.getBoundingClientRect().height))"
    assert page.evaluate(smallest) >= 9, "labels can be read"
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"report_{name}_{width}.png", full_page=True)
    assert trouble == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["one", "both"])
def test_everybody_can_read_it(browser: Any, reports: dict[str, Path], name: str, scheme: str) -> None:
    """axe-core: contrast, names of pictures, headings, tables, what the keyboard reaches."""
    from axe_playwright_python.sync_playwright import Axe

    page, _ = opened(browser, reports[name], "desktop", scheme)
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    found = Axe().run(page)
    wrong = [(v["id"], v["nodes"][0]["html"][:200], len(v["nodes"])) for v in found.response["violations"]]
    assert wrong == []
    assert {rule["id"] for rule in found.response["passes"]} >= {"color-contrast", "image-alt", "svg-img-alt"}
    page.close()


@pytest.mark.parametrize(
    ("style", "check"),
    [
        (".legend { margin-top: -6rem; }", OVERLAPS),
        (".cell figcaption { white-space: nowrap; overflow: hidden; }", CLIPPED),
        ("h1 { width: 200vw; }", CLIPPED),
        ("svg text { font-size: 40px !important; }", LABELS),
    ],
)
def test_the_checks_find_what_they_look_for(browser: Any, reports: dict[str, Path], style: str, check: str) -> None:
    page, _ = opened(browser, reports["one"], "desktop")
    page.add_style_tag(content=style)
    assert page.evaluate(check) != []
    page.close()


def test_a_click_sorts_a_table_and_the_pointer_reads_a_curve(browser: Any, reports: dict[str, Path]) -> None:
    page, trouble = opened(browser, reports["one"], "desktop")
    table = page.locator("#evaluation table")
    before = table.locator("tbody tr").count()
    for order in (1, -1):
        table.locator("thead button", has_text="trained").first.click()
        values = [float(t.rstrip("%")) for t in table.locator("tbody tr td:nth-child(2)").all_inner_texts()]
        assert values == sorted(values, reverse=order < 0) and len(values) == before > 5
    assert table.locator("th[aria-sort=descending]").count() == 1

    panel = page.locator('figure[data-metric="loss"]')
    panel.scroll_into_view_if_needed()
    area = panel.locator('g[id$="-area"]').bounding_box()
    assert area is not None
    page.mouse.move(area["x"] + area["width"] - 12, area["y"] + 20)
    last = panel.locator(".legend tbody td").nth(1).inner_text()
    said = panel.locator(".read").inner_text()
    assert said.startswith("step 7: loss ") and float(said.split()[-1]) == pytest.approx(float(last), rel=1e-3)
    page.mouse.move(2, 2)
    assert not panel.locator(".read").is_visible() and trouble == []
    page.close()


def test_it_prints(browser: Any, reports: dict[str, Path], tmp_path: Path) -> None:
    page, _ = opened(browser, reports["one"], "desktop", "dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)", "dark screens too"
    assert not page.locator("nav").is_visible()
    page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert (tmp_path / "report.pdf").stat().st_size > 50_000
    page.close()

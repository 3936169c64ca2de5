"""The documentation: it builds without a warning, links lead somewhere, and worked examples work."""

import importlib
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from patience import PATIENCE_S
from tiny import ROOT, environment

DOCS = ROOT / "docs"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-E", "-W", "--keep-going", "-b", "html"]
    built = subprocess.run([*command, DOCS, out], capture_output=True, text=True, timeout=PATIENCE_S)
    assert built.returncode == 0 and not built.stderr.strip(), built.stderr
    return out


class Page(HTMLParser):
    """What a page refers to, what can be referred to on it, and what it fetches."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.names: set[str] = set()
        self.fetched: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list) -> None:
        values = dict(attributes)
        self.names |= {values[key] for key in ("id", "name") if values.get(key)}
        if values.get("href"):
            (self.fetched if tag == "link" and values.get("rel") == "stylesheet" else self.links).append(values["href"])
        if values.get("src"):
            self.fetched.append(values["src"])


def test_every_link_and_anchor_of_the_site_leads_somewhere(site: Path) -> None:
    pages = {path: Page(path) for path in site.rglob("*.html")}
    assert len(pages) > 25
    checked = 0
    for path, page in pages.items():
        for link in [*page.links, *page.fetched]:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https", "mailto"):
                assert link not in page.fetched, f"{path.name} fetches {link}: the site is to work without network"
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{path.name} links to {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].names, f"{path.name}: no {link}"
            checked += 1
    assert checked > 500


def test_equations_are_there_without_a_script(site: Path) -> None:
    html = (site / "how_it_works.html").read_text(encoding="utf-8")
    assert html.count("<math") > 20 and "mathjax.js" not in html and "$" not in re.sub(r"<[^>]*>", "", html)


def test_links_of_the_readme_and_other_pages_outside_the_site_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "docker/README.md", ROOT / "ds_configs/README.md"):
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            parts = urlsplit(link)
            assert parts.scheme or (page.parent / parts.path).exists(), f"{page.name} links to {link}"


@pytest.mark.parametrize(("script", "page"), [("recipe_fields", "recipe_reference.md"), ("mix_picture", "mix.svg")])
def test_generated_pages_are_as_their_scripts_write_them(
    script: str, page: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    module = importlib.import_module(script)
    wanted = module.page() if script == "recipe_fields" else module.picture()
    assert (DOCS / page).read_text(encoding="utf-8") == wanted, f"run: python docs/{script}.py"


def test_every_field_of_every_recipe_is_described() -> None:
    from m3i_large.finetune.recipe import FinetuneRecipe
    from m3i_large.recipe import Recipe

    text = (DOCS / "recipe_reference.md").read_text(encoding="utf-8")
    assert text.count("\n| `") > 200
    for model in (Recipe, FinetuneRecipe):
        for name in model.model_fields:
            assert f"\n| `{name}` |" in text
    for line in text.splitlines():
        if line.startswith("| `"):
            assert len(line.split(" | ")[-1].strip(" |")) > 5, line


def test_code_that_equations_name_exists() -> None:
    named = re.findall(r"`([a-z0-9_.]+):(\w+)`", (DOCS / "how_it_works.md").read_text(encoding="utf-8"))
    assert len(named) >= 20
    for module, name in named:
        assert hasattr(importlib.import_module(module), name), f"{module}:{name}"


def files_of(page: Path) -> dict[str, str]:
    """Blocks of code that begin with the name of a file."""
    found = {}
    for _, body in FENCE.findall(page.read_text(encoding="utf-8")):
        first = body.split("\n")[0]
        if match := re.fullmatch(r"# ([\w/]+\.(?:py|yaml))", first):
            found[match[1]] = body
    return found


def written(page: str, root: Path) -> Path:
    for name, body in files_of(DOCS / page).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(body, encoding="utf-8")
    return root


def run(script: str, root: Path, **more: str) -> None:
    variables = environment() | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", **more}
    ended = subprocess.run(
        [sys.executable, script], cwd=root, env=variables, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize(
    ("page", "script"),
    [
        ("add_a_source.md", "write_shards.py"),
        ("add_a_backbone.md", "try_it.py"),
        ("add_a_term.md", "mean_colour.py"),
    ],
)
def test_worked_examples_run(page: str, script: str, tmp_path: Path) -> None:
    run(script, written(page, tmp_path))


def test_the_worked_kernel_runs_and_a_wrong_one_does_not(tmp_path: Path) -> None:
    """In a copy of the kernels' package, as if its files had been added there."""
    import shutil

    shutil.copytree(ROOT / "kernels/m3i_kernels", tmp_path / "m3i_kernels")
    written("add_a_kernel.md", tmp_path / "m3i_kernels")
    (tmp_path / "m3i_kernels/squared_relu/__init__.py").write_text(
        "from m3i_kernels.squared_relu.op import squared_relu\n"
    )
    (tmp_path / "m3i_kernels/try_kernel.py").rename(tmp_path / "try_kernel.py")
    interpreted = {} if Path("/dev/nvidiactl").exists() else {"TRITON_INTERPRET": "1"}
    run("try_kernel.py", tmp_path, **interpreted)
    reference = tmp_path / "m3i_kernels/squared_relu/reference.py"
    reference.write_text(reference.read_text().replace("(2 * x", "(3 * x"))
    with pytest.raises(AssertionError, match="are not close!"):
        run("try_kernel.py", tmp_path, **interpreted)


def test_every_command_that_pages_name_exists() -> None:
    """`m3i X` and `make X`, also within a sentence or a table."""
    from typer.main import get_command

    from m3i_large.cli import app

    known = get_command(app).commands  # type: ignore[attr-defined]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    pages = [ROOT / "README.md", *DOCS.glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    for name in set(re.findall(r"(?:`|^|\$ |&& )m3i ([a-z]+)\b", text, re.M)) - {"on"}:  # of a table's title
        assert name in known, f"m3i {name}"
    for name in set(re.findall(r"`make ([\w-]+)", text)):
        assert name in targets, f"make {name}"

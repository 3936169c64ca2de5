"""The figures of m3i data stats against a loop over the samples."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from shards import fake_image, pair, write_shard

from m3i_large.data import stats as module
from m3i_large.data.manifest import IndexDirectory, build_manifest
from m3i_large.data.source_config import SourceConfig
from m3i_large.data.sources import Source
from m3i_large.data.stats import QUANTILES, plot_stats, source_stats
from m3i_large.data.storage import Storage


def open_source(root: Path, **values: Any) -> Source:
    chosen = SourceConfig.model_validate({"name": "s", "kind": "image_text", "shards": "*.tar"} | values)
    return Source.open(chosen, Storage(root), IndexDirectory(root))


def sample(i: int) -> dict[str, Any]:
    """Sizes, letterboxes, captions, classes and metadata that differ from sample to sample."""
    letterbox = i % 3 == 0
    width, height = (60, 60) if letterbox else (20 + 7 * i % 40, 30)
    meta: dict[str, Any] = {"original_width": 600, "original_height": 100 + 10 * i} if letterbox else {}
    meta |= {"NSFW": ["UNLIKELY", "NSFW"][i % 2]} if i % 4 else {}
    meta |= {"similarity": i / 64} if i % 5 else {}
    return {
        "i": i, "width": width, "height": height, "inner": 10 + i if letterbox else height, "meta": meta,
        "jpg": fake_image(bytes(3 * i), width=width, height=height), "txt": "x" * (i % 7), "cls": i % 6,
    }  # fmt: skip


SAMPLES = [sample(i) for i in range(24)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number in range(4):
        chosen = SAMPLES[6 * number : 6 * number + 6]
        rows = [
            {
                "key": f"{s['i']:02d}",
                "jpg": s["jpg"],
                "txt": s["txt"],
                "cls": str(s["cls"]),
                "json": json.dumps(s["meta"]),
            }
            for s in chosen
        ]
        write_shard(tmp_path / f"{number}.tar", [*rows, {"key": "-", "txt": "no image"}])
    return tmp_path


def quantiles(values: list[float]) -> list[float]:
    """By linear interpolation between sorted values."""
    values = sorted(values)
    found = []
    for q in QUANTILES:
        place = q * (len(values) - 1)
        low = int(place)
        high = min(low + 1, len(values) - 1)
        found.append(values[low] + (place - low) * (values[high] - values[low]))
    return found


@pytest.mark.parametrize("letterbox", [False, True])
def test_figures_are_those_of_a_loop(root: Path, letterbox: bool) -> None:
    stats, values = source_stats(open_source(root, letterbox=letterbox))
    height = [s["inner"] if letterbox else s["height"] for s in SAMPLES]
    width = [s["width"] for s in SAMPLES]
    want = {
        "width": width,
        "height": height,
        "short_side": [min(w, h) for w, h in zip(width, height, strict=True)],
        "aspect": [w / h for w, h in zip(width, height, strict=True)],
        "image_bytes": [len(s["jpg"]) for s in SAMPLES],
        "caption_bytes": [len(s["txt"]) for s in SAMPLES],
        "similarity": [float(np.float32(s["meta"]["similarity"])) for s in SAMPLES if "similarity" in s["meta"]],
    }
    assert stats.quantiles.keys() == want.keys() == values.keys()
    for name, column in want.items():
        assert stats.quantiles[name] == pytest.approx(quantiles(column)), name
        assert sorted(values[name].tolist()) == pytest.approx(sorted(column)), name
    assert (stats.samples, stats.eligible, stats.shards) == (28, 24, (4, 4))
    assert stats.num_bytes == sum(path.stat().st_size for path in root.glob("*.tar"))
    assert stats.letterboxed == pytest.approx(8 / 24)
    assert stats.classes == Counter(s["cls"] for s in SAMPLES)
    assert stats.nsfw == Counter(s["meta"].get("NSFW", "none given") for s in SAMPLES)
    assert stats.flags == {"NO_IMAGE": 4, "EMPTY_PART": sum(not s["txt"] for s in SAMPLES)}
    told = json.loads(json.dumps(stats.to_dict()))
    assert told["at"] == list(QUANTILES) and told["classes"]["5"] == 4 and list(told["classes"]) == list("012345")


def test_only_eligible_samples_count(root: Path) -> None:
    stats, _ = source_stats(open_source(root, filters={"min_caption": 3}))
    chosen = [s for s in SAMPLES if len(s["txt"]) >= 3]
    assert stats.eligible == len(chosen) and stats.quantiles["caption_bytes"][0] == 3
    assert stats.classes == Counter(s["cls"] for s in chosen)
    assert stats.letterboxed == pytest.approx(sum(s["i"] % 3 == 0 for s in chosen) / len(chosen))


@pytest.mark.parametrize(
    ("most", "want"), [(1, [0]), (2, [0, 3]), (3, [0, 2, 3]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])]
)
def test_some_shards_spread_evenly(root: Path, most: int, want: list[int]) -> None:
    shown: list[str] = []
    stats, values = source_stats(open_source(root), most_shards=most, progress=lambda name, size: shown.append(name))
    assert shown == [f"{number}.tar" for number in want] and stats.shards == (len(want), 4)
    assert (stats.samples, stats.eligible, len(values["width"])) == (7 * len(want), 6 * len(want), 6 * len(want))


def test_many_values_are_thinned_out(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_KEPT", 12)  # 3 a shard
    stats, values = source_stats(open_source(root))
    assert values["image_bytes"].tolist() == [len(s["jpg"]) for s in SAMPLES[::2]]
    assert stats.classes == Counter(s["cls"] for s in SAMPLES), "counts stay exact"


def test_the_picture_and_the_caption_that_are_read_are_described(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"key": "a", "png": fake_image(bytes(50)), "jpg": fake_image(), "alt.txt": "second", "txt": "1"},
        {"key": "b", "png": fake_image(bytes(90)), "alt.txt": "four"},
        {"key": "c", "png": fake_image(bytes(80)), "txt": "", "alt.txt": "22"},
    ]
    write_shard(tmp_path / "a.tar", rows)
    source = open_source(tmp_path, captions=["txt", "json:x", "alt.txt"])
    _, values = source_stats(source)
    read = [source.read(i) for i in range(3)]
    assert values["image_bytes"].tolist() == [len(sample.image) for sample in read] == [10, 100, 90]
    assert values["caption_bytes"].tolist() == [len(sample.text or "") for sample in read] == [1, 4, 2]
    assert "caption_bytes" not in source_stats(open_source(tmp_path, kind="image"))[1]


def test_plots_are_written(root: Path) -> None:
    stats, values = source_stats(open_source(root))
    plot_stats(stats, values, root / "plots" / "s.png")
    image = cv2.imread(str(root / "plots" / "s.png"))
    assert image is not None and image.shape[1] > 1000 and image.std() > 5


@pytest.mark.parametrize("similarity", [-0.2, 0.0, 0.3])
def test_plots_of_equal_values(tmp_path: Path, similarity: float) -> None:
    write_shard(tmp_path / "a.tar", [pair(c, txt="", json=json.dumps({"similarity": similarity})) for c in "abc"])
    stats, values = source_stats(open_source(tmp_path))
    assert stats.quantiles["similarity"] == pytest.approx([similarity] * 7)
    plot_stats(stats, values, tmp_path / "s.png")
    assert (tmp_path / "s.png").stat().st_size > 1000


def test_shards_without_samples_can_be_looked_at(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [])
    write_shard(tmp_path / "1.tar", [pair("a")])
    stats, values = source_stats(open_source(tmp_path), most_shards=1)
    assert (stats.eligible, stats.letterboxed, stats.quantiles) == (0, 0.0, {})
    plot_stats(stats, values, tmp_path / "s.png")


def test_damaged_shards_are_counted(root: Path) -> None:
    os.truncate(root / "1.tar", 6000)
    chosen = SourceConfig(name="s", kind="image_text", shards="*.tar")
    names = [f"{number}.tar" for number in range(4)]
    build_manifest(chosen, names, Storage(root), IndexDirectory(root), salvage=True)
    stats, _ = source_stats(open_source(root))
    assert stats.flags["DAMAGED_SHARDS"] == 1 and 18 < stats.eligible < 24

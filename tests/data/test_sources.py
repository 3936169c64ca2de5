"""Sources: order, what is read, and one clear line for every mistake."""

import os
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from shards import fake_image, pair, write_shard

from m3i_large.data.manifest import IndexDirectory, build_manifest
from m3i_large.data.source_config import SourceConfig
from m3i_large.data.sources import Source, expand, manifest_hash, open_sources
from m3i_large.data.storage import OPEN_FILES, Storage
from m3i_large.errors import OutageError, UserError


def config(**values: Any) -> SourceConfig:
    return SourceConfig.model_validate({"name": "s", "kind": "image_text", "shards": "*.tar"} | values)


def open_source(chosen: SourceConfig, root: Path) -> Source:
    return open_sources([chosen], root)[0]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_shard(tmp_path / "b-000001.tar", [pair("x"), pair("y")])
    write_shard(tmp_path / "b-000000.tar", [pair("u")])
    write_shard(tmp_path / "a.tar", [])
    write_shard(tmp_path / "sub/c.tar", [pair("k", cls="3", json='{"concept": "1f600"}')])
    return tmp_path


def test_ids_follow_the_shards_sorted_by_name(root: Path) -> None:
    source = open_source(config(shards=["b-{000001..000000}.tar", "a.tar"]), root)
    assert [shard.name for shard in source.shards] == ["a.tar", "b-000000.tar", "b-000001.tar"]
    samples = [source.read(i) for i in range(len(source))]
    assert [s.key for s in samples] == ["u", "x", "y"] and source.num_samples == 3
    assert samples[1].image == fake_image("image of x") and samples[1].text == "text of x"
    assert samples[1].category is None and samples[1].meta == {}
    assert source.mean_bytes == len(fake_image("image of x")) + len(" text of x\n")
    for bad in (-1, 3):
        with pytest.raises(IndexError, match=f"got id {bad}; needed: 0 to 2"):
            source.read(bad)


@pytest.mark.parametrize(
    "shards", ["b-*.tar", "b-{000000..000001}.tar", ["b-000001.tar", "b-00000[0].tar"], "{b,b}-000001.tar"]
)
def test_braces_globs_and_lists(root: Path, shards: str | list[str]) -> None:
    if shards == "{b,b}-000001.tar":
        with pytest.raises(UserError, match=r"b-000001\.tar is listed twice"):
            open_source(config(shards=shards), root)
    else:
        assert len(open_source(config(shards=shards), root)) == 3


def test_kinds_read_what_they_need_and_count_only_whole_samples(root: Path) -> None:
    write_shard(
        root / "m.tar",
        [pair("a"), pair("b", cls="12"), {"key": "c", "txt": "no image"}, pair("d", txt="t", cls="0", json="{}")],
    )
    by_kind = {
        kind: open_source(config(kind=kind, shards="m.tar"), root) for kind in ("image_text", "image_category", "image")
    }
    assert {k: [s.read(i).key for i in range(len(s))] for k, s in by_kind.items()} == {
        "image_text": ["a", "d"],
        "image_category": ["b", "d"],
        "image": ["a", "b", "d"],
    }
    assert [by_kind["image_category"].read(i).category for i in range(2)] == [12, 0]
    assert by_kind["image_category"].read(1).text is None and by_kind["image"].read(2).category is None
    named = open_source(config(kind="image_category", shards="sub/c.tar", category_field="cls"), root)
    assert named.read(0, meta=True).meta == {"concept": "1f600"} and named.read(0).meta == {}


def test_fields_can_have_other_names(root: Path) -> None:
    write_shard(root / "n.tar", [pair("a", **{"alt.txt": "other", "label": "7"})])
    assert open_source(config(shards="n.tar", captions=["alt.txt"]), root).read(0).text == "other"
    assert (
        open_source(config(shards="n.tar", kind="image_category", category_field="label"), root).read(0).category == 7
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"shards": "none-*.tar"},
            r"data\.sources\.s\.shards: got 'none-\*\.tar', but there is no file .*; needed: tar files",
        ),
        ({"shards": "b-{000000..000002}.tar"}, r"shard .*b-000002\.tar: No such file.*; needed"),
        ({"shards": "b-{000000..00"}, "unbalanced braces; needed"),
        ({"shards": []}, "got \\[\\]; needed: at least one shard"),
        ({"shards": "sub"}, "shard .*sub: not a file; needed: a tar file"),
        ({"shards": "a.tar"}, r"got a\.tar, where no sample has .* and txt; needed: at least one"),
        ({"shards": "sub/c.tar"}, "no sample has .* and txt"),
        ({"shards": ["b-*.tar", "sub/../b-000000.tar"]}, r"sub/\.\./b-000000\.tar is also shard b-000000\.tar of s"),
    ],
)
def test_mistakes_are_named(root: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_sources([config(**values)], root)
    assert "\n" not in str(caught.value)


def test_a_missing_root_no_source_two_names_and_shared_shards(root: Path) -> None:
    with pytest.raises(UserError, match=r"data\.root: got .*absent, which is no directory; needed"):
        open_sources([config()], root / "absent")
    with pytest.raises(UserError, match="got none; needed: at least one"):
        open_sources([], root)
    with pytest.raises(UserError, match="two are named s"):
        open_sources([config(shards="b-000000.tar"), config(shards="b-000001.tar")], root)
    (root / "link.tar").symlink_to(root / "b-000000.tar")
    with pytest.raises(UserError, match=r"data\.sources\.t\.shards: link\.tar is also shard b-000000\.tar of s"):
        open_sources([config(shards="b-*.tar"), config(name="t", shards="link.tar")], root)


@pytest.mark.parametrize(
    ("parts", "kind", "message"),
    [
        ({"txt": b"\xff\xfe"}, "image_text", "utf-8"),
        ({"cls": "cat"}, "image_category", "invalid literal"),
        ({"cls": "-1"}, "image_category", "got category -1"),
        ({"cls": "1", "json": "[1]"}, "image_category", "got .json with a list"),
        ({"cls": "1", "json": "{"}, "image_category", "Expecting property name"),
    ],
)
def test_a_broken_sample_is_named(tmp_path: Path, parts: dict[str, Any], kind: str, message: str) -> None:
    write_shard(tmp_path / "a.tar", [pair("good", txt="t", cls="1"), {"key": "bad", "jpg": fake_image()} | parts])
    source = open_source(config(kind=kind), tmp_path)
    assert source.read(0).key == "good"
    with pytest.raises(ValueError, match=f"source s: sample bad of .*a.tar: .*{message}"):
        source.read(1, meta=True)


def test_a_shard_cut_after_opening_is_an_error(root: Path) -> None:
    source = open_source(config(shards="b-000001.tar"), root)
    os.truncate(root / "b-000001.tar", 600)
    with pytest.raises(OutageError, match=r"b-000001\.tar: the file ends: got 0 bytes .* see m3i data check"):
        source.read(1)


def test_many_threads_many_shards_few_descriptors(tmp_path: Path) -> None:
    count = OPEN_FILES * 2
    for i in range(count):
        write_shard(tmp_path / f"{i:04d}.tar", [pair(f"{i:04d}")])
    chosen, directory = config(), IndexDirectory(tmp_path)
    with pytest.raises(UserError, match=r"128 shards, no index in .*; needed: m3i data index first"):
        open_source(chosen, tmp_path)
    build_manifest(chosen, expand(chosen, str(tmp_path)), Storage(tmp_path), directory, jobs=2)
    source = open_source(chosen, tmp_path)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    ids = [(7 * i) % count for i in range(count * 8)]
    with ThreadPoolExecutor(8) as pool:
        samples = list(pool.map(source.read, ids))
    assert [s.image for s in samples] == [fake_image(f"image of {i:04d}") for i in ids]
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + OPEN_FILES


def test_the_manifest_hash_follows_the_data(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    configs = [config(shards="b-*.tar"), config(name="t", kind="image_category", shards="sub/c.tar")]
    first = manifest_hash(open_sources(configs, root))
    moved = tmp_path_factory.mktemp("moved") / "data"
    root.rename(moved)
    assert manifest_hash(open_sources(configs, moved)) == first
    assert manifest_hash(open_sources(configs[:1], moved)) != first
    assert manifest_hash(open_sources([configs[0].model_copy(update={"name": "r"}), configs[1]], moved)) != first
    write_shard(moved / "b-000000.tar", [pair("v")])  # same size, another key
    assert manifest_hash(open_sources(configs, moved)) != first


@pytest.mark.parametrize(
    ("given", "want"), [(1, Fraction(1)), (0.1, Fraction(1, 10)), ("1/3", Fraction(1, 3)), ("2.5", Fraction(5, 2))]
)
def test_repeats_are_exact_and_survive_a_round_trip(given: int | float | str, want: Fraction) -> None:
    made = config(repeats=given)
    assert made.exact_repeats == want and SourceConfig.model_validate(made.model_dump(mode="json")) == made


@pytest.mark.parametrize(
    "values",
    [
        {"repeats": 0},
        {"repeats": -1},
        {"repeats": "1/0"},
        {"repeats": "often"},
        {"repeats": True},
        {"repeats": float("nan")},
        {"quota": 0},
        {"name": ""},
        {"kind": "text"},
        {"shard": "a.tar"},
        {"nominal": {"samples": 1, "shards": 1}},
    ],
)
def test_wrong_configurations_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(values))):
        config(**values)

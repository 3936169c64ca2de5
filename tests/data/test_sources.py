"""Sources: order, what is read, and one clear line for every mistake."""

import json
import os
import pickle
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds
from pydantic import ValidationError
from shards import fake_image, pair, write_shard

from m3i_large.data.demo import build_demo_data
from m3i_large.data.manifest import IndexDirectory, Manifest, build_manifest
from m3i_large.data.source_config import SourceConfig
from m3i_large.data.sources import LONGEST_CAPTION, Source, expand, manifest_hash, open_sources
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
        {"filters": {"min_caption": 3}, "captions": ["json:a", "json:b"]},
        {"captions": []},
        {"filters": {"max_aspect": 0.5}},
    ],
)
def test_wrong_configurations_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(values))):
        config(**values)


class Counting(Storage):
    """Storage that notes every range it reads."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.ranges: list[tuple[str, int, int]] = []

    def read(self, name: str, offset: int, size: int, *, mark: str | None = None) -> bytes:
        assert mark == self.stat(name).mark, "objects are pinned to what was indexed"
        self.ranges.append((name, offset, size))
        return super().read(name, offset, size, mark=mark)


def counted(chosen: SourceConfig, root: Path) -> tuple[Source, Counting]:
    source, storage = open_source(chosen, root), Counting(root)
    source.storage = storage
    return source, storage


def test_neighbours_are_read_in_one_range(tmp_path: Path) -> None:
    for name in "ab":
        write_shard(tmp_path / f"{name}.tar", [pair(f"{name}{i}", txt="t" * 600) for i in range(6)])
    source, storage = counted(config(), tmp_path)
    alone = [source.fetch([i])[0] for i in range(12)]
    assert len(storage.ranges) == 12 and all(
        shard == f"{'ab'[i // 6]}.tar" for i, (shard, _, _) in enumerate(storage.ranges)
    )
    storage.ranges.clear()
    assert source.fetch(range(12)) == alone
    assert [name for name, _, _ in storage.ranges] == ["a.tar", "b.tar"]
    first = alone[0].parts
    assert storage.ranges[0][1] == 512, "from the first payload to the last and no further"
    data = (tmp_path / "a.tar").read_bytes()
    assert data[512 : 512 + len(first["image"])] == first["image"]
    assert data[: storage.ranges[0][1] + storage.ranges[0][2]].endswith(alone[5].parts["txt"])
    storage.ranges.clear()
    mixed = [3, 2, 4, 11, 10, 0, 0]
    assert source.fetch(mixed) == [alone[i] for i in mixed]
    assert [name for name, _, _ in storage.ranges] == ["a.tar", "b.tar", "a.tar"]
    assert source.fetch([]) == [] and len(storage.ranges) == 3


def test_what_lies_far_apart_is_read_alone(tmp_path: Path) -> None:
    rows = [pair(f"{i}", txt="t" * 500, mp4="v" * 40_000) for i in range(5)]
    rows.append({"key": "5", "jpg": fake_image(), "wav": "w" * 40_000, "txt": "after the sound"})
    write_shard(tmp_path / "a.tar", rows)
    source, storage = counted(config(), tmp_path)
    got = source.fetch([0, 4])
    assert [e.key for e in got] == ["0", "4"] and len(storage.ranges) == 2, "each sample"
    assert got[1].parts == {"image": rows[4]["jpg"], "txt": b"t" * 500}
    assert sum(size for _, _, size in storage.ranges) < 4000
    storage.ranges.clear()
    (got_one,) = source.fetch([5])
    assert got_one.parts == {"image": fake_image(), "txt": b"after the sound"}
    assert sorted(size for _, _, size in storage.ranges) == [len(fake_image()), len(b"after the sound")], "each part"
    # Half of a range that is wanted is worth reading the other half, however large.
    write_shard(tmp_path / "a.tar", [pair("a", txt="x", wav="w" * 40_000), pair("b", txt="t" * 46_000)])
    source, storage = counted(config(), tmp_path)
    assert [e.key for e in source.fetch([0, 1])] == ["a", "b"] and len(storage.ranges) == 1


def test_captions_have_fallbacks(tmp_path: Path) -> None:
    rows = [
        {"key": "a", "jpg": fake_image(), "txt": "own", "json": '{"caption": "meta", "title": "t"}'},
        {"key": "b", "jpg": fake_image(), "txt": " \n", "json": '{"caption": " meta ", "title": "t"}'},
        {"key": "c", "jpg": fake_image(), "json": '{"caption": "", "title": "t\\u00fc"}'},
        {"key": "d", "jpg": fake_image(), "txt": "", "json": '{"caption": null, "title": 7}'},
        {"key": "e", "jpg": fake_image(), "txt": "", "json": "{}"},
        {"key": "f", "jpg": fake_image(), "txt": "no json"},
    ]
    write_shard(tmp_path / "a.tar", rows)
    source = open_source(config(captions=["txt", "json:caption", "json:title"]), tmp_path)
    samples = [source.read(i) for i in range(6)]
    assert [s.text for s in samples] == ["own", "meta", "tü", "7", "", "no json"]
    source = open_source(config(captions=["json:title", "txt"]), tmp_path)
    assert [source.read(i).text for i in range(6)] == ["t", "t", "tü", "7", "", "no json"]


@pytest.mark.parametrize(
    ("raw", "want"),
    [
        ("A+caf%C3%A9+%26+more", "A café & more"),
        ("<b>bold</b> &amp; <a href='x'>link</a>", "bold   &  link"),
        ("&lt;i&gt;quoted&lt;/i&gt;", "quoted"),
        ("<PERSON> with a hat", "<PERSON> with a hat"),
        ("a < b > c, 1 <3 you", "a < b > c, 1 <3 you"),
        ("<img src='a'><br/>", ""),
        ("<breakfast> at <9>", "<breakfast> at <9>"),
    ],
)
def test_captions_are_cleaned_where_asked(tmp_path: Path, raw: str, want: str) -> None:
    write_shard(tmp_path / "a.tar", [pair("a", txt=raw)])
    cleaned = open_source(config(caption_clean=True), tmp_path).read(0).text
    assert cleaned is not None and cleaned.split() == want.split()
    assert open_source(config(), tmp_path).read(0).text == raw


def test_a_caption_that_is_markup_alone_falls_back(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [pair("a", txt="<br>", json='{"title": "t"}')])
    assert open_source(config(caption_clean=True, captions=["txt", "json:title"]), tmp_path).read(0).text == "t"


@pytest.mark.parametrize("before", ["", "a", "aa"])
def test_a_long_caption_is_cut_even_inside_a_character(tmp_path: Path, before: str) -> None:
    text = before + "€" * LONGEST_CAPTION
    rows = [pair("a", txt=text, json=json.dumps({"c": text})), pair("b", txt="x" * LONGEST_CAPTION)]
    write_shard(tmp_path / "a.tar", rows)
    source, storage = counted(config(), tmp_path)
    want = before + "€" * ((LONGEST_CAPTION - len(before)) // 3)
    assert source.read(0).text == want and sum(size for _, _, size in storage.ranges) < 2 * LONGEST_CAPTION
    assert source.read(1).text == "x" * LONGEST_CAPTION
    assert open_source(config(captions=["json:c"]), tmp_path).read(0).text == want


def test_a_manifest_of_other_filters_is_refused(root: Path) -> None:
    """Ids would mean other samples."""
    source = open_source(config(shards="b-*.tar"), root)
    stricter = config(shards="b-*.tar", filters={"min_size": 100})
    manifest = Manifest(source="s", eligibility={}, shards=source.shards)
    with pytest.raises(UserError, match=r"shard b-000000\.tar: 0 eligible samples, manifest 1; needed: m3i data index"):
        Source(stricter, manifest, source.storage, source.directory).read(0)


def test_class_maps(tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text('{"cat": 1, "n01": 0, "7": 5}')
    rows = [pair("a", cls=" cat\n"), pair("b", cls="n01"), pair("c", cls="7"), pair("d", cls="dog"), pair("e", cls="1")]
    write_shard(tmp_path / "a.tar", rows)
    source = open_source(config(kind="image_category", class_map="classes.json"), tmp_path)
    assert [source.read(i).category for i in range(3)] == [1, 0, 5]
    for i, label in ((3, "dog"), (4, "1")):
        with pytest.raises(ValueError, match=rf"sample . of a\.tar: class '{label}' is not in class_map classes\.json"):
            source.read(i)
    with pytest.raises(ValueError, match="invalid literal"):
        open_source(config(kind="image_category"), tmp_path).read(0)


@pytest.mark.parametrize("content", [None, "", "[1]", '{"a": "x"}', '{"a": null}', '{"a": -1}', "{}", "3"])
def test_a_broken_class_map_is_named(root: Path, content: str | None) -> None:
    if content is not None:
        (root / "classes.json").write_text(content)
    with pytest.raises(UserError, match=r"^data\.sources\.s\.class_map: .*classes\.json.*; needed: ") as caught:
        open_source(config(kind="image_category", shards="sub/c.tar", class_map="classes.json"), root)
    assert "\n" not in str(caught.value)


def test_categories_in_the_metadata(tmp_path: Path) -> None:
    metas = ['{"label": 4}', '{"label": " 12 "}', '{"label": null}', '{"other": 1}', '{"label": true}', '{"label": -2}']
    write_shard(tmp_path / "a.tar", [pair(f"{i}", json=meta, cls="99") for i, meta in enumerate(metas)])
    source = open_source(config(kind="image_category", category_field="json:label"), tmp_path)
    assert [source.read(i).category for i in (0, 1)] == [4, 12] and source.read(0).text is None
    for i, message in ((2, "no json:label"), (3, "no json:label"), (4, "invalid literal"), (5, "got category -2")):
        with pytest.raises(ValueError, match=f"sample {i} of a.tar: {message}"):
            source.read(i)


def test_metadata_without_an_end_is_a_bad_sample(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [pair("a", json="[" * 200_000)])
    with pytest.raises(ValueError, match=r"source s: sample a of a\.tar: got \.json that is nested too deeply"):
        open_source(config(captions=["json:c"]), tmp_path).read(0)


def test_a_source_reads_the_same_in_another_process(root: Path) -> None:
    (root / "classes.json").write_text('{"3": 8}')
    sources = [
        open_source(config(shards="b-*.tar", filters={"min_caption": 3}), root),
        open_source(config(kind="image_category", shards="sub/c.tar", class_map="classes.json"), root),
    ]
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        for source in sources:
            there = list(pool.map(source.read, range(len(source))))
            assert there == [source.read(i) for i in range(len(source))] and there
    copy = pickle.loads(pickle.dumps(sources[0]))
    assert (copy.num_samples, copy.mean_bytes, copy.shards) == (
        sources[0].num_samples,
        sources[0].mean_bytes,
        sources[0].shards,
    )
    assert manifest_hash([copy]) == manifest_hash(sources[:1])


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_demo_data(tmp_path_factory.mktemp("demo") / "data", size=16, limit=60).root


@pytest.mark.parametrize("stem", ["openmoji", "twemoji", "category"])
def test_webdataset_reads_the_same_of_the_embedded_data(demo: Path, stem: str) -> None:
    kind = "image_category" if stem == "category" else "image_text"
    source = open_source(config(kind=kind, shards="{train,valid,heldout}/" + stem + "-*.tar"), demo)
    theirs = []
    for shard in source.shards:
        dataset = wds.WebDataset(str(demo / shard.name), shardshuffle=False, empty_check=False)
        theirs += [(shard.name, sample) for sample in dataset]
    assert len(theirs) == len(source) > 10
    for i, (shard, sample) in enumerate(theirs):
        ours = source.read(i, meta=True)
        assert (ours.shard, ours.key, ours.image) == (shard, sample["__key__"], sample["webp"])
        assert ours.meta == json.loads(sample["json"])
        if stem == "category":
            assert (ours.category, ours.text) == (int(sample["cls"]), None)
        else:
            assert (ours.category, ours.text) == (None, sample["txt"].decode())

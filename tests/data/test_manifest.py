"""Which samples count, and when shards are read again."""

import itertools
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from shards import fake_image, pair, write_shard, write_tar

from m3i_large.data import manifest as module
from m3i_large.data.index import MOST_NSFW, ShardIndex
from m3i_large.data.manifest import (
    IndexDirectory,
    Manifest,
    build_manifest,
    eligibility,
    load_index,
    open_manifest,
)
from m3i_large.data.source_config import SourceConfig
from m3i_large.data.sources import Source
from m3i_large.data.storage import Storage
from m3i_large.errors import UserError

NAN = float("nan")


def config(**values: Any) -> SourceConfig:
    return SourceConfig.model_validate({"name": "s", "kind": "image_text", "shards": "*.tar"} | values)


class Counting(Storage):
    """Storage that notes which shards were read, and how often."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: list[str] = []

    def read(self, name: str, offset: int, size: int, *, mark: str | None = None) -> bytes:
        self.reads.append(name)
        return super().read(name, offset, size, mark=mark)


def keys(chosen: SourceConfig, root: Path) -> list[str]:
    try:
        source = Source.open(chosen, Storage(root), IndexDirectory(root))
    except UserError as error:
        if "no sample has" in str(error):
            return []
        raise
    return [source.read(i).key for i in range(len(source))]


def varied() -> list[dict[str, Any]]:
    """Samples around every threshold: what they are, and under "parts" what is in the tar."""
    sizes = [(31, 40, 0, 0), (32, 32, 64, 64), (48, 32, 96, 64), (49, 32, 0, 0), (64, 64, 200, 100), (64, 64, 100, 201)]
    meaning = ["UNLIKELY", "NSFW", None, "UNSURE"]
    similarity = [0.25, NAN, 0.5, 0.75]
    captions = ["", "four", "fives"]
    samples = []
    for i, (size, nsfw, near, text) in enumerate(itertools.product(sizes, meaning, similarity, captions)):
        width, height, ow, oh = size
        meta: dict[str, Any] = {"original_width": ow, "original_height": oh} if ow else {}
        meta |= {"NSFW": nsfw} if nsfw or i % 2 else {}
        meta |= {} if math.isnan(near) else {"similarity": near}
        parts = {"jpg": fake_image(width=width, height=height), "txt": text.encode(), "json": json.dumps(meta).encode()}
        samples.append({"key": f"{i:04d}", "size": size, "nsfw": nsfw, "near": near, "text": text, "parts": parts})
    return samples


def content(size: tuple[int, int, int, int]) -> tuple[float, float]:
    """The picture inside a letterbox, to the pixel where the numbers are chosen so."""
    width, height, ow, oh = size
    if width != height or ow == oh:
        return width, height
    return round(ow * width / max(ow, oh)), round(oh * width / max(ow, oh))


@pytest.fixture(scope="module")
def varied_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("varied")
    half = len(varied()) // 2
    for name, samples in (("0.tar", varied()[:half]), ("1.tar", []), ("2.tar", varied()[half:])):
        write_tar(root / name, [(f"{s['key']}.{e}", data) for s in samples for e, data in s["parts"].items()])
    return root


@pytest.mark.parametrize(
    ("letterbox", "filters"),
    [
        (False, {}),
        (False, {"min_size": 32}),
        (False, {"min_size": 33}),
        (True, {"min_size": 32}),
        (True, {"min_size": 33}),
        (False, {"max_aspect": 1}),
        (False, {"max_aspect": 1.5}),
        (True, {"max_aspect": 1.5}),
        (True, {"max_aspect": 1.9}),
        (False, {"nsfw": ["UNLIKELY"]}),
        (False, {"nsfw": ["UNLIKELY", None]}),
        (False, {"nsfw": [None]}),
        (False, {"nsfw": ["never seen"]}),
        (False, {"nsfw": []}),
        (False, {"min_similarity": 0.5}),
        (False, {"min_similarity": -1.0}),
        (False, {"min_caption": 4}),
        (False, {"min_caption": 5}),
        (True, {"min_size": 32, "max_aspect": 2, "nsfw": ["UNSURE", None], "min_similarity": 0.5, "min_caption": 1}),
    ],
)
def test_filters_choose_what_a_loop_chooses(varied_root: Path, letterbox: bool, filters: dict[str, Any]) -> None:
    want = []
    for s in varied():
        width, height = content(s["size"]) if letterbox else s["size"][:2]
        good = "min_size" not in filters or min(width, height) >= filters["min_size"]
        if "max_aspect" in filters and max(width, height) / min(width, height) > filters["max_aspect"]:
            good = False
        if "nsfw" in filters and s["nsfw"] not in filters["nsfw"]:
            good = False
        if "min_similarity" in filters and not s["near"] >= filters["min_similarity"]:
            good = False
        if "min_caption" in filters and len(s["text"]) < filters["min_caption"]:
            good = False
        want += [s["key"]] if good else []
    got = keys(config(letterbox=letterbox, filters=filters), varied_root)
    assert got == want
    # Every case must be able to fail: none chooses all, but the one without filters.
    assert (len(want) == len(varied())) == (not filters)


def test_samples_that_never_count(tmp_path: Path) -> None:
    members = [
        ("a.jpg", fake_image()), ("a.txt", b"t"),
        ("b.jpg", b"no picture"), ("b.txt", b"t"),
        ("c.txt", b"no image"),
        ("d.jpg", fake_image()), ("d.cls", b"0"),
        ("e.jpg", fake_image(width=0)), ("e.txt", b"t"),
        ("a.jpg", fake_image("again")), ("a.txt", b"t"),
        ("f.jpg", fake_image()), ("f.json", b'{"caption": "c"}'),
        ("g.webp", fake_image()), ("g.txt", b"t"),
    ]  # fmt: skip
    write_tar(tmp_path / "a.tar", members)
    assert keys(config(), tmp_path) == ["a", "g"]
    assert keys(config(captions=["json:caption", "txt"]), tmp_path) == ["a", "f", "g"]
    assert keys(config(kind="image"), tmp_path) == ["a", "d", "f", "g"]
    assert keys(config(kind="image_category"), tmp_path) == ["d"]
    row = Manifest.load(IndexDirectory(tmp_path).manifest("s")).shards[0]  # type: ignore[union-attr]
    assert (row.samples, row.eligible) == (8, 1)
    assert row.flags == {"NO_IMAGE": 1, "NO_HEADER": 2, "DUPLICATE_KEY": 1}
    assert row.payload == len(fake_image()) + 1


def test_ids_pass_over_shards_without_samples(tmp_path: Path) -> None:
    shards = [[], ["a"], [], [], ["b", "-", "c"], ["-"], ["d"], []]
    for number, names in enumerate(shards):
        samples = [pair(f"{name}{number}", **({"cls": "0"} if name == "-" else {"txt": name})) for name in names]
        write_shard(tmp_path / f"{number}.tar", samples)
    source = Source.open(config(), Storage(tmp_path), IndexDirectory(tmp_path))
    assert [source.read(i).text for i in range(len(source))] == ["a", "b", "c", "d"]
    assert [source.locate(i) for i in range(4)] == [(1, 0), (4, 0), (4, 2), (6, 0)]
    assert [e.key for e in source.fetch([3, 0, 2, 1])] == ["d6", "a1", "c4", "b4"]


def build(root: Path, chosen: SourceConfig | None = None, storage: Storage | None = None, **options: Any) -> Manifest:
    names = sorted(path.name for path in root.glob("*.tar"))
    return build_manifest(chosen or config(), names, storage or Storage(root), IndexDirectory(root), **options)


def opened(root: Path, chosen: SourceConfig, storage: Storage | None = None, *, few: int = 64) -> Manifest:
    names = sorted(path.name for path in root.glob("*.tar"))
    return open_manifest(chosen, names, storage or Storage(root), IndexDirectory(root), few=few)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for i in range(4):
        write_shard(tmp_path / f"{i}.tar", [pair(f"{i}{c}") for c in "abc"])
    return tmp_path


def test_a_manifest_comes_back_as_it_was(root: Path) -> None:
    chosen = config(filters={"nsfw": [None, "ü\u2028"], "max_aspect": 1.1})
    manifest = build(root, chosen)
    path = IndexDirectory(root).manifest("s")
    assert Manifest.load(path) == manifest and manifest.shards[3].eligible == 0 and manifest.shards[3].samples == 3
    lines = path.read_text(encoding="utf-8").splitlines()
    for broken in ("", "{}", "[]", "null", "x", "\n".join([lines[0], lines[1][:-9]]), lines[0] + "\n[1, 2]"):
        path.write_text(broken, encoding="utf-8")
        assert Manifest.load(path) is None, broken
    path.write_text("\n".join([lines[0].replace('"format": 1', '"format": 2'), *lines[1:]]), encoding="utf-8")
    assert Manifest.load(path) is None
    assert sorted(p.name for p in path.parent.iterdir()) == ["s.jsonl", "shards"], "no temporary file stays"


@pytest.mark.parametrize(
    "changed",
    [
        {"filters": {"min_size": 20}},
        {"kind": "image"},
        {"captions": ["txt", "alt.txt"]},
        {"letterbox": True},
        {"category_field": "label"},
    ],
)
def test_a_manifest_of_other_settings_is_remade_or_refused(root: Path, changed: dict[str, Any]) -> None:
    first, storage = build(root), Counting(root)
    other = config(**changed)
    with pytest.raises(UserError, match=r"s: 4 shards, an index of other shards or filters in .*; needed: m3i data in"):
        opened(root, other, few=3)
    made = opened(root, other, storage, few=4)
    assert made.eligibility == eligibility(other) != first.eligibility and storage.reads == []
    assert Manifest.load(IndexDirectory(root).manifest("s")) == made == opened(root, other, few=3)


def test_settings_that_choose_no_sample_keep_the_manifest(root: Path) -> None:
    first = build(root)
    assert opened(root, config(repeats=3, quota=2, caption_clean=True, shards=["{0..3}.tar"]), few=0) == first


def test_a_manifest_of_other_shards_is_remade_or_refused(root: Path) -> None:
    with pytest.raises(UserError, match=r"4 shards, no index in"):
        opened(root, config(), few=3)
    build(root)
    write_shard(root / "4.tar", [pair("new")])
    with pytest.raises(UserError, match=r"5 shards, an index of other shards"):
        opened(root, config(), few=4)
    storage = Counting(root)
    assert [row.eligible for row in opened(root, config(), storage).shards] == [3, 3, 3, 3, 1]
    assert set(storage.reads) == {"4.tar"}


def test_few_shards_are_looked_at_and_many_are_trusted(root: Path) -> None:
    first = build(root)
    write_shard(root / "2.tar", [pair("other")])
    assert opened(root, config(), few=3) == first
    made = opened(root, config(), few=4)
    assert [row.samples for row in made.shards] == [3, 3, 1, 3]


def test_indexing_goes_on_where_it_was_interrupted(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build(root)
    path = IndexDirectory(root).manifest("s")
    text = path.read_bytes()
    shutil.rmtree(root / ".m3i")
    index_shard = module.index_shard

    def interrupted(name: str, storage: Storage, **options: Any) -> ShardIndex:
        if name == "2.tar":
            raise KeyboardInterrupt
        return index_shard(name, storage, **options)

    monkeypatch.setattr(module, "index_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(root)
    assert not path.exists()
    monkeypatch.undo()
    storage = Counting(root)
    assert build(root, storage=storage) == whole and path.read_bytes() == text
    assert set(storage.reads) == {"2.tar", "3.tar"}
    storage.reads.clear()
    assert build(root, storage=storage) == whole and storage.reads == []


def test_a_replaced_shard_is_indexed_again(root: Path) -> None:
    first = build(root)
    stat = os.stat(root / "1.tar")
    write_shard(root / "1.tar", [pair(f"9{c}") for c in "abc"])
    assert os.stat(root / "1.tar").st_size == stat.st_size
    os.utime(root / "1.tar", ns=(stat.st_mtime_ns, stat.st_mtime_ns + 1))  # of the same size
    write_shard(root / "2.tar", [pair(f"2{c}") for c in range(30)])
    stat = os.stat(root / "2.tar")
    storage = Counting(root)
    second = build(root, storage=storage)
    assert set(storage.reads) == {"1.tar", "2.tar"}
    assert [a == b for a, b in zip(first.shards, second.shards, strict=True)] == [True, False, False, True]
    assert second.shards[1].checksum != first.shards[1].checksum and second.shards[2].samples == 30
    # Longer, with the time it had: the size alone must tell.
    (root / "2.tar").write_bytes((root / "2.tar").read_bytes() + bytes(512))
    os.utime(root / "2.tar", ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    storage.reads.clear()
    build(root, storage=storage)
    assert set(storage.reads) == {"2.tar"}


@pytest.mark.parametrize("jobs", [1, 2])
def test_damaged_shards_refuse_or_keep_what_is_whole(root: Path, jobs: int) -> None:
    for name in ("1.tar", "3.tar"):
        data = (root / name).read_bytes()
        (root / name).write_bytes(data[: 512 * 10])  # c's text is missing: a and b are whole
    with pytest.raises(UserError, match=r"^source s: shard .*/1\.tar: the file ends .* at byte \d+ \(and 1 more sha.*"):
        build(root, jobs=jobs)
    assert not IndexDirectory(root).manifest("s").exists()
    manifest = build(root, salvage=True, jobs=jobs)
    assert [(row.samples, bool(row.damage)) for row in manifest.shards] == [(3, 0), (2, 1), (3, 0), (2, 1)]
    assert keys(config(), root) == [f"{i}{c}" for i in range(4) for c in ("abc" if i % 2 == 0 else "ab")]
    with pytest.raises(UserError, match="needed: whole tar files, or m3i data index --salvage"):
        build(root)
    write_shard(root / "3.tar", [pair("3")])
    with pytest.raises(UserError) as caught:
        build(root)
    assert "1.tar" in str(caught.value) and "more shards" not in str(caught.value)


def test_processes_make_the_same_manifest_and_indexes(root: Path) -> None:
    directory = IndexDirectory(root)

    def files() -> dict[str, bytes]:
        made = {str(p.relative_to(root)): p.read_bytes() for p in (root / ".m3i").rglob("*") if p.is_file()}
        for i in range(4):  # the order of safetensors' metadata is not fixed
            index = ShardIndex.load(directory.shard(f"{i}.tar"))
            assert index is not None and made.pop(f".m3i/shards/{i}.tar.index")
            made |= {f"{i}/{name}": column.tobytes() for name, column in index.columns.items()}
        return made

    shown: list[tuple[str, int]] = []
    build(root, progress=lambda name, size: shown.append((name, size)))
    alone = files()
    assert shown == [(f"{i}.tar", os.path.getsize(root / f"{i}.tar")) for i in range(4)]
    shutil.rmtree(root / ".m3i")
    build(root, jobs=2)
    assert files() == alone


def test_a_mistake_in_a_process_is_one_line(root: Path) -> None:
    (root / "2.tar").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"2\.tar: no uncompressed tar file: the file ends without two zero blocks at byte 0"
    ):
        build(root, jobs=2)
    (root / "2.tar").unlink()
    (root / "2.tar").mkdir()
    with pytest.raises(UserError, match=r"2\.tar: not a file; needed: a tar file that can be read$"):
        build(root, jobs=2)


def test_empty_files_are_counted_with_the_damaged_and_can_be_passed_over(root: Path) -> None:
    for name in ("1.tar", "2.tar"):
        (root / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"no uncompressed tar file: .* \(and 1 more shards\)"):
        build(root)
    rows = build(root, salvage=True).shards
    assert [row.eligible > 0 for row in rows if row.name in ("1.tar", "2.tar")] == [False, False]
    assert any(row.eligible for row in rows)


@pytest.mark.parametrize("blocked", [".m3i", ".m3i/shards", ".m3i/s.jsonl"])
def test_a_directory_that_cannot_be_written_is_one_line(root: Path, blocked: str) -> None:
    place = root / blocked
    place.parent.mkdir(parents=True, exist_ok=True)
    if blocked in (".m3i", ".m3i/shards"):
        place.write_text("a file")
    else:
        place.mkdir()
    with pytest.raises(
        UserError, match=r"data\.index: .*\.m3i cannot be written \(.+\); needed: data\.index=DIRE"
    ) as e:
        build(root)
    assert "\n" not in str(e.value) and "None" not in str(e.value)


def test_an_index_that_is_gone_or_of_another_file_is_named(root: Path) -> None:
    manifest, directory = build(root), IndexDirectory(root)
    assert load_index(manifest.shards[0], directory).key(0) == "0a"
    shutil.copy(directory.shard("1.tar"), directory.shard("0.tar"))
    with pytest.raises(UserError, match=r"0\.tar\.index belongs to another version of the shard; needed: m3i data ind"):
        load_index(manifest.shards[0], directory)
    directory.shard("0.tar").unlink()
    with pytest.raises(UserError, match=r"0\.tar\.index is missing; needed: m3i data index"):
        load_index(manifest.shards[0], directory)
    directory.shard("2.tar").write_bytes(b"")
    storage = Counting(root)
    assert build(root, storage=storage) == manifest and set(storage.reads) == {"0.tar", "2.tar"}, "mended"


def test_every_shard_has_its_own_index_file_inside_the_directory(tmp_path: Path) -> None:
    directory = IndexDirectory("s3://bucket/data", tmp_path / "index")
    names = ["a.tar", "d/a.tar", "../a.tar", "../../a.tar", "/abs/a.tar", "s3://b/a.tar", "https://host/d/a.tar"]
    paths = [directory.shard(name) for name in names]
    assert len(set(paths)) == len(names)
    assert all(Path(os.path.normpath(p)).is_relative_to(tmp_path / "index" / "shards") for p in paths)
    assert IndexDirectory(tmp_path).path == tmp_path / ".m3i"
    with pytest.raises(UserError, match=r"data\.index: not set, and data\.root is s3://b/c; needed: a local directory"):
        IndexDirectory("s3://b/c")


def test_shards_above_the_root_are_indexed_inside_the_directory(tmp_path: Path) -> None:
    write_shard(tmp_path / "elsewhere" / "a.tar", [pair("a")])
    (tmp_path / "deep" / "root").mkdir(parents=True)
    before = set(tmp_path.rglob("*"))
    names = ["../../elsewhere/a.tar"]
    build_manifest(config(), names, Storage(tmp_path / "deep/root"), IndexDirectory(tmp_path / "deep/root"))
    new = set(tmp_path.rglob("*")) - before
    assert new and all(path.is_relative_to(tmp_path / "deep/root/.m3i") for path in new)


def test_nsfw_that_is_a_number_hinders_only_its_filter(tmp_path: Path) -> None:
    count = MOST_NSFW + 5
    samples = [pair(f"{i:03d}", txt="t", json=json.dumps({"nsfw": i / 1000})) for i in range(count)]
    write_shard(tmp_path / "a.tar", samples)
    assert len(keys(config(), tmp_path)) == count
    with pytest.raises(
        UserError, match=r"filters\.nsfw: .* more than 254 different values .* needed: a column with few"
    ):
        keys(config(filters={"nsfw": ["0.001"]}), tmp_path)
    write_shard(tmp_path / "a.tar", samples[:MOST_NSFW])
    assert keys(config(filters={"nsfw": ["0.001"]}), tmp_path) == ["001"]

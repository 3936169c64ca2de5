"""m3i data check finds what has changed, and nothing where nothing has."""

import json
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shards import pair, write_shard

from m3i_large.data.check import check_configuration, check_manifest
from m3i_large.data.index import ShardIndex
from m3i_large.data.interchange import write_energon
from m3i_large.data.manifest import IndexDirectory, Manifest, build_manifest
from m3i_large.data.source_config import SourceConfig
from m3i_large.data.storage import Storage


def config(**values: Any) -> SourceConfig:
    return SourceConfig.model_validate({"name": "s", "kind": "image_text", "shards": "**/*.tar"} | values)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for i in range(3):
        samples = [pair(f"{i}{c}", txt="t", json=json.dumps({"NSFW": c, "similarity": 0.5})) for c in "abcd"]
        write_shard(tmp_path / f"d{i}" / f"{i}.tar", samples)
    return tmp_path


def made(root: Path, **options: Any) -> Manifest:
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*.tar"))
    return build_manifest(config(), names, Storage(root), IndexDirectory(root), **options)


def check(root: Path, manifest: Manifest, **options: Any) -> list[str]:
    return check_manifest(manifest, Storage(root), IndexDirectory(root), **options)


@pytest.mark.parametrize("options", [{}, {"quick": True}, {"jobs": 2}])
def test_nothing_is_said_of_what_is_as_it_was(root: Path, options: dict[str, Any]) -> None:
    manifest = made(root)
    shown: list[str] = []
    assert check(root, manifest, progress=lambda name, size: shown.append(name), **options) == []
    assert shown == ["d0/0.tar", "d1/1.tar", "d2/2.tar"]
    os.utime(root / "d0/0.tar", (1, 1))  # a copy has another time and the same bytes
    assert check(root, manifest, **options) == []


@pytest.mark.parametrize("quick", [True, False])
def test_missing_longer_and_shorter_shards(root: Path, quick: bool) -> None:
    manifest = made(root)
    (root / "d0/0.tar").unlink()
    longer = os.path.getsize(root / "d1/1.tar") + 512
    os.truncate(root / "d1/1.tar", longer)
    size = os.path.getsize(root / "d2/2.tar")
    os.truncate(root / "d2/2.tar", size - 512)
    assert check(root, manifest, quick=quick) == [
        f"{root}/d0/0.tar: No such file or directory",
        f"{root}/d1/1.tar: {longer} bytes; {longer - 512} when it was indexed",
        f"{root}/d2/2.tar: {size - 512} bytes; {size} when it was indexed",
    ]


def test_a_flipped_byte_is_found_by_reading(root: Path) -> None:
    manifest = made(root)
    path = root / "d1/1.tar"
    stat, data = os.stat(path), bytearray(path.read_bytes())
    index = ShardIndex.load(IndexDirectory(root).shard("d1/1.tar"))
    assert index is not None
    data[index.part(2, "jpg")[0] + 12] ^= 1  # type: ignore[index]
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert check(root, manifest, quick=True) == []
    for jobs in (1, 2):
        (problem,) = check(root, manifest, jobs=jobs)
        assert (
            problem.startswith(f"{path}: its bytes have changed (checksum ") and manifest.shards[1].checksum in problem
        )
    data[:512] = b"?" * 512  # no tar any more
    path.write_bytes(data)
    (problem,) = check(root, manifest)
    assert problem.startswith(f"{path}: its bytes have changed (checksum ")


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize(
    "how", ["missing", "empty", "cut", "of another shard", "without metadata", "flipped", "renamed"]
)
def test_a_lost_index_is_found(root: Path, quick: bool, how: str) -> None:
    manifest, directory = made(root), IndexDirectory(root)
    path = directory.shard("d1/1.tar")
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        other = directory.shard("d0/0.tar").read_bytes()
        renamed = data.replace(b'"damage"', b'"damagf"')
        contents = {
            "empty": b"",
            "cut": data[:-1],
            "of another shard": other,
            "without metadata": renamed,
            "flipped": data[:-20] + bytes([data[-20] ^ 1]) + data[-19:],
            "renamed": data.replace(b'"width"', b'"widht"'),
        }
        assert contents[how] != data
        path.write_bytes(contents[how])
    (problem,) = check(root, manifest, quick=quick)
    assert problem == f"{root}/d1/1.tar: its index {path} is missing, damaged or of another version"
    assert made(root) == manifest and check(root, manifest, quick=quick) == [], "m3i data index mends it"


def test_an_index_that_says_something_else_is_found(root: Path) -> None:
    """Whole files that another program, or another version of this one, wrote."""
    manifest, directory = made(root), IndexDirectory(root)

    def rewrite(number: int, **changed: Any) -> None:
        path = directory.shard(f"d{number}/{number}.tar")
        index = ShardIndex.load(path)
        assert index is not None
        columns = index.columns | changed.pop("columns", {})
        replace(index, columns={k: v for k, v in columns.items() if v is not None}, **changed).save(path)

    similarity = np.array([0.5, 0.5, 0.5, 0.25], np.float32)
    cases: list[dict[str, Any]] = [
        {"nsfw_values": ("z", "b", "c", "d")},
        {"extensions": ("jpg", "text", "json")},
        {"columns": {"similarity": similarity}},
        {"columns": {"width": None}},
    ]
    for case in cases:
        rewrite(1, **case)
        assert check(root, manifest, quick=True) == []
        assert check(root, manifest) == [f"{root}/d1/1.tar: its index does not fit its bytes"]
        directory.shard("d1/1.tar").unlink()
        assert made(root) == manifest and check(root, manifest) == []
    wrong = replace(manifest, shards=(*manifest.shards[:2], replace(manifest.shards[2], samples=5)))
    assert check(root, wrong) == [f"{root}/d2/2.tar: its index does not fit its bytes"]


@pytest.mark.parametrize("quick", [True, False])
def test_known_damage_is_repeated(root: Path, quick: bool) -> None:
    os.truncate(root / "d1/1.tar", 512 * 14)
    manifest = made(root, salvage=True)
    (problem,) = check(root, manifest, quick=quick)
    assert problem == f"{root}/d1/1.tar: damaged: {manifest.shards[1].damage}"


STATED = {
    "_info.json": {"splits": {"train": {"filenames": ["1.tar"], "shard_lengths": [7]}}},
    "info.json": {"filenames": ["1.tar", "x.tar"], "shard_lengths": [7, 4]},
    "sizes.json": {"1.tar": 7, "x.tar": 4},
}


@pytest.mark.parametrize("said", [3, 7])
@pytest.mark.parametrize("name", [*STATED, "1.tar.idx"])
def test_counts_beside_the_shards_are_compared(root: Path, name: str, said: int) -> None:
    manifest = made(root)
    path = root / "d1" / name
    if name == "1.tar.idx":
        path.write_bytes(struct.pack(f"{said + 1}Q", *range(said + 1)))
    else:
        path.write_text(json.dumps(STATED[name]).replace("7", str(said)))
    for quick in (True, False):
        assert check(root, manifest, quick=quick) == [f"{root}/d1/1.tar: 4 samples; {name} says {said}"]
    if name == "1.tar.idx":
        index = ShardIndex.load(IndexDirectory(root).shard("d1/1.tar"))
        assert index is not None
        write_energon(index, path)
    else:
        path.write_text(path.read_text().replace(str(said), "4"))
    assert check(root, manifest) == []
    # Beside another shard it says nothing of this one.
    path.rename(root / "d2" / name)
    assert check(root, manifest) == []


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "3", "null", "{", '{"splits": 3}', '{"splits": null}', '{"splits": ["a"]}', '{"splits": {"a": 1}}',
        '{"filenames": null}', '{"filenames": 3, "shard_lengths": [1]}', '{"filenames": [1], "shard_lengths": [1]}',
        '{"filenames": ["1.tar"], "shard_lengths": [null]}', '{"filenames": ["1.tar"], "shard_lengths": []}',
        '{"1.tar": null}', '{"1.tar": "\\u00b2"}', '{"1.tar": -1}',
    ],
)  # fmt: skip
def test_a_strangers_json_does_no_harm(root: Path, content: str) -> None:
    manifest = made(root)
    for name in ("info.json", "_info.json", "sizes.json"):
        (root / "d1" / name).write_text(content)
    assert check(root, manifest, quick=True) == []


def test_an_index_of_other_shards_or_settings_is_told(root: Path) -> None:
    manifest = made(root)
    chosen = config(shards=["d0/*.tar", "d{1..2}/*.tar"])
    assert check_configuration(chosen, manifest, str(root)) == []
    write_shard(root / "d2" / "new.tar", [pair("n")])
    assert check_configuration(chosen, manifest, str(root)) == ["s: 1 shards are not in the index, such as d2/new.tar"]
    fewer = config(shards=["d0/*.tar"], kind="image")
    assert check_configuration(fewer, manifest, str(root)) == [
        "s: 2 shards of the index are no longer named, such as d1/1.tar",
        "s: the index was made under other fields or filters",
    ]
    (problem,) = check_configuration(config(shards="none-*.tar"), manifest, str(root))
    assert "there is no file" in problem

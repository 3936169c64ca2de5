"""Other libraries' indexes, byte by byte against Python's tarfile."""

import io
import struct
import tarfile
from pathlib import Path

import pytest
from shards import fake_image, write_tar

from m3i_large.data.index import ShardIndex, index_shard
from m3i_large.data.interchange import expected_counts, export_index, write_dali, write_energon
from m3i_large.data.storage import Storage
from m3i_large.errors import UserError

MEMBERS = [
    ("d.1/a.jpg", fake_image(bytes(700))), ("d.1/a.TXT", b"one"), ("d.1/a.seg.png", b""),
    ("b.txt", bytes(512)), ("b.jpg", fake_image()),
    ("l" * 180 + ".jpg", fake_image(bytes(1500))), ("l" * 180 + ".txt", b"long"),
    ("ключ.jpg", fake_image()), ("ключ.json", b"{}"),
    ("z.cls", b"1"),
]  # fmt: skip


def shard(tmp_path: Path, members: list[tuple[str, bytes]] = MEMBERS, **options: int) -> tuple[Path, ShardIndex]:
    path = write_tar(tmp_path / "a.b.tar", members, **options)
    return path, index_shard(path.name, Storage(tmp_path))


def grouped(members: list[tuple[str, bytes]]) -> list[list[tuple[str, bytes]]]:
    """Members by sample, told apart by what stands before the first dot of the last component."""
    groups: dict[str, list[tuple[str, bytes]]] = {}
    for name, data in members:
        folder, _, base = name.rpartition("/")
        groups.setdefault(f"{folder}/{base.partition('.')[0]}", []).append((name, data))
    return list(groups.values())


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_energon_ranges_hold_a_sample_each(tmp_path: Path, tar_format: int) -> None:
    path, index = shard(tmp_path, tar_format=tar_format)
    written = export_index("energon", index, path.name, tmp_path)
    assert written == tmp_path / "a.b.tar.idx" and [p.name for p in tmp_path.iterdir() if "tmp" in p.name] == []
    content = written.read_bytes()
    assert len(index) == 5 and len(content) == 8 * (5 + 1)
    offsets = struct.unpack("=6Q", content)
    data = path.read_bytes()
    assert offsets[0] == 0
    for begin, end, want in zip(offsets, offsets[1:], grouped(MEMBERS), strict=False):
        with tarfile.open(fileobj=io.BytesIO(data[begin:end])) as tar:
            assert [(m.name, tar.extractfile(m).read()) for m in tar] == want  # type: ignore[union-attr]
    assert data[offsets[-1] :].strip(b"\0") == b"" and expected_counts(tmp_path) == {path.name: (5, written.name)}


def test_energon_of_a_shard_with_other_members_and_of_an_empty_one(tmp_path: Path) -> None:
    path, index = shard(tmp_path, [("__meta__", b"x"), ("a.jpg", b"1"), ("no_extension", b"x"), ("b.jpg", b"2")])
    before = index.columns["sample_offset"].copy()
    write_energon(index, tmp_path / "o.idx")
    offsets = struct.unpack("=3Q", (tmp_path / "o.idx").read_bytes())
    assert offsets == (0, 4 * 512 + 1024, 4 * 512 + 2 * 1024) and before[0] == 1024
    assert (index.columns["sample_offset"] == before).all(), "the index itself keeps where the first sample is"
    data = path.read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data[offsets[1] : offsets[2]])) as tar:
        assert tar.getnames() == ["b.jpg"]
    _, empty = shard(tmp_path, [])
    write_energon(empty, tmp_path / "e.idx")
    assert (tmp_path / "e.idx").read_bytes() == bytes(8)


def test_dali_lines_lead_to_the_bytes(tmp_path: Path) -> None:
    path, index = shard(tmp_path)
    written = export_index("dali", index, path.name, tmp_path / "sub")
    assert written == tmp_path / "sub" / "a.b.idx"
    lines = written.read_text(encoding="utf-8").split("\n")
    assert lines[0] == "v1.2 5" and lines[-1] == "" and len(lines) == 7
    data = path.read_bytes()
    for line, want in zip(lines[1:-1], grouped(MEMBERS), strict=True):
        words = line.split(" ")
        assert len(words) == 4 * len(want)
        parts = [words[at : at + 4] for at in range(0, len(words), 4)]
        for (extension, offset, size, name), (member, content) in zip(parts, want, strict=True):
            assert data[int(offset) : int(offset) + int(size)] == content and int(size) == len(content)
            assert name == member.replace(".TXT", ".txt") and name.endswith(f".{extension}")
            assert int(offset) % 512 == 0 and "." not in name.removesuffix(f".{extension}").rpartition("/")[2]


@pytest.mark.parametrize("name", ["a b.jpg", "a.my ext", "a\nb.jpg", "dir x/a.jpg"])
def test_dali_refuses_white_space(tmp_path: Path, name: str) -> None:
    _, index = shard(tmp_path, [("ok.jpg", b"1"), (name, b"2")])
    with pytest.raises(UserError, match=r"o\.idx: '.*' has white space in its name, which DALI's index cannot hold"):
        write_dali(index, tmp_path / "o.idx")
    assert not (tmp_path / "o.idx").exists()
    write_energon(index, tmp_path / "o.idx")


@pytest.mark.parametrize("name", ["d/a.tar", "../up/a.tar", "/abs/a.tar", "s3://bucket/d/a.tar"])
def test_exports_stay_in_their_directory(tmp_path: Path, name: str) -> None:
    _, index = shard(tmp_path)
    for kind, suffix in (("energon", "a.tar.idx"), ("dali", "a.idx")):
        path = export_index(kind, index, name, tmp_path / "out").resolve()
        assert path.is_relative_to((tmp_path / "out").resolve()) and path.name == suffix and path.is_file()


def test_counts_of_other_libraries_are_read(tmp_path: Path) -> None:
    (tmp_path / "sizes.json").write_text('{"a.tar": 5, "b.tar": "6", "x/c.tar": 7}')
    assert expected_counts(tmp_path) == {f"{n}.tar": (5 + i, "sizes.json") for i, n in enumerate("abc")}
    for splits in ('{"t": %s, "v": %s}', "[%s, %s]"):
        first, second = (
            '{"filenames": ["a.tar"], "shard_lengths": [1]}',
            '{"filenames": ["d.tar"], "shard_lengths": [2]}',
        )
        (tmp_path / "_info.json").write_text('{"splits": ' + splits % (first, second) + "}")
        found = expected_counts(tmp_path)
        assert found["a.tar"] == (1, "_info.json") and found["d.tar"] == (2, "_info.json")
        assert found["b.tar"] == (6, "sizes.json")

"""The shard index against webdataset, and against damaged files."""

import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_iterator

from m3i_large.data.index import index_shard, read_part

NAMES = st.sampled_from(
    [
        "a.jpg", "a.txt", "a.JSON", "b.seg.png", "dir/a.jpg", "dir.v1/a.jpg", "dir.v1/sub/c.TXT", "no_extension",
        ".hidden", "dir/.hidden.txt", "__meta__", "__meta__/a.jpg", "__key__.txt", "ключ.jpg", "ab c.cls",
        "x" * 120 + ".txt", "folder/" * 30 + "y.jpg", "z" * 300 + ".webp", "trailing.", "d/__e__.txt",
    ]
)  # fmt: skip


def write_tar(path: Path, members: list[tuple[str, bytes]], *, tar_format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read_all(path: Path) -> list[dict[str, object]]:
    file = os.open(path, os.O_RDONLY)
    try:
        return [
            {"__key__": s.key} | {extension: read_part(file, *part) for extension, part in s.parts.items()}
            for s in index_shard(path).samples
        ]
    finally:
        os.close(file)


def read_by_webdataset(path: Path) -> list[dict[str, object]]:
    with path.open("rb") as file:
        members = [member | {"__url__": ""} for member in tar_file_iterator(file)]
    return [{k: v for k, v in sample.items() if k != "__url__"} for sample in group_by_keys(iter(members))]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    members=st.lists(st.tuples(NAMES, st.binary(max_size=1200)), max_size=12),
    tar_format=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_same_keys_and_bytes_as_webdataset(tmp_path: Path, members: list[tuple[str, bytes]], tar_format: int) -> None:
    # webdataset refuses an extension that repeats within a key; that case is below.
    unique = list({name.lower(): (name, data) for name, data in members}.values())
    path = write_tar(tmp_path / "a.tar", unique, tar_format=tar_format)
    assert read_all(path) == read_by_webdataset(path)


def test_every_kind_of_name_is_in_the_oracle_comparison(tmp_path: Path) -> None:
    members = [
        ("a.jpg", b"1"),
        ("a.TXT", b"22"),
        (".h.txt", b"3"),
        ("__m__", b"4"),
        ("d.1/b.seg.png", b""),
        ("x" * 200 + ".cls", b"5"),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    want = [
        {"__key__": "a", "jpg": b"1", "txt": b"22"},
        {"__key__": "d.1/b", "seg.png": b""},
        {"__key__": "x" * 200, "cls": b"5"},
    ]
    assert read_all(path) == want == read_by_webdataset(path)


def test_a_repeated_extension_starts_a_sample(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar", [("k.jpg", b"1"), ("k.txt", b"2"), ("k.JPG", b"3"), ("l.jpg", b"4"), ("k.txt", b"5")]
    )
    assert read_all(path) == [
        {"__key__": "k", "jpg": b"1", "txt": b"2"},
        {"__key__": "k", "jpg": b"3"},
        {"__key__": "l", "jpg": b"4"},
        {"__key__": "k", "txt": b"5"},
    ]


def test_directories_and_links_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        folder, link, hard = tarfile.TarInfo("d.x"), tarfile.TarInfo("l.jpg"), tarfile.TarInfo("h.jpg")
        folder.type, link.type, hard.type = tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE
        link.linkname = hard.linkname = "a.jpg"
        for info in (folder, link, hard):
            tar.addfile(info)
        real = tarfile.TarInfo("a.jpg")
        real.size = 3
        tar.addfile(real, io.BytesIO(b"abc"))
    assert read_all(path) == [{"__key__": "a", "jpg": b"abc"}]


def test_a_cut_shard_is_refused_wherever_it_was_cut(tmp_path: Path) -> None:
    whole = write_tar(
        tmp_path / "whole.tar", [("a.jpg", b"x" * 700), ("a.txt", b"y"), ("b.jpg", b"z" * 512)]
    ).read_bytes()
    needed = 512 + 1024 + 512 + 512 + 512 + 512 + 1024  # headers, padded payloads, end blocks; the rest is filling
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole[:needed])
    assert len(index_shard(cut).samples) == 2
    for size in sorted({0, 1, 511, 512, *range(0, needed, 100), needed - 1}):
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"shard {cut}: .* at byte \d+; needed"):
            index_shard(cut)


def test_a_damaged_header_is_no_silent_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"x"), ("b.jpg", b"y")])
    data = bytearray(path.read_bytes())
    data[1024 + 5] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ValueError, match="a damaged header at byte 1024"):
        index_shard(path)


def test_a_compressed_shard_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(ValueError, match="uncompressed tar"):
        index_shard(path)


def test_reading_past_the_end_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"0123456789")
    file = os.open(path, os.O_RDONLY)
    assert read_part(file, 2, 3) == b"234" and read_part(file, 0, 0) == b""
    with pytest.raises(ValueError, match="the file ends: got 2 bytes at byte 8; needed: 5"):
        read_part(file, 8, 5)
    os.close(file)


def test_the_digest_sees_order_names_and_places(tmp_path: Path) -> None:
    variants = [
        [("a.jpg", b"1"), ("b.jpg", b"2")],
        [("b.jpg", b"1"), ("a.jpg", b"2")],
        [("a.jpg", b"1"), ("b.png", b"2")],
        [("a.jpg", b"1"), ("b.jpg", b"22")],
        [("a.jpg", b"1")],
    ]
    digests = [index_shard(write_tar(tmp_path / f"{i}.tar", members)).digest() for i, members in enumerate(variants)]
    assert len(set(digests)) == len(variants)
    again = index_shard(write_tar(tmp_path / "again.tar", variants[0]))
    assert again.digest() == digests[0] and again.num_bytes == again.path.stat().st_size

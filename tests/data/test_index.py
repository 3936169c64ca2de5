"""The shard index against webdataset, and against damaged files."""

import gzip
import io
import json
import re
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shards import fake_image, write_tar
from webdataset.tariterators import group_by_keys, tar_file_iterator

from m3i_large.data.index import Flag, ShardIndex, index_shard
from m3i_large.data.storage import Storage
from m3i_large.data.tar import Window, members
from m3i_large.errors import UserError

NAMES = st.sampled_from(
    [
        "a.jpg", "a.txt", "a.JSON", "b.seg.png", "dir/a.jpg", "dir.v1/a.jpg", "dir.v1/sub/c.TXT", "no_extension",
        ".hidden", "dir/.hidden.txt", "__meta__", "__meta__/a.jpg", "__key__.txt", "ключ.jpg", "ab c.cls",
        "x" * 120 + ".txt", "folder/" * 30 + "y.jpg", "z" * 300 + ".webp", "trailing.", "d/__e__.txt",
    ]
)  # fmt: skip


def index(path: Path) -> ShardIndex:
    return index_shard(path.name, Storage(path.parent))


def read_all(path: Path) -> list[dict[str, object]]:
    found, data = index(path), path.read_bytes()
    assert not found.damage
    return [
        {"__key__": found.key(row)}
        | {e: data[p[0] : p[0] + p[1]] for e in found.extensions if (p := found.part(row, e)) is not None}
        for row in range(len(found))
    ]


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


def test_a_cut_shard_is_told_wherever_it_was_cut_and_keeps_what_is_whole(tmp_path: Path) -> None:
    members = [("a.jpg", b"x" * 700), ("a.txt", b"y"), ("b.jpg", b"z" * 512), ("b.txt", b"w"), ("c.jpg", b"v")]
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    ends = {key: index(tmp_path / "whole.tar").columns["sample_offset"][i + 1] for i, key in enumerate("abc")}
    needed = int(ends["c"]) + 1024  # end blocks; the rest is filling
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole[:needed])
    assert not index(cut).damage and len(index(cut)) == 3
    for size in sorted({1536, *range(1600, needed, 100), needed - 512, needed - 1}):
        cut.write_bytes(whole[:size])
        found = index(cut)
        assert re.search(r" at byte \d+$", found.damage), size
        keys = [found.key(row) for row in range(len(found))]
        # A sample is whole if it has as many parts as the one before it; c, with fewer, cannot be told from a cut one.
        assert keys == (["a", "b"] if size >= ends["b"] else ["a"] if size >= ends["a"] + 1024 else []), size
    for size in (0, 1, 511, 512, 1023, 1535):
        cut.write_bytes(whole[:size])
        found = index(cut)
        assert len(found) == 0 and re.match(r"no uncompressed tar file: the file ends .* at byte 0$", found.damage)


def test_bytes_after_the_end_are_told(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"x"), ("b.jpg", b"y")])
    path.write_bytes(path.read_bytes() + b"?")
    assert "no multiple of 512" in index(path).damage


@pytest.mark.parametrize("place", [5, 130, 150, 300])
def test_a_damaged_header_is_no_silent_end(tmp_path: Path, place: int) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{i}.jpg", b"x") for i in range(6)])
    data = bytearray(path.read_bytes())
    data[3 * 1024 + place] ^= 0x11
    path.write_bytes(data)
    found = index(path)
    assert found.damage == "a damaged header at byte 3072"
    assert [found.key(row) for row in range(len(found))] == ["0", "1", "2"]


def test_no_tar_at_all_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    assert index(path).damage.startswith("no uncompressed tar file: ") and len(index(path)) == 0
    with pytest.raises(UserError, match=r"absent\.tar: No such file or directory; needed: a tar file"):
        index(tmp_path / "absent.tar")
    with pytest.raises(UserError, match=r"d: not a file; needed"):
        (tmp_path / "d").mkdir()
        index(tmp_path / "d")


def test_sizes_classes_and_columns_are_read_on_the_way(tmp_path: Path) -> None:
    jpeg = cv2.imencode(".jpg", np.zeros((50, 70, 3), np.uint8))[1].tobytes()
    exif = jpeg[:2] + b"\xff\xe1\xff\xff" + bytes(65533) + jpeg[2:]  # the size comes after 64 KB
    meta = {"original_width": 640, "original_height": 480, "NSFW": "UNLIKELY", "similarity": 0.31}
    members = [
        ("a.jpg", jpeg), ("a.cls", b" 7\n"), ("a.json", json.dumps(meta).encode()),
        ("b.jpg", exif), ("b.cls", b"cat"), ("b.json", b"[1]"),
        ("c.png", gzip.compress(cv2.imencode(".png", np.zeros((5, 6, 3), np.uint8))[1].tobytes())), ("c.json", b"{}"),
        ("d.webp", b"what is this"), ("d.cls", b""),
        ("e.txt", b"no picture"),
        ("a.jpg", fake_image(width=3, height=4)), ("a.json", b'{"NSFW": "NSFW", "similarity": "high"}'),
    ]  # fmt: skip
    found = index(write_tar(tmp_path / "a.tar", members))
    c = found.columns
    assert list(zip(c["width"].tolist(), c["height"].tolist(), strict=True)) == [
        (70, 50), (70, 50), (6, 5), (0, 0), (0, 0), (3, 4),
    ]  # fmt: skip
    assert c["category"].tolist() == [7, -1, -1, -1, -1, -1]
    assert c["original_width"].tolist() == [640, 0, 0, 0, 0, 0] and c["original_height"][0] == 480
    assert np.allclose(c["similarity"], [0.31, *[np.nan] * 5], equal_nan=True)
    assert [(None, *found.nsfw_values)[code] for code in c["nsfw"]] == ["UNLIKELY", None, None, None, None, "NSFW"]
    assert [Flag(f) for f in c["flags"].tolist()] == [
        Flag(0),
        Flag.BAD_JSON,
        Flag.GZIPPED,
        Flag.NO_HEADER | Flag.EMPTY_PART,
        Flag.NO_IMAGE,
        Flag.DUPLICATE_KEY,
    ]


def test_odd_names_are_flagged(tmp_path: Path) -> None:
    names = ["ok.jpg", "../up.jpg", "/root.jpg", "a\\b.jpg", "a..b.jpg", "caf\udce9.jpg", "café.jpg", "x/../y.jpg"]
    found = index(write_tar(tmp_path / "a.tar", [(name, fake_image()) for name in names]))
    bad_path = {"../up", "/root", "a\\b", "x/../y"}
    flags = {found.key(row): Flag(int(found.columns["flags"][row])) for row in range(len(found))}
    # ".." before the first letter: webdataset takes what comes before the first dot of the last part as the key
    assert {key for key, flag in flags.items() if Flag.PATH_LIKE in flag} == bad_path
    assert {key for key, flag in flags.items() if Flag.NOT_UTF8 in flag} == {"caf\\xe9"}


def test_an_index_survives_its_file_and_a_broken_file_is_none(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.jpg", fake_image()), ("a.txt", b"t"), ("b.jpg", fake_image())])
    first, file = index(path), tmp_path / "sub" / "a.index"
    first.save(file)
    again = ShardIndex.load(file)
    assert again is not None and again.columns.keys() == first.columns.keys()
    assert all((again.columns[name] == column).all() or name == "similarity" for name, column in first.columns.items())
    same = ("stat", "checksum", "extensions", "damage", "nsfw_values")
    assert [getattr(again, name) for name in same] == [getattr(first, name) for name in same]
    assert [p.name for p in file.parent.iterdir()] == ["a.index"]
    file.write_bytes(file.read_bytes()[:-3])
    assert ShardIndex.load(file) is None and ShardIndex.load(tmp_path / "none") is None


def test_the_checksum_sees_every_byte(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.jpg", fake_image(bytes(3000))), ("b.jpg", fake_image(b"2"))])
    first = index(path)
    assert first.checksum == xxhash.xxh3_128_hexdigest(path.read_bytes()) == index(path).checksum
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.write_bytes(data)
    assert index(path).checksum != first.checksum


@pytest.mark.parametrize("chunk", [512, 700, 5000])
def test_small_pieces_give_the_same_members(tmp_path: Path, chunk: int) -> None:
    names = [("a.jpg", bytes(900)), ("n" * 200 + ".txt", b"1"), ("b.jpg", bytes(1))]
    data = write_tar(tmp_path / "a.tar", names).read_bytes()
    seen: list[bytes] = []
    window = Window(lambda o, s: data[o : o + s], len(data), seen=seen.append, chunk=chunk)
    found = [(m.name.decode(), m.offset, m.size) for m in members(window)]
    window.drain()
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert found == [(m.name, m.offset_data, m.size) for m in tar] and b"".join(seen) == data


def with_size_field(path: Path, number: int, field: bytes) -> Path:
    """Puts a size field into a member's header, with the checksum that belongs to it."""
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        at = tar.getmembers()[number].offset_data - 512
    data[at + 124 : at + 136] = field
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "field", [b"-0000200000\0", b"-0000000001\0", b"00000000009\0", b"x0000000000\0", b"\xff" * 12]
)
def test_a_size_that_is_none_is_damage(tmp_path: Path, field: bytes) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{i}.jpg", bytes(600)) for i in range(4)])
    found = index(with_size_field(path, 2, field))
    assert re.search(r" at byte 3072$", found.damage) and len(found) == 2, found.damage


@pytest.mark.parametrize(
    "field", [b"000000001130", b"1130 \0      ", b"       1130\0", b"\x80" + bytes(9) + b"\x02\x58", b"00000001130\0"]
)
def test_sizes_are_understood_as_tarfile_understands_them(tmp_path: Path, field: bytes) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{i}.jpg", bytes(600)) for i in range(3)])
    found = index(with_size_field(path, 1, field))
    with tarfile.open(path) as tar:
        assert [m.size for m in tar] == found.columns["part_size"][:, 0].tolist() == [600] * 3


@pytest.mark.parametrize(
    ("size", "good"), [("600", True), ("-600", False), ("abc", False), ("", False), ("9" * 30, False), ("1_0", False)]
)
def test_sizes_of_extended_headers(tmp_path: Path, size: str, good: bool) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name in "abcd":
            info = tarfile.TarInfo(f"{name}.jpg")
            info.size = 600 if name == "c" else 900
            info.pax_headers = {"size": size, "path": f"{name * 150}.jpg"} if name == "c" else {}
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    if good:  # the field of eleven digits does not count then
        with_size_field(path, 2, b"00000000000\0")
    found = index(path)
    if good:
        assert [found.key(row) for row in range(4)] == ["a", "b", "c" * 150, "d"] and not found.damage
        assert found.columns["part_size"].tolist() == [[900], [900], [600], [900]]
    else:
        assert found.damage == "a damaged header at byte 3072" and len(found) == 2


def test_links_have_no_payload_whatever_their_size_says(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("a.jpg", tarfile.REGTYPE), ("b.jpg", tarfile.LNKTYPE), ("c.jpg", tarfile.REGTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg" if kind == tarfile.LNKTYPE else ""
            info.size = 600 if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(bytes(600)))
    found = index(with_size_field(path, 1, b"00000001130\0"))
    assert not found.damage and [found.key(row) for row in range(len(found))] == ["a", "c"]
    assert found.columns["sample_offset"].tolist() == [0, 2048, 3584]


def test_checksums_of_signed_bytes_are_accepted(tmp_path: Path) -> None:
    """Some old writers added the bytes up as signed numbers."""
    path = write_tar(tmp_path / "a.tar", [("é.jpg", b"1"), ("b.jpg", b"2")], tar_format=tarfile.GNU_FORMAT)
    data = bytearray(path.read_bytes())
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(b - 256 * (b > 127) for b in data[:512])
    path.write_bytes(data)
    assert [index(path).key(row) for row in range(2)] == ["é", "b"]


def test_classes_that_are_none(tmp_path: Path) -> None:
    texts = [b"0", b"2147483647", b"2147483648", b"-1", b"1.0", b"9" * 100, b" 5 \n", b""]
    members = [(f"{i}.cls", text) for i, text in enumerate(texts)]
    found = index(write_tar(tmp_path / "a.tar", members))
    assert found.columns["category"].tolist() == [0, 2147483647, -1, -1, -1, -1, 5, -1]


def test_damage_that_leads_astray_is_told_where_it_is(tmp_path: Path) -> None:
    """A wrong size makes a payload be read as a header: the header with the size is to blame, not what follows."""
    path = write_tar(tmp_path / "a.tar", [(f"{i}.jpg", bytes([i]) * 2048) for i in range(5)])
    data = bytearray(path.read_bytes())
    at = 2 * 2560
    data[at + 124 : at + 136] = b"00000002000\0"  # 1024 bytes: two blocks fewer
    path.write_bytes(data)
    found = index(path)
    assert found.damage == f"a damaged header at byte {at}" and len(found) == 2


def test_of_several_pictures_the_one_that_is_read_is_described(tmp_path: Path) -> None:
    small, large, bad = fake_image(width=3, height=4), fake_image(width=30, height=40), b"bad"
    members = [
        ("a.png", small), ("a.jpg", large), ("b.jpg", large), ("b.png", small), ("c.jpg", large), ("c.png", bad),
        ("d.png", bad), ("d.jpg", large), ("e.png", large), ("e.jpg", bad), ("f.webp", large), ("f.png", small),
        ("g.png", gzip.compress(small)), ("g.webp", large), ("h.seg.png", small), ("h.jpeg", large),
    ]  # fmt: skip
    found = index(write_tar(tmp_path / "a.tar", members))
    sizes = [30, 30, 30, 30, 0, 30, 30, 30]
    assert found.columns["width"].tolist() == sizes
    assert [bool(flag & Flag.NO_HEADER) for flag in found.columns["flags"]] == [size == 0 for size in sizes]
    assert not (found.columns["flags"] & (Flag.GZIPPED | Flag.NO_IMAGE)).any()


@pytest.mark.parametrize(
    ("meta", "flag", "similarity"),
    [
        (b"[" * 200_000, Flag.BAD_JSON, None),
        (b'{"similarity": 1' + b"0" * 400 + b"}", Flag(0), None),
        (b'{"similarity": 1e300}', Flag(0), None),
        (b'{"similarity": Infinity}', Flag(0), None),
        (b'{"similarity": "0.5"}', Flag(0), 0.5),
        (b'{"similarity": [1]}', Flag(0), None),
        (b'{"original_width": 5000000000, "original_height": -1}', Flag(0), None),
        (b"\xff", Flag.BAD_JSON, None),
        (b"", Flag.BAD_JSON | Flag.EMPTY_PART, None),
    ],
)
def test_odd_metadata_does_no_harm(tmp_path: Path, meta: bytes, flag: Flag, similarity: float | None) -> None:
    members = [("a.jpg", fake_image()), ("a.json", meta), ("b.jpg", fake_image()), ("b.json", b'{"NSFW": 1}')]
    found = index(write_tar(tmp_path / "a.tar", members))
    assert [Flag(int(f)) for f in found.columns["flags"]] == [flag, Flag(0)] and found.nsfw_values == ("1",)
    assert (
        np.isnan(found.columns["similarity"][0]) if similarity is None else found.columns["similarity"][0] == similarity
    )
    assert found.columns["original_width"].tolist() == found.columns["original_height"].tolist() == [0, 0]


def test_more_kinds_of_parts_or_larger_ones_than_fit_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"a.x{i}", b"") for i in range(64)])
    assert len(index(path).extensions) == 64
    path = write_tar(tmp_path / "a.tar", [(f"a.x{i}", b"") for i in range(65)])
    with pytest.raises(UserError, match=r"a\.tar: got extension 65, 0 bytes; needed: at most 64 and 4 GiB"):
        index(path)


def test_an_index_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    found = index(write_tar(tmp_path / "a.tar", [("a.jpg", fake_image())]))
    (tmp_path / "sub" / "a.index").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):  # an OSError, as a full disk is, and not safetensors' own
        found.save(tmp_path / "sub" / "a.index")
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["a.index"]


def test_nsfw_values_beyond_the_codes_are_joined(tmp_path: Path) -> None:
    numbers = [*range(300), 0, 5]  # values met before keep their codes
    members = [(f"{i}.json", json.dumps({"nsfw": n}).encode()) for i, n in enumerate(numbers)]
    found = index(write_tar(tmp_path / "a.tar", members))
    assert found.nsfw_values == (*map(str, range(254)), "(others)")
    codes = found.columns["nsfw"].tolist()
    assert codes == [*range(1, 255), *[255] * 46, 1, 6]


def test_the_checksum_and_the_progress_reach_the_end_of_the_file(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.jpg", fake_image())])
    path.write_bytes(path.read_bytes() + bytes(9 << 20))  # more filling than is read at once
    seen: list[int] = []
    found = index_shard(path.name, Storage(tmp_path), progress=seen.append)
    assert found.checksum == xxhash.xxh3_128_hexdigest(path.read_bytes()) and sum(seen) == path.stat().st_size

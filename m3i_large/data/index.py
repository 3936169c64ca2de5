"""The index of one shard: where every part of every sample lies, and what can be told without decoding.

One pass over the tar, written as a safetensors file beside the data: a dictionary of columns, one row per sample.

Samples are named as webdataset names them: the key is the path up to the first dot of its last component, the extension
is the rest in lower case. Members that share a key and follow each other make one sample.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntFlag
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from m3i_large.data.header import GZIP, read_header, unzipped
from m3i_large.data.storage import ShardStat, Storage, is_url, written_whole
from m3i_large.data.tar import BLOCK, CHUNK, DamagedTar, Member, Window, members
from m3i_large.errors import UserError

FORMAT = "1"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "webp", "png")
# A JPEG's size comes after its EXIF and colour profile, which may fill several segments of 64 KB.
HEADER_BYTES, MORE_HEADER_BYTES = 2048, 1 << 20
REMOTE_CHUNK = 8 << 20  # where every request waits for an answer
MOST_EXTENSIONS, LARGEST_PART = 64, (1 << 32) - 1
MOST_CATEGORIES = 1 << 31
LONGEST_VALUE = 64  # bytes of a .cls worth parsing
# Where NSFW is no class but a number, its later values are not told apart: that matters only to who filters by it.
MOST_NSFW, OTHER_NSFW = 254, "(others)"
_KEY_AND_EXTENSION = re.compile(rb"^((?:.*/|)[^.]+)[.]([^/]*)$")
_META = re.compile(rb"__[^/]*__($|/)")


class Flag(IntFlag):
    """What is unusual about a sample; counted by `m3i data index` and `check`."""

    NO_IMAGE = 1  # no part with an image's extension
    NO_HEADER = 2  # an image part that starts like no known image
    DUPLICATE_KEY = 4  # an earlier sample of the shard has the same key: never eligible
    NOT_UTF8 = 8  # the name is no UTF-8
    PATH_LIKE = 16  # the name is absolute, climbs up (..) or holds a backslash; harmless here, as nothing is unpacked
    GZIPPED = 32  # the image part is compressed once more
    EMPTY_PART = 64  # a part has no bytes
    BAD_JSON = 128  # the .json part is no JSON object


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """One shard's index.

    Attributes:
        stat: the tar's size and mark when it was indexed.
        checksum: xxh3 (128 bits) of the whole tar, in hexadecimal.
        extensions: the P kinds of parts that occur.
        damage: why the rest of the tar cannot be read, "" for a whole one.
        nsfw_values: what the codes of column `nsfw` mean; code 0 is none.
        columns: arrays of n rows: part_offset (n, P) uint64 and part_size (n, P) uint32 (offset 0: not there), width,
            height, original_width, original_height uint32 (0: not known), category int32 (-1: none), similarity float32
            (nan: none), nsfw uint8, flags uint16; sample_offset (n + 1) uint64, first header of each sample and end of
            the last; key_end (n) uint32 and key_bytes uint8, all keys after each other.
    """

    stat: ShardStat
    checksum: str
    extensions: tuple[str, ...]
    damage: str
    nsfw_values: tuple[str, ...]
    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.columns["flags"])

    def key(self, row: int) -> str:
        """The key of a sample; bytes that are no UTF-8 are shown as escapes."""
        end = self.columns["key_end"]
        begin = int(end[row - 1]) if row else 0
        return self.columns["key_bytes"][begin : int(end[row])].tobytes().decode("utf-8", "backslashreplace")

    def part(self, row: int, extension: str) -> tuple[int, int] | None:
        """(offset, size) of a part in bytes, None if the sample has none."""
        if extension not in self.extensions:
            return None
        column = self.extensions.index(extension)
        offset = int(self.columns["part_offset"][row, column])
        return (offset, int(self.columns["part_size"][row, column])) if offset else None

    def has(self, extension: str) -> np.ndarray:
        """Which samples have a part -> (n,) bool."""
        if extension not in self.extensions:
            return np.zeros(len(self), bool)
        return self.columns["part_offset"][:, self.extensions.index(extension)] > 0

    def save(self, path: Path) -> None:
        """Writes the index under a temporary name and renames it."""
        metadata = {
            "format": FORMAT,
            "num_bytes": str(self.stat.num_bytes),
            "mark": self.stat.mark,
            "checksum": self.checksum,
            "extensions": json.dumps(self.extensions),
            "damage": self.damage,
            "nsfw_values": json.dumps(self.nsfw_values),
        }
        columns = {name: np.ascontiguousarray(column) for name, column in self.columns.items()}
        # Not save_file: its faults, such as a full disk, are no OSErrors.
        data = save(columns, metadata | {"seal": _seal(metadata, columns)})
        with written_whole(path) as temporary:
            temporary.write_bytes(data)

    @classmethod
    def load(cls, path: Path) -> "ShardIndex | None":
        """Reads an index; None where there is none, or one of another format or damaged, which is to be made anew."""
        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    return None
                columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if metadata.pop("seal") != _seal(metadata, columns):
                return None
            return cls(
                stat=ShardStat(int(metadata["num_bytes"]), metadata["mark"]),
                checksum=metadata["checksum"],
                extensions=tuple(json.loads(metadata["extensions"])),
                damage=metadata["damage"],
                nsfw_values=tuple(json.loads(metadata["nsfw_values"])),
                columns=columns,
            )
        except (FileNotFoundError, NotADirectoryError, SafetensorError, KeyError, ValueError):
            return None


def index_shard(name: str, storage: Storage, *, progress: Callable[[int], object] | None = None) -> ShardIndex:
    """Indexes one shard, an uncompressed tar file, in one pass over its bytes.

    Skipped: directories, links, names without an extension, hidden names, `__name__` meta members and folders. A sample
    ends where the key changes or an extension comes a second time.

    A shard that is cut short or damaged is indexed up to there, the sample that the damage may have reached left out;
    `damage` says what it is.

    Args:
        progress: called with the bytes read since its last call.

    Raises:
        UserError: no such shard, more than 64 extensions, or a part of 4 GiB or more.
        OutageError: the storage failed.
    """
    stat = storage.stat(name)
    total = xxhash.xxh3_128()

    def seen(piece: bytes) -> None:
        total.update(piece)
        if progress:
            progress(len(piece))

    chunk = REMOTE_CHUNK if is_url(storage.location(name)) else CHUNK
    window = Window(
        lambda offset, size: storage.read(name, offset, size, mark=stat.mark), stat.num_bytes, seen=seen, chunk=chunk
    )
    table, damage = _Table(window), ""
    try:
        for member in members(window):
            table.add(member)
    except DamagedTar as error:
        table.cut(error.offset)
        damage = str(error) if error.offset else f"no uncompressed tar file: {error}"
    except ValueError as error:
        raise UserError(f"shard {storage.location(name)}: {error}") from None
    window.drain()
    return ShardIndex(
        stat=stat,
        checksum=total.hexdigest(),
        extensions=tuple(table.extensions),
        damage=damage,
        nsfw_values=tuple(table.nsfw_values),
        columns=table.columns(),
    )


def _seal(metadata: dict[str, str], columns: dict[str, np.ndarray]) -> str:
    """A checksum of an index itself: a damaged one would give wrong bytes to training without a word."""
    total = xxhash.xxh3_64(json.dumps(sorted(metadata.items())).encode())
    for name in sorted(columns):
        column = columns[name]
        total.update(f"{name} {column.dtype} {column.shape}".encode())
        total.update(column.tobytes())
    return total.hexdigest()


def split_name(name: bytes) -> tuple[bytes, str] | None:
    """Key and extension of a member's name; None for what is no part of a sample."""
    match = _KEY_AND_EXTENSION.match(name)
    if match is None or _META.match(name):
        return None
    return match[1], match[2].decode("utf-8", "backslashreplace").lower()


@dataclass
class _Table:
    """Collects rows while the tar goes by."""

    window: Window
    extensions: dict[str, int] = field(default_factory=dict)
    nsfw_values: dict[str, int] = field(default_factory=dict)
    starts: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    parts: list[dict[int, tuple[int, int]]] = field(default_factory=list)
    rows: list[list[Any]] = field(default_factory=list)
    end: int = 0

    def add(self, member: Member) -> None:
        """Takes the next member; its payload may be looked at now and not later."""
        named = split_name(member.name)
        if named is None:
            return
        key, extension = named
        column = self.extensions.setdefault(extension, len(self.extensions))
        if column >= MOST_EXTENSIONS or member.size > LARGEST_PART:
            raise ValueError(f"got extension {len(self.extensions)}, {member.size} bytes; needed: at most 64 and 4 GiB")
        if not self.keys or self.keys[-1] != key or column in self.parts[-1]:
            self.starts.append(member.header)
            self.keys.append(key)
            self.parts.append({})
            self.rows.append([0, 0, 0, 0, -1, np.nan, 0, Flag.NO_IMAGE.value])
        self.parts[-1][column] = (member.offset, member.size)
        self.end = member.offset + -(-member.size // BLOCK) * BLOCK
        row = self.rows[-1]
        if not member.size:
            row[7] |= Flag.EMPTY_PART.value
        if extension in IMAGE_EXTENSIONS:
            if self._is_the_image(extension):
                row[0], row[1], found = _image(self.window, member)
                row[7] = row[7] & ~(Flag.NO_IMAGE | Flag.NO_HEADER | Flag.GZIPPED).value | found
        elif extension == "cls":
            row[4] = _category(self.window.peek(member.offset, min(member.size, LONGEST_VALUE)))
        elif extension == "json":
            self._read_meta(self.window.peek(member.offset, member.size), row)

    def _is_the_image(self, extension: str) -> bool:
        """Of a sample's several pictures the one that is read (sources.py) is described."""
        before = IMAGE_EXTENSIONS[: IMAGE_EXTENSIONS.index(extension)]
        return not any(self.extensions.get(other, -1) in self.parts[-1] for other in before)

    def _read_meta(self, data: bytes, row: list[Any]) -> None:
        try:
            meta = json.loads(data)
        except (ValueError, RecursionError):
            meta = None
        if not isinstance(meta, dict):
            row[7] |= Flag.BAD_JSON.value
            return
        row[2], row[3] = _size(meta, "original_width"), _size(meta, "original_height")
        row[5] = _float(meta.get("similarity"))
        if (value := meta.get("NSFW", meta.get("nsfw"))) is not None:
            known = str(value) in self.nsfw_values or len(self.nsfw_values) < MOST_NSFW
            row[6] = self.nsfw_values.setdefault(str(value) if known else OTHER_NSFW, len(self.nsfw_values) + 1)

    def cut(self, damaged_from: int) -> None:
        """Drops what the damage of a tar may have reached: samples behind it, and one that may lack parts."""
        while self.starts and max(offset + size for offset, size in self.parts[-1].values()) > damaged_from:
            self._pop()
        # The last sample is whole if it has every part that the one before it has.
        if self.starts and not (len(self.parts) > 1 and self.parts[-1].keys() >= self.parts[-2].keys()):
            self._pop()

    def _pop(self) -> None:
        self.end = self.starts[-1]
        for rows in (self.starts, self.keys, self.parts, self.rows):
            rows.pop()

    def columns(self) -> dict[str, np.ndarray]:
        """The arrays of a ShardIndex."""
        n, p = len(self.keys), len(self.extensions)
        offset, size = np.zeros((n, p), np.uint64), np.zeros((n, p), np.uint32)
        for row, parts in enumerate(self.parts):
            for column, place in parts.items():
                offset[row, column], size[row, column] = place
        names = ("width", "height", "original_width", "original_height", "category", "similarity", "nsfw", "flags")
        kinds = (np.uint32, np.uint32, np.uint32, np.uint32, np.int32, np.float32, np.uint8, np.uint16)
        values = zip(*self.rows, strict=True) if n else ((),) * len(names)
        columns = {name: np.array(v, kind) for name, kind, v in zip(names, kinds, values, strict=True)}
        columns["flags"] |= _name_flags(self.keys)
        return columns | {
            "sample_offset": np.array([*self.starts, self.end], np.uint64),
            "part_offset": offset,
            "part_size": size,
            "key_end": np.cumsum([len(key) for key in self.keys], dtype=np.uint32),
            "key_bytes": np.frombuffer(b"".join(self.keys), np.uint8),
        }


def _name_flags(keys: list[bytes]) -> np.ndarray:
    flags = np.zeros(len(keys), np.uint16)
    seen: set[bytes] = set()
    for row, key in enumerate(keys):
        if key in seen:
            flags[row] |= Flag.DUPLICATE_KEY
        seen.add(key)
        if not key.isascii():
            try:
                key.decode("utf-8")
            except UnicodeDecodeError:
                flags[row] |= Flag.NOT_UTF8
        if b"\\" in key or b".." in key or key.startswith(b"/"):
            path_like = key.startswith(b"/") or b"\\" in key or b".." in key.split(b"/")
            flags[row] |= Flag.PATH_LIKE if path_like else 0
    return flags


def _image(window: Window, member: Member) -> tuple[int, int, int]:
    """(width, height, flags) of an image part; looks further only where the first bytes do not tell."""
    found = 0
    for limit in (HEADER_BYTES, MORE_HEADER_BYTES):
        data = window.peek(member.offset, min(member.size, limit))
        if data[:2] == GZIP:
            found = Flag.GZIPPED.value
            try:
                data = unzipped(data, limit)
            except ValueError:
                break
        header = read_header(data)
        if header is not None:
            return header.width, header.height, found
        if member.size <= limit:
            break
    return 0, 0, found | Flag.NO_HEADER.value


def _category(data: bytes) -> int:
    try:
        value = int(data)
    except ValueError:
        return -1
    return value if 0 <= value < MOST_CATEGORIES else -1


def _size(meta: dict[str, Any], name: str) -> int:
    value = meta.get(name)
    return value if isinstance(value, int) and 0 < value < 1 << 32 else 0


def _float(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return np.nan
    return number if abs(number) < 1e38 else np.nan  # what float32 holds

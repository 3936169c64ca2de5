"""Where the parts of every sample lie in a shard: one pass over the tar headers, no payload read.

Samples are named as webdataset names them: the key is the path up to the first dot of its last component, the extension
is the rest in lower case. Members that share a key and follow each other make one sample.
"""

import hashlib
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

END_OF_ARCHIVE = bytes(2 * tarfile.BLOCKSIZE)
_KEY_AND_EXTENSION = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_META = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True)
class SampleIndex:
    """One sample: its key and, by extension, (payload offset, size) in bytes from the start of the shard."""

    key: str
    parts: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class ShardIndex:
    """One shard: path, size in bytes, samples in the order of the file."""

    path: Path
    num_bytes: int
    samples: list[SampleIndex]

    def digest(self) -> str:
        """sha256 of all keys, extensions, offsets and sizes, in hexadecimal."""
        total = hashlib.sha256()
        for sample in self.samples:
            total.update(repr((sample.key, sorted(sample.parts.items()))).encode())
        return total.hexdigest()


def index_shard(path: Path) -> ShardIndex:
    """Indexes one shard, an uncompressed tar file.

    Skipped: directories, links, names without an extension, hidden names, `__name__` meta members and folders. A sample
    ends where the key changes or an extension comes a second time.

    Raises:
        ValueError: the file is no uncompressed tar file, is damaged, or lacks the two zero blocks at its end (a copy
            that was cut short); the message names the shard and the byte offset.
    """
    samples: list[SampleIndex] = []
    for name, offset, size in _members(path):
        match = _KEY_AND_EXTENSION.match(name)
        if match is None or _META.match(name):
            continue
        key, extension = match[1], match[2].lower()
        if not samples or samples[-1].key != key or extension in samples[-1].parts:
            samples.append(SampleIndex(key, {}))
        samples[-1].parts[extension] = (offset, size)
    return ShardIndex(path=path, num_bytes=path.stat().st_size, samples=samples)


def read_part(file: int, offset: int, size: int) -> bytes:
    """Reads `size` bytes at `offset` of an open descriptor without moving its position, so from any thread.

    Raises:
        ValueError: the file ends before that.
    """
    data = os.pread(file, size, offset)
    while len(data) < size:  # a signal or a network file system may cut a read short
        more = os.pread(file, size - len(data), offset + len(data))
        if not more:
            raise ValueError(f"the file ends: got {len(data)} bytes at byte {offset}; needed: {size}")
        data += more
    return data


def _members(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yields (name, payload offset, size) of every regular member, and checks that the archive is whole."""
    tar = None
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isreg():
                    if member.issparse():
                        raise ValueError(
                            f"shard {path}: {member.name} at byte {member.offset} is sparse; needed: plain members"
                        )
                    yield member.name, member.offset_data, member.size
            # tarfile takes a damaged header for the end of the archive; only zero blocks are one.
            file.seek(tar.offset)
            end = file.read(len(END_OF_ARCHIVE))
            if end != END_OF_ARCHIVE:
                what = "the file ends" if len(end) < len(END_OF_ARCHIVE) and not any(end) else "a damaged header"
                raise ValueError(
                    f"shard {path}: {what} at byte {tar.offset}; needed: another member or two zero blocks"
                )
    except tarfile.TarError as error:
        offset = tar.offset if tar is not None else 0
        raise ValueError(f"shard {path}: {error} at byte {offset}; needed: an uncompressed tar file") from None

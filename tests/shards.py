"""Shards for tests: tar files of given members, and pictures that are told apart by their header alone."""

import io
import struct
import tarfile
from collections.abc import Iterable
from pathlib import Path

Samples = Iterable[dict[str, bytes | str]]


def fake_image(content: str | bytes = b"", *, width: int = 32, height: int = 24) -> bytes:
    """Bytes that start like a GIF file of that size: enough for an index, not for a decoder."""
    return b"GIF89a" + struct.pack("<HH", width, height) + (content.encode() if isinstance(content, str) else content)


def write_tar(path: Path, members: list[tuple[str, bytes]], *, tar_format: int = tarfile.PAX_FORMAT) -> Path:
    """A tar of members in order, names doubled or odd as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format, encoding="utf-8", errors="surrogateescape") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shard(path: Path, samples: Samples) -> Path:
    """A shard of samples {key, extension: content, ...}."""
    members = [
        (f"{sample['key']}.{extension}", value if isinstance(value, bytes) else value.encode())
        for sample in samples
        for extension, value in sample.items()
        if extension != "key"
    ]
    return write_tar(path, members)


def pair(key: str, **parts: str) -> dict[str, bytes | str]:
    """A sample with a picture and, unless other parts are given, a text."""
    return {"key": key, "jpg": fake_image(f"image of {key}")} | (parts or {"txt": f" text of {key}\n"})

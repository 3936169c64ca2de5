"""What an encoded picture says of itself before it is decoded: width, height, orientation.

Read from the first bytes: for the index, and to refuse a picture whose decoding would not fit before it is tried.
"""

import struct
import zlib
from typing import NamedTuple

GZIP = b"\x1f\x8b"
# JPEG markers that start a frame and so hold the size; the others in 0xC0..0xCF are tables.
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
ALONE = frozenset({0x01, *range(0xD0, 0xD8)})  # JPEG markers without a length


class ImageHeader(NamedTuple):
    """Size in pixels as stored, and EXIF orientation (1 to 8, 1 = upright) of JPEG files."""

    width: int
    height: int
    orientation: int = 1


def read_header(data: bytes) -> ImageHeader | None:
    """Reads the header of a JPEG, PNG, WebP, GIF or BMP file from its first bytes; None if they do not hold one."""
    header = _header(data)
    return header if header is not None and header.width > 0 and header.height > 0 else None


def _header(data: bytes) -> ImageHeader | None:
    try:
        if data[:2] == b"\xff\xd8":
            return _jpeg(data)
        if data[:8] == b"\x89PNG\r\n\x1a\n":
            return ImageHeader(*struct.unpack_from(">II", data, 16))
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp(data)
        if data[:3] == b"GIF":
            return ImageHeader(*struct.unpack_from("<HH", data, 6))
        if data[:2] == b"BM":
            width, height = struct.unpack_from("<ii", data, 18)
            return ImageHeader(width, abs(height))
    except struct.error:
        pass
    return None


def unzipped(data: bytes, limit: int) -> bytes:
    """The first `limit` bytes of gzipped data (or of what of it is there); ValueError where it is damaged."""
    try:
        return zlib.decompressobj(wbits=31).decompress(data, limit)
    except zlib.error as error:
        raise ValueError(f"damaged gzip: {error}") from None


def _jpeg(data: bytes) -> ImageHeader | None:
    at, orientation, size = 2, 1, len(data)
    while at + 9 < size:
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF or marker in ALONE:  # filling
            at += 1 if marker == 0xFF else 2
            continue
        if marker in FRAMES:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return ImageHeader(width, height, orientation)
        if marker == 0xDA:
            return None  # the picture itself, without a size before it
        length = data[at + 2] << 8 | data[at + 3]
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            orientation = _orientation(data[at + 10 : at + 2 + length])
        at += 2 + length
    return None


def _orientation(tiff: bytes) -> int:
    """Tag 0x0112 of the first directory of an EXIF block; 1 where it is missing or makes no sense."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        for i in range(count):
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, start + 2 + 12 * i)
            if tag == 0x0112:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def _webp(data: bytes) -> ImageHeader | None:
    kind = data[12:16]
    if len(data) < 30:  # the shortest there is
        return None
    if kind == b"VP8X":
        return ImageHeader(1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little"))
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return ImageHeader(1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return ImageHeader(width & 0x3FFF, height & 0x3FFF)
    return None

"""What an encoded picture says of itself before it is decoded: width, height, orientation.

Read from the first bytes: for the index, and to refuse a picture whose decoding would not fit before it is tried.
"""

import struct
import zlib
from typing import NamedTuple

GZIP, JPEG, PNG = b"\x1f\x8b", b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
# JPEG markers that start a frame and so hold the size; the others in 0xC0..0xCF are tables.
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
ALONE = frozenset({0x01, *range(0xD0, 0xD8)})  # JPEG markers without a length
LONG = 4  # of EXIF's types of values: 32 bits; orientation should have 16


class ImageHeader(NamedTuple):
    """Size in pixels as stored, at least 1 x 1; of JPEG files also EXIF orientation (1 to 8, 1 = upright) and kind."""

    width: int
    height: int
    orientation: int = 1
    progressive: bool = False


def read_header(data: bytes) -> ImageHeader | None:
    """Reads the header of a JPEG, PNG, WebP, GIF or BMP file from its first bytes; None if they do not hold one."""
    try:
        header = _read(data)
    except struct.error:  # cut
        return None
    return header if header is not None and min(header.width, header.height) > 0 else None


def is_whole_png(data: bytes) -> bool:
    """Whether every chunk of a PNG file ends inside it, up to the last one.

    libpng and OpenCV make room for a chunk by what its length field says, up to 4 GiB, before they read it.
    """
    at, size = 8, len(data)
    while at + 12 <= size:
        length = int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        at += 12 + length
        if kind == b"IEND":
            return at <= size
    return False


def unzipped(data: bytes, limit: int) -> bytes:
    """The first `limit` bytes of gzipped data (or of what of it is there); ValueError where it is damaged."""
    try:
        return zlib.decompressobj(wbits=31).decompress(data, limit)
    except zlib.error as error:
        raise ValueError(f"damaged gzip: {error}") from None


def _read(data: bytes) -> ImageHeader | None:
    if data[:2] == JPEG:
        return _jpeg(data)
    if data[:8] == PNG:
        return ImageHeader(*struct.unpack_from(">II", data, 16)) if data[12:16] == b"IHDR" else None
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    if data[:3] == b"GIF":
        return ImageHeader(*struct.unpack_from("<HH", data, 6))
    if data[:2] == b"BM":
        kind, width, height = struct.unpack_from("<Iii", data, 14)
        # OS/2's header of 12 bytes has other fields, and OpenCV turns such files grey.
        return ImageHeader(width, abs(height)) if kind >= 40 else None
    return None


def _jpeg(data: bytes) -> ImageHeader | None:
    at, orientation, size = 2, 0, len(data)
    while at + 9 <= size:
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF or marker in ALONE:  # filling
            at += 1 if marker == 0xFF else 2
            continue
        if marker in FRAMES:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return ImageHeader(width, height, orientation or 1, marker in PROGRESSIVE)
        if marker == 0xDA:
            return None  # the picture itself, without a size before it
        length = data[at + 2] << 8 | data[at + 3]
        if marker == 0xE1 and not orientation and data[at + 4 : at + 10] == b"Exif\0\0":  # the first one counts
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
            tag, kind = struct.unpack_from(order + "HH", tiff, start + 2 + 12 * i)
            if tag == 0x0112:
                (value,) = struct.unpack_from(order + ("I" if kind == LONG else "H"), tiff, start + 10 + 12 * i)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def _webp(data: bytes) -> ImageHeader | None:
    kind = data[12:16]
    if kind == b"VP8X":
        w, w_high, h, h_high = struct.unpack_from("<HBHB", data, 24)
        return ImageHeader(1 + (w_high << 16 | w), 1 + (h_high << 16 | h))
    if kind == b"VP8L" and data[20:21] == b"\x2f":
        (bits,) = struct.unpack_from("<I", data, 21)
        return ImageHeader(1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return ImageHeader(width & 0x3FFF, height & 0x3FFF)
    return None

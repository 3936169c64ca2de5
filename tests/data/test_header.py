"""Sizes from the first bytes of pictures, against the encoders that wrote them; nothing from what is no picture."""

import struct

import cv2
import numpy as np
import pytest

from m3i_large.data.header import ImageHeader, read_header

PICTURE = np.random.default_rng(0).integers(0, 255, (37, 53, 3)).astype(np.uint8)


def encoded(extension: str, *flags: int) -> bytes:
    return cv2.imencode(extension, PICTURE, list(flags))[1].tobytes()


PICTURES = {
    "jpg": encoded(".jpg"),
    "progressive jpg": encoded(".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
    "png": encoded(".png"),
    "lossy webp": encoded(".webp", cv2.IMWRITE_WEBP_QUALITY, 80),
    "lossless webp": encoded(".webp", cv2.IMWRITE_WEBP_QUALITY, 101),
    "extended webp": b"RIFF\0\0\0\0WEBPVP8X" + bytes(8) + (52).to_bytes(3, "little") + (36).to_bytes(3, "little"),
    "bmp": encoded(".bmp"),
    "gif": b"GIF89a" + struct.pack("<HH", 53, 37) + bytes(20),
    "bmp from the top": b"BM" + bytes(12) + struct.pack("<Iii", 40, 53, -37) + bytes(20),
}


@pytest.mark.parametrize("name", PICTURES)
def test_the_size_is_the_pictures_and_a_cut_header_gives_none(name: str) -> None:
    data = PICTURES[name]
    assert read_header(data) == ImageHeader(53, 37, 1, name == "progressive jpg")
    first = next(n for n in range(len(data) + 1) if read_header(data[:n]) is not None)
    assert all(read_header(data[:n]) is None for n in range(first))
    assert all(read_header(data[:n]) == read_header(data) for n in range(first, min(len(data), first + 50)))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("value", "want"), [(1, 1), (6, 6), (8, 8), (0, 1), (9, 1)])
def test_orientation(order: str, value: int, want: int) -> None:
    tiff = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, 1)
    tiff += struct.pack(order + "HHIHH", 0x0112, 3, 1, value, 0)
    segment = b"Exif\0\0" + tiff
    data = PICTURES["jpg"]
    marked = data[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:]
    assert read_header(marked) == ImageHeader(53, 37, want)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\xff\xd8", b"text", b"\xff\xd8" + b"\0" * 40, b"RIFF\0\0\0\0WEBPVP8?" + bytes(40),
        b"GIF89a" + struct.pack("<HH", 0, 5), b"GIF89a" + struct.pack("<HH", 5, 0),
        b"BM" + bytes(16) + struct.pack("<ii", -5, 7), b"BM" + bytes(16) + struct.pack("<ii", 5, 0),
        b"\x89PNG\r\n\x1a\n" + bytes(30), b"\xff\xd8\xff\xda" + bytes(40),
    ],
)  # fmt: skip
def test_what_is_no_picture_has_no_size(data: bytes) -> None:
    assert read_header(data) is None


@pytest.mark.parametrize("filling", [b"\xff", b"\xff\xff\xff", b"\xff\x01", b"\xff\xd0\xff\xff"])
def test_filling_between_segments_is_passed_over(filling: bytes) -> None:
    data = PICTURES["jpg"]
    assert read_header(data[:2] + filling + data[2:]) == read_header(data)


def test_random_bytes_after_a_signature_never_raise() -> None:
    rng = np.random.default_rng(1)
    for start in (
        b"\xff\xd8\xff",
        b"GIF",
        b"BM",
        b"RIFF\0\0\0\0WEBPVP8X",
        b"RIFF\0\0\0\0WEBPVP8L",
        b"\x89PNG\r\n\x1a\n",
    ):
        for _ in range(300):
            header = read_header(start + rng.bytes(int(rng.integers(0, 60))))
            assert header is None or (0 < header.width < 1 << 32 and 0 < header.height < 1 << 32)

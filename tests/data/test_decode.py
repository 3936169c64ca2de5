"""Headers, decoding and resizing against Pillow and torch; damaged and hostile files are refused at a bounded cost."""

import gzip
import io
import json
import os
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from m3i_large.data import decode
from m3i_large.data.decode import blur, crop_resize, decode_rgb, whole_pixels
from m3i_large.data.header import is_whole_png, read_header, unzipped

HEIGHT, WIDTH = 37, 53


def smooth(height: int = HEIGHT, width: int = WIDTH, *, sigma: float = 4) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3)).astype(np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), sigma)


def saved(image: Image.Image, kind: str, **more: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


def opened(data: bytes) -> np.ndarray:
    """Pillow's first frame as upright RGB, on white."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode == "I;16":
        return np.repeat((np.array(image) >> 8).astype(np.uint8)[..., None], 3, 2)
    if "A" in image.mode or "transparency" in image.info:
        clear = image.convert("RGBA")
        image = Image.new("RGBA", clear.size, "white")
        image.alpha_composite(clear)
    return np.array(image.convert("RGB"))


def difference(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape and a.dtype == np.uint8 and a.flags.c_contiguous
    return int(np.abs(a.astype(int) - b).max())


COLOUR = Image.fromarray(smooth())
GREY, PALETTE, BITS = COLOUR.convert("L"), COLOUR.quantize(64), COLOUR.convert("1")
CLEAR = COLOUR.copy()
CLEAR.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1))))
SIXTEEN = Image.fromarray(np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH) * 33)
OTHER = Image.fromarray(255 - np.array(COLOUR))
ANIMATED = {"save_all": True, "append_images": [OTHER], "duration": 100}


def interlaced() -> bytes:
    """A PNG in Adam7's seven passes, which Pillow reads and does not write."""
    pixels = np.array(COLOUR)
    rows = b""
    for y, x, down, across in [
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    ]:
        part = pixels[y::down, x::across]
        rows += b"".join(b"\0" + row.tobytes() for row in part)
    return png(WIDTH, HEIGHT, zlib.compress(rows), kind=2, interlace=1)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, body: bytes, *, depth: int = 8, kind: int = 2, interlace: int = 0) -> bytes:
    header = struct.pack(">II5B", width, height, depth, kind, 0, 0, interlace)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def upside_down_bmp() -> bytes:
    data = bytearray(saved(COLOUR, "BMP"))
    struct.pack_into("<i", data, 22, -HEIGHT)
    return bytes(data)


def old_bmp() -> bytes:
    """With the 12-byte header of OS/2, 24 bits per pixel."""
    rows = np.array(COLOUR)[::-1, :, ::-1].tobytes()
    rows = b"".join(rows[i : i + 3 * WIDTH] + b"\0" * (-3 * WIDTH % 4) for i in range(0, len(rows), 3 * WIDTH))
    header = struct.pack("<IHHI", 26 + len(rows), 0, 0, 26) + struct.pack("<IHHHH", 12, WIDTH, HEIGHT, 1, 24)
    return b"BM" + header + rows


def ycck() -> bytes:
    data = bytearray(saved(COLOUR.convert("CMYK"), "JPEG", quality=95))
    data[data.index(b"Adobe") + 11] = 2  # the transform
    return bytes(data)


def late_frame() -> bytes:
    """A JPEG whose size comes after 200 KB of other segments."""
    data = saved(COLOUR, "JPEG", quality=95)
    return data[:2] + 4 * (b"\xff\xed\xc3\x50" + bytes(0xC34E)) + data[2:]


# name: (file, largest difference from Pillow)
FILES: dict[str, tuple[bytes, int]] = {
    "jpeg": (saved(COLOUR, "JPEG", quality=95), 1),
    "jpeg 444": (saved(COLOUR, "JPEG", quality=95, subsampling=0), 1),
    "jpeg progressive": (saved(COLOUR, "JPEG", quality=95, progressive=True), 1),
    "jpeg grey": (saved(GREY, "JPEG", quality=95), 1),
    "jpeg cmyk": (saved(COLOUR.convert("CMYK"), "JPEG", quality=95), 2),
    "jpeg ycck": (ycck(), 2),
    "jpeg rgb": (saved(COLOUR, "JPEG", keep_rgb=True), 1),
    "jpeg late frame": (late_frame(), 1),
    "jpeg with filling": (b"\xff\xd8\xff\xff\xff" + saved(COLOUR, "JPEG", quality=95)[3:], 1),
    "png": (saved(COLOUR, "PNG"), 0),
    "png grey": (saved(GREY, "PNG"), 0),
    "png 16 bit": (saved(SIXTEEN, "PNG"), 0),
    "png 1 bit": (saved(BITS, "PNG"), 0),
    "png palette": (saved(PALETTE, "PNG"), 0),
    "png palette with alpha": (saved(PALETTE, "PNG", transparency=3), 0),
    "png grey with alpha": (saved(CLEAR.convert("LA"), "PNG"), 1),
    "png alpha": (saved(CLEAR, "PNG"), 1),
    "png interlaced": (interlaced(), 0),
    "png animated": (saved(COLOUR, "PNG", **ANIMATED), 0),
    "webp lossy": (saved(COLOUR, "WEBP"), 0),
    "webp lossless": (saved(COLOUR, "WEBP", lossless=True), 0),
    "webp alpha": (saved(CLEAR, "WEBP", quality=90), 1),
    "webp lossless alpha": (saved(CLEAR, "WEBP", lossless=True, exact=True), 1),
    "webp extended": (saved(COLOUR, "WEBP", icc_profile=b"\0" * 128), 0),
    "webp animated": (saved(COLOUR, "WEBP", lossless=True, **ANIMATED), 0),
    "gif": (saved(COLOUR, "GIF"), 0),
    "gif animated": (saved(COLOUR, "GIF", **ANIMATED), 0),
    "gif clear": (saved(PALETTE, "GIF", transparency=3), 0),
    "bmp": (saved(COLOUR, "BMP"), 0),
    "bmp palette": (saved(PALETTE, "BMP"), 0),
    "bmp 1 bit": (saved(BITS, "BMP"), 0),
    "bmp from the top": (upside_down_bmp(), 0),
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_is_what_pillow_sees(name: str) -> None:
    data, most = FILES[name]
    expected = opened(data)
    assert difference(decode_rgb(data), expected) <= most
    assert difference(decode_rgb(gzip.compress(data)), expected) <= most
    header = read_header(data)
    assert header is not None and (header.width, header.height) == Image.open(io.BytesIO(data)).size
    assert header.progressive == ("progressive" in name)


def test_animations_show_their_first_frame() -> None:
    for name in ("png animated", "webp animated"):
        assert np.array_equal(decode_rgb(FILES[name][0]), np.array(COLOUR))


def test_the_high_byte_of_16_bits_and_white_behind_transparency() -> None:
    assert np.array_equal(decode_rgb(FILES["png 16 bit"][0])[..., 1], np.array(SIXTEEN) >> 8)
    deep = np.dstack([np.array(COLOUR).astype(np.uint16) * 257, np.zeros((HEIGHT, WIDTH), np.uint16)])
    deep[:, WIDTH // 2 :, 3] = 65535
    out = decode_rgb(cv2.imencode(".png", deep[..., [2, 1, 0, 3]])[1].tobytes())
    assert (out[:, : WIDTH // 2] == 255).all()
    assert np.array_equal(out[:, WIDTH // 2 :], np.array(COLOUR)[:, WIDTH // 2 :])


def test_bands_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("png alpha", "png 16 bit", "png", "png grey"):
        whole = decode_rgb(FILES[name][0])
        for pixels in (1, 3 * WIDTH + 5, HEIGHT * WIDTH - 1):
            monkeypatch.setattr(decode, "BAND", pixels)
            assert np.array_equal(decode_rgb(FILES[name][0]), whole)


# -- orientation ----------------------------------------------------------------------------------------------


def tiff(orientation: int, *, order: str = "<", kind: int = 3) -> bytes:
    """An EXIF block with two tags, orientation the second."""
    value = struct.pack(order + ("I" if kind == 4 else "H"), orientation).ljust(4, b"\0")
    tags = struct.pack(order + "HHII", 0x0100, 4, 1, 99) + struct.pack(order + "HHI", 0x0112, kind, 1) + value
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
    return head + struct.pack(order + "H", 2) + tags + struct.pack(order + "I", 0)


def with_exif(*blocks: bytes) -> bytes:
    data = saved(COLOUR, "JPEG", quality=95)
    parts = [b"Exif\0\0" + block for block in blocks]
    return data[:2] + b"".join(b"\xff\xe1" + struct.pack(">H", 2 + len(p)) + p for p in parts) + data[2:]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_are_applied_as_pillow_does(orientation: int, order: str) -> None:
    for kind in (3, 4):
        data = with_exif(tiff(orientation, order=order, kind=kind))
        assert difference(decode_rgb(data), opened(data)) <= 1
        assert read_header(data) == (WIDTH, HEIGHT, orientation, False)


GOOD = tiff(6)
BROKEN_EXIF = {
    "nothing": b"",
    "another byte order": b"XX" + GOOD[2:],
    "a wild offset": GOOD[:4] + b"\xff\xff\xff\xff" + GOOD[8:],
    "an offset at the end": GOOD[:4] + struct.pack("<I", len(GOOD)) + GOOD[8:],
    "65535 tags, none of them orientation": GOOD[:8] + b"\xff\xff" + GOOD[10:22],
    "orientation 0": tiff(0),
    "orientation 9": tiff(9),
    "orientation 65542": tiff(65542, kind=4),
}


@pytest.mark.parametrize("name", BROKEN_EXIF)
def test_broken_exif_means_upright(name: str) -> None:
    upright = decode_rgb(saved(COLOUR, "JPEG", quality=95))
    assert np.array_equal(decode_rgb(with_exif(BROKEN_EXIF[name])), upright)


def test_exif_cut_anywhere_is_upright_until_the_tag_is_there() -> None:
    found = [read_header(with_exif(GOOD[:cut])).orientation for cut in range(len(GOOD))]
    assert found == [1] * 32 + [6] * (len(GOOD) - 32)
    # A count that promises more tags than there are harms nothing; of several blocks the first one counts.
    assert read_header(with_exif(GOOD[:8] + b"\xff\xff" + GOOD[10:])).orientation == 6
    assert read_header(with_exif(GOOD, tiff(3))).orientation == 6
    assert read_header(with_exif(tiff(1), tiff(3))).orientation == 1
    data = with_exif(b"")
    assert read_header(data.replace(b"Exif\0\0", b"http\0\0")).orientation == 1


def test_a_jpeg_header_is_found_behind_tables_and_as_soon_as_it_is_there() -> None:
    data = FILES["jpeg"][0]
    for marker in (0xC4, 0xC8, 0xCC, 0xDB, 0xDD, 0xFE):  # tables and comments that look like frames of 2056 x 2056
        segment = b"\xff" + bytes([marker]) + b"\0\x0c" + b"\x08" * 10
        assert read_header(data[:2] + segment + data[2:]) == (WIDTH, HEIGHT, 1, False)
    frame = data.index(b"\xff\xc0")
    assert read_header(data[: frame + 8]) is None
    assert read_header(data[: frame + 9]) == (WIDTH, HEIGHT, 1, False)
    assert read_header(data[:2] + b"\xff\xd0\xff\x01" + data[2:]) == (WIDTH, HEIGHT, 1, False)


# -- damage ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_a_cut_file_is_refused_wherever_it_is_cut(name: str) -> None:
    data = FILES[name][0]
    cuts = {*range(40), *range(0, len(data), max(1, len(data) // 40)), *range(len(data) - 12, len(data))}
    for cut in sorted(cuts):
        if cut < len(data):
            with pytest.raises(ValueError, match=r"."):
                decode_rgb(data[:cut])


def test_headers_that_are_cut_say_nothing_and_never_something_else() -> None:
    for name, (data, _) in FILES.items():
        if "late" not in name:
            whole = read_header(data)
            found = [read_header(data[:cut]) for cut in range(min(len(data), 900))]
            assert set(found) <= {None, whole}, name
            assert found[-1] == whole or len(data) > 900


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GIF",
        b"BM",
        b"\xff\xd8",
        b"\xff\xd8\xff\xe0 cut",
        b"\xff\xd8" + b"\xff" * 2000,
        b"\xff\xd8" + b"\xff\xe0\0\0" * 500,
        b"\xff\xd8\xff\xda\0\x08" + bytes(100),
        json.dumps({"a": 1}).encode(),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"\x89PNG\r\n\x1a\n\0\0\0\x04CgBI" + b"\1" * 40,
        b"RIFF\x40\0\0\0WEBPVP8L\x20\0\0\0\x2e" + b"\xff" * 40,
        b"RIFF\x40\0\0\0WEBPVP8 \x20\0\0\0" + b"\xff" * 40,
        b"RIFF\x40\0\0\0WEBPXXXX" + b"\xff" * 40,
        png(0, 5, b""),
        old_bmp(),
        saved(COLOUR, "BMP")[:18] + struct.pack("<ii", -WIDTH, HEIGHT) + saved(COLOUR, "BMP")[26:],
    ],
)
def test_what_is_no_image_has_no_header_and_is_a_value_error(content: bytes) -> None:
    assert read_header(content) is None
    with pytest.raises(ValueError, match="that are no image"):
        decode_rgb(content)


def test_gzip_that_is_damaged_or_holds_no_picture() -> None:
    packed = gzip.compress(FILES["jpeg"][0])
    twice, other = gzip.compress(packed), gzip.compress(b"no picture")
    for data in (packed[: len(packed) // 2], packed[:12], packed[:2], other, twice):
        with pytest.raises(ValueError, match=r"."):
            decode_rgb(data)
    flipped = bytearray(packed)
    flipped[-6] ^= 1  # of the checksum
    with pytest.raises(ValueError, match="damaged gzip"):
        decode_rgb(bytes(flipped))
    with pytest.raises(ValueError, match="damaged gzip"):
        unzipped(b"\x1f\x8b" + bytes(20), 10)
    assert unzipped(gzip.compress(bytes(range(100))), 10) == bytes(range(10))


def test_an_error_of_opencv_itself_is_a_value_error() -> None:
    """A WebP of 2^20 + 1 columns passes the pixel limit and fails OpenCV's own check, which raises cv2.error."""
    data = saved(Image.new("RGB", (16, 16)), "WEBP", icc_profile=b"\0" * 128)
    wide = data[:24] + struct.pack("<HBHB", 0, 0x10, 0, 0) + data[30:]
    with pytest.raises(ValueError, match="damaged image"):
        decode_rgb(wide)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(FILES)), st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=4))
@example("webp extended", [(0.1, 255)])
def test_no_damage_raises_anything_but_value_error(name: str, changes: list[tuple[float, int]]) -> None:
    data = bytearray(FILES[name][0])
    for place, value in changes:
        data[int(place * min(len(data), 600))] = value
    try:
        image = decode_rgb(bytes(data), max_pixels=1 << 16)
    except ValueError:
        return
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([b"", b"\xff\xd8", b"\xff\xd8\xff\xe1\0\x40Exif\0\0II", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM"]),
    st.binary(max_size=200),
)
def test_no_bytes_raise_anything_but_value_error(start: bytes, rest: bytes) -> None:
    header = read_header(start + rest)
    assert header is None or (header.width > 0 and header.height > 0 and 1 <= header.orientation <= 8)
    with pytest.raises(ValueError, match=r"."):
        decode_rgb(start + rest, max_pixels=1 << 16)


# -- size and cost --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5000), (5000, 1), (3, 2)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_odd_sizes(height: int, width: int, kind: str) -> None:
    data = saved(Image.fromarray(smooth(height, width)), kind)
    assert difference(decode_rgb(data), opened(data)) <= 1


@pytest.mark.parametrize(("height", "width"), [(64, 64), (61, 67), (33, 190)])
def test_a_large_jpeg_is_decoded_smaller_and_any_other_refused(height: int, width: int) -> None:
    picture = smooth(height, width, sigma=12)
    for quality in ({}, {"progressive": True}):
        data = saved(Image.fromarray(picture), "JPEG", quality=95, **quality)
        for smaller in (1, 2, 4, 8):
            if quality and smaller > 2:
                continue
            most = -(-height * width // smaller**2)
            image = decode_rgb(data, max_pixels=most)
            assert image.shape == (-(-height // smaller), -(-width // smaller), 3)
            expected = cv2.resize(picture, image.shape[1::-1], interpolation=cv2.INTER_AREA)
            assert np.abs(image.astype(int) - expected).mean() < 2
            if smaller < 8 and not quality:
                assert decode_rgb(data, max_pixels=most - 1).shape[0] == -(-height // smaller // 2)
    with pytest.raises(ValueError, match=rf"an image of {width} x {height}; needed: at most \d+ pixels"):
        decode_rgb(saved(Image.fromarray(picture), "JPEG"), max_pixels=height * width // 64 - 1)
    with pytest.raises(ValueError, match=rf"needed: at most {4 * (height * width // 4 - 1)} pixels"):
        decode_rgb(saved(Image.fromarray(picture), "JPEG", progressive=True), max_pixels=height * width // 4 - 1)
    exact = saved(Image.fromarray(picture), "PNG")
    assert decode_rgb(exact, max_pixels=height * width).shape == picture.shape
    with pytest.raises(ValueError, match=f"needed: at most {height * width - 1} pixels"):
        decode_rgb(exact, max_pixels=height * width - 1)


def test_a_jpeg_of_many_scans_is_refused() -> None:
    data = saved(COLOUR, "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(ValueError, match=r"an image of \d+ scans; needed: at most 128"):
        decode_rgb(data[:-2] + 128 * last + data[-2:])


def test_a_chunk_that_is_longer_than_its_png_is_refused_before_room_is_made() -> None:
    data = saved(COLOUR, "PNG", pnginfo=None)
    assert is_whole_png(data) and is_whole_png(data + b"more")
    assert not any(is_whole_png(data[:cut]) for cut in range(len(data)))
    place = data.index(b"IDAT") - 4
    assert not is_whole_png(data[:place] + struct.pack(">I", 4000) + data[place + 4 :])
    end = data.index(b"IEND") - 4
    assert not is_whole_png(data[:end] + struct.pack(">I", 1) + data[end + 4 :])


# What each costs: (expression of the bytes, how it ends, seconds, MiB above the interpreter with its libraries).
# The limits are several times what was measured; without its guard each takes seconds or gigabytes more.
HOSTILE = {
    "gzip of 1 GB of zeros": (
        "(lambda c: b''.join(c.compress(bytes(1 << 20)) for _ in range(1024)) + c.flush())(zlib.compressobj(9, 8, 31))",
        "gzip of more than",
        1.5,
        200,
    ),
    "PNG of 65536 x 65536": (
        "PNG + chunk(b'IHDR', struct.pack('>II5B', 65536, 65536, 8, 2, 0, 0, 0))",
        "an image of 65536 x 65536",
        0.2,
        10,
    ),
    "PNG with a chunk of 4 GiB": (
        "PNG + chunk(b'IHDR', struct.pack('>II5B', 16, 16, 8, 2, 0, 0, 0)) + b'\\xff\\xff\\xff\\xf0IDAT' + bytes(99)",
        "of a damaged image",
        0.2,
        10,
    ),
    "WebP of 2^24 x 2^24": (
        "b'RIFF\\x40\\0\\0\\0WEBPVP8X\\x0a\\0\\0\\0\\0\\0\\0\\0' + b'\\xff' * 99",
        "an image of 16777216 x 16777216",
        0.2,
        10,
    ),
    "progressive JPEG of 60000 x 60000": ("large(60000, progressive=True)", "needed: at most 160000000", 0.2, 30),
    "empty JPEG of 50000 x 50000": ("large(50000, progressive=False)", "Corrupt JPEG data", 3, 200),
    "JPEG of 100 megapixels": ("photo()", "(5000, 5000, 3)", 3, 300),
    "PNG of 40 megapixels, 16 bits and alpha": (
        "PNG + chunk(b'IHDR', struct.pack('>II5B', 6324, 6324, 16, 6, 0, 0, 0)) + deep()",
        "(6324, 6324, 3)",
        10,
        800,
    ),
}
COST = """
import io, resource, struct, sys, time, zlib
import cv2, numpy as np, simplejpeg
from PIL import Image
from m3i_large.data.decode import decode_rgb
PNG = b'\\x89PNG\\r\\n\\x1a\\n'
def large(size, *, progressive):
    buffer = io.BytesIO()
    Image.new('RGB', (16, 16)).save(buffer, 'JPEG', progressive=progressive)
    data = buffer.getvalue()
    at = data.index(b'\\xff\\xc2' if progressive else b'\\xff\\xc0') + 5
    return data[:at] + struct.pack('>HH', size, size) + data[at + 4:]
def chunk(kind, body):
    return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))
def deep():
    packer = zlib.compressobj(1)
    rows = b''.join(packer.compress(bytes(1 + 8 * 6324)) for _ in range(6324)) + packer.flush()
    return chunk(b'IDAT', rows) + chunk(b'IEND', b'')
def photo():
    # Made of one tile, so that to make it takes little memory: restart markers make its rows independent.
    tile = np.random.default_rng(0).integers(0, 256, (16, 10000, 3)).astype(np.uint8)
    strip = simplejpeg.encode_jpeg(cv2.blur(tile, (9, 9)), quality=85, colorspace='RGB', colorsubsampling='420')
    start = strip.index(b'\\xff\\xda')
    head, scan = strip[:start], strip[start:-2]
    length = struct.unpack('>H', scan[2:4])[0] + 2
    at = head.index(b'\\xff\\xc0') + 5
    head = head[:at] + struct.pack('>H', 10000) + head[at + 2:]
    head += b'\\xff\\xdd\\0\\4' + struct.pack('>H', 625)
    rows = b''.join(scan[length:] + b'\\xff' + bytes([0xd0 + i % 8]) for i in range(624)) + scan[length:]
    return head + scan[:length] + rows + b'\\xff\\xd9'
data = EXPRESSION
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.process_time()
try:
    print(decode_rgb(data).shape)
except ValueError as error:
    print(error)
print(time.process_time() - began)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024)
"""


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_hostile_file_costs_is_bounded(name: str) -> None:
    expression, ending, seconds, mebibytes = HOSTILE[name]
    code = COST.replace("EXPRESSION", expression)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENCV_LOG_LEVEL": "SILENT"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    result, took, held = done.stdout.splitlines()
    assert ending in result
    assert float(took) < seconds and float(held) < mebibytes, done.stdout


# -- crops ----------------------------------------------------------------------------------------------------


def exact(crop: np.ndarray, size: int, mode: str) -> np.ndarray:
    """torch's antialiased resize in float64."""
    image = torch.from_numpy(np.ascontiguousarray(crop)).permute(2, 0, 1)[None].double()
    resized = torch.nn.functional.interpolate(image, size=(size, size), mode=mode, antialias=True)
    return resized.clamp(0, 255)[0].permute(1, 2, 0).numpy()


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """Noise whose strength falls with its frequency, as in pictures."""
    rng = np.random.default_rng(0)
    image = np.full((1250, 1300, 3), 128, np.float32)
    for cells in (2, 4, 8, 16, 32, 64, 128, 256):
        noise = rng.standard_normal((cells, cells, 3), np.float32)
        image += 90 * (cells / 2) ** -0.7 * cv2.resize(noise, (1300, 1250), interpolation=cv2.INTER_CUBIC)
    return np.clip(image, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("shrink", [0.2, 0.5, 0.97, 1, 1.3, 1.7, 1.99, 2, 2.5, 3.3, 5, 7.9, 12, 19.5])
@pytest.mark.parametrize("size", [32, 61])
def test_crops_are_those_of_an_exact_antialiased_resize(photo: np.ndarray, size: int, shrink: float) -> None:
    """Within 1.5 grey levels of 255 on average (measured: at most 0.9), with no shift and no change of brightness."""
    height, width = round(size * shrink), round(0.9 * size * shrink) + 1
    box = whole_pixels((13, 17, height, width), size)
    ours = crop_resize(photo, box, size).astype(float)
    crop = photo[13 : 13 + box[2], 17 : 17 + box[3]]
    expected = exact(crop, size, "bicubic")
    error = np.abs(ours - expected).mean()
    assert error < 1.5 and abs(ours.mean() - expected.mean()) < 0.3
    # Half a pixel of the crop to any side would be further from it.
    for shift in ((1, 0), (0, 1)):
        moved = photo[13 + shift[0] : 13 + shift[0] + box[2], 17 + shift[1] : 17 + shift[1] + box[3]]
        if shrink <= 5:
            assert error < np.abs(ours - exact(moved, size, "bicubic")).mean()


@pytest.mark.parametrize("factor", [2, 3, 8])
def test_what_shrinks_to_whole_pixels_is_their_mean(photo: np.ndarray, factor: int) -> None:
    box = (3, 5, 20 * factor, 20 * factor)
    mean = photo[3 : 3 + box[2], 5 : 5 + box[3]].reshape(20, factor, 20, factor, 3).mean((1, 3))
    assert np.abs(crop_resize(photo, box, 20) - mean).max() <= 0.5 + 1e-9
    # One side alone as well.
    tall, wide = photo[3 : 3 + box[2], 5:25], photo[3:23, 5 : 5 + box[3]]
    down, across = tall.reshape(20, factor, 20, 3).mean(1), wide.reshape(20, 20, factor, 3).mean(2)
    assert np.abs(crop_resize(photo, (3, 5, box[2], 20), 20) - down).max() <= 0.5 + 1e-9
    assert np.abs(crop_resize(photo, (3, 5, 20, box[3]), 20) - across).max() <= 0.5 + 1e-9


def test_stripes_average_to_grey_and_a_pixel_fills_its_view() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[::2] = 255
    assert np.abs(crop_resize(stripes, (0, 0, 64, 64), 8).astype(int) - 127).max() <= 2
    assert crop_resize(stripes, (3, 5, 2, 1), 8).shape == (8, 8, 3)
    assert (crop_resize(stripes, (4, 63, 1, 1), 8) == 255).all() and (crop_resize(stripes, (63, 0, 1, 1), 8) == 0).all()
    # One side shrinks, the other grows: the thin one is still averaged.
    tall = crop_resize(stripes, (0, 7, 64, 1), 16)
    assert np.abs(tall.astype(int) - 127).max() <= 2


def test_a_crop_lands_in_the_array_given(photo: np.ndarray) -> None:
    batch = np.zeros((3, 24, 24, 3), np.uint8)
    for box in ((0, 0, 24, 24), (5, 6, 11, 12), (1, 2, 100, 300)):
        alone = crop_resize(photo, box, 24)
        assert crop_resize(photo, box, 24, out=batch[1]).base is batch and np.array_equal(batch[1], alone)
    assert not batch[0].any() and not batch[2].any()


@given(*[st.integers(1, 3000)] * 2, st.integers(1, 300), st.integers(0, 50), st.integers(0, 50))
def test_whole_pixels_stay_inside_and_take_less_than_a_pixel(h: int, w: int, size: int, top: int, left: int) -> None:
    box = whole_pixels((top, left, h, w), size)
    assert box[:2] == (top, left) and whole_pixels(box, size) == box
    for before, after in zip((h, w), box[2:], strict=True):
        shrink = before // size
        assert (after == before) if shrink < 2 else (after % shrink == 0 and before - shrink < after <= before)


@pytest.mark.parametrize("sigma", [0.02, 0.3, 1.0, 2.0])
def test_blur_is_gaussian(sigma: float) -> None:
    picture = smooth(40, 50, sigma=0.8)
    reach = 12
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights /= weights.sum()
    expected = np.pad(picture.astype(float), ((reach, reach), (reach, reach), (0, 0)), mode="symmetric")
    for axis in (0, 1):
        expected = np.apply_along_axis(np.convolve, axis, expected, weights, mode="valid")
    assert np.abs(blur(picture, sigma) - expected).max() <= 1.5
    assert blur(picture, 0.0) is picture and blur(picture[:1, :1], sigma).shape == (1, 1, 3)

"""From bytes to a cropped, resized RGB view."""

import contextlib

import cv2
import numpy as np
import simplejpeg

from m3i_large.data.header import GZIP, JPEG, PNG, ImageHeader, is_whole_png, read_header, unzipped

MAX_BYTES = 64 << 20  # of a gzipped picture once unpacked
MAX_PIXELS = 40_000_000  # 120 MB of RGB; larger JPEG files are decoded at a smaller scale, other formats refused
# A JPEG file of several scans is held whole before it is scaled, at 3 to 6 bytes per pixel: this many times max_pixels.
MAX_HELD = 4
MAX_SCANS = 128  # each may cost as much as a picture and take ten bytes; encoders write some ten
BAND = 1 << 20  # pixels of which intermediate results are held
# EXIF orientation as (transpose, then flip of rows, then flip of columns).
TURNS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


def decode_rgb(data: bytes, *, max_pixels: int = MAX_PIXELS, upright: bool = True) -> np.ndarray:
    """Decodes JPEG, PNG, WebP, BMP, ... by content, not by name -> uint8 (H, W, 3) RGB.

    Gzipped files are unpacked first. EXIF orientation is applied, transparency laid on white, 16 bits reduced to 8;
    grey and CMYK become RGB. Damaged files are refused even where a decoder would fill in grey.

    Args:
        max_pixels: a JPEG file above it is decoded at 1/2, 1/4 or 1/8; any other is refused before it is decoded.
        upright: apply the EXIF orientation.

    Raises:
        ValueError: no image, a damaged one, or too large a one.
    """
    if data[:2] == GZIP:
        data = unzipped(data, MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"gzip of more than {MAX_BYTES} bytes; needed: a picture")
    header = read_header(data)
    if header is None:
        raise ValueError(f"{len(data)} bytes that are no image")
    if data[:2] == JPEG:
        return _upright(_decode_jpeg(data, header, max_pixels), header.orientation if upright else 1)
    if header.width * header.height > max_pixels:
        raise ValueError(f"an image of {header.width} x {header.height}; needed: at most {max_pixels} pixels")
    image = None
    if data[:8] != PNG or is_whole_png(data):
        # Where its own checks of a size fail it raises, where its decoders fail it returns nothing.
        with contextlib.suppress(cv2.error):
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None:
        raise ValueError(f"{len(data)} bytes of a damaged image")
    return _to_rgb(image)


def _decode_jpeg(data: bytes, header: ImageHeader, max_pixels: int) -> np.ndarray:
    height, width = header.height, header.width
    smaller = 1
    while width * height > max_pixels * smaller**2:
        smaller *= 2
    # A look at every byte, for the files where it may matter.
    scans = data.count(b"\xff\xda") if header.progressive or smaller > 1 else 1
    held = header.progressive or scans > 1
    if width * height > (most := (MAX_HELD if held else 64) * max_pixels):
        raise ValueError(f"an image of {width} x {height}; needed: at most {most} pixels")
    if scans > MAX_SCANS:
        raise ValueError(f"an image of {scans} scans; needed: at most {MAX_SCANS}")
    if smaller == 1:
        return simplejpeg.decode_jpeg(data, colorspace="RGB")
    # min_factor lets the decoder take the smallest scale that is not below the size asked for.
    return simplejpeg.decode_jpeg(
        data, colorspace="RGB", min_height=height // smaller, min_width=width // smaller, min_factor=smaller
    )


def _to_rgb(image: np.ndarray) -> np.ndarray:
    """OpenCV's grey, BGR or BGRA of 8 or 16 bits -> uint8 RGB; in bands, for the intermediate results of large ones."""
    rows = max(1, BAND // image.shape[1])
    if len(image) <= rows:
        return _band_to_rgb(image)
    out = np.empty((*image.shape[:2], 3), np.uint8)
    for top in range(0, len(image), rows):
        out[top : top + rows] = _band_to_rgb(image[top : top + rows])
    return out


def _band_to_rgb(image: np.ndarray) -> np.ndarray:
    if image.dtype == np.uint16:
        image = (image >> 8).astype(np.uint8)
    if image.ndim == 2:
        return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    if image.shape[2] == 4:
        alpha = image[..., 3:].astype(np.float32) / 255
        image = (image[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    if orientation == 1:
        return image
    transpose, flip_rows, flip_columns = TURNS[orientation]
    if transpose:
        image = image.swapaxes(0, 1)
    return np.ascontiguousarray(image[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1])


def crop_resize(
    image_HWC: np.ndarray, box: tuple[int, int, int, int], size: int, *, out: np.ndarray | None = None
) -> np.ndarray:
    """The crop (top, left, height, width) as size x size pixels, in `out` (size, size, 3) if given.

    Where a side shrinks to half or less it is averaged over whole pixels first (bicubic alone would alias), then
    bicubic: several times faster than averaging all the way, for sides that `whole_pixels` has trimmed.
    """
    top, left, height, width = box
    crop = image_HWC[top : top + height, left : left + width]
    down, across = max(1, height // size), max(1, width // size)
    if down > 1 or across > 1:
        crop = cv2.resize(crop, (width // across, height // down), interpolation=cv2.INTER_AREA)
    return cv2.resize(crop, (size, size), dst=out, interpolation=cv2.INTER_CUBIC)


def whole_pixels(box: tuple[int, int, int, int], size: int) -> tuple[int, int, int, int]:
    """The box with sides that `crop_resize` can average over whole pixels: shorter by less than their shrinkage."""
    top, left, height, width = box
    return top, left, height - height % max(1, height // size), width - width % max(1, width // size)


def blur(image_HWC: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur with standard deviation `sigma` in pixels, cut at 3 sigma; 0 changes nothing."""
    if sigma <= 0:
        return image_HWC
    # Half the time of cv2.GaussianBlur, whose path for bytes is in fixed point.
    kernel = cv2.getGaussianKernel(round(6 * sigma + 1) | 1, sigma)
    return cv2.sepFilter2D(image_HWC, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT)


def whole_square(image_HWC: np.ndarray, size: int) -> np.ndarray:
    """The whole picture as a square: shorter side to `size`, then the centre."""
    height, width = image_HWC.shape[:2]
    scale = size / min(height, width)
    shape = (max(size, round(width * scale)), max(size, round(height * scale)))
    resized = cv2.resize(image_HWC, shape, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    return np.ascontiguousarray(resized[top : top + size, left : left + size])

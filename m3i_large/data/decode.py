"""From bytes to a cropped, resized RGB view."""

import cv2
import numpy as np
import simplejpeg


def decode_rgb(data: bytes) -> np.ndarray:
    """Decodes JPEG, PNG, WebP, BMP, ... by content, not by name -> uint8 (H, W, 3) RGB.

    Transparency is laid on white, 16-bit images are reduced to 8, grey becomes RGB.

    Raises:
        ValueError: no image, or a damaged one.
    """
    if simplejpeg.is_jpeg(data):
        return simplejpeg.decode_jpeg(data, colorspace="RGB")
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if data else None
    if image is None:
        raise ValueError(f"{len(data)} bytes that are no image")
    if image.dtype != np.uint8:
        image = (image // 256).astype(np.uint8) if image.dtype == np.uint16 else cv2.convertScaleAbs(image, alpha=255)
    if image.ndim == 2:
        return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    if image.shape[2] == 4:
        alpha = image[..., 3:].astype(np.float32) / 255
        image = (image[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def crop_resize(image_HWC: np.ndarray, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    """The crop (top, left, height, width) as size x size pixels.

    Area averaging where a side shrinks to less than half (bicubic would alias), bicubic otherwise.
    """
    top, left, height, width = box
    crop = image_HWC[top : top + height, left : left + width]
    shrinks = max(height, width) > 2 * size
    return cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def blur(image_HWC: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur with standard deviation `sigma` in pixels; 0 changes nothing."""
    if sigma <= 0:
        return image_HWC
    return cv2.GaussianBlur(image_HWC, (0, 0), sigma, borderType=cv2.BORDER_REFLECT)

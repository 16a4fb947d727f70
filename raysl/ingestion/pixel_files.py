"""Images in memory as image files: arrays, tensors and PIL images, without loss and in their modes."""

from __future__ import annotations

import io
import sys
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from raysl.errors import UserError
from raysl.ingestion import png

# Modes of Pillow that PNG does not hold: those that TIFF holds, and what others become.
_TIFF_MODES = ("CMYK", "F", "I", "I;16L", "LAB", "YCbCr")
_CONVERTED = {"HSV": "RGB", "La": "LA", "PA": "RGBA", "RGBX": "RGB", "RGBa": "RGBA"}


def is_tensor(value: Any) -> bool:
    """Return True for a tensor of torch, which is not loaded for this."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_pixels(value: Any) -> bool:
    """Return True for an array or a tensor of any type and shape."""
    return isinstance(value, np.ndarray) or is_tensor(value)


def pixels_of(images: Any, subject: str = "Images are given as") -> NDArray[np.uint8]:
    """Return an array or a tensor as an array with the channels, if any, last.

    Args:
        images: a uint8 array (h, w), (h, w, c) or (b, h, w, c), or a uint8 tensor (h, w), (c, h, w) or (b, c, h, w),
            where c is 1 or 3.
        subject: how the error begins that refuses anything else, up to "an array of type ...".
    """
    if not are_images(images):
        raise no_images(images, subject)
    if is_tensor(images):
        images = (images.movedim(-3, -1) if images.ndim > 2 else images).cpu().numpy()
    return images  # type: ignore[no-any-return]


def are_images(images: Any) -> bool:
    """Return True for an array or a tensor that `pixels_of` takes."""
    axis = -3 if is_tensor(images) else -1
    is_image = images.ndim == 2 or (images.ndim in (3, 4) and images.shape[axis] in (1, 3))
    # NumPy does not have all types of torch.
    return is_image and str(images.dtype) in ("uint8", "torch.uint8") and 0 not in images.shape


def no_images(images: Any, subject: str) -> UserError:
    """Return the error for an array or a tensor that is none of images; see `pixels_of`."""
    kind, cast, shapes = "an array", "astype('uint8')", "an array (h, w), (h, w, 3) or (b, h, w, 3)"
    or_else = ""
    if is_tensor(images):
        kind, cast, or_else = "a tensor", "to(torch.uint8)", ", or leave out a transform such as ToTensor"
        shapes = "a tensor with the channels first, (3, h, w) or (b, 3, h, w)"
    advice = f"uint8 in 0 .. 255, as {shapes}"
    if "float" in str(images.dtype):
        advice = f"uint8 in 0 .. 255, which (255 * images).round().{cast} makes of floats in 0 .. 1{or_else}"
    return UserError(
        f"{subject} {kind} of type {images.dtype} and shape {tuple(images.shape)}: give {advice}."
    )


def image_of(pixels: NDArray[np.uint8]) -> Image.Image:
    """Return pixels (h, w) or (h, w, c) as a PIL image; c is 1 or 3."""
    gray = pixels.ndim == 3 and pixels.shape[-1] == 1
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if gray else pixels))


def encode(image: Image.Image, small: bool = False) -> bytes:
    """Return an upright image as a file that keeps its mode, or else its colors; a `small` one takes longer."""
    # Errors of many kinds on damaged notes, beside which the pixels are whole.
    with suppress(Exception):
        image = ImageOps.exif_transpose(image)
    if small and image.mode in ("L", "RGB"):
        pixels = np.asarray(image)
        return png.encode(pixels.reshape(1, *pixels.shape[:2], -1))[0]
    buffer = io.BytesIO()
    if image.mode == "I;16N":
        image = image.convert("I").convert("I;16")  # Converted at once, values would end at 255.
    elif image.mode in _CONVERTED:
        image = image.convert(_CONVERTED[image.mode])
    if image.mode in _TIFF_MODES:
        image.save(buffer, "TIFF")
    else:
        image.save(buffer, "PNG", compress_level=1 if small else 0)
    return buffer.getvalue()


def file_of(image: Image.Image) -> bytes | None:
    """Return the file of an image that Pillow has opened and not decoded yet; None for any other image."""
    stream = getattr(image, "fp", None)
    if stream is None or not getattr(image, "tile", None) or image.tell():
        return None
    position = stream.tell()
    stream.seek(0)
    data: bytes = stream.read()
    stream.seek(position)
    # The image may be one part of the file, or drafted in another size.
    with suppress(UnidentifiedImageError), Image.open(io.BytesIO(data)) as same:
        if (same.format, same.mode, same.size) == (image.format, image.mode, image.size):
            return data
    return None

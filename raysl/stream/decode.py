"""From encoded image files to square crops: decode once, then cut and resize every crop that is wanted.

Resizing is bilinear with antialiasing, as Pillow's: a triangle as wide as the reduction, clipped at the box. The
pixels of a crop depend on its image and box alone.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate

from raysl.augment import SourceCrop
from raysl.rng import ImageRng

_JPEG = b"\xff\xd8\xff"
# A segment of a JPEG file holds less, and EXIF comes first or after the small JFIF segment.
_EXIF_WITHIN = 1 << 16


class DecodeError(Exception):
    """The bytes are not an image, or an image that is damaged."""


def decode(data: bytes) -> Tensor:
    """Decodes an image file of any format that Pillow knows.

    Grey, palette, CMYK and 16-bit images become RGB; transparency is dropped; the EXIF orientation is applied. Of an
    animation the first frame is taken.

    Returns:
        uint8 (3, h, w), RGB, with the channels last in memory.

    Raises:
        DecodeError: the bytes are not an image, or the image is damaged.
    """
    try:
        if data[:3] == _JPEG and data.find(b"Exif\0\0", 0, _EXIF_WITHIN) < 0:
            try:
                return _channels_first(simplejpeg.decode_jpeg(data))
            except ValueError:
                pass  # CMYK, or damage that Pillow may forgive and else says more about
        return _channels_first(_decode_with_pillow(data))
    except UnidentifiedImageError as error:  # whose own words give an address in memory
        raise DecodeError("no image of a known format" if data else "the file is empty") from error
    except Exception as error:  # Pillow's plugins raise whatever the damage leads them to
        raise DecodeError(f"{type(error).__name__}: {error}") from error


def _channels_first(pixels_hwc: npt.NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(pixels_hwc).permute(2, 0, 1)


def _decode_with_pillow(data: bytes) -> npt.NDArray[np.uint8]:
    """uint8 (h, w, 3)."""
    with Image.open(io.BytesIO(data)) as file:
        image: Image.Image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I") or image.mode == "F":
        # 16 bits in most cases: Pillow's own conversion would clip at 255.
        values = np.asarray(image, dtype=np.float64)
        values = values / 257 if values.max(initial=0) > 255 else values
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def cut(images: Sequence[bytes], crops: Mapping[str, SourceCrop], image_rng: ImageRng) -> dict[str, Tensor]:
    """Decodes each image once and cuts every named crop out of it.

    Args:
        images: encoded files, of any sizes.
        crops: by the name of the view; the boxes of a view come from `draws.named(drawn_as(name))`.
        draws: of the b images.

    Returns:
        uint8 (b, 3, size, size) for each name.

    Raises:
        DecodeError: an image is damaged.
    """
    decoded = [decode(data) for data in images]
    sizes_b2 = np.array([image.shape[1:] for image in decoded], dtype=np.int64).reshape(-1, 2)
    # Variants of a view may start from the same crop.
    known: dict[tuple[str, SourceCrop], Tensor] = {}
    for name, crop in crops.items():
        if (drawn_as(name), crop) in known:
            continue
        boxes_b4 = crop.boxes(sizes_b2[:, 0], sizes_b2[:, 1], image_rng.named(drawn_as(name))).tolist()
        parts = [
            _resize(image[None, :, top : top + height, left : left + width], crop.size, crop.size)
            for image, (top, left, height, width) in zip(decoded, boxes_b4, strict=True)
        ]
        empty = torch.empty(0, 3, crop.size, crop.size, dtype=torch.uint8)
        known[drawn_as(name), crop] = torch.cat(parts) if parts else empty
    return {name: known[drawn_as(name), crop] for name, crop in crops.items()}


def drawn_as(name: str) -> str:
    """The name by which a view draws its numbers: that of the view itself, for "transformed@variant" too."""
    return name.partition("@")[0]


def _resize(image_1chw: Tensor, height: int, width: int) -> Tensor:
    # One image at a time, and without torchvision's dispatch: for uint8 with the channels last this costs 12 us for
    # 32 pixels, a quarter of what a batched product with weight matrices does.
    return interpolate(image_1chw, (height, width), mode="bilinear", antialias=True)


def centre(images: Sequence[bytes], size: int) -> Tensor:
    """The evaluation view: shorter side resized to size * 256 / 224, then the square in the middle.

    An image that already is size x size stays as it is.

    Returns:
        uint8 (b, 3, size, size).

    Raises:
        DecodeError: an image is damaged.
    """
    out = torch.empty(len(images), 3, size, size, dtype=torch.uint8)
    for row, data in zip(out, images, strict=True):
        image = decode(data)
        height, width = image.shape[1:]
        if (height, width) != (size, size):
            short = round(size * 256 / 224)
            scale = short / min(height, width)
            # round() of the shorter side times the scale is `short` itself, whatever the rounding of the quotient.
            image = _resize(image[None], round(height * scale), round(width * scale))[0]
            top, left = (image.shape[1] - size) // 2, (image.shape[2] - size) // 2
            image = image[:, top : top + size, left : left + size]
        row.copy_(image)
    return out


def squashed(images: Sequence[bytes], size: int) -> Tensor:
    """The whole of every image, whatever its shape: both sides resized to `size`.

    Returns:
        uint8 (b, 3, size, size).

    Raises:
        DecodeError: an image is damaged.
    """
    out = torch.empty(len(images), 3, size, size, dtype=torch.uint8)
    for row, data in zip(out, images, strict=True):
        row.copy_(_resize(decode(data)[None], size, size)[0])
    return out

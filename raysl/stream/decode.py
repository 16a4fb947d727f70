"""From encoded image files to square crops."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, decode_image

from raysl.augment import SourceCrop
from raysl.rng import Draws


class DecodeError(Exception):
    """The bytes are not an image, or an image that is damaged."""


def decode(data: bytes) -> Tensor:
    """Decodes an image file of any format that Pillow knows.

    Returns:
        uint8 (3, h, w), RGB, upright.

    Raises:
        DecodeError: the bytes are not an image, or the image is damaged.
    """
    try:
        if data[:3] == b"\xff\xd8\xff":
            try:
                return decode_image(
                    torch.frombuffer(bytearray(data), dtype=torch.uint8),
                    mode=ImageReadMode.RGB,
                    apply_exif_orientation=True,
                )
            except RuntimeError:
                pass
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    except Exception as error:
        raise DecodeError(f"{type(error).__name__}: {error}") from error


def cut(images: Sequence[bytes], crops: Mapping[str, SourceCrop], draws: Draws) -> dict[str, Tensor]:
    """Decodes each image once and cuts every named crop out of it.

    Returns:
        uint8 (b, 3, size, size) for each name.

    Raises:
        DecodeError: an image is damaged.
    """
    decoded = [decode(data) for data in images]
    sizes = np.array([image.shape[1:] for image in decoded], dtype=np.int64).reshape(-1, 2)
    result = {}
    for name, crop in crops.items():
        boxes = crop.boxes(sizes[:, 0], sizes[:, 1], draws.named(name))
        out = torch.empty(len(images), 3, crop.size, crop.size, dtype=torch.uint8)
        for i, (top, left, height, width) in enumerate(boxes.tolist()):
            part = decoded[i][:, top : top + height, left : left + width]
            out[i] = _resize(part, crop.size, crop.size)
        result[name] = out
    return result


def _resize(image_chw: Tensor, height: int, width: int) -> Tensor:
    return interpolate(image_chw[None], (height, width), mode="bilinear", antialias=True)[0]


def centre(images: Sequence[bytes], size: int) -> Tensor:
    """The evaluation view: shorter side resized to size * 256 / 224, then the centre; see the module.

    Returns:
        uint8 (b, 3, size, size).

    Raises:
        DecodeError: an image is damaged.
    """
    out = torch.empty(len(images), 3, size, size, dtype=torch.uint8)
    for i, data in enumerate(images):
        image = decode(data)
        if tuple(image.shape[1:]) != (size, size):
            short = round(size * 256 / 224)
            h, w = image.shape[1:]
            scale = short / min(h, w)
            image = _resize(image, max(short, round(h * scale)), max(short, round(w * scale)))
            top, left = (image.shape[1] - size) // 2, (image.shape[2] - size) // 2
            image = image[:, top : top + size, left : left + size]
        out[i] = image
    return out

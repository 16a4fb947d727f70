"""Decode JPEG files on the training device: an opt-in for machines with few CPU cores for each GPU.

Data tasks then read files and send them as they are. A GPU decodes them by nvJPEG, whose inverse cosine transform and
chroma differ from those of libjpeg, and resizes in float, so pixels differ from those of the data tasks by a level or
two. Files that need more than decoding (PNG, a rotation in EXIF, CMYK) are decoded by the CPU of the trainer.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from raysl.stream.decode import decode
from raysl.stream.formats import MAX_PIXELS, DecodeError
from raysl.stream.pixels import is_plain_jpeg

# Columns of a batch: the bytes of all files, and where each ends.
FILES, ENDS = "files", "file_ends"


def pack(files: Sequence[bytes]) -> dict[str, npt.NDArray[Any]]:
    """Return the columns of a batch that hold its files."""
    return {
        FILES: np.frombuffer(b"".join(files), np.uint8),
        ENDS: np.cumsum([len(file) for file in files], dtype=np.int64),
    }


def unpack(columns: Mapping[str, npt.NDArray[Any]]) -> list[bytes]:
    """Return the files of a batch."""
    return (
        [part.tobytes() for part in np.split(columns[FILES], columns[ENDS][:-1])]
        if len(columns[ENDS])
        else []
    )


def decode_on(files: Sequence[bytes], device: torch.device) -> list[Tensor]:
    """Decode image files of any sizes on a device.

    Returns:
        uint8 (3, h, w), RGB, for each file.

    Raises:
        DecodeError: a file is damaged or not an image.
    """
    plain = [is_plain_jpeg(file, MAX_PIXELS) for file in files]
    encoded = [
        torch.frombuffer(bytearray(file), dtype=torch.uint8)
        for file, is_plain in zip(files, plain, strict=True)
        if is_plain
    ]
    decoded = iter(_decode_jpegs(encoded, device))
    return [
        next(decoded) if is_plain else decode(file).to(device)
        for file, is_plain in zip(files, plain, strict=True)
    ]


def _decode_jpegs(encoded: list[Tensor], device: torch.device) -> list[Tensor]:
    if not encoded:
        return []
    # torchvision 0.29 has deprecated this function in favor of TorchCodec's.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            found: list[Tensor] = decode_jpeg(encoded, ImageReadMode.RGB, device=device)
        except RuntimeError as error:
            raise DecodeError(f"damaged: {str(error).splitlines()[0]}") from error
    return found

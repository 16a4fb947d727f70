"""Read IDX files, the format of the MNIST family, as they are or from gzip.

The head of a file says how many values follow. A head may lie, so nothing is allocated before the size of the file has
been compared with it.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysl.errors import UserError, explained
from raysl.storage import Folder
from raysl.stream.formats import MAX_PIXELS

_DTYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4"}
_BATCH, _BATCH_BYTES = 1024, 64 << 20
# Deflate makes nothing smaller than by this factor.
_MOST_PACKED = 1032


def count(root: str, path: str) -> int:
    """Return the number of images in a file."""
    with _opened(root, path) as stream:
        return _head(stream, path, 3)[0][0]


def labels(root: str, path: str) -> NDArray[Any]:
    """Return the labels in a file, int64 (n,)."""
    with _opened(root, path) as stream:
        shape, dtype = _head(stream, path)
        if 0 in shape[1:]:
            raise UserError(
                f"The IDX file {path!r} says that an image has no label: its shape is {shape}. Get it again."
            )
        values = np.frombuffer(_take(stream, math.prod(shape) * dtype.itemsize, path), dtype).reshape(shape)
    # QMNIST has eight numbers for each image, the first of which is the class.
    return values.reshape(len(values), -1)[:, 0].astype(np.int64) if len(values) else values


def batches(root: str, path: str, first: int, count: int) -> Iterator[NDArray[np.uint8]]:
    """Yield the pixels of some images, uint8 (b, h, w, 1), some at a time."""
    with _opened(root, path) as stream:
        _, height, width = _head(stream, path, 3)[0]
        stream.seek(first * height * width, 1)
        batch = max(1, min(_BATCH, _BATCH_BYTES // (height * width)))
        for start in range(0, count, batch):
            data = _take(stream, min(batch, count - start) * height * width, path)
            yield np.frombuffer(data, np.uint8).reshape(-1, height, width, 1)


@contextmanager
def _opened(root: str, path: str) -> Iterator[Any]:
    with explained(f"Cannot read the IDX file {root}/{path}", "Get it again.", EOFError, OSError, zlib.error):
        with Folder(root).open(path) as raw:
            yield gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw


def _head(stream: Any, path: str, axes: int | None = None) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return the shape and the type of the values of an IDX file; images have three axes of uint8."""
    head = stream.read(4)
    known = (
        len(head) == 4 and head[:2] == b"\0\0" and head[2] in _DTYPES and head[3] == (axes or max(head[3], 1))
    )
    if not known or (axes == 3 and head[2] != 8):
        what = "an IDX file of images in uint8" if axes == 3 else "an IDX file of integers"
        raise UserError(f"{path!r} is not {what}. Get it again.")
    shape, dtype = struct.unpack(f">{head[3]}I", _take(stream, 4 * head[3], path)), np.dtype(_DTYPES[head[2]])
    packed = isinstance(stream, gzip.GzipFile)
    held = stream.fileobj.size() * _MOST_PACKED if packed else stream.size() - stream.tell()
    if math.prod(shape) * dtype.itemsize > held:
        raise UserError(
            f"The IDX file {path!r} ends too early for the shape {shape} in its head. Get it again."
        )
    if axes == 3 and not 0 < shape[1] * shape[2] <= MAX_PIXELS:
        raise UserError(
            f"The IDX file {path!r} says that its images have {shape[1]:,} x {shape[2]:,} pixels. They must have at "
            f"least one pixel and at most {MAX_PIXELS:,}."
        )
    return shape, dtype


def _take(stream: Any, count: int, path: str) -> bytes:
    data: bytes = stream.read(count)
    if len(data) < count:
        raise UserError(f"The IDX file {path!r} ends too early. Get it again.")
    return data

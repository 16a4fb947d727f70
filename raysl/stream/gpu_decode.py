"""Decode JPEG files on the training device: an opt-in for machines with few CPU cores for each GPU.

Data tasks then read files and send them as they are. A GPU decodes them by nvJPEG, whose inverse cosine transform and
chroma differ from those of libjpeg, and resizes in float, so pixels differ from those of the data tasks: usually by a
few levels, which has not been measured on a GPU yet. Files that need more than decoding (PNG, a rotation in EXIF,
CMYK), and those that nvJPEG refuses, are decoded by the CPU of the trainer.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raysl.communication.device_copy import copy_on_side_stream, made_beside
from raysl.stream.decode import decode
from raysl.stream.formats import MAX_PIXELS
from raysl.stream.pixels import plain_header

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
    # What follows the last end is empty.
    return [part.tobytes() for part in np.split(columns[FILES], columns[ENDS])[:-1]]


def decode_on(files: Sequence[bytes], device: torch.device) -> list[Tensor]:
    """Decode image files of any sizes on a device.

    Returns:
        uint8 (3, h, w), RGB, for each file.

    Raises:
        DecodeError: a file is damaged or not an image.
    """
    headers = [plain_header(file, MAX_PIXELS) for file in files]
    common = [number for number, header in enumerate(headers) if header is not None and header.is_common]
    decoded = _decode_jpegs([files[number] for number in common], device)
    done = dict(zip(common, decoded, strict=True)) if decoded else {}
    return [
        done[number] if number in done else copy_on_side_stream(decode(file).contiguous(), device)
        for number, file in enumerate(files)
    ]


def _decode_jpegs(files: Sequence[bytes], device: torch.device) -> list[Tensor]:
    """Decode JPEG files; return nothing if the decoder refuses one, which does not say which."""
    if not files:
        return []
    # Here, since torchvision imports torch's compiler, which would take seconds in every process of a run.
    from torchvision.io import ImageReadMode, decode_jpeg

    encoded = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]
    decode_all = partial(decode_jpeg, encoded, ImageReadMode.RGB, device=device)
    # torchvision 0.29 has deprecated this function in favor of TorchCodec's.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            # nvJPEG works on a stream of its own and does not wait for the stream of the caller, so memory that the
            # network still reads must not be given to it.
            return list(made_beside(decode_all, device) if device.type == "cuda" else decode_all())
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "CUDA" in str(error):
                raise
            return []

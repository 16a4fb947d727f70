"""Sources made from nothing, and what is read from them without Ray."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raysl.errors import UserError
from raysl.ingestion.found import Found
from raysl.ingestion.sources import ReadConfig, Row, SourceLocation, UnitSize, open_source, read

SMALL = UnitSize(3, 1 << 20)


def jpeg(gray: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (gray, gray, gray)).save(buffer, "JPEG")
    return buffer.getvalue()


def noise(seed: int) -> bytes:
    """A PNG file whose bytes do not compress."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def put(folder: Path, *names: str, data: bytes | None = None) -> None:
    """Write files below a folder; images by default."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg() if data is None else data)


def write_tar(path: Path, members: Mapping[str, bytes], mode: Any = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_odd_tar(path: Path, *names: str) -> Path:
    """Write a tar file of images with these names, a link, a hard link and a device."""
    write_tar(path, {name: jpeg() for name in names})
    with tarfile.open(path, "a") as archive:
        kinds = {"link.jpg": tarfile.SYMTYPE, "hard.jpg": tarfile.LNKTYPE, "null.jpg": tarfile.CHRTYPE}
        for name, kind in kinds.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    return path


def write_zip(path: Path, members: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def opened(uri: object, size: UnitSize = SMALL, **config: Any) -> tuple[Found, list[Row]]:
    """Return what was found in a source after its listing, and all its rows."""
    one = open_source(SourceLocation.parse(str(uri), config=ReadConfig(**config)))
    units = list(one.source.units(size))
    rows = [list(read(one.kind, unit)) for unit in units]
    assert [len(unit_rows) for unit_rows in rows] == [unit.num_images for unit in units]
    assert one.source.found.images == sum(unit.num_images for unit in units)
    return one.source.found, [row for unit_rows in rows for row in unit_rows]


def labels(uri: object, **config: Any) -> dict[str, str | None]:
    """Return the label of every image by its path; none if the source has none for all."""
    found, rows = opened(uri, **config)
    return {row.path: row.label if found.classes else None for row in rows}


def refused(uri: object, **config: Any) -> str:
    with pytest.raises(UserError) as error:
        opened(uri, **config)
    return str(error.value)

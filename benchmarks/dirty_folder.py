"""Ingest a mixed, dirty folder of 10,000 files as people keep them, and show what a person sees.

    python benchmarks/dirty_folder.py > results/ingest/dirty_folder.txt

The folder holds class folders with photographs, drawings with transparent parts, 16-bit scans, float maps and stacks of
pages, and beside and between them masks, thumbnails, archives, tables, hidden files, links, pipes, damaged and empty
files, web pages under the names of images, and names that are not UTF-8.
"""

from __future__ import annotations

import io
import logging
import os
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from raysl import ray_cluster
from raysl.ingestion import IngestConfig, ingest

NUM_FILES = 10_000
CLASSES = ("ape", "cat", "dog", "eel", "fox", "gnu", "hen", "owl", "pig", "rat")


def encoded(pixels: Any, file_format: str, **options: Any) -> bytes:
    """Return an image file."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, file_format, **options)
    return stream.getvalue()


def contents(rng: np.random.Generator) -> dict[str, bytes]:
    """Return one file of each kind by the end of its name."""
    rgb = rng.integers(0, 256, (48, 64, 3), np.uint8)
    alpha = np.dstack([rgb, np.full((48, 64), 255, np.uint8)])
    alpha[:10, :, 3] = 0
    photo = encoded(rgb, "JPEG")
    page = Image.fromarray(rgb[..., 0])
    stack = io.BytesIO()
    page.save(stack, "TIFF", save_all=True, append_images=[page, page])
    return {
        ".jpg": photo,
        ".PNG": encoded(rgb, "PNG"),
        "-logo.png": encoded(alpha, "PNG"),
        "-scan.png": encoded(rgb[..., 0].astype(np.uint16) * 200, "PNG"),
        "-map.tif": encoded(rng.normal(0, 1, (48, 64)).astype(np.float32), "TIFF"),
        "-stack.tif": stack.getvalue(),
        ".bmp": encoded(rgb, "BMP"),
        "": photo,
        "-turned.jpg": encoded(
            rgb, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"
        ),
        "-cut.jpg": photo[:300],
        "-empty.jpg": b"",
        "-page.jpg": b"<!DOCTYPE html><html>403 Forbidden</html>",
        ".txt": b"a caption",
        ".json": b"{}",
        ".mp4": b"\0\0\0\x18ftypmp42",
    }


def make(folder: Path) -> None:
    """Write the folder."""
    rng = np.random.default_rng(0)
    kinds = contents(rng)
    ends = list(kinds)
    # Nine files of ten are photographs, and the others of every kind.
    for number in range(NUM_FILES - 40):
        end = ".jpg" if rng.random() < 0.9 else ends[number % len(ends)]
        place = folder / CLASSES[number % len(CLASSES)] / ("old" if number % 50 == 0 else "")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:05d}{end}").write_bytes(kinds[end])
    for name in (
        "masks/00001.png",
        "masks/00002.png",
        "__MACOSX/._0.jpg",
        ".git/HEAD",
        "overview.jpg",
        ".DS_Store",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(kinds[".PNG"])
    for number, name in enumerate(
        ("all.zip", "part.tar.gz", "list.csv", "table.parquet", "weights.pth", "notes.md")
    ):
        (folder / name).write_bytes(bytes(number))
    (folder / "empty").mkdir()
    (folder / "ape" / "again").symlink_to(folder, target_is_directory=True)
    (folder / "ape" / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    os.mkfifo(folder / "cat" / "pipe.jpg")
    with open(os.fsencode(folder) + b"/dog/caf\xe9.jpg", "wb") as file:
        file.write(kinds[".jpg"])


def main() -> None:
    """Make the folder, ingest it, and print what is said and the memory of the driver."""
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("raysl").setLevel(logging.INFO)
    ray_cluster.start()
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "dirty"
        make(source)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        dataset = ingest(source, f"{place}/data", IngestConfig())
        grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
        print(f"\n{dataset.num_images:,} images; the memory of the driver grew by {grown_mb} MB")


if __name__ == "__main__":
    main()

"""Tiny data sets for tests, written without Ray."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from raysl.dataset import SHARDS, DataSet, Manifest, Shard
from raysl.evaluation.results import ROWS, add_rows
from raysl.ingestion import shard
from raysl.ingestion.sources import SourceLocation, UnitSize, open_source, read
from raysl.run import Run
from raysl.storage import Folder

# What shows an image upright, by its orientation in EXIF; 1 is upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def make_dataset(
    folder: Path, num_images: int, side: int = 16, rows_per_group: int = 20, seed: int = 0
) -> DataSet:
    """A data set of random PNG images in two shards, with four classes that show in the mean color."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 4, num_images)
    (folder / SHARDS).mkdir(parents=True)
    shards = []
    half = -(-num_images // 2)
    for number, start in enumerate(range(0, num_images, half)):
        stop = min(num_images, start + half)
        images = [_png(generator, side, int(labels[i])) for i in range(start, stop)]
        table = pa.table({"index": np.arange(start, stop), "image": images, "label": labels[start:stop]})
        path = folder / SHARDS / f"{number:05d}.parquet"
        pq.write_table(table, path, row_group_size=rows_per_group)
        groups = tuple(min(rows_per_group, stop - s) for s in range(start, stop, rows_per_group))
        shards.append(Shard(path.name, groups, path.stat().st_size))
    manifest = Manifest("test", tuple(shards), ("a", "b", "c", "d"), f"test-{num_images}-{side}-{seed}", 0)
    Folder(str(folder)).write_json("manifest.json", manifest.to_json())
    return DataSet.open(str(folder))


def _png(generator: np.random.Generator, side: int, label: int) -> bytes:
    pixels = generator.integers(0, 120, (side, side, 3))
    pixels[..., label % 3] += 60 + 30 * (label // 3)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def make_clips(folder: Path, count: int, options: str = "size=32&frames=12", split: str = "train") -> DataSet:
    """A data set of drawn clips."""
    opened = open_source(SourceLocation(f"clips:{count}?{options}", split))
    units = list(opened.source.units(UnitSize(-(-count // 2), 1 << 28)))
    classes = tuple(opened.source.found.classes)
    written, base = [], 0
    for number, unit in enumerate(units):
        rows = read(opened.kind, unit)
        written.append(
            shard.write(
                Folder(str(folder)), number, base, rows, decoding=None, classes=classes, rows_per_group=8
            )
        )
        base += written[-1].num_images
    shards = tuple(one.shard for one in written)
    digest = " ".join(one.digest for one in written)
    manifest = Manifest(opened.source.name, shards, classes, digest, 0, clips=dict(opened.source.clips))
    labels = [np.array(one.labels, np.int64) for one in written]
    return DataSet.create(Folder(str(folder)), manifest, labels)


def write_rows(folder: Folder, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace the results of probes in the folder of a run or of a model."""
    (folder / ROWS).delete()
    add_rows(Run(folder), rows)

"""Parquet files in the image layout of Hugging Face, or with plain columns of encoded bytes and integers.

The image column is a struct {bytes, path} or binary; the label is an integer. The names of the classes come from the
`huggingface` entry of the schema metadata, and the splits of a folder from the names of its files
(`train-00000-of-00002.parquet`, `test.parquet`, `validation/0000.parquet`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raysl.errors import UserError
from raysl.ingestion.listing import File, files_below, is_folder, split_of, stamp
from raysl.ingestion.sources import Confidence, Place, Row, Unit, UnitSize, choose_split
from raysl.storage import filesystem

SUMMARY = "Parquet in the Hugging Face image layout: images.parquet, cifar10/#train, hf://datasets/uoft-cs/cifar10#train"

_BATCH_ROWS = 256
# Columns that are taken for the image and the label before the schema is searched for another.
_IMAGE_NAMES = ("image", "img")
_LABEL_NAMES = ("label", "labels", "fine_label", "class")


def recognise(place: Place) -> Confidence:
    if place.uri.endswith(".parquet"):
        return Confidence.IS
    return Confidence.IS if is_folder(place.uri) and any(_files(place.uri)) else Confidence.NO


def _files(uri: str) -> Iterator[File]:
    return (file for file in files_below(uri, depth=3) if file.path.endswith(".parquet") or not file.path)


class Source:
    """See `raysl.ingestion.sources.Source`."""

    encoded_here = False

    def __init__(self, place: Place) -> None:
        files = list(_files(place.uri))
        if not files:
            raise UserError(f"The source {place.uri!r} does not exist.")
        split = choose_split(place, sorted({split_of(file.path) for file in files} - {""}))
        self._files = [file for file in files if split_of(file.path) == split]
        self._root = place.uri
        self.name = str(Place(place.uri, split))
        with _opened(self._root, self._files[0].path) as file:
            schema = file.schema_arrow
            self._image, self._label = _columns(schema, f"{self._root}/{self._files[0].path}")
            self.labelled = self._label is not None
            self.classes: tuple[str, ...] | None = _class_names(schema, self._label) if self._label else ()

    def stamp(self) -> str:
        return stamp(self._files)

    def units(self, size: UnitSize) -> Iterator[Unit]:
        with ThreadPoolExecutor(16) as pool:
            listed = pool.map(lambda file: _row_groups(self._root, file.path, self._image), self._files)
            for file, groups in zip(self._files, listed, strict=True):
                first, rows, num_bytes = 0, 0, 0
                for group, (group_rows, group_bytes) in enumerate(groups):
                    full = rows + group_rows > size.num_images or num_bytes + group_bytes > size.num_bytes
                    if rows and full:
                        yield self._unit(file.path, first, group, rows)
                        first, rows, num_bytes = group, 0, 0
                    rows, num_bytes = rows + group_rows, num_bytes + group_bytes
                if rows:
                    yield self._unit(file.path, first, len(groups), rows)

    def _unit(self, path: str, first: int, end: int, rows: int) -> Unit:
        spec = {
            "root": self._root,
            "path": path,
            "groups": [first, end],
            "image": self._image,
            "label": self._label,
        }
        return Unit(rows, spec)


@contextmanager
def _opened(root: str, path: str) -> Iterator[pq.ParquetFile]:
    """The Parquet file; what Arrow says of a damaged one becomes a UserError."""
    fs, folder = filesystem(root)
    place = f"{folder}/{path}".rstrip("/")
    try:
        with fs.open_input_file(place) as stream:
            yield pq.ParquetFile(stream)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OSError) as error:
        raise UserError(
            f"Cannot read the Parquet file {place!r}: {error}. Download or copy it again, then run the same command."
        ) from error


def _row_groups(root: str, path: str, image: str) -> list[tuple[int, int]]:
    """Rows and bytes of every row group of a file."""
    with _opened(root, path) as file:
        if image not in file.schema_arrow.names:
            raise UserError(
                f"The Parquet file {root}/{path} has no column {image!r}, which the first file has."
            )
        groups = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
        return [(group.num_rows, group.total_byte_size) for group in groups]


def _columns(schema: pa.Schema, place: str) -> tuple[str, str | None]:
    """The columns with the images and the labels."""
    images = [field.name for field in schema if _holds_images(field.type)]
    named = [name for name in _IMAGE_NAMES if name in images]
    if not named and len(images) != 1:
        raise UserError(
            f"The Parquet file {place!r} has {len(images)} columns that may hold encoded images and none is named "
            f"'image': its columns are {', '.join(schema.names)}. One must be binary, or a struct of bytes and path."
        )
    labels = [
        name for name in _LABEL_NAMES if name in schema.names and pa.types.is_integer(schema.field(name).type)
    ]
    return (named or images)[0], labels[0] if labels else None


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _class_names(schema: pa.Schema, label: str) -> tuple[str, ...] | None:
    """The names of the classes by the metadata; None when it has none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features[label]["names"])
    except (KeyError, TypeError, ValueError):
        return None


def read(unit: Unit) -> Iterator[Row]:
    spec = unit.spec
    columns = [spec["image"]] + ([spec["label"]] if spec["label"] else [])
    with _opened(spec["root"], spec["path"]) as file:
        for group in range(*spec["groups"]):
            row = 0
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns):
                yield from _rows(batch, spec, f"{spec['path'] or spec['root']}, row group {group}, row", row)
                row += batch.num_rows


def _rows(batch: pa.RecordBatch, spec: dict[str, Any], place: str, first: int) -> Iterator[Row]:
    images = batch.column(spec["image"])
    names = [None] * len(images)
    if pa.types.is_struct(images.type):
        if images.type.get_field_index("path") >= 0:
            names = pc.struct_field(images, "path").to_pylist()
        images = pc.struct_field(images, "bytes")
    labels = batch.column(spec["label"]).to_pylist() if spec["label"] else [None] * len(images)
    for i, (image, label, name) in enumerate(zip(images, labels, names, strict=True)):
        path = f"{place} {first + i}" + (f" ({name})" if name else "")
        yield Row(image.as_py(), label, path, "the image column has no bytes in this row")

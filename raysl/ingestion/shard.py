"""One unit of a source becomes one shard: what a task does.

Memory is that of one row group. A shard and then its record are written whole or not at all, so a task may be killed
and run again at any time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

import pyarrow as pa
import pyarrow.parquet as pq

from raysl.dataset import SHARDS, Shard
from raysl.errors import UserError
from raysl.ingestion.images import Tally, stored
from raysl.ingestion.sources import Row
from raysl.storage import Folder
from raysl.stream.pixels import DecodeConfig, Ranges

_ROW_GROUP_BYTES = 4 << 20


@dataclass(frozen=True)
class Written:
    """What became of a unit; a JSON value.

    Args:
        unit: its number.
        base: index of its first image.
        row_groups: images in every row group; empty when no image could be decoded, and then there is no shard.
        num_bytes: size of the shard.
        digest: hash of every image's label and bytes, in order.
        max_label: the largest label; -1 when there is none.
        num_unlabelled: images without a label.
        bad: (path, reason) of every image that could not be decoded.
        tally: the images that are stored in another form than their files.
        ranges: by kind of values, the range that became 0 to 255.
    """

    unit: int
    base: int
    row_groups: tuple[int, ...]
    num_bytes: int
    digest: str
    max_label: int
    num_unlabelled: int
    bad: tuple[tuple[str, str], ...]
    tally: Tally = field(default_factory=dict)
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def num_images(self) -> int:
        return sum(self.row_groups)

    @property
    def shard(self) -> Shard:
        return Shard(_file(self.unit), self.row_groups, self.num_bytes)


def _file(unit: int) -> str:
    return f"{unit:05d}.parquet"


@dataclass
class _Sums:
    """What is known of a unit while its rows go by."""

    row_groups: list[int] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    digest: hashlib.blake2b = field(default_factory=lambda: hashlib.blake2b(digest_size=16))
    tally: Tally = field(default_factory=dict)
    max_label: int = -1
    num_unlabelled: int = 0

    def add(self, image: bytes, label: int | None) -> None:
        self.digest.update(f"{label} {len(image)} ".encode())
        self.digest.update(image)
        self.max_label = max(self.max_label, -1 if label is None else label)
        self.num_unlabelled += label is None


def write(
    dest: Folder,
    unit: int,
    base: int,
    rows: Iterator[Row],
    *,
    decoding: DecodeConfig | None,
    labelled: bool,
    rows_per_group: int,
    ranges: Ranges | None = None,
) -> Written:
    """Writes the rows that hold an image as the shard of a unit.

    Args:
        base: index of the first image.
        decoding: how to decode every image and store those that are not ordinary; None stores all as they are.
        labelled: whether the shard has a label column.
        ranges: by kind of values, the range that becomes 0 to 255; see `raysl.ingestion.images.ranges_of`.

    Raises:
        UserError: the shard cannot be written, or the source says so.
    """
    sums = _Sums()
    if decoding is not None:
        rows = chain.from_iterable(stored(row, decoding, ranges or {}, sums.tally) for row in rows)
    with dest.writing(f"{SHARDS}/{_file(unit)}") as stream:
        writer = None
        for images, labels in _groups(rows, sums, labelled, rows_per_group):
            table = _table(base + sum(sums.row_groups), images, labels if labelled else None)
            writer = writer or _writer(stream, table.schema)
            writer.write_table(table, row_group_size=len(images))
            sums.row_groups.append(len(images))
        if writer:
            writer.close()
        num_bytes = stream.tell()
    if not sums.row_groups:
        dest.delete(f"{SHARDS}/{_file(unit)}")
    return Written(
        unit=unit,
        base=base,
        row_groups=tuple(sums.row_groups),
        num_bytes=num_bytes,
        digest=sums.digest.hexdigest(),
        max_label=sums.max_label,
        num_unlabelled=sums.num_unlabelled,
        bad=tuple(sums.bad),
        tally=sums.tally,
        ranges=dict(ranges or {}),
    )


def _groups(
    rows: Iterator[Row], sums: _Sums, labelled: bool, rows_per_group: int
) -> Iterator[tuple[list[bytes], list[int | None]]]:
    """Images and labels of one row group after the other, without the bad ones."""
    images: list[bytes] = []
    labels: list[int | None] = []
    num_bytes = 0
    for row in rows:
        if row.image is None:
            sums.bad.append((row.path, row.reason))
            continue
        if images and (len(images) >= rows_per_group or num_bytes + len(row.image) > _ROW_GROUP_BYTES):
            yield images, labels
            images, labels, num_bytes = [], [], 0
        # Hugging Face writes -1 for a label that is kept secret.
        label = row.label if labelled and row.label is not None and row.label >= 0 else None
        sums.add(row.image, label)
        images.append(row.image)
        labels.append(label)
        num_bytes += len(row.image)
    if images:
        yield images, labels


def _table(first: int, images: list[bytes], labels: list[int | None] | None) -> pa.Table:
    columns = {
        "index": pa.array(range(first, first + len(images)), pa.int64()),
        "image": pa.array(images, pa.binary()),
    }
    if labels is not None:
        columns["label"] = pa.array(labels, pa.int64())
    return pa.table(columns)


def _writer(stream: object, schema: pa.Schema) -> pq.ParquetWriter:
    # Small JPEG files share their headers: zstd makes CIFAR-10 three times smaller. Statistics of the images would
    # copy the largest into the footer.
    options = {"compression": "zstd", "use_dictionary": False, "write_statistics": ["index"]}
    return pq.ParquetWriter(stream, schema, **options)


def move(dest: Folder, written: Written, base: int) -> int:
    """Rewrites the index column of a shard so that it starts at `base`; returns the size of the shard.

    Raises:
        UserError: the shard cannot be read or written.
    """
    name = f"{SHARDS}/{_file(written.unit)}"
    try:
        with dest.open(name) as old, pq.ParquetFile(old) as file:
            if [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)] != list(
                written.row_groups
            ):
                raise UserError(f"The shard {dest}/{name} is not the one that was written. Delete {dest}.")
            with dest.writing(name) as stream, _writer(stream, file.schema_arrow) as writer:
                first = base
                for group, num_images in enumerate(written.row_groups):
                    index = pa.array(range(first, first + num_images), pa.int64())
                    table = file.read_row_group(group).set_column(0, "index", index)
                    writer.write_table(table, row_group_size=num_images)
                    first += num_images
                writer.close()
                return int(stream.tell())
    except (pa.ArrowInvalid, FileNotFoundError) as error:
        raise UserError(
            f"The shard {dest}/{name} is damaged: {error}. Delete {dest} and ingest again."
        ) from error

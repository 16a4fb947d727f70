"""Write one unit of a source as one shard: the work of a task.

Memory is bounded by one row group. A shard and then its record are written atomically, so a task may be killed and run
again at any time.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import pyarrow as pa
import pyarrow.parquet as pq

from raysl.dataset import SHARDS, Shard, parquet_writer
from raysl.dataset.clips import COLUMNS, TRUTH
from raysl.errors import UserError, explained
from raysl.ingestion.images import Tally, stored
from raysl.ingestion.labels import composed
from raysl.ingestion.sources import Row, UnitSize, in_units
from raysl.storage import Folder
from raysl.storage.parquet_parts import footer
from raysl.stream.pixels import DecodeConfig, Ranges

_ROW_GROUP_BYTES = 4 << 20


@dataclass(frozen=True)
class Written:
    """The result of a unit; a JSON value."""

    unit: int
    base: int  # index of its first image
    row_groups: tuple[int, ...]  # images in each; empty if none could be decoded: then there is no shard
    num_bytes: int
    checksum: int  # CRC-32 of the shard's footer
    digest: str  # hash of every image's label and bytes, in order
    labels: tuple[int, ...]  # of every image, an index of the classes; empty if the source has no labels
    unlabeled: str  # path of the first image without a label, if the source has labels
    bad: tuple[tuple[str, str], ...]  # path and reason of every image that could not be decoded
    tally: Tally = field(default_factory=dict)  # the images that are stored in another form than their files
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)  # by kind, what became 0 to 255
    with_sound: int = 0  # number of clips with sound

    @property
    def num_images(self) -> int:
        return sum(self.row_groups)

    @property
    def shard(self) -> Shard:
        return Shard(_file(self.unit), self.row_groups, self.num_bytes, self.checksum)


def _file(unit: int) -> str:
    return f"{unit:05d}.parquet"


def _hash_into(digest: hashlib.blake2b, group: list[Row], labels: list[int | None]) -> None:
    """Add the labels, the images and the clips of a row group to a hash."""
    for row, label in zip(group, labels, strict=True):
        image = row.image or b""
        digest.update(f"{label} {len(image)} ".encode())
        digest.update(image)
    for clip in (row.clip for row in group if row.clip):
        for part in (*clip["frames"], clip["sound"] or b"", repr(clip["times"]).encode()):
            digest.update(f"{len(part)} ".encode())
            digest.update(part)


def _table(group: list[Row], labels: list[int | None], first: int) -> pa.Table:
    columns = {
        "index": pa.array(range(first, first + len(group)), pa.int64()),
        "image": pa.array([row.image for row in group], pa.binary()),
        "path": pa.array([row.path for row in group], pa.string()),
    }
    if labels:
        columns["label"] = pa.array(labels, pa.int64())
    clips = [row.clip for row in group if row.clip]
    for name in clips[0] if clips else ():
        columns[name] = pa.array([clip[name] for clip in clips], (COLUMNS | TRUTH)[name])
    return pa.table(columns)


def _of_source(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield the rows of a source, and tell its errors from those of the destination, which is open meanwhile."""
    with explained("Cannot read the source", "The same command resumes from here.", OSError):
        yield from rows


def write(
    dest: Folder,
    unit: int,
    base: int,
    rows: Iterable[Row],
    *,
    decoding: DecodeConfig | None,
    classes: Sequence[str],
    rows_per_group: int,
    ranges: Ranges | None = None,
) -> Written:
    """Write the rows that hold an image as the shard of a unit.

    Args:
        base: index of the first image.
        decoding: how to decode every image and store those that are not ordinary; None stores all as they are.
        classes: names of the classes in label order; empty to write no labels.
        ranges: by kind of values, the range that becomes 0 to 255; see `raysl.ingestion.images.ranges_of`.
    """
    bad, sizes, labels = list[tuple[str, str]](), list[int](), list[int | None]()
    unlabeled, with_sound = "", 0
    numbers = {composed(name): number for number, name in enumerate(classes)}
    tally: Tally = {}
    digest = hashlib.blake2b(digest_size=16)
    rows = _of_source(rows)
    if decoding is not None:
        rows = chain.from_iterable(stored(row, decoding, ranges or {}, tally) for row in rows)
    name, writer = f"{SHARDS}/{_file(unit)}", None
    with dest.writing(name) as stream:
        for group in _groups(rows, bad, rows_per_group):
            of_group = [None if row.label is None else numbers.get(composed(row.label)) for row in group]
            _hash_into(digest, group, of_group)
            table = _table(group, of_group if classes else [], base + sum(sizes))
            writer = writer or parquet_writer(stream, table.schema)
            writer.write_table(table, row_group_size=len(group))
            sizes.append(len(group))
            labels += of_group
            with_sound += sum(row.clip is not None and row.clip["sound"] is not None for row in group)
            if classes and not unlabeled and None in of_group:
                unlabeled = group[of_group.index(None)].path
        if writer:
            writer.close()
        num_bytes = stream.tell()
    if not sizes:
        dest.delete(name)
    return Written(
        unit=unit,
        base=base,
        row_groups=tuple(sizes),
        num_bytes=num_bytes,
        checksum=_checksum(dest, name) if sizes else 0,
        digest=digest.hexdigest(),
        labels=() if unlabeled or not classes else tuple(label for label in labels if label is not None),
        unlabeled=unlabeled,
        bad=tuple(bad),
        tally=tally,
        ranges=dict(ranges or {}),
        with_sound=with_sound,
    )


def _groups(rows: Iterable[Row], bad: list[tuple[str, str]], rows_per_group: int) -> Iterator[list[Row]]:
    """Return one row group after the other; rows without an image are added to `bad`."""

    def with_image() -> Iterator[Row]:
        for row in rows:
            if row.image is None:
                bad.append((row.path, row.reason))
            else:
                yield row

    size = UnitSize(rows_per_group, _ROW_GROUP_BYTES)
    return in_units(with_image(), size, lambda row: (1, _num_bytes(row)))


def _num_bytes(row: Row) -> int:
    of_clip = sum(map(len, row.clip["frames"])) + len(row.clip["sound"] or b"") if row.clip else 0
    return len(row.image or b"") + of_clip


def _checksum(dest: Folder, name: str) -> int:
    with dest.open(name) as stream:
        return zlib.crc32(footer(stream))


def move(dest: Folder, written: Written, base: int) -> Written:
    """Rewrite the index column of a shard so that it starts at `base`."""
    name = f"{SHARDS}/{_file(written.unit)}"
    what, remedy = f"The shard {dest}/{name} is damaged", f"Delete {dest} and ingest again."
    with explained(what, remedy, pa.ArrowException, FileNotFoundError):
        with dest.open(name) as old, pq.ParquetFile(old, page_checksum_verification=True) as file:
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            if sizes != list(written.row_groups):
                raise UserError(f"The shard {dest}/{name} is not the one that was written. Delete {dest}.")
            with dest.writing(name) as stream, parquet_writer(stream, file.schema_arrow) as writer:
                first = base
                for group, num_images in enumerate(written.row_groups):
                    index = pa.array(range(first, first + num_images), pa.int64())
                    table = file.read_row_group(group).set_column(0, "index", index)
                    writer.write_table(table, row_group_size=num_images)
                    first += num_images
                writer.close()
                num_bytes = int(stream.tell())
    return replace(written, base=base, num_bytes=num_bytes, checksum=_checksum(dest, name))

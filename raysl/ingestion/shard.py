"""Write one unit of a source as one shard: the work of a task.

Memory is bounded by one row group. A shard and then its record are written atomically, so a task may be killed and run
again at any time.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raysl.dataset import SHARDS, Shard, parquet_writer
from raysl.dataset.clips import COLUMNS, TRUTH
from raysl.errors import UserError
from raysl.ingestion.images import Tally, stored
from raysl.ingestion.sources import Row
from raysl.storage import Folder
from raysl.storage.parquet_parts import footer
from raysl.stream.pixels import DecodeConfig, Ranges

_ROW_GROUP_BYTES = 4 << 20


@dataclass(frozen=True)
class Written:
    """The result of a unit; a JSON value.

    Args:
        unit: its number.
        base: index of its first image.
        row_groups: images in every row group; empty if no image could be decoded, and then there is no shard.
        num_bytes: size of the shard.
        checksum: CRC-32 of the shard's footer.
        digest: hash of every image's label and bytes, in order.
        labels: label of every image, an index of the classes; empty if the source has no labels.
        unlabelled: path of the first image without a label, if the source has labels.
        bad: (path, reason) of every image that could not be decoded.
        tally: the images that are stored in another form than their files.
        ranges: by kind of values, the range that became 0 to 255.
        with_sound: number of clips with sound.
    """

    unit: int
    base: int
    row_groups: tuple[int, ...]
    num_bytes: int
    checksum: int
    digest: str
    labels: tuple[int, ...]
    unlabelled: str
    bad: tuple[tuple[str, str], ...]
    tally: Tally = field(default_factory=dict)
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    with_sound: int = 0

    @property
    def num_images(self) -> int:
        return sum(self.row_groups)

    @property
    def shard(self) -> Shard:
        return Shard(_file(self.unit), self.row_groups, self.num_bytes, self.checksum)


def _file(unit: int) -> str:
    return f"{unit:05d}.parquet"


@dataclass
class _Group:
    """Images of the row group that is being collected."""

    images: list[bytes] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    labels: list[int | None] = field(default_factory=list)
    clips: list[Mapping[str, Any]] = field(default_factory=list)
    num_bytes: int = 0

    @property
    def first_unlabelled(self) -> str:
        return next((p for p, label in zip(self.paths, self.labels, strict=True) if label is None), "")

    def hash_into(self, digest: hashlib.blake2b) -> None:
        """Add the labels, the images and the clips to a hash."""
        for image, label in zip(self.images, self.labels, strict=True):
            digest.update(f"{label} {len(image)} ".encode())
            digest.update(image)
        for clip in self.clips:
            for part in (*clip["frames"], clip["sound"] or b"", repr(clip["times"]).encode()):
                digest.update(f"{len(part)} ".encode())
                digest.update(part)

    def table(self, first: int, labelled: bool) -> pa.Table:
        columns = {
            "index": pa.array(range(first, first + len(self.images)), pa.int64()),
            "image": pa.array(self.images, pa.binary()),
            "path": pa.array(self.paths, pa.string()),
        }
        if labelled:
            columns["label"] = pa.array(self.labels, pa.int64())
        for name in self.clips[0] if self.clips else ():
            kind = (COLUMNS | TRUTH)[name]
            columns[name] = pa.array([clip[name] for clip in self.clips], kind)
        return pa.table(columns)


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

    Raises:
        UserError: the shard cannot be written, or the source is damaged.
    """
    bad, sizes = list[tuple[str, str]](), list[int]()
    labels: list[int | None] = []
    unlabelled, with_sound = "", 0
    numbers = {name: number for number, name in enumerate(classes)}
    tally: Tally = {}
    digest = hashlib.blake2b(digest_size=16)
    if decoding is not None:
        rows = chain.from_iterable(stored(row, decoding, ranges or {}, tally) for row in rows)
    name, writer = f"{SHARDS}/{_file(unit)}", None
    with dest.writing(name) as stream:
        for group in _groups(rows, bad, numbers, rows_per_group):
            group.hash_into(digest)
            table = group.table(base + sum(sizes), bool(classes))
            writer = writer or parquet_writer(stream, table.schema)
            writer.write_table(table, row_group_size=table.num_rows)
            sizes.append(table.num_rows)
            labels += group.labels
            with_sound += sum(clip["sound"] is not None for clip in group.clips)
            unlabelled = unlabelled or group.first_unlabelled
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
        labels=() if unlabelled or not classes else tuple(label for label in labels if label is not None),
        unlabelled=unlabelled if classes else "",
        bad=tuple(bad),
        tally=tally,
        ranges=dict(ranges or {}),
        with_sound=with_sound,
    )


def _groups(
    rows: Iterable[Row], bad: list[tuple[str, str]], numbers: Mapping[str, int], rows_per_group: int
) -> Iterator[_Group]:
    """Yield one row group after the other; rows without an image are added to `bad`."""
    group = _Group()
    for row in rows:
        if row.image is None:
            bad.append((row.path, row.reason))
            continue
        num_bytes = len(row.image) + (_clip_bytes(row.clip) if row.clip else 0)
        full = len(group.images) >= rows_per_group or group.num_bytes + num_bytes > _ROW_GROUP_BYTES
        if group.images and full:
            yield group
            group = _Group()
        group.images.append(row.image)
        group.paths.append(row.path)
        group.labels.append(None if row.label is None else numbers.get(row.label))
        group.num_bytes += num_bytes
        if row.clip:
            group.clips.append(row.clip)
    if group.images:
        yield group


def _clip_bytes(clip: Mapping[str, Any]) -> int:
    return sum(map(len, clip["frames"])) + len(clip["sound"] or b"")


def _checksum(dest: Folder, name: str) -> int:
    with dest.open(name) as stream:
        return zlib.crc32(footer(stream))


def move(dest: Folder, written: Written, base: int) -> Written:
    """Rewrite the index column of a shard so that it starts at `base`.

    Raises:
        UserError: the shard cannot be read or written.
    """
    name = f"{SHARDS}/{_file(written.unit)}"
    try:
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
    except (pa.ArrowException, FileNotFoundError) as error:
        raise UserError(
            f"The shard {dest}/{name} is damaged: {error}. Delete {dest} and ingest again."
        ) from error
    return replace(written, base=base, num_bytes=num_bytes, checksum=_checksum(dest, name))

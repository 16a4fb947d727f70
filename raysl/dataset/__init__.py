"""The indexed data set: Parquet shards and a manifest that says which index lies in which shard.

A data set is a folder at any URI:

    manifest.json           written last; a folder without it is not a data set
    labels.parquet          column label (int32): the label of every image, in index order; absent without labels
    bad_images.jsonl        one line for each source image that could not be decoded: its path and the reason
    shards/NNNNN.parquet    columns index (int64), image (encoded bytes), path (string), label (int64, optional); for
                            clips also those of `raysl.dataset.clips`

Indices are 0 .. N-1 in the order of the shards and are fixed before any shuffle. The memory bank, cluster labels and
the position in the stream all refer to them, so nothing downstream counts images again.

Every page of a shard carries a CRC-32, which Parquet checks whenever the page is read. The checksums of the footers and
of the labels are in the manifest. A flipped bit is therefore an error that names the file.
"""

from __future__ import annotations

import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raysl.errors import UserError, counted
from raysl.storage import Folder
from raysl.storage.parquet_parts import Parts, metadata, spans
from raysl.storage.records import verified, verified_lines, write_record

MANIFEST = "manifest.json"
BAD_IMAGES = "bad_images.jsonl"
LABELS = "labels.parquet"
SHARDS = "shards"
# Name of a folder in the cache of ingested sources; see `raysl.ingestion.cache`.
CACHED = re.compile(r".*-[0-9a-f]{16}")
FORMAT = 1
# Row groups of one shard that are read at a time; more would hold many images twice in memory.
_GROUPS_AT_ONCE = 16
# Requests to a remote store at a time.
_REQUESTS_AT_ONCE = 16
# If row groups hold at least this many bytes for each run of consecutive rows, these rows are not copied.
_COPIED_BYTES = 32768
# `take` copies row groups into one array, in which Arrow's offsets of 32 bits end here.
_LARGEST_COPY = (1 << 31) - 1


@dataclass(frozen=True)
class Rows:
    """Rows of a data set to be read together: their indices and the epoch in which each is read, int64 (b,)."""

    indices_b: NDArray[np.int64]
    epochs_b: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices_b)


@dataclass(frozen=True)
class Shard:
    """A Parquet file in `shards/`, with the number of images in each row group and the CRC-32 of its footer, which is
    None in data sets written before raysl 0.2.
    """

    file: str
    row_groups: tuple[int, ...]
    num_bytes: int
    checksum: int | None = None

    @staticmethod
    def from_json(value: dict[str, Any]) -> Shard:
        groups = tuple(map(int, value["row_groups"]))
        return Shard(str(value["file"]), groups, int(value["num_bytes"]), value.get("checksum"))

    @property
    def num_images(self) -> int:
        return sum(self.row_groups)


@dataclass(frozen=True)
class Manifest:
    """The content of a data set.

    The fingerprint is a hash of every image's bytes and label, in order: two data sets with the same fingerprint hold
    the same images under the same indices. `decoding` says how the image files were decoded: the configuration, the
    range of values of each kind that has one, and how many images are stored in another form than their files.
    """

    source: str  # as the user named it
    shards: tuple[Shard, ...]
    classes: tuple[str, ...]  # names in label order; empty if the images have no labels
    fingerprint: str
    num_bad: int  # images of the source that could not be decoded; bad_images.jsonl lists them
    format: int = FORMAT
    decoding: dict[str, Any] = field(default_factory=dict)
    labels_checksum: int | None = None  # CRC-32; None without labels, or if written before raysl 0.2
    clips: dict[str, Any] = field(default_factory=dict)  # of clips, with the names of their "columns"
    stamp: str = ""  # of the source when it was listed; "" if it is not known

    @property
    def num_images(self) -> int:
        return sum(shard.num_images for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> Manifest:
        """Parse a manifest. Raises KeyError, TypeError or ValueError if a field is missing or malformed."""
        return Manifest(
            source=str(value["source"]),
            shards=tuple(map(Shard.from_json, value["shards"])),
            classes=tuple(map(str, value["classes"])),
            fingerprint=str(value["fingerprint"]),
            num_bad=int(value["num_bad"]),
            format=int(value["format"]),
            decoding=dict(value.get("decoding", {})),
            labels_checksum=value.get("labels_checksum"),
            clips=dict(value.get("clips", {})),
            stamp=str(value.get("stamp", "")),
        )


@dataclass(frozen=True)
class DataSet:
    """An opened data set. Small and picklable: it holds the manifest but no images."""

    folder: Folder
    manifest: Manifest

    def __repr__(self) -> str:
        classes = f" in {counted(len(self.manifest.classes), 'class')}" if self.manifest.classes else ""
        return f"DataSet({str(self.folder)!r}: {self.size_text}{classes})"

    @property
    def size_text(self) -> str:
        """The number of images or clips as text, such as "24 clips"."""
        return counted(self.num_images, "clip" if self.manifest.clips else "image")

    @staticmethod
    def exists_at(uri: str) -> bool:
        """Return True if there is a finished data set at `uri`. A URI with "#SPLIT" behind it names a source."""
        folder = Folder(uri)
        return (folder.is_local or "#" not in str(folder).rpartition("/")[2]) and folder.exists(MANIFEST)

    @staticmethod
    def open(uri: str) -> DataSet:
        """Open the data set at `uri`.

        Raises:
            UserError: there is no finished data set, its manifest is damaged, or a shard is missing.
        """
        folder = Folder(uri)
        try:
            manifest = Manifest.from_json(verified(folder.read_json(MANIFEST)))
        except FileNotFoundError as error:
            raise UserError(
                f"No data set at {uri!r}: there is no {MANIFEST} in it. Make one with `raysl ingest SOURCE {uri}`; "
                "an ingest that was interrupted is completed by running it again."
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"The manifest of the data set at {uri!r} is damaged ({type(error).__name__}: {error}). Delete the "
                f"folder and ingest again from the source."
            ) from error
        if manifest.format != FORMAT:
            raise UserError(
                f"The data set at {uri!r} has layout {manifest.format} and this raysl reads layout {FORMAT}. Ingest "
                "the source again with this version."
            )
        missing = sorted({shard.file for shard in manifest.shards} - set((folder / SHARDS).list()))
        if missing:
            raise UserError(
                f"The data set at {uri!r} lacks {len(missing)} of its {len(manifest.shards)} shards, the first being "
                f"{missing[0]!r}. Restore the files, or delete the folder and ingest again."
            )
        return DataSet(folder, manifest)

    @staticmethod
    def create(folder: Folder, manifest: Manifest, labels: Iterable[NDArray[np.int64]]) -> DataSet:
        """Complete a data set whose shards are written, and open it.

        Args:
            labels: int64 arrays that together hold the label of every image; ignored without classes.
        """
        if manifest.classes:
            column = np.concatenate([part.astype(np.int32) for part in labels])
            stream = io.BytesIO()
            pq.write_table(pa.table({"label": column}), stream, compression="zstd")
            folder.write(LABELS, stream.getvalue())
            manifest = replace(manifest, labels_checksum=zlib.crc32(stream.getvalue()))
        write_record(folder, MANIFEST, manifest.to_json())
        return DataSet.open(str(folder))

    @property
    def name(self) -> str:
        """What messages call the data set: its folder, or its source if raysl chose the folder, in the cache."""
        in_cache = CACHED.fullmatch(self.folder.uri.rpartition("/")[2])
        return self.manifest.source if in_cache else str(self.folder)

    @property
    def num_images(self) -> int:
        return self.manifest.num_images

    @property
    def has_labels(self) -> bool:
        return bool(self.manifest.classes)

    @cached_property
    def row_group_starts(self) -> NDArray[np.int64]:
        """int64 (groups + 1,): the first index of every row group, and the number of images at the end."""
        sizes = [n for shard in self.manifest.shards for n in shard.row_groups]
        return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    @cached_property
    def _shard_starts(self) -> NDArray[np.int64]:
        """int64 (shards + 1,): the number of the first row group of every shard, and of all row groups."""
        sizes = [len(shard.row_groups) for shard in self.manifest.shards]
        return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    def read(self, indices: NDArray[np.int64], columns: Sequence[str] = ("image", "label")) -> pa.Table:
        """Return rows in the order of `indices`. Each row group that holds one of them is read once.

        Args:
            indices: int64 (b,), each in 0 .. num_images - 1; an index may occur more than once.
            columns: of "image", "path" and "label", and for clips those of `raysl.dataset.clips`; "label" is left out
                if the images have none. "index" always comes first.

        Returns:
            A table with b rows. Large rows are no copies: the table then keeps their row groups in memory.

        Raises:
            UserError: a shard is damaged, or is not the one that the manifest describes.
            StorageError: a shard cannot be read.
        """
        if not len(indices):
            raise ValueError("read() needs at least one index")
        groups = np.searchsorted(self.row_group_starts, indices, side="right") - 1
        needed, group_of = np.unique(groups, return_inverse=True)
        parts = list(self._row_groups(needed, columns))
        starts = np.cumsum([0, *(part.num_rows for part in parts)])[:-1]
        offsets = starts[group_of] + indices - self.row_group_starts[groups]
        table = pa.concat_tables(parts)
        edges = np.flatnonzero(np.diff(offsets) != 1) + 1
        if table.nbytes < min(_COPIED_BYTES * (len(edges) + 1), _LARGEST_COPY):
            return table.take(pa.array(offsets))
        # `take` copies all row groups first, which for photos takes longer than to read them.
        return pa.concat_tables([table.slice(int(run[0]), len(run)) for run in np.split(offsets, edges)])

    def _row_groups(self, groups: NDArray[np.int64], columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yield the content of row groups, given in ascending order."""
        shards = np.searchsorted(self._shard_starts, groups, side="right") - 1
        pieces: list[tuple[int, NDArray[np.int64]]] = []
        for number in np.unique(shards):
            inside = groups[shards == number]
            # A remote store is read at several places at the same time.
            gaps = np.flatnonzero((np.diff(inside) > 1) & (not self.folder.is_local))
            for part in np.split(inside, gaps + 1):
                starts = range(0, len(part), _GROUPS_AT_ONCE)
                pieces += [(int(number), part[start : start + _GROUPS_AT_ONCE]) for start in starts]
        if self.folder.is_local:
            for number, part in pieces:
                yield from self._read_shard(number, part, columns)
            return
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
            # The footers first, so that no two threads ask for the same one.
            list(pool.map(self._metadata, np.unique(shards).tolist()))
            for tables in pool.map(lambda piece: list(self._read_shard(piece[0], piece[1], columns)), pieces):
                yield from tables

    def _metadata(self, number: int) -> pq.FileMetaData:
        shard = self.manifest.shards[number]
        try:
            found = metadata(self.folder / SHARDS, shard.file, shard.num_bytes, shard.checksum)
            sizes = tuple(found.row_group(group).num_rows for group in range(found.num_row_groups))
            if sizes != shard.row_groups:
                raise ValueError(f"it has {len(sizes)} row groups of other sizes than the manifest says")
            return found
        except (pa.ArrowException, ValueError) as error:
            raise self._damaged(shard.file, str(error)) from error

    def _read_shard(
        self, number: int, groups: NDArray[np.int64], columns: Sequence[str]
    ) -> Iterator[pa.Table]:
        """Yield the content of row groups of one shard, read with one request for neighboring ones."""
        shard = self.manifest.shards[number]
        wanted = ["index", *(name for name in columns if name != "label" or self.has_labels)]
        footer = self._metadata(number)
        stored = footer.schema.to_arrow_schema().names
        present = [name for name in wanted if name in stored]
        inside = (groups - self._shard_starts[number]).tolist()
        ranges = spans(footer, inside, present)
        contents = (self.folder / SHARDS).read_ranges(shard.file, ranges)
        parts = [(start, content) for (start, _), content in zip(ranges, contents, strict=True)]
        known = Parts(shard.num_bytes, parts)
        try:
            file = pq.ParquetFile(known, metadata=footer, page_checksum_verification=True)
            table = file.read_row_groups(inside, columns=present).select(present)
        except (OSError, pa.ArrowException, ValueError, KeyError) as error:
            raise self._damaged(shard.file, str(error)) from error
        row = 0
        for group in groups:
            first, end = (int(edge) for edge in self.row_group_starts[group : group + 2])
            part = table.slice(row, end - first)
            row += end - first
            found = part.column("index")[0].as_py()
            if found != first:
                raise self._damaged(shard.file, f"a row group starts at index {found} and not at {first}")
            if "path" in wanted and "path" not in present:
                # Data sets written before raysl 0.2 have no paths.
                part = part.append_column("path", part.column("index").cast(pa.string())).select(wanted)
            yield part

    def labels(self) -> NDArray[np.int64]:
        """Return the label of every image: int64 (n,). Raises UserError if there are none, or if a file is damaged."""
        if not self.has_labels:
            raise UserError(
                f"The data set {self.name!r} has no labels, and this command needs them. Give a data set whose "
                "source names classes, such as one folder per class."
            )
        if self.manifest.labels_checksum is None:
            return self._column("label").to_numpy().astype(np.int64)  # type: ignore[no-any-return]
        try:
            data = self.folder.read(LABELS)
        except FileNotFoundError:
            data = b""
        if zlib.crc32(data) != self.manifest.labels_checksum:
            raise UserError(
                f"The labels {str(self.folder / LABELS)!r} are {'damaged' if data else 'missing'}. Restore the file, "
                "or delete the data set and ingest its source again: the same images get the same indices."
            )
        return pq.read_table(io.BytesIO(data)).column("label").to_numpy().astype(np.int64)  # type: ignore[no-any-return]

    def paths(self, indices: NDArray[np.int64] | None = None) -> list[str]:
        """Return the path of every image in its source, or its key in an archive or a table.

        Args:
            indices: int64 (b,), as for `read`; None for all images, in index order.
        """
        column = self._column("path") if indices is None else self.read(indices, ("path",)).column("path")
        return column.to_pylist()  # type: ignore[no-any-return]

    def _column(self, name: str) -> pa.ChunkedArray:
        groups = np.arange(len(self.row_group_starts) - 1, dtype=np.int64)
        return pa.concat_tables(list(self._row_groups(groups, (name,)))).column(name)

    def _damaged(self, name: str, why: str) -> UserError:
        return UserError(
            f"Shard {name!r} of the data set at {str(self.folder)!r} is damaged: {why}. Restore the file, or delete "
            "the data set and ingest its source again: the same images get the same indices."
        )

    def bad_images(self) -> list[dict[str, str]]:
        """Return {"path", "reason"} for every source image that could not be decoded."""
        try:
            return [json.loads(line) for line in verified_lines(self.folder.read(BAD_IMAGES).splitlines())]
        except FileNotFoundError:
            return []
        except ValueError as error:
            raise UserError(
                f"The file {self.folder}/{BAD_IMAGES} is damaged: {error}. Delete it, or ingest the source again; the "
                "images do not depend on it."
            ) from error


def parquet_writer(stream: object, schema: pa.Schema) -> pq.ParquetWriter:
    """Open a shard for writing."""
    # Small JPEG files share their headers: zstd makes CIFAR-10 three times smaller. Statistics of the images would
    # copy the largest into the footer.
    settings = {"use_dictionary": False, "write_statistics": ["index"], "write_page_checksum": True}
    return pq.ParquetWriter(stream, schema, compression="zstd", **settings)

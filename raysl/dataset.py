"""The indexed data set: Parquet shards and a manifest that says which index lies where.

A data set is a folder at any URI:

    manifest.json           written last; a folder without it is not a data set
    bad_images.jsonl        one line for each source image that could not be decoded: where it was, and why
    shards/NNNNN.parquet    columns index (int64), image (encoded bytes), label (int64, optional)

Indices are 0 .. N-1 in the order of the shards and were given before any shuffle. The memory bank, cluster labels
and the position in the stream all hang on them, so nothing downstream ever counts images again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from raysl.errors import UserError
from raysl.storage import Folder

MANIFEST = "manifest.json"
LEDGER = "bad_images.jsonl"
SHARDS = "shards"
FORMAT = 1


@dataclass(frozen=True)
class Shard:
    """One Parquet file of the data set.

    Args:
        file: name inside `shards/`.
        row_groups: number of images in each row group, in order.
        num_bytes: size of the file.
    """

    file: str
    row_groups: tuple[int, ...]
    num_bytes: int

    @property
    def num_images(self) -> int:
        return sum(self.row_groups)


@dataclass(frozen=True)
class Manifest:
    """What a data set holds.

    Args:
        source: what was ingested, as the user named it.
        shards: in index order.
        classes: names of the classes in label order; empty when the images have no labels.
        fingerprint: hash of every image's bytes and label, in order. Two data sets with one fingerprint hold
            the same images under the same indices.
        num_bad: images of the source that could not be decoded and are listed in the ledger.
        format: version of this layout.
        decoding: how the image files were decoded: the configuration, the range of values of each kind that has one,
            and how many images are stored in another form than their files; a JSON value.
    """

    source: str
    shards: tuple[Shard, ...]
    classes: tuple[str, ...]
    fingerprint: str
    num_bad: int
    format: int = FORMAT
    decoding: dict[str, Any] = field(default_factory=dict)

    @property
    def num_images(self) -> int:
        return sum(shard.num_images for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    def to_json(self) -> dict[str, Any]:
        """A JSON value that `from_json` turns back into an equal manifest."""
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> Manifest:
        """Raises KeyError or TypeError when a field is missing or of another kind."""
        shards = tuple(
            Shard(str(s["file"]), tuple(int(n) for n in s["row_groups"]), int(s["num_bytes"]))
            for s in value["shards"]
        )
        return Manifest(
            source=str(value["source"]),
            shards=shards,
            classes=tuple(str(name) for name in value["classes"]),
            fingerprint=str(value["fingerprint"]),
            num_bad=int(value["num_bad"]),
            format=int(value["format"]),
            decoding=dict(value.get("decoding", {})),
        )


@dataclass(frozen=True)
class DataSet:
    """An opened data set. Small and picklable: it holds the manifest and not the images."""

    folder: Folder
    manifest: Manifest

    @staticmethod
    def is_one(uri: str) -> bool:
        """Whether a finished data set lies at `uri`."""
        return Folder(uri).exists(MANIFEST)

    @staticmethod
    def open(uri: str) -> DataSet:
        """Opens the data set at `uri`.

        Raises:
            UserError: there is no finished data set, its manifest is damaged, or a shard is missing.
        """
        folder = Folder(uri)
        try:
            manifest = Manifest.from_json(folder.read_json(MANIFEST))
        except FileNotFoundError as error:
            raise UserError(
                f"No data set at {uri!r}: there is no {MANIFEST} in it. Make one with `raysl ingest SOURCE {uri}`; "
                "an ingest that was interrupted is completed by running it again."
            ) from error
        except OSError as error:
            raise UserError(
                f"Cannot read the data set at {uri!r}: {error}. Check the place and your access."
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

    @property
    def num_images(self) -> int:
        return self.manifest.num_images

    @property
    def has_labels(self) -> bool:
        return bool(self.manifest.classes)

    @cached_property
    def row_group_starts(self) -> npt.NDArray[np.int64]:
        """int64 (groups + 1,): the first index of every row group, and the number of images at the end."""
        sizes = [n for shard in self.manifest.shards for n in shard.row_groups]
        return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    @cached_property
    def _shard_of_group(self) -> list[tuple[int, int]]:
        """For every row group of the data set: its shard, and its number inside that shard."""
        return [(s, g) for s, shard in enumerate(self.manifest.shards) for g in range(len(shard.row_groups))]

    def read(self, indices: npt.NDArray[np.int64], columns: Sequence[str] = ("image", "label")) -> pa.Table:
        """Rows in the order of `indices`; reads each row group that holds one of them once.

        Args:
            indices: int64 (b,), each in 0 .. num_images - 1; an index may occur more than once.
            columns: of "image" and "label"; "label" is left out when the images have none. "index" always comes.

        Returns:
            A table with b rows.

        Raises:
            UserError: a shard is damaged, or is not the one that the manifest describes.
        """
        groups = np.searchsorted(self.row_group_starts, indices, side="right") - 1
        wanted = ["index", *(c for c in columns if c != "label" or self.has_labels)]
        parts: list[pa.Table] = []
        starts: dict[int, int] = {}
        open_shard, file = -1, None
        rows = 0
        for group in np.unique(groups):
            shard, inside = self._shard_of_group[group]
            name = self.manifest.shards[shard].file
            try:
                if shard != open_shard:
                    open_shard, file = shard, pq.ParquetFile((self.folder / SHARDS).open(name))
                assert file is not None
                part = file.read_row_group(inside, columns=wanted)
                first = part.column("index")[0].as_py()
            except (OSError, pa.ArrowException, IndexError) as error:
                raise self._damaged(name, str(error)) from error
            expected = int(self.row_group_starts[group])
            if first != expected or part.num_rows != int(self.row_group_starts[group + 1]) - expected:
                raise self._damaged(name, f"row group {inside} starts at index {first} and not at {expected}")
            starts[int(group)] = rows - expected
            rows += part.num_rows
            parts.append(part)
        if not parts:
            raise ValueError("read() needs at least one index")
        offsets = np.array([starts[int(g)] for g in groups], dtype=np.int64) + indices
        return pa.concat_tables(parts).take(pa.array(offsets))

    def labels(self) -> npt.NDArray[np.int64]:
        """int64 (n,): the label of every image.

        Raises:
            UserError: the data set has none, or a shard is damaged.
        """
        if not self.has_labels:
            raise UserError(
                f"The data set at {str(self.folder)!r} has no labels, and here they are needed. Give a data set whose "
                "source names classes, such as one folder per class."
            )
        column = self.read(np.arange(self.num_images, dtype=np.int64), ("label",)).column("label")
        return column.to_numpy().astype(np.int64)  # type: ignore[no-any-return]

    def _damaged(self, name: str, why: str) -> UserError:
        return UserError(
            f"Shard {name!r} of the data set at {str(self.folder)!r} is damaged: {why}. Restore the file, or delete "
            "the data set and ingest its source again: the same images get the same indices."
        )

    def bad_images(self) -> list[dict[str, str]]:
        """The ledger: {"path", "reason"} for every source image that could not be decoded."""
        if not self.folder.exists(LEDGER):
            return []
        return [json.loads(line) for line in self.folder.read(LEDGER).splitlines()]

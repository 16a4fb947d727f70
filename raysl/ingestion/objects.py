"""Sources that are Python objects: images in memory, lists of files, data sets of torch, pandas, Hugging Face and Ray.

Their rows are written as one Parquet file into the destination, where every machine sees it, and that is ingested.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from raysl.errors import UserError, counted, explained
from raysl.ingestion import in_memory, png, tables
from raysl.ingestion.found import names_checked, printable
from raysl.ingestion.pixel_files import is_pixels
from raysl.ingestion.sources import Opened, ReadConfig, SourceLocation, open_source
from raysl.storage import Folder

_log = logging.getLogger("raysl.ingestion")

FOLDER = "_source"
_FILE = "rows.parquet"
_BATCH_ROWS = 256
_LINE_EVERY_S = 5.0
# A column of Hugging Face's images.
_FILES = pa.struct({"bytes": pa.binary(), "path": pa.string()})


@dataclass
class ObjectRows:
    """The rows of an object, not yet read."""

    name: str  # names the object for the user, as "a list of 12 files"
    tables: Iterable[pa.Table]  # the rows, some at a time; equal for equal objects

    @staticmethod
    def of(source: Any, given: Any, config: ReadConfig) -> ObjectRows:
        """Return the rows of an object.

        Args:
            source: a uint8 array (n, h, w) or (n, h, w, 3), or a uint8 tensor (n, h, w) or (n, 3, h, w), also as
                (images, labels); a sequence with a length, such as a list or a data set of torch, of which each item is
                an image (of PIL, a uint8 array or tensor, or the bytes of a file) or the path of one, or a tuple of one
                of these and a label; or a `pandas.DataFrame`, a `pyarrow.Table`, a `datasets.Dataset` or a
                `ray.data.Dataset` with a column of encoded images or of paths, in the last also of pixels (uint8).
            given: a label for each image of an array or a sequence; None if the object itself tells them, or has none.
            config: how the rows are read.

        Raises:
            UserError: the object is of another kind, or names local files that do not exist.
        """
        if given is None and _is_with_labels(source):
            source, given = source
        kind = f"{type(source).__module__.partition('.')[0]}.{type(source).__name__}"
        made = _of_table(source, kind, config)
        if made is not None and given is not None:
            raise UserError(
                f"labels= is given with a {kind}, which has a column of labels itself. Leave labels= out, or add them "
                "to it as a column."
            )
        return made or _of_images(source, kind, given, config)

    def opened(self, dest: Folder, config: ReadConfig) -> Opened:
        """Write the rows into the destination of an ingest, and open them as a source; its files may lie anywhere.

        Raises UserError if there are no rows, or one of them holds no image.
        """
        state, writer = _Hashing(), None
        try:
            with (dest / FOLDER).writing(_FILE) as stream:
                for table in self._shown():
                    if writer is None:
                        writer = pq.ParquetWriter(stream, table.schema, use_dictionary=False)
                        hashed = pa.ipc.new_stream(pa.PythonFile(state, "w"), table.schema)
                    table = table.cast(writer.schema)
                    writer.write_table(table, row_group_size=_BATCH_ROWS)
                    hashed.write_table(table)
                if writer:
                    writer.close()
            if writer is None:
                raise UserError(f"The source, {self.name}, is empty. Give at least one image.")
            location = SourceLocation(str(dest / FOLDER / _FILE), config=replace(config, follow_links=True))
            return open_source(replace(location, called=self.name, state=state.digest.hexdigest()))
        except UserError:
            dest.delete(FOLDER)
            raise

    def _shown(self) -> Iterator[pa.Table]:
        """Yield the tables, and log now and then how far they are: a data set of torch decodes each image."""
        start_s = line_s = time.monotonic()
        done = 0
        for table in self.tables:
            yield table
            done, now_s = done + table.num_rows, time.monotonic()
            if now_s - line_s > _LINE_EVERY_S:
                line_s = now_s
                rate = done / max(now_s - start_s, 1e-9)
                _log.info("Reading %s: %s images so far, %s images/s", self.name, f"{done:,}", f"{rate:,.0f}")


class _Hashing(io.RawIOBase):
    """A file that keeps only the hash of what is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.digest = hashlib.blake2b(digest_size=16)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return len(data)


def _is_with_labels(source: Any) -> bool:
    """Return True for (images, labels), of which the first is an array of many images."""
    if not isinstance(source, tuple) or len(source) != 2 or not is_pixels(source[0]):
        return False
    is_list = isinstance(source[1], list) or getattr(source[1], "ndim", 0) == 1
    return is_list and source[0].ndim > 2


def _of_table(source: Any, kind: str, config: ReadConfig) -> ObjectRows | None:
    """Return the rows of an object with columns; None for any other."""
    if hasattr(source, "with_format") and hasattr(source, "features"):
        batches = source.with_format("arrow").iter(_BATCH_ROWS)
        if source.features:  # They hold the names of the classes.
            about = source.features.arrow_schema.metadata
            batches = (batch.replace_schema_metadata(about) for batch in batches)
        count = f" of {counted(len(source), 'row')}" if hasattr(source, "__len__") else ""
        return ObjectRows(f"{kind}{count}", batches)
    if hasattr(source, "iter_batches") and hasattr(source, "map_batches"):
        batches = source.iter_batches(batch_size=_BATCH_ROWS, batch_format="pyarrow")
        return ObjectRows(kind, map(_encoded, batches))
    if hasattr(source, "iloc") and hasattr(source, "columns"):
        name = f"{kind} of {counted(len(source), 'row')}"
        return ObjectRows(name, _of_frame(source, name, config))
    if hasattr(source, "to_pandas") and hasattr(source, "columns"):  # Such as a table of pyarrow.
        return _of_table(source.to_pandas(), kind, config)
    return None


def _of_images(source: Any, kind: str, given: Any, config: ReadConfig) -> ObjectRows:
    """Return the rows of an array or a sequence of images or of files."""
    if isinstance(source, Mapping):
        key = next(iter(source), "")
        raise UserError(f"The source is of the type {kind}. Give one of its values, as in source[{key!r}].")
    if not is_pixels(source) and hasattr(source, "tolist"):
        source = source.tolist()  # A column of pandas.
    elif isinstance(source, np.ndarray) and source.dtype.kind in "OUS":
        source = source.tolist()
    if is_pixels(source):
        return ObjectRows(*in_memory.of_stack(source, given))
    is_sequence = (
        hasattr(source, "__getitem__") and isinstance(source, Sized) and not isinstance(source, type)
    )
    if not is_sequence or isinstance(source, str | bytes | Image.Image):
        raise UserError(
            f"The source is of the type {kind}. Give a path, an array (n, h, w, 3), a list or a data set of torch with "
            "images, files or pairs of one and its label, a pandas.DataFrame, a pyarrow.Table, a "
            "datasets.Dataset or a ray.data.Dataset."
        )
    count, is_list = len(source), isinstance(source, list | tuple)
    first = in_memory.item(source, 0, kind) if count else in_memory.Item("", None, False)
    if isinstance(first.image, str | os.PathLike):
        name = f"a list of {counted(count, 'file')}"
        items = [in_memory.item(source, number, kind) for number in range(count)]
        if given is not None:
            if (twice := next((i for i, one in enumerate(items) if one.has_label), None)) is not None:
                raise in_memory.labeled_twice(name, twice)
            told = in_memory.label_list(given, count, "the files")
            items = [one._replace(label=label) for one, label in zip(items, told, strict=True)]
        if config.labels == "none":
            items = [one._replace(label=None) for one in items]
        classes = in_memory.names_of(source, items[0].label) if items else []
        return ObjectRows(name, _of_files(items, name, classes))
    name = f"a list of {counted(count, 'image')}" if is_list else f"{kind} of {counted(count, 'item')}"
    return ObjectRows(name, in_memory.of_items(source, name, given, config.labels != "none"))


def _of_frame(frame: Any, name: str, config: ReadConfig) -> Iterator[pa.Table]:
    """Yield the rows of a `pandas.DataFrame`. Names of files start from the current folder."""
    columns: dict[str, Any] = {}
    kinds: dict[str, Any] = {}
    texts = []
    for number, column in enumerate(frame.columns):
        if str(column) in columns:
            raise UserError(f"{name} has several columns called {str(column)!r}. Rename them.")
        values = frame.iloc[:, number]
        some = values.dropna()
        first = some.iloc[0] if len(some) else None
        if isinstance(first, str | os.PathLike):
            texts.append(str(column))
        if isinstance(first, bytes | dict):
            kinds[str(column)] = pa.binary() if isinstance(first, bytes) else _FILES
            columns[str(column)] = values
        else:
            columns[str(column)] = _of_series(values, first, f"The column {column!r} of {name}")
    files = config.image_column if config.image_column in texts else tables.file_column(texts)
    if files and not kinds:
        columns[files] = pa.array([_absolute(value) for value in columns[files].to_pylist()], pa.string())
    for start in range(0, len(frame), _BATCH_ROWS):
        stop = start + _BATCH_ROWS
        yield pa.table(
            {
                column: pa.array([_known(value) for value in values.iloc[start:stop]], kinds[column])
                if column in kinds
                else values[start:stop]
                for column, values in columns.items()
            }
        )


def _of_series(values: Any, first: Any, subject: str) -> pa.Array:
    with explained(f"{subject} cannot be read", "Leave it out, or make its values alike.", pa.ArrowException):
        if isinstance(first, str | os.PathLike):
            values = values.map(lambda value: os.fspath(value) if isinstance(value, os.PathLike) else value)
        return pa.Array.from_pandas(values)


def _absolute(name: str | None) -> str | None:
    return (
        name
        if not name or "://" in name or name.startswith("data:")
        else os.path.abspath(tables.normal(name))
    )


def _known(value: Any) -> Any:
    """Return an encoded image of a column; None for any other value, which is listed as a bad image."""
    return value if isinstance(value, bytes | dict) else None


def _of_files(items: list[in_memory.Item], name: str, classes: list[str]) -> Iterator[pa.Table]:
    """Return the files of a list as tables; their labels are numbers of `classes` if there are any.

    Raises UserError if some items are no files, or some files are not there.
    """
    for number, (path, *_) in enumerate(items):
        if not isinstance(path, str | os.PathLike):
            raise UserError(
                f"Item {number} of {name} is of the type {type(path).__name__}, and item 0 is a path. All items must "
                "be paths, or all images; each alone, or in a tuple with its label."
            )
    paths = [os.fspath(one.image) for one in items]
    files = [path if "://" in path else os.path.abspath(path) for path in paths]
    _check_there(files)
    told = [
        in_memory.label_of(one.label, number, f"{name} ({printable(file)!r})", classes)
        for number, (one, file) in enumerate(zip(items, files, strict=True))
    ]
    return _of_list(files, told, classes)


def _check_there(files: list[str]) -> None:
    """Raise UserError if a file of a list does not exist or is a folder."""
    with names_checked():
        for file in files:
            file.encode()
    with ThreadPoolExecutor(32) as pool:  # A network file system takes long for each.
        here = [file for file in files if "://" not in file]
        missing = [
            file for file, there in zip(here, pool.map(os.path.exists, here), strict=True) if not there
        ]
        folder = next(
            (file for file, one in zip(here, pool.map(os.path.isdir, here), strict=True) if one), ""
        )
    if missing:
        verb = "does" if len(missing) == 1 else "do"
        raise UserError(
            f"{counted(len(missing), 'file')} of the list of {len(files):,} {verb} not exist, the first being "
            f"{printable(missing[0])!r}. Correct the paths, or take these files out of the list. Nothing was written."
        )
    if folder:
        raise UserError(
            f"The list of files holds the folder {printable(folder)!r}. Give the files in it, as glob.glob returns "
            "them, or one folder without a list. Nothing was written."
        )


def _of_list(files: list[str], told: list[Any], classes: list[str]) -> Iterator[pa.Table]:
    has_labels = any(label is not None for label in told)
    for start in range(0, len(files), 65536):
        part = slice(start, start + 65536)
        yield in_memory.table("file_name", pa.array(files[part]), told[part] if has_labels else None, classes)


def _encoded(batch: pa.Table) -> pa.Table:
    """Encode columns of pixels as PNG."""
    for number, column in enumerate(batch.schema):
        if isinstance(column.type, pa.ExtensionType):
            arrays = batch.column(number).combine_chunks().to_numpy(zero_copy_only=False)
            files = [_png(np.asarray(pixels), column.name) for pixels in arrays]
            batch = batch.set_column(number, column.name, pa.array(files, pa.binary()))
    return batch


def _png(pixels: Any, name: str) -> bytes:
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
        raise UserError(
            f"The column {name!r} holds arrays of the type {pixels.dtype} and the shape {pixels.shape}. Images must be "
            "uint8 of the shape (height, width), (height, width, 1) or (height, width, 3)."
        )
    return png.encode(np.ascontiguousarray(pixels)[None])[0]

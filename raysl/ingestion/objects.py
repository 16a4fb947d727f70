"""Sources that are Python objects: a list of files, a Hugging Face dataset, a Ray Dataset.

Their rows are written as one Parquet file into the destination, where every machine sees it, and that is ingested.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysl.errors import UserError, counted
from raysl.ingestion import labels, png
from raysl.ingestion.found import names_checked, printable
from raysl.ingestion.sources import Opened, Place, ReadConfig, open_source
from raysl.storage import Folder

FOLDER = "_source"
_FILE = "rows.parquet"
_BATCH_ROWS = 256


def opened(source: Any, dest: Folder, config: ReadConfig) -> Opened:
    """Open an object as a source.

    Args:
        source: a list of paths or of (path, label) pairs; a `datasets.Dataset`; or a `ray.data.Dataset` with a column
            of encoded images, of pixels (uint8) or of paths.
        dest: destination of the ingest.
        config: how the rows are read; files may lie anywhere.
    """
    name, tables = _tables(source)
    writer = None
    with (dest / FOLDER).writing(_FILE) as stream:
        for table in tables:
            writer = writer or pq.ParquetWriter(stream, table.schema, use_dictionary=False)
            writer.write_table(table.cast(writer.schema), row_group_size=_BATCH_ROWS)
        if writer:
            writer.close()
    if writer is None:
        dest.delete(FOLDER)
        raise UserError(f"The source, {name}, is empty. Give at least one image.")
    found = open_source(Place(str(dest / FOLDER / _FILE), config=replace(config, follow_links=True)))
    found.source.name = name
    return found


def _tables(source: Any) -> tuple[str, Iterator[pa.Table]]:
    """Return the name of an object, and its rows as tables."""
    kind = f"{type(source).__module__.partition('.')[0]}.{type(source).__name__}"
    if isinstance(source, list | tuple):
        return f"a list of {counted(len(source), 'file')}", _of_list(_pairs(source))
    if hasattr(source, "with_format") and hasattr(source, "features"):
        batches = source.with_format("arrow").iter(_BATCH_ROWS)
        if source.features:  # They hold the names of the classes.
            about = source.features.arrow_schema.metadata
            batches = (batch.replace_schema_metadata(about) for batch in batches)
        count = f" of {counted(len(source), 'row')}" if hasattr(source, "__len__") else ""
        return f"{kind}{count}", batches
    if hasattr(source, "iter_batches") and hasattr(source, "map_batches"):
        return kind, map(_encoded, source.iter_batches(batch_size=_BATCH_ROWS, batch_format="pyarrow"))
    if isinstance(source, dict):
        key = next(iter(source), "")
        raise UserError(f"The source is of the type {kind}. Give one of its values, as in source[{key!r}].")
    raise UserError(
        f"The source is of the type {kind}. Give a path, a list of files or of (file, label) pairs, a datasets.Dataset "
        "or a ray.data.Dataset."
    )


def _pairs(source: Iterable[Any]) -> list[tuple[str, str | None]]:
    """Return the files of a list, each with its class or None. Raises UserError if some are not there."""
    pairs = [one if isinstance(one, list | tuple) else (one, None) for one in source]
    for pair in pairs:
        if len(pair) != 2 or not isinstance(pair[0], str | os.PathLike):
            raise UserError(
                f"The list of files holds {reprlib.repr(pair)}. Each entry must be a path, or a pair of a path and a "
                "label."
            )
    names = [os.fspath(path) for path, _ in pairs]
    files = [name if "://" in name else os.path.abspath(name) for name in names]
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
    return [(file, _class_of(file, label)) for file, (_, label) in zip(files, pairs, strict=True)]


def _of_list(pairs: list[tuple[str, str | None]]) -> Iterator[pa.Table]:
    for start in range(0, len(pairs), 65536):
        part = pairs[start : start + 65536]
        columns: dict[str, Any] = {"file_name": [file for file, _ in part]}
        if any(label is not None for _, label in pairs):
            columns["label"] = pa.array([label for _, label in part], pa.string())
        yield pa.table(columns)


def _class_of(file: str, label: Any) -> str | None:
    """Return the class that a label in a list names, by the rules of tables; None for no label."""
    value = label.item() if isinstance(label, np.generic) else label
    # pandas has its own values for what is missing. Arrow would take long for each of millions of labels.
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and value == value // 1:
        return str(int(value)) if value >= 0 else None
    try:
        single = pa.array([value])
    except (pa.ArrowException, OverflowError, ValueError, TypeError):
        return str(value)  # An object of the user, such as a member of an Enum.
    try:
        return labels.as_classes(single)[0].as_py()  # type: ignore[no-any-return]
    except labels.NoClassesError as error:
        raise UserError(
            f"The list of files gives {printable(file)!r} the label {reprlib.repr(label)}, which {error}. A label must "
            "be a text or a whole number, or None for an image without one."
        ) from None


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

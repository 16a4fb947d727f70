"""Find the column of images in a table: encoded files, or names of files beside the table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import pyarrow as pa

from raysl.errors import UserError
from raysl.ingestion import labels, tables
from raysl.ingestion.found import join_names, shortened
from raysl.ingestion.listing import IMAGE, VIDEO, kind_of
from raysl.ingestion.named_files import Place, names_in, places_of

# Columns that are taken for the image before the schema is searched for another.
_IMAGE_NAMES = ("image", "img", "jpg", "png", "jpeg", "webp", "picture", "photo", "bytes")
_VIDEO_NAMES = ("video", "mp4", "clip", "movie")
_LONGEST_TYPE = 40


def encoded(schema: pa.Schema) -> list[str]:
    """Return the columns that hold encoded images."""
    return [field.name for field in schema if _is_encoded(field.type)]


def _is_encoded(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def is_video(table: tables.Table, column: str, is_file_name: bool, places: Sequence[Place]) -> bool:
    """Return True if a column holds videos: by the names of files, its feature of Hugging Face, or its name."""
    if not is_file_name:
        feature = labels.feature_in(table.schema, column).get("_type")
        return column.lower() in _VIDEO_NAMES or feature == "Video"
    first = next(_names(table, column), "")
    return VIDEO in {kind_of(first + behind) for _, behind in (*places, ("", ""))}


def find(table: tables.Table, folder: str, path: str, wanted: str) -> tuple[str, bool, tuple[Place, ...]]:
    """Return the column of images, True if it holds names of files, and the places of these files.

    Args:
        folder: where the table lies.
        path: name of the table for messages.
        wanted: the column that the user named; "" to guess it.

    Raises:
        UserError: the column is not there, or holds no images.
    """
    column, is_file_name, places = _column(table, folder, path, wanted)
    if is_file_name and not places:
        places = places_of(folder, _names(table, column), path)
    return column, is_file_name, places


def _names(table: tables.Table, column: str) -> Iterator[str]:
    return chain.from_iterable(map(names_in, table.column(column)))


def _column(table: tables.Table, folder: str, path: str, wanted: str) -> tuple[str, bool, tuple[Place, ...]]:
    """Return what `find` returns; the places are given only if the column was found by them."""
    schema = table.schema
    in_bytes = encoded(schema)
    # The columns of a table of text without rows have no type.
    is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_null)
    texts = [field.name for field in schema if any(one(field.type) for one in is_text)]
    numbers = [field.name for field in schema if pa.types.is_integer(field.type)]
    if wanted:
        if wanted in (*in_bytes, *texts, *numbers):
            return wanted, wanted not in in_bytes, ()
        raise UserError(
            f"The column {wanted!r}, which --image-column names, holds no images in {path!r}. The columns that may "
            f"are {join_names((*in_bytes, *texts)) or 'none'}."
        )
    named = [name for name in (*_IMAGE_NAMES, *_VIDEO_NAMES) if name in in_bytes]
    if named or len(in_bytes) == 1:
        return (named or in_bytes)[0], False, ()
    if (files := tables.file_column(texts)) and not in_bytes:
        return files, True, ()
    for name in (*texts, *numbers):
        may_be = name.lower() in tables.ID_NAMES or tables.file_column([name])
        if may_be and not in_bytes and (places := places_of(folder, _names(table, name), path)):
            return name, True, places
    header = ""
    if any(kind_of(name) == IMAGE for name in schema.names):
        header = " The first line of a table of text must name the columns."
    what = (
        f"{len(in_bytes)} columns of images, none called 'image'"
        if in_bytes
        else "no column of encoded images"
    )
    typed = [f"{one.name} ({shortened(str(one.type), _LONGEST_TYPE)})" for one in schema]
    raise UserError(
        f"The table {path!r} has {what}: its columns are {join_names(typed)}. "
        "Name one with --image-column; it must be binary, a struct of bytes and path, or names of files beside the "
        f"table, and no list or dictionary of these.{header}"
    )

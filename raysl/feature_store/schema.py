"""Schemas of Parquet files that hold features, also of those that other programs wrote."""

from __future__ import annotations

import pyarrow as pa

from raysl.errors import UserError, unknown


def storage(column: pa.Array) -> pa.Array:
    """Return the lists inside of an extension array, such as a tensor of fixed shape."""
    return column.storage if isinstance(column.type, pa.BaseExtensionType) else column


def _list_type(kind: pa.DataType) -> pa.DataType | None:
    """Return the type if it is one of lists of numbers."""
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if is_list and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
        return kind
    return None


def only_layer(schema: pa.Schema, uri: str) -> str:
    names = [field.name for field in schema if _list_type(field.type)]
    if not names:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise UserError(
            f"The features at {uri!r} have no column of lists of numbers, one list for each image. Their columns: "
            f"{columns}."
        )
    if len(names) > 1:
        raise UserError(
            f"The features at {uri!r} have several layers: {', '.join(names)}. Choose one with --layer."
        )
    return str(names[0])


def check(schema: pa.Schema, layer: str, place: str) -> tuple[int, int]:
    """Return the length of the rows, 0 if the schema does not state it, and the bytes of a number in memory."""
    names = [field.name for field in schema if _list_type(field.type)]
    if layer not in names:
        raise unknown(f"layer of the features at {place}", layer, names)
    if "index" not in schema.names or not pa.types.is_integer(schema.field("index").type):
        found = f"is {schema.field('index').type}" if "index" in schema.names else "is missing"
        raise UserError(
            f"The column 'index' of the features file {place} {found}. It must hold the number of every image, an "
            "integer, by which clusters find their images."
        )
    kind = _list_type(schema.field(layer).type)
    assert kind is not None
    dim = kind.list_size if pa.types.is_fixed_size_list(kind) else 0
    return dim, 2 if pa.types.is_float16(kind.value_type) else 4

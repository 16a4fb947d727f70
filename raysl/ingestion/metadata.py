"""Labels of image files from a table beside them.

metadata.csv, metadata.jsonl    of Hugging Face's ImageFolder: the column file_name and a label
val_annotations.txt             of Tiny ImageNet: the name of a file, a tab, its class
"""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.json as pajson
import pyarrow.parquet as pq

from raysl.errors import UserError
from raysl.ingestion import labels
from raysl.ingestion.found import shown
from raysl.ingestion.layout import Layout
from raysl.ingestion.listing import LABEL_TABLES, Survey, join, read_bytes

_TINY = "val_annotations.txt"


def apply(root: str, survey: Survey, layout: Layout, wanted: str) -> None:
    """Take the labels of a layout from a table, if there is one that has them.

    Args:
        root: of the source.
        wanted: the column of labels that the user named; "" to guess.

    Raises:
        UserError: the table cannot be read, or the named column is not in it.
    """
    for folder in dict.fromkeys((layout.base, "")):
        for name in LABEL_TABLES:
            path = join(folder, name)
            if path not in survey.tables:
                continue
            table = read_table(read_bytes(root, path), path)
            if name == _TINY:
                files = [join(folder, f"images/{file}") for file in table.column(0).to_pylist()]
                column = table.column(1).combine_chunks()
                _use(layout, path, "its second column", files, column)
            elif "file_name" in table.column_names:
                found = labels.find(table.column_names, wanted, path)
                if found:
                    files = [join(folder, file) for file in table.column("file_name").to_pylist() if file]
                    _use(layout, path, f"the column {found!r}", files, table.column(found).combine_chunks())
                elif not layout.found.labels.startswith("the folder"):
                    layout.found.labels = (
                        f"none: no column of {path} is named like a label; its columns are "
                        f"{', '.join(table.column_names)} (--label-column names one)"
                    )
            return


def _use(layout: Layout, path: str, what: str, files: list[str], column: pa.Array) -> None:
    try:
        classes = labels.as_classes(column)
    except labels.NoClassesError as error:
        layout.found.labels = f"none: {what} of {path} {error}"
        return
    layout.class_of = {
        file: name for file, name in zip(files, classes.to_pylist(), strict=False) if name is not None
    }
    layout.found.layout = f"images with a table of labels, {shown(path)}"
    layout.found.labels = f"{what} of {shown(path)}"


def read_table(data: bytes, path: str) -> pa.Table:
    """Return a table of text: CSV, TSV or JSON lines by the end of its name, or Parquet.

    Raises:
        UserError: it is damaged.
    """
    name = path.lower()
    try:
        if name.endswith(".parquet"):
            return pq.read_table(io.BytesIO(data))
        if name.endswith((".jsonl", ".ndjson")):
            return pajson.read_json(io.BytesIO(data))
        tabs = name.endswith((".tsv", ".txt"))
        return pacsv.read_csv(
            io.BytesIO(data),
            read_options=pacsv.ReadOptions(autogenerate_column_names=name.endswith(".txt")),
            parse_options=pacsv.ParseOptions(delimiter="\t" if tabs else ",", newlines_in_values=True),
        )
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"Cannot read the table {shown(path)!r}: {error}. Correct it or remove it."
        ) from error

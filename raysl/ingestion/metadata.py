"""Labels of image files from a table beside them.

metadata.csv, metadata.jsonl    of Hugging Face's ImageFolder: the column file_name and a label
val_annotations.txt             of Tiny ImageNet: the name of a file, a tab, its class
"""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa

from raysl.ingestion import labels
from raysl.ingestion.found import join_names, printable
from raysl.ingestion.layout import BESIDE_CLASSES, Layout
from raysl.ingestion.listing import LABEL_TABLES, Survey, join
from raysl.ingestion.tables import file_column, normal, read_table

_TINY = "val_annotations.txt"


def apply(read: Callable[[str], bytes], survey: Survey, layout: Layout, wanted: str) -> None:
    """Take the labels of a layout from a table, if there is one that has them.

    `read` returns the content of a file of the source; `wanted` is the column that the user named, "" to guess.
    """
    for folder in dict.fromkeys((layout.base, "")):
        for name in LABEL_TABLES:
            path = join(folder, name)
            if path in survey.tables:
                _use(layout, folder, path, read_table(read(path), path), wanted)
                return


def _use(layout: Layout, folder: str, path: str, table: pa.Table, wanted: str) -> None:
    """Take the labels of a table, or say why it has none."""
    found = layout.found
    names: list[str] = table.column_names
    is_tiny = path.endswith(_TINY)
    if is_tiny:
        files_in, column = [*names, "", ""][:2]
        prefix = "images/"
    else:
        files_in, column, prefix = file_column(names), labels.find(names, wanted, path), ""
    why = ""
    if is_tiny and not column:
        why = f"{printable(path)} has one column; its lines must be the name of a file, a tab and its class"
    elif not column:
        known = join_names(names)
        why = (
            f"no column of {printable(path)} is named like a label; its columns are {known} (--label-column)"
        )
    elif not files_in:
        why = f"{printable(path)} has no column file_name; its columns are {join_names(names)}"
    else:
        there = table.column(files_in).to_pylist()
        files = [join(folder, prefix + normal(str(file))) if file else "" for file in there]
        try:
            classes = labels.as_classes(table.column(column).combine_chunks()).to_pylist()
            layout.class_of = _by_file(files, classes)
        except labels.NoClassesError as error:
            why = f"the column {column!r} of {printable(path)} {error}"
    if why:
        # A table of captions takes nothing from class folders.
        if (column and files_in) or layout.classes_in is None:
            layout.classes_in, found.layout, found.labels = None, "a folder of images", f"none, because {why}"
        return
    found.left_out.kinds.pop(BESIDE_CLASSES, None)
    found.layout = f"images with a table of labels, {printable(path)}"
    found.labels = f"the {'second column' if is_tiny else f'column {column!r}'} of {printable(path)}"


def _by_file(files: list[str], classes: list[str | None]) -> dict[str, str]:
    """Return the class of each file by its composed name. Raises NoClassesError if a file has several."""
    class_of: dict[str, str] = {}
    for file, name in zip(map(labels.composed, files), classes, strict=True):
        if name is not None and class_of.setdefault(file, name) != name:
            raise labels.NoClassesError(
                f"names {printable(file)} as {class_of[file]!r} and as {name!r}, and a data set "
                "holds one class for each image"
            )
    return class_of

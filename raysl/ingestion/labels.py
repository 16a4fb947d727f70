"""Find the column of labels in a table, and turn its values into names of classes."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from raysl.errors import UserError, counted
from raysl.ingestion.found import Found, join_names, printable
from raysl.ingestion.pixel_files import is_pixels

# Columns that are taken for the label, the first that is there.
LABEL_NAMES = (
    "label labels fine_label class target category y cls class_name class_label label_name class_id label_id "
    "category_id coarse_label"
).split()
# More classes than this, or one for nearly every image, are identifiers and not classes.
_MOST_CLASSES = 1 << 20
_FEW_IMAGES = 1000
# What a label in Python may be.
PLAIN = "A label must be a text or a whole number, or None for an image without one."
SEVERAL = "holds several values for each image (several classes, or one-hot), and a data set holds one class for each"
# The name that Hive and Spark give to a folder of rows without a value.
_NULL_OF_HIVE = "__HIVE_DEFAULT_PARTITION__"
_TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)


class NoClassesError(Exception):
    """A column does not hold one class for each image. The message completes the sentence "The column ..."."""


def find(names: Sequence[str], wanted: str, path: str) -> str:
    """Return the column of labels: the one that the user named, or one with a known name; "" if there is none.

    Raises UserError, which names the place, if the named column does not exist.
    """
    if wanted and wanted not in names:
        missing = f"{path} has no column {wanted!r}, which --label-column names"
        raise UserError(f"{missing}. Its columns are {join_names(names)}.")
    if wanted:
        return wanted
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[name] for name in LABEL_NAMES if name in lower), "")


def names_in(schema: pa.Schema, column: str) -> list[str] | None:
    """Return the names of the classes that Hugging Face writes into a schema; None if it has none."""
    feature = feature_in(schema, column)
    try:
        return distinct([str(name) for name in feature.get("feature", feature)["names"]])
    except (KeyError, TypeError, ValueError):
        return None


def distinct(names: list[str]) -> list[str]:
    """Return names of classes, those that occur twice with their number: ImageNet has two classes called "crane"."""
    times = Counter(names)
    return [name if times[name] == 1 else f"{name} ({number})" for number, name in enumerate(names)]


def feature_in(schema: pa.Schema, column: str) -> dict[str, Any]:
    """Return what Hugging Face writes into a schema about a column; empty if it says nothing."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        return feature if isinstance(feature, dict) else {}
    except (KeyError, TypeError, ValueError):
        return {}


def as_classes(column: pa.Array, names: list[str] | None = None) -> pa.Array:
    """Return the class of each row: a string, or null for a row without a label (null, NaN, -1, "").

    Args:
        column: of integers, whole floats, booleans, strings, dictionaries of these, or lists of one of these; other
            values raise NoClassesError.
        names: of the classes that integers are indices of; None to name them after the integers.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        return as_classes(column.cast(kind.value_type), names)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        if pc.any(pc.greater(pc.list_value_length(column), 1)).as_py():
            raise NoClassesError(SEVERAL)
        single = pa.array([row[0] if row else None for row in column.to_pylist()], kind.value_type)
        return as_classes(single, names)
    if pa.types.is_null(kind):
        return pa.nulls(len(column), pa.string())
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        column = column.cast(pa.float64())
        column = pc.if_else(pc.is_finite(column), column, None)
        fractions = column.filter(pc.not_equal(column, pc.floor(column)))
        if len(fractions):
            raise NoClassesError(f"holds fractions, such as {fractions[0].as_py():g}")
        if pc.any(pc.greater(pc.abs(column), float(1 << 53))).as_py():
            raise NoClassesError("holds numbers above 2^53, which floats do not count exactly")
        return as_classes(column.cast(pa.int64()), names)
    if pa.types.is_integer(kind):
        if pa.types.is_signed_integer(kind):
            column = pc.if_else(pc.less(column, 0), None, column)
        if names is None:
            return column.cast(pa.string())
        largest = pc.max(column).as_py()
        if largest is not None and largest >= len(names):
            raise UserError(
                f"The source names {len(names)} classes and has an image with label {largest}. Labels must be 0 to one "
                "less than the number of names: correct the source, or name another column with --label-column."
            )
        return pa.array(names, pa.string()).take(column)
    if pa.types.is_boolean(kind):
        return column.cast(pa.string())
    if any(is_text(kind) for is_text in _TEXTS):
        try:
            column = pc.utf8_trim_whitespace(column.cast(pa.string()))
        except pa.ArrowInvalid:
            raise NoClassesError("holds text that is not in UTF-8") from None
        return pc.if_else(pc.equal(column, ""), None, column)
    raise NoClassesError(f"is of type {kind}")


def as_class(value: Any) -> str | None:
    """Return the class that one value of JSON names; None for no label. Raises NoClassesError as `as_classes`."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value) if value >= 0 else None
    try:
        return as_classes(pa.array([value]))[0].as_py()  # type: ignore[no-any-return]
    except (pa.ArrowException, OverflowError):
        raise NoClassesError("holds a label that is neither a name nor a number") from None


def as_class_of_object(value: Any) -> str | None:
    """Return the class that a value of Python names; None for no label. Raises NoClassesError as `as_classes`."""
    value = value.tolist() if isinstance(value, np.generic) or is_pixels(value) else value
    # pandas has its own values for what is missing. Arrow would take long for each of millions of labels.
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and value == value // 1:
        return str(int(value)) if value >= 0 else None
    if isinstance(value, Image.Image):
        raise NoClassesError("is an image and no class")
    try:
        single = pa.array([value])
    except (pa.ArrowException, OverflowError, ValueError, TypeError):
        return str(value)  # An object of the user, such as a member of an Enum.
    return as_classes(single)[0].as_py()  # type: ignore[no-any-return]


def as_class_of_text(text: str) -> str | None:
    """Return the class in a file of text: a whole number, or a name; None for no label."""
    number = re.fullmatch(r"([+-]?\d+)(\.0*)?", text.strip())
    return as_class(int(number[1]) if number else text)


def as_classes_of_folders(values: Sequence[str | None]) -> list[str | None]:
    """Return the classes in the names of folders such as "label=cat", of which `values` hold what follows the "=".

    A class is "" for no label. A negative number is none, unless the folders are those of two classes such as -1 and 1.
    None, for a file in no such folder, stays None.
    """
    texts = [value and unquote(value) for value in values]
    folders = {*texts} - {None}
    numbers = {text: float(text) for text in folders if text and re.fullmatch(r"[+-]?\d+(\.0*)?", text)}
    are_signs = len(folders) == len(numbers) == 2 and sum(numbers.values()) == 0
    missing = {_NULL_OF_HIVE} | {text for text, number in numbers.items() if number < 0 and not are_signs}
    return ["" if text in missing else text for text in texts]


def composed(name: str) -> str:
    """Return a name with accents as parts of their letters (NFC). Macs store them apart, which looks the same."""
    return unicodedata.normalize("NFC", name)


@dataclass
class Classes:
    """The classes of a source, counted while its labels are read."""

    counts: Counter[str] = field(default_factory=Counter)
    names: list[str] = field(default_factory=list)  # in the order of the numbers, where the source says them
    unlabeled: str = ""  # path of the first image without a label; "" if there is none

    def add(self, labels: Iterable[str | None], first: str) -> None:
        """Count labels; `first` names the file or the image that they are of."""
        for label in labels:
            if label is None:
                self.unlabeled = self.unlabeled or first
            else:
                self.counts[composed(label)] += 1

    def ordered(self) -> dict[str, int]:
        """Return the images of each class, in the order of the source where it names its classes, or else sorted."""
        named = dict.fromkeys(map(composed, self.names))
        is_number = all(name.isascii() and name.isdigit() for name in self.counts)
        others = sorted(self.counts.keys() - named.keys())
        if is_number:
            others.sort(key=int)
        return {name: self.counts[name] for name in (*named, *others)}

    def settle(self, found: Found, of_folders: bool) -> None:
        """Write the classes into `found`, or why a table or the labels beside the images give none."""
        if of_folders:
            found.classes = dict(sorted(self.counts.items()))
        elif why := self.why_none():
            found.labels = f"none, although they are {found.labels}: {printable(why)}"
        else:
            found.classes = self.ordered()

    def why_none(self) -> str:
        """Return why these are no classes for every image; "" if they are."""
        if not self.counts:
            return "no row has one (all are null, empty or -1)"
        if self.unlabeled:
            have = f"{counted(total := self.counts.total(), 'image')} {'has' if total == 1 else 'have'} one"
            return f"{self.unlabeled} has an image without one, and {have}"
        many = len(self.counts)
        if many > _MOST_CLASSES or (many > _FEW_IMAGES and 2 * many > self.counts.total()):
            return f"it has {many:,} values in {self.counts.total():,} rows, which are names of images and not classes"
        return ""

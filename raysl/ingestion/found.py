"""Describe for the user what ingest finds in a source: its layout, its labels, and what it leaves out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from raysl.errors import UserError, counted

# Kinds of entries that are left out. Files of other kinds are named by `raysl.ingestion.listing.kind_of`.
LINKS_OUT = "links out of the source"
LINKS_AGAIN = "links to folders that are read already"
_CLASSES_SHOWN = 6


# What to do with several sources.
SEVERAL = (
    "To take several, move them into one folder, or list the images in a CSV file, with the heading file_name and the "
    "path of an image on each line, for `raysl ingest LIST.csv DEST --follow-links`."
)


class LeftOut:
    """Number of entries that are left out, by kind, each kind with its first path."""

    def __init__(self) -> None:
        self.kinds: dict[str, tuple[int, str]] = {}

    def add(self, kind: str, path: str, count: int = 1) -> None:
        before, first = self.kinds.get(kind, (0, path))
        self.kinds[kind] = (before + count, first)

    def update(self, other: LeftOut) -> None:
        for kind, (count, first) in other.kinds.items():
            self.add(kind, first, count)

    def sorted(self) -> list[tuple[str, int, str]]:
        """Return every kind with its count and its first path, the most frequent first."""
        kinds = [(kind, count, printable(first)) for kind, (count, first) in self.kinds.items()]
        return sorted(kinds, key=lambda one: -one[1])

    def __str__(self) -> str:
        return (
            "; ".join(f"{of_kind(kind, count)} ({first})" for kind, count, first in self.sorted())
            or "nothing"
        )


@dataclass
class Found:
    """Summary of a source for the user. Complete once its units are listed."""

    layout: str  # such as "class folders"; "" for a Python object
    labels: str = ""  # where the labels come from, or why there are none, with the path that decided it
    splits: tuple[str, ...] = ()  # all that the source holds
    split: str = ""  # the one that is read; "" without splits
    split_column: str = ""  # column of a table that names the splits
    classes: dict[str, int] = field(default_factory=dict)  # images of each, in the order of their numbers
    images: int = 0
    left_out: LeftOut = field(default_factory=LeftOut)
    noun: str = "images"  # kind of the entries, or "videos"

    def rename_to_videos(self) -> None:
        """Replace "images" by "videos" in the texts, but not in the example path."""
        self.noun = "videos"
        self.layout = self.layout.replace("images", "videos")
        text, comma, example = self.labels.partition(", as ")
        self.labels = text.replace("image", "video") + comma + example

    def table(self, name: str) -> str:
        """Return the table that ingest prints before it copies anything."""
        lines = [("source", name), *([("layout", self.layout)] if self.layout else [])]
        if self.split_column and self.splits and not self.split:
            one = (
                f"; {name}#{example_of(self.splits)} reads one of: {join_names(self.splits)}"
                if self.layout
                else ""
            )
            lines.append(("split", f"none: all values of the column {self.split_column!r} together{one}"))
        elif self.splits:
            others = ", ".join(split for split in self.splits if split != self.split)
            lines.append(("split", self.split + (f"  (not read: {others})" if others else "")))
        lines += [(self.noun, f"{self.images:,}{_classes(self.classes)}"), ("labels", self.labels)]
        left_out = [f"{of_kind(kind, count)}, as {first}" for kind, count, first in self.left_out.sorted()]
        lines += [("" if i else "left out", text) for i, text in enumerate(left_out)]
        return "\n".join(f"  {key:<9} {text}" for key, text in lines)


def example_of(splits: Sequence[str]) -> str:
    """Return the split that a message names as an example: one to train on, or else the last."""
    return next((split for split in splits if split.lower().startswith("train")), splits[-1])


def of_kind(kind: str, count: int) -> str:
    """Return a kind of entries with its number, as "1 text file"."""
    if count != 1 or kind.startswith("data "):
        return f"{count:,} {kind}"
    # "pipes, sockets and devices" becomes "pipe, socket or device".
    several = kind.count(" and ") + kind.count(", ")
    single = re.sub(r"s(?=[ ,]|$)", "", kind, count=several + 1).replace(" and ", " or ")
    return f"1 {single.replace(' that lead ', ' that leads ')}"


def _classes(counts: dict[str, int]) -> str:
    if not counts:
        return ""
    few = ", ".join(f"{printable(name)} {count:,}" for name, count in list(counts.items())[:_CLASSES_SHOWN])
    more = f", ... ({min(counts.values()):,} to {max(counts.values()):,} images each)"
    return f" in {counted(len(counts), 'class')}: {few}{more if len(counts) > _CLASSES_SHOWN else ''}"


def printable(path: str) -> str:
    """Return a path as text that every terminal and file takes: bytes that are not UTF-8 become escapes."""
    if path.isascii() and path.isprintable():
        return path
    text = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, most: int) -> str:
    """Return the first characters of a text that is longer than `most`, with "..." at the end."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def join_names(names: Sequence[str], most: int = 20) -> str:
    """Return names for a message; if there are many, only the first."""
    more = f", ... ({len(names):,} in all)" if len(names) > most else ""
    return ", ".join(printable(name) for name in names[:most]) + more


def unreadable(name: str, error: OSError) -> UserError:
    return UserError(f"Cannot read the source {name!r}: {error}. Check the path and your access.")


@contextmanager
def names_checked() -> Iterator[None]:
    """Turn the error of Arrow for a path that is not in UTF-8 into a UserError. Also a decorator."""
    try:
        yield
    except UnicodeEncodeError as error:
        if error.encoding.replace("-", "") != "utf8":  # It is about some text, and not about a name.
            raise
        raise UserError(
            f"The name {printable(error.object)!r} is not in UTF-8, and only files inside of a folder of images or "
            "videos may have such names. Rename it."
        ) from error

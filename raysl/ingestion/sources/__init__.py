"""Kinds of source: one file each, found by listing this package.

A file `sources/foo.py` describes one kind with

    SUMMARY = "..."                             how a user names such a source, in one line
    def recognise(place: Place) -> Confidence   whether it is one
    class Source                                the opened source; see `Source`
    def read(unit: Unit) -> Iterator[Row]       the rows of a unit, in a worker

and gets ingest, resumption, the ledger and `raysl ingest` without another edit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

from raysl import plugins
from raysl.errors import UserError
from raysl.storage import Folder


class Confidence(IntEnum):
    """How sure a kind is that a place is one of its own. The surest kind gets the place."""

    NO = 0
    COULD_BE = 1
    IS = 2


@dataclass(frozen=True)
class Place:
    """A source as the user named it.

    Args:
        uri: absolute local path, URI, or a name such as "shapes:1000".
        split: "train", "test" or whatever the source has; "" when none was named.
    """

    uri: str
    split: str = ""

    @staticmethod
    def parse(source: str, split: str = "") -> Place:
        """Splits "uri#split"; `split` must agree when both are given. A local path may itself contain "#".

        A name that is no path from here is looked up in the folder that `$RAYSL_DATA` names.
        """
        uri, named = source, ""
        if not _is_path(source) and "#" in source:
            uri, _, named = source.rpartition("#")
        if split and named and split != named:
            raise UserError(
                f"The source {source!r} names the split {named!r} and the configuration says {split!r}."
            )
        at_home = Path(os.environ.get("RAYSL_DATA", ".")) / uri
        if not _is_path(uri) and _is_path(str(at_home)):
            uri = str(at_home)
        if _is_path(uri):
            uri = Folder(uri).uri
        return Place(uri, named or split)

    def __str__(self) -> str:
        return f"{self.uri}#{self.split}" if self.split else self.uri


def _is_path(text: str) -> bool:
    return "://" not in text and Path(text).expanduser().exists()


@dataclass(frozen=True)
class UnitSize:
    """The most that one unit, and so one shard, holds; a single file may hold more."""

    num_images: int
    num_bytes: int


@dataclass(frozen=True)
class Unit:
    """A piece of a source that one task reads and that becomes one shard.

    Args:
        num_images: how many it holds by its listing; the truth may differ, at the cost of a second pass.
        spec: a JSON value that says what to read, made and understood by the kind of the source alone.
    """

    num_images: int
    spec: dict[str, Any]


class Row(NamedTuple):
    """An image of a source.

    Args:
        image: encoded bytes; None when they could not be had, and then `reason` says why.
        label: 0, 1, ...; None when this image has none.
        path: where a user finds it.
    """

    image: bytes | None
    label: int | None
    path: str
    reason: str = ""


class Source(Protocol):
    """An opened source. Opening raises UserError when the place is damaged or the split is not there.

    Attributes:
        name: what names the source fully, with the split that was taken; equal for equal sources.
        encoded_here: whether `read` encodes the images itself, so that they need no check.
        labelled: whether images may have labels. Complete once `units` is exhausted.
        classes: names of the classes in label order; None when labels have no names. Complete once `units` is
            exhausted.
    """

    name: str
    encoded_here: bool
    labelled: bool
    classes: tuple[str, ...] | None

    def __init__(self, place: Place) -> None: ...

    def stamp(self) -> str:
        """A cheap hash that changes when the images of the source do."""
        ...

    def units(self, size: UnitSize) -> Iterator[Unit]:
        """All units, in the order of their indices; equal for equal stamps."""
        ...


@cache
def _kinds() -> dict[str, ModuleType]:
    return {name: plugins.module(__name__, name, "source") for name in plugins.names(__name__)}


def recognised() -> str:
    """What can be ingested, as one sentence."""
    return f"A source is one of: {'; '.join(kind.SUMMARY for kind in _kinds().values())}."


def open_source(place: Place) -> tuple[str, Source]:
    """The kind of a source, and the source.

    Raises:
        UserError: nothing is there, no kind recognises it, or it cannot be opened.
    """
    try:
        sure = {name: kind.recognise(place) for name, kind in _kinds().items()}
        best = max(sure, key=lambda name: int(sure[name]))
        if sure[best]:
            return best, _kinds()[best].Source(place)
        there = Folder(place.uri).exists()
    except OSError as error:
        raise UserError(
            f"Cannot read the source {str(place)!r}: {error}. Check the place and your access."
        ) from error
    if there:
        raise UserError(f"The source {place.uri!r} is of no known kind. {recognised()}")
    raise UserError(
        f"The source {place.uri!r} does not exist, here or in the folder that $RAYSL_DATA names. {recognised()}"
    )


def read(kind: str, unit: Unit) -> Iterator[Row]:
    """The rows of a unit, with memory bounded by a row group and not by the unit.

    Raises:
        UserError: a file of the source is damaged beyond the single image.
        OSError: a file of the source cannot be read.
    """
    rows: Iterator[Row] = _kinds()[kind].read(unit)
    return rows


def choose_split(place: Place, splits: list[str]) -> str:
    """The split to take of those that the source holds.

    Raises:
        UserError: the split that was named is not there, or none was named and there are several.
    """
    known = ", ".join(splits) or "none"
    if place.split and place.split not in splits:
        raise UserError(f"The source {place.uri!r} has no split {place.split!r}. Its splits: {known}.")
    if not place.split and len(splits) > 1:
        raise UserError(
            f"The source {place.uri!r} holds several splits: {known}. Name one, as in "
            f"{place.uri + '#' + splits[-1]!r}."
        )
    return place.split or "".join(splits)

"""Kinds of source: one file each, found by listing this package.

A file `sources/foo.py` describes one kind with

    SUMMARY = "..."                             what such a source is, in a few words
    def recognize(location: SourceLocation) -> Confidence   whether it is of this kind
    class Source                                the opened source; see `Source`
    def read(unit: Unit) -> Iterator[Row]       the rows of a unit, in a worker

and gets ingest, resumption, the list of bad images and `raysl ingest` without another edit.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, NamedTuple, Protocol, TypeVar
from urllib.parse import parse_qsl

from raysl import plugins
from raysl.errors import UserError, did_you_mean, unknown
from raysl.fields import Bounds, CheckedTop
from raysl.ingestion import unsupported
from raysl.ingestion.found import SEVERAL, Found, LeftOut, example_of, names_checked, unreadable
from raysl.ingestion.layout import by_split
from raysl.ingestion.listing import HEAD_BYTES, TABLE, File, Survey, files_below, is_folder, join, read_bytes
from raysl.storage import HUB_LOGIN, Folder
from raysl.storage.causes import web_answer

T = TypeVar("T")


class Confidence(IntEnum):
    """How well a source matches a kind. The kind with the highest value reads it."""

    NO = 0
    COULD_BE = 1
    IS = 2
    SIGNATURE = 3  # files whose names belong to no other kind


@dataclass(frozen=True)
class ReadConfig(CheckedTop):
    """Configuration of how a source is read.

    Args:
        label_column: column of tables, or field of the JSON in archives, that holds the label; "" to guess it. "cls"
            reads a text in a .cls member of an archive as the name of a class.
        image_column: column of tables, or suffix of the images in archives, to read; "" to guess it.
        labels: "folders" makes each folder a class, whatever its name; "none" ingests without labels; "auto" recognizes
            the layout.
        follow_links: follow links, and paths in tables, that point outside the source.
        fps: maximum number of frames that are kept of each second of a video.
        clip_s: maximum length of a clip in seconds; a longer video is cut into several clips.
        frame_size: maximum size of the shorter side of a video's frames in pixels; larger frames are scaled down.
    """

    label_column: str = ""
    image_column: str = ""
    labels: Literal["auto", "folders", "none"] = "auto"
    follow_links: bool = False
    fps: Annotated[float, Bounds(above=0, high=240)] = 8.0
    clip_s: Annotated[float, Bounds(0.1, 3600)] = 8.0
    frame_size: Annotated[int, Bounds(16, 4096)] = 128

    def flags(self) -> str:
        """Return what differs from the defaults, as flags."""
        changed = {name: value for name, value in vars(self).items() if value != getattr(ReadConfig, name)}
        return "".join(f" --{name.replace('_', '-')} {value}" for name, value in changed.items())


@dataclass(frozen=True)
class SourceLocation:
    """A source as the user named it, or the table that the rows of a Python object were written to."""

    uri: str  # absolute local path, URI, or a name such as "shapes:1000"
    split: str = ""  # "train", "test" or another split of the source; "" if none was named
    config: ReadConfig = field(default_factory=ReadConfig)
    called: str = ""  # what the user gave, for the rows of an object
    state: str = ""  # hash of the rows of an object

    @staticmethod
    def parse(source: str, split: str = "", config: ReadConfig | None = None) -> SourceLocation:
        """Split "uri#split"; `split` must agree when both are given. A local path may itself contain "#".

        A name that is no path from here is looked up in the folder that `$RAYSL_DATA` names.
        """
        if "\0" in source or not source.strip():
            why = "holds a NUL character" if "\0" in source else "is empty"
            raise UserError(f"The source {source!r} {why}. Name a path, a URI or a set.")
        uri, named = source, ""
        if not _is_path(source) and "#" in source:
            uri, _, named = source.rpartition("#")
            if not named:
                raise UserError(
                    f"The source {source!r} names no split behind its '#'. Leave out the '#', or name one."
                )
        if split and named and split != named:
            raise UserError(
                f"The source {source!r} names the split {named!r} and the configuration says {split!r}. Name one."
            )
        for path in (uri, str(Path(os.environ.get("RAYSL_DATA", ".")) / uri)):
            if _is_path(path):
                return SourceLocation(Folder(path).uri, named or split, config or ReadConfig())
        return SourceLocation(uri, named or split, config or ReadConfig())

    def __str__(self) -> str:
        return (f"{self.uri}#{self.split}" if self.split else self.uri) + self.config.flags()

    @cached_property
    def is_folder(self) -> bool:
        return not self.uri.startswith(("shapes:", "clips:", "fashion-mnist")) and is_folder(self.uri)

    @cached_property
    def survey(self) -> tuple[Survey, LeftOut]:
        """All files below the folder, counted, and what cannot be read of it."""
        left_out = LeftOut()
        files = files_below(self.uri, left_out=left_out, follow_links=self.config.follow_links)
        return Survey.of(files, lambda path: read_bytes(self.uri, path, HEAD_BYTES)), left_out


def _is_path(text: str) -> bool:
    if text.startswith("file://"):
        return Folder(text).exists()
    try:
        return "://" not in text and Path(text).expanduser().exists()
    except (OSError, RuntimeError):  # A name that is too long, or the home of an unknown user.
        return False


@dataclass(frozen=True)
class UnitSize:
    """The most that one unit, and so one shard, holds; a single file may hold more."""

    num_images: int
    num_bytes: int


@dataclass(frozen=True)
class Unit:
    """A piece of a source that one task reads and that becomes one shard. `spec` is a JSON value for the kind of the
    source alone. If fewer images are read than were listed, later shards are renumbered.
    """

    num_images: int
    spec: dict[str, Any]


class Row(NamedTuple):
    """An image of a source."""

    image: bytes | None  # encoded; None if it cannot be read, and then `reason` says why
    label: str | None  # name of its class; None for an image without a label
    path: str  # where a user finds it in the source
    reason: str = ""
    clip: Mapping[str, Any] | None = None  # columns of a clip, see `raysl.dataset.clips`; None for an image


class Source(Protocol):
    """An opened source. Opening raises UserError when the place is damaged or the split is not there."""

    name: str  # names the source fully, with the split that is read; equal for equal sources
    encoded_here: bool  # `read` encodes the images itself, so that they need no check
    found: Found  # its classes and counts are complete once `units` is exhausted
    clips: Mapping[str, Any] = {}  # metadata of clips for the manifest, with the names of their "columns"

    def __init__(self, location: SourceLocation) -> None: ...

    def stamp(self) -> str:
        """Return a cheap hash that changes when the images of the source do."""
        ...

    def units(self, size: UnitSize) -> Iterator[Unit]:
        """Yield all units in the order of their indices; equal for equal stamps."""
        ...


def in_units(items: Iterable[T], size: UnitSize, weigh: Callable[[T], tuple[int, int]]) -> Iterator[list[T]]:
    """Divide items among units: as many as fit, at least one. `weigh` returns the images and the bytes of an item."""
    some: list[T] = []
    images = num_bytes = 0
    for item in items:
        more_images, more_bytes = weigh(item)
        images, num_bytes = images + more_images, num_bytes + more_bytes
        if some and (images > size.num_images or num_bytes > size.num_bytes):
            yield some
            some, images, num_bytes = [], more_images, more_bytes
        some.append(item)
    if some:
        yield some


@dataclass(frozen=True)
class Opened:
    kind: str
    location: SourceLocation
    source: Source


@cache
def _kinds() -> dict[str, ModuleType]:
    return {name: plugins.module(__name__, name, "source") for name in plugins.names(__name__)}


def recognized() -> str:
    """Return what can be ingested, as one sentence."""
    kinds = "; ".join(sorted((kind.SUMMARY for kind in _kinds().values()), key=str.lower))
    return f"A source is one of: {kinds}. Examples: photos/, cifar10#train, a.zip, s3://bucket/photos, shapes:1000."


@names_checked()
def open_source(location: SourceLocation) -> Opened:
    """Recognize and open a source. Raises UserError if no kind recognizes it, or if it cannot be opened."""
    try:
        confidence = {name: kind.recognize(location) for name, kind in _kinds().items()}
        best = max(confidence, key=lambda name: int(confidence[name]))
        there = Folder(location.uri).exists()
        survey = location.survey[0] if location.is_folder else None
        if there and (refused := unsupported.refusal(location.uri, survey, bool(confidence[best]))):
            raise UserError(f"The source {location.uri!r} {refused}.")
        if confidence[best]:
            return Opened(best, location, _kinds()[best].Source(location))
    except OSError as error:
        raise unreadable(str(location), error) from error
    if location.is_folder:
        left_out = location.survey[1]
        left_out.update(location.survey[0].others())
        table = left_out.kinds.get(TABLE, (0, ""))[1]
        advice = f"Give the table as the source: {join(location.uri, table)!r}." if table else recognized()
        raise UserError(f"The folder {location.uri!r} holds no images. It holds {left_out}. {advice}")
    if there:
        raise UserError(f"The file {location.uri!r} is of no known kind. {recognized()}")
    if location.uri.startswith(("http://", "https://", "ftp://")):
        raise UserError(
            f"The source {location.uri!r} cannot be read: {web_answer(location.uri)}. From the web, raysl reads single "
            "archives and tables, and from s3://, gs:// and hf://datasets/OWNER/NAME also folders. Check the address, "
            "or download the images and give the file or folder."
        )
    if set("*?") & set(location.uri):
        raise UserError(f"The source {location.uri!r} is a pattern, and raysl takes one source. {SEVERAL}")
    home, nor = os.environ.get("RAYSL_DATA"), ""
    if home and "://" not in location.uri:
        nor = f", and neither does {Path(home) / location.uri}, in $RAYSL_DATA"
    raise UserError(
        f"The source {location.uri!r} does not exist{nor}. {_nearest(location.uri)}`raysl ingest --help` lists what a "
        "source may be."
    )


def _nearest(uri: str) -> str:
    """Return a question that names what lies beside a local path and has nearly its name; "" if nothing does.

    Of a repository of the Hub, return what else "missing" may mean.
    """
    if uri.startswith("hf://"):
        return f"{HUB_LOGIN} "
    path = Path(uri)
    try:
        beside = [] if "://" in uri else os.listdir(path.parent)
    except (OSError, ValueError):  # There is no such folder, or the name is not one of a file.
        return ""
    near = difflib.get_close_matches(path.name, beside, n=1)
    return f"Did you mean {str(path.parent / near[0])!r}? " if near else ""


def read(kind: str, unit: Unit) -> Iterator[Row]:
    """Yield the rows of a unit, with memory bounded by a row group and not by the unit.

    Raises UserError if a file of the source is damaged beyond the single image, and OSError if it cannot be read.
    """
    return _kinds()[kind].read(unit)  # type: ignore[no-any-return]


def files_ending(location: SourceLocation, suffixes: tuple[str, ...]) -> list[File]:
    """Return the files of a place whose names end in one of some ways; the file itself if the place is one."""
    if not location.is_folder:
        return list(files_below(location.uri, 1))
    files = files_below(location.uri, 3, follow_links=location.config.follow_links)
    return [file for file in files if file.path.lower().endswith(suffixes)]


def read_split(location: SourceLocation, files: list[File], kind: str) -> tuple[list[File], Found]:
    """Return the files of the split that is read, and what was found, in which files of other kinds are left out.

    If no name of a file tells a split, the split may be one inside of the files.
    """
    by_path = {file.path: file for file in files}
    splits = by_split(by_path)
    named = sorted(splits.keys() - {""})
    split = choose_split(location, named) if named else ""
    found = Found("", splits=tuple(named), split=split)
    if location.is_folder:
        survey, left_out = location.survey
        others = survey.others()
        others.kinds.pop(kind, None)
        found.left_out.update(left_out)
        found.left_out.update(others)
        if survey.images():
            found.left_out.add(f"images beside the {kind}", survey.first(), survey.images())
    if split and splits.get(""):
        found.left_out.add(f"{kind} of no split", splits[""][0], len(splits[""]))
    return [by_path[path] for path in splits[split]], found


def choose_split(location: SourceLocation, splits: list[str]) -> str:
    """Return the split to take of those that the source holds. Raises UserError if that is not decided."""
    known = ", ".join(splits)
    if location.split and location.split not in splits:
        same = [split for split in splits if split.lower() == location.split.lower()]
        if len(same) == 1:
            return same[0]
        if not splits:
            raise UserError(
                f"The source {location.uri!r} has no splits, and {location.split!r} is named. Leave it out."
            )
        near = did_you_mean(location.split, splits)
        raise UserError(
            f"The source {location.uri!r} has no split {location.split!r}. {near}Its splits: {known}."
        )
    if not location.split and len(splits) > 1:
        one = f"{location.uri}#{example_of(splits)}"
        raise UserError(
            f"The source {location.uri!r} holds several splits: {known}. Name one, as in {one!r}."
        )
    return location.split or "".join(splits)


def numbered(
    location: SourceLocation, kind: str, noun: str, known: dict[str, tuple[int, int, int]]
) -> tuple[int, dict[str, int], str]:
    """Parse the name of a drawn set, such as "shapes:1000?seed=3#test": its size, its options and its split.

    `noun` says what is drawn; every known option has a default, a smallest and a largest value.
    """
    count, _, query = location.uri.partition(":")[2].partition("?")
    options = {name: default for name, (default, _, _) in known.items()}
    example = f"{kind}:500?" + "&".join(f"{name}={value}" for name, value in options.items())
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in options:
            raise unknown(f"option of {kind}", name, options)
        options[name] = _integer(name, value, known[name][1:], location, example)
    split = location.split or "train"
    if split not in ("train", "test"):
        raise unknown(f"split of {kind}", split, ["train", "test"])
    return _integer(f"number of {noun}", count, (1, 2**40), location, example), options, split


def _integer(name: str, text: str, bounds: tuple[int, int], location: SourceLocation, example: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = bounds[0] - 1
    if not bounds[0] <= value <= bounds[1]:
        raise UserError(
            f"The {name} in {location.uri!r} is {text!r} and must be a whole number from {bounds[0]} to {bounds[1]}. "
            f"Write it as in {example}."
        )
    return value

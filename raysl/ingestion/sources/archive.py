"""Archives: tar (compressed or not, by content), WebDataset shards, and zip.

The names inside an archive are a tree of files, and `raysl.ingestion.layout` recognizes its classes and splits. In a
WebDataset the files of a sample share a key: that of `a/b/0001.seg.png` is `a/b/0001`. Its label is in `.cls` as
digits, or in a field of `.json`. Archives are never unpacked to disk: what a member is called does not matter for
safety.
"""

from __future__ import annotations

import lzma
import stat
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

from raysl.errors import UserError, explained
from raysl.ingestion import labels, layout, metadata, tar, video
from raysl.ingestion.found import LeftOut, printable
from raysl.ingestion.listing import (
    ARCHIVE,
    IMAGE,
    LABEL_TABLES,
    TABLE,
    VIDEO,
    File,
    Survey,
    join,
    kind_of,
    stamp,
)
from raysl.ingestion.members import MOST_BYTES, Listing, Member, plain
from raysl.ingestion.sources import (
    Confidence,
    ReadConfig,
    Row,
    SourceLocation,
    Unit,
    UnitSize,
    choose_split,
    files_ending,
    in_units,
    read_split,
)
from raysl.storage import Folder
from raysl.stream.formats import JPEG

SUMMARY = "tar and zip archives, WebDataset shards"

_SUFFIXES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".zip")
# Damage to a single member of a zip archive.
_ZIP_DAMAGE = (zipfile.BadZipFile, EOFError, RuntimeError, lzma.LZMAError, zlib.error)
# Members whose damage refuses a zip archive, since their labels would be lost.
_LABELS = (".cls", ".json", *LABEL_TABLES)
_WHOLE = UnitSize(sys.maxsize, sys.maxsize)
# The image of a sample that has several, in this order.
_PREFERRED = ("jpg", "jpeg", "png", "webp", "image", "img")


def recognize(location: SourceLocation) -> Confidence:
    if location.uri.lower().endswith(_SUFFIXES) and not location.is_folder and Folder(location.uri).exists():
        return Confidence.IS
    if not location.is_folder:
        return Confidence.NO
    survey, _ = location.survey
    archives = survey.others().kinds.get(ARCHIVE, (0, ""))[0]
    # A few loose pictures beside many archives, such as a preview, are not the data set.
    few = survey.images() <= min(archives, 20) and 100 * survey.num_bytes[IMAGE] < survey.num_bytes[ARCHIVE]
    return Confidence.IS if few and files_ending(location, _SUFFIXES) else Confidence.NO


def _list(location: SourceLocation, path: str) -> Listing:
    with tar.opened(location.uri, path) as (_, packed):
        listing = Listing(
            path, {"": "tar", "zip": "zip"}.get(packed, "stream"), printable(path or location.uri)
        )
    if packed == "zip":
        _list_zip(location, listing)
        return listing
    for number, (member, content) in enumerate(tar.members(location.uri, path)):
        if not member.isdir():
            entry = Member(member.name, number if packed else member.offset_data, member.size)
            listing.take(entry, member.isfile() and not member.issparse(), content, location.config)
    return listing


def _list_zip(location: SourceLocation, listing: Listing) -> None:
    with _opened_zip(location.uri, listing.path) as archive:
        for info in archive.infolist():
            if info.is_dir():
                continue
            if info.flag_bits & 1:
                raise UserError(
                    f"The archive {listing.name!r} is encrypted. Unpack it and ingest the folder."
                )
            linked = stat.S_ISLNK(info.external_attr >> 16)
            member = Member(info.filename, -1, info.file_size)
            try:
                listing.take(member, not linked, partial(_content, archive, info), location.config)
            except _ZIP_DAMAGE:
                if info.filename.lower().endswith(_LABELS):
                    raise
                listing.left_out.add("damaged members", plain(info.filename))


def _content(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    with archive.open(member) as stream:
        # A bomb holds more than its directory says.
        return stream.read(min(member.file_size, MOST_BYTES))


@contextmanager
def _opened_zip(root: str, path: str) -> Iterator[zipfile.ZipFile]:
    what = f"Cannot read the archive {printable(f'{root}/{path}'.rstrip('/'))!r}"
    remedy = "Download or copy it again, then run the same command."
    # Arrow's streams raise ValueError at a false place.
    with explained(what, remedy, *_ZIP_DAMAGE, OSError, ValueError):
        with tar.opened(root, path) as (stream, _), zipfile.ZipFile(stream) as archive:
            yield archive


class Source:
    """See `raysl.ingestion.sources.Source`."""

    def __init__(self, location: SourceLocation) -> None:
        self._location = location
        self.clips: dict[str, Any] = {}
        self._sampling: list[float] = []
        self._files, self.found = read_split(location, files_ending(location, _SUFFIXES), ARCHIVE)
        self._split = split = self.found.split
        with ThreadPoolExecutor(8) as pool:
            self._listings = list(pool.map(lambda file: _list(location, file.path), self._files))
        # By archive, the classes of its images in its table; None if no archive has one.
        self._class_of: dict[str, dict[str, str]] | None = None
        inner = self._inner_split(location)
        self.encoded_here = bool(self.clips)
        self.name = str(replace(location, split=split or inner))

    def _inner_split(self, location: SourceLocation) -> str:
        """Recognize the classes and splits in the archives."""
        listings = self._listings
        for listing in listings:
            self.found.left_out.update(listing.left_out)
        self._choose_kind(location.config)
        if not any(listing.images for listing in listings):
            raise UserError(
                f"The archives at {location.uri!r} hold no images. They hold {self.found.left_out}."
            )
        self._choose_images(location.config.image_column)
        if self._first_dot:
            for listing in listings:
                _take_fields(listing)
        tables = dict.fromkeys(name for listing in listings for name in listing.tables)
        images = (File(name, m.size, 0) for listing in listings for name, m in listing.images.items())
        # Names that do not tell are those of images, as their content did.
        about = VIDEO if self.clips else IMAGE
        survey = Survey.of(chain(images, (File(name, 0, 0) for name in tables)), lambda _: JPEG, about)
        inner = LeftOut()
        choose = partial(choose_split, replace(location, split="") if self._split else location)
        self._layout = layout.recognize(survey, choose, location.config.labels, inner)
        if location.config.labels == "auto":
            self._apply_tables(location.config.label_column)
        self.found.left_out.update(inner)
        found = self._layout.found
        why = next((why for listing in listings for why in listing.unusable.values()), "")
        no_label = next((listing.no_label for listing in listings if listing.no_label), "")
        example = next((name for listing in listings for name, label in listing.classes.items() if label), "")
        self._in_members = bool(example) and not why
        self.found.layout = f"{_count(listings)}: {found.layout}"
        self.found.labels = "; ".join(filter(None, (found.labels, why or no_label)))
        if self._in_members:
            self.found.layout = f"{_count(listings)}: samples with labels (WebDataset)"
            self.found.labels = f"the .cls or .json of each sample, as {printable(example)}"
        elif len(listings) > 1 and found.labels.startswith("none"):
            example = listings[0].name
            self.found.labels += f"; the names of the archives, as {example}, are not taken for classes"
        table = self.found.left_out.kinds.get(TABLE, (0, ""))[1]
        if table and self.found.labels.startswith("none"):
            advice = (
                f"If {printable(table)} holds labels, unpack the archive, and give that table as the source"
            )
            self.found.labels += f". {advice}"
        if self.clips:
            self.found.rename_to_videos()
        if not self._split:
            self.found.splits, self.found.split = found.splits, found.split
        return found.split

    def _choose_kind(self, config: ReadConfig) -> None:
        """Take the videos if there are more of them than images, or if the user names their suffix."""
        listings = self._listings
        images = sum(len(listing.images) for listing in listings)
        videos = sum(len(listing.videos) for listing in listings)
        named = kind_of(f"x.{config.image_column}")
        if named == VIDEO or (videos > images and named != IMAGE):
            self.clips, self._sampling = video.sampled(config)
        for listing in listings:
            if self.clips:
                listing.images, listing.videos = listing.videos, listing.images
            for name in listing.videos:
                self.found.left_out.add("images" if self.clips else VIDEO, name)

    def _apply_tables(self, wanted: str) -> None:
        """Label the images of each archive from its own table, or from a table in an archive without images."""
        without = [listing for listing in self._listings if not listing.images]
        shared = {name: data for listing in without for name, data in listing.tables.items()}
        layouts = {}
        for listing in self._listings:
            tables = listing.tables or shared
            if listing.images and tables:
                one = replace(self._layout, found=replace(self._layout.found))
                metadata.apply(tables.__getitem__, Survey(tables=set(tables)), one, wanted)
                layouts[listing.path] = one
        labeled = [one for one in layouts.values() if one.class_of is not None]
        self._layout = next(iter([*labeled, *layouts.values()]), self._layout)
        if labeled:
            # Images of an archive without labels have none: they must not take those of another archive.
            self._class_of = {path: one.class_of or {} for path, one in layouts.items()}

    def _choose_images(self, wanted: str) -> None:
        """Decide what the key of a sample is, and take one image of samples that have several."""
        keys = [_key(name, first_dot=True) for listing in self._listings for name in listing.images]
        fields = Counter(suffix for _, suffix in keys)
        samples = len({key for key, _ in keys})
        often = samples > 1 and all(2 * count >= samples for count in fields.values())
        # Dots that are no fields of samples belong to names such as 2023.01.05.jpg.
        self._first_dot = often or not any("." in one for one in fields)
        if wanted and wanted.lower() not in fields:
            raise UserError(
                f"No image in {self._location.uri!r} has the suffix {wanted!r}, which --image-column names. The "
                f"suffixes are {', '.join(sorted(fields)[:20])}."
            )
        if not wanted and (not often or len(keys) <= samples):
            return
        chosen = wanted.lower() or next((name for name in _PREFERRED if name in fields), min(fields))
        what = f"other images of the samples (.{chosen} is taken; --image-column names another)"
        for listing in self._listings:
            for name in list(listing.images):
                if _key(name, first_dot=True)[1] != chosen:
                    del listing.images[name]
                    self.found.left_out.add(what, name)
        self._first_dot = True

    def stamp(self) -> str:
        return stamp(self._files) + self._location.config.flags()

    def units(self, size: UnitSize) -> Iterator[Unit]:
        classes = labels.Classes()
        of_archive, self.found.images = self._layout, 0
        for listing in self._listings:
            if self._class_of is not None:
                of_archive = replace(of_archive, class_of=self._class_of.get(listing.path, {}))
            # A compressed archive is read from its beginning, so it is one unit.
            most = _WHOLE if listing.format == "stream" else size
            for taken in in_units(self._labeled(listing, of_archive), most, lambda one: (1, one[0].size)):
                for image, label in taken:
                    classes.add((label,), f"{listing.path}/{plain(image.name)}".strip("/"))
                self.found.images += len(taken)
                spec = {
                    "root": self._location.uri,
                    "path": listing.path,
                    "how": listing.format,
                    "images": [list(image) for image, _ in taken],
                    "labels": [label for _, label in taken],
                    "sampling": self._sampling,
                }
                yield Unit(len(taken), spec)
        classes.settle(self.found, not self._in_members and self._class_of is None)

    def _labeled(self, listing: Listing, of_archive: layout.Layout) -> Iterator[tuple[Member, str | None]]:
        for name, image in listing.images.items():
            try:
                label = of_archive.label(name)
            except layout.Skip as skip:
                if skip.args:
                    self.found.left_out.add(skip.args[0], name)
                if skip.args or not self._in_members:
                    continue
            if self._in_members:
                label = listing.classes.get(_key(name, self._first_dot)[0])
            yield image, label


def _count(listings: list[Listing]) -> str:
    packed = ", compressed" if any(listing.format == "stream" for listing in listings) else ""
    if len(listings) == 1:
        return f"one {'zip' if listings[0].format == 'zip' else 'tar'} archive{packed}"
    return f"{len(listings):,} archives{packed}"


def _key(name: str, first_dot: bool) -> tuple[str, str]:
    """Return the key of a member and its suffix, split at the first or at the last dot of its name."""
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".") if first_dot else base.rpartition(".")
    return join(folder, stem), suffix.lower()


def _take_fields(listing: Listing) -> None:
    """Give samples the labels in fields with names of their own, such as 0001.target.cls, which wins over a .json."""
    for stem, label in list(listing.classes.items()):
        sample = _key(f"{stem}.", first_dot=True)[0]
        if sample == stem:
            continue
        if stem in listing.in_cls and sample not in listing.in_cls:
            listing.in_cls.add(sample)
            listing.classes[sample] = label
            listing.unusable.pop(sample, None)
        elif listing.classes.setdefault(sample, label) != label:
            several = f"{printable(sample)} has several labels, one of them in {printable(stem)}"
            listing.unusable[sample] = several


def read(unit: Unit) -> Iterator[Row]:
    spec = unit.spec
    archive = spec["path"] or spec["root"].rpartition("/")[2]
    images = [Member(*image) for image in spec["images"]]
    contents = {"zip": _read_zip, "stream": _read_stream, "tar": _read_tar}[spec["how"]]
    rows = contents(spec["root"], spec["path"], images)
    for image, label, data in zip(images, spec["labels"], rows, strict=True):
        path, sampling = printable(f"{archive}/{image.name}"), spec.get("sampling")
        row = Row(data, label, path) if isinstance(data, bytes) else Row(None, label, path, data)
        yield from video.clips(row, video.Sampling(*sampling)) if sampling else [row]


def _read_tar(root: str, path: str, images: list[Member]) -> Iterator[bytes | str]:
    with tar.opened(root, path) as (stream, _):
        for image in images:
            stream.seek(image.offset)
            data = bytes(stream.read(image.size))
            if len(data) < image.size:
                raise UserError(
                    f"The archive {printable(f'{root}/{path}'.rstrip('/'))!r} ends inside of "
                    f"{printable(image.name)!r}, although it was whole when it was listed. Run the same command again."
                )
            yield data


def _read_stream(root: str, path: str, images: list[Member]) -> Iterator[bytes | str]:
    wanted = iter(images)
    image = next(wanted, None)
    for number, (_, content) in enumerate(tar.members(root, path)):
        if image is not None and number == image.offset:
            yield content()
            image = next(wanted, None)


def _read_zip(root: str, path: str, images: list[Member]) -> Iterator[bytes | str]:
    with _opened_zip(root, path) as archive:
        for image in images:
            try:
                yield _content(archive, archive.getinfo(image.name))
            except _ZIP_DAMAGE as error:
                yield f"is damaged inside of the archive: {error}"

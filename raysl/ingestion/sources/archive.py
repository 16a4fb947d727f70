"""Archives: tar (compressed or not, by content), WebDataset shards, and zip.

The names inside an archive are a tree of files, and `raysl.ingestion.layout` recognises its classes and splits. In a
WebDataset the files of a sample share a key: that of `a/b/0001.seg.png` is `a/b/0001`. Its label is in `.cls` as
digits, or in a field of `.json`. Archives are never unpacked to disk: what a member is called does not matter for
safety.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import NamedTuple

from raysl.errors import UserError
from raysl.ingestion import labels, layout, metadata, tar
from raysl.ingestion.found import LeftOut, shown
from raysl.ingestion.listing import (
    ARCHIVE,
    HIDDEN,
    IMAGE,
    LABEL_TABLES,
    OTHER,
    File,
    Survey,
    is_hidden,
    kind_of,
    stamp,
)
from raysl.ingestion.sources import (
    Confidence,
    Place,
    ReadConfig,
    Row,
    Unit,
    UnitSize,
    choose_split,
    files_ending,
    read_split,
)
from raysl.storage import Folder
from raysl.stream.formats import JPEG, looks_like_image

SUMMARY = (
    "tar and zip archives, WebDataset shards: shard-000000.tar, photos.tar.gz, photos.zip, s3://bucket/shards"
)

_SUFFIXES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".zip")
# Larger members are not taken into memory.
_MOST_BYTES = 1 << 30
_MOST_LABEL_BYTES = 1 << 24
_HEAD_BYTES = 4096
_LABELS = ("cls", "json")
# The image of a sample that has several, in this order.
_PREFERRED = ("jpg", "jpeg", "png", "webp", "image", "img")


def recognise(place: Place) -> Confidence:
    if place.uri.lower().endswith(_SUFFIXES) and not place.is_folder and Folder(place.uri).exists():
        return Confidence.IS
    if not place.is_folder:
        return Confidence.NO
    survey, _ = place.survey
    archives = survey.others().kinds.get(ARCHIVE, (0, ""))[0]
    # A few loose pictures beside many archives, such as a preview, are not the data set.
    few = survey.images() <= min(archives, 20) and 100 * survey.num_bytes[IMAGE] < survey.num_bytes[ARCHIVE]
    return Confidence.IS if few and files_ending(place, _SUFFIXES) else Confidence.NO


class Member(NamedTuple):
    """An image in an archive: its name, where its content begins (in a stream its number), and its size."""

    name: str
    offset: int
    size: int


@dataclass
class Listing:
    """What an archive holds.

    Args:
        path: of the archive below the source.
        how: "tar", "stream" (a compressed tar, read from its beginning) or "zip".
        name: of the archive, for messages.
        images: in the order of the archive.
        classes: by the name of a `.cls` or `.json` member without its suffix, the label in it.
        why: why a label is not taken, for the first that is not.
        tables: by name, the content of the files that may hold labels, see `raysl.ingestion.metadata`.
    """

    path: str
    how: str
    name: str
    images: dict[str, Member] = field(default_factory=dict)
    classes: dict[str, str | None] = field(default_factory=dict)
    why: str = ""
    tables: dict[str, bytes] = field(default_factory=dict)
    left_out: LeftOut = field(default_factory=LeftOut)

    def take(self, member: Member, is_file: bool, content: Callable[[], bytes], config: ReadConfig) -> None:
        """Take a member, or count it as left out.

        Args:
            content: returns the content of the member.
        """
        name, size = _plain(member.name), member.size
        if not is_file:
            self.left_out.add("links and devices in archives", name)
        elif name.startswith("/") or ".." in name.split("/"):
            self.left_out.add("members with absolute paths or ..", name)
        elif is_hidden(name):
            self.left_out.add(HIDDEN, name)
        elif size > _MOST_BYTES:
            self.left_out.add(f"members larger than {_MOST_BYTES >> 20} MB", name)
        else:
            base = name.rpartition("/")[2]
            suffix = base.rpartition(".")[2]
            kind = kind_of(name) or (f"members called .{suffix}" if "." in base else OTHER)
            small = size <= _MOST_LABEL_BYTES and config.labels == "auto"
            if kind == OTHER and looks_like_image(content()[:_HEAD_BYTES]):
                kind = IMAGE
            if kind == IMAGE:
                if self.images.pop(name, None):
                    self.left_out.add("members replaced by later ones of the same name", name)
                self.images[name] = member
            elif small and base in LABEL_TABLES:
                self.tables[name] = content()
            elif small and suffix in _LABELS:
                self._take_label(name, content(), config.label_column)
            elif suffix not in _LABELS:
                self.left_out.add(kind, name)

    def _take_label(self, name: str, data: bytes, wanted: str) -> None:
        """Read the label in a `.cls` or `.json` member."""
        stem, _, suffix = name.rpartition(".")
        try:
            if suffix == "cls":
                self.classes[stem] = labels.as_class_of_text(data.decode())
                return
            value = json.loads(data)
            if not isinstance(value, dict):
                raise labels.NoClassesError("holds no JSON object with named fields")
            column = wanted if wanted in value else labels.find(list(value), "", name)
            if not column:
                raise labels.NoClassesError(
                    f"has no label, its fields are {', '.join(value)} (--label-column)"
                )
            self.classes[stem] = labels.as_class(value[column])
        except (ValueError, labels.NoClassesError) as error:
            reason = str(error) if isinstance(error, labels.NoClassesError) else f"is damaged: {error}"
            self.why = self.why or f"{shown(name)} {reason}"


def _plain(name: str) -> str:
    """Return the name of a member with "/" between its parts, also where Windows wrote "\\"."""
    return (name if "/" in name else name.replace("\\", "/")).removeprefix("./")


def _list(place: Place, path: str) -> Listing:
    name = shown(path or place.uri)
    with tar.opened(place.uri, path) as (_, packed):
        if packed == "zip":
            return _list_zip(place, path)
    listing = Listing(path, "stream" if packed else "tar", name)
    for number, (member, content) in enumerate(tar.members(place.uri, path)):
        if not member.isdir():
            entry = Member(member.name, number if packed else member.offset_data, member.size)
            listing.take(entry, member.isfile() and not member.issparse(), content, place.config)
    return listing


def _list_zip(place: Place, path: str) -> Listing:
    listing = Listing(path, "zip", shown(path or place.uri))
    with _opened_zip(place.uri, path) as archive:
        for info in archive.infolist():
            if info.is_dir():
                continue
            if info.flag_bits & 1:
                raise UserError(
                    f"The archive {shown(path or place.uri)!r} is encrypted. Unpack it and ingest the folder."
                )
            linked = (info.external_attr >> 16) & 0o170000 == 0o120000
            member = Member(info.filename, -1, info.file_size)
            listing.take(member, not linked, partial(_content, archive, info), place.config)
    return listing


def _content(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    with archive.open(member) as stream:
        # A bomb holds more than its directory says.
        return stream.read(min(member.file_size, _MOST_BYTES))


@contextmanager
def _opened_zip(root: str, path: str) -> Iterator[zipfile.ZipFile]:
    try:
        with tar.opened(root, path) as (stream, _), zipfile.ZipFile(stream) as archive:
            yield archive
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError) as error:
        raise UserError(
            f"Cannot read the archive {shown(f'{root}/{path}'.rstrip('/'))!r}: {error}. Download or copy it again, "
            "then run the same command."
        ) from error


class Source:
    """See `raysl.ingestion.sources.Source`."""

    encoded_here = False

    def __init__(self, place: Place) -> None:
        self._place = place
        self._files, self.found = read_split(place, files_ending(place, _SUFFIXES), ARCHIVE, inner=True)
        self._split = split = self.found.split
        self._listings: list[Listing] | None = None
        inner = self._inner_split(place)
        self.name = str(replace(place, split=split or inner))

    def _inner_split(self, place: Place) -> str:
        """List the archives, and recognise their classes and splits."""
        with ThreadPoolExecutor(8) as pool:
            self._listings = list(pool.map(lambda file: _list(place, file.path), self._files))
        listings = self._listings
        for listing in listings:
            self.found.left_out.update(listing.left_out)
        if not any(listing.images for listing in listings):
            raise UserError(f"The archives at {place.uri!r} hold no images. They hold {self.found.left_out}.")
        self._choose_images(place.config.image_column)
        tables = {name: data for listing in listings for name, data in listing.tables.items()}
        images = (File(name, m.size, 0) for listing in listings for name, m in listing.images.items())
        # Names that do not tell are those of images, as their content did.
        survey = Survey.of(chain(images, (File(name, 0, 0) for name in tables)), lambda _: JPEG)
        inner = LeftOut()
        self._layout = layout.recognise(
            survey,
            lambda splits: choose_split(replace(place, split="") if self._split else place, splits),
            place.config.labels,
            inner,
        )
        if place.config.labels == "auto":
            metadata.apply(tables.__getitem__, survey, self._layout, place.config.label_column)
        self.found.left_out.update(inner)
        found = self._layout.found
        why = next((listing.why for listing in listings if listing.why), "")
        example = next((name for listing in listings for name, label in listing.classes.items() if label), "")
        self._in_members = bool(example) and not why
        self.found.layout = f"{_count(listings)}: {found.layout}"
        self.found.labels = f"{found.labels}; {why}" if why else found.labels
        if self._in_members:
            self.found.layout = f"{_count(listings)}: samples with labels (WebDataset)"
            self.found.labels = f"the .cls or .json of each sample, as {shown(example)}"
        elif len(listings) > 1 and found.labels.startswith("none"):
            self.found.labels += (
                f"; the names of the archives, as {listings[0].name}, are not taken for classes"
            )
        if not self._split:
            self.found.splits, self.found.split = found.splits, found.split
        return found.split

    def _choose_images(self, wanted: str) -> None:
        """Decide what the key of a sample is, and take one image of samples that have several."""
        listings = self._listings or []
        images = [name for listing in listings for name in listing.images]
        fields = Counter(_key(name, first_dot=True)[1] for name in images)
        samples = len({_key(name, first_dot=True)[0] for name in images})
        often = samples > 1 and all(2 * count >= samples for count in fields.values())
        # Dots that are no fields of samples belong to names such as 2023.01.05.jpg.
        self._first_dot = often or not any("." in one for one in fields)
        if wanted and wanted.lower() not in fields:
            raise UserError(
                f"No image in {self._place.uri!r} has the suffix {wanted!r}, which --image-column names. The suffixes "
                f"are {', '.join(sorted(fields)[:20])}."
            )
        if not wanted and (not often or len(images) <= samples):
            return
        chosen = wanted.lower() or next((name for name in _PREFERRED if name in fields), min(fields))
        what = f"other images of the samples (.{chosen} is taken; --image-column names another)"
        for listing in listings:
            for name in list(listing.images):
                if _key(name, first_dot=True)[1] != chosen:
                    del listing.images[name]
                    self.found.left_out.add(what, name)
        self._first_dot = True

    def stamp(self) -> str:
        return stamp(self._files) + str(self._place.config)

    def units(self, size: UnitSize) -> Iterator[Unit]:
        classes = labels.Classes()
        self.found.images = 0
        for listing in self._listings or []:
            taken: list[tuple[Member, str | None]] = []
            num_bytes = 0
            for name, image in listing.images.items():
                try:
                    label = self._layout.label(name)
                except layout.Skip:
                    if not self._in_members:
                        continue
                if self._in_members:
                    label = listing.classes.get(_key(name, self._first_dot)[0])
                full = len(taken) >= size.num_images or num_bytes + image.size > size.num_bytes
                if taken and full and listing.how != "stream":
                    yield self._unit(listing, taken)
                    taken, num_bytes = [], 0
                taken.append((image, label))
                num_bytes += image.size
                classes.add((label,), f"{listing.path}/{name}".strip("/"))
            if taken:
                yield self._unit(listing, taken)
        by_name = not self._in_members and self._layout.class_of is None
        if not by_name and (why := classes.why_none()):
            self.found.labels = f"none, although they are {self.found.labels}: {shown(why)}"
        else:
            self.found.classes = dict(sorted(classes.counts.items())) if by_name else classes.ordered()

    def _unit(self, listing: Listing, taken: list[tuple[Member, str | None]]) -> Unit:
        self.found.images += len(taken)
        spec = {
            "root": self._place.uri,
            "path": listing.path,
            "how": listing.how,
            "images": [list(image) for image, _ in taken],
            "labels": [label for _, label in taken],
        }
        return Unit(len(taken), spec)


def _count(listings: list[Listing]) -> str:
    packed = ", compressed" if any(listing.how == "stream" for listing in listings) else ""
    if len(listings) == 1:
        return f"one {'zip' if listings[0].how == 'zip' else 'tar'} archive{packed}"
    return f"{len(listings):,} archives{packed}"


def _key(name: str, first_dot: bool) -> tuple[str, str]:
    """Return the key of a member and its suffix, split at the first or at the last dot of its name."""
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".") if first_dot else base.rpartition(".")
    return (f"{folder}/{stem}" if folder else stem), suffix.lower()


def read(unit: Unit) -> Iterator[Row]:
    spec = unit.spec
    archive = spec["path"] or spec["root"].rpartition("/")[2]
    images = [Member(*image) for image in spec["images"]]
    contents = {"zip": _read_zip, "stream": _read_stream, "tar": _read_tar}[spec["how"]]
    rows = contents(spec["root"], spec["path"], images)
    for image, label, data in zip(images, spec["labels"], rows, strict=True):
        path = shown(f"{archive}/{image.name}")
        yield Row(data, label, path) if isinstance(data, bytes) else Row(None, label, path, data)


def _read_tar(root: str, path: str, images: list[Member]) -> Iterator[bytes | str]:
    with tar.opened(root, path) as (stream, _):
        for image in images:
            stream.seek(image.offset)
            data = bytes(stream.read(image.size))
            if len(data) < image.size:
                raise UserError(
                    f"The archive {shown(f'{root}/{path}'.rstrip('/'))!r} ends inside of {shown(image.name)!r}, "
                    "although it was whole when it was listed. Run the same command again."
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
            except (zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError, zlib.error) as error:
                yield f"is damaged inside of the archive: {error}"

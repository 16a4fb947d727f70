"""WebDataset: tar archives in which the files of one sample follow each other under one key.

The key of `a/b/0001.seg.png` is `a/b/0001`. A sample is an image member and, beside it, an optional `.cls` with
the label as decimal digits; other members are ignored. Order: archives by name, then samples as archived.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from raysl.errors import UserError
from raysl.ingestion.listing import File, files_below, is_folder, split_of, stamp
from raysl.ingestion.sources import Confidence, Place, Row, Unit, UnitSize, choose_split
from raysl.storage import filesystem
from raysl.stream.formats import EXTENSIONS

SUMMARY = "WebDataset shards: shard-000000.tar, shards/, s3://bucket/shards"

_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def recognise(place: Place) -> Confidence:
    if place.uri.endswith((".tar", *_PACKED)):
        return Confidence.IS
    found = is_folder(place.uri) and any(
        f.path.endswith((".tar", *_PACKED)) for f in files_below(place.uri, 1)
    )
    return Confidence.IS if found else Confidence.NO


class Source:
    """See `raysl.ingestion.sources.Source`."""

    encoded_here = False
    labelled = True
    classes: tuple[str, ...] | None = None

    def __init__(self, place: Place) -> None:
        files = list(files_below(place.uri, 1))
        if not files:
            raise UserError(f"The source {place.uri!r} does not exist.")
        packed = [file.path or place.uri for file in files if (file.path or place.uri).endswith(_PACKED)]
        if packed:
            raise UserError(
                f"The archive {packed[0]!r} is compressed, which rules out reading it in parts. Images gain nothing "
                "by it: unpack it to a plain .tar (as with gunzip) and ingest that."
            )
        shards = [file for file in files if (file.path or place.uri).endswith(".tar")]
        split = choose_split(place, sorted({split_of(file.path) for file in shards} - {""}))
        self._files = [file for file in shards if split_of(file.path) == split]
        self._root = place.uri
        self.name = str(Place(place.uri, split))

    def stamp(self) -> str:
        return stamp(self._files)

    def units(self, size: UnitSize) -> Iterator[Unit]:
        def unit(file: File) -> Unit:
            spec = {"root": self._root, "path": file.path}
            with _opened(spec) as archive:
                return Unit(sum(_is_image(member) for member in archive), spec)

        with ThreadPoolExecutor(8) as pool:
            yield from pool.map(unit, self._files)


@contextmanager
def _opened(spec: dict[str, str]) -> Iterator[tarfile.TarFile]:
    fs, root = filesystem(spec["root"])
    place = f"{root}/{spec['path']}".rstrip("/")
    try:
        with fs.open_input_file(place) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            yield archive
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(
            f"Cannot read the archive {place!r}: {error}. Download or copy it again, then run the same command."
        ) from error


def _is_image(member: tarfile.TarInfo) -> bool:
    return member.isfile() and member.name.lower().endswith(EXTENSIONS) and not _base(member).startswith(".")


def _base(member: tarfile.TarInfo) -> str:
    return member.name.rpartition("/")[2]


def _key(member: tarfile.TarInfo) -> str:
    folder, _, base = member.name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def read(unit: Unit) -> Iterator[Row]:
    with _opened(unit.spec) as archive:
        image: Row | None = None
        key, label = "", None
        for member in archive:
            # tarfile remembers every member; forgetting them keeps the memory that of one sample.
            archive.members = []  # type: ignore[attr-defined]
            if _key(member) != key:
                if image:
                    yield image._replace(label=label)
                key, image, label = _key(member), None, None
            if not (_is_image(member) or member.name.endswith(".cls")):
                continue
            stream = archive.extractfile(member)
            data = stream.read() if stream else b""
            if member.name.endswith(".cls"):
                label = _label(data, f"{unit.spec['path']}/{member.name}")
            elif image is None:
                image = Row(data, None, f"{unit.spec['path'] or unit.spec['root']}/{member.name}")
        if image:
            yield image._replace(label=label)


def _label(data: bytes, path: str) -> int:
    try:
        return int(data)
    except ValueError:
        raise UserError(
            f"The member {path!r} should hold a class number as digits and holds {data[:40]!r}. Write numbers "
            "from 0, or leave the .cls members out to ingest without labels."
        ) from None

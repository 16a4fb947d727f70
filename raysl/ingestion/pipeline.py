"""Ingest: any source becomes the indexed data set of `raysl.dataset`, by tasks of Ray Data if it is not small.

The first pass writes all shards, each starting at the index that the listing promises. If an image could not be decoded
or a count was wrong, a second pass rewrites the index column of the later shards. Only counts travel through Ray; tasks
read from the source and write to the destination.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from itertools import accumulate, chain
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from raysl.dataset import BAD_IMAGES, SHARDS, DataSet, Manifest, Shard
from raysl.errors import UserError, counted
from raysl.fields import Bounds
from raysl.ingestion import images, objects, shard, tasks
from raysl.ingestion.found import join_names, names_checked, printable, unreadable
from raysl.ingestion.journal import Header, Journal, Listed, finished, refuse_dest_inside_source
from raysl.ingestion.sources import (
    Opened,
    ReadConfig,
    Source,
    SourceLocation,
    UnitSize,
    open_source,
    read,
    recognized,
)
from raysl.storage import Folder
from raysl.storage.lock import DriverLock
from raysl.storage.records import signed_line
from raysl.stream.pixels import DecodeConfig, Ranges

_log = logging.getLogger("raysl.ingestion")
_LINE_EVERY_S = 5.0


@dataclass(frozen=True)
class IngestConfig(ReadConfig):
    """Configuration of ingest.

    Args:
        split: split of the source to read; the same as appending "#SPLIT" to SOURCE.
        shard_images: maximum number of images in a shard. One task writes one shard; an interrupted ingest keeps
            complete shards.
        shard_mb: maximum size of a shard in megabytes, for sources whose file sizes are known before they are read.
        row_group_images: maximum number of images in a row group, which also holds at most 4 MB; data are read and
            shuffled by row groups.
        cpus_per_task: logical CPUs that Ray gives to a task. If a machine runs out of memory, raise it, so that fewer
            tasks run at once.
        decoding: treatment of transparent, high-depth, many-page and large images.
    """

    split: str = ""
    shard_images: Annotated[int, Bounds(1, 2**31 - 1)] = 16384
    shard_mb: Annotated[int, Bounds(1, 2**20)] = 256
    row_group_images: Annotated[int, Bounds(1, 2**31 - 1)] = 512
    cpus_per_task: Annotated[float, Bounds(above=0, high=10**5)] = 1.0
    decoding: DecodeConfig = field(default_factory=DecodeConfig)
    # Parts whose fields may be given as fields of this configuration, as the flags do.
    MERGED: ClassVar = ("decoding",)

    def location(self, source: str) -> SourceLocation:
        """Return the location of a source, to be read as configured."""
        return SourceLocation.parse(source, self.split, self.reading)

    @property
    def reading(self) -> ReadConfig:
        """The fields that say how a source is read."""
        return ReadConfig(**{field.name: getattr(self, field.name) for field in fields(ReadConfig)})


@names_checked()
def ingest(
    source: Any, dest: str, config: IngestConfig | None = None, wait: bool = False, labels: Any = None
) -> DataSet:
    """Make a data set of a source.

    An interrupted ingest resumes from its last complete shard; a finished one returns at once. The same source gets
    the same indices and the same fingerprint on any number of CPUs.

    Args:
        source: a path or a name, with "#split" if it has splits, see `recognized`; an opened source; or an object,
            see `raysl.ingestion.objects`.
        dest: folder at any URI; new, empty, or left by an earlier ingest of the same source.
        wait: wait for another process that ingests into the same folder.
        labels: one for each image of an object.

    Raises:
        UserError: the source is missing, empty, of no known kind or holds no image that can be decoded; the
            destination holds something else, cannot be written, or another process ingests into it and `wait` is
            False.
    """
    config = config or IngestConfig()
    folder = Folder(dest)
    if isinstance(source, str | os.PathLike):
        source = open_source(config.location(os.fspath(source)))
    if isinstance(source, Opened):
        if labels is not None:
            raise UserError(
                "labels= is given for a source that is a path. Leave it out, or give the images as a list of files."
            )
        if (done := complete(source, dest, config)) is not None:
            return done
        refuse_dest_inside_source(folder, source.location)
        rows = None
    else:
        rows = objects.ObjectRows.of(source, labels, config.reading)
        finished(folder, rows.name, config.decoding)  # It refuses another source before images are encoded.
    is_new = not folder.exists()
    try:
        with DriverLock(folder, "data set", wait=wait) as lock:
            opened = source if rows is None else rows.opened(folder, config.reading)
            done = complete(opened, dest, config)  # by another process
            return done or _ingest(opened, Journal(folder), config, lock)
    except UserError:
        if is_new and folder.is_local:
            with suppress(OSError):  # the folder is not empty
                os.rmdir(str(folder))
        raise


def complete(opened: Opened, dest: str, config: IngestConfig) -> DataSet | None:
    """Return the data set of a source, and say so, if an earlier ingest has completed it."""
    name = opened.source.name
    done = finished(Folder(dest), name, config.decoding)
    if done is not None and opened.location.called:
        is_same = done.manifest.stamp == opened.source.stamp()
        Folder(dest).delete(objects.FOLDER)
        if not is_same:
            raise UserError(
                f"{dest!r} holds a data set of another source of the same name, {name!r}, or files or settings have "
                "changed since it was made. Choose another destination, or delete that folder."
            )
    if done is not None:
        what = f"{counted(done.num_images, 'clip' if done.manifest.clips else 'image')} of {name}"
        if opened.location.called or done.manifest.stamp in ("", opened.source.stamp()):
            _log.info("%s is complete: %s. Delete it to ingest the source again.", done.folder, what)
        else:
            changed = (
                "%s holds %s, as they were when it was made: files of the source were added, removed or written since. "
                "To ingest the source as it is now, delete that folder or give another DEST."
            )
            _log.warning(changed, done.folder, what)
    return done


def _ingest(opened: Opened, journal: Journal, config: IngestConfig, lock: DriverLock) -> DataSet:
    listed = _list(opened.source, journal, config)
    _write_all(opened, listed, journal, config, lock)
    _scale_all(opened, listed, journal, config, lock)
    _renumber_all(journal, config, lock)
    lock.check()
    return _finish(opened.source, listed, journal, config)


def _list(source: Source, journal: Journal, config: IngestConfig) -> Listed:
    """Write all units to the journal, unless an earlier ingest of the same source did."""
    size = UnitSize(config.shard_images, config.shard_mb << 20)
    shape = (size.num_images, size.num_bytes, config.row_group_images)
    try:
        header = Header(source.name, source.stamp(), shape, images.settings(config.decoding))
        if journal.header() == header:
            if (listed := journal.listed()) is not None:
                done = f"{len(journal.done())} of {len(listed.counts)} shards are done"
                _log.info("Resuming %s: %s.", journal.dest, done)
                return listed
        elif journal.header() is not None:
            changed = "The source or the settings have changed: %s starts from the beginning."
            _log.warning(changed, journal.dest)
        units = source.units(size)
        first = next(units, None)
        if first is None:
            if not (others := source.found.left_out).kinds:
                raise UserError(f"The source {source.name!r} holds no images: it is empty, or has no rows.")
            raise UserError(f"The source {source.name!r} holds no images. It holds {others}. {recognized()}")
        journal.start(header)
        journal.dest.delete(SHARDS)
        counts = []
        for number, unit in enumerate(chain([first], units)):
            journal.write_unit(number, unit)
            counts.append(unit.num_images)
            if number % 50 == 49:
                _log.info("Listed %s images so far.", f"{sum(counts):,}")
    except OSError as error:
        raise unreadable(source.name, error) from error
    found = source.found
    _log.info("Found:\n%s", found.table(source.name))
    listed = Listed(tuple(counts), tuple(found.classes), found.labels)
    journal.write_listed(listed)
    return listed


def _write_all(
    opened: Opened, listed: Listed, journal: Journal, config: IngestConfig, lock: DriverLock
) -> None:
    """Write every shard that is not yet done."""
    done = set(journal.done())
    pending = [number for number in range(len(listed.counts)) if number not in done]
    write = _writer(opened, listed, journal, config, {})
    seen = sum(listed.counts[number] for number in done)
    _show_progress(
        tasks.run(pending, write, config.cpus_per_task, lock), "Ingesting", seen, sum(listed.counts)
    )


def _scale_all(
    opened: Opened, listed: Listed, journal: Journal, config: IngestConfig, lock: DriverLock
) -> None:
    """Write the shards that hold signed or float values again, now that the range of all of them is known."""
    with_values = [written for written in journal.all_written() if written.tally]
    ranges = images.ranges_of(images.merge(written.tally for written in with_values), config.decoding)
    pending = [
        written.unit
        for written in with_values
        if any(written.ranges.get(kind) != ranges[kind] for kind in ranges.keys() & written.tally)
    ]
    write = _writer(opened, listed, journal, config, ranges)
    total = sum(listed.counts[number] for number in pending)
    _show_progress(tasks.run(pending, write, config.cpus_per_task, lock), "Scaling the values of", 0, total)


def _writer(
    opened: Opened, listed: Listed, journal: Journal, config: IngestConfig, ranges: Ranges
) -> tasks.Work:
    """Return the function that writes the shard of a unit in a task."""
    kind, first_indices = opened.kind, [0, *accumulate(listed.counts)]
    decoding = None if opened.source.encoded_here else config.decoding

    def write(number: int) -> tuple[int, int]:
        written = shard.write(
            journal.dest,
            number,
            first_indices[number],
            read(kind, journal.unit(number)),
            decoding=decoding,
            ranges=ranges,
            classes=listed.classes,
            rows_per_group=config.row_group_images,
        )
        journal.write_done(written)
        return written.num_images, len(written.bad)

    return write


def _renumber_all(journal: Journal, config: IngestConfig, lock: DriverLock) -> None:
    """Rewrite the index column of every shard that starts at another index than the listing promised."""
    first_indices: dict[int, int] = {}
    first_index, total = 0, 0
    for written in journal.all_written():
        if written.base != first_index and written.num_images:
            first_indices[written.unit] = first_index
            total += written.num_images
        first_index += written.num_images

    def move(number: int) -> tuple[int, int]:
        written = journal.written(number)
        journal.write_done(shard.move(journal.dest, written, first_indices[number]))
        return written.num_images, 0

    _show_progress(tasks.run(list(first_indices), move, config.cpus_per_task, lock), "Renumbering", 0, total)


def _finish(source: Source, listed: Listed, journal: Journal, config: IngestConfig) -> DataSet:
    """Write bad_images.jsonl and then the manifest, and delete the journal."""
    dest, name = journal.dest, source.name
    clips, with_sound = dict(getattr(source, "clips", {})), 0
    done = len(journal.done())
    if done < len(listed.counts):
        raise UserError(
            f"The journal of {dest} holds {done} of {len(listed.counts)} shards at the end: files were deleted, or "
            "another process wrote here. Run the same command again."
        )
    shards: list[Shard] = []
    digest = hashlib.blake2b(digest_size=16)
    labels: list[Any] = [np.empty(0, np.int64)]
    tallies: list[images.Tally] = []
    reasons: list[str] = []
    kinds: Counter[str] = Counter()
    unlabeled = ""
    with dest.writing(BAD_IMAGES) as bad_images:
        for written in journal.all_written():
            for path, reason in written.bad:
                bad_images.write(signed_line({"path": path, "reason": reason}))
                kinds[reason.partition(":")[0]] += 1
                if len(reasons) < 3:
                    reasons.append(f"{path}: {reason}")
            if written.num_images:
                shards.append(written.shard)
                digest.update(f"{written.num_images} {written.digest}\n".encode())
            labels.append(np.array(written.labels, np.int64))
            with_sound += written.with_sound
            unlabeled = unlabeled or written.unlabeled
            tallies += [written.tally] if written.tally else []
    num_bad = kinds.total()
    if not shards:
        raise _nothing_decoded(name, counted(num_bad, "video" if clips else "image"), reasons, journal)
    if not num_bad:
        dest.delete(BAD_IMAGES)
    # A task that was killed leaves its half-written shard behind.
    for stray in set((dest / SHARDS).list()) - {entry.file for entry in shards}:
        dest.delete(f"{SHARDS}/{stray}")
    tally = images.merge(tallies)
    for line in images.sentences(tally, config.decoding):
        _log.info("%s", line)
    classes = () if unlabeled else listed.classes
    # The stamp is that of the source when it was listed.
    stamp = header.stamp if (header := journal.header()) else ""
    kept: dict[str, Any] = {"decoding": images.record(tally, config.decoding), "stamp": stamp}
    clips |= {"with_sound": with_sound} if clips else {}
    fingerprint = digest.hexdigest()
    manifest = Manifest(name, tuple(shards), classes, fingerprint, num_bad, clips=clips, **kept)
    made = DataSet.create(dest, manifest, labels)
    journal.delete()
    dest.delete(objects.FOLDER)
    if num_bad:
        _log_bad(kinds, reasons[0], dest, "video" if clips else "image")
    origin = listed.labels
    if unlabeled:
        origin = f"none, although they are {origin}: {unlabeled} has none"
    count = counted(manifest.num_images, "clip" if clips else "image")
    _log.info("Ingested %s%s into %s; labels: %s.", count, _in_classes(classes, labels), dest, origin)
    return made


def _in_classes(classes: Sequence[str], labels: Sequence[NDArray[np.int64]]) -> str:
    """Return " in 2 classes" with the names of those that no image is of; "" without labels."""
    if not classes:
        return ""
    counts = np.bincount(np.concatenate(labels), minlength=len(classes))
    empty = [name for name, count in zip(classes, counts, strict=True) if not count]
    verb = "has" if len(empty) == 1 else "have"
    without = f", of which {len(empty):,} {verb} no image ({join_names(empty, 6)})," if empty else ""
    return f" in {counted(len(classes), 'class')}{without}"


def _log_bad(kinds: Counter[str], first: str, dest: Folder, noun: str) -> None:
    """Log how many images or videos could not be decoded, by reason."""
    counts = ", ".join(f"{count:,} {kind!r}" for kind, count in kinds.most_common(5))
    what = f"{counted(kinds.total(), noun)} could not be decoded ({counts})"
    _log.info("%s; %s/%s lists all. The first: %s", what, dest, BAD_IMAGES, first)


def _nothing_decoded(name: str, what: str, reasons: list[str], journal: Journal) -> UserError:
    """Delete what was written for a source of which no image can be decoded, and return the error."""
    dest = journal.dest
    for entry in (BAD_IMAGES, SHARDS, objects.FOLDER):
        dest.delete(entry)
    journal.delete()
    none = f"None of the {what} of {printable(name)!r} can be decoded. The first"
    if what.startswith("1 "):
        none = f"The only {what[2:]} of {printable(name)!r} cannot be decoded"
    return UserError(f"{none}: {'; '.join(reasons)}. Nothing was written.")


def _show_progress(steps: Iterable[tuple[int, int]], doing: str, done: int, total: int) -> None:
    """Run all steps of work, each (images written, images that could not be decoded), and show the progress after each.

    `done` images of `total` were done before.
    """
    start_s = line_s = time.monotonic()
    first, bad = done, 0
    columns = (TextColumn(doing), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[text]}"))
    quiet = not sys.stderr.isatty() or not _log.isEnabledFor(logging.INFO)
    if quiet and done < total:
        # The console shows the seconds that pass until the first line of progress.
        _log.info("%s %s ...", doing, counted(total - done, "image"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=quiet) as bar:
        task = bar.add_task(doing, total=total, completed=done, text="")
        for step in steps:
            done, bad, now_s = done + sum(step), bad + step[1], time.monotonic()
            rate = (done - first) / max(now_s - start_s, 1e-9)
            text = f"{done:,}/{total:,} images, {rate:,.0f} images/s, {bad:,} bad"
            bar.update(task, completed=done, text=text)
            since_s = start_s if done >= total else line_s
            if quiet and now_s - since_s > _LINE_EVERY_S:
                line_s = now_s
                _log.info("%s %s, %.0f s left", doing, text, max(total - done, 0) / max(rate, 1e-9))

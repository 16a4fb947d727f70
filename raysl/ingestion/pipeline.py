"""Ingest: any source becomes the indexed data set of `raysl.dataset`, streamed through Ray Data.

One optimistic pass writes all shards, each starting at the index that the listing promises. When an image turned out
bad, or a count wrong, a second pass rewrites the index column of the shards behind it. Only counts travel through
Ray; tasks read from the source and write to the destination.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import ray.data

from raysl.dataset import LEDGER, MANIFEST, SHARDS, DataSet, Manifest, Shard
from raysl.errors import UserError
from raysl.ingestion import images, shard
from raysl.ingestion.journal import JOURNAL, Header, Journal, Listed
from raysl.ingestion.progress import Reporter, Terminal
from raysl.ingestion.sources import Place, Source, UnitSize, open_source, read, recognised
from raysl.storage import Folder
from raysl.stream.pixels import DecodeConfig, Ranges

# Labels without names count from 0; numbers beyond this identify something else.
_MOST_CLASSES = 1 << 20


@dataclass(frozen=True)
class IngestConfig:
    """How a source is ingested.

    Args:
        split: which split of the source; the same as "#split" behind its name.
        shard_images: most images in a shard. Shards are the units of work and of resumption.
        shard_mb: most megabytes in a shard, where the source tells sizes before it is read.
        row_group_images: most images in a row group (and at most 4 MB), the unit of reading and shuffling.
        cpus_per_task: logical CPUs that Ray gives to a task; above 1 fewer tasks share the memory of a machine.
        decoding: what becomes of transparent, high-depth, many-page and large images.
    """

    split: str = ""
    shard_images: int = 16384
    shard_mb: int = 256
    row_group_images: int = 512
    cpus_per_task: float = 1.0
    decoding: DecodeConfig = field(default_factory=DecodeConfig)

    def __post_init__(self) -> None:
        for name in ("shard_images", "shard_mb", "row_group_images", "cpus_per_task"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be above 0 and is {getattr(self, name)}.")


def ingest(
    source: str, dest: str, config: IngestConfig | None = None, progress: Reporter | None = None
) -> DataSet:
    """Makes a data set of a source. Ray must be running.

    An ingest that was interrupted goes on where it stopped; a finished one returns at once. The same source gets
    the same indices and the same fingerprint on any number of CPUs.

    Args:
        source: a place or a name, with "#split" where it has splits; see `recognised`.
        dest: folder at any URI; new, empty, or left by an earlier ingest of the same source.

    Raises:
        UserError: the source is missing, empty, of no known kind or holds no image that can be decoded; the
            destination holds something else or cannot be written.
    """
    config = config or IngestConfig()
    with progress or Terminal() as progress:
        place = Place.parse(source, config.split)
        kind, opened = open_source(place)
        folder = Folder(dest)
        if (finished := _finished(folder, opened.name, config)) is not None:
            progress.say(
                f"{folder} is already complete: {finished.num_images} images of {opened.name}. Delete it to ingest "
                "the source again."
            )
            return finished
        _check_apart(folder, place)
        journal = Journal(folder)
        try:
            listed = _list(opened, journal, config, progress)
            _write_all(kind, opened, listed, journal, config, progress)
            _scale_all(kind, opened, listed, journal, config, progress)
            _move_all(journal, config, progress)
            return _finish(opened.name, listed, journal, config, progress)
        except KeyboardInterrupt:
            progress.say("Interrupted. The same command goes on from here.")
            raise


def _finished(dest: Folder, name: str, config: IngestConfig) -> DataSet | None:
    """The data set at `dest` when it is finished; None when `dest` is free for this source.

    Raises:
        UserError: `dest` holds something else.
    """
    if not dest.exists():
        return None
    if dest.exists(MANIFEST):
        data_set = DataSet.open(str(dest))
        if data_set.manifest.source != name:
            raise UserError(
                f"{str(dest)!r} already holds a data set of another source, {data_set.manifest.source!r}, and not "
                f"of {name!r}. Choose another destination, or delete that folder."
            )
        made_with = {key: data_set.manifest.decoding.get(key) for key in images.settings(config.decoding)}
        if made_with != images.settings(config.decoding):
            changed = [
                key for key, value in images.settings(config.decoding).items() if made_with[key] != value
            ]
            raise UserError(
                f"{str(dest)!r} already holds this source, ingested with another --{changed[0].replace('_', '-')}: "
                f"{made_with[changed[0]]}. Choose another destination, or delete that folder."
            )
        # An interruption between the last two steps leaves the journal behind.
        Journal(dest).delete()
        return data_set
    if dest.is_local and Path(str(dest)).is_file():
        raise UserError(f"The destination {str(dest)!r} is a file. Name a folder.")
    content = [entry for entry in dest.list() if not entry.endswith(".tmp")]
    header = Journal(dest).header()
    if header is None and set(content) - {JOURNAL}:
        raise UserError(
            f"The destination {str(dest)!r} is not empty and holds no data set of raysl (the first entry is "
            f"{content[0]!r}). Choose a new folder."
        )
    if header is not None and header.source != name:
        raise UserError(
            f"{str(dest)!r} holds an unfinished data set of another source, {header.source!r}, and not of {name!r}. "
            "Finish that one, choose another destination, or delete the folder."
        )
    return None


def _check_apart(dest: Folder, place: Place) -> None:
    source = Folder(place.uri)
    if dest.is_local and source.exists() and Path(str(dest)).is_relative_to(str(source)):
        raise UserError(
            f"The destination {str(dest)!r} lies inside the source {str(source)!r}, which would then contain it. "
            "Choose a folder elsewhere."
        )


def _list(source: Source, journal: Journal, config: IngestConfig, progress: Reporter) -> Listed:
    """The listing: the one an earlier ingest wrote down, when the source is unchanged, or a new one."""
    size = UnitSize(config.shard_images, config.shard_mb << 20)
    try:
        header = Header(
            source.name,
            source.stamp(),
            (size.num_images, size.num_bytes, config.row_group_images),
            images.settings(config.decoding),
        )
        if journal.header() == header:
            if (listed := journal.listed()) is not None:
                done = f"{len(journal.done())} of {len(listed.counts)} shards are done"
                progress.say(f"Going on with {journal.dest}: {done}.")
                return listed
        elif journal.header() is not None:
            progress.say(f"The source or the settings have changed: starting {journal.dest} anew.")
        units = source.units(size)
        first = next(units, None)
        if first is None:
            raise UserError(f"The source {source.name!r} is empty: no images in it. {recognised()}")
        journal.start(header)
        journal.dest.delete(SHARDS)
        counts = []
        for number, unit in enumerate(chain([first], units)):
            journal.write_unit(number, unit)
            counts.append(unit.num_images)
            if number % 50 == 49:
                progress.say(f"Listed {sum(counts)} images so far.")
    except OSError as error:
        raise UserError(
            f"Cannot read the source {source.name!r}: {error}. Check the place and your access."
        ) from error
    listed = Listed(tuple(counts), source.labelled, source.classes)
    journal.write_listed(listed)
    return listed


def _starts(counts: list[int]) -> list[int]:
    """The first index of every unit."""
    return [0, *accumulate(counts)][:-1]


def _write_all(
    kind: str, source: Source, listed: Listed, journal: Journal, config: IngestConfig, progress: Reporter
) -> None:
    """The first pass: writes every shard that is not yet done."""
    done = set(journal.done())
    pending = [number for number in range(len(listed.counts)) if number not in done]
    write = _writer(kind, source, listed, journal, config, {})
    seen, bad = sum(listed.counts[number] for number in done), 0
    progress.update("Ingesting", seen, sum(listed.counts), bad)
    for row in _each(pending, write, config):
        seen, bad = seen + row["images"] + row["bad"], bad + row["bad"]
        progress.update("Ingesting", seen, sum(listed.counts), bad)


def _scale_all(
    kind: str, source: Source, listed: Listed, journal: Journal, config: IngestConfig, progress: Reporter
) -> None:
    """Write those shards again that hold signed or float values, now that the range of all of them is known."""
    with_values = [written for written in journal.all_written() if written.tally]
    ranges = images.ranges_of(images.merge(written.tally for written in with_values), config.decoding)
    pending = [
        written.unit
        for written in with_values
        if any(written.ranges.get(kind) != ranges[kind] for kind in ranges.keys() & written.tally)
    ]
    done, total = 0, sum(listed.counts[number] for number in pending)
    for row in _each(pending, _writer(kind, source, listed, journal, config, ranges), config):
        done += row["images"] + row["bad"]
        progress.update("Scaling values", done, total, 0)


def _writer(
    kind: str, source: Source, listed: Listed, journal: Journal, config: IngestConfig, ranges: Ranges
) -> Callable[[int], tuple[int, int]]:
    """Return the function that writes the shard of a unit, for tasks."""
    return partial(
        _write_unit,
        kind=kind,
        journal=journal,
        listed=listed,
        bases=_starts(list(listed.counts)),
        decoding=None if source.encoded_here else config.decoding,
        ranges=ranges,
        rows_per_group=config.row_group_images,
    )


def _write_unit(
    number: int,
    kind: str,
    journal: Journal,
    listed: Listed,
    bases: list[int],
    decoding: DecodeConfig | None,
    ranges: Ranges,
    rows_per_group: int,
) -> tuple[int, int]:
    """Runs in a task. Returns how many images it wrote, and how many were bad."""
    written = shard.write(
        journal.dest,
        number,
        bases[number],
        read(kind, journal.unit(number)),
        decoding=decoding,
        ranges=ranges,
        labelled=listed.labelled,
        rows_per_group=rows_per_group,
    )
    if listed.classes is not None and max(written.labels, default=-1) >= len(listed.classes):
        raise UserError(
            f"The source has {len(listed.classes)} class names but an image with label {max(written.labels)}. Labels "
            "must be 0 to one less than the number of names: mend the source."
        )
    journal.write_done(written)
    return written.num_images, len(written.bad)


def _move_all(journal: Journal, config: IngestConfig, progress: Reporter) -> None:
    """The second pass: mends the index column of every shard that starts at another index than was promised."""
    bases: dict[int, int] = {}
    base, total, done = 0, 0, 0
    for written in journal.all_written():
        if written.base != base and written.num_images:
            bases[written.unit] = base
            total += written.num_images
        base += written.num_images
    for row in _each(list(bases), partial(_move_unit, journal=journal, bases=bases), config):
        done += row["images"]
        progress.update("Renumbering", done, total, 0)


def _move_unit(number: int, journal: Journal, bases: dict[int, int]) -> tuple[int, int]:
    """Runs in a task."""
    written = journal.written(number)
    journal.write_done(shard.move(journal.dest, written, bases[number]))
    return written.num_images, 0


def _each(numbers: list[int], work: Callable[[int], tuple[int, int]], config: IngestConfig) -> Any:
    """Does the work for every number in tasks of their own; yields {"images", "bad"} as each is done.

    Raises:
        UserError: a task raised one.
    """
    if not numbers:
        return
    tasks = ray.data.range(len(numbers), override_num_blocks=len(numbers)).map_batches(
        partial(_run, numbers=numbers, work=work), batch_size=None, num_cpus=config.cpus_per_task
    )
    tasks.context.enable_progress_bars = False
    for row in tasks.iter_rows():
        if row["error"]:
            raise UserError(row["error"])
        yield row


def _run(batch: dict[str, Any], numbers: list[int], work: Callable[[int], tuple[int, int]]) -> dict[str, Any]:
    """One Ray Data task. A UserError comes back as a value: an exception would arrive wrapped, or be retried."""
    rows = []
    for i in batch["id"]:
        try:
            rows.append((*work(numbers[i]), ""))
        except UserError as error:
            rows.append((0, 0, str(error)))
        except OSError as error:
            rows.append((0, 0, f"Cannot read the source: {error}. The same command goes on from here."))
    written, bad, errors = zip(*rows, strict=True)
    return {"images": np.array(written), "bad": np.array(bad), "error": np.array(errors, dtype=object)}


def _finish(name: str, listed: Listed, journal: Journal, config: IngestConfig, progress: Reporter) -> DataSet:
    """Writes the ledger and then the manifest, and drops the journal."""
    shards: list[Shard] = []
    digest = hashlib.blake2b(digest_size=16)
    num_bad, num_unlabelled, max_label = 0, 0, -1
    reasons: list[str] = []
    tallies: list[images.Tally] = []
    done = len(journal.done())
    if done < len(listed.counts):
        raise UserError(
            f"The journal of {journal.dest} holds {done} of {len(listed.counts)} shards at the end: another process "
            "was ingesting into the same place, or files were deleted. Run the same command again, and one at a time."
        )
    with journal.dest.writing(LEDGER) as ledger:
        for written in journal.all_written():
            for path, reason in written.bad:
                ledger.write((json.dumps({"path": path, "reason": reason}) + "\n").encode())
                num_bad += 1
                if len(reasons) < 3:
                    reasons.append(f"{path}: {reason}")
            if written.num_images:
                shards.append(written.shard)
                digest.update(f"{written.num_images} {written.digest}\n".encode())
            labels_n = np.array(written.labels, dtype=np.int64)
            num_unlabelled += int((labels_n < 0).sum())
            max_label = max(max_label, int(labels_n.max(initial=-1)))
            tallies += [written.tally] if written.tally else []
    dest = journal.dest
    if not num_bad:
        dest.delete(LEDGER)
    if not shards:
        for entry in (LEDGER, SHARDS):
            dest.delete(entry)
        journal.delete()
        if not dest.list():
            dest.delete()
        raise UserError(
            f"None of the {num_bad} images of {name!r} can be decoded. The first: {'; '.join(reasons)}. "
            "Nothing was written."
        )
    # A task that was killed leaves its half-written shard behind.
    for stray in set((dest / SHARDS).list()) - {entry.file for entry in shards}:
        dest.delete(f"{SHARDS}/{stray}")
    classes = _classes(listed, max_label, num_unlabelled, progress)
    tally = images.merge(tallies)
    for line in images.sentences(tally, config.decoding):
        progress.say(line)
    decoding = images.record(tally, config.decoding)
    manifest = Manifest(name, tuple(shards), classes, digest.hexdigest(), num_bad, decoding=decoding)
    labels = (np.array(written.labels, np.int64) for written in journal.all_written())
    made = DataSet.create(dest, manifest, labels)
    journal.delete()
    bad = f"; {num_bad} others could not be decoded and are listed in {dest}/{LEDGER}" if num_bad else ""
    progress.say(f"Ingested {manifest.num_images} images, {len(classes)} classes, into {dest}{bad}.")
    return made


def _classes(listed: Listed, max_label: int, num_unlabelled: int, progress: Reporter) -> tuple[str, ...]:
    """The names of the classes; none when not every image has a label."""
    if not listed.labelled or max_label < 0:
        return ()
    if listed.classes is None and max_label >= _MOST_CLASSES:
        progress.say(f"Labels go up to {max_label:,}, which are no class numbers: ingested without labels.")
        return ()
    if num_unlabelled:
        progress.say(f"{num_unlabelled} images have no label, so the data set is ingested without labels.")
        return ()
    return (
        listed.classes if listed.classes is not None else tuple(str(label) for label in range(max_label + 1))
    )

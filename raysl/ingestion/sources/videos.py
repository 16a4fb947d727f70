"""A folder of videos at any URI, in class folders and splits as images are; or one video.

Each video becomes clips of at most `--clip-s` seconds. See `raysl.ingestion.video`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import groupby

from raysl.clips import COLUMNS, SOUND_HZ
from raysl.errors import UserError
from raysl.ingestion import layout, video
from raysl.ingestion.found import LeftOut, shown
from raysl.ingestion.labels import Classes
from raysl.ingestion.listing import VIDEO, File, Survey, files_below, kind_of
from raysl.ingestion.sources import Confidence, Place, Row, Unit, UnitSize, choose_split
from raysl.storage import Folder

SUMMARY = "a folder of videos, in class folders or not: videos/, videos/#train"


def recognise(place: Place) -> Confidence:
    if not place.is_folder:
        return Confidence.COULD_BE if kind_of(place.uri) == VIDEO else Confidence.NO
    images = place.survey[0].images()
    videos = sum(counts[VIDEO] for counts in place.survey[0].folders.values())
    return Confidence.NO if not videos else Confidence.IS if videos > images else Confidence.NO


class Source:
    """See `raysl.ingestion.sources.Source`."""

    encoded_here = True

    def __init__(self, place: Place) -> None:
        config = place.config
        if place.is_folder:
            self._root = place.uri
            files = files_below(place.uri, follow_links=config.follow_links)
        else:
            self._root, _, name = place.uri.rpartition("/")
            files = (replace(file, path=name) for file in files_below(place.uri, 1))
        self._survey = Survey.of(files, lambda path: b"", about=VIDEO)
        left_out = place.survey[1] if place.is_folder else LeftOut()
        self._layout = layout.recognise(
            self._survey, lambda splits: choose_split(place, splits), config.labels, left_out
        )
        self.found = self._layout.found
        self.found.noun = "videos"
        self.found.layout = self.found.layout.replace("images", "videos")
        self.found.labels = self.found.labels.replace("image", "video")
        self.name = str(replace(place, split=self.found.split))
        self._sampling = video.Sampling(config.fps, config.clip_s, config.frame_size)
        self.clips = {"columns": list(COLUMNS), **self._sampling._asdict(), "sound_hz": SOUND_HZ}

    def stamp(self) -> str:
        return self._survey.digest

    def units(self, size: UnitSize) -> Iterator[Unit]:
        classes = Classes()
        paths: list[str] = []
        labels: list[str | None] = []
        num_bytes = 0
        self.found.images = 0
        for file, label in self._videos():
            if paths and (len(paths) >= size.num_images or num_bytes + file.num_bytes > size.num_bytes):
                yield self._unit(paths, labels)
                paths, labels, num_bytes = [], [], 0
            classes.add((label,), file.path)
            paths.append(file.path)
            labels.append(label)
            num_bytes += file.num_bytes
            self.found.images += 1
        if paths:
            yield self._unit(paths, labels)
        self.found.classes = dict(sorted(classes.counts.items()))

    def _videos(self) -> Iterator[tuple[File, str | None]]:
        files = self._survey.all_files() or files_below(self._root, base=self._layout.base)
        for file in files:
            if kind_of(file.path) == VIDEO:
                try:
                    yield file, self._layout.label(file.path)
                except layout.Skip as skip:
                    if skip.args:
                        self.found.left_out.add(skip.args[0], file.path)

    def _unit(self, paths: list[str], labels: list[str | None]) -> Unit:
        runs = [(label, len(list(same))) for label, same in groupby(labels)]
        spec = {"root": self._root, "paths": paths, "labels": runs, "sampling": list(self._sampling)}
        return Unit(len(paths), spec)


def read(unit: Unit) -> Iterator[Row]:
    root, sampling = Folder(unit.spec["root"]), video.Sampling(*unit.spec["sampling"])
    labels = [label for label, count in unit.spec["labels"] for _ in range(count)]
    for path, label in zip(unit.spec["paths"], labels, strict=True):
        try:
            for cut in video.cut(partial(root.open, path), sampling):
                if cut.columns is None:
                    yield Row(None, label, shown(path), cut.reason)
                    continue
                frames = cut.columns["frames"]
                name = f"{shown(path)}#{cut.start_s:.2f}-{cut.end_s:.2f}"
                yield Row(frames[len(frames) // 2], label, name, clip=cut.columns)
        except (FileNotFoundError, PermissionError) as error:
            yield Row(None, label, shown(path), f"cannot be read: {type(error).__name__}")
        except OSError as error:
            raise UserError(
                f"Cannot read {root}/{shown(path)}: {error}. Run the same command again."
            ) from error

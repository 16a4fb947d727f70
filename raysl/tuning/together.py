"""Which runs of a sweep read together: those at the same time that take the same images in the same order.

They are given seats at one stream, see `raysl.stream.shared`; each gets views of its own out of it. The driver opens a
feed when a run begins and others that could share it are about to, and closes it when its last run is over.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from raysl.backbone.network import BackboneConfig
from raysl.config import Pretraining
from raysl.model import Model
from raysl.stream.plan import Plan
from raysl.stream.reader import Stream
from raysl.stream.shared import Subscriber, open_feeds, slots, union
from raysl.tuning.setting import Setting
from raysl.tuning.space import Dimension

# Fields that change which images a step takes, or how long it is, so that the quick would wait for the slow.
_APART = ("batch_size", "backbone", "precision")


@dataclass(frozen=True)
class Reading:
    """What runs at one stream have in common: the images of every step, and how much work a step is.

    Args:
        until: the step that the runs go to.
    """

    plan: Plan
    until: int
    workers: int
    place: str
    backbone: BackboneConfig
    precision: str

    @staticmethod
    def of(config: Pretraining, setting: Setting, until: int) -> Reading:
        plan = config.plan(setting.images)
        workers = setting.workers
        return Reading(plan, until, workers, config.stream.place, config.backbone, config.precision)


@dataclass
class _Table:
    """A feed for every rank, and the runs that sit there."""

    reading: Reading
    slots: frozenset[str]
    feeds: tuple[Any, ...]
    runs: set[str] = field(default_factory=set)


class Together:
    """The streams that runs of a sweep share at the moment."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._tables: list[_Table] = []

    def apart(self) -> str:
        """Why no two runs will share a stream, in a few words; "" where some may."""
        setting = self._setting
        if not setting.config.share_stream:
            return "as asked"
        if setting.at_once == 1:
            return "there is one at a time"
        if all(_keeps_apart(d) for d in setting.space.dimensions):
            names = " and ".join(d.name for d in setting.space.dimensions)
            return f"trials differ in {names}"
        return ""

    def subscriber(
        self, run: str, config: Pretraining, until: int, start: int, near: Iterable[Pretraining]
    ) -> Subscriber | None:
        """A seat for a run that begins now; None when it should read on its own.

        Args:
            run: a name for it.
            config: of it.
            until: the step that it goes to.
            start: the step that it goes on from.
            near: of runs that will begin soon, up to a step of the same schedule.
        """
        if self.apart():
            return None
        reading, stream = Reading.of(config, self._setting, until), self._stream(config)
        own = slots(stream)
        for table in self._tables:
            suits = table.reading == reading and table.slots.issuperset(own.values())
            if suits and _expects(table, run, start):
                return self._sit(table, run, own)
        others = [self._stream(c) for c in near if Reading.of(c, self._setting, until) == reading]
        if not others:
            return None
        streams = [stream, *others]
        table = _Table(reading, frozenset(union(streams).views), open_feeds(streams, start, until))
        self._tables.append(table)
        _expects(table, run, start)
        return self._sit(table, run, own)

    def leave(self, run: str) -> None:
        """Gives the seat of a run back, if it has one."""
        import ray

        for table in self._tables:
            if run in table.runs:
                table.runs.remove(run)
                for feed in table.feeds:
                    feed.leave.remote(run) if table.runs else ray.kill(feed)
        self._tables = [table for table in self._tables if table.runs]

    def _sit(self, table: _Table, run: str, own: dict[str, str]) -> Subscriber:
        table.runs.add(run)
        return Subscriber(run, table.feeds, own)

    def _stream(self, config: Pretraining) -> Stream:
        """The stream that a run would have. Its views do not depend on the backbone, of which a light one is built."""
        images, placement = self._setting.images, self._setting.placement
        light = replace(config, backbone=replace(config.backbone, name="small"))
        return Model.of(light, images).stream(images, placement.share, world=self._setting.workers)


def _keeps_apart(dimension: Dimension) -> bool:
    return dimension.path[0] in _APART


def _expects(table: _Table, run: str, start: int) -> bool:
    """Whether all feeds of a table still have what a run begins with; they then wait for it."""
    import ray

    try:
        there = all(ray.get([feed.expect.remote(run, start) for feed in table.feeds]))
    except ray.exceptions.RayError:
        return False
    if not there:
        for feed in table.feeds:
            feed.leave.remote(run)
    return there

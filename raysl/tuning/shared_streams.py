"""One stream for the runs of a sweep that take the same images in the same order at the same time.

A run asks the actor `StreamBroker` for a subscription to a shared stream (see `raysl.stream.shared`). The broker opens
a stream when a run begins and others that can share it will begin soon, and closes it when its last run has ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray

from raysl.backbone.network import BackboneConfig
from raysl.config import Pretraining
from raysl.stream.reader import Stream
from raysl.stream.shared import Subscriber, merge_streams, start_actors, view_keys
from raysl.tuning.preparation import PreparedSweep, TrialContext, light_model
from raysl.tuning.space import Values

# Fields that change which images a step takes or how long it lasts, so that fast runs would wait for slow ones.
_PREVENT_SHARING = ("batch_size", "backbone", "precision")


# Runs share a stream only if these are the same: batch size, seed, steps of the run, last step, place of augmentation,
# backbone and precision. All runs take the same images, so the first three are their plan.
_StreamKey = tuple[int, int, int, int, str, BackboneConfig, str]


@dataclass
class _SharedStream:
    """An actor for every rank, and its runs."""

    key: _StreamKey
    view_keys: frozenset[str]
    actors: tuple[Any, ...]
    runs: set[str] = field(default_factory=set)


def why_not_shared(prepared: PreparedSweep) -> str:
    """Return why no two runs of a sweep will share a stream; "" where some may."""
    if not prepared.config.share_stream:
        return "--no-share-stream"
    if prepared.context.base.stream.decode == "gpu":
        return "the trainers decode"
    if prepared.context.trials_at_once == 1:
        return "one trial runs at a time"
    if all(name.partition(".")[0] in _PREVENT_SHARING for name in prepared.space.names):
        return f"trials differ in {' and '.join(prepared.space.names)}"
    return ""


def open_broker(context: TrialContext, points: Sequence[Values]) -> Any:
    """Start the broker of a sweep, on the machine of the driver. `points` has the values of the trials, if known."""
    here = ray.get_runtime_context().get_node_id()
    local = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(here, soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=local)(StreamBroker).remote(context, points)


class StreamBroker:
    """The streams that runs of a sweep share at the moment."""

    def __init__(self, context: TrialContext, points: Sequence[Values]) -> None:
        self._context = context
        self._points = points
        self._streams: list[_SharedStream] = []

    def subscriber(self, trial: int, config: Pretraining, start: int, until: int) -> Subscriber | None:
        """Return the place of a run of a trial that begins now, at the step `start`, and goes to the step `until`.

        Return None if the run should read on its own.
        """
        run, key, stream = config.run, self._key(config, until), self._stream(config)
        own = view_keys(stream)
        for shared in self._streams:
            suits = shared.key == key and shared.view_keys.issuperset(own.values())
            if suits and _register(shared, run, start):
                shared.runs.add(run)
                return Subscriber(run, shared.actors, own)
        soon = self._points[trial + 1 : trial + self._context.trials_at_once]
        upcoming = [replace(self._context.config_of(point), seed=config.seed) for point in soon]
        others = [self._stream(other) for other in upcoming if self._key(other, until) == key]
        if not others:
            return None
        streams = [stream, *others]
        shared = _SharedStream(
            key, frozenset(merge_streams(streams).views), start_actors(streams, start, until), {run}
        )
        self._streams.append(shared)
        _register(shared, run, start)
        return Subscriber(run, shared.actors, own)

    def leave(self, run: str) -> None:
        """Give the place of a run back, if it has one."""
        for shared in self._streams:
            if run in shared.runs:
                shared.runs.remove(run)
                for actor in shared.actors:
                    actor.leave.remote(run) if shared.runs else ray.kill(actor)
        self._streams = [shared for shared in self._streams if shared.runs]

    def _key(self, config: Pretraining, until: int) -> _StreamKey:
        plan = config.plan(self._context.images)
        order = plan.batch_size, plan.seed, plan.num_steps
        return *order, until, config.stream.place, config.backbone, config.precision

    def _stream(self, config: Pretraining) -> Stream:
        """Return the stream that a run would have."""
        images, workers = self._context.images, self._context.base.worker_counts()[0]
        model = light_model(config, images)
        return model.stream(images, self._context.placement.share, 0, workers)


def _register(shared: _SharedStream, run: str, start: int) -> bool:
    """Register a run with every actor of a shared stream.

    Return False, and register nothing, if an actor has already dropped the first batch of the run.
    """
    try:
        there = all(ray.get([actor.expect.remote(run, start) for actor in shared.actors]))
    except ray.exceptions.RayError:
        return False
    if not there:
        for actor in shared.actors:
            actor.leave.remote(run)
    return there

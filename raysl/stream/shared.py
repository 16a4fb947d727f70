"""Share one stream between several runs that read the same images in the same order.

A `StreamActor` reads one `Stream` with the views of all runs, and makes equal views once. It keeps a window of batches
in Ray's object store, from which each run takes its views. Pixels depend only on (seed, epoch, index, name of the
view), so they are equal to those of the run's own stream.

The actor waits for its slowest run, for at most `SLOW_RUN_TIMEOUT_S` seconds. A run that is dropped, asks for a step
outside of the window, or loses its actor continues with its own stream at the same step.
"""

from __future__ import annotations

import hashlib
import pickle
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from raysl.stream.reader import Batch, Columns, Stream

# Size of an actor's window: a share of Ray's object store, its upper limit, and its least number of batches.
_WINDOW_SHARE = 1 / 8
_WINDOW_BYTES = 256 << 20
_LEAST_BATCHES = 6
_MAX_REQUESTS = 64  # simultaneous requests to an actor
SLOW_RUN_TIMEOUT_S = 30.0  # longest wait for a slow run
_AHEAD = 2  # batches that a run requests in advance; fewer than a window holds


def view_keys(stream: Stream) -> dict[str, str]:
    """Return the key of each view in a shared stream; equal views of different runs have equal keys."""

    def content(name: str) -> Any:
        view = stream.views[name]
        return view if stream.config.place == "data" or view.of_clips is not None else view.source

    return {
        name: f"{name}@{hashlib.blake2b(pickle.dumps(content(name)), digest_size=8).hexdigest()}"
        for name in stream.views
    }


def merge_streams(streams: Sequence[Stream]) -> Stream:
    """Return a stream with the views of all streams, which must be equal otherwise."""
    views = {key: stream.views[name] for stream in streams for name, key in view_keys(stream).items()}
    schedule = partial(_keys_of, [(view_keys(stream), stream.schedule) for stream in streams])
    alternates = any(stream.schedule is not None for stream in streams)
    return replace(streams[0], views=views, schedule=schedule if alternates else None)


def _keys_of(
    runs: Sequence[tuple[Mapping[str, str], Callable[[int], Collection[str]] | None]], step: int
) -> list[str]:
    """Return the keys of the views that any run needs at a step: the schedule of a shared stream."""
    taken = [
        key
        for view_keys, schedule in runs
        for name, key in view_keys.items()
        if schedule is None or name in schedule(step)
    ]
    return list(dict.fromkeys(taken))


class StreamActor:
    """Actor that serves a shared stream to the workers of one rank.

    Args:
        stream: result of `merge_streams`.
        end: step to stop before.
    """

    def __init__(
        self,
        stream: Stream,
        start: int,
        end: int,
        window_bytes: int = _WINDOW_BYTES,
        timeout_s: float = SLOW_RUN_TIMEOUT_S,
    ) -> None:
        self._stream = stream
        self._end = end
        self._window_bytes = window_bytes
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        # References by step and key. A step is kept until every run has it and the window is full.
        self._batches: dict[int, dict[str, Any]] = {}
        self._max_batches = _LEAST_BATCHES
        self._next = start
        # The newest step that a run has requested, by run.
        self._requested: dict[str, int] = {}
        self._thread: threading.Thread | None = None
        self._failed = False

    def expect(self, run: str, start: int) -> bool:
        """Keep the batches from `start` on for a run; return False if they are already dropped."""
        with self._changed:
            available = not self._failed and self._oldest() <= start <= self._next
            if available:
                self._requested[run] = start - 1
            return available

    def leave(self, run: str) -> None:
        """Stop waiting for a run."""
        with self._changed:
            self._requested.pop(run, None)
            self._changed.notify_all()

    def take(self, run: str, step: int, names: Sequence[str]) -> list[Any] | None:
        """Wait for a batch and return references to its parts; None if the run should use its own stream."""
        with self._changed:
            self._requested[run] = step
            if self._thread is None:
                self._thread = threading.Thread(target=self._read, daemon=True)
                self._thread.start()
            self._changed.notify_all()
            deadline = time.monotonic() + self._timeout_s
            while step not in self._batches:
                near = self._oldest() <= step <= self._next + _AHEAD
                if self._failed or not near or run not in self._requested:
                    self.leave(run)
                    return None
                self._changed.wait(max(0.0, deadline - time.monotonic()))
                if time.monotonic() >= deadline:
                    self._drop_slowest()
                    deadline = time.monotonic() + self._timeout_s
            return [self._batches[step][name] for name in names]

    def _oldest(self) -> int:
        return min(self._batches, default=self._next)

    def _full(self) -> bool:
        """Drop batches that every run has, and return True if the window is still full."""
        slowest = min(self._requested.values(), default=self._oldest() - 1)
        while len(self._batches) >= self._max_batches and self._oldest() <= slowest:
            del self._batches[self._oldest()]
        return len(self._batches) >= self._max_batches

    def _drop_slowest(self) -> None:
        """Drop the slowest runs if they keep the window full."""
        if self._full():
            slowest = min(self._requested.values())
            self._requested = {run: step for run, step in self._requested.items() if step > slowest}
            self._changed.notify_all()

    def _read(self) -> None:
        import ray

        try:
            for columns in self._stream.columns(self._next, self._end):
                parts = _parts(columns)
                size = sum(values.nbytes for values in columns.values())
                references = {name: ray.put(part) for name, part in parts.items()}
                with self._changed:
                    self._max_batches = max(_LEAST_BATCHES, self._window_bytes // max(1, size))
                    self._changed.wait_for(lambda: not self._full())
                    self._batches[self._next] = references
                    self._next += 1
                    self._changed.notify_all()
        finally:
            # After an error, the runs' own streams report it to the user.
            with self._changed:
                self._failed = self._next < self._end
                self._changed.notify_all()


def _parts(columns: Columns) -> dict[str, Columns]:
    """Return the columns of each view by its key; columns without a view are under ""."""
    parts: dict[str, Columns] = {"": {}}
    for column, values in columns.items():
        kind, _, key = column.partition("/")
        parts.setdefault(key, {})[kind] = values
    return parts


@dataclass(frozen=True)
class Subscriber:
    """A run's access to a shared stream. Picklable."""

    run: str  # unique name of the run
    actors: tuple[Any, ...]  # the actors by rank
    view_keys: Mapping[str, str]  # result of `view_keys` for the run's stream

    def take(self, rank: int, step: int, names: Collection[str]) -> Columns | None:
        """Return the columns of views of a batch; None if the run should use its own stream."""
        import ray

        wanted = ["", *(self.view_keys[name] for name in names)]
        try:
            references = ray.get(self.actors[rank].take.remote(self.run, step, wanted))
            found = references and dict(zip(("", *names), ray.get(references), strict=True))
        except ray.exceptions.RayError:  # the actor or its objects are lost
            return None
        if not found:
            return None
        return {
            f"{kind}/{name}" if name else kind: a for name, part in found.items() for kind, a in part.items()
        }


def batches(
    stream: Stream, subscriber: Subscriber | None, start_step: int = 0, end_step: int | None = None
) -> Iterator[Batch]:
    """Yield the batches of `stream`: from a shared stream as long as it serves them, then from `stream` itself.

    Raises:
        UserError: a shard of the data set is damaged.
    """
    step = start_step
    if subscriber is not None and len(subscriber.actors) == stream.world:
        for batch in _batches_from_actor(stream, subscriber, start_step, stream.end(end_step)):
            yield batch
            step = batch.step + 1
    yield from stream.batches(step, end_step)


def _batches_from_actor(stream: Stream, subscriber: Subscriber, start_step: int, end: int) -> Iterator[Batch]:
    """Yield batches from the actor until it has no more for this run."""
    pool = ThreadPoolExecutor(1)

    def request(step: int) -> Any:
        return pool.submit(subscriber.take, stream.rank, step, list(stream.views_of(step)))

    try:
        requests = deque(request(step) for step in range(start_step, min(start_step + _AHEAD, end)))
        for step in range(start_step, end):
            started = time.perf_counter()
            columns = requests.popleft().result()
            if columns is None:
                return
            if step + _AHEAD < end:
                requests.append(request(step + _AHEAD))
            batch = stream.batch(step, columns)
            batch.wait_s = time.perf_counter() - started
            yield batch
    finally:
        subscriber.actors[stream.rank].leave.remote(subscriber.run)
        pool.shutdown(wait=False, cancel_futures=True)


def start_actors(streams: Sequence[Stream], start: int, end: int) -> tuple[Any, ...]:
    """Start an actor for each rank that serves steps start .. end - 1 of these streams with the CPUs of all of them.

    The caller kills the actors when the runs end.
    """
    import ray

    shared = merge_streams(streams)
    shared = replace(shared, share=replace(shared.share, cpus=shared.share.cpus * len(streams)))
    remote = ray.remote(num_cpus=0, max_concurrency=_MAX_REQUESTS)(StreamActor)
    alive = [node for node in ray.nodes() if node["Alive"]]
    # Avoid a head node without CPUs, and spread the actors of several seeds.
    working = [node for node in alive if node["Resources"].get("CPU")] or alive

    def actor(rank: int) -> Any:
        node = working[(rank + shared.plan.seed) % len(working)]
        near = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=True)
        store = node["Resources"]["object_store_memory"] / shared.world
        window = int(min(_WINDOW_BYTES, _WINDOW_SHARE * store))
        return remote.options(scheduling_strategy=near).remote(replace(shared, rank=rank), start, end, window)

    return tuple(actor(rank) for rank in range(shared.world))

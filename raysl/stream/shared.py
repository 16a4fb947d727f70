"""One stream for several runs: images that runs read in the same order are read, decoded and transformed once.

A `Feed` is an actor that reads one `Stream` with the views of all its runs, each once, however many runs want it. It
holds a window of batches in Ray's object store, and every run takes from it what is its own. All pixels are functions
of (seed, epoch, index, name of the view), so a run gets bit for bit what a stream of its own would bring.

The runs go in lock-step within the window: the feed is never more than that ahead of the slowest. Nothing waits for
ever, though. A run that keeps others waiting is let go; a run that asks for a step that the feed no longer holds or is
not near, or whose feed has died, goes on with a stream of its own from that very step.
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
from typing import Any

from raysl.stream.reader import Batch, Columns, Stream

# What a feed holds, as a share of Ray's object store and at most; and the batches that it holds however large they are.
_WINDOW_SHARE = 1 / 8
_WINDOW_BYTES = 256 << 20
_LEAST_BATCHES = 6
# Runs that a feed can answer at the same time.
_ANSWERS = 64
# A run may keep the others waiting for so long.
PATIENCE_S = 30.0
# Batches that a run asks for ahead of the one that it works on; fewer than a feed holds.
_AHEAD = 2


def slots(stream: Stream) -> dict[str, str]:
    """For each view of a stream, the name that it has in a shared one: the same for equal views of any run."""

    def what(name: str) -> Any:
        view = stream.views[name]
        return view if stream.config.place == "data" else view.source

    return {
        name: f"{name}@{hashlib.blake2b(pickle.dumps(what(name)), digest_size=8).hexdigest()}"
        for name in stream.views
    }


def union(streams: Sequence[Stream]) -> Stream:
    """A stream of the views of all the given ones, which have everything else in common."""
    views = {slot: stream.views[name] for stream in streams for name, slot in slots(stream).items()}
    schedule = _Either(tuple((slots(stream), stream.schedule) for stream in streams))
    alternates = any(stream.schedule is not None for stream in streams)
    return replace(streams[0], views=views, schedule=schedule if alternates else None)


@dataclass(frozen=True)
class _Either:
    """The slots that any of several runs takes at a step."""

    runs: tuple[tuple[Mapping[str, str], Callable[[int], Collection[str]] | None], ...]

    def __call__(self, step: int) -> list[str]:
        taken = [
            slot
            for slots, schedule in self.runs
            for name, slot in slots.items()
            if schedule is None or name in schedule(step)
        ]
        return list(dict.fromkeys(taken))


class Feed:
    """The actor behind a shared stream, one for each rank.

    Args:
        stream: see `union`.
        start: the first step.
        end: the step to stop before.
        window_bytes: what it may hold.
        patience_s: how long a run may keep the others waiting.
    """

    def __init__(
        self,
        stream: Stream,
        start: int,
        end: int,
        window_bytes: int = _WINDOW_BYTES,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._stream = stream
        self._end = end
        self._window_bytes = window_bytes
        self._patience_s = patience_s
        self._turn = threading.Condition()
        # References by step and slot. A step is held until every run has it and the room is needed.
        self._held: dict[int, dict[str, Any]] = {}
        self._room = _LEAST_BATCHES
        self._next = start
        # The newest step that each run has asked for.
        self._asked: dict[str, int] = {}
        self._thread: threading.Thread | None = None
        self._ended = False

    def expect(self, run: str, start: int) -> bool:
        """Holds the batches from `start` on for a run that will come; False when they are not there any more."""
        with self._turn:
            there = not self._ended and self._oldest() <= start <= self._next
            if there:
                self._asked[run] = start - 1
            return there

    def leave(self, run: str) -> None:
        """Waits for a run no longer."""
        with self._turn:
            self._asked.pop(run, None)
            self._turn.notify_all()

    def take(self, run: str, step: int, names: Sequence[str]) -> list[Any] | None:
        """References to the parts of a batch; waits until it is there. None: the run should read on its own."""
        with self._turn:
            self._asked[run] = step
            if self._thread is None:
                self._thread = threading.Thread(target=self._read, daemon=True)
                self._thread.start()
            self._turn.notify_all()
            deadline = time.monotonic() + self._patience_s
            while step not in self._held:
                near = self._oldest() <= step <= self._next + _AHEAD
                if self._ended or not near or run not in self._asked:
                    self.leave(run)
                    return None
                self._turn.wait(max(0.0, deadline - time.monotonic()))
                if time.monotonic() >= deadline:
                    self._let_go()
                    deadline = time.monotonic() + self._patience_s
            return [self._held[step][name] for name in names]

    def _oldest(self) -> int:
        return min(self._held, default=self._next)

    def _full(self) -> bool:
        """Whether there is no room for one more batch; forgets what every run has."""
        slowest = min(self._asked.values(), default=self._oldest() - 1)
        while len(self._held) >= self._room and self._oldest() <= slowest:
            del self._held[self._oldest()]
        return len(self._held) >= self._room

    def _let_go(self) -> None:
        """Stops to wait for the slowest runs, if the window is full because of them."""
        if self._full():
            slowest = min(self._asked.values())
            self._asked = {run: step for run, step in self._asked.items() if step > slowest}
            self._turn.notify_all()

    def _read(self) -> None:
        import ray

        try:
            for columns in self._stream.columns(self._next, self._end):
                parts = _parts(columns)
                size = sum(values.nbytes for values in columns.values())
                references = {name: ray.put(part) for name, part in parts.items()}
                with self._turn:
                    self._room = max(_LEAST_BATCHES, self._window_bytes // max(1, size))
                    self._turn.wait_for(lambda: not self._full())
                    self._held[self._next] = references
                    self._next += 1
                    self._turn.notify_all()
        finally:
            # After an error, the runs' own streams will tell their users what is wrong.
            with self._turn:
                self._ended = self._next < self._end
                self._turn.notify_all()


def _parts(columns: Columns) -> dict[str, Columns]:
    """The columns of each view, by its slot; those of no view are "". Read-only arrays of Ray's are copied by put."""
    parts: dict[str, Columns] = {"": {}}
    for column, values in columns.items():
        kind, _, slot = column.partition("/")
        parts.setdefault(slot, {})[kind] = values
    return parts


@dataclass(frozen=True)
class Subscriber:
    """What a run is given to take part in a shared stream. Picklable.

    Args:
        run: its name, of its own.
        feeds: the actors, by rank.
        slots: of its stream, see `slots`.
    """

    run: str
    feeds: tuple[Any, ...]
    slots: Mapping[str, str]

    def take(self, rank: int, step: int, names: Collection[str]) -> Columns | None:
        """The columns of a batch, of these views; None when the run should read on its own."""
        import ray

        wanted = ["", *(self.slots[name] for name in names)]
        try:
            references = ray.get(self.feeds[rank].take.remote(self.run, step, wanted))
            found = references and dict(zip(("", *names), ray.get(references), strict=True))
        except ray.exceptions.RayError:  # the feed has died, or what it held
            return None
        if not found:
            return None
        return {
            f"{kind}/{name}" if name else kind: a for name, part in found.items() for kind, a in part.items()
        }


def batches(
    stream: Stream, subscriber: Subscriber | None, start_step: int = 0, end_step: int | None = None
) -> Iterator[Batch]:
    """What `stream.batches` yields, from a shared stream as far as it goes, and from `stream` itself beyond.

    Raises:
        UserError: a shard of the data set is damaged.
    """
    step = start_step
    if subscriber is not None and len(subscriber.feeds) == stream.world:
        for batch in _fed(stream, subscriber, start_step, stream.last(end_step)):
            yield batch
            step = batch.step + 1
    yield from stream.batches(step, end_step)


def _fed(stream: Stream, subscriber: Subscriber, start_step: int, last: int) -> Iterator[Batch]:
    """The batches that the feed has for this run, in order; ends where it has no more."""
    pool = ThreadPoolExecutor(1)

    def ask(step: int) -> Any:
        return pool.submit(subscriber.take, stream.rank, step, list(stream.views_of(step)))

    try:
        asked = deque(ask(step) for step in range(start_step, min(start_step + _AHEAD, last)))
        for step in range(start_step, last):
            started = time.perf_counter()
            columns = asked.popleft().result()
            if columns is None:
                return
            if step + _AHEAD < last:
                asked.append(ask(step + _AHEAD))
            batch = stream.batch(step, columns)
            batch.wait_s = time.perf_counter() - started
            yield batch
    finally:
        subscriber.feeds[stream.rank].leave.remote(subscriber.run)
        pool.shutdown(wait=False, cancel_futures=True)


def open_feeds(streams: Sequence[Stream], start: int, end: int) -> tuple[Any, ...]:
    """Actors, one for each rank, from which runs with these streams can take the steps start .. end - 1.

    They may use the CPUs of all of the streams. Kill them when the runs are over.
    """
    import ray

    one = union(streams)
    one = replace(one, share=replace(one.share, cpus=one.share.cpus * len(streams)))
    actor = ray.remote(num_cpus=0, max_concurrency=_ANSWERS)(Feed)
    alive = [node for node in ray.nodes() if node["Alive"]]
    # Not on the head of a cluster that leaves it without work. Sweeps open feeds for several seeds.
    working = [node for node in alive if node["Resources"].get("CPU")] or alive

    def feed(rank: int) -> Any:
        node = working[(rank + one.plan.seed) % len(working)]
        near = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=True)
        store = node["Resources"]["object_store_memory"] / one.world
        window = int(min(_WINDOW_BYTES, _WINDOW_SHARE * store))
        return actor.options(scheduling_strategy=near).remote(replace(one, rank=rank), start, end, window)

    return tuple(feed(rank) for rank in range(one.world))

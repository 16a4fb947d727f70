"""The actors of a clustering together: where they run, and the passes that they make in common.

Sums go from actor to actor and never through the driver: each actor adds up, over all actors, the sums of its own
chunk of the clusters. The driver sees counts and references.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from raysl.clustering import update
from raysl.clustering.feature_rows import Integers, Rows, disjoint
from raysl.clustering.kmeans_worker import Facts, Shard, Stats, Task, check_unique
from raysl.clustering.update import Singles, Splits
from raysl.errors import UserError

# Restarts that Ray gives an actor, and tries that it gives a call, before the driver begins anew.
_RESTARTS = 3
_PATIENCE_S = 20.0


@dataclass(frozen=True)
class Share:
    """How many actors, and what each takes of the cluster."""

    actors: int
    cpus: float
    gpus: int
    threads: int
    memory_bytes: int


def share(nodes: Sequence[Mapping[str, float]], actors: int = 0, memory_gb: float = 0) -> Share:
    """Divides a cluster among actors that can always run at once.

    One actor for each GPU; without GPUs one for each CPU of small machines, and for up to four of larger ones. Together
    they reserve half of the CPUs, so that they fit beside what others hold.

    Args:
        nodes: {"CPU": n, "GPU": n, "memory": bytes} of each machine.
        actors: how many; 0 for the rule above. With GPUs at most one for each.
        memory_gb: for the rows of an actor; 0 for half of the memory that Ray has on the smallest machine, divided
            among the actors there.

    Raises:
        UserError: more actors than GPUs, or than can share the CPUs.
    """
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    workers = [node for node in nodes if node.get("GPU" if gpus else "CPU", 0) >= (1 if gpus else 0.25)]
    cpus = sum(node.get("CPU", 0.0) for node in workers)
    threads = max(1, min(4, int(cpus / max(1, len(workers)) / 4)))
    count = actors or gpus or max(1, int(cpus / threads))
    most = gpus or int(100 * cpus)
    if count > most:
        raise UserError(
            f"{count} actors cannot run on this cluster, which has {cpus:g} CPUs and {gpus} GPUs: at most {most} can. "
            "Use fewer actors, or leave the number to raysl."
        )
    each = min(threads / 2, int(500 * cpus / count) / 1000)
    memory = min((node.get("memory", 4e9) for node in workers), default=4e9)
    on_one = -(-count // max(1, len(workers)))
    memory_bytes = int(memory_gb * 1e9 if memory_gb else memory / 2 / on_one)
    return Share(count, each, 1 if gpus else 0, max(1, min(threads, int(cpus / count))), memory_bytes)


@dataclass(frozen=True)
class Totals:
    """What a pass gave, over all actors. `moved` is None where an actor does not know; `busy_s` is of the slowest,
    `looked_at` the mean share of distances that were computed."""

    counts_k: Integers
    objective: float
    moved: int | None
    busy_s: float
    looked_at: float


@dataclass(frozen=True)
class Pass:
    """References to the results of a pass that may still be running: stats by actor, sums by actor and chunk."""

    stats: list[Any]
    sums: list[list[Any]]


class Crew:
    """Actors that share the rows. Leaving its `with` block ends them.

    Args:
        rows: to be clustered.
        place: what the actors take.
        spherical: whether centroids have length 1.
        fit: positions that are fitted to; see `actor.Task`.
        say: takes one line at a time.
    """

    def __init__(
        self,
        rows: Rows,
        place: Share,
        spherical: bool,
        fit: tuple[int, int, int] | None,
        say: Callable[[str], None],
    ) -> None:
        pieces = rows.divide(min(place.actors, rows.num_rows))
        self.rows = rows
        self._place = place
        self._say = say
        self._tasks = [Task(rows, p, place.threads, place.memory_bytes, fit, spherical) for p in pieces]
        self._actors: list[Any] = []
        self.num_fitted: list[int] = []

    def __enter__(self) -> Crew:
        import ray

        make = ray.remote(Shard).options(
            num_cpus=self._place.cpus,
            num_gpus=self._place.gpus,
            max_restarts=_RESTARTS,
            max_task_retries=_RESTARTS,
            scheduling_strategy="SPREAD",
        )
        self._actors = [make.remote(task) for task in self._tasks]
        try:
            self._load()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def _load(self) -> None:
        import ray

        loading = [actor.load.remote() for actor in self._actors]
        big = max(task.num_bytes for task in self._tasks)
        where = "kept in memory"
        if big > self._place.memory_bytes:
            where = f"read from disk in every pass: more than the {self._place.memory_bytes / 1e6:,.0f} MB of an actor"
        self._say(
            f"{self.rows.num_rows:,} rows of {self.rows.dim} numbers over {len(self._actors)} actors with "
            f"{self._place.threads} threads each; shards of {big / 1e6:,.1f} MB, {where}."
        )
        done, _ = ray.wait(loading, num_returns=1, timeout=_PATIENCE_S)
        if not done:
            self._say(
                f"Waiting for {len(self._actors)} actors to start and read their shards; each takes "
                f"{self._place.cpus:g} CPU and {self._place.gpus} GPU, and the cluster has free: "
                f"{ray.available_resources().get('CPU', 0):g} CPU, {ray.available_resources().get('GPU', 0):g} GPU."
            )
        facts: list[Facts] = ray.get(loading)
        self.num_fitted = [fact.num_fitted for fact in facts]
        if not disjoint([fact.indices for fact in facts]):
            check_unique(self.rows, ray.get([actor.indices.remote() for actor in self._actors]))

    def scatter(self, centroids_kd: Singles) -> list[Any]:
        """References to the chunks of the centroids."""
        import ray

        edges = update.bounds(len(centroids_kd), len(self._actors))
        return [ray.put(np.ascontiguousarray(centroids_kd[a:b])) for a, b in edges]

    def gather(self, chunks: Sequence[Any], splits: Splits) -> Singles:
        """float32 (k, d): the centroids of the chunks, with the splits carried out."""
        import ray

        return update.assemble(ray.get(list(chunks)), splits, self._tasks[0].spherical)

    def begin(self, chunks: Sequence[Any], splits: Splits) -> Pass:
        """Starts a pass over all rows."""
        count = len(chunks) + 1
        made = [actor.accumulate.options(num_returns=count).remote(splits, *chunks) for actor in self._actors]
        return Pass([refs[0] for refs in made], [refs[1:] for refs in made])

    def totals(self, running: Pass) -> Totals:
        """Waits for a pass."""
        import ray

        stats: list[Stats] = ray.get(running.stats)
        moved = [s.moved for s in stats if s.moved is not None]
        return Totals(
            np.sum([s.counts_k for s in stats], axis=0),
            sum(s.objective for s in stats),
            sum(moved) if len(moved) == len(stats) else None,
            max(s.busy_s for s in stats),
            float(np.average([s.looked_at for s in stats], weights=self.num_fitted)),
        )

    def means(self, done: Pass, counts_k: Integers, old: Sequence[Any]) -> list[Any]:
        """References to the chunks of the new centroids, each made by one actor from the sums of all."""
        edges = update.bounds(len(counts_k), len(self._actors))
        return [
            actor.mean.remote(counts_k[a:b], old[chunk], *(sums[chunk] for sums in done.sums))
            for chunk, (actor, (a, b)) in enumerate(zip(self._actors, edges, strict=True))
        ]

    def take(self, positions_n: Integers) -> Singles:
        """float32 (n, d): rows by position, in that order."""
        import ray

        starts = [task.pieces[0].start for task in self._tasks]
        owner_n = np.searchsorted(starts, positions_n, side="right") - 1
        asked = {i: self._actors[i].take.remote(positions_n[owner_n == i]) for i in np.unique(owner_n)}
        out_nd = np.empty((len(positions_n), self.rows.dim), np.float32)
        for i, reference in asked.items():
            out_nd[owner_n == i] = ray.get(reference)
        return out_nd

    def assign(self, centroids_kd: Singles) -> Iterator[pa.Table]:
        """The assignments of all rows, in the order of positions, a block at a time."""
        import ray

        reference = ray.put(centroids_kd)
        streams = [
            actor.assign.options(num_returns="streaming", _generator_backpressure_num_objects=4).remote(
                reference
            )
            for actor in self._actors
        ]
        for stream in streams:
            for block in stream:
                yield ray.get(block)

    def every(self, method: str, *arguments: Any) -> list[Any]:
        """The answers of all actors to one call."""
        import ray

        return ray.get([getattr(actor, method).remote(*arguments) for actor in self._actors])  # type: ignore[no-any-return]

    def one(self, actor: int, method: str, *arguments: Any) -> Any:
        """The answer of one actor."""
        import ray

        return ray.get(getattr(self._actors[actor], method).remote(*arguments))

"""The pool of k-means workers: where they run, and the passes they make together.

Large sums go from actor to actor: each actor adds up one chunk of the clusters over all actors. Small ones are added up
by the driver, which saves a round trip.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from raysl.clustering import update
from raysl.clustering.kmeans_worker import KMeansWorker, PassStats, SampleArguments, Shard, check_unique
from raysl.clustering.update import Splits
from raysl.errors import UserError, counted
from raysl.storage.feature_store import FeatureStore

_log = logging.getLogger("raysl.clustering")
# Restarts that Ray gives an actor, and retries of a call, before the driver starts a new pool.
_ACTOR_RESTARTS = 3
_START_LOG_AFTER_S = 20.0
# The driver adds up the sums of all actors if they are smaller than this.
_SMALL_BYTES = 32 << 20


@dataclass(frozen=True)
class Allocation:
    """The number of actors, and the resources of each."""

    actors: int
    cpus: float
    gpus: int
    threads: int
    memory_bytes: int


def allocate(nodes: Sequence[Mapping[str, float]], actors: int = 0, memory_gb: float = 0) -> Allocation:
    """Divide a cluster among actors that can always run together.

    One actor for each GPU; without GPUs one for each CPU of small machines, and for up to four CPUs of larger ones.
    Together they reserve half of the CPUs, so that they fit beside other work.

    Args:
        nodes: {"CPU": n, "GPU": n, "memory": bytes} of each machine.
        actors: number of actors; 0 for the rule above. With GPUs at most one for each.
        memory_gb: memory for the rows of an actor; 0 for half of the memory of the smallest machine, divided among
            the actors there.

    Raises:
        UserError: there are more actors than GPUs, or than can share the CPUs.
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
            "Use fewer actors, or omit --actors."
        )
    cpus_per_actor = min(threads / 2, int(500 * cpus / count) / 1000)
    memory = min((node.get("memory", 4e9) for node in workers), default=4e9)
    actors_per_machine = -(-count // max(1, len(workers)))
    memory_bytes = int(memory_gb * 1e9 if memory_gb else memory / 2 / actors_per_machine)
    return Allocation(
        count, cpus_per_actor, 1 if gpus else 0, max(1, min(threads, int(cpus / count))), memory_bytes
    )


# References of a running pass: for each actor to its statistics, and to its sums of each chunk.
Pass = list[list[Any]]


class ActorPool:
    """k-means workers that share the rows; see `Shard` for `spherical` and `fit`. A context manager that ends them."""

    def __init__(
        self,
        store: FeatureStore,
        allocation: Allocation,
        spherical: bool,
        fit: SampleArguments | None,
        k: int,
    ) -> None:
        pieces = store.shards(min(allocation.actors, store.num_rows))
        self.store = store
        self.num_fitted: list[int] = []
        self._allocation = allocation
        threads, on_gpu, memory_bytes = allocation.threads, allocation.gpus > 0, allocation.memory_bytes
        self._shards = [
            Shard(store, piece, threads, on_gpu, memory_bytes, fit, spherical) for piece in pieces
        ]
        self._actors: list[Any] = []
        is_small = 8 * k * store.dim * len(pieces) <= _SMALL_BYTES
        self._chunks = update.chunk_ranges(k, 1 if is_small else len(pieces))

    def __enter__(self) -> ActorPool:
        make = ray.remote(KMeansWorker).options(
            num_cpus=self._allocation.cpus,
            num_gpus=self._allocation.gpus,
            max_restarts=_ACTOR_RESTARTS,
            max_task_retries=_ACTOR_RESTARTS,
            scheduling_strategy="SPREAD",
        )
        self._actors = [make.remote(shard) for shard in self._shards]
        try:
            self._load()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def _load(self) -> None:
        loading = [actor.load.remote() for actor in self._actors]
        largest = max(self._shards, key=lambda shard: shard.num_bytes)
        memory = f"the {self._allocation.memory_bytes / 1e6:,.0f} MB of an actor"
        _log.info(
            "%s rows of %d numbers over %s with %s each; shards of %.1f MB, %s.",
            f"{self.store.num_rows:,}",
            self.store.dim,
            counted(len(self._actors), "actor"),
            counted(self._allocation.threads, "thread"),
            largest.num_bytes / 1e6,
            "kept in memory" if largest.is_kept else f"read from disk in every pass: they exceed {memory}",
        )
        done, _ = ray.wait(loading, num_returns=1, timeout=_START_LOG_AFTER_S)
        if not done:
            free = ray.available_resources()
            _log.info(
                "Waiting for %s to start and read their shards; each needs %g CPU and %d GPU, and %g CPU and "
                "%g GPU are free.",
                counted(len(self._actors), "actor"),
                self._allocation.cpus,
                self._allocation.gpus,
                free.get("CPU", 0),
                free.get("GPU", 0),
            )
        found: list[tuple[int, int, int]] = ray.get(loading)
        idle = sum(self.call_all("gpu_is_idle")) if self._allocation.gpus else 0
        if idle:
            _log.warning(
                "FAISS cannot use the GPU of %s, and CPUs compute instead. Install faiss-gpu there, with "
                "a driver that its CUDA can use.",
                counted(idle, "actor"),
            )
        self.num_fitted = [fitted for fitted, _, _ in found]
        ranges = sorted((low, high) for _, low, high in found)
        if any(a[1] >= b[0] for a, b in pairwise(ranges)):
            check_unique(self.store, self.call_all("indices"))

    def scatter(self, centroids_kd: NDArray[np.float32]) -> list[Any]:
        """Return references to the chunks of the centroids."""
        return [ray.put(np.ascontiguousarray(centroids_kd[a:b])) for a, b in self._chunks]

    def gather(self, chunks: Sequence[Any], splits: Splits) -> NDArray[np.float32]:
        """Return the centroids of the chunks after the splits, float32 (k, d)."""
        return update.assemble(ray.get(list(chunks)), splits, self._shards[0].spherical)

    def start_pass(self, chunks: Sequence[Any], splits: Splits) -> Pass:
        """Start a pass over all rows."""
        count = len(chunks) + 1
        return [actor.accumulate.options(num_returns=count).remote(splits, *chunks) for actor in self._actors]

    def totals(self, running: Pass) -> PassStats:
        """Wait for a pass, and return its statistics over all actors: the time of the slowest, sums of the others."""
        stats: list[PassStats] = ray.get([references[0] for references in running])
        moved = [s.moved for s in stats if s.moved is not None]
        return PassStats(
            np.sum([s.counts_k for s in stats], axis=0),
            sum(s.objective for s in stats),
            sum(moved) if len(moved) == len(stats) else None,
            max(s.busy_s for s in stats),
            float(np.average([s.computed for s in stats], weights=self.num_fitted)),
        )

    def means(self, done: Pass, counts_k: NDArray[np.int64], old: Sequence[Any]) -> list[Any]:
        """Return references to the chunks of the new centroids, from a finished pass over the chunks `old`."""
        by_chunk = [[references[1 + chunk] for references in done] for chunk in range(len(self._chunks))]
        if len(self._chunks) == 1:
            sums, (old_kd,) = ray.get(by_chunk[0]), ray.get(list(old))
            return [ray.put(update.means(update.total(sums), counts_k, old_kd, self._shards[0].spherical))]
        return [
            actor.mean.remote(counts_k[a:b], old_chunk, *sums)
            for actor, (a, b), old_chunk, sums in zip(self._actors, self._chunks, old, by_chunk, strict=True)
        ]

    def take(self, positions_n: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return rows by position, in the given order, float32 (n, d)."""
        starts = [shard.pieces[0].start for shard in self._shards]
        owner_n = np.searchsorted(starts, positions_n, side="right") - 1
        asked = {i: self._actors[i].take.remote(positions_n[owner_n == i]) for i in np.unique(owner_n)}
        out_nd = np.empty((len(positions_n), self.store.dim), np.float32)
        for i, reference in asked.items():
            out_nd[owner_n == i] = ray.get(reference)
        return out_nd

    def assign(self, centroids_kd: NDArray[np.float32]) -> Iterator[pa.Table]:
        """Yield the assignments of all rows in blocks, in the order of positions."""
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

    def call_all(self, method: str, *arguments: Any) -> list[Any]:
        """Return the answers of all actors to a call."""
        return ray.get([getattr(actor, method).remote(*arguments) for actor in self._actors])  # type: ignore[no-any-return]

    def call(self, actor: int, method: str, *arguments: Any) -> Any:
        """Return the answer of one actor to a call."""
        return ray.get(getattr(self._actors[actor], method).remote(*arguments))

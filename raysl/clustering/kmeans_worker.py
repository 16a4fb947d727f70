"""The actor of k-means: holds one shard of the rows and does all the arithmetic on them. The home of faiss.

faiss is imported when an actor first searches, so that it lives in processes of its own, away from torch. Every method
is a function of the shard and of its arguments, and a restarted actor answers as the one before; what the seeding of
k-means++ remembers between calls is the exception, and is numbered.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raysl.clustering import update
from raysl.clustering.feature_rows import Piece, Rows, sample
from raysl.clustering.hamerly import Nearest, Search, Settled
from raysl.clustering.update import Doubles, Integers, Singles, Splits
from raysl.errors import UserError

# Rows that are searched at once, as float32; the fixed part of an actor's memory is a few times this.
_BLOCK_BYTES = 64 << 20


class SeedingLost(RuntimeError):
    """The actor was restarted between two steps of the seeding, which has to begin again."""


@dataclass(frozen=True)
class Task:
    """What an actor is given.

    Args:
        rows: the features.
        pieces: of this actor's shard.
        threads: of its arithmetic.
        memory_bytes: a shard above this is read from disk in every pass.
        fit: positions that centroids are fitted to, as arguments of `rows.sample`; None for all.
        spherical: whether centroids have length 1.
    """

    rows: Rows
    pieces: tuple[Piece, ...]
    threads: int
    memory_bytes: int
    fit: tuple[int, int, int] | None
    spherical: bool

    @property
    def num_rows(self) -> int:
        return sum(piece.num_rows for piece in self.pieces)

    @property
    def num_bytes(self) -> int:
        """Of the shard in memory."""
        return self.num_rows * self.rows.dim * self.rows.itemsize


@dataclass(frozen=True)
class Facts:
    """What an actor found in its shard: rows that are fitted to, and the smallest and largest index."""

    num_fitted: int
    indices: tuple[int, int]


@dataclass(frozen=True)
class Stats:
    """What an actor tells the driver about a pass.

    Args:
        counts_k: rows of each cluster.
        objective: sum of squared distances, float64.
        moved: rows in another cluster than in the pass before; None where that is not known.
        busy_s: seconds of work.
        looked_at: distances that were computed, as a share of rows times clusters; see `bounds`.
    """

    counts_k: Integers
    objective: float
    moved: int | None
    busy_s: float
    looked_at: float


class Shard:
    """The actor. Nothing is read in the constructor, where Ray would start it again instead of handing on an error."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._settled: Settled | None = None
        self._seeding: tuple[int, Doubles] = (0, np.empty(0))

    def load(self) -> Facts:
        """Reads and checks the whole shard. Raises UserError for rows that cannot be clustered."""
        indices_n = self._loaded[0]
        if len(np.unique(indices_n)) != len(indices_n):
            raise _duplicate(self.task.rows, indices_n)
        return Facts(self._num_fitted, (int(indices_n.min()), int(indices_n.max())))

    def indices(self) -> Integers:
        """int64 (n,): the indices of the shard's rows."""
        return self._loaded[0]

    @cached_property
    def _loaded(self) -> tuple[Integers, npt.NDArray[Any] | None, float]:
        """Indices, rows where they are kept in memory, and the sum of the squares of those that are fitted to."""
        task = self.task
        kept = task.num_bytes <= task.memory_bytes
        dtype = np.float16 if task.rows.itemsize == 2 else np.float32
        held_nd = np.empty((task.num_rows, task.rows.dim), dtype) if kept else None
        indices_n = np.empty(task.num_rows, np.int64)
        square, first = 0.0, 0
        for piece, (indices_b, rows_bd) in self._read():
            task.rows.check(piece, indices_b, rows_bd)
            end = first + len(rows_bd)
            indices_n[first:end] = indices_b
            if held_nd is not None:
                held_nd[first:end] = rows_bd
            fitted_bd = rows_bd[self._fitted(first, end)]
            square += float(np.einsum("bd,bd->", fitted_bd, fitted_bd, dtype=np.float64))
            first = end
        return indices_n, held_nd, square

    @cached_property
    def _chosen(self) -> Integers | None:
        """Places in the shard of the rows that are fitted to; None for all."""
        if self.task.fit is None:
            return None
        start = self.task.pieces[0].start
        chosen = sample(*self.task.fit) - start
        return chosen[(chosen >= 0) & (chosen < self.task.num_rows)]

    @property
    def _num_fitted(self) -> int:
        return self.task.num_rows if self._chosen is None else len(self._chosen)

    def _fitted(self, first: int, end: int) -> slice | Integers:
        """What to take of the rows `first` to `end` of the shard."""
        if self._chosen is None:
            return slice(None)
        low, high = np.searchsorted(self._chosen, [first, end])
        return self._chosen[low:high] - first

    def _blocks(self) -> Iterator[tuple[int, Singles]]:
        """The shard in blocks: the place of the first row, and float32 (b, d)."""
        most = max(1, _BLOCK_BYTES // (4 * self.task.rows.dim))
        held_nd = self._loaded[1]
        if held_nd is not None:
            parts: Iterator[tuple[int, npt.NDArray[Any]]] = iter([(0, held_nd)])
        else:
            parts = self._from_disk()
        for first, rows_nd in parts:
            for i in range(0, len(rows_nd), most):
                yield first + i, np.ascontiguousarray(rows_nd[i : i + most], np.float32)

    def _from_disk(self) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """The shard a part at a time, each read while the one before is worked on."""
        parts = self._read(_BLOCK_BYTES // 4)
        with ThreadPoolExecutor(1) as reader:
            ahead, first = reader.submit(next, parts, None), 0
            while (part := ahead.result()) is not None:
                ahead = reader.submit(next, parts, None)
                rows_bd = part[1][1]
                yield first, rows_bd
                first += len(rows_bd)

    def _read(self, num_bytes: int = 4 << 20) -> Iterator[tuple[Piece, tuple[Integers, npt.NDArray[Any]]]]:
        """The shard from disk; see `Rows.batches`."""
        for piece in self.task.pieces:
            for batch in self.task.rows.batches(piece, num_bytes):
                yield piece, batch

    def _fitted_blocks(self) -> Iterator[tuple[int, Singles]]:
        """Only the rows that are fitted to, with their places among those."""
        place = 0
        for first, rows_bd in self._blocks():
            fitted_bd = rows_bd[self._fitted(first, first + len(rows_bd))]
            if len(fitted_bd):
                yield place, fitted_bd
            place += len(fitted_bd)

    def take(self, positions_n: Integers) -> Singles:
        """float32 (n, d): the rows at positions that lie in this shard."""
        out_nd = np.empty((len(positions_n), self.task.rows.dim), np.float32)
        held_nd = self._loaded[1]
        if held_nd is not None:
            out_nd[:] = held_nd[positions_n - self.task.pieces[0].start]
            return out_nd
        for piece in self.task.pieces:
            first = piece.start
            if not ((positions_n >= first) & (positions_n < first + piece.num_rows)).any():
                continue
            for _, rows_bd in self.task.rows.batches(piece, _BLOCK_BYTES // 4):
                inside_n = (positions_n >= first) & (positions_n < first + len(rows_bd))
                out_nd[inside_n] = rows_bd[positions_n[inside_n] - first]
                first += len(rows_bd)
        return out_nd

    def accumulate(self, splits: Splits, *chunks: Singles) -> tuple[Stats | Doubles, ...]:
        """One pass: every row to its nearest centroid.

        Args:
            splits: see `update`.
            chunks: of the centroids, one for each actor.

        Returns:
            The stats, and the float64 sums of the clusters of each chunk.
        """
        square = self._loaded[2]
        started = time.perf_counter()
        centroids_kd = update.assemble(chunks, splits, self.task.spherical)
        search = Nearest(self._settled, centroids_kd, self._num_fitted, self._index)
        sums_kd = np.zeros(centroids_kd.shape)
        for place, rows_bd in self._fitted_blocks():
            update.add_rows(sums_kd, rows_bd, search.of(place, rows_bd))
        self._settled = search.settled()
        counts_k = np.bincount(search.assigned_n, minlength=len(centroids_kd))
        total = update.objective(square, centroids_kd, sums_kd, counts_k)
        seconds = time.perf_counter() - started
        looked_at = search.looked_at / max(1, self._num_fitted * len(centroids_kd))
        stats = Stats(counts_k, total, self._settled.moved, seconds, looked_at)
        return stats, *(sums_kd[a:b] for a, b in update.bounds(len(centroids_kd), len(chunks)))

    def _index(self, centroids_md: Singles) -> Search:
        return _Search(centroids_md, self.task.threads)

    def mean(self, counts_k: Integers, old_kd: Singles, *sums: Doubles) -> Singles:
        """The new centroids of one chunk, from the sums of all actors and the counts of all together."""
        total_kd = np.sum(sums, axis=0) if len(sums) > 1 else sums[0]
        return update.means(total_kd, counts_k, old_kd, self.task.spherical)

    def assign(self, centroids_kd: Singles) -> Iterator[pa.Table]:
        """A row for every row of the shard: index (int64), cluster (int64), distance (float32, not squared)."""
        search = self._index(centroids_kd)
        indices_n = self._loaded[0]
        for first, rows_bd in self._blocks():
            squared_b1, nearest_b1 = search(rows_bd, 1)
            yield pa.table(
                {
                    "index": indices_n[first : first + len(rows_bd)],
                    "cluster": nearest_b1[:, 0],
                    "distance": np.sqrt(squared_b1[:, 0]),
                }
            )

    def closer(self, number: int, centroids_md: Singles) -> float:
        """Seeding: takes in more centroids; the sum over rows of the squared distance to the nearest one so far.

        Args:
            number: of this call, from 0.

        Raises:
            SeedingLost: this actor has not seen the calls before.
        """
        if number == 0:
            self._seeding = (0, np.full(self._num_fitted, np.inf))
        seen, squared_n = self._seeding
        if seen != number:
            raise SeedingLost
        search = self._index(centroids_md)
        for place, rows_bd in self._fitted_blocks():
            part = squared_n[place : place + len(rows_bd)]
            np.minimum(part, search(rows_bd, 1)[0][:, 0], out=part)
        self._seeding = (number + 1, squared_n)
        return float(squared_n.sum())

    def draw(self, target: float) -> Singles:
        """float32 (1, d): the row at which the running sum of squared distances passes `target`."""
        squared_n = self._seeding[1]
        if not len(squared_n):
            raise SeedingLost
        place = min(int(np.searchsorted(np.cumsum(squared_n), target, side="right")), len(squared_n) - 1)
        return self.take(np.array([self._position(place)]))

    def oversample(self, key: int, factor: float) -> Singles:
        """float32 (m, d): every row with a chance of `factor` times its squared distance (k-means||)."""
        squared_n = self._seeding[1]
        if len(squared_n) != self._num_fitted:
            raise SeedingLost
        # Keyed by the row group, so that the draws of a row do not depend on how rows are divided among actors.
        uniform_n = np.concatenate([_uniform(key, piece) for piece in self.task.pieces])
        if self._chosen is not None:
            uniform_n = uniform_n[self._chosen]
        places = np.flatnonzero(uniform_n < factor * squared_n)
        return self.take(np.array([self._position(int(place)) for place in places], dtype=np.int64))

    def _position(self, place: int) -> int:
        """Position of a row that is fitted to."""
        inside = place if self._chosen is None else int(self._chosen[place])
        return self.task.pieces[0].start + inside

    def count(self, centroids_md: Singles) -> Integers:
        """int64 (m,): how many rows are nearest to each."""
        search = self._index(centroids_md)
        counts_m = np.zeros(len(centroids_md), np.int64)
        for _, rows_bd in self._fitted_blocks():
            counts_m += np.bincount(search(rows_bd, 1)[1][:, 0], minlength=len(centroids_md))
        return counts_m


class _Search:
    """Exact nearest centroids, on the GPU that Ray has assigned or on the CPU."""

    def __init__(self, centroids_kd: Singles, threads: int) -> None:
        import faiss

        faiss.omp_set_num_threads(threads)
        self._index: Any = faiss.IndexFlatL2(centroids_kd.shape[1])
        if hasattr(faiss, "get_num_gpus") and faiss.get_num_gpus() > 0:
            self._memory = faiss.StandardGpuResources()  # must outlive the index
            self._index = faiss.index_cpu_to_gpu(self._memory, 0, self._index)
        self._index.add(np.ascontiguousarray(centroids_kd))

    def __call__(self, rows_bd: Singles, count: int) -> tuple[Singles, Integers]:
        """float32 (b, count) squared distances and int64 (b, count) numbers of the nearest, the nearest first."""
        squared_bm, nearest_bm = self._index.search(np.ascontiguousarray(rows_bd), count)
        return np.maximum(squared_bm, 0), nearest_bm


def _uniform(key: int, piece: Piece) -> Doubles:
    generator = np.random.Generator(np.random.Philox(key=key ^ (piece.group.start << 64)))
    return generator.random(piece.group.num_rows)[piece.first : piece.end]


def _duplicate(rows: Rows, indices_n: Integers) -> UserError:
    values, counts = np.unique(indices_n, return_counts=True)
    return UserError(
        f"The features at {str(rows.folder)!r} hold the image with index {values[counts > 1][0]} more than once. Make "
        "them again with `raysl features`, or keep one row of each."
    )


def check_unique(rows: Rows, parts: Sequence[Integers]) -> None:
    """Raises UserError when an index lies in two shards."""
    joined = np.concatenate(parts)
    if len(np.unique(joined)) != len(joined):
        raise _duplicate(rows, joined)

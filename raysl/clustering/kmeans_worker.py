"""The k-means worker: an actor that holds one shard of the rows and computes everything about them with FAISS.

FAISS is imported when an actor first searches, so that it lives in processes without torch. Every method is a function
of the shard and its arguments, so a restarted actor answers as before; only k-means++ keeps distances between calls,
which are numbered.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raysl.clustering import update
from raysl.clustering.hamerly import Assigner, HamerlyBounds, Search
from raysl.clustering.update import Splits
from raysl.errors import UserError
from raysl.storage.feature_store import FeatureStore, Piece

# Size of the float32 rows that are searched together. The fixed memory of an actor is a small multiple of it.
_BLOCK_BYTES = 64 << 20

# Arguments of `sample`: number of rows, number to choose, and key.
SampleArguments = tuple[int, int, int]


class SeedingLost(RuntimeError):
    """The actor was restarted between two steps of k-means++, which has to start again."""


def sample(total: int, count: int, key: int) -> NDArray[np.int64]:
    """Choose `count` of `total` positions without replacement: int64 (count,), sorted, the same for equal arguments."""
    generator = np.random.Generator(np.random.Philox(key=key))
    return np.sort(generator.choice(total, count, replace=False, shuffle=False)).astype(np.int64)


@dataclass(frozen=True)
class Shard:
    """The share of a k-means worker."""

    store: FeatureStore  # the features
    pieces: tuple[Piece, ...]  # rows of this worker
    threads: int  # threads of FAISS
    on_gpu: bool  # search on the GPU that Ray assigns to this worker
    memory_bytes: int  # larger shards are read from disk in every pass
    fit: SampleArguments | None  # positions that centroids are fitted to; None for all
    spherical: bool  # whether centroids have norm 1

    @property
    def num_rows(self) -> int:
        return sum(piece.num_rows for piece in self.pieces)

    @property
    def num_bytes(self) -> int:
        """Size in memory."""
        return self.num_rows * self.store.dim * self.store.itemsize

    @property
    def is_kept(self) -> bool:
        """True if the rows stay in memory between passes."""
        return self.num_bytes <= self.memory_bytes


@dataclass(frozen=True)
class PassStats:
    """Statistics of a pass over a shard, or over all shards."""

    counts_k: NDArray[np.int64]  # rows of each cluster
    objective: float  # sum of squared distances, float64
    moved: int | None  # rows in another cluster than in the previous pass; None if unknown
    busy_s: float  # seconds of work
    computed: float  # computed distances, as a share of rows times clusters; see `hamerly`


class KMeansWorker:
    """The actor. The constructor reads nothing, because Ray would restart it and hide the error."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self._bounds: HamerlyBounds | None = None
        self._seeding: tuple[int, NDArray[np.float64]] = (0, np.empty(0))

    def load(self) -> tuple[int, int, int]:
        """Read and check the shard; return the number of fitted rows, and the smallest and largest index.

        Raises:
            UserError: rows cannot be clustered, or an index occurs twice.
        """
        indices_n = self._loaded[0]
        check_unique(self.shard.store, [indices_n])
        return self._num_fitted, int(indices_n.min()), int(indices_n.max())

    def indices(self) -> NDArray[np.int64]:
        """Return the indices of the rows, int64 (n,)."""
        return self._loaded[0]

    @cached_property
    def _loaded(self) -> tuple[NDArray[np.int64], NDArray[Any] | None, float]:
        """Indices, rows if they are kept in memory, and the sum of the squares of the fitted rows."""
        shard = self.shard
        dtype = np.float16 if shard.store.itemsize == 2 else np.float32
        kept_nd = np.empty((shard.num_rows, shard.store.dim), dtype) if shard.is_kept else None
        indices_n = np.empty(shard.num_rows, np.int64)
        square, first = 0.0, 0
        for piece in shard.pieces:
            for indices_b, rows_bd in shard.store.batches(piece):
                shard.store.check(piece, indices_b, rows_bd)
                end = first + len(rows_bd)
                indices_n[first:end] = indices_b
                if kept_nd is not None:
                    kept_nd[first:end] = rows_bd
                fitted_bd = rows_bd[self._fitted(first, end)]
                square += float(np.einsum("bd,bd->", fitted_bd, fitted_bd, dtype=np.float64))
                first = end
        return indices_n, kept_nd, square

    @cached_property
    def _chosen(self) -> NDArray[np.int64] | None:
        """Numbers of the fitted rows in the shard; None for all."""
        if self.shard.fit is None:
            return None
        chosen = sample(*self.shard.fit) - self.shard.pieces[0].start
        return chosen[(chosen >= 0) & (chosen < self.shard.num_rows)]

    @property
    def _num_fitted(self) -> int:
        return self.shard.num_rows if self._chosen is None else len(self._chosen)

    def _fitted(self, first: int, end: int) -> slice | NDArray[np.int64]:
        """Return which of the rows `first` to `end` of the shard are fitted."""
        if self._chosen is None:
            return slice(None)
        low, high = np.searchsorted(self._chosen, [first, end])
        return self._chosen[low:high] - first

    def _blocks(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield the shard in blocks: the number of the first row in the shard, and float32 (b, d)."""
        most = max(1, _BLOCK_BYTES // (4 * self.shard.store.dim))
        kept_nd = self._loaded[1]
        parts = iter([kept_nd]) if kept_nd is not None else self._read_ahead()
        first = 0
        for rows_nd in parts:
            for i in range(0, len(rows_nd), most):
                yield first + i, np.ascontiguousarray(rows_nd[i : i + most], np.float32)
            first += len(rows_nd)

    def _read_ahead(self) -> Iterator[NDArray[Any]]:
        """Yield the shard from disk; each batch is read during the work on the previous one."""
        store = self.shard.store
        batches = (rows for piece in self.shard.pieces for _, rows in store.batches(piece, _BLOCK_BYTES // 4))
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(next, batches, None)
            while (rows_bd := ahead.result()) is not None:
                ahead = reader.submit(next, batches, None)
                yield rows_bd

    def _fitted_blocks(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield only the fitted rows in blocks: the number of the first among the fitted rows, and float32 (b, d)."""
        start = 0
        for first, rows_bd in self._blocks():
            fitted_bd = rows_bd[self._fitted(first, first + len(rows_bd))]
            if len(fitted_bd):
                yield start, fitted_bd
            start += len(fitted_bd)

    def take(self, positions_n: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the rows at positions in this shard, float32 (n, d)."""
        start = self.shard.pieces[0].start
        kept_nd = self._loaded[1]
        if kept_nd is not None:
            return kept_nd[positions_n - start].astype(np.float32)
        out_nd = np.empty((len(positions_n), self.shard.store.dim), np.float32)
        for first, rows_bd in self._blocks():
            places_n = positions_n - start - first
            inside_n = (places_n >= 0) & (places_n < len(rows_bd))
            out_nd[inside_n] = rows_bd[places_n[inside_n]]
        return out_nd

    def accumulate(
        self, splits: Splits, *chunks: NDArray[np.float32]
    ) -> tuple[PassStats | NDArray[np.float64], ...]:
        """Assign every fitted row to its nearest centroid.

        Returns:
            The statistics, and the float64 sums of the clusters of each chunk.
        """
        square = self._loaded[2]
        started_s = time.perf_counter()
        centroids_kd = update.assemble(chunks, splits, self.shard.spherical)
        assigner = Assigner(self._bounds, centroids_kd, self._num_fitted, self._search)
        sums_kd = np.zeros(centroids_kd.shape)
        for start, rows_bd in self._fitted_blocks():
            update.add_rows(sums_kd, rows_bd, assigner.assign(start, rows_bd))
        self._bounds = assigner.bounds()
        counts_k = np.bincount(assigner.assigned_n, minlength=len(centroids_kd))
        total = update.objective(square, centroids_kd, sums_kd, counts_k)
        busy_s = time.perf_counter() - started_s
        computed = assigner.computed / max(1, self._num_fitted * len(centroids_kd))
        stats = PassStats(counts_k, total, self._bounds.moved, busy_s, computed)
        return stats, *(sums_kd[a:b] for a, b in update.chunk_ranges(len(centroids_kd), len(chunks)))

    def _search(self, centroids_md: NDArray[np.float32]) -> Search:
        return FaissSearch(centroids_md, self.shard.threads, self.shard.on_gpu)

    def gpu_is_idle(self) -> bool:
        """Return True if this worker holds a GPU that FAISS cannot use."""
        return self.shard.on_gpu and not faiss_gpus()

    def mean(
        self, counts_k: NDArray[np.int64], old_kd: NDArray[np.float32], *sums: NDArray[np.float64]
    ) -> NDArray[np.float32]:
        """Return the new centroids of one chunk, from the sums of all actors and the counts over all."""
        return update.means(update.total(sums), counts_k, old_kd, self.shard.spherical)

    def assign(self, centroids_kd: NDArray[np.float32]) -> Iterator[pa.Table]:
        """Yield a table with a row for every row of the shard: index, path if known, cluster, distance."""
        search = self._search(centroids_kd)
        indices_n = self._loaded[0]
        paths = self.shard.store.paths(self.shard.pieces)
        for first, rows_bd in self._blocks():
            squared_b1, nearest_b1 = search(rows_bd, 1)
            columns: dict[str, Any] = {"index": indices_n[first : first + len(rows_bd)]}
            if paths is not None:
                columns["path"] = paths.slice(first, len(rows_bd))
            yield pa.table({**columns, "cluster": nearest_b1[:, 0], "distance": np.sqrt(squared_b1[:, 0])})

    def add_centroids(self, number: int, centroids_md: NDArray[np.float32]) -> float:
        """Add centroids to k-means++; return the sum of the squared distances to the nearest so far.

        Raises:
            SeedingLost: this actor has not seen the previous calls.
        """
        if number == 0:
            self._seeding = (0, np.full(self._num_fitted, np.inf))
        seen, squared_n = self._seeding
        if seen != number:
            raise SeedingLost
        search = self._search(centroids_md)
        for start, rows_bd in self._fitted_blocks():
            part = squared_n[start : start + len(rows_bd)]
            np.minimum(part, search(rows_bd, 1)[0][:, 0], out=part)
        self._seeding = (number + 1, squared_n)
        return float(squared_n.sum())

    def draw_row(self, target: float) -> NDArray[np.float32]:
        """Return the row at which the running sum of squared distances passes `target`, float32 (1, d)."""
        squared_n = self._seeding[1]
        if not len(squared_n):
            raise SeedingLost
        position = min(int(np.searchsorted(np.cumsum(squared_n), target, side="right")), len(squared_n) - 1)
        row = position if self._chosen is None else int(self._chosen[position])
        return self.take(np.array([self.shard.pieces[0].start + row]))


def faiss_gpus() -> int:
    """Return the number of GPUs that FAISS can use in this process; 0 for its build without GPUs."""
    import faiss

    return faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0


@cache
def _gpu_memory() -> Any:
    """Return FAISS's memory on the GPU, 1.5 GB. Every index of this process uses it, so it lives as long as they do."""
    import faiss

    return faiss.StandardGpuResources()


class FaissSearch:
    """Exact nearest centroids.

    Args:
        on_gpu: search on the first GPU of this process if FAISS can use one.
    """

    def __init__(self, centroids_kd: NDArray[np.float32], threads: int, on_gpu: bool) -> None:
        import faiss

        faiss.omp_set_num_threads(threads)
        self._index: Any = faiss.IndexFlatL2(centroids_kd.shape[1])
        self.on_gpu = on_gpu and faiss_gpus() > 0
        if self.on_gpu:
            self._index = faiss.index_cpu_to_gpu(_gpu_memory(), 0, self._index)
        self._index.add(np.ascontiguousarray(centroids_kd))

    def __call__(
        self, rows_bd: NDArray[np.float32], count: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return squared distances, float32 (b, count), and numbers, int64 (b, count), of the nearest, in order."""
        squared_bm, nearest_bm = self._index.search(np.ascontiguousarray(rows_bd), count)
        return np.maximum(squared_bm, 0), nearest_bm


def check_unique(store: FeatureStore, parts: Sequence[NDArray[np.int64]]) -> None:
    """Raise UserError if an index occurs twice."""
    values, counts = np.unique(np.concatenate(parts), return_counts=True)
    if (counts > 1).any():
        raise UserError(
            f"The features at {str(store.folder)!r} hold the image with index {values[counts > 1][0]} more than once. "
            "Make them again with `raysl features`, or keep one row for each image."
        )

"""Run a clustering from its configuration to its files, through interruptions.

clustering.json        written first: the features and the configuration
state.npz              after every iteration, at most once a second; deleted at the end
centroids.npy          float32 (k, dim)
assignments.parquet    index (int64), path (string, if the features have it), cluster (int64), distance (float32,
                       Euclidean); one row for each image
summary.json           written last: quality of the clustering
"""

from __future__ import annotations

import io
import json
import logging
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raysl import ray_cluster, rng
from raysl.clustering import seeding, update
from raysl.clustering.actor_pool import ActorPool, allocate
from raysl.clustering.kmeans_worker import SampleArguments
from raysl.clustering.options import KMeansConfig
from raysl.clustering.state import STATE, State
from raysl.clustering.update import Splits
from raysl.dataset import DataSet
from raysl.errors import UserError, install_hint
from raysl.ray_cluster import placement
from raysl.storage import Folder
from raysl.storage.feature_store import FeatureStore
from raysl.storage.records import as_json, read_record, signed, write_record

_log = logging.getLogger("raysl.clustering")

HEADER, SUMMARY = "clustering.json", "summary.json"
CENTROIDS, ASSIGNMENTS = "centroids.npy", "assignments.parquet"
# New actor pools, each from the last saved state, before a clustering gives up.
_MAX_POOLS = 4
_FEW_ROWS = 39
# Shorter passes are not all saved: writing would take longer than repeating them.
_SAVE_EVERY_S = 1.0
_QUANTILES = (0, 5, 25, 50, 75, 95, 100)
_REMEDY = "Delete the folder of the clustering and run `raysl cluster` again."


@dataclass(frozen=True)
class Clustering:
    """A finished clustering."""

    folder: Folder

    @property
    def assignments(self) -> str:
        """URI of the table with the cluster of every index."""
        return str(self.folder / ASSIGNMENTS)

    def summary(self) -> dict[str, Any]:
        """Return the quality of the clustering; see `fit`. Raises UserError if the file is damaged."""
        return read_record(self.folder, SUMMARY, _REMEDY)

    def centroids(self) -> NDArray[np.float32]:
        """Return the centroids, float32 (k, dim). Raises UserError if the file is missing or damaged."""
        file = f"{self.folder}/{CENTROIDS}"
        try:
            data = self.folder.read(CENTROIDS)
            expected = self.summary().get("centroids_crc32", zlib.crc32(data))
            if zlib.crc32(data) != expected:
                raise ValueError("its checksum does not match")
            return np.load(io.BytesIO(data), allow_pickle=False)  # type: ignore[no-any-return]
        except FileNotFoundError as error:
            raise UserError(f"The file {file} is missing. {_REMEDY}") from error
        except (ValueError, EOFError) as error:
            raise UserError(f"The file {file} is damaged: {error}. {_REMEDY}") from error

    @staticmethod
    def open(uri: str) -> Clustering:
        """Open a finished clustering. Raises UserError if there is none."""
        if not Folder(uri).exists(SUMMARY):
            raise UserError(f"No finished clustering at {uri!r}. `raysl cluster FEATURES --k K` makes one.")
        return Clustering(Folder(uri))


def fit(features: str, config: KMeansConfig, out: str = "") -> Clustering:
    """Cluster features, resume an interrupted clustering, or return a finished one.

    The summary holds: k, rows, fitted_rows, dim, the curves (for each iteration of each start: objective, the sum of
    squared distances, moved share, empty clusters, smallest and largest cluster, share of the distances that were
    computed, seconds), the best start, the final objective over all rows, sizes, the share of time that passes spent
    outside of arithmetic, and NMI and purity if the images have labels.

    Args:
        features: a folder of `raysl features`, or of Parquet files as in `raysl.storage.feature_store`.
        config: configuration of the clustering.
        out: folder of the result, a path or a URI; by default a folder inside the features, named after the config.

    Raises:
        UserError: the features cannot be clustered, or `out` holds another clustering.
    """
    store = FeatureStore.open(features, config.layer)
    fitted = min(config.max_rows, store.num_rows) if config.max_rows else store.num_rows
    if config.k > fitted:
        raise UserError(
            f"--k is {config.k}, but there are {fitted:,} rows to fit centroids to. There cannot be more clusters than "
            "rows: lower --k, or give more images."
        )
    key = rng.key(json.dumps(config.identity(), sort_keys=True), store.identity())
    name = f"k{config.k}-{key:016x}"[:-8]
    folder = Folder(out) if out else store.folder / "_clusters" / name
    _check_header(folder, {"features": store.identity(), "config": config.identity()})
    if folder.exists(SUMMARY):
        _log.info("The clustering at %s is already finished.", folder)
        return Clustering(folder)
    if fitted < store.num_rows:
        _log.info(
            "Centroids are fitted to %s of %s rows, see --max-rows.", f"{fitted:,}", f"{store.num_rows:,}"
        )
    if fitted < _FEW_ROWS * config.k:
        rows = f"{fitted / config.k:.1f}"
        _log.info("%s rows per cluster are few: below %d, clusters follow the noise.", rows, _FEW_ROWS)
    ray_cluster.start()
    _with_retries(lambda: _fit(store, config, folder))
    folder.delete(STATE)
    return Clustering(folder)


def assign(clustering: Clustering, features: str, out: str, config: KMeansConfig) -> str:
    """Write the nearest centroid of every row of other features, such as those of validation images.

    Args:
        clustering: a finished clustering.
        features: folder of features of the same network and layer.
        out: the Parquet file to write, a path or a URI.
        config: only `layer`, `actors` and `memory_gb` are used.

    Returns:
        `out`.

    Raises:
        UserError: the rows have another length than the centroids, or cannot be read.
    """
    store = FeatureStore.open(features, config.layer)
    centroids_kd = clustering.centroids()
    if store.dim != centroids_kd.shape[1]:
        raise UserError(
            f"The features at {features!r} have rows of {store.dim} numbers and the centroids at "
            f"{str(clustering.folder)!r} have {centroids_kd.shape[1]}. Give features of the same network, layer "
            "and PCA."
        )
    ray_cluster.start()

    def work() -> None:
        with _pool(store, config, None) as pool:
            _write_assignments(pool, centroids_kd, out, {"K": str(len(centroids_kd))})

    _with_retries(work)
    return out


def _with_retries(work: Callable[[], None]) -> None:
    """Do the work. Repeat it with a new pool if Ray could not restart an actor that was lost."""
    import ray

    for attempt in range(_MAX_POOLS):
        try:
            work()
            return
        except (ray.exceptions.RayError, ray.exceptions.RayTaskError) as error:
            user_error = ray_cluster.user_error(error)
            if user_error is not None:
                raise user_error from None
            if attempt == _MAX_POOLS - 1:
                raise
            why = str(error).strip().splitlines()[-1]
            _log.warning("An actor was lost (%s). Resuming from the last iteration with new actors.", why)


def _pool(store: FeatureStore, config: KMeansConfig, rows: SampleArguments | None) -> ActorPool:
    found = placement.machines()
    # A requested number of actors may need machines that the autoscaler has yet to start.
    nodes = (*found.now, *found.later[: found.max_new_machines]) if config.actors else found.for_work
    if config.actors:
        store.shards(config.actors)  # Raises UserError if a shard would be empty.
    return ActorPool(
        store, allocate(nodes, config.actors, config.memory_gb), config.spherical, rows, config.k
    )


def _check_header(folder: Folder, header: Mapping[str, Any]) -> None:
    """Write the header, or compare it with an existing one."""
    header = as_json(header)
    if not folder.exists(HEADER):
        if others := {STATE, CENTROIDS, ASSIGNMENTS, SUMMARY}.intersection(folder.list()):
            raise UserError(
                f"The folder {str(folder)!r} holds {min(others)!r}, which no clustering of raysl has written: there is "
                f"no {HEADER}. Give --out a new folder."
            )
        write_record(folder, HEADER, dict(header))
        return
    found = read_record(folder, HEADER, _REMEDY)
    if found != header:
        old, new = found.get("config", {}), header["config"]
        differ = [name for name in new if not isinstance(old, dict) or new[name] != old.get(name)]
        raise UserError(
            f"Another clustering is at {str(folder)!r}; these differ: {', '.join(differ) or 'the features'}. Give "
            "another --out, or the original values."
        )


def _fit(store: FeatureStore, config: KMeansConfig, folder: Folder) -> None:
    state = State.load(folder)
    with _pool(store, config, seeding.fitted_rows(config, store.num_rows)) as pool:
        while state.restart < config.restarts:
            _fit_start(pool, config, state, folder)
            state.finish_restart(config.restarts)
            state.save(folder)
        assert state.best_kd is not None
        buffer = io.BytesIO()
        np.save(buffer, state.best_kd, allow_pickle=False)
        folder.write(CENTROIDS, buffer.getvalue())
        table_uri = str(folder / ASSIGNMENTS)
        counts_k, total = _write_assignments(pool, state.best_kd, table_uri, _origin(store, config))
        value = _summary(store, config, state, counts_k, table_uri)
        value |= {"objective_value": total, "fitted_rows": sum(pool.num_fitted)}
        write_record(folder, SUMMARY, {**value, "centroids_crc32": zlib.crc32(buffer.getvalue())})
    empty = int((counts_k == 0).sum())
    _log.info(
        "%s rows in %s clusters, %d of them empty: %s", f"{store.num_rows:,}", f"{config.k:,}", empty, folder
    )


def _fit_start(pool: ActorPool, config: KMeansConfig, state: State, folder: Folder) -> None:
    """Iterate until the centroids of the start no longer move, or the iterations are used up."""
    if state.centroids_kd is None:
        state.centroids_kd = seeding.initial_centroids(pool, config, state.restart)
        state.save(folder)
    curve = state.curves[state.restart]
    chunks, splits = pool.scatter(state.centroids_kd), Splits()
    running = None if _converged(curve, config) else pool.start_pass(chunks, splits)
    saved_s = before_s = time.perf_counter()
    while running is not None:
        totals = pool.totals(running)
        now_s = time.perf_counter()
        generator = rng.generator(config.seed, "kmeans", "splits", state.restart, len(curve))
        splits = update.plan_splits(totals.counts_k, generator)
        chunks = pool.means(running, totals.counts_k, chunks)
        curve.append(
            {
                "objective": totals.objective,
                "moved_share": None if totals.moved is None else totals.moved / sum(pool.num_fitted),
                "empty": int((totals.counts_k == 0).sum()),
                "smallest": int(totals.counts_k.min()),
                "largest": int(totals.counts_k.max()),
                "computed": totals.computed,
                "busy_s": totals.busy_s,
                "wall_s": now_s - before_s,
            }
        )
        before_s = now_s
        running = None if _converged(curve, config) else pool.start_pass(chunks, splits)
        if running is None or now_s - saved_s >= _SAVE_EVERY_S:
            # Save while the actors work on the next pass.
            state.centroids_kd = pool.gather(chunks, splits)
            state.save(folder)
            saved_s = now_s
        _log.info(_progress(curve, config, state.restart, pool))


def _converged(curve: list[dict[str, Any]], config: KMeansConfig) -> bool:
    """Return True if no further pass is needed. Depends on the curve alone, so an interruption changes nothing."""
    if len(curve) >= config.iterations:
        return True
    if len(curve) < 2 or curve[-1]["empty"]:
        return False
    before, now = curve[-2]["objective"], curve[-1]["objective"]
    return bool(before - now <= config.tolerance * abs(before))


def _progress(curve: list[dict[str, Any]], config: KMeansConfig, restart: int, pool: ActorPool) -> str:
    now = curve[-1]
    change = ""
    if len(curve) > 1 and curve[-2]["objective"]:
        change = f" ({100 * (now['objective'] / curve[-2]['objective'] - 1):+.3f} %)"
    moved = "-" if now["moved_share"] is None else f"{100 * now['moved_share']:.2f} %"
    start = f"start {restart + 1}/{config.restarts}, " if config.restarts > 1 else ""
    return (
        f"{start}iteration {len(curve)}/{config.iterations}: objective {now['objective']:.6g}{change}, moved {moved}, "
        f"{now['empty']} empty, clusters of {now['smallest']:,} to {now['largest']:,}, "
        f"{sum(pool.num_fitted) / now['busy_s']:,.0f} rows/s, {100 * now['computed']:.0f} % of the distances"
    )


def _origin(store: FeatureStore, config: KMeansConfig) -> dict[str, str]:
    """Return the metadata of the table of assignments."""
    origin = {
        "K": str(config.k),
        "teacher": str(store.metadata.get("teacher", "")),
        "objective": str(store.metadata.get("objective", "")),
        "fingerprint": str(store.metadata.get("fingerprint", "")),
        "features": store.identity(),
        "kmeans": json.dumps(config.identity(), sort_keys=True),
    }
    return {name: value for name, value in origin.items() if value}


def _write_assignments(
    pool: ActorPool, centroids_kd: NDArray[np.float32], table_uri: str, metadata: Mapping[str, str]
) -> tuple[NDArray[np.int64], float]:
    """Write the table block by block; return the sizes of the clusters and the sum of squared distances."""
    paths = [("path", pa.string())] if pool.store.has_paths else []
    columns = [("index", pa.int64()), *paths, ("cluster", pa.int64()), ("distance", pa.float32())]
    schema = pa.schema(columns, metadata=signed(metadata))
    counts_k, total = np.zeros(len(centroids_kd), np.int64), 0.0
    uri, _, name = table_uri.rpartition("/")
    with (
        Folder(uri).writing(name) as stream,
        pq.ParquetWriter(stream, schema, write_page_checksum=True) as writer,
    ):
        for table in pool.assign(centroids_kd):
            counts_k += np.bincount(table.column("cluster").to_numpy(), minlength=len(counts_k))
            total += float((table.column("distance").to_numpy().astype(np.float64) ** 2).sum())
            writer.write_table(table.replace_schema_metadata(schema.metadata).cast(schema))
    return counts_k, total


def _summary(
    store: FeatureStore, config: KMeansConfig, state: State, counts_k: NDArray[np.int64], table_uri: str
) -> dict[str, Any]:
    curve = [entry for curve in state.curves for entry in curve]
    walls_s = sum(entry["wall_s"] for entry in curve)
    value = {
        **_origin(store, config),
        "kmeans": config.identity(),
        "rows": store.num_rows,
        "dim": store.dim,
        "curves": state.curves,
        "restart": state.best_restart(),
        "sizes": sizes(counts_k),
        "overhead_share": max(0.0, 1 - sum(entry["busy_s"] for entry in curve) / walls_s) if walls_s else 0.0,
    }
    labels_n = _labels(store)
    if labels_n is not None:
        uri, _, name = table_uri.rpartition("/")
        with Folder(uri).open(name) as stream:
            table = pq.read_table(stream, columns=["index", "cluster"])
        indices_n, clusters_n = (table.column(column).to_numpy() for column in ("index", "cluster"))
        value["labels"] = agreement(clusters_n, labels_n[indices_n])
    return value


def _labels(store: FeatureStore) -> NDArray[np.int64] | None:
    """Return the labels of the images by index, int64, if they are known and the data set still exists."""
    data = store.metadata.get("data")
    if not data or not DataSet.exists_at(data):
        return None
    dataset = DataSet.open(data)
    if not dataset.has_labels or dataset.manifest.fingerprint != store.metadata.get("fingerprint"):
        return None
    return dataset.labels()


def sizes(counts_k: NDArray[np.int64]) -> dict[str, Any]:
    """Return the empty clusters, quantiles of the sizes, and the entropy of the sizes as a share of the maximum."""
    shares = counts_k[counts_k > 0] / counts_k.sum()
    entropy = float(-(shares * np.log(shares)).sum())
    return {
        "empty": int((counts_k == 0).sum()),
        "quantiles": {f"{q}%": float(np.percentile(counts_k, q)) for q in _QUANTILES},
        "entropy_share": entropy / np.log(len(counts_k)) if len(counts_k) > 1 else 1.0,
    }


def agreement(clusters_n: NDArray[np.int64], labels_n: NDArray[np.int64]) -> dict[str, float]:
    """Return the NMI (arithmetic mean of the entropies) and the purity; nothing without scikit-learn.

    Purity is the share of rows with the most frequent label of their cluster.
    """
    try:
        from sklearn.metrics import normalized_mutual_info_score
        from sklearn.metrics.cluster import contingency_matrix
    except ImportError:
        _log.warning(f"NMI and purity need scikit-learn. {install_hint('eval')}")
        return {}
    table = contingency_matrix(labels_n, clusters_n, sparse=True)
    return {
        "nmi": float(normalized_mutual_info_score(labels_n, clusters_n)),
        "purity": float(table.max(axis=0).sum() / len(labels_n)),
    }

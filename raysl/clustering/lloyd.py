"""A clustering from its configuration to its files, through interruptions. Runs on the driver.

clustering.json         written first: which features, and what is computed
state.npz               after every iteration, but not twice in a second; gone at the end
centroids.npy           float32 (k, dim)
assignments.parquet     index (int64), cluster (int64), distance (float32, Euclidean); one row for each image
card.json               written last: how good it is
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysl import ray_cluster, rng
from raysl.clustering import seeding, summary, update
from raysl.clustering.actor_pool import Crew, Totals, share
from raysl.clustering.feature_rows import Rows
from raysl.clustering.options import KMeansConfig
from raysl.clustering.state import State
from raysl.clustering.update import Integers, Singles, Splits
from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.ray_cluster import placement
from raysl.storage import Folder

HEADER, CENTROIDS, ASSIGNMENTS, CARD = (
    "clustering.json",
    "centroids.npy",
    "assignments.parquet",
    "card.json",
)
_SCHEMA = pa.schema([("index", pa.int64()), ("cluster", pa.int64()), ("distance", pa.float32())])
# New crews, each with what was saved last, before a clustering gives up.
_CREWS = 4
_FEW_ROWS = 39
# Passes of less than this are not saved each: writing would take longer than doing them again.
_SAVE_EVERY_S = 1.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Clustering:
    """A finished clustering."""

    folder: Folder

    @property
    def assignments(self) -> str:
        """URI of the table with a cluster for every index."""
        return str(self.folder / ASSIGNMENTS)

    def card(self) -> dict[str, Any]:
        """How good it is; see `fit`."""
        return self.folder.read_json(CARD)  # type: ignore[no-any-return]

    def centroids(self) -> Singles:
        """float32 (k, dim)."""
        with self.folder.open(CENTROIDS) as file:
            return np.load(file, allow_pickle=False)  # type: ignore[no-any-return]

    @staticmethod
    def open(uri: str) -> Clustering:
        """Raises UserError when no finished clustering lies there."""
        if not Folder(uri).exists(CARD):
            raise UserError(f"No finished clustering at {uri!r}. `raysl cluster FEATURES --k K` makes one.")
        return Clustering(Folder(uri))


def fit(features: str, config: KMeansConfig, out: str = "", say: Say = print) -> Clustering:
    """Clusters features, goes on with a clustering that was interrupted, or returns one that is finished.

    The card holds: k, rows, fitted_rows, dim, the curve (a row for each iteration of each start: objective, the sum of
    squared distances, moved share, empty clusters, smallest and largest cluster, share of the distances that had to be
    computed, seconds), the start that was kept, the
    final objective over all rows, sizes, the share of the time that passes did not spend in arithmetic, and NMI and
    purity where the images have labels.

    Args:
        features: a folder of `raysl features`, or of Parquet files as `rows` describes.
        config: what is computed.
        out: folder of the result, a path or a URI; by default one inside the features that is named by the config.
        say: takes one line of progress at a time.

    Raises:
        UserError: the features cannot be clustered so, or another clustering lies at `out`.
    """
    rows = Rows.open(features, config.layer)
    fitted = min(config.max_rows, rows.num_rows) if config.max_rows else rows.num_rows
    if config.k > fitted:
        raise UserError(
            f"k is {config.k} and there are {fitted:,} rows to fit centroids to. There cannot be more clusters than "
            "rows: lower --k, or give more images."
        )
    folder = Folder(out) if out else rows.folder / "clusters" / _name(config, rows)
    _begin(folder, {"features": rows.identity(), "config": config.facts()})
    if folder.exists(CARD):
        say(f"The clustering at {folder} is already finished.")
        return Clustering(folder)
    if fitted < rows.num_rows:
        say(f"Centroids are fitted to {fitted:,} of {rows.num_rows:,} rows, as --max-rows asks.")
    if fitted < _FEW_ROWS * config.k:
        say(
            f"{fitted / config.k:.1f} rows for each cluster are few: below {_FEW_ROWS} clusters follow the noise."
        )
    ray_cluster.start()
    _persist(lambda: _fit(rows, config, folder, say), say)
    State.delete(folder)
    return Clustering(folder)


def assign(clustering: Clustering, features: str, out: str, config: KMeansConfig, say: Say = print) -> str:
    """The nearest centroid of a clustering for every row of other features, such as those of validation images.

    Args:
        clustering: finished.
        features: of the same network and layer.
        out: the Parquet file to write, a path or a URI.
        config: of the clustering; only `layer`, `actors` and `memory_gb` matter.

    Returns:
        `out`.

    Raises:
        UserError: the rows have another length than the centroids, or cannot be read.
    """
    rows = Rows.open(features, config.layer)
    centroids_kd = clustering.centroids()
    if rows.dim != centroids_kd.shape[1]:
        raise UserError(
            f"The features at {features!r} have rows of {rows.dim} numbers and the centroids at "
            f"{str(clustering.folder)!r} have {centroids_kd.shape[1]}. Give features of the same network, layer "
            "and PCA."
        )
    ray_cluster.start()

    def work() -> None:
        with _crew(rows, config, None, say) as crew:
            _write_assignments(crew, centroids_kd, out, {"K": str(len(centroids_kd))})

    _persist(work, say)
    return out


def _persist(work: Callable[[], None], say: Say) -> None:
    """Does the work, with a new crew when more was lost than Ray brings back by itself."""
    import ray

    for attempt in range(_CREWS):
        try:
            work()
            return
        except (ray.exceptions.RayError, ray.exceptions.RayTaskError) as error:
            mendable = ray_cluster.user_error(error)
            if mendable is not None:
                raise mendable from None
            if attempt == _CREWS - 1:
                raise
            why = str(error).strip().splitlines()[-1]
            say(f"An actor was lost ({why}). Going on from the last iteration with new actors.")


def _crew(rows: Rows, config: KMeansConfig, fit: tuple[int, int, int] | None, say: Say) -> Crew:
    found = placement.machines()
    # So many actors as were asked for may need machines that are still to be started.
    nodes = (*found.now, *found.later[: found.room]) if config.actors else found.for_work
    if config.actors:
        rows.divide(config.actors)  # says so when a shard would be empty
    return Crew(rows, share(nodes, config.actors, config.memory_gb), config.spherical, fit, say)


def _begin(folder: Folder, facts: Mapping[str, Any]) -> None:
    """Writes the header, or compares it with the one that is there."""
    facts = json.loads(json.dumps(facts))
    if not folder.exists(HEADER):
        folder.write_json(HEADER, facts)
        return
    begun = folder.read_json(HEADER)
    if begun != facts:
        differ = [
            name for name in facts["config"] if facts["config"][name] != begun.get("config", {}).get(name)
        ]
        raise UserError(
            f"Another clustering lies at {str(folder)!r}; these differ: {', '.join(differ) or 'the features'}. Give "
            "another --out, or the values that it was begun with."
        )


def _name(config: KMeansConfig, rows: Rows) -> str:
    key = rng.key(json.dumps(config.facts(), sort_keys=True), rows.identity())
    return f"k{config.k}-{key:016x}"[:-8]


def _fit(rows: Rows, config: KMeansConfig, folder: Folder, say: Say) -> None:
    state = State.load(folder)
    fit_rows = seeding.fitted(config, rows.num_rows)
    with _crew(rows, config, fit_rows, say) as crew:
        while state.restart < config.restarts:
            _one_start(crew, config, state, folder, say)
            state.finish_restart(config.restarts)
            state.save(folder)
        assert state.best_kd is not None
        with folder.writing(CENTROIDS) as stream:
            np.save(stream, state.best_kd, allow_pickle=False)
        place = str(folder / ASSIGNMENTS)
        counts_k, total = _write_assignments(crew, state.best_kd, place, _about(rows, config))
        folder.write_json(CARD, _card(rows, config, state, counts_k, total, sum(crew.num_fitted), place))
    say(f"{rows.num_rows:,} rows in {config.k:,} clusters, {(counts_k == 0).sum()} of them empty: {folder}")


def _one_start(crew: Crew, config: KMeansConfig, state: State, folder: Folder, say: Say) -> None:
    """Iterates until the centroids of the start are settled, or the iterations are over."""
    if state.centroids_kd is None:
        state.centroids_kd = seeding.start(crew, config, state.restart)
        state.save(folder)
    curve = state.curves[state.restart]
    chunks, splits = crew.scatter(state.centroids_kd), Splits()
    running = None if _finished(curve, config) else crew.begin(chunks, splits)
    saved = before = time.perf_counter()
    while running is not None:
        totals = crew.totals(running)
        now = time.perf_counter()
        generator = rng.generator(config.seed, "kmeans", "splits", state.restart, len(curve))
        splits = update.plan_splits(totals.counts_k, generator)
        chunks = crew.means(running, totals.counts_k, chunks)
        curve.append(_facts(totals, sum(crew.num_fitted), now - before))
        before = now
        running = None if _finished(curve, config) else crew.begin(chunks, splits)
        if running is None or now - saved >= _SAVE_EVERY_S:
            # Written while the actors are at the next pass.
            state.centroids_kd = crew.gather(chunks, splits)
            state.save(folder)
            saved = now
        say(_line(curve, config, state.restart, crew))


def _finished(curve: list[dict[str, Any]], config: KMeansConfig) -> bool:
    """Whether no further pass is needed. Depends on the curve alone, so that an interruption does not matter."""
    if len(curve) >= config.iterations:
        return True
    if len(curve) < 2 or curve[-1]["empty"]:
        return False
    before, now = curve[-2]["objective"], curve[-1]["objective"]
    return bool(before - now <= config.tolerance * abs(before))


def _facts(totals: Totals, num_rows: int, wall_s: float) -> dict[str, Any]:
    """The row of the curve for one iteration, which took `wall_s` since the one before."""
    return {
        "objective": totals.objective,
        "moved_share": None if totals.moved is None else totals.moved / num_rows,
        "empty": int((totals.counts_k == 0).sum()),
        "smallest": int(totals.counts_k.min()),
        "largest": int(totals.counts_k.max()),
        "looked_at": totals.looked_at,
        "busy_s": totals.busy_s,
        "wall_s": wall_s,
    }


def _line(curve: list[dict[str, Any]], config: KMeansConfig, restart: int, crew: Crew) -> str:
    """One line of progress."""
    row = curve[-1]
    fall = ""
    if len(curve) > 1:
        fall = (
            f" ({100 * (row['objective'] / curve[-2]['objective'] - 1):+.3f} %)"
            if curve[-2]["objective"]
            else ""
        )
    moved = "-" if row["moved_share"] is None else f"{100 * row['moved_share']:.2f} %"
    per_s = sum(crew.num_fitted) / row["busy_s"]
    start = f"start {restart + 1}/{config.restarts}, " if config.restarts > 1 else ""
    return (
        f"{start}iteration {len(curve)}/{config.iterations}: objective {row['objective']:.6g}{fall}, moved {moved}, "
        f"{row['empty']} empty, clusters of {row['smallest']:,} to {row['largest']:,}, {per_s:,.0f} rows/s, "
        f"{2e-9 * per_s * config.k * crew.rows.dim * row['looked_at']:.1f} GFLOP/s, {100 * row['looked_at']:.0f} % of "
        "the distances"
    )


def _about(rows: Rows, config: KMeansConfig) -> dict[str, str]:
    """What the table of assignments says about itself."""
    about = {
        "K": str(config.k),
        "teacher": str(rows.facts.get("teacher", "")),
        "objective": str(rows.facts.get("objective", "")),
        "fingerprint": str(rows.facts.get("fingerprint", "")),
        "features": rows.identity(),
        "kmeans": json.dumps(config.facts(), sort_keys=True),
    }
    return {name: value for name, value in about.items() if value}


def _write_assignments(
    crew: Crew, centroids_kd: Singles, place: str, about: Mapping[str, str]
) -> tuple[Integers, float]:
    """Writes the table block by block; returns the sizes of the clusters and the sum of squared distances."""
    schema = _SCHEMA.with_metadata(dict(about))
    counts_k, total = np.zeros(len(centroids_kd), np.int64), 0.0
    uri, _, name = place.rpartition("/")
    with Folder(uri).writing(name) as stream, pq.ParquetWriter(stream, schema) as writer:
        for table in crew.assign(centroids_kd):
            counts_k += np.bincount(table.column("cluster").to_numpy(), minlength=len(counts_k))
            total += float((table.column("distance").to_numpy().astype(np.float64) ** 2).sum())
            writer.write_table(table.replace_schema_metadata(schema.metadata).cast(schema))
    return counts_k, total


def _card(
    rows: Rows, config: KMeansConfig, state: State, counts_k: Integers, total: float, fitted: int, place: str
) -> dict[str, Any]:
    curve = [row for curve in state.curves for row in curve]
    walls = sum(row["wall_s"] for row in curve)
    value = {
        **_about(rows, config),
        "kmeans": config.facts(),
        "rows": rows.num_rows,
        "fitted_rows": fitted,
        "dim": rows.dim,
        "curves": state.curves,
        "restart": state.best_restart(),
        "objective_value": total,
        "sizes": summary.sizes(counts_k),
        "overhead_share": max(0.0, 1 - sum(row["busy_s"] for row in curve) / walls) if walls else 0.0,
    }
    labels_n = _labels(rows)
    if labels_n is not None:
        uri, _, name = place.rpartition("/")
        with Folder(uri).open(name) as stream:
            table = pq.read_table(stream, columns=["index", "cluster"])
        indices_n, clusters_n = (table.column(column).to_numpy() for column in ("index", "cluster"))
        value["labels"] = summary.agreement(clusters_n, labels_n[indices_n])
    return value


def _labels(rows: Rows) -> Integers | None:
    """int64 by index: the labels of the images, where they are known and the data set is still there."""
    data = rows.facts.get("data")
    if not data or not DataSet.is_one(data):
        return None
    dataset = DataSet.open(data)
    if not dataset.has_labels or dataset.manifest.fingerprint != rows.facts.get("fingerprint"):
        return None
    return dataset.labels()

"""A clustering equals Lloyd's algorithm in one process, on any number of actors and through any interruption."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysl import rng
from raysl.clustering import actor_pool, lloyd
from raysl.clustering.actor_pool import ActorPool, allocate
from raysl.clustering.kmeans_worker import sample
from raysl.clustering.lloyd import Clustering, assign, fit
from raysl.clustering.options import KMeansConfig
from raysl.clustering.state import State
from raysl.errors import UserError
from raysl.objectives.clusterfit import Assignments
from raysl.storage import Folder
from raysl.storage.feature_files import FINISHED, FeatureForm, write_part
from raysl.storage.feature_store import FeatureStore
from raysl.storage.records import write_record
from tests.clustering.blobs import blobs, curve, write
from tests.clustering.blobs import lloyd as reference
from tests.data import make_dataset

X = blobs(301)


def config(**changes: Any) -> KMeansConfig:
    return KMeansConfig(**{"k": 12, "iterations": 5, "tolerance": 0, "actors": 2, **changes})


def starting(settings: KMeansConfig, rows_nd: Any) -> Any:
    """Return the initial centroids of init "rows"."""
    generator = rng.generator(settings.seed, "kmeans", "rows", 0)
    return rows_nd[generator.choice(len(rows_nd), settings.k, replace=False)]


def table(clustering: Clustering) -> Any:
    return pq.read_table(clustering.assignments)


@pytest.mark.parametrize("name", ["summary.json", "state.npz", "centroids.npy", "assignments.parquet"])
def test_a_file_of_something_else_is_neither_a_result_nor_replaced(tmp_path: Path, name: str) -> None:
    features, out = write(tmp_path / "f", X), tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(
        UserError, match=rf"holds '{name}', which no clustering of raysl has written.* new folder"
    ):
        fit(features, config(), str(out))
    assert [(file.name, file.read_text()) for file in out.iterdir()] == [(name, "mine")]


def test_features_that_were_written_again_are_not_clustered_already(tmp_path: Path) -> None:
    """Neither a finished nor an interrupted clustering of the old rows is taken for one of the new rows."""
    features, out = write(tmp_path / "f", X), Folder(str(tmp_path / "out"))
    header = {"features": FeatureStore.open(features).identity(), "config": config().identity()}
    write_record(out, lloyd.HEADER, header)
    write_record(out, lloyd.SUMMARY, {})
    assert fit(features, config(), str(out)).folder == out
    write(tmp_path / "f", X[::-1])
    for file in (tmp_path / "f").iterdir():
        os.utime(file, (1, 1))
    with pytest.raises(UserError, match="these differ: the features"):
        fit(features, config(), str(out))


@pytest.fixture(scope="module")
def usual(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Clustering:
    """An undisturbed clustering of X on two actors."""
    folder = tmp_path_factory.mktemp("usual")
    return fit(write(folder / "f", X), config(), str(folder / "out"))


@pytest.mark.ray
@pytest.mark.parametrize(("actors", "through_driver"), [(1, True), (2, True), (3, False), (4, True)])
def test_equal_to_lloyd_in_one_process(
    ray_session: None, tmp_path: Path, actors: int, through_driver: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not through_driver:
        monkeypatch.setattr(actor_pool, "_SMALL_BYTES", 0)
    settings = config(actors=actors)
    done = fit(write(tmp_path / "f", X), settings, str(tmp_path / "out"))
    objectives, centroids_kd = reference(X, starting(settings, X), settings, 5)
    np.testing.assert_allclose(curve(done.summary()), objectives, rtol=1e-5)
    np.testing.assert_allclose(done.centroids(), centroids_kd, rtol=1e-4, atol=1e-5)
    distances = np.linalg.norm(X[:, None].astype(np.float64) - centroids_kd[None], axis=2)
    found = table(done)
    assert found.column("index").to_pylist() == list(range(301))
    assert found.column("cluster").to_pylist() == distances.argmin(axis=1).tolist()
    np.testing.assert_allclose(found.column("distance").to_numpy(), distances.min(axis=1), rtol=1e-3)
    np.testing.assert_allclose(
        done.summary()["objective_value"], (distances.min(axis=1) ** 2).sum(), rtol=1e-5
    )
    assert found.schema.metadata[b"K"] == b"12"


@pytest.mark.ray
def test_spherical_float16_from_disk(
    ray_session: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows_nd = X.astype(np.float16)
    settings = config(spherical=True, memory_gb=1e-9)
    with caplog.at_level(logging.INFO, "raysl.clustering"):
        done = fit(write(tmp_path / "f", rows_nd), settings, str(tmp_path / "out"))
    start_kd = starting(settings, rows_nd).astype(np.float32)
    start_kd /= np.linalg.norm(start_kd, axis=1, keepdims=True)
    objectives, _ = reference(rows_nd.astype(np.float32), start_kd, settings, 5)
    np.testing.assert_allclose(curve(done.summary()), objectives, rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(done.centroids(), axis=1), 1, rtol=1e-5)
    assert "read from disk in every pass" in caplog.text
    assert "1 threads" not in caplog.text


@pytest.mark.ray
def test_empty_clusters_are_split_and_counted(ray_session: None, tmp_path: Path) -> None:
    rows_nd = np.repeat(blobs(30), 6, axis=0)
    settings = config(k=20, iterations=6)
    done = fit(write(tmp_path / "f", rows_nd), settings, str(tmp_path / "out"))
    empty = [entry["empty"] for entry in done.summary()["curves"][0]]
    assert empty[0] > 0
    assert empty[-1] < empty[0]
    objectives, _ = reference(rows_nd, starting(settings, rows_nd), settings, len(empty))
    np.testing.assert_allclose(curve(done.summary()), objectives, rtol=1e-4)


@pytest.mark.ray
def test_as_many_clusters_as_rows(ray_session: None, tmp_path: Path) -> None:
    done = fit(write(tmp_path / "f", blobs(40)), config(k=40), str(tmp_path / "out"))
    assert sorted(table(done).column("cluster").to_pylist()) == list(range(40))


@pytest.mark.ray
def test_a_killed_actor_is_restarted(
    usual: Clustering, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    start_pass, passes = ActorPool.start_pass, []

    def kill_before_the_third(pool: ActorPool, *arguments: Any) -> Any:
        passes.append(0)
        if len(passes) == 3:
            os.kill(ray.get(pool._actors[0].__ray_call__.remote(lambda worker: os.getpid())), signal.SIGKILL)
        return start_pass(pool, *arguments)

    monkeypatch.setattr(ActorPool, "start_pass", kill_before_the_third)
    done = fit(write(tmp_path / "f", X), config(), str(tmp_path / "out"))
    assert len(passes) == 5
    assert curve(done.summary()) == curve(usual.summary())
    np.testing.assert_array_equal(done.centroids(), usual.centroids())


@pytest.mark.ray
def test_a_lost_pool_is_replaced_and_a_stopped_driver_resumes(
    usual: Clustering, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    progress, passes = lloyd._progress, 0

    def lose_the_pool(*arguments: Any) -> str:
        nonlocal passes
        passes += 1
        if passes == 2:
            raise ray.exceptions.RayActorError
        if passes == 3:
            raise KeyboardInterrupt
        return progress(*arguments)

    monkeypatch.setattr(lloyd, "_progress", lose_the_pool)
    monkeypatch.setattr(lloyd, "_SAVE_EVERY_S", 0.0)
    features, out = write(tmp_path / "f", X), str(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        fit(features, config(), out)
    done = fit(features, config(actors=3), out)
    assert passes == 5
    np.testing.assert_allclose(curve(done.summary()), curve(usual.summary()), rtol=1e-9)
    np.testing.assert_allclose(done.centroids(), usual.centroids(), rtol=1e-6)
    fit(features, config(), out)
    assert passes == 5
    assert not State.load(done.folder).curves[0]
    with pytest.raises(UserError, match=r"Another clustering .* these differ: seed"):
        fit(features, config(seed=1), out)


@pytest.mark.ray
def test_kmeans_plus_plus_starts_better_than_random_rows(usual: Clustering, tmp_path: Path) -> None:
    rows_nd = blobs(400, centers=12, seed=5)
    found = {}
    for actors in (1, 2):
        settings = config(init="k-means++", actors=actors, iterations=2, restarts=2)
        found[actors] = fit(write(tmp_path / "f", rows_nd), settings, str(tmp_path / f"{actors}")).summary()
    np.testing.assert_allclose(curve(found[1]), curve(found[2]), rtol=1e-6)
    starts = [curve(found[1], start)[0] for start in (0, 1)]
    assert starts[0] != starts[1]
    best = found[1]["restart"]
    assert curve(found[1], best)[-1] == min(curve(found[1], start)[-1] for start in (0, 1))
    random = fit(write(tmp_path / "f", rows_nd), config(iterations=1, actors=1), str(tmp_path / "rows"))
    assert min(starts) < curve(random.summary())[0]


@pytest.mark.ray
def test_max_rows_limits_the_fit_and_all_rows_are_assigned(
    usual: Clustering, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "raysl.clustering"):
        done = fit(write(tmp_path / "f", X), config(max_rows=100), str(tmp_path / "out"))
    assert "fitted to 100 of 301 rows" in caplog.text
    assert (done.summary()["fitted_rows"], done.summary()["rows"]) == (100, 301)
    assert table(done).num_rows == 301


@pytest.mark.ray
def test_other_rows_are_assigned_to_the_same_centroids(usual: Clustering, tmp_path: Path) -> None:
    others = blobs(77, seed=9)
    place = assign(usual, write(tmp_path / "v", others), str(tmp_path / "v.parquet"), config())
    distances = np.linalg.norm(others[:, None] - usual.centroids()[None], axis=2)
    assert pq.read_table(place).column("cluster").to_pylist() == distances.argmin(axis=1).tolist()
    with pytest.raises(UserError, match="rows of 4 numbers"):
        assign(usual, write(tmp_path / "w", others[:, :4]), str(tmp_path / "w.parquet"), config())


@pytest.mark.ray
def test_labels_are_compared_and_paths_come_along(ray_session: None, tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data", 60)
    labels_n = dataset.read(np.arange(60), ("label",)).column("label").to_numpy()
    rows_nd = np.eye(4, dtype=np.float32)[labels_n] + blobs(60, dim=4) * np.float32(1e-3)
    folder = Folder(str(tmp_path / "f"))
    paths = [f"{i}.jpg" for i in range(60)]
    for first, end in ((0, 25), (25, 60)):
        write_part(
            folder, (first, end), "res5", rows_nd[first:end], FeatureForm(), pa.array(paths[first:end])
        )
    origin = {"data": str(dataset.folder), "fingerprint": dataset.manifest.fingerprint, "teacher": "T"}
    write_record(folder, FINISHED, origin)
    done = fit(str(folder), config(k=4, init="k-means++", actors=3))
    assert done.summary()["labels"] == pytest.approx({"nmi": 1, "purity": 1})
    metadata = table(done).schema.metadata
    assert (metadata[b"teacher"], metadata[b"fingerprint"]) == (b"T", dataset.manifest.fingerprint.encode())
    frame = table(done).to_pandas()
    assert frame["path"].tolist() == paths
    assert frame.columns.tolist() == ["index", "path", "cluster", "distance"]


@pytest.mark.ray
def test_bad_rows_are_refused(ray_session: None, tmp_path: Path) -> None:
    rows_nd = X.copy()
    rows_nd[200, 3] = np.nan
    with pytest.raises(UserError, match="index 200"):
        fit(write(tmp_path / "f", rows_nd), config(), str(tmp_path / "out"))
    write(tmp_path / "twice", X, files=1)
    write(tmp_path / "twice" / "more", X[:9], files=1)
    os.rename(tmp_path / "twice" / "more" / "000.parquet", tmp_path / "twice" / "001.parquet")
    with pytest.raises(UserError, match="index 0 more than once"):
        fit(str(tmp_path / "twice"), config(), str(tmp_path / "out2"))


@pytest.mark.ray
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("summary.json", lambda done, _: done.summary()),
        ("centroids.npy", lambda done, _: done.centroids()),
        ("state.npz", lambda done, _: State.load(done.folder)),
        ("assignments.parquet", lambda done, _: labels(done)),
        ("clustering.json", lambda done, features: fit(features, config(), str(done.folder))),
    ],
)
def test_damaged_files_are_named(usual: Clustering, tmp_path: Path, name: str, read: Any) -> None:
    features = str(Path(usual.folder.uri).parent / "f")
    folder = Folder(str(tmp_path / "out"))
    for file in usual.folder.list():
        folder.write(file, usual.folder.read(file))
    State(0, X[:12], [[{"objective": 1.0}]]).save(folder)
    done, good = Clustering(folder), folder.read(name)
    damaged = [b"", good[: len(good) // 2], b"garbage", b"[]", b'{"a": 1}']
    generator = np.random.default_rng(0)
    for bit in generator.integers(0, 8 * len(good), 25).tolist():
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(flipped))
    folder.write(name, good)
    expected = shown(read(done, features))
    for data in damaged:
        folder.write(name, data)
        with contextlib.suppress(UserError):
            assert shown(read(done, features)) == expected
    for data in damaged[:3]:
        folder.write(name, data)
        with pytest.raises(UserError, match=rf"{name}'? .*(is damaged|cannot be read)|{name} is damaged"):
            read(done, features)


def labels(done: Clustering) -> list[Any]:
    """Return what the objective ClusterFit learns from."""
    read = Assignments.read(done.assignments, len(X))
    return [read.clusters_n.tolist(), read.num_clusters, read.metadata]


def shown(value: Any) -> str:
    if isinstance(value, State):
        return f"{value.restart} {value.curves} {np.asarray(value.centroids_kd).tolist()}"
    return str(value.tolist() if isinstance(value, np.ndarray) else value)


def test_more_clusters_than_rows(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--k is 10, but there are 9 rows"):
        fit(write(tmp_path, blobs(9)), config(k=10))
    with pytest.raises(UserError, match="there are 5 rows"):
        fit(str(tmp_path), config(k=6, max_rows=5))


def test_a_sample_is_sorted_distinct_and_repeatable() -> None:
    chosen = sample(1000, 50, 7)
    assert len(np.unique(chosen)) == 50
    assert (np.diff(chosen) > 0).all()
    np.testing.assert_array_equal(chosen, sample(1000, 50, 7))


def test_actors_always_fit() -> None:
    two = allocate([{"CPU": 2, "memory": 8e9}])
    assert (two.actors, two.cpus, two.threads, two.memory_bytes) == (2, 0.5, 1, 2_000_000_000)
    assert allocate([{"CPU": 2}], actors=4).cpus == 0.25
    large = allocate([{"CPU": 16, "memory": 64e9}] * 3)
    assert (large.actors, large.threads, large.cpus) == (12, 4, 2)
    gpus = allocate([{"CPU": 8, "GPU": 2}, {"CPU": 4}])
    assert (gpus.actors, gpus.gpus) == (2, 1)
    with pytest.raises(UserError, match="at most 2"):
        allocate([{"CPU": 8, "GPU": 2}], actors=3)

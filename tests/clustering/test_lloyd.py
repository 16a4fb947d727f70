"""A clustering equals Lloyd's in one process, on any number of actors and through any interruption."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from raysl import rng
from raysl.clustering import lloyd as kmeans
from raysl.clustering.actor_pool import Crew
from raysl.clustering.lloyd import Clustering, assign, fit
from raysl.clustering.options import KMeansConfig
from raysl.clustering.state import State
from raysl.errors import UserError
from tests.clustering.blobs import blobs, curve, lloyd, write
from tests.data import make_dataset

pytestmark = pytest.mark.ray
X = blobs(301)


def config(**changes: Any) -> KMeansConfig:
    return KMeansConfig(**{"k": 12, "iterations": 5, "tolerance": 0, "actors": 2, **changes})


def quiet(line: str) -> None:
    """Takes a line of progress."""


def starting(settings: KMeansConfig, rows_nd: Any) -> Any:
    """The rows that the init "rows" takes."""
    generator = rng.generator(settings.seed, "kmeans", "rows", 0)
    return rows_nd[generator.choice(len(rows_nd), settings.k, replace=False)]


def table(clustering: Clustering) -> Any:
    return pq.read_table(clustering.assignments)


@pytest.fixture(scope="module")
def usual(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Clustering:
    """What an undisturbed clustering of X gives on two actors."""
    folder = tmp_path_factory.mktemp("usual")
    return fit(write(folder / "f", X), config(), str(folder / "out"), quiet)


@pytest.mark.parametrize("actors", [1, 2, 3, 4])
def test_equal_to_lloyd_in_one_process(ray_session: None, tmp_path: Path, actors: int) -> None:
    settings = config(actors=actors)
    done = fit(write(tmp_path / "f", X), settings, str(tmp_path / "out"), quiet)
    objectives, centroids_kd = lloyd(X, starting(settings, X), settings, 5)
    np.testing.assert_allclose(curve(done.card()), objectives, rtol=1e-5)
    np.testing.assert_allclose(done.centroids(), centroids_kd, rtol=1e-4, atol=1e-5)
    distances = np.linalg.norm(X[:, None].astype(np.float64) - centroids_kd[None], axis=2)
    found = table(done)
    assert found.column("index").to_pylist() == list(range(301))
    assert found.column("cluster").to_pylist() == distances.argmin(axis=1).tolist()
    np.testing.assert_allclose(found.column("distance").to_numpy(), distances.min(axis=1), rtol=1e-3)
    np.testing.assert_allclose(done.card()["objective_value"], (distances.min(axis=1) ** 2).sum(), rtol=1e-5)
    assert found.schema.metadata[b"K"] == b"12"


def test_spherical_float16_from_disk(ray_session: None, tmp_path: Path) -> None:
    rows_nd = X.astype(np.float16)
    settings = config(spherical=True, memory_gb=1e-9)
    said: list[str] = []
    done = fit(write(tmp_path / "f", rows_nd), settings, str(tmp_path / "out"), said.append)
    start_kd = starting(settings, rows_nd).astype(np.float32)
    start_kd /= np.linalg.norm(start_kd, axis=1, keepdims=True)
    objectives, _ = lloyd(rows_nd.astype(np.float32), start_kd, settings, 5)
    np.testing.assert_allclose(curve(done.card()), objectives, rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(done.centroids(), axis=1), 1, rtol=1e-5)
    assert any("read from disk in every pass" in line for line in said)


def test_empty_clusters_are_split_and_counted(ray_session: None, tmp_path: Path) -> None:
    rows_nd = np.repeat(blobs(30), 6, axis=0)
    settings = config(k=20, iterations=6)
    done = fit(write(tmp_path / "f", rows_nd), settings, str(tmp_path / "out"), quiet)
    empty = [row["empty"] for row in done.card()["curves"][0]]
    assert empty[0] > 0
    assert empty[-1] < empty[0]
    objectives, _ = lloyd(rows_nd, starting(settings, rows_nd), settings, len(empty))
    np.testing.assert_allclose(curve(done.card()), objectives, rtol=1e-4)


def test_a_killed_actor_comes_back(
    usual: Clustering, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    kept, begin, killed = Crew._load, Crew.begin, []

    def load(crew: Crew) -> None:
        kept(crew)
        killed.append(0)

    def kill_before_the_third(crew: Crew, *arguments: Any) -> Any:
        killed[0] += 1
        if killed[0] == 3:
            os.kill(ray.get(crew._actors[0].__ray_call__.remote(lambda shard: os.getpid())), signal.SIGKILL)
        return begin(crew, *arguments)

    monkeypatch.setattr(Crew, "_load", load)
    monkeypatch.setattr(Crew, "begin", kill_before_the_third)
    done = fit(write(tmp_path / "f", X), config(), str(tmp_path / "out"), quiet)
    assert killed[0] == 5
    assert curve(done.card()) == curve(usual.card())
    np.testing.assert_array_equal(done.centroids(), usual.centroids())


def test_a_lost_crew_is_replaced_and_a_stopped_driver_goes_on(
    usual: Clustering, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    line, passes = kmeans._line, 0

    def lose_the_crew(*arguments: Any) -> str:
        nonlocal passes
        passes += 1
        if passes == 2:
            raise ray.exceptions.RayActorError
        if passes == 3:
            raise KeyboardInterrupt
        return line(*arguments)

    monkeypatch.setattr(kmeans, "_line", lose_the_crew)
    monkeypatch.setattr(kmeans, "_SAVE_EVERY_S", 0.0)
    features, out = write(tmp_path / "f", X), str(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        fit(features, config(), out, quiet)
    done = fit(features, config(actors=3), out, quiet)
    assert passes == 5
    np.testing.assert_allclose(curve(done.card()), curve(usual.card()), rtol=1e-9)
    np.testing.assert_allclose(done.centroids(), usual.centroids(), rtol=1e-6)
    fit(features, config(), out, quiet)
    assert passes == 5
    assert not State.load(done.folder).curves[0]
    with pytest.raises(UserError, match="Another clustering"):
        fit(features, config(seed=1), out, quiet)


@pytest.mark.parametrize("init", ["k-means++", "k-means||"])
def test_starts_that_spread_are_better(usual: Clustering, tmp_path: Path, init: str) -> None:
    rows_nd = blobs(400, centres=12, seed=5)
    found = {}
    for actors in (1, 2):
        settings = config(init=init, actors=actors, iterations=2, restarts=2)
        out = fit(write(tmp_path / "f", rows_nd), settings, str(tmp_path / f"{actors}"), quiet)
        found[actors] = out.card()
    np.testing.assert_allclose(curve(found[1]), curve(found[2]), rtol=1e-6)
    starts = [curve(found[1], start)[0] for start in (0, 1)]
    assert starts[0] != starts[1]
    best = found[1]["restart"]
    assert curve(found[1], best)[-1] == min(curve(found[1], start)[-1] for start in (0, 1))
    plain = config(iterations=1, actors=1)
    random = fit(write(tmp_path / "f", rows_nd), plain, str(tmp_path / "rows"), quiet)
    assert min(starts) < curve(random.card())[0]


def test_a_cap_on_rows_is_reported_and_every_row_is_assigned(usual: Clustering, tmp_path: Path) -> None:
    said: list[str] = []
    done = fit(write(tmp_path / "f", X), config(max_rows=100), str(tmp_path / "out"), said.append)
    assert any("fitted to 100 of 301 rows" in line for line in said)
    assert (done.card()["fitted_rows"], done.card()["rows"]) == (100, 301)
    assert table(done).num_rows == 301


def test_other_rows_get_the_nearest_of_the_same_centroids(usual: Clustering, tmp_path: Path) -> None:
    others = blobs(77, seed=9)
    place = assign(usual, write(tmp_path / "v", others), str(tmp_path / "v.parquet"), config(), quiet)
    distances = np.linalg.norm(others[:, None] - usual.centroids()[None], axis=2)
    assert pq.read_table(place).column("cluster").to_pylist() == distances.argmin(axis=1).tolist()
    with pytest.raises(UserError, match="rows of 4 numbers"):
        assign(usual, write(tmp_path / "w", others[:, :4]), str(tmp_path / "w.parquet"), config(), quiet)


def test_labels_of_the_data_set_are_compared(ray_session: None, tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data", 60)
    labels_n = dataset.read(np.arange(60), ("label",)).column("label").to_numpy()
    features = write(tmp_path / "f", np.eye(4, dtype=np.float32)[labels_n] + blobs(60, dim=4) * 1e-3)
    facts = {"data": str(dataset.folder), "fingerprint": dataset.manifest.fingerprint, "teacher": "T"}
    (tmp_path / "f" / "features.json").write_text(json.dumps(facts))
    done = fit(features, config(k=4, init="k-means++"), "", quiet)
    assert done.card()["labels"] == pytest.approx({"nmi": 1, "purity": 1})
    named = table(done).schema.metadata
    assert (named[b"teacher"], named[b"fingerprint"]) == (b"T", dataset.manifest.fingerprint.encode())


def test_rows_that_are_no_numbers(ray_session: None, tmp_path: Path) -> None:
    rows_nd = X.copy()
    rows_nd[200, 3] = np.nan
    with pytest.raises(UserError, match="index 200"):
        fit(write(tmp_path / "f", rows_nd), config(), str(tmp_path / "out"), quiet)

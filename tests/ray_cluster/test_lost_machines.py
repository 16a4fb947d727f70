"""A machine dies during training, or during k-means, and another comes: the result is the same.

In processes of their own, whose Ray has several machines.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysl.checkpoint import SaveConfig
from raysl.clustering.lloyd import Clustering
from raysl.clustering.options import KMeansConfig
from raysl.config import Pretraining, ViewConfig
from raysl.contrastive.bank import BankConfig
from raysl.objectives.pirl import Config as Pirl
from raysl.run import Run
from tests.clustering.blobs import blobs, curve, write
from tests.data import make_dataset
from tests.training.test_launch import Listener

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]
KMEANS = KMeansConfig(k=12, iterations=6, tolerance=0, actors=2)
# Columns of metrics that do not depend on time or on interruptions.
NUMBERS = ("step", "loss", "lr")


def alone(scenario: str, folder: Path) -> str:
    """Plays a scene; what it printed."""
    command = [sys.executable, "-m", "tests.ray_cluster.test_lost_machines", scenario, str(folder)]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout


def test_training_ends_with_the_same_numbers(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", 96, side=48)
    assert "Resumed from step" in alone("training", tmp_path)
    disturbed, usual = (Run.open(str(tmp_path / name)) for name in ("disturbed", "usual"))
    rows, expected = ([[row[n] for n in NUMBERS] for row in run.metrics()] for run in (disturbed, usual))
    assert rows == expected
    assert [session["workers"] for session in disturbed.metadata()["sessions"]] == [2]


def test_kmeans_ends_with_the_same_clusters(tmp_path: Path) -> None:
    write(tmp_path / "features", blobs(301))
    alone("kmeans", tmp_path)
    disturbed, usual = (Clustering.open(str(tmp_path / name)) for name in ("disturbed", "usual"))
    assert curve(disturbed.summary()) == curve(usual.summary())
    np.testing.assert_array_equal(disturbed.centroids(), usual.centroids())


def training(folder: Path, lose: Callable[[], None]) -> None:
    """Trains twice on two machines, of which the first time one dies."""
    room: Any = importlib.import_module("raysl.training.launch")
    room.SHOW_EVERY_S = 0.5
    config = Pretraining(
        data=str(folder / "set"),
        run=str(folder / "disturbed"),
        epochs=30,
        batch_size=24,
        workers=2,
        log_every=1,
        view=ViewConfig(image_size=48, recipe="plain"),
        bank=BankConfig(placement="sharded"),
        save=SaveConfig(every_steps=10),
        parts={"pirl": Pirl(num_negatives=32, dim=16)},
    )

    def say(line: str) -> None:
        print(line, flush=True)
        if line.startswith("step"):
            lose()

    Listener(say).__enter__()
    room.pretrain(config)
    room.pretrain(replace(config, run=str(folder / "usual")))


def kmeans(folder: Path, lose: Callable[[], None]) -> None:
    """Clusters twice on two machines, of which the first time one dies between two passes."""
    from raysl.clustering.lloyd import fit

    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)
        if len(lines) == 5:
            lose()

    Listener(say).__enter__()
    fit(str(folder / "features"), KMEANS, str(folder / "disturbed"))
    fit(str(folder / "features"), KMEANS, str(folder / "usual"))


def scene(work: Callable[[Path, Callable[[], None]], None], folder: Path) -> None:
    """Does the work on a head and two machines. The first time it asks to, one of them is killed and one added."""
    import ray
    from ray.cluster_utils import Cluster

    from raysl import ray_cluster as ray_cluster

    sizes: dict[str, Any] = {"object_store_memory": 100_000_000}
    machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **sizes})
    two = [machines.add_node(num_cpus=1, **sizes) for _ in range(2)]
    machines.wait_for_nodes()
    ray.init(address=machines.address, log_to_driver=False)
    ray_cluster.start()
    asked, done = threading.Event(), threading.Event()

    def lose() -> None:
        asked.set()
        done.wait()

    # Ray lets machines come and go from the main thread alone.
    worker = threading.Thread(target=work, args=(folder, lose))
    worker.start()
    asked.wait(300)
    # The one that has more to do: both trainers may be on it.
    free = ray._private.state.available_resources_per_node()
    doomed = min(two, key=lambda machine: free[machine.node_id].get("CPU", 0.0))
    machines.remove_node(doomed, allow_graceful=False)
    machines.add_node(num_cpus=1, **sizes)
    done.set()
    worker.join()
    ray.shutdown()
    machines.shutdown()


if __name__ == "__main__":
    scene({"training": training, "kmeans": kmeans}[sys.argv[1]], Path(sys.argv[2]))

"""A run takes the workers that there is room for; the rest of it does not notice."""

from __future__ import annotations

import importlib
import queue
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raysl.backbone.network import BackboneConfig
from raysl.checkpoint import SaveConfig
from raysl.config import Pretraining, ViewConfig
from raysl.contrastive.bank import BankConfig
from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.objectives.pirl import Config as Pirl
from raysl.optim import OptimConfig
from raysl.ray_cluster.placement import Machines
from raysl.run import Run
from raysl.stream.plan import Plan
from raysl.training import elastic
from raysl.training.elastic import Resizing
from tests.data import make_dataset
from tests.training.test_launch import Listener

CPUS = Machines(({"CPU": 0.0}, {"CPU": 2.0}, {"CPU": 1.5}))
GPUS = Machines(({"CPU": 8.0}, {"CPU": 8.0, "GPU": 2.0}, {"CPU": 4.0, "GPU": 1.0}))
GROWING = Machines(({"CPU": 4.0},), later=({"CPU": 8.0, "GPU": 1.0},) * 4, max_new_machines=4)


def cpus(number: float) -> Machines:
    return Machines(({"CPU": number},))


@pytest.mark.parametrize(
    ("found", "gpus", "expected"), [(CPUS, False, 2), (GPUS, True, 2), (GPUS, False, 8), (CPUS, True, 0)]
)
def test_as_many_as_fit_and_divide_the_batch(found: Machines, gpus: bool, expected: int) -> None:
    """Three would fit the first two, and do not divide a batch of 8."""
    assert elastic.largest_count((1, 2, 4, 8), found, gpus) == expected


def test_a_group_is_placed_on_what_there_is() -> None:
    group = elastic.largest_group((1, 2, 4), GPUS)
    assert (group.workers, group.gpus) == (2, True)
    assert elastic.largest_group((1, 2, 3), CPUS).workers == 3


def test_the_fewest_may_share_a_cpu_or_wait_for_machines() -> None:
    assert elastic.largest_group((4, 8), CPUS).workers == 4
    group = elastic.largest_group((2, 4), GROWING)
    assert (group.workers, group.gpus) == (2, True)


def test_what_began_on_gpus_does_not_go_on_without() -> None:
    with pytest.raises(UserError, match="GPUs"):
        elastic.largest_group((1, 2), CPUS, gpus=True)


def test_a_run_is_resized_once_the_room_has_lasted() -> None:
    now = [0.0]
    resizing = Resizing((1, 2, 4), elastic.largest_group((2,), cpus(2)), clock=lambda: now[0])
    assert not resizing.due(cpus(3))
    assert not resizing.due(cpus(4))
    now[0] = 20
    assert not resizing.due(cpus(3))
    assert not resizing.due(cpus(4))
    now[0] = 20 + elastic.RESIZE_AFTER_S
    assert resizing.due(cpus(4))
    assert resizing.due(cpus(1))
    assert not resizing.due(cpus(2))


BATCH = 24
SAVE_STEPS = 20
DRAIN_S = 30.0


def configuration(dataset: str, run: Path) -> Pretraining:
    return Pretraining(
        data=dataset,
        run=str(run),
        epochs=80,
        batch_size=BATCH,
        workers="1:3",
        log_every=1,
        view=ViewConfig(image_size=48, recipe="plain"),
        backbone=BackboneConfig(norm="group"),
        optim=OptimConfig(lr=0.001),
        bank=BankConfig(placement="sharded"),
        save=SaveConfig(every_steps=SAVE_STEPS),
        parts={"pirl": Pirl(num_negatives=32, dim=16)},
    )


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_two_workers_three_one(tmp_path: Path) -> None:
    """A machine comes, and then one dies while another is drained. It is the run of one worker all the same, whose only
    machine was drained on the way. In a process of its own, whose Ray has several machines."""
    dataset = make_dataset(tmp_path / "set", 96, side=48)
    subprocess.run([sys.executable, "-m", "tests.training.test_elastic", str(tmp_path)], check=True)
    run, fixed = Run.open(str(tmp_path / "elastic")), Run.open(str(tmp_path / "fixed"))
    rows, fixed_rows = run.metrics(), fixed.metrics()
    assert [row["step"] for row in rows] == list(range(1, 321))
    sizes = [row["workers"] for row in rows]
    attempts = [now for before, now in zip([0, *sizes], sizes, strict=False) if now != before]
    # Until Ray sees that a machine has died, there may seem to be room for two.
    assert attempts in ([2, 3, 1], [2, 3, 2, 1])
    # A machine that comes, or goes with notice, costs no step; one that dies, fewer than lie between two checkpoints.
    assert all(row["workers"] == attempts[2] for row in rows if row.get("lost_steps"))
    assert sum(row.get("lost_steps", 0) for row in rows) <= SAVE_STEPS
    assert not any(row.get("lost_steps") for row in fixed_rows)
    assert_each_index_once_in_each_epoch(dataset, run, sizes)
    # Sums are added in another order on another number of workers, and 320 steps carry that on.
    np.testing.assert_allclose([r["loss"] for r in rows], [r["loss"] for r in fixed_rows], rtol=5e-3)
    torch.testing.assert_close(bank(run), bank(fixed), rtol=0, atol=1e-2)


def assert_each_index_once_in_each_epoch(dataset: DataSet, run: Run, sizes: list[int]) -> None:
    config = run.config()
    plan = Plan.of(dataset, config.batch_size, config.seed, config.epochs)
    seen = [
        np.concatenate([plan.rows(step, rank, world).indices_b for rank in range(world)])
        for step, world in enumerate(sizes)
    ]
    epochs = np.sort(np.concatenate(seen).reshape(-1, dataset.num_images), axis=1)
    assert (epochs == np.arange(dataset.num_images)).all()


def bank(run: Run) -> torch.Tensor:
    """All rows of the memory bank, from the parts of all workers."""
    parts = sorted(run.newest().load()[1], key=lambda part: int(part["first"]))
    return torch.cat([part["rows_nd"] for part in parts])


def scenario(folder: Path) -> None:
    """Trains twice: on machines that come and go, and on one."""
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.cluster_utils import Cluster

    from raysl import ray_cluster as ray_cluster
    from raysl.training import elastic as elastic_room

    pretrain_room: Any = importlib.import_module("raysl.training.launch")
    elastic_room.RESIZE_AFTER_S = 0.5
    pretrain_room.SHOW_EVERY_S = 0.5
    pretrain_room.STOP_WITHIN_S = 30.0
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100_000_000}
    )

    def machine() -> Any:
        return cluster.add_node(num_cpus=1, object_store_memory=100_000_000)

    def train(config: Pretraining) -> threading.Thread:
        # Machines are started and stopped in the main thread only.
        thread = threading.Thread(target=pretrain_room.pretrain, args=(config,))
        thread.start()
        return thread

    def hear(start: str) -> str:
        while True:
            line = lines.get(timeout=300)
            print(f"{time.monotonic():9.1f} {line}", flush=True)
            if line.startswith(start):
                return line

    def hear_step() -> int:
        return int(hear("step").split()[1].partition("/")[0])

    def of_trainers() -> list[Any]:
        """The machines on which trainers are."""
        actors = ray._private.state.actors().values()
        ids = {
            a["Address"]["NodeID"]
            for a in actors
            if a["ActorClassName"] == "RayTrainWorker" and a["State"] == "ALIVE"
        }
        return [node for node in cluster.list_all_nodes() if node.node_id in ids]

    def drain(node: Any) -> None:
        preemption, deadline_ms = 2, int((time.time() + DRAIN_S) * 1000)
        client = GcsClient(address=cluster.address)
        assert client.drain_node(node.node_id, preemption, "a notice", deadline_ms)[0]

    machine(), machine()
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    ray_cluster.start()
    lines: queue.Queue[str] = queue.Queue()
    Listener(lines.put).__enter__()
    config = configuration(str(folder / "set"), folder / "elastic")
    elastic_run = train(config)
    hear("step")
    machine()
    hear("Continues with 3 workers")
    # As far as a checkpoint: what goes back to one before leaves no row of three workers.
    saved = hear_step() + SAVE_STEPS
    while hear_step() < saved:
        pass
    one, another = of_trainers()
    drain(one)
    cluster.remove_node(another, allow_graceful=False)
    hear("Continues with 1 worker ")
    elastic_run.join()
    lines.queue.clear()
    machine()
    fixed_run = train(replace(config, run=str(folder / "fixed"), workers=1))
    hear("step")
    drain(of_trainers()[0])
    hear("Resumed from")
    fixed_run.join()
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    scenario(Path(sys.argv[1]))

"""Pipelines of a long stream follow each other without a gap, and their tasks run on the machine of the trainer."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from raysl.augment import recipe
from raysl.dataset import DataSet
from raysl.pretext import Geometry, build
from raysl.stream import data_tasks
from raysl.stream.plan import Plan
from raysl.stream.reader import Columns, DataShare, Stream
from raysl.stream.views import View
from tests.data import make_dataset


def stream(dataset: DataSet, epochs: float, share: DataShare) -> Stream:
    plan = replace(Plan.of(dataset, 16, seed=3, epochs=epochs), groups_per_window=2, steps_per_block=1)
    views = {"image": View(build("identity", {}, Geometry(image_size=32)), recipe("plain"))}
    return Stream(dataset, plan, views, share=share)


def test_the_next_pipeline_starts_before_the_last_one_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: set[int] = set()  # first steps of the pipelines
    changed = threading.Condition()

    class Counting:
        """A pipeline that only counts, and notes that it started."""

        def __init__(self, _: Stream, start: int, end: int) -> None:
            self.steps = range(start, end)
            with changed:
                starts.add(start)
                changed.notify_all()

        def iter_batches(self, **_: Any) -> Iterator[dict[str, NDArray[np.int64]]]:
            return ({"index": np.full((1, 16), step)} for step in self.steps)

    monkeypatch.setattr(data_tasks, "pipeline", Counting)
    dataset = make_dataset(tmp_path / "set", 64)
    # Two pipelines and a piece of a third one.
    one = stream(dataset, (2 * data_tasks.TASKS_PER_EXECUTION + 40) * 16 / 64, DataShare(1.0, 3.0))
    steps = []
    for columns in one.columns(0, one.plan.num_steps):
        step = int(columns["index"][0])
        steps.append(step)
        following = step - step % data_tasks.TASKS_PER_EXECUTION + data_tasks.TASKS_PER_EXECUTION
        if following - step == data_tasks.TASKS_PER_EXECUTION // 2:
            assert following not in starts
        # Three tasks of a step each run at a time, so there is time for the next pipeline to start.
        if following - step == 3 and following < one.plan.num_steps:
            with changed:
                assert changed.wait_for(lambda: following in starts, 60)  # noqa: B023
    assert steps == list(range(one.plan.num_steps))
    assert starts == {0, data_tasks.TASKS_PER_EXECUTION, 2 * data_tasks.TASKS_PER_EXECUTION}


def test_a_process_unpickles_a_stream_once(tmp_path: Path) -> None:
    load = data_tasks.MakeBatches(stream(make_dataset(tmp_path / "set", 64), 1, DataShare()), 0, 4)
    sent = pickle.dumps(load)
    first, second = pickle.loads(sent), pickle.loads(sent)
    assert first.stream is second.stream
    assert (first.start, first.end, first.stream.plan.seed) == (0, 4, load.stream.plan.seed)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(300)
def test_data_tasks_run_on_the_machine_of_their_trainer(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", 64)
    command = [sys.executable, "-m", "tests.stream.test_pipelines", str(tmp_path / "set")]
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
    assert done.stdout.split() == ["own=12", "other=0", "full:own=0", "full:other=12", "head:other=12"]


def scene(uri: str) -> None:
    """Stream on a machine with room, on a full one, and on a head that takes no work; print where the tasks ran."""
    import ray
    from ray.cluster_utils import Cluster
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from raysl import ray_cluster

    sizes: dict[str, Any] = {"object_store_memory": 100_000_000}
    machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **sizes})
    nodes = [machines.add_node(num_cpus=2, **sizes) for _ in range(2)]
    machines.wait_for_nodes()
    ray.init(address=machines.address, log_to_driver=False)
    ray_cluster.start()
    home = nodes[0].node_id

    def places() -> list[str]:
        class Where(data_tasks.MakeBatches):
            def __call__(self, task: Columns) -> Iterator[Columns]:
                for columns in super().__call__(task):
                    node = ray.get_runtime_context().get_node_id()
                    columns["index"] = np.array([[node]])
                    yield columns

        data_tasks.MakeBatches = Where  # type: ignore[misc]
        one = stream(DataSet.open(uri), 3, DataShare(1.0, 2.0))
        return [str(columns["index"][0]) for columns in one.columns(0, one.plan.num_steps)]

    there = NodeAffinitySchedulingStrategy(home, soft=False)
    trainer = ray.remote(num_cpus=0, scheduling_strategy=there)(places)
    found = ray.get(trainer.remote())
    print(f"own={found.count(home)} other={len(found) - found.count(home)}")

    class Hog:
        def ready(self) -> None: ...

    hog = ray.remote(num_cpus=2, scheduling_strategy=there)(Hog).remote()
    ray.get(hog.ready.remote())
    found = ray.get(trainer.remote())
    print(f"full:own={found.count(home)} full:other={len(found) - found.count(home)}")
    found = places()
    print(f"head:other={len(found) - found.count(ray.get_runtime_context().get_node_id())}")
    ray.shutdown()
    machines.shutdown()


if __name__ == "__main__":
    scene(sys.argv[1])

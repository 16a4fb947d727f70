"""Schedulers and searchers of Ray Tune decide the same whatever is faster, and after any interruption."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray.tune")

from ray import tune

from tests.tuning.toy import TRIALS, Notes, drive, play

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]

COMBINATIONS = [
    ("asha", "optuna"),
    ("pbt", "random"),
    ("asha", "random"),
    ("median", "random"),
    ("none", "grid"),
    ("hyperband", "random"),
]


def undisturbed(folder: Path, scheduler: str, searcher: str) -> Notes:
    """Run one trial at a time, and check that the scheduler did its work."""
    folder.mkdir()
    if searcher == "optuna":
        pytest.importorskip("optuna")
    alone = play(folder, scheduler, searcher, 1, "none", Notes())
    if searcher != "optuna":
        assert [trial for trial, _ in alone.of("failed")] == [3]
        # A trial whose process was killed continues.
        assert (folder / "steps-died").exists()
        assert (1, 1) in alone.of("score")
    assert sum(rung == 0 for _, rung in alone.of("trial")) == TRIALS
    if scheduler in ("asha", "hyperband"):
        assert len(alone.of("score")) < 3 * TRIALS - 2
    if scheduler == "pbt":
        assert any(row["copies"] is not None for row in alone.of("decision").values())
    return alone


@pytest.mark.parametrize(("scheduler", "searcher"), COMBINATIONS[:2])
def test_decisions_depend_on_results_only(
    scheduler: str, searcher: str, ray_session: None, tmp_path: Path
) -> None:
    alone = undisturbed(tmp_path / "alone", scheduler, searcher)
    folder = tmp_path / "killed"
    folder.mkdir()
    notes = Notes(kill_after=7)
    with pytest.raises(tune.TuneError, match="Killed"):
        play(folder, scheduler, searcher, 3, "odd", notes)
    assert play(folder, scheduler, searcher, 2, "first", notes).rows == alone.rows
    assert set((folder / "steps").read_text().splitlines()) == set(
        (tmp_path / "alone" / "steps").read_text().splitlines()
    )


def test_ctrl_c_in_a_notebook_kills_the_trials(ray_session: None, tmp_path: Path) -> None:
    import ray

    with pytest.raises(KeyboardInterrupt):
        play(tmp_path, "none", "random", 2, "none", Notes(kill_after=2, error=KeyboardInterrupt))
    deadline = time.monotonic() + 60
    while ray.available_resources()["CPU"] < ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, "trials still hold CPUs"
        time.sleep(0.2)


@pytest.fixture
def context() -> Any:
    """Drivers begin as copies of a process that has imported all modules, and join a Ray that outlives them."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(
        ["tests.tuning.toy", "raysl.tuning.algorithms", "raysl.tuning.ordered_searcher"]
    )
    return made


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A Ray whose head takes no trials, and two machines of this machine that do."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for _ in range(2):
            made.add_node(num_cpus=1)
        yield made
    finally:
        made.shutdown()


def driven(context: Any, cluster: Any, folder: Path, *settings: Any) -> Any:
    """Start a driver in a process of its own."""
    folder.mkdir(exist_ok=True)
    process = context.Process(target=drive, args=(cluster.address, folder, *settings))
    process.start()
    return process


def scored(folder: Path) -> int:
    return len(Notes(folder / "notes.jsonl").of("score"))


@pytest.mark.slow
@pytest.mark.parametrize(("scheduler", "searcher"), COMBINATIONS)
def test_ten_kills_of_the_driver_change_no_decision(
    scheduler: str, searcher: str, context: Any, cluster: Any, tmp_path: Path
) -> None:
    """The driver is killed with -9 at ten random moments, and goes on at another speed."""
    driven(context, cluster, tmp_path / "alone", scheduler, searcher, 1, "none").join()
    undisturbed = Notes(tmp_path / "alone" / "notes.jsonl")
    generator, moments = random.Random(f"{scheduler} {searcher}"), []
    for kill in range(11):
        speed = generator.choice([1, 2, 3]), generator.choice(["none", "odd", "first"])
        process = driven(context, cluster, tmp_path / "killed", scheduler, searcher, *speed)
        if kill == 10:
            process.join()
            assert process.exitcode == 0
            break
        # One or two new results, and a moment more: each driver comes a little farther.
        wanted, more = scored(tmp_path / "killed") + generator.randint(1, 2), 0.1 * generator.random()
        while scored(tmp_path / "killed") < wanted and process.is_alive():
            time.sleep(0.02)
        time.sleep(more)
        process.kill()
        process.join()
        moments.append(scored(tmp_path / "killed"))
    killed = Notes(tmp_path / "killed" / "notes.jsonl")
    row = {"scheduler": scheduler, "searcher": searcher, "kills": len(moments), "killed_after": moments}
    counts = {f"{event}s": len(killed.of(event)) for event in ("score", "decision")}
    print(json.dumps({**row, **counts, "equal": killed.rows == undisturbed.rows}), flush=True)
    assert sum(rung == 0 for _, rung in undisturbed.of("trial")) == TRIALS
    assert killed.rows == undisturbed.rows


@pytest.mark.slow
@pytest.mark.parametrize(("scheduler", "searcher"), [("asha", "optuna"), ("pbt", "random")])
def test_a_lost_machine_changes_no_decision(
    scheduler: str, searcher: str, context: Any, cluster: Any, tmp_path: Path
) -> None:
    driven(context, cluster, tmp_path / "alone", scheduler, searcher, 1, "none").join()
    process = driven(context, cluster, tmp_path / "lost", scheduler, searcher, 2, "odd")
    for wanted in (3, 7):
        while scored(tmp_path / "lost") < wanted and process.is_alive():
            time.sleep(0.02)
        assert process.is_alive()
        cluster.remove_node(cluster.list_all_nodes()[1], allow_graceful=False)
        cluster.add_node(num_cpus=1)
    process.join()
    assert process.exitcode == 0
    alone, lost = (Notes(tmp_path / name / "notes.jsonl").rows for name in ("alone", "lost"))
    assert lost == alone

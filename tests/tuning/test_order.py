"""Schedulers and searchers of Ray Tune decide the same whatever is faster, and after any interruption."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
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
        assert alone.failures == {3}
        # A trial whose process was killed continues.
        ((trial, reason),) = alone.retries
        assert (trial, (1, 2) in alone.scores) == (1, True)
        assert "ActorDied" in reason
    assert len(alone.values) == TRIALS
    if scheduler in ("asha", "hyperband"):
        assert len(alone.scores) < 3 * TRIALS - 2
    if scheduler == "pbt":
        assert any(copies is not None for _, copies, _ in alone.decisions.values())
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
    assert play(folder, scheduler, searcher, 2, "first", notes).outcome() == alone.outcome()
    assert set((folder / "steps").read_text().splitlines()) == set(
        (tmp_path / "alone" / "steps").read_text().splitlines()
    )


@pytest.mark.slow
def test_ten_kills_of_the_driver_change_no_decision(tmp_path: Path) -> None:
    """The driver is killed with -9 at ten random moments, and goes on at another speed."""
    from ray.cluster_utils import Cluster

    # Drivers begin as copies of a process that has imported all modules, and join a Ray that outlives them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.tuning.toy", "raysl.tuning.algorithms", "raysl.tuning.result_order"]
    )
    machine = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        for scheduler, searcher in COMBINATIONS:
            alone = tmp_path / f"{scheduler}-{searcher}-alone"
            alone.mkdir()
            process = context.Process(
                target=drive, args=(machine.address, alone, scheduler, searcher, 1, "none")
            )
            process.start()
            process.join()
            undisturbed = Notes(alone / "notes.jsonl").outcome()
            killed = tmp_path / f"{scheduler}-{searcher}-killed"
            killed.mkdir()
            moments = kill_ten_times(context, machine.address, killed, scheduler, searcher)
            outcome = Notes(killed / "notes.jsonl").outcome()
            equal = outcome == undisturbed
            row = {"scheduler": scheduler, "searcher": searcher, "killed_after": moments, "equal": equal}
            print(json.dumps({**row, "results": len(outcome[0]), "decisions": len(outcome[3])}), flush=True)
            assert len(undisturbed[1]) == TRIALS
            assert equal
    finally:
        machine.shutdown()


def kill_ten_times(context: Any, address: str, folder: Path, scheduler: str, searcher: str) -> list[int]:
    """Kill drivers of a sweep and let the eleventh finish. Return the number of results at each kill."""
    generator = random.Random(f"{scheduler} {searcher}")
    moments = []
    for kill in range(11):
        speed = generator.choice([1, 2, 3]), generator.choice(["none", "odd", "first"])
        process = context.Process(target=drive, args=(address, folder, scheduler, searcher, *speed))
        process.start()
        if kill == 10:
            process.join()
            assert process.exitcode == 0
            break
        # One or two new results, and a moment more: each driver comes a little farther.
        wanted = len(Notes(folder / "notes.jsonl").scores) + generator.randint(1, 2)
        more = 0.1 * generator.random()
        while len(Notes(folder / "notes.jsonl").scores) < wanted and process.is_alive():
            time.sleep(0.02)
        time.sleep(more)
        process.kill()
        process.join()
        moments.append(len(Notes(folder / "notes.jsonl").scores))
    return moments

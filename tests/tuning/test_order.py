"""Schedulers and searchers of Ray Tune decide the same whatever is faster, and after any interruption."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytest.importorskip("ray.tune")

from ray import tune

from tests.tuning.toy import TRIALS, Notes, play

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
@pytest.mark.parametrize(("scheduler", "searcher"), COMBINATIONS)
def test_ten_kills_of_the_driver_change_no_decision(
    scheduler: str, searcher: str, ray_session: None, tmp_path: Path
) -> None:
    """The driver is killed with -9 at ten random moments, and goes on at another speed."""
    alone = undisturbed(tmp_path / "alone", scheduler, searcher)
    folder = tmp_path / "killed"
    folder.mkdir()
    generator = random.Random(f"{scheduler} {searcher}")
    for kill in range(11):
        at_once, slow = generator.choice([1, 2, 3]), generator.choice(["none", "odd", "first"])
        command = [
            sys.executable,
            "-m",
            "tests.tuning.toy",
            str(folder),
            scheduler,
            searcher,
            str(at_once),
            slow,
        ]
        before = len(Notes(folder / "notes.jsonl").scores)
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        if kill == 10:
            assert process.wait() == 0
            break
        # One to three new results, and a moment more: each driver comes a little farther.
        wanted, more = before + generator.randint(1, 3), generator.random()
        while len(Notes(folder / "notes.jsonl").scores) < wanted and process.poll() is None:
            time.sleep(0.05)
        time.sleep(more)
        descendants = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        process.wait()
        psutil.wait_procs(descendants, timeout=60)
        print(
            kill,
            "killed with",
            len(Notes(folder / "notes.jsonl").scores),
            "results, status",
            process.returncode,
        )
    outcome = Notes(folder / "notes.jsonl").outcome()
    assert outcome == alone.outcome()
    print(scheduler, searcher, len(outcome[0]), "results", len(outcome[3]), "decisions: equal")

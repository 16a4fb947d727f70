"""A whole sweep through Ray: what fails is marked, what is killed goes on, and what cannot run is refused first."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from raysl.checkpoint import SaveConfig
from raysl.config import Pretraining, ViewConfig
from raysl.errors import UserError
from raysl.objectives.pirl import Config as Pirl
from raysl.ray_cluster import placement
from raysl.ray_cluster.placement import Machines
from raysl.storage import Folder
from raysl.tuning.config import SweepConfig
from raysl.tuning.driver import sweep
from raysl.tuning.journal import NAME, Journal
from raysl.tuning.setting import prepare
from tests.data import make_dataset

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

FLAGS = (
    "--epochs 2 --batch-size 16 --workers 1 --view.image-size 16 --view.recipe plain --save.every-steps 4 "
    "--pirl.num-negatives 32 --pirl.dim 16 --vary optim.lr=0.3,1e-6,2e-6 --scheduler asha --rungs 2 --reduction 2 "
    "--seeds 0 1 --max-concurrent 1"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("data")
    train, test = make_dataset(folder / "train", 96), make_dataset(folder / "test", 48, seed=1)
    return str(train.folder), str(test.folder)


def base(data: tuple[str, str], **changes: Any) -> Pretraining:
    settings: dict[str, Any] = {
        "epochs": 2,
        "batch_size": 16,
        "workers": 1,
        "view": ViewConfig(image_size=16, recipe="plain"),
        "save": SaveConfig(every_steps=4),
        "parts": {"pirl": Pirl(num_negatives=32, dim=16)},
    }
    return Pretraining(data[0], "-", **{**settings, **changes})


def config(data: tuple[str, str], out: Path, **changes: Any) -> SweepConfig:
    settings: dict[str, Any] = {
        "vary": ("optim.lr=0.03,1e30",),
        "scheduler": "asha",
        "rungs": 2,
        "reduction": 2,
        "seeds": (0,),
        "max_concurrent": 1,
    }
    return SweepConfig(out=str(out), test=data[1], **{**settings, **changes})


@pytest.fixture(scope="module")
def finished(
    ray_session: None, data: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Folder, list[dict[str, Any]]]:
    """A sweep that nothing disturbed, and its table."""
    out = tmp_path_factory.mktemp("sweeps") / "undisturbed"
    return Folder(str(out)), sweep(base(data), config(data, out))


def test_a_trial_that_turns_nan_is_marked_and_the_rest_goes_on(
    finished: tuple[Folder, list[dict[str, Any]]],
) -> None:
    folder, rows = finished
    assert rows == folder.read_json("table.json")
    by_trial = {row["trial"]: row for row in rows}
    assert by_trial[0]["state"] == "finished"
    assert by_trial[1]["state"] == "failed"
    assert "The loss is" in by_trial[1]["reason"]
    journal = Journal(folder)
    (score, *_) = journal.of("score")
    assert {"trial", "seed", "rung", "step", "score", "loss", "seconds", "cpus", "gpus"} <= score.keys()
    # Both rungs are on the one schedule of 12 steps.
    assert [row["step"] for row in journal.of("score") if row["trial"] == 0] == [6, 12]
    assert len(folder.list()) == len({"sweep.jsonl", "table.json", "tensorboard", "trials"})


def test_a_finished_sweep_is_not_run_again(
    finished: tuple[Folder, list[dict[str, Any]]], data: tuple[str, str]
) -> None:
    folder, rows = finished
    before = folder.read(NAME)
    assert sweep(base(data), config(data, Path(folder.uri))) == rows
    assert folder.read(NAME) == before


def test_another_sweep_in_the_same_folder_is_refused(
    finished: tuple[Folder, list[dict[str, Any]]], data: tuple[str, str]
) -> None:
    with pytest.raises(UserError, match=r"config\.rungs"):
        sweep(base(data), config(data, Path(finished[0].uri), rungs=3))
    with pytest.raises(UserError, match=r"base\.epochs"):
        sweep(base(data, epochs=3), config(data, Path(finished[0].uri)))


@pytest.mark.slow
def test_killed_driver(ray_session: None, data: tuple[str, str], tmp_path: Path) -> None:
    """Killed when one trial is stopped and another is not begun; the same command goes on to the same table."""
    settings: dict[str, Any] = {"vary": ("optim.lr=0.3,1e-6,2e-6",), "seeds": (0, 1)}
    undisturbed = sweep(base(data), config(data, tmp_path / "undisturbed", **settings))
    assert {row["trial"]: row["state"] for row in undisturbed} == {0: "finished", 1: "stopped", 2: "stopped"}
    out = tmp_path / "sweep"
    command = [
        sys.executable,
        "-m",
        "raysl",
        "sweep",
        "--data",
        data[0],
        "--test",
        data[1],
        "--out",
        str(out),
    ]
    command += FLAGS.split()
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 400
    while not (out / NAME).exists() or '"goes_on": false' not in (out / NAME).read_text():
        assert time.monotonic() < deadline
        with contextlib.suppress(subprocess.TimeoutExpired):
            pytest.fail(f"the driver ended, with {first.wait(0.2)}, before it could be killed")
    descendants = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    first.wait()
    psutil.wait_procs(descendants, timeout=60)
    before = (out / NAME).read_bytes()
    assert subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode == 0
    after = Journal(Folder(str(out)))
    assert (out / NAME).read_bytes().startswith(before)
    # The one was stopped before the kill and the other after it.
    stopped = [row["trial"] for row in after.of("decision") if not row["goes_on"]]
    assert (stopped, before.count(b'"goes_on": false')) == ([1, 2], 1)
    assert after.folder.read_json("table.json") == undisturbed


@pytest.mark.parametrize(
    ("vary", "answer"),
    [
        (
            "num_negatives=32,96",
            "num_negatives=96 could not run.*num_negatives is 96 and the data set has 96",
        ),
        ("jigsaw.grid=2,3", "jigsaw.grid=2 could not run.*with 4 tiles there are 24 permutations"),
        ("lambda=0.5,1.5", "lam=1.5 could not run"),
        ("batch_size=16,128", "batch_size=128 could not run"),
    ],
)
def test_a_value_that_fails_for_some_trials_is_found_before_any_begins(
    ray_session: None, data: tuple[str, str], tmp_path: Path, vary: str, answer: str
) -> None:
    parts = {"pirl": Pirl(num_negatives=32, dim=16), "jigsaw": {"num_permutations": 100}}
    with pytest.raises(UserError, match=answer):
        sweep(base(data, parts=parts), config(data, tmp_path / "sweep", vary=(vary,)))
    assert not (tmp_path / "sweep").exists()


def test_every_drawn_point_is_tried_out_before_any_begins(
    ray_session: None, data: tuple[str, str], tmp_path: Path
) -> None:
    wide = config(data, tmp_path, searcher="random", samples=64, vary=("num_negatives=8..500",))
    with pytest.raises(UserError, match="the data set has 96 images"):
        prepare(base(data), wide)


def test_more_than_fits_is_refused_with_the_sum(
    ray_session: None, data: tuple[str, str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"9 runs at a time with 1 workers each: 9 workers .* 2 CPUs"):
        prepare(base(data), config(data, tmp_path, max_concurrent=9))


def test_runs_at_a_time_follow_from_the_cluster(
    ray_session: None, data: tuple[str, str], tmp_path: Path
) -> None:
    vary = ("temperature",)
    one = prepare(base(data), config(data, tmp_path, max_concurrent=0, vary=vary))
    assert (one.at_once, one.placement.cpus_per_worker) == (1, 1)
    four = prepare(base(data), config(data, tmp_path, max_concurrent=4, vary=vary))
    total = 4 * (four.placement.cpus_per_worker + four.placement.share.cpus)
    assert total <= 2


def test_no_more_runs_at_a_time_than_there_are(
    monkeypatch: pytest.MonkeyPatch, ray_session: None, data: tuple[str, str], tmp_path: Path
) -> None:
    """On 16 CPUs, eight runs could have two each; two runs have eight."""
    monkeypatch.setattr("ray.nodes", lambda: [{"Resources": {"CPU": 16.0}, "Alive": True}])
    many = prepare(base(data), config(data, tmp_path, max_concurrent=0, vary=("temperature", "lambda")))
    two = prepare(base(data), config(data, tmp_path, max_concurrent=0, vary=("temperature=0.1,0.2",)))
    assert [(s.at_once, s.placement.cpus_per_worker) for s in (many, two)] == [(8, 1), (2, 6)]


def test_runs_at_a_time_follow_from_what_the_cluster_can_grow_to(
    monkeypatch: pytest.MonkeyPatch, ray_session: None, data: tuple[str, str], tmp_path: Path
) -> None:
    head, machine = {"CPU": 0.0}, {"CPU": 4.0}
    monkeypatch.setattr(placement, "machines", lambda: Machines((head,), (machine,) * 3, 3))
    grown = prepare(base(data), config(data, tmp_path, max_concurrent=0, vary=("temperature", "lambda")))
    assert (grown.at_once, grown.placement.cpus_per_worker) == (6, 1)


def test_pbt_changes_only_what_can_change_in_the_middle(data: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pirl\.num_negatives cannot change"):
        prepare(
            base(data),
            config(data, tmp_path, searcher="random", scheduler="pbt", vary=("num_negatives=8,16",)),
        )

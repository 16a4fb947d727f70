"""Test whole sweeps through Ray Tune: failures, interruptions, and refusals."""

from __future__ import annotations

import contextlib
import importlib
import json
import runpy
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray import tune

import raysl
from raysl.errors import UserError
from raysl.storage import Folder
from raysl.tuning.journal import NAME, Journal
from raysl.tuning.results import SweepResults
from raysl.tuning.sweep import sweep
from tests.data import make_dataset
from tests.tuning.small import base, config

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]

FLAGS = (
    "--epochs 2 --batch-size 16 --workers 1 --view.image-size 16 --view.recipe plain --save.every-steps 4 "
    "--pirl.num-negatives 32 --pirl.dim 16 --vary optim.lr=0.3,1e-6,2e-6 --scheduler asha --rungs 2 --reduction 2 "
    "--seeds 0 --max-concurrent 1"
)


@pytest.mark.slow
def test_a_sweep(
    ray_session: None, data: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A trial that turns NaN is marked, the others are not affected, and a finished sweep is not run again."""
    out, test = tmp_path / "sweep", str(make_dataset(tmp_path / "test", 48, seed=2).folder)
    with caplog.at_level("INFO", "raysl"):
        rows = sweep(base(data[0]), config(data, out, test=test))
    # Progress of the runs reaches the driver.
    assert any(message.startswith("trial 0: step") for message in caplog.messages)
    assert rows == Folder(str(out)).read_json("table.json")
    by_trial = {row["trial"]: row for row in rows}
    assert by_trial[0]["state"] == "finished"
    assert by_trial[1]["state"] == "failed"
    assert "The loss became" in by_trial[1]["reason"]
    record = SweepResults.open(str(out))
    # Both rungs are on the one schedule of 12 steps.
    assert [row["step"] for row in record.scores.values() if row["trial"] == 0] == [6, 12]
    assert record.extras("baseline").keys() == {"random", "pixels"}
    assert record.extras("test").keys() == {"trained", "random", "pixels"}
    before = (out / NAME).read_bytes()
    assert sweep(base(data[0]), config(data, out, test=test)) == rows
    assert (out / NAME).read_bytes() == before
    with pytest.raises(UserError, match=r"config\.rungs"):
        sweep(base(data[0]), config(data, out, rungs=3))
    with pytest.raises(UserError, match=r"base\.epochs"):
        sweep(base(data[0], epochs=3), config(data, out))


@pytest.mark.slow
def test_a_killed_driver(data: tuple[str, str], tmp_path: Path) -> None:
    """It is killed when one trial is stopped and another has not begun; the same command makes the same table."""
    command = [
        sys.executable,
        "-m",
        "raysl",
        "sweep",
        *FLAGS.split(),
        "--data",
        data[0],
        "--validation",
        data[1],
    ]
    subprocess.run([*command, "--out", str(tmp_path / "undisturbed")], check=True, stdout=subprocess.DEVNULL)
    undisturbed = Folder(str(tmp_path / "undisturbed")).read_json("table.json")
    assert {row["trial"]: row["state"] for row in undisturbed} == {0: "finished", 1: "stopped", 2: "stopped"}
    out = tmp_path / "sweep"
    command += ["--out", str(out)]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 900
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
    stopped = [row["trial"] for row in after.of("decision") if not row["goes_on"]]
    assert (stopped, before.count(b'"goes_on": false')) == ([1, 2], 1)
    assert after.folder.read_json("table.json") == undisturbed


@pytest.mark.slow
def test_a_population_copies_weights(ray_session: None, data: tuple[str, str], tmp_path: Path) -> None:
    """The worse of two trials continues from the checkpoint of the better one, byte for byte, with another value."""
    out = tmp_path / "sweep"
    settings: dict[str, Any] = {
        "vary": ("optim.lr=1e-6..0.3",),
        "searcher": "random",
        "scheduler": "pbt",
        "samples": 2,
    }
    rows = sweep(base(data[0]), config(data, out, **settings))
    assert [row["state"] for row in rows] == ["finished", "finished"]
    results = SweepResults.open(str(out))
    copies = {row["trial"]: row["copies"] for row in results.journal.of("decision") if row["rung"] == 0}
    ((trial, source),) = [(trial, source) for trial, source in copies.items() if source is not None]
    assert results.means(source)[0] >= results.means(trial)[0]
    assert results.values(trial, 1) != results.values(trial, 0)
    there, copied = (
        out / "trials" / home / "seed-0" / "checkpoints" / "step-000000006"
        for home in (f"{source:04d}", f"{trial:04d}/from-rung-1")
    )
    files = sorted(path.name for path in there.iterdir())
    assert files
    assert [(copied / name).read_bytes() for name in files] == [(there / name).read_bytes() for name in files]
    continued = results.scores[trial, 0, 1]
    assert (continued["step"], continued["run"]) == (12, f"trials/{trial:04d}/from-rung-1/seed-0")


@pytest.mark.slow
def test_the_tuner_of_the_experiment(ray_session: None, tmp_path: Path) -> None:
    """experiments/sweep_tune.py has a plain `tune.Tuner`; its scheduler sees the scores."""
    script = runpy.run_path(str(Path(__file__).parents[2] / "experiments" / "sweep_tune.py"))
    images = make_dataset(tmp_path / "images", 320)
    flags = script["Flags"](str(images.folder), str(tmp_path / "sweep"), epochs=1, samples=2)
    results = script["main"](flags)
    assert not results.errors
    for result in results:
        assert set(result.config) == {"pirl.temperature", "optim.lr"}
        assert 0 <= result.metrics["score"] <= 1
    assert max(result.metrics["rung"] for result in results) == 3


SPACE = {"pirl.temperature": tune.loguniform(0.03, 0.5), "optim.lr": tune.choice([0.03, 0.1])}


def fit(data: tuple[str, str], out: Path, callbacks: list[Any], **settings: Any) -> tune.ResultGrid:
    bound = raysl.tune_trainable(
        base(data[0]), str(out), param_space=SPACE, validation=data[1], rungs=(1 / 3, 1), max_concurrent=1
    )
    run = tune.RunConfig(
        name="tune",
        storage_path=str(out),
        callbacks=callbacks,
        verbose=0,
        checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1),
    )
    config = tune.TuneConfig(metric="score", mode="max", **settings)
    return tune.Tuner(bound, param_space=SPACE, tune_config=config, run_config=run).fit()


@pytest.mark.slow
def test_loggers_get_the_hyperparameters_and_scores_of_hyperopt_and_hyperband(
    ray_session: None,
    data: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("hyperopt")
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("wandb")
    from ray.air.integrations.mlflow import MLflowLoggerCallback
    from ray.air.integrations.wandb import WandbLoggerCallback
    from ray.tune.search.hyperopt import HyperOptSearch

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    store = (tmp_path / "mlruns").as_uri()
    callbacks = [
        MLflowLoggerCallback(store, experiment_name="sweep"),
        # In the folder of a trial, Ray Tune would copy the last file before W&B has written it.
        WandbLoggerCallback("sweep", mode="offline", dir=str(tmp_path / "offline")),
    ]
    results = fit(
        data,
        tmp_path / "out",
        callbacks,
        num_samples=3,
        search_alg=HyperOptSearch(random_state_seed=0),
        scheduler=tune.schedulers.HyperBandScheduler("t", max_t=3),
    )
    assert not results.errors
    wanted = {
        (result.config["pirl.temperature"], result.config["optim.lr"], result.metrics["score"])
        for result in results
    }
    assert len(wanted) == 3
    client = mlflow.tracking.MlflowClient(store)
    runs = client.search_runs([client.get_experiment_by_name("sweep").experiment_id])
    logged = {
        (
            float(run.data.params["pirl.temperature"]),
            float(run.data.params["optim.lr"]),
            run.data.metrics["score"],
        )
        for run in runs
    }
    assert logged == wanted
    assert {offline(file) for file in tmp_path.rglob("run-*.wandb")} == wanted


def offline(file: Path) -> tuple[float, float, float]:
    """Return the temperature, the learning rate and the last score in a file that W&B wrote without a server.

    Its format is the log of LevelDB: blocks of 32 KB with parts of records, after a header of 7 bytes.
    """
    data, at, row = file.read_bytes(), 7, b""
    found: dict[str, Any] = {}
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        length, kind = struct.unpack_from("<HB", data, at + 4)
        row += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # A whole record, or its last part.
            record = importlib.import_module("wandb.proto.wandb_internal_pb2").Record()
            record.ParseFromString(row)
            for item in (*record.run.config.update, *record.config.update, *record.history.item):
                found["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
            row = b""
    return found["pirl.temperature"], found["optim.lr"], found["score"]


@pytest.mark.slow
def test_a_population_of_a_plain_tuner_copies_weights(
    ray_session: None,
    data: tuple[str, str],
    tmp_path: Path,
) -> None:
    """Ray Tune's own population based training: the worse trial continues from the weights of the better one."""
    pbt = tune.schedulers.PopulationBasedTraining(
        "rung", perturbation_interval=1, hyperparam_mutations=SPACE, quantile_fraction=0.5, synch=True
    )
    results = fit(data, tmp_path / "out", [], num_samples=2, scheduler=pbt)
    assert not results.errors
    trials = Folder(str(tmp_path / "out" / "trials"))
    (copied,) = (tmp_path / "out" / "trials").glob("*/from-rung-1/seed-0/checkpoints/step-000000004")
    (source,) = (name for name in trials.list() if name not in copied.parts)
    there = tmp_path / "out" / "trials" / source / "seed-0" / "checkpoints" / copied.name
    files = sorted(path.name for path in there.iterdir())
    assert files
    assert [(copied / name).read_bytes() for name in files] == [(there / name).read_bytes() for name in files]

"""Callbacks hear what happens to a run, and one that fails does not stop it. The loggers work without a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from raysl import Callback, Pretraining, Run, TensorBoardLogger, UserError
from raysl.checkpoint import Checkpoint, SaveConfig, Saver
from raysl.run.callbacks import Callbacks, MLflowLogger, WandbLogger
from tests.run.test_run import dataset

ROWS = [{"step": 2, "loss": 0.5, "lr": 0.1}, {"step": 4, "loss": 0.25, "lr": 0.1}]
SCORES = [{"step": 4, "probe": "knn", "name": "top1/k=20", "value": 0.75}]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.begin(Pretraining("unused", str(tmp_path / "run")), dataset(), {})


class Listener(Callback):
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def on_begin(self, run: Run) -> None:
        self.heard.append("begin")

    def on_step(self, step: int) -> None:
        self.heard.append(step)

    def on_log(self, row: Mapping[str, Any]) -> None:
        self.heard.append(row["loss"])

    def on_checkpoint(self, saved: Checkpoint) -> None:
        self.heard.append(f"saved {saved.step}")

    def on_probe(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.heard.append(rows[0]["value"])

    def on_end(self, run: Run) -> None:
        self.heard.append("end")


class Fails(Callback):
    def on_log(self, row: Mapping[str, Any]) -> None:
        raise OSError("no network")


def follow(run: Run, *members: Callback) -> None:
    callbacks = Callbacks(members)
    with callbacks.following(run, 0):
        callbacks.log(ROWS[:1])
        saver = Saver(run.checkpoints, SaveConfig(), 0, 1)
        saver.save(3, {"step": 3}, None)
        saver.wait()
        callbacks.log(ROWS[1:])
        callbacks.report_probe_rows(SCORES)


def test_callbacks_hear_everything_in_order(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    listener = Listener()
    follow(run, Fails(), listener)
    assert listener.heard == ["begin", 1, 2, 0.5, 3, 4, 0.25, "saved 3", 0.75, "end"]
    assert caplog.text.count("no network") == 1


def test_what_is_no_callback_is_refused() -> None:
    with pytest.raises(UserError, match=r"Derive its class from raysl\.Callback"):
        Callbacks([print])  # type: ignore[list-item]
    with pytest.raises(UserError, match="Listener'> is not a callback"):
        Callbacks(Listener)  # type: ignore[arg-type]


def test_one_callback_needs_no_list(run: Run) -> None:
    listener = Listener()
    with Callbacks(listener).following(run, 0):
        pass
    assert listener.heard == ["begin", "end"]


def test_tensorboard(run: Run, tmp_path: Path) -> None:
    follow(run, TensorBoardLogger(str(tmp_path / "tensorboard")))
    events = b"".join(file.read_bytes() for file in (tmp_path / "tensorboard").iterdir())
    assert b"probe/knn/top1/k_20" in events
    assert b"loss" in events


def test_wandb_offline(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    follow(run, WandbLogger(project="test", dir=str(tmp_path)))
    (log,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"probe/knn/top1" in log.read_bytes()


def test_mlflow_in_a_folder(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    follow(run, MLflowLogger("test", (tmp_path / "mlruns").as_uri()))
    client = mlflow.MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    assert found.data.metrics["loss"] == 0.25
    assert found.data.metrics["probe/knn/top1/k-20"] == 0.75
    assert found.data.params["optim.lr"] == "0.03"

"""Attempts of a run on Ray that end badly, with a Ray that is pretended."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.train import TrainingFailedError

from raysl import Callback
from raysl.errors import UserError
from raysl.ray_cluster.placement import Placement
from raysl.run import Run
from raysl.run.callbacks import Callbacks
from raysl.storage import Folder
from raysl.storage.lock import DriverLock
from raysl.stream.reader import DataShare
from raysl.training import launch
from raysl.training.elastic import WorkerGroup
from raysl.training.progress_actor import ProgressActor
from raysl.training.worker import Job
from tests.data import make_dataset

GROUP = WorkerGroup(1, Placement(1, 0, DataShare(), 1))


class Rows(Callback):
    """Keeps the rows of metrics that it gets."""

    def __init__(self) -> None:
        self.rows: list[Mapping[str, Any]] = []

    def on_log(self, row: Mapping[str, Any]) -> None:
        self.rows.append(row)


class Attempts:
    """A run whose attempt calls a function; methods of its progress actor are called in this process.

    Attributes:
        actor: the progress actor.
        callback: what follows the run.
    """

    def __init__(self, folder: Path, fit: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
        self.actor, self.callback = ProgressActor(), Rows()
        remote = SimpleNamespace(
            **{
                name: SimpleNamespace(remote=getattr(self.actor, name))
                for name in dir(ProgressActor)
                if not name.startswith("_")
            }
        )
        patch.setattr(ray, "get", lambda found: found)
        patch.setattr(launch, "_trainer", lambda *_: SimpleNamespace(fit=fit))
        job = Job(
            {"epochs": 9},
            Run(Folder(str(folder / "run"))),
            make_dataset(folder / "set", 8),
            GROUP.placement,
            remote,
        )
        self.lock = DriverLock(job.run.folder, "run")
        self._attempts = launch._Attempts(job, (1,), 9, 9, self.lock, Callbacks([self.callback]))

    def run(self) -> None:
        with self.lock:
            self._attempts.run(GROUP)


def test_an_interrupt_that_is_not_a_request_to_save_kills_the_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed, ended = threading.Event(), threading.Event()

    def fit() -> None:
        attempts.actor.register("a worker")
        _thread.interrupt_main()  # Ctrl-C, which asks the workers to save
        while not attempts.actor.stop_requested():
            pass
        _thread.interrupt_main()
        assert killed.wait(30)
        ended.set()

    monkeypatch.setattr(ray, "kill", lambda _: killed.set())
    attempts = Attempts(tmp_path, fit, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        attempts.run()
    assert ended.is_set()
    # Ray Train starts the workers again, and they end at once.
    assert attempts.actor.failure()


def test_an_interrupt_while_the_thread_of_ray_train_starts_kills_the_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered, killed, start = threading.Event(), threading.Event(), threading.Thread.start

    def fit() -> None:
        attempts.actor.register("a worker")
        registered.set()
        assert killed.wait(30)

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        if thread.name.endswith("(fit)"):
            assert registered.wait(30)
            raise KeyboardInterrupt

    monkeypatch.setattr(ray, "kill", lambda _: killed.set())
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    attempts = Attempts(tmp_path, fit, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        attempts.run()
    assert killed.is_set()


def test_rows_before_a_failure_reach_the_callbacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit() -> None:
        attempts.actor.post(
            {"step": 1, "loss": 1.0, "eta_s": 0, "epoch": 0, "images_per_s": 1, "wait_share": 0}
        )
        raise TrainingFailedError("a worker ended")

    attempts = Attempts(tmp_path, fit, monkeypatch)
    with pytest.raises(UserError, match="a worker ended"):
        attempts.run()
    assert [row["step"] for row in attempts.callback.rows] == [1]


def test_an_error_of_a_worker_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit() -> None:
        attempts.actor.fail(UserError("The loss became nan."))
        raise TrainingFailedError("a worker ended")

    attempts = Attempts(tmp_path, fit, monkeypatch)
    with pytest.raises(UserError, match="loss became nan"):
        attempts.run()


def test_a_failure_after_ctrl_c_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit() -> None:
        _thread.interrupt_main()
        while not attempts.actor.stop_requested():
            pass
        raise TrainingFailedError("a worker ended")

    attempts = Attempts(tmp_path, fit, monkeypatch)
    with pytest.raises(UserError, match="a worker ended"):
        attempts.run()


def test_ctrl_c_before_the_first_checkpoint_does_not_claim_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit() -> None:
        _thread.interrupt_main()
        while not attempts.actor.stop_requested():
            pass

    attempts = Attempts(tmp_path, fit, monkeypatch)
    with pytest.raises(
        KeyboardInterrupt, match=r"before the first checkpoint\. The same command begins again"
    ):
        attempts.run()

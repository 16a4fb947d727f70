"""A whole run through Ray: it ends with the same numbers whatever is killed on the way."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import inspect
import logging
import os
import pty
import shlex
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from raysl import checkpoint
from raysl.checkpoint import SaveConfig
from raysl.config import Pretraining, ViewConfig
from raysl.config.command import command as written
from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.objectives.pirl import Config as Pirl
from raysl.run import Run
from raysl.storage import Folder
from raysl.training.launch import pretrain
from tests.data import make_dataset
from tests.ray_cluster.private_ray import private_folder, without_token

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def _hear_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """These runs would be over before the first line of progress."""
    monkeypatch.setattr(importlib.import_module("raysl.training.launch"), "SHOW_EVERY_S", 0.05)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return make_dataset(tmp_path_factory.mktemp("data") / "set", 96)


def configuration(dataset: DataSet, run: Path) -> Pretraining:
    return Pretraining(
        data=str(dataset.folder),
        run=str(run),
        epochs=3,
        batch_size=16,
        workers=2,
        log_every=1,
        view=ViewConfig(image_size=16, recipe="plain"),
        save=SaveConfig(every_steps=4),
        parts={"pirl": Pirl(num_negatives=32, dim=16)},
    )


def losses(run: str) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in Run.open(run).metrics()}


def assert_same_end(run: str, expected: Run) -> None:
    """Bit for bit: every loss of the curve, the weights and statistics, the optimizer and the memory bank."""
    assert losses(run) == losses(str(expected.folder))
    (state, banks), (state_, banks_) = Run.open(run).newest().load(), expected.newest().load()
    # Digests, since a difference of two networks is not for reading.
    assert [digest(state), digest(list(banks))] == [digest(state_), digest(list(banks_))]


def digest(value: Any) -> str:
    """A hash of every number in a checkpoint."""
    return hashlib.blake2b(repr(_plain(value)).encode(), digest_size=8).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return str(value.tolist())
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def finished(ray_session: None, dataset: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing disturbed."""
    return pretrain(configuration(dataset, tmp_path_factory.mktemp("runs") / "undisturbed"))


def test_run_is_complete(finished: Run, dataset: DataSet) -> None:
    assert finished.newest().step == 18
    assert sorted(losses(str(finished.folder))) == list(range(1, 19))
    metadata = finished.metadata()
    assert metadata["data"]["fingerprint"] == dataset.manifest.fingerprint
    assert metadata["facts"]["num_permutations"] == 362_880
    row = finished.metrics()[-1]
    assert row["images_per_s"] > 0
    assert 0 <= row["wait_share"] <= 1
    assert list((Path(finished.folder.uri) / "tensorboard").iterdir())


def test_finished_run_is_not_run_again(finished: Run, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        pretrain(finished.config())
    assert "already finished" in caplog.text


class Listener(logging.Handler):
    """Calls a function with every message that raysl logs, for the duration of a block."""

    def __init__(self, listen: Callable[[str], None]) -> None:
        super().__init__()
        self.listen = listen

    def emit(self, record: logging.LogRecord) -> None:
        self.listen(record.getMessage())

    def __enter__(self) -> None:
        logging.getLogger("raysl").addHandler(self)
        logging.getLogger("raysl").setLevel(logging.INFO)

    def __exit__(self, *_: object) -> None:
        logging.getLogger("raysl").removeHandler(self)


def send(*titles: str, number: signal.Signals = signal.SIGKILL, most: int) -> int:
    """Send a signal to up to `most` processes of this session's Ray with one of the titles; return how many got it."""
    sent = 0
    for process in psutil.Process(os.getpid()).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if sent < most and any(title in " ".join(process.cmdline()) for title in titles):
                process.send_signal(number)
                sent += 1
    return sent


def test_killed_data_tasks_and_train_worker(finished: Run, dataset: DataSet, tmp_path: Path) -> None:
    """Every process that runs, or has run, a data task dies at once; then the actor that tells the progress, and a
    trainer, whose group starts again.
    """
    config = configuration(dataset, tmp_path / "run")
    killed: dict[str, int] = {}

    def listen(line: str) -> None:
        if line.startswith("step") and not killed:
            killed["data"] = send("ray::MapBatches", "ray::IDLE", most=100)
            killed["progress"] = send("ray::ProgressActor", most=1)
            killed["trainer"] = send("RayTrainWorker", most=1)

    with Listener(listen):
        pretrain(config)
    assert killed["data"] > 0
    assert killed["progress"] == 1
    assert killed["trainer"] == 1
    assert_same_end(config.run, finished)


def placement_groups() -> list[str]:
    """Return the states of the placement groups that hold or ask for resources of this session's Ray."""
    import ray

    groups = ray.util.placement_group_table().values()
    return [group["state"] for group in groups if group["state"] != "REMOVED"]


@pytest.mark.slow
def test_a_worker_that_hangs_is_named_and_the_run_goes_on(
    finished: Run, dataset: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("raysl.training.launch"), "EXCHANGE_TIMEOUT_S", 30)
    config = configuration(dataset, tmp_path / "run")
    said: list[str] = []

    def listen(line: str) -> None:
        if line.startswith("step") and not any(line.startswith("step") for line in said):
            assert send("RayTrainWorker", number=signal.SIGSTOP, most=1) == 1
        said.append(line)

    with Listener(listen):
        pretrain(config)
    # On a busy machine, the new workers may take as long to begin.
    stall = next(line for line in said if "timed out waiting" in line)
    assert stall.count("does not answer") == 1
    assert_same_end(config.run, finished)
    assert placement_groups() == []


@pytest.mark.slow  # test_in_process.py kills one without Ray
def test_killed_driver(finished: Run, dataset: DataSet, tmp_path: Path) -> None:
    """Killed after its first checkpoint, then continued by another process."""
    run = tmp_path / "run"
    config = configuration(dataset, run)
    command = [sys.executable, "-m", *shlex.split(written(config))]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoints = Run(Folder(str(run))).checkpoints
    deadline = time.monotonic() + 300
    while checkpoint.newest_checkpoint(checkpoints) is None:
        assert time.monotonic() < deadline
        with contextlib.suppress(subprocess.TimeoutExpired):
            pytest.fail(f"the driver ended, with {driver.wait(0.1)}, before it could be killed")
    # Agents of Ray, which only report, may outlive the others by a minute.
    others = psutil.Process(driver.pid).children(recursive=True)
    others = [process for process in others if not process.name().endswith("Agent")]
    driver.kill()
    driver.wait()
    psutil.wait_procs(others, timeout=60)
    pretrain(config)
    assert_same_end(str(run), finished)


def read_until_step(descriptor: int) -> str:
    """Read from a terminal until a line of progress has come."""
    said = ""
    while "\nstep" not in said:
        said += os.read(descriptor, 4096).decode()
    return said


@pytest.mark.parametrize(
    ("number", "name", "code"),
    [
        (signal.SIGINT, "Ctrl-C", 130),
        # The handlers of these two are tested without Ray in test_in_process.py.
        pytest.param(signal.SIGTERM, "SIGTERM", 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, "SIGHUP", 129, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_the_run_at_its_step(
    dataset: DataSet, tmp_path: Path, number: signal.Signals, name: str, code: int
) -> None:
    """No step is lost, and meanwhile no other user reaches the Ray of the command.

    Ctrl-C is typed at a terminal, which sends it to Ray's processes too.
    """
    run = tmp_path / "run"
    command = [sys.executable, "-m", "raysl", "pretrain", "--data", str(dataset.folder), "--run", str(run)]
    command += "--epochs 5000 --batch-size 16 --workers 2 --view.image-size 16 --view.recipe plain".split()
    command += "--save.every-minutes 0 --pirl.num-negatives 32 --pirl.dim 16".split()
    ours, theirs = pty.openpty()
    driver = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=without_token(), start_new_session=True,
        preexec_fn=_own_terminal,
    )  # fmt: skip
    os.close(theirs)
    try:
        said = read_until_step(ours)
        folder = private_folder(psutil.Process(driver.pid))
        if number == signal.SIGINT:
            os.write(ours, b"\x03")
        else:
            driver.send_signal(number)
        with contextlib.suppress(OSError):  # the terminal closes with the driver
            while more := os.read(ours, 4096):
                said += more.decode()
        assert driver.wait(timeout=120) == code
    finally:
        driver.kill()
    # The first step has a line before the first row of metrics.
    assert "the next loss at step 10" in said
    newest = Run.open(str(run)).newest()
    assert f"Stopped by {name} after step {newest.step}, which is saved" in " ".join(said.split())
    assert Run.open(str(run)).metrics()[-1]["step"] == newest.step
    assert "Traceback" not in said
    assert not (folder / "token").exists()


def _own_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_other_images_are_refused(finished: Run, tmp_path: Path) -> None:
    other = make_dataset(tmp_path / "set", 96, seed=1)
    with pytest.raises(UserError, match="fingerprint"):
        pretrain(replace(finished.config(), data=str(other.folder)))


def test_other_configuration_is_refused(finished: Run) -> None:
    with pytest.raises(UserError, match=r"optim\.lr"):
        pretrain(replace(finished.config(), optim=replace(finished.config().optim, lr=0.1)))


def test_a_loss_that_is_not_finite_stops_the_run(dataset: DataSet, tmp_path: Path) -> None:
    config = configuration(dataset, tmp_path / "run")
    with pytest.raises(UserError, match="loss became nan"):
        pretrain(replace(config, workers=1, optim=replace(config.optim, lr=1e30)))
    assert placement_groups() == []


def test_ray_train_still_has_the_helpers_that_raysl_leaves_out() -> None:
    """They are named by text, so another name would bring their processes back without a word."""
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.constants import ENABLE_PREEMPTION_WATCHER_ENV_VAR

    named = inspect.getsource(TorchTrainer._create_default_callbacks)
    assert "DatasetsCallback(" in named
    assert "PlacementGroupCleanerCallback(" in named
    assert ENABLE_PREEMPTION_WATCHER_ENV_VAR == "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"

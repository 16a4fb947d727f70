"""Training without Ray: the numbers of a run on Ray, and the same answers to signals, deaths and mistakes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import textwrap
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import raysl
from raysl import Callback, checkpoint
from raysl.backbone.network import BackboneConfig
from raysl.checkpoint import SaveConfig
from raysl.config import Pretraining, ViewConfig
from raysl.dataset import SHARDS, DataSet
from raysl.errors import UserError
from raysl.evaluation.online import OnlineConfig, pretrain_and_probe
from raysl.objectives.pirl import Config as Pirl
from raysl.optim import OptimConfig
from raysl.run import Run
from raysl.run.callbacks import Callbacks
from raysl.storage import Folder, lock
from raysl.training import in_process
from raysl.training.launch import pretrain
from tests.data import make_clips, make_dataset
from tests.training.test_launch import assert_same_end, configuration, read_until_step

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return make_dataset(tmp_path_factory.mktemp("data") / "set", 96)


@pytest.fixture(scope="module", autouse=True)
def _one_cpu() -> Iterator[None]:
    """On a busy machine, threads of tiny tensors mostly wait for each other."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


def alone(dataset: DataSet, run: Path) -> Pretraining:
    return replace(configuration(dataset, run), workers=1)


@pytest.fixture(scope="module")
def finished(dataset: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return pretrain(alone(dataset, tmp_path_factory.mktemp("runs") / "whole"), local=True)


def test_images_in_an_object_store_are_read_by_a_thread(
    finished: Run, dataset: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Folder(f"memory://{tmp_path}")
    for name in ("manifest.json", *(f"{SHARDS}/{one}" for one in (dataset.folder / SHARDS).list())):
        store.write(name, dataset.folder.read(name))
    monkeypatch.setattr("raysl.stream.processes._Process", lambda: pytest.fail("A process is forked"))
    pretrain(replace(alone(dataset, tmp_path / "run"), data=str(store)), local=True)
    assert_same_end(str(tmp_path / "run"), finished)


@pytest.mark.parametrize("lr", [1e-6, 0.1])
def test_a_run_whose_loss_is_that_of_a_guess_says_so(
    lr: float, dataset: DataSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(alone(dataset, tmp_path / "run"), optim=OptimConfig(lr=lr), epochs=10)
    pretrain(config, local=True)
    found = [line for line in caplog.messages if "guessing would give 3.497" in line]
    assert len(found) == (lr == 1e-6)


def test_a_run_that_is_too_short_to_judge_says_nothing(
    dataset: DataSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(alone(dataset, tmp_path / "run"), optim=OptimConfig(lr=1e-6), log_every=18)
    pretrain(config, local=True)
    assert "guessing" not in caplog.text


def test_a_thread_may_train(finished: Run, dataset: DataSet, tmp_path: Path) -> None:
    """As the actor of a trial does, from rung to rung."""
    config, threads = alone(dataset, tmp_path / "run"), torch.get_num_threads()
    before = psutil.Process().children()

    def rungs() -> None:
        for until in (5, 18):
            pretrain(config, until=until, placement=in_process.local_placement(), local=True)

    thread = threading.Thread(target=rungs)
    thread.start()
    thread.join()
    assert_same_end(config.run, finished)
    assert torch.get_num_threads() == threads
    assert psutil.Process().children() == before


def test_settings_of_torch_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    with in_process._torch_settings(1, on_gpu=False):
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = True
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark


def test_neither_ray_nor_the_compiler_of_torch_is_imported(dataset: DataSet, tmp_path: Path) -> None:
    test = make_dataset(tmp_path / "test", 40, seed=1)
    code = (
        "import sys; from raysl import pretrain, probe; "
        f"data, run = {str(dataset.folder)!r}, {str(tmp_path / 'run')!r}; "
        "pretrain(data, run, local=True, epochs=0.5, method='simclr'); "
        f"probe(run, data, {str(test.folder)!r}, probes=('knn', 'linear')); "
        "assert not {'ray', 'torch._dynamo', 'torchvision'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


class Seen(Callback):
    """Keeps what it is told, and calls a function at a step."""

    def __init__(self, step: int = 0, act: Any = None) -> None:
        self.steps: list[int] = []
        self.saved: list[int] = []
        self.act = {step: act}

    def on_log(self, row: Mapping[str, Any]) -> None:
        self.steps.append(row["step"])
        self.act.get(row["step"], lambda: None)()

    def on_checkpoint(self, saved: Any) -> None:
        self.saved.append(saved.step)


def test_callbacks_follow(dataset: DataSet, tmp_path: Path) -> None:
    seen = Seen()
    pretrain(alone(dataset, tmp_path / "run"), callbacks=Callbacks([seen]), until=9, local=True)
    assert seen.steps == list(range(1, 10))
    assert seen.saved == [4, 8, 9]


def test_the_first_step_has_a_line_before_the_first_row(
    dataset: DataSet, finished: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(alone(dataset, tmp_path / "run"), log_every=10)
    with caplog.at_level("INFO", "raysl"):
        run = pretrain(config, local=True)
    lines = [line for line in caplog.messages if line.startswith("step ")]
    assert lines[0] == "step     1/18  the next loss at step 10"
    assert [line.split()[1] for line in lines] == ["1/18", "10/18", "18/18"]
    rows, of_steps = run.metrics(), [row["loss"] for row in finished.metrics()]
    assert [row["step"] for row in rows] == [10, 18]
    assert [row["loss"] for row in rows] == pytest.approx([np.mean(of_steps[:10]), np.mean(of_steps[10:])])


def test_slow_steps_have_lines_between_the_rows(
    dataset: DataSet, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raysl.training.worker._SILENT_S", 0.0)
    with caplog.at_level("INFO", "raysl"):
        pretrain(replace(alone(dataset, tmp_path / "run"), log_every=6), until=8, local=True)
    lines = [line for line in caplog.messages if line.startswith("step ")]
    follows = [line.split()[1] for line in lines if "the next loss at step" in line]
    assert follows == ["1/18", "2/18", "3/18", "4/18", "5/18", "7/18"]
    assert "step     7/18  the next loss at step 8" in lines


def test_a_killed_data_process_is_an_error_of_one_sentence(dataset: DataSet, tmp_path: Path) -> None:
    config = replace(alone(dataset, tmp_path / "run"), epochs=20)
    before = psutil.Process().children()

    def kill() -> None:
        for child in set(psutil.Process().children()) - set(before):
            child.kill()

    with pytest.raises(UserError, match="A data process ended unexpectedly"):
        pretrain(config, callbacks=Callbacks([Seen(2, kill)]), local=True)
    assert psutil.Process().children() == before


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    damaged = make_dataset(tmp_path / "set", 96)
    shard = tmp_path / "set" / SHARDS / "00001.parquet"
    data = bytearray(shard.read_bytes())
    data[100:900] = bytes(np.random.default_rng(0).integers(0, 256, 800, dtype=np.uint8))
    shard.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"Shard '00001.parquet'.* is damaged"):
        pretrain(alone(damaged, tmp_path / "run"), local=True)


def test_a_smaller_data_set_is_refused_as_another_one(
    finished: Run, dataset: DataSet, tmp_path: Path
) -> None:
    """Not by the batch size, which is stored in the run."""
    smaller = make_dataset(tmp_path / "set", 8)
    config = replace(alone(dataset, Path(str(finished.folder))), data=str(smaller.folder))
    assert config.batch_size > smaller.num_images
    with pytest.raises(UserError, match=r"begun on images with fingerprint"):
        pretrain(config, local=True)


def test_a_folder_of_other_files_is_refused_and_left_alone(dataset: DataSet, tmp_path: Path) -> None:
    (tmp_path / "1.jpg").touch()
    with pytest.raises(UserError, match=r"holds no run: '1\.jpg' is in it"):
        pretrain(alone(dataset, tmp_path), local=True)
    assert [file.name for file in tmp_path.iterdir()] == ["1.jpg"]


def test_damaged_checkpoint_is_an_error_of_the_user(dataset: DataSet, finished: Run, tmp_path: Path) -> None:
    """The state file of the only checkpoint is cut short."""
    run = tmp_path / "run"
    newest = finished.newest()
    target = run / "checkpoints" / "step-000000008"
    target.mkdir(parents=True)
    for name in newest.folder.list():
        (target / name).write_bytes(newest.folder.read(name))
    (target / checkpoint.STATE).write_bytes(newest.folder.read(checkpoint.STATE)[:-100])
    with pytest.raises(UserError, match="damaged"):
        pretrain(alone(dataset, run), local=True)


def test_a_driver_that_lost_its_lock_stops(dataset: DataSet, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.01)
    monkeypatch.setattr(lock.DriverLock.__init__, "__defaults__", ("sweep", 0.01, False))
    config = replace(alone(dataset, tmp_path / "run"), epochs=500)
    seen = Seen(2, lambda: (tmp_path / "run" / lock.NAME).write_text('{"id": "another"}'))
    with pytest.raises(UserError, match="Another raysl process has taken over"):
        pretrain(config, callbacks=Callbacks([seen]), local=True)


def test_a_driver_that_does_not_train_writes_no_metadata(
    finished: Run, dataset: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = finished.metadata()
    pretrain(alone(dataset, Path(str(finished.folder))), local=True)
    assert finished.metadata() == before
    monkeypatch.setattr(lock.DriverLock.__init__, "__defaults__", ("sweep", 0.1, False))
    # Another driver has the folder, and has not yet written its own metadata.
    with (
        lock.DriverLock(Folder(str(tmp_path)), beat_s=0.01),
        pytest.raises(UserError, match=r"Another raysl process .* works on the run"),
    ):
        pretrain(alone(dataset, tmp_path), local=True)
    assert list(tmp_path.iterdir()) == []


def command(dataset: DataSet, run: Path) -> list[str]:
    flags = "--epochs 5000 --batch-size 16 --view.image-size 16 --view.recipe plain --local --log-every 1"
    flags += " --save.every-minutes 0 --pirl.num-negatives 32 --pirl.dim 16 --backbone.name small"
    data = ["--data", str(dataset.folder), "--run", str(run)]
    return [sys.executable, "-m", "raysl", "pretrain", *data, *flags.split()]


@pytest.mark.parametrize(
    ("number", "name", "code"),
    [(signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 143), (signal.SIGHUP, "SIGHUP", 129)],
)
def test_a_signal_saves_the_run_at_its_step(
    dataset: DataSet, tmp_path: Path, number: signal.Signals, name: str, code: int
) -> None:
    """Every process of the terminal gets the signal, and the data processes go on until the run is saved."""
    run = tmp_path / "run"
    ours, theirs = pty.openpty()
    driver = subprocess.Popen(
        command(dataset, run),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    try:
        said = read_until_step(ours)
        data = psutil.Process(driver.pid).children()
        os.killpg(driver.pid, number)
        with contextlib.suppress(OSError):  # the terminal closes with the driver
            while more := os.read(ours, 4096):
                said += more.decode()
        assert driver.wait(timeout=120) == code
    finally:
        driver.kill()
    assert data
    assert psutil.wait_procs(data, timeout=20)[1] == []
    newest = Run.open(str(run)).newest()
    assert f"Stopped by {name} after step {newest.step}, which is saved" in " ".join(said.split())
    assert Run.open(str(run)).metrics()[-1]["step"] == newest.step
    assert "Traceback" not in said
    assert not (run / lock.NAME).exists()


def assert_killed_at(config: Pretraining, step: int) -> None:
    """Train in another process, which is killed when it has saved a step; its data processes end too."""
    code = f"""
        import json, os, signal, sys
        from pathlib import Path
        import psutil
        from raysl import Callback
        from raysl.run.callbacks import Callbacks
        from raysl.config import Pretraining
        from raysl.training.launch import pretrain

        class Killed(Callback):
            def on_checkpoint(self, saved):
                if saved.step == {step}:
                    children = psutil.Process().children()
                    Path(sys.argv[2]).write_text(" ".join(str(child.pid) for child in children))
                    os.kill(os.getpid(), signal.SIGKILL)

        pretrain(Pretraining.from_json(json.loads(sys.argv[1])), local=True, callbacks=Callbacks([Killed()]))
    """
    file = Path(f"{config.run}-data")
    command = [sys.executable, "-c", textwrap.dedent(code), json.dumps(config.to_json()), str(file)]
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == -signal.SIGKILL
    assert Run.open(config.run).newest().step == step
    data, pids = [], file.read_text().split()
    assert pids
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            data.append(psutil.Process(int(pid)))
    left = psutil.wait_procs(data, timeout=20)[1]
    for process in left:
        process.kill()
    assert not left


def test_a_killed_run_resumes_to_the_same_numbers(finished: Run, dataset: DataSet, tmp_path: Path) -> None:
    config = alone(dataset, tmp_path / "run")
    assert_killed_at(config, 8)
    pretrain(config, local=True)
    assert_same_end(config.run, finished)


@pytest.mark.slow
def test_a_killed_run_on_clips_resumes_to_the_same_numbers(tmp_path: Path) -> None:
    clips = make_clips(tmp_path / "set", 24)
    assert clips.size_text == "24 clips"
    whole, killed = (
        Pretraining(
            str(clips.folder),
            str(tmp_path / name),
            "predict-frame_order",
            epochs=3,
            batch_size=8,
            workers=1,
            log_every=1,
            view=ViewConfig(image_size=16, recipe="plain"),
            save=SaveConfig(every_steps=2),
        )
        for name in ("whole", "killed")
    )
    # A pass over the clips has three steps, so the checkpoint is within the second one.
    assert_killed_at(killed, 4)
    pretrain(killed, local=True)
    assert_same_end(killed.run, pretrain(whole, local=True))


@pytest.mark.parametrize("workers", [2, "1:2"])
def test_several_workers_are_refused(dataset: DataSet, tmp_path: Path, workers: int | str) -> None:
    config = replace(alone(dataset, tmp_path / "run"), workers=workers)
    with pytest.raises(UserError, match=f"--workers is {workers}, and --local trains with one worker"):
        pretrain(config, local=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("values", "why"),
    [
        (
            {"parts": {"pirl": Pirl(head="bn", num_negatives=32)}, "view": ViewConfig(64)},
            "'pirl-jigsaw' has BatchNorm after",
        ),
        (
            {
                "method": "npid",
                "parts": {"npid": {"num_negatives": 32}},
                "backbone": BackboneConfig("resnet18"),
                "view": ViewConfig(image_size=16),
            },
            "reduces a view of 16 pixels to one",
        ),
    ],
)
def test_batchnorm_over_one_value_is_refused(
    dataset: DataSet, tmp_path: Path, values: dict[str, Any], why: str
) -> None:
    config = replace(alone(dataset, tmp_path / "run"), batch_size=1, **values)
    message = rf"--batch-size is 1, one image for each worker, and .*{why}.* --batch-size 2 or more"
    with pytest.raises(UserError, match=message):
        pretrain(config, local=True)
    assert not (tmp_path / "run").exists()


def test_a_disk_that_cannot_hold_one_checkpoint_is_refused(
    dataset: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=2_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        UserError, match=r"has 2\.0 MB free, and one checkpoint of this run takes at least [2-9]\."
    ):
        pretrain(alone(dataset, tmp_path / "run"), local=True)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_that_cannot_be_written_is_finished(
    finished: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("write", "writing", "check_writable"):
        monkeypatch.setattr(Folder, name, lambda *_: pytest.fail("The run is written"))
    caplog.set_level("INFO", "raysl")
    assert raysl.pretrain(config=finished.config(), local=True) == finished
    assert "is already finished" in caplog.text


def test_probes_beside_training_are_refused(dataset: DataSet, tmp_path: Path) -> None:
    online = OnlineConfig(4, str(dataset.folder), str(dataset.folder))
    with pytest.raises(UserError, match="--probe-every is 4"):
        pretrain_and_probe(alone(dataset, tmp_path / "run"), online, local=True)

"""What the driver hears from the workers, and how it is shown."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from raysl.checkpoint import SaveConfig
from raysl.errors import UserError
from raysl.training import progress_actor
from raysl.training.progress_actor import (
    WAITING_FOR_IMAGES,
    WAITING_FOR_WORKERS,
    ProgressActor,
    RemoteProgress,
)


def test_rows_are_taken_once_and_the_first_failure_stays() -> None:
    actor = ProgressActor()
    actor.post({"step": 1})
    actor.post({"step": 2})
    assert [row["step"] for row in actor.take_rows()] == [1, 2]
    assert actor.take_rows() == []
    assert actor.failure() is None
    actor.fail(UserError("first"))
    actor.fail(UserError("second"))
    assert str(actor.failure()) == "first"


def test_an_error_that_one_worker_keeps_meeting_is_a_failure() -> None:
    actor = ProgressActor()
    for rank in range(8):
        actor.crash(5, rank, "lost a neighbor")
    actor.crash(6, 0, "trace")
    assert actor.failure() is None
    actor.crash(5, 0, "trace")
    actor.crash(5, 0, "trace")
    assert "3 times after step 5" in str(actor.failure())


def test_workers_that_have_agreed_to_stop_are_not_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[str] = []
    monkeypatch.setattr("ray.kill", killed.append)
    actor = ProgressActor()
    actor.register("early")
    actor.stop_agreed()
    actor.kill_workers()
    assert killed == []
    actor.register("late")
    actor.kill_workers()
    actor.kill_workers()
    assert killed == ["late"]


def test_workers_that_wait_in_vain_tell_what_they_do_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.get", lambda answer: answer)
    actor = ProgressActor()
    actor.begin(0, workers=3, reached=0, saves="")
    called = SimpleNamespace(
        stalled=SimpleNamespace(remote=actor.stalled), crash=SimpleNamespace(remote=actor.crash)
    )
    one, two = (RemoteProgress(called, rank) for rank in range(2))
    now_s = time.monotonic()
    one.set_activity(7, WAITING_FOR_WORKERS)
    two.set_activity(7, WAITING_FOR_IMAGES)
    assert not one.is_late(1000, now_s + 920)
    one.set_activity(8, WAITING_FOR_WORKERS)
    assert not one.is_late(1000, now_s + 10), "it has ended a step after all"
    assert not one.is_late(1000, now_s + 920)
    assert not two.is_late(1000, now_s + 9999), "torch does not end a worker that waits for images"
    assert one.is_late(1000, now_s + 960)
    (said,) = actor.take_messages()
    assert said.startswith(
        "After step 8, the workers timed out waiting for each other: worker 1 waits for images, "
    )
    assert "worker 2 does not answer" in said
    actor.crash(8, 0, "trace: connection closed by peer")
    assert actor.failure() is None
    actor.crash(8, 0, "trace: connection closed by peer")
    assert str(actor.failure()) == said
    one.close()
    assert not one.is_late(1000, now_s + 9999)


def test_a_stall_of_all_workers_names_the_network() -> None:
    said = progress_actor.stall_sentence(3, {0: WAITING_FOR_WORKERS, 1: WAITING_FOR_WORKERS}, workers=2)
    assert "none is behind the others" in said
    assert "NCCL_SOCKET_IFNAME" in said


def test_lost_steps_are_counted_once() -> None:
    actor = ProgressActor()
    assert actor.begin(0, workers=2, reached=0, saves="") == 0
    assert actor.take_messages() == []
    actor.post({"step": 9})
    assert actor.begin(4, workers=3, reached=8, saves="") == 5
    assert actor.take_messages() == ["Resumed from step 4 with 3 workers; 5 steps or more were lost."]
    assert actor.begin(4, workers=3, reached=4, saves="") == 0
    assert actor.take_messages() == ["Resumed from step 4 with 3 workers."]


def test_a_run_without_a_checkpoint_starts_again_and_does_not_resume() -> None:
    actor = ProgressActor()
    assert actor.begin(0, workers=1, reached=20, saves=SaveConfig().describe()) == 20
    (said,) = actor.take_messages()
    assert said == (
        "No checkpoint had been saved yet (one is saved every 5 minutes, by --save.every-minutes), so the run starts "
        "again; 20 steps or more were lost."
    )
    assert SaveConfig(every_minutes=0).describe() == "one is saved only at the end"
    assert (
        SaveConfig(100, 0.5)
        .describe()
        .endswith("0.5 minutes, by --save.every-minutes and every 100 steps, by --save.every-steps")
    )
    assert "begins again" in progress_actor.resume_hint(0)
    assert "resumes from the checkpoint of step 7" in progress_actor.resume_hint(7)


def test_a_row_as_a_line() -> None:
    row = {"step": 20, "epoch": 1.5, "images_per_s": 812.4, "wait_share": 0.031, "loss": 5.4321, "lr": 0.03}
    line = progress_actor.format_row({**row, "eta_s": 3725.0}, num_steps=100, epochs=10)
    assert line == "step    20/100  epoch   1.5     812 images/s  waits  3%  loss  5.4321  ETA 1:02:05"
    assert progress_actor.format_row({**row, "eta_s": float("nan")}, num_steps=100, epochs=10).endswith(
        "ETA ?"
    )


def test_the_last_batch_does_not_show_more_epochs_than_the_run_has() -> None:
    row = {"step": 58, "epoch": 10.06, "images_per_s": 1.0, "wait_share": 0.0, "loss": 1.0, "eta_s": 0.0}
    assert "  epoch  10.0  " in progress_actor.format_row(row, num_steps=58, epochs=10)

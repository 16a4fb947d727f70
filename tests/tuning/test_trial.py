"""A piece of work that fails: when it is tried again, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from raysl.checkpoint import SaveConfig, Saver, newest
from raysl.config import Pretraining
from raysl.errors import UserError
from raysl.ray_cluster.placement import Placement
from raysl.run import Run
from raysl.storage import Folder
from raysl.stream.reader import DataShare
from raysl.tuning import trial
from raysl.tuning.trial import Work, perform


def work(folder: Path) -> Work:
    config = Pretraining("data", str(folder / "run"))
    return Work(config, 5, Placement(1, 0, DataShare(), 1), "train", "test", "knn")


def fails(errors: list[Exception]) -> Callable[..., tuple[float, float]]:
    """Raises one error after the other, and then has a score and a loss."""

    def score(*_: object) -> tuple[float, float]:
        if errors:
            raise errors.pop(0)
        return 0.5, 4.0

    return score


def quiet(_: str) -> None:
    pass


def test_a_crash_is_tried_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_score", fails([RuntimeError("a node was lost")]))
    row = perform(work(tmp_path), quiet)
    assert (row["event"], row["score"], row["loss"], row["step"]) == ("score", 0.5, 4.0, 5)


def test_a_crash_that_comes_again_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash() -> Exception:
        try:
            try:
                raise ValueError("first line\nthe last line")
            except ValueError as inner:
                raise RuntimeError("a task failed") from inner
        except RuntimeError as error:
            return error

    monkeypatch.setattr(trial, "_score", fails([crash(), crash()]))
    row = perform(work(tmp_path), quiet)
    assert row["event"] == "failed"
    assert row["reason"].startswith("ValueError: the last line")
    assert "RuntimeError: a task failed" in (tmp_path / "run" / trial.ERROR).read_text()


def test_what_a_retry_cannot_mend_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[Exception] = [UserError("No space left"), UserError("unused")]
    monkeypatch.setattr(trial, "_score", fails(errors))
    assert perform(work(tmp_path), quiet) == {"event": "failed", "reason": "No space left"}
    assert len(errors) == 1


def test_a_checkpoint_is_copied_once_and_whole(tmp_path: Path) -> None:
    source, target = Folder(str(tmp_path / "source")), Folder(str(tmp_path / "target"))
    saver = Saver(Run(source).checkpoints, SaveConfig(keep_last=9), rank=0, world=1)
    for step in (3, 6):
        saver.save(step, {"weight": torch.full((2,), float(step))}, None)
    saver.wait()
    trial._copy(source, 3, target)
    copied = newest(Run(target).checkpoints)
    assert copied is not None
    assert copied.step == 3
    assert copied.state()["weight"].tolist() == [3.0, 3.0]
    # One that is there stays, however far the run has gone on since.
    trial._copy(source, 6, target)
    assert newest(Run(target).checkpoints) == copied
    with pytest.raises(UserError, match="no longer"):
        trial._copy(source, 4, Folder(str(tmp_path / "other")))

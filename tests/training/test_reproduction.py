"""Test that a repeated run is equal to the last bit, and that differences are listed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raysl.config import Pretraining, ViewConfig
from raysl.errors import UserError
from raysl.objectives.pirl import Config as Pirl
from raysl.run import METADATA, METRICS, Run, jsonl
from raysl.storage import Folder
from raysl.training import reproduction
from raysl.training.launch import pretrain
from raysl.training.reproduction import ReproduceConfig, reproduce
from tests.data import make_dataset

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a run without Ray that was stopped and resumed."""
    folder = tmp_path_factory.mktemp("reproduce")
    config = Pretraining(
        data=str(make_dataset(folder / "train", 48).folder),
        run=str(folder / "run"),
        epochs=2,
        batch_size=16,
        workers=1,
        log_every=1,
        view=ViewConfig(image_size=16, recipe="plain"),
        parts={"pirl": Pirl(num_negatives=32, dim=16)},
    )
    stopped = pretrain(config, until=4, local=True)
    assert stopped.newest().step == 4
    return pretrain(config, local=True)


@pytest.mark.parametrize("local", [True, pytest.param(False, marks=[pytest.mark.slow, pytest.mark.ray])])
def test_a_run_in_two_parts_is_reproduced_in_one_to_the_last_bit(local: bool, run: Run) -> None:
    """On Ray too."""
    assert run.newest().step == 6
    found = reproduce(run, ReproduceConfig(local=local))
    assert found.same, found.result_differences
    assert found.steps == 6
    assert found.compared == ("numbers", "weights")
    # The numbers that are compared are there.
    assert [row["step"] for row in found.run.metrics()] == [1, 2, 3, 4, 5, 6]


def edited(run: Run, folder: Path, metadata: dict[str, Any], loss: float) -> Run:
    """Return a copy of a run with other metadata and another loss at step 3."""
    copy = Run(Folder(str(folder)))
    rows = run.metrics()
    rows[2]["loss"] = loss
    copy.folder.write(METRICS, jsonl(rows))
    copy.folder.write_json(METADATA, metadata)
    newest = run.newest()
    for name in newest.folder.list():
        (copy.checkpoints / newest.folder.uri.rpartition("/")[2]).write(name, newest.folder.read(name))
    return copy


def test_differences_are_listed(run: Run, tmp_path: Path) -> None:
    metadata = json.loads(json.dumps(run.metadata()))
    metadata["data"]["fingerprint"] = "another"
    metadata["sessions"][0]["packages"]["torch"] = "1.0"
    copy = edited(run, tmp_path / "copy", metadata, loss=1.0)
    found = reproduce(copy, ReproduceConfig(out=str(tmp_path / "again"), local=True))
    assert not found.same
    assert any(line.startswith("data: fingerprint another") for line in found.input_differences)
    assert any(line.startswith("packages.torch: 1.0 in session 1") for line in found.input_differences)
    assert len(found.result_differences) == 1
    assert found.result_differences[0].startswith("loss: 1 then")
    assert "at step 3 first" in found.result_differences[0]
    with pytest.raises(UserError, match="already holds a run"):
        reproduce(copy, ReproduceConfig(out=str(tmp_path / "again"), local=True))


def test_only_what_was_compared_is_called_equal(run: Run, tmp_path: Path) -> None:
    copy = edited(run, tmp_path / "copy", run.metadata(), loss=1.0)
    assert reproduce(copy, ReproduceConfig(steps=2, local=True)).compared == ("numbers",)
    copy.folder.write(METRICS, jsonl(run.metrics()[3:]))
    with pytest.raises(UserError, match="nothing to compare at --steps 2"):
        reproduce(copy, ReproduceConfig(steps=2, local=True))


def test_an_interrupted_repetition_is_resumed(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "again")
    again = replace(run.config(), run=out)
    pretrain(replace(again, save=replace(again.save, every_steps=0)), until=2, local=True)
    with monkeypatch.context() as other:
        other.setattr(reproduction, "open_or_ingest", lambda data: make_dataset(tmp_path / "other", 32))
        with pytest.raises(UserError, match="already holds a run"):  # One of other images is not resumed.
            reproduce(run, ReproduceConfig(out=out, local=True))
    found = reproduce(run, ReproduceConfig(out=out, local=True))
    assert found.same, found.result_differences
    assert len(found.run.metadata()["sessions"]) == 2


def test_nested_state_is_compared_too() -> None:
    class Saved:
        def __init__(self, key: float) -> None:
            self.key, self.step = key, 3

        def state(self) -> dict[str, Any]:
            queue = {"keys": torch.tensor([self.key]), "never_set": torch.tensor([float("nan")])}
            return {"network": {"weight": torch.zeros(2), "objective._extra_state": queue}}

    then, same, other = (Saved(key) for key in (1.0, 1.0, 2.0))
    assert reproduction._weights(then, same) == []  # type: ignore[arg-type]
    (line,) = reproduction._weights(then, other)  # type: ignore[arg-type]
    assert "1 of 3 tensors differ at step 3, the first 'objective._extra_state.keys'" in line

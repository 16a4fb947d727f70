"""Probes during training: at which steps, what becomes of failures, and where the scores go."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raysl import probes, ray_cluster
from raysl.backbone.network import build
from raysl.checkpoint import SaveConfig, Saver
from raysl.config import Pretraining, ViewConfig
from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.evaluation import online
from raysl.evaluation.online import ERROR, WatchConfig, Watcher, pretrain_and_probe, saving
from raysl.evaluation.results import ROWS, protocol_hash, rows_of
from raysl.extraction import FeatureProtocol
from raysl.objectives.pirl import Config as Pirl
from raysl.probes.knn import Config
from raysl.ray_cluster import lock, placement
from raysl.run import Run, jsonl
from raysl.storage import Folder
from tests.data import make_dataset
from tests.extraction.test_feature_tasks import make_run


def row(step: int, **changes: Any) -> dict[str, Any]:
    base = {"probe": "knn", "name": "top1", "layer": "pooled", "encoder": "trained", "seed": 0, "step": step}
    return {
        **base,
        "protocol": protocol_hash("knn", Config(), FeatureProtocol(ViewConfig().image_size)),
        "train": "t",
        "test": "u",
        "value": step / 10,
        "headline": True,
        **changes,
    }


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """With checkpoints at steps 2, 4 and 5, and metrics at 2 and 4."""
    dataset = make_dataset(tmp_path / "set", 8)
    config = Pretraining(str(dataset.folder), str(tmp_path / "run"), batch_size=4)
    run = Run.begin(config, dataset, {})
    saver = Saver(run.checkpoints, SaveConfig(keep_last=3), 0, 1)
    for step in (2, 4, 5):
        saver.save(step, {"network": build(config.backbone).state_dict()}, None)
        saver.wait()
    run.folder.write("metrics.jsonl", jsonl([{"step": step, "loss": 1.0} for step in (2, 4)]))
    return run


def watching(run: Run, said: list[str], names: tuple[str, ...] = ("knn",)) -> Watcher:
    """With data sets of which only the fingerprints are looked at."""
    manifest = DataSet.open(run.metadata()["data"]["uri"]).manifest
    train, test = (DataSet(Folder(name), replace(manifest, fingerprint=name)) for name in ("t", "u"))
    return Watcher(run, WatchConfig(2, "train", "test", names), train, test, said.append)


def found(run: Run, asked: list[Any], fails: tuple[int, ...] = ()) -> Any:
    """Stands for `probe`."""

    def probe(run: Run, *arguments: Any, checkpoint: Any, spare: bool, **rest: Any) -> list[dict[str, Any]]:
        asked.append((checkpoint.step, spare))
        if checkpoint.step in fails:
            raise RuntimeError("the probe broke")
        rows = [*rows_of(run), row(checkpoint.step)]
        run.folder.write(ROWS, jsonl(rows))
        return rows[-1:]

    return probe


def test_what_is_left_is_probed_after_the_last_step(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    said: list[str] = []
    monkeypatch.setattr(online, "probe", found(run, asked))
    others = [row(4, **{name: "other"}) for name in ("protocol", "train", "test", "layer", "encoder")]
    run.folder.write(ROWS, jsonl([row(2), *others]))
    watcher = watching(run, said)
    assert [at.step for at in watcher.due(["knn"])] == [4]
    assert watcher.finish() == [4, 5]
    assert asked == [(4, False), (5, False)]
    assert run.metrics() == [
        {"step": 2, "loss": 1.0, "probe/knn/top1": 0.2},
        {"step": 4, "loss": 1.0, "probe/knn/top1": 0.4},
        {"step": 5, "probe/knn/top1": 0.5},
    ]
    assert said == ["probe of step 4: knn/top1 0.4000", "probe of step 5: knn/top1 0.5000"]
    assert run.folder.exists(online.BOARD)
    assert watcher.finish() == []
    assert len(asked) == 2


def test_what_the_trainers_leave_over_is_used_while_they_train(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    machines = placement.Machines(({"CPU": 2.0},))
    monkeypatch.setattr(online, "_LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(placement, "machines", lambda: machines)
    watcher = watching(run, [])

    def probe(run: Run, *arguments: Any, **rest: Any) -> list[dict[str, Any]]:
        if len(asked) == 1:
            watcher.over.set()
        return found(run, asked)(run, *arguments, **rest)  # type: ignore[no-any-return]

    monkeypatch.setattr(online, "probe", probe)
    looked: list[bool] = []

    def held_here(folder: Folder) -> bool:
        looked.append(len(looked) > 2)
        assert not asked or looked[-1]
        return looked[-1]

    # Until this run has begun, what lies in the folder may be another's.
    monkeypatch.setattr(lock, "held_here", held_here)
    thread = threading.Thread(target=watcher.follow)
    thread.start()
    thread.join(60)
    assert asked == [(4, True), (2, True)]
    assert looked == [False] * 3 + [True] * 2


def test_a_probe_that_fails_stops_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    said: list[str] = []
    monkeypatch.setattr(online, "probe", found(run, asked, fails=(4,)))
    watching(run, said).finish()
    assert [step for step, _ in asked] == [2, 4, 5]
    assert "The probe of step 4 failed: the probe broke" in said[1]
    assert b"RuntimeError" in run.folder.read(ERROR)
    assert {row["step"] for row in run.metrics() if "probe/knn/top1" in row} == {2, 5}


def test_a_probe_that_fails_keeps_no_other_from_its_turn(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    said: list[str] = []

    def probe(run: Run, train: str, test: str, names: list[str], *_: Any, **rest: Any) -> None:
        asked.append((rest["checkpoint"].step, names))
        for name in names:
            if name == "svm":
                raise UserError("svm broke.")
            protocol = protocol_hash(
                name, probes.load(name)[0](), FeatureProtocol(run.config().view.image_size)
            )
            new = row(rest["checkpoint"].step, probe=name, protocol=protocol)
            run.folder.write(ROWS, jsonl([*rows_of(run), new]))

    monkeypatch.setattr(online, "probe", probe)
    run.folder.write(ROWS, jsonl([row(2), row(4)]))
    watcher = watching(run, said, ("knn", "svm", "linear"))
    assert watcher.finish() == [2, 4, 5]
    first = [(2, ["svm", "linear"]), (2, ["linear"]), (4, ["svm", "linear"]), (4, ["linear"])]
    assert asked == [*first, (5, ["knn", "svm", "linear"]), (5, ["linear"])]
    assert "The probe of step 5 failed: svm broke." in said[-2]
    assert said[-1] == "probe of step 5: knn/top1 0.5000, linear/top1 0.5000"
    assert all({"probe/knn/top1", "probe/linear/top1"} <= one.keys() for one in run.metrics())
    assert watcher.finish() == [2, 4, 5]
    assert asked[-1] == (5, ["svm"])


def test_checkpoints_are_saved_where_probes_are() -> None:
    config = Pretraining("data", "run")
    assert saving(config, WatchConfig(6, "a", "b")).save == SaveConfig(every_steps=6, keep_every=6)
    often = Pretraining("data", "run", save=SaveConfig(every_steps=3))
    assert saving(often, WatchConfig(6, "a", "b")).save == SaveConfig(every_steps=3, keep_every=6)
    with pytest.raises(UserError, match=r"save\.every_steps is 3"):
        saving(often, WatchConfig(4, "a", "b"))


def test_mistakes_are_told_at_once() -> None:
    with pytest.raises(UserError, match="--probe-train"):
        WatchConfig(10)
    with pytest.raises(UserError, match="nothing would be probed"):
        WatchConfig(probe_train="train")
    with pytest.raises(UserError, match="probe_every"):
        WatchConfig(-1)
    with pytest.raises(UserError, match="'knn'"):
        pretrain_and_probe(Pretraining("data", "run"), WatchConfig(1, "a", "b", ("kn",)))
    with pytest.raises(UserError, match=r"detection needs --detection\.data"):
        pretrain_and_probe(Pretraining("data", "run"), WatchConfig(1, "a", "b", ("knn", "detection")))


def test_a_probe_that_would_remember_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "start", lambda: None)
    data = str(make_dataset(tmp_path / "set", 8).folder)
    with pytest.raises(UserError, match="The probe linear would learn from and be scored on the same images"):
        pretrain_and_probe(Pretraining(data, str(tmp_path / "run")), WatchConfig(1, data, data, ("linear",)))
    assert not (tmp_path / "run").exists()


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that were not probed while a run trained."""
    steps: list[int] = []
    finish = Watcher.finish
    monkeypatch.setattr(online, "_LOOK_EVERY_S", 0.1)
    monkeypatch.setattr(Watcher, "finish", lambda self: steps.extend(finish(self)))
    return steps


@pytest.mark.ray
def test_a_checkpoint_is_probed_before_training_ends(
    ray_session: None, tmp_path: Path, left: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_dataset(tmp_path / "set", 40)
    run, _ = make_run(dataset, tmp_path / "run")
    told = threading.Event()

    def training(config: Pretraining, say: Any) -> Run:
        """Has its checkpoint, and does not end before it was probed."""
        with lock.DriverLock(run.folder, "run"):
            assert told.wait(120)
        return run

    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        told.set()

    monkeypatch.setattr(online, "pretrain", training)
    data, step = str(dataset.folder), run.newest().step
    pretrain_and_probe(run.config(), WatchConfig(step, data, data), say)
    assert left == []
    assert [line.partition(" knn/")[0] for line in said] == [f"probe of step {step}:"]
    assert {row["step"] for row in rows_of(run)} == {step}


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_is_probed_while_it_trains(ray_session: None, tmp_path: Path, left: list[int]) -> None:
    data = str(make_dataset(tmp_path / "set", 64).folder)
    config = Pretraining(
        data,
        str(tmp_path / "run"),
        epochs=80,
        batch_size=16,
        workers=1,
        log_every=40,
        view=ViewConfig(image_size=16),
        parts={"pirl": Pirl(num_negatives=32, dim=16)},
    )
    run = pretrain_and_probe(config, WatchConfig(80, data, data), lambda _: None)
    steps = {80, 160, 240, 320}
    assert {row["step"] for row in rows_of(run)} == steps
    scored = {row["step"] for row in run.metrics() if any(name.startswith("probe/knn") for name in row)}
    assert scored == steps
    assert set(left) < steps


@pytest.mark.parametrize(
    ("total", "free", "room"), [(4, 4, False), (4, 3, False), (4, 2, True), (2, 0, False)]
)
def test_gpus_are_taken_only_while_the_trainers_have_theirs(
    run: Run, monkeypatch: pytest.MonkeyPatch, total: int, free: int, room: bool
) -> None:
    """Two train. Before they begin, between two legs and after one has died, some of what looks free is theirs."""
    import ray

    machines = placement.Machines(({"CPU": 8.0, "GPU": float(total)},))
    monkeypatch.setattr(placement, "machines", lambda: machines)
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 0.0, "GPU": float(free)})
    watcher = watching(run, [])
    watcher.trainers = 2
    assert watcher._room(4) is room

"""Online evaluation: its steps, failures, and where the values are written."""

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
from raysl.evaluation.online import ERROR, OnlineConfig, OnlineEvaluator, pretrain_and_probe, with_checkpoints
from raysl.evaluation.results import add_rows, protocol_hash, rows_of
from raysl.extraction import FeatureProtocol
from raysl.objectives.pirl import Config as Pirl
from raysl.probes.knn import Config
from raysl.ray_cluster import placement
from raysl.run import Run, jsonl
from raysl.storage import Folder, lock
from tests.data import make_dataset
from tests.extraction.test_feature_tasks import make_run


def row(step: int, **changes: Any) -> dict[str, Any]:
    base = {"probe": "knn", "name": "top1", "layer": "pooled", "encoder": "trained", "seed": 0, "step": step}
    return {
        **base,
        "protocol": protocol_hash(
            "knn", Config(), FeatureProtocol(ViewConfig().image_size), probes.REESTIMATED
        ),
        "train": "t",
        "test": "u",
        "value": step / 10,
        "primary": True,
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


def evaluator_of(run: Run, names: tuple[str, ...] = ("knn",)) -> OnlineEvaluator:
    """Return an evaluator of data sets with the fingerprints "t" and "u"."""
    manifest = DataSet.open(run.metadata()["data"]["uri"]).manifest
    train, test = (DataSet(Folder(name), replace(manifest, fingerprint=name)) for name in ("t", "u"))
    return OnlineEvaluator(run, OnlineConfig(2, "train", "test", names), train, test)


def fake_probe(run: Run, asked: list[Any], fails: tuple[int, ...] = ()) -> Any:
    """Return a replacement of `probe`."""

    def probe(
        run: Run, *arguments: Any, checkpoint: Any, low_priority: bool, **rest: Any
    ) -> list[dict[str, Any]]:
        asked.append((checkpoint.step, low_priority))
        if checkpoint.step in fails:
            raise RuntimeError("the probe broke")
        add_rows(run, [row(checkpoint.step)])
        return [row(checkpoint.step)]

    return probe


def test_remaining_checkpoints_are_probed_after_the_last_step(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "raysl.evaluation")
    asked: list[Any] = []
    monkeypatch.setattr(online, "probe", fake_probe(run, asked))
    others = [row(4, **{name: "other"}) for name in ("protocol", "train", "test", "layer", "encoder")]
    add_rows(run, [row(2), *others])
    evaluator = evaluator_of(run)
    assert [at.step for at in evaluator.due(["knn"], evaluator._rows())] == [4]
    assert evaluator.finish() == [4, 5]
    assert asked == [(4, False), (5, False)]
    assert run.metrics() == [
        {"step": 2, "loss": 1.0, "probe/knn/top1": 0.2},
        {"step": 4, "loss": 1.0, "probe/knn/top1": 0.4},
        {"step": 5, "probe/knn/top1": 0.5},
    ]
    assert caplog.messages == ["Probes of step 4: knn/top1 40.0 %", "Probes of step 5: knn/top1 50.0 %"]
    assert run.folder.exists(online.TENSORBOARD)
    assert evaluator.finish() == []
    assert len(asked) == 2


def test_the_newest_checkpoint_is_probed_while_the_run_trains(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    machines = placement.Machines(({"CPU": 2.0},))
    monkeypatch.setattr(online, "_LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(placement, "machines", lambda: machines)
    evaluator = evaluator_of(run)

    def probe(run: Run, *arguments: Any, **rest: Any) -> list[dict[str, Any]]:
        if len(asked) == 1:
            evaluator.training_ended.set()
        return fake_probe(run, asked)(run, *arguments, **rest)  # type: ignore[no-any-return]

    monkeypatch.setattr(online, "probe", probe)
    looked: list[bool] = []

    def held_here(folder: Folder) -> bool:
        looked.append(len(looked) > 2)
        assert not asked or looked[-1]
        return looked[-1]

    # Before this run begins, the folder may hold another run.
    monkeypatch.setattr(lock, "held_here", held_here)
    thread = threading.Thread(target=evaluator.follow)
    thread.start()
    thread.join(60)
    assert asked == [(4, True), (2, True)]
    assert looked == [False] * 3 + [True] * 2


def test_a_failing_probe_does_not_stop_the_others(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "raysl.evaluation")
    asked: list[Any] = []
    monkeypatch.setattr(online, "probe", fake_probe(run, asked, fails=(4,)))
    evaluator_of(run).finish()
    assert [step for step, _ in asked] == [2, 4, 5]
    assert "The probe of step 4 failed: the probe broke" in caplog.messages[1]
    assert b"RuntimeError" in run.folder.read(ERROR)
    assert {row["step"] for row in run.metrics() if "probe/knn/top1" in row} == {2, 5}


def test_probes_after_a_failing_probe_are_run(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "raysl.evaluation")
    asked: list[Any] = []

    def probe(run: Run, *_: Any, **options: Any) -> None:
        asked.append((options["checkpoint"].step, options["probes"]))
        for name in options["probes"]:
            if name == "svm":
                raise UserError("svm broke.")
            protocol = protocol_hash(
                name,
                probes.load(name)[0](),
                FeatureProtocol(run.config().view.image_size),
                probes.REESTIMATED,
            )
            add_rows(run, [row(options["checkpoint"].step, probe=name, protocol=protocol)])

    monkeypatch.setattr(online, "probe", probe)
    add_rows(run, [row(2), row(4)])
    evaluator = evaluator_of(run, ("knn", "svm", "linear"))
    assert evaluator.finish() == [2, 4, 5]
    first = [(2, ["svm", "linear"]), (2, ["linear"]), (4, ["svm", "linear"]), (4, ["linear"])]
    assert asked == [*first, (5, ["knn", "svm", "linear"]), (5, ["linear"])]
    assert "The probe of step 5 failed: svm broke." in caplog.messages[-2]
    assert caplog.messages[-1] == "Probes of step 5: knn/top1 50.0 %, linear/top1 50.0 %"
    assert all({"probe/knn/top1", "probe/linear/top1"} <= one.keys() for one in run.metrics())
    assert evaluator.finish() == [2, 4, 5]
    assert asked[-1] == (5, ["svm"])


def test_checkpoints_are_saved_where_probes_are() -> None:
    config = Pretraining("data", "run")
    assert with_checkpoints(config, OnlineConfig(6, "a", "b")).save == SaveConfig(every_steps=6, keep_every=6)
    often = Pretraining("data", "run", save=SaveConfig(every_steps=3))
    assert with_checkpoints(often, OnlineConfig(6, "a", "b")).save == SaveConfig(every_steps=3, keep_every=6)
    with pytest.raises(UserError, match=r"--save\.every-steps is 3"):
        with_checkpoints(often, OnlineConfig(4, "a", "b"))


def test_mistakes_are_refused_at_once() -> None:
    with pytest.raises(UserError, match="--train and --test"):
        OnlineConfig(10)
    with pytest.raises(UserError, match="nothing would be probed"):
        OnlineConfig(train="train")
    with pytest.raises(UserError, match="--probe-every"):
        OnlineConfig(-1)
    with pytest.raises(UserError, match="'knn'"):
        pretrain_and_probe(Pretraining("data", "run"), OnlineConfig(1, "a", "b", ("kn",)))
    with pytest.raises(UserError, match=r"detection needs --detection\.data"):
        pretrain_and_probe(Pretraining("data", "run"), OnlineConfig(1, "a", "b", ("knn", "detection")))


def test_scoring_on_the_train_images_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "start", lambda: None)
    data = str(make_dataset(tmp_path / "set", 8).folder)
    with pytest.raises(UserError, match="The probe linear would learn from and be scored on the same images"):
        pretrain_and_probe(Pretraining(data, str(tmp_path / "run")), OnlineConfig(1, data, data, ("linear",)))
    assert not (tmp_path / "run").exists()


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the steps that were not probed while a run trained."""
    steps: list[int] = []
    finish = OnlineEvaluator.finish
    monkeypatch.setattr(online, "_LOOK_EVERY_S", 0.1)
    monkeypatch.setattr(OnlineEvaluator, "finish", lambda self: steps.extend(finish(self)))
    return steps


@pytest.mark.ray
def test_a_checkpoint_is_probed_before_training_ends(
    ray_session: None, tmp_path: Path, left: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_dataset(tmp_path / "set", 40)
    run, _ = make_run(dataset, tmp_path / "run")
    reported = threading.Event()
    report = OnlineEvaluator._report

    def training(config: Pretraining, **_: object) -> Run:
        """Hold the lock of the run until its checkpoint was probed."""
        with lock.DriverLock(run.folder, "run"):
            assert reported.wait(120)
        return run

    def reporting(self: OnlineEvaluator, step: int, names: Any) -> None:
        report(self, step, names)
        reported.set()

    monkeypatch.setattr(online, "pretrain", training)
    monkeypatch.setattr(OnlineEvaluator, "_report", reporting)
    data, step = str(dataset.folder), run.newest().step
    pretrain_and_probe(run.config(), OnlineConfig(step, data, data))
    assert left == []
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
    run = pretrain_and_probe(config, OnlineConfig(80, data, data))
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
    """Two trainers need a GPU each; before they begin or between two attempts, a free GPU may be theirs."""
    import ray

    machines = placement.Machines(({"CPU": 8.0, "GPU": float(total)},))
    monkeypatch.setattr(placement, "machines", lambda: machines)
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 0.0, "GPU": float(free)})
    evaluator = evaluator_of(run)
    evaluator.trainers = 2
    assert evaluator._has_free_gpu(4) is room

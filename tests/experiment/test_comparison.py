"""Methods under equal conditions: what differs between their runs, and what is not done again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raysl.errors import UserError
from raysl.evaluation.results import protocol_hash
from raysl.experiment import comparison
from raysl.experiment.comparison import METHODS, ComparisonFlags, measured, settings, small
from raysl.extraction import FeatureProtocol
from raysl.probes import REESTIMATED
from raysl.probes.knn import Config as Knn
from raysl.run import Run
from raysl.storage import Folder
from tests.data import make_dataset, write_rows
from tests.evaluation.test_results import row
from tests.extraction.test_feature_tasks import make_run


def test_runs_differ_in_method_alone(tmp_path: Path) -> None:
    data = str(make_dataset(tmp_path / "set", 40).folder)
    flags = ComparisonFlags(data, images=80, workers=1)
    configs = {method: settings(flags, method, 3, data, Folder(str(tmp_path))) for method in METHODS}
    assert len({config.run for config in configs.values()}) == len(METHODS)
    assert {(c.epochs, c.seed, c.batch_size, c.optim, c.view) for c in configs.values()} == {
        (2.0, 3, 128, configs["pirl-jigsaw"].optim, configs["pirl-jigsaw"].view)
    }
    of_banks = [
        configs[method] for method in ("npid", "pirl-rotation", "pirl-jigsaw", "pirl-rotation+jigsaw")
    ]
    # What defaults.choose_defaults chooses for small images.
    assert {config.bank.momentum for config in of_banks} == {0.0}
    assert [config.parts["jigsaw"].grid for config in of_banks if "jigsaw" in config.parts] == [2, 2]
    assert configs["distill"].parts["distill"].teacher == configs["supervised"].run
    assert (
        configs["pirl-jigsaw"].parts["pirl"].num_negatives
        == configs["npid"].parts["npid"].num_negatives
        == 39
    )


def test_local_draws_images_unless_others_are_named() -> None:
    assert small(ComparisonFlags(local=True)).data == "shapes:5000"
    assert small(ComparisonFlags("mine", seeds=(4, 5), local=True)).data == "mine"
    assert small(ComparisonFlags(seeds=(4, 5), local=True)).seeds == (4, 5)
    assert small(ComparisonFlags(local=True)).seeds == (0,)
    assert small(ComparisonFlags()) == ComparisonFlags()


def test_what_was_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(comparison, "probe", lambda run, train, test, probes, **_: asked.append(probes))
    dataset = make_dataset(tmp_path / "set", 40)
    run, _ = make_run(dataset, tmp_path / "run")
    flags = ComparisonFlags(str(dataset.folder), runs=str(tmp_path))
    protocol = protocol_hash("knn", Knn(), FeatureProtocol(16), REESTIMATED)
    data = {"train": dataset.manifest.fingerprint, "test": dataset.manifest.fingerprint}
    there = row(probe="knn", protocol=protocol, layer="pooled", **data)
    untrained = {**there, "encoder": "random", "step": 0}
    write_rows(run.folder, [there, untrained])
    measured([run], flags, ["knn"])
    assert asked == []
    measured([run], flags, ["knn", "linear"])
    measured([run], flags, ["knn"], layers=["all"])
    measured([run], flags, ["knn"], configs={"knn": Knn(ks=(3,))})
    for left in ([there], [{**there, "step": 4}, untrained]):
        write_rows(run.folder, left)
        measured([run], flags, ["knn"])
    assert asked == [["linear"], ["knn"], ["knn"], ["knn"], ["knn"]]
    # Learned from other images.
    write_rows(run.folder, [{**there, "train": "others"}, {**untrained, "train": "others"}])
    measured([run], flags, ["knn"])
    assert asked[5:] == [["knn"]]


def test_runs_that_started_alike_share_their_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(comparison, "probe", lambda *_, encoders, **rest: asked.append(encoders))
    dataset = make_dataset(tmp_path / "set", 40)
    runs = [make_run(dataset, tmp_path / name)[0] for name in ("one", "two")]
    measured(runs, ComparisonFlags(str(dataset.folder), runs=str(tmp_path)), ["knn"])
    assert list(map(list, asked)) == [["trained", "random"], ["trained"]]


def test_what_cannot_be_probed_is_not_trained(tmp_path: Path) -> None:
    data = str(make_dataset(tmp_path / "set", 40).folder)
    flags = ComparisonFlags(data, runs=str(tmp_path / "runs"), methods=("predict-rotation",), seeds=(3,))
    with pytest.raises(UserError, match="The probe linear would learn from and be scored on the same images"):
        comparison.trained(flags, ["knn", "linear"])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("workers", "trained"), [(2, (2, False)), (0, (1, True))])
def test_clusterfit_has_the_run_of_its_seed_as_teacher(
    workers: int, trained: tuple[int, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = str(make_dataset(tmp_path / "set", 40).folder)
    fitted: list[Any] = []
    monkeypatch.setattr(comparison, "pretrained", lambda config, flags: Run(Folder(config.run)))
    monkeypatch.setattr(
        comparison, "clusterfit", lambda config, student, local: fitted.append((config, student, local))
    )
    runs = str(tmp_path)
    flags = ComparisonFlags(
        data, runs=runs, methods=("clusterfit",), seeds=(3,), teacher="predict-rotation", workers=workers
    )
    comparison.trained(flags, [])
    ((config, student, local),) = fitted
    assert (student.workers, local) == trained
    assert (config.teacher, config.k) == (f"{runs}/predict-rotation-3", 300)
    assert (student.run, student.seed) == (f"{runs}/clusterfit-predict-rotation-300-3", 3)
    last = comparison.folder_of(flags, "clusterfit", 3, data, Folder(runs))
    assert last == f"{student.run}/round-1/run"

"""The verbs of sweeps: which flags go where, exit codes, and mistakes that leave before Ray starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raysl import api, ray_cluster
from raysl.__main__ import main
from raysl.config import Pretraining, defaults
from raysl.ray_cluster.placement import Machines
from raysl.tuning.config import SweepConfig
from tests.data import make_dataset

SWEEP = "sweep --data shapes:50 --test shapes:60 --out sweep"


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def starts() -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray_cluster, "start", starts)
    monkeypatch.chdir(tmp_path)


def test_flags_of_a_sweep_and_of_its_runs_are_one_list(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[dict[str, Any], SweepConfig]] = []

    def sweep(config: SweepConfig, base: dict[str, Any]) -> list[dict[str, Any]]:
        seen.append((base, config))
        return []

    monkeypatch.setattr("raysl.api.sweep", sweep)
    monkeypatch.setattr("raysl.tuning.results.SweepResults.open", lambda uri: uri)
    monkeypatch.setattr("raysl.tuning.results.render", str)
    flags = "--epochs 3 --vary temperature=0.1,0.2 lam --data D --seeds 0 1 2 --pirl.head bn --test T --out S"
    main(["sweep", *flags.split()])
    ((given, config),) = seen
    base = defaults.from_fields({**given, "run": "-"})
    assert (base.data, base.epochs, base.parts["pirl"].head) == ("D", 3, "bn")
    assert config == SweepConfig("S", ("temperature=0.1,0.2", "lam"), test="T", seeds=(0, 1, 2))


@pytest.mark.parametrize("base", [{"epochs": 7}, Pretraining("unused", "-", "simclr", epochs=7)])
def test_a_sweep_in_python_takes_the_fields_of_its_runs(
    base: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tried: list[tuple[Pretraining, SweepConfig, dict[str, Any] | None]] = []
    monkeypatch.setattr("raysl.ray_cluster.start", lambda: None)
    monkeypatch.setattr("raysl.ray_cluster.placement.machines", lambda: Machines(({"CPU": 2.0},)))
    monkeypatch.setattr("raysl.tuning.sweep.sweep", lambda *given: tried.append(given))
    images = make_dataset(tmp_path / "images", 40)
    vary = {"temperature": [0.1, 0.2], "optim.lr": "0.01..0.1", "simclr.norm": None, "optim.clip_norm": 1}
    own: dict[str, Any] = {"seeds": (3,), "train": images, "searcher": "random", "seed": 5}
    runs: dict[str, Any] = {"method": "simclr", "batch_size": 8, "simclr": {"dim": 16}}
    api.sweep(images, out=tmp_path / "out", vary=vary, base=base, **own, **runs)
    ((learner, config, given),) = tried
    assert given is None if isinstance(base, Pretraining) else given == {**base, **runs}
    assert (learner.method, learner.epochs, learner.batch_size) == ("simclr", 7, 8)
    assert (learner.parts["simclr"].dim, learner.data, learner.seed) == (16, str(images.folder), 0)
    assert config.vary == ("temperature=0.1,0.2", "optim.lr=0.01..0.1", "simclr.norm", "optim.clip_norm=1")
    assert (config.seeds, config.train, config.seed) == ((3,), str(images.folder), 5)


def test_fields_that_trials_vary_are_not_listed_as_chosen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tried: list[Pretraining] = []
    monkeypatch.setattr("raysl.ray_cluster.start", lambda: None)
    monkeypatch.setattr("raysl.ray_cluster.placement.machines", lambda: Machines(({"CPU": 2.0},)))
    monkeypatch.setattr("raysl.tuning.sweep.sweep", lambda base, config, given: tried.append(base))
    images = make_dataset(tmp_path / "images", 40)
    with caplog.at_level("INFO", "raysl"):
        api.sweep(images, out=tmp_path / "out", vary=("temperature=0.1,0.2", "optim.lr=0.1,0.3"))
    lines = "\n".join(caplog.messages)
    assert "--pirl.head bn" in lines
    assert "--pirl.temperature" not in lines
    assert "--optim.lr" not in lines
    assert (tried[0].parts["pirl"].temperature, tried[0].optim.lr) == (0.2, 0.12)


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        (f"{SWEEP} --vary temperatur", "Did you mean 'pirl.temperature'"),
        (f"{SWEEP} --vary lam=0.5,2", "The trial with pirl.lam=2 could not run"),
        (f"{SWEEP} --vary lam --epochs", "--epochs"),
        (f"{SWEEP} --vary lam --sheduler asha", "--sheduler"),
        (f"{SWEEP} --vary lam --searcher optuna", "the extra 'search'"),
        ("report nothing", "Neither a sweep nor a run lies at"),
        ("reproduce nothing", "No run at 'nothing'"),
    ],
)
def test_a_mistake_leaves_with_2_before_anything_begins(
    command: str,
    answer: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "optuna" else object())
    with pytest.raises(SystemExit) as left:
        main(command.split())
    assert left.value.code == 2
    assert answer in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

"""What experiments share: their flags, what is not done twice, and how mistakes are answered."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from raysl.config import Pretraining
from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.evaluation.results import protocol_hash
from raysl.experiment import script as scripts
from raysl.experiment.comparison import ComparisonFlags
from raysl.experiment.script import Flags, command, drawn, held_out, locally, pretrain_seeds, probed
from raysl.extraction import FeatureProtocol
from raysl.ingestion import splits
from raysl.probes import REESTIMATED
from raysl.probes.invariance import Config as Invariance
from raysl.probes.knn import Config as Knn
from raysl.probes.linear import Config as Linear
from raysl.run import Run
from raysl.storage import Folder
from tests.data import make_dataset, write_rows
from tests.evaluation.test_results import row
from tests.extraction.test_feature_tasks import make_run

# sweep_tune.py shows a plain `tune.Tuner`, without the helpers of the experiments.
SCRIPTS = [
    file
    for file in sorted((Path(__file__).parents[2] / "experiments").glob("*.py"))
    if file.stem != "sweep_tune"
]


def script(file: Path) -> ModuleType:
    """The module of a script, which does nothing when it is imported."""
    spec = importlib.util.spec_from_file_location(f"experiment_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.stem)
def test_every_script_takes_the_common_flags(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Flags] = []
    monkeypatch.syspath_prepend(str(file.parent))  # reproduce_lectures imports the others
    module = script(file)
    monkeypatch.setattr(sys, "argv", [file.name, "--data", "D", "--seeds", "3", "4", "--workers", "1"])
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, Flags)]
    own = next(kind for kind in kinds if kind not in (Flags, ComparisonFlags))
    # Another meaning under a flag that all line-ups have would change their runs.
    common = {field.name for kind in own.__mro__[1:-1] for field in fields(kind)}
    assert set(own.__annotations__) & common <= {"data", "out", "runs", "seeds", "workers", "methods"}
    command(seen.append, own)
    assert (seen[0].data, seen[0].seeds, seen[0].workers) == ("D", (3, 4), 1)
    assert callable(module.main)


def test_local_results_go_to_a_place_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Flags] = []
    for arguments in (["--local"], ["--local", "--runs", "mine"], []):
        monkeypatch.setattr(sys, "argv", ["script", *arguments])
        command(seen.append, Flags)
    assert seen[0].runs not in ("runs", "mine")
    assert seen[0].out != "results"
    assert seen[1].runs == "mine"
    assert seen[1].out != "results"
    assert (seen[2].runs, seen[2].out) == ("runs", "results")


def test_a_mistake_is_a_paragraph_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(flags: Flags) -> None:
        raise UserError(f"{flags.data} is no good.")

    monkeypatch.setattr(sys, "argv", ["script", "--data", "D"])
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    monkeypatch.setattr(sys.modules["ray"], "shutdown", lambda: None, raising=False)
    with pytest.raises(SystemExit) as left:
        command(wrong, Flags)
    assert left.value.code == 2
    assert capsys.readouterr().err == "experiment: D is no good.\n"


def test_scripts_show_what_the_library_logs() -> None:
    code = (
        "import logging\n"
        "from raysl.experiment.script import Flags, command\n"
        "command(lambda flags: logging.getLogger('raysl.training').info('Step 1'), Flags)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "Step 1\n"


def test_a_run_that_was_probed_is_not_probed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_dataset(tmp_path / "set", 40)
    run, _ = make_run(dataset, tmp_path / "run")
    data = str(dataset.folder)
    asked: list[Any] = []
    monkeypatch.setattr(scripts, "pretrain", lambda config, **_: run)

    def probe(run: Run, train: str, test: str, probes: tuple[str, ...]) -> list[dict[str, Any]]:
        asked.append(probes)
        return []

    monkeypatch.setattr(scripts, "probe", probe)
    protocol = protocol_hash("knn", Knn(), FeatureProtocol(run.config().view.image_size), REESTIMATED)
    fingerprint = dataset.manifest.fingerprint
    there = row(probe="knn", protocol=protocol, train=fingerprint, test=fingerprint, step=run.newest().step)
    write_rows(run.folder, [there])
    assert probed(run.config(), data, data, Flags()) == [there]
    assert asked == []
    # Rows of another protocol, as other experiments leave them, are not its own.
    write_rows(run.folder, [{**there, "protocol": "other"}])
    assert probed(run.config(), data, data, Flags()) == []
    assert asked == [("knn",)]


def test_every_seed_has_a_run_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Pretraining] = []

    def one(config: Pretraining, train: str, test: str, flags: Flags) -> list[dict[str, Any]]:
        runs.append(config)
        return [{"seed": config.seed}]

    monkeypatch.setattr(scripts, "probed", one)
    monkeypatch.setattr(scripts, "tables", lambda rows: [])
    dataset = make_dataset(tmp_path / "set", 20)
    flags = Flags(str(dataset.folder), str(tmp_path / "out"), str(tmp_path / "runs"), (0, 5), workers=1)
    assert pretrain_seeds(Pretraining("-", "-", epochs=3), flags) == [{"seed": 0}, {"seed": 5}]
    assert [config.seed for config in runs] == [0, 5]
    assert len({config.run for config in runs}) == 2
    assert {(config.data, config.epochs, config.workers) for config in runs} == {(str(dataset.folder), 3, 1)}
    assert len(Folder(flags.out).read("rows.jsonl").splitlines()) == 2


def test_drawn_images_are_kept(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", 20)
    flags = Flags(str(dataset.folder), runs=str(tmp_path / "runs"))
    assert drawn(flags, 8).num_images == 8
    assert drawn(flags, 8) == drawn(replace(flags, out="elsewhere"), 8)
    assert drawn(flags, 30) == dataset


@pytest.mark.parametrize("flags", [Flags(workers=0), Flags(local=True)])
def test_runs_train_in_this_process(flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        scripts, "pretrain", lambda config, local=False: asked.append((config.workers, local))
    )
    monkeypatch.setattr(scripts, "open_or_ingest", lambda data: None)
    scripts.pretrained(Pretraining("set", "run", workers=flags.run_workers), flags)
    assert asked == [(1, True)]
    assert Flags(workers=3).run_workers == 3


def test_local_leaves_alone_what_was_asked_for() -> None:
    assert locally(Flags(), data="shapes:9") == Flags()
    small = locally(Flags(seeds=(4, 5), local=True), data="shapes:9", workers=1)
    assert (small.data, small.seeds, small.workers) == ("shapes:9", (4, 5), 1)
    assert locally(Flags("mine", workers=4, local=True), data="shapes:9", workers=1) == Flags(
        "mine", workers=4, seeds=(0,), local=True
    )


def test_sweeps_compare_trials_on_train_images_that_were_not_drawn(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", 20)
    flags = Flags(str(dataset.folder), runs=str(tmp_path / "runs"))
    images = drawn(flags, 8)
    validation = DataSet.open(held_out(flags, images))
    seen, judged = (
        one.read(np.arange(one.num_images)).column("image").to_pylist() for one in (images, validation)
    )
    assert len({*seen, *judged}) == len(seen) + len(judged) == 20
    assert held_out(flags, dataset) == ""


def test_the_sweep_of_pirl_takes_values_in_place_of_those_of_the_paper() -> None:
    module = script(next(file for file in SCRIPTS if file.stem == "sweep_pirl"))
    flags = module.SweepFlags(figure="negatives", values=(64, 4096))
    assert module.settings(flags, 8000).vary == ("num_negatives=64,4096",)
    assert module.settings(replace(flags, values=()), 1000).vary == ("num_negatives=64,256",)


def test_splits(tmp_path: Path) -> None:
    folder = str(make_dataset(tmp_path / "set", 4).folder)
    assert splits("shapes:50") == ("shapes:50#train", "shapes:1000#test")
    assert splits("shapes:50?plain=1") == ("shapes:50?plain=1#train", "shapes:1000?plain=1#test")
    assert splits(folder) == (folder, folder)
    assert splits("nowhere") == ("nowhere#train", "nowhere#test")


def test_raw_pixels_are_no_seed_of_the_untrained_backbone_in_the_scatter(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    module = script(next(file for file in SCRIPTS if file.stem == "invariance_vs_performance"))
    run, _ = make_run(make_dataset(tmp_path / "set", 40), tmp_path / "run")
    rows = [
        row(probe=probe, name=name, layer="pooled", protocol=protocol, train="t", test="u", **of)
        for probe, name, config in (("linear", "top1", Linear()), ("invariance", "closer", Invariance()))
        for protocol in [protocol_hash(probe, config, FeatureProtocol(16), REESTIMATED)]
        for of in ({}, {"encoder": "random", "step": 0}, {"encoder": "pixels", "step": 0})
        if (probe, of.get("encoder")) != ("invariance", "pixels")
    ]
    write_rows(run.folder, rows)
    assert module.scatter([run], "t", "u", Invariance()).startswith(b"\x89PNG")

"""Objectives, transforms and probes from files and modules outside of raysl."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

import raysl
from raysl import plugins, pretext, probes
from raysl.__main__ import main
from raysl.backbone.network import BackboneConfig
from raysl.config import Pretraining, methods
from raysl.errors import UserError, name_plugin_in_errors
from raysl.rng import ImageRng
from raysl.run import Run
from raysl.storage import Folder
from raysl.stream.reader import StreamConfig
from raysl.training.launch import pretrain
from raysl.tuning.journal import FORMAT, Journal
from raysl.tuning.results import SweepResults
from tests.data import make_dataset
from tests.objectives.setups import batch, setup

EXAMPLES = Path(__file__).parents[1] / "examples"

TRANSFORM = '''"""Mirror top and bottom."""
from dataclasses import dataclass
from raysl.augment import SourceCrop
from raysl.pretext import Transformed

@dataclass(frozen=True)
class Config:
    pass

class UpsideDown:
    num_crops, num_labels, color = 1, 2, "crops"

    def __init__(self, config, geometry):
        self.source = SourceCrop(geometry.image_size, geometry.min_scale)

    def transform(self, images_bchw, image_rng):
        label_b = image_rng.integers("flip", 2)[:, 0]
        crops = images_bchw.clone()
        crops[label_b == 1] = crops[label_b == 1].flip(2)
        return Transformed(crops[:, None], label_b)

    def describe(self):
        return {}
'''

OBJECTIVE = '''"""Classify the change."""
from dataclasses import dataclass
from torch import nn
from torch.nn.functional import cross_entropy
from raysl.backbone.network import encode
from raysl.objectives import Loss

@dataclass(frozen=True)
class Config:
    pass

class Guess(nn.Module):
    predicts, bank_dim = True, 0

    def __init__(self, config, setup):
        super().__init__()
        self.views = {"changed": setup.transform("guess")}
        self.classify = nn.Linear(setup.width, self.views["changed"].num_labels)

    def forward(self, backbone, views):
        return {"logits": self.classify(encode(backbone, views["changed"])[:, 0])}

    def loss(self, outputs, batch, bank):
        return Loss(cross_entropy(outputs["logits"], batch.targets["changed"]), {})
'''


PROBE = '''"""The nearest mean of a class."""
from dataclasses import dataclass
import numpy as np
from raysl.probes import Row, Settings

@dataclass(frozen=True)
class Config(Settings):
    power: float = 2.0

class Ncm:
    primary_metric, dims = "top1", 0

    def __init__(self, config):
        self.power = config.power

    def run(self, train, test):
        means = [train.features_nd[train.labels_n == c].mean(0) for c in range(train.labels_n.max() + 1)]
        distance_nc = (abs(test.features_nd[:, None] - np.stack(means)) ** self.power).sum(2)
        yield Row("top1", float((distance_nc.argmin(1) == test.labels_n).mean()))
'''


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(plugins.TRUSTED_VARIABLE, "")
    before, tried = {room: dict(files) for room, files in plugins._added.items()}, set(plugins._tried)
    yield
    for room, files in plugins._added.items():
        files.clear()
        files.update(before[room])
    plugins._tried &= tried
    plugins._replaceable.clear()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "upside_down.py"
    path.write_text(TRANSFORM)
    return path


def test_a_file_is_found_by_its_name_and_remembered_with_the_run(file: Path) -> None:
    config = Pretraining("d", "r", "predict-upside_down", plugin=(str(file),))
    assert "upside_down" in pretext.names()
    assert set(config.parts) == {"predict", "upside_down"}
    # A worker is another process, which has the configuration only.
    code = (
        "import json, sys; from raysl.config import Pretraining; from raysl.model import DatasetInfo, Model; "
        "c = Pretraining.from_json(json.loads(sys.argv[1])); print(Model(c, DatasetInfo(64)).objective.classify)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(config.to_json())], capture_output=True, text=True, check=True
    )
    assert "out_features=2" in done.stdout


def test_a_task_of_ray_gets_the_code_of_a_file(file: Path) -> None:
    from ray import cloudpickle

    plugins.load_module(str(file))
    made = pretext.build("upside_down", {}, pretext.Geometry(32))
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).source.size)"
    done = subprocess.run([sys.executable, "-c", code], input=cloudpickle.dumps(made), capture_output=True)
    assert done.stdout.strip() == b"32", done.stderr.decode()


@pytest.mark.slow
@pytest.mark.ray
def test_workers_and_data_tasks_of_ray_run_the_code_of_plugins(
    file: Path, tmp_path: Path, ray_session: None
) -> None:
    objective = tmp_path / "guess.py"
    objective.write_text(OBJECTIVE)
    config = Pretraining(
        data=str(make_dataset(tmp_path / "set", 40).folder),
        run=str(tmp_path / "run"),
        method="guess-upside_down",
        epochs=1,
        batch_size=8,
        workers=2,
        log_every=1,
        plugin=(str(file), str(objective)),
    )
    run = pretrain(config)
    assert run.newest().step == 5
    assert "objective.classify.weight" in run.newest().state()["network"]


@pytest.mark.parametrize("way", ["flag", "environment", "python"])
def test_a_probe_from_a_file_measures(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAYSL_CACHE", str(tmp_path / "cache"))
    file, out = tmp_path / "ncm.py", tmp_path / "out"
    file.write_text(PROBE)
    data = [str(make_dataset(tmp_path / name, 40, seed=seed).folder) for seed, name in enumerate("ab")]
    if way == "python":
        rows = raysl.probe("random", data[0], data[1], "ncm", out=out, plugin=file, ncm={"power": 1})
        assert [(row["probe"], row["name"]) for row in rows] == [("ncm", "top1")]
        return
    monkeypatch.setenv(plugins.TRUSTED_VARIABLE, str(file) if way == "environment" else "")
    given = ["--plugin", str(file)] if way == "flag" else []
    command = ["probe", "random", "--train", data[0], "--test", data[1], "--out", str(out), "--probes", "ncm"]
    main([*command, "--ncm.power", "1", *given])
    assert re.search("(?s)ncm.*top1", capsys.readouterr().out)


def test_a_sweep_may_compare_by_a_probe_from_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "ncm.py"
    file.write_text(PROBE)
    command = f"sweep --data nothing --out {tmp_path} --vary temperature --probe ncm --plugin {file}"
    with pytest.raises(SystemExit):
        main(command.split())
    assert "nothing' does not exist" in capsys.readouterr().err  # The probe has been found.
    plugins._added[plugins.PROBES].clear()
    with pytest.raises(UserError, match="nothing' does not exist"):
        raysl.sweep("nothing", out=tmp_path, vary="temperature", probe="ncm", plugin=str(file))


def test_a_sweep_that_a_probe_from_a_file_has_judged_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ncm.py"
    file.write_text(PROBE)
    base = Pretraining("d", "-", plugin=(str(file),)).to_json()
    dimension = {"name": "pirl.lam", "values": [0.1]}
    header = {
        "event": "sweep",
        "format": FORMAT,
        "config": {"probe": "ncm"},
        "base": base,
        "space": [dimension],
    }
    Journal(Folder(str(tmp_path))).add(json.loads(json.dumps(header)))
    for room in plugins._added.values():
        room.clear()
    monkeypatch.setenv(plugins.TRUSTED_VARIABLE, "")
    with pytest.raises(UserError, match=r"ncm\.py', which would be run now"):
        _ = SweepResults.open(str(tmp_path)).config
    plugins.trust(str(file))
    assert SweepResults.open(str(tmp_path)).config.probe == "ncm"


def test_the_methods_of_a_file_are_listed(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["methods", "--plugin", str(file)])
    assert re.search(r"upside_down +Mirror top and bottom", capsys.readouterr().out)


def test_only_what_can_be_imported_of_the_trusted_code_is_listed(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "network.py").write_text("")
    (tmp_path / "broken.py").write_text("1 / 0")
    names = [file, tmp_path / "network.py", tmp_path / "broken.py", tmp_path / "gone.py"]
    monkeypatch.setenv(plugins.TRUSTED_VARIABLE, os.pathsep.join(map(str, names)))
    plugins.names("raysl.ingestion.sources")  # Tasks that read files need no plugin, which may import torch.
    assert not caplog.records
    assert "upside_down" in pretext.names()
    assert pretext.names()
    assert [record.getMessage().count("broken.py") > 0 for record in caplog.records] == [True]


def test_of_a_trusted_package_no_other_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_networks"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "train.py").write_text("raise SystemExit(3)")
    (tmp_path / "ends.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv(
        plugins.TRUSTED_VARIABLE, os.pathsep.join(["some_networks", str(tmp_path / "ends.py")])
    )
    pretext.names()
    assert "some_networks" in sys.modules
    assert "some_networks.train" not in sys.modules


def test_a_file_that_is_named_goes_before_one_of_the_environment(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "newer" / file.name
    other.parent.mkdir()
    other.write_text(TRANSFORM)
    monkeypatch.setenv(plugins.TRUSTED_VARIABLE, str(file))
    assert "upside_down" in pretext.names()
    plugins.add_and_trust(other)
    assert plugins.module(plugins.PRETEXT, "upside_down", "transform").__file__ == str(other)
    with pytest.raises(UserError, match=r"which .* has already"):
        plugins.add_and_trust(file)


def test_a_package_may_hold_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_transforms"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "upside_down.py").write_text(TRANSFORM)
    (package / "sideways.py").write_text(TRANSFORM.replace("UpsideDown", "Sideways"))
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins.load_module("some_transforms")
    assert {"upside_down", "sideways"} <= set(pretext.names())


def test_an_installed_package_names_them_by_entry_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "their_module.py").write_text(TRANSFORM.replace("UpsideDown", "Theirs"))
    info = tmp_path / "their-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[raysl.pretext]\ntheirs = their_module\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins._entry_points.cache_clear()
    assert methods.parse("predict-theirs").transforms == ("theirs",)
    monkeypatch.undo()
    plugins._entry_points.cache_clear()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("empty.py", "", "defines no objective, transform or probe.*, and defines nothing"),
        ("my_loss.py", OBJECTIVE, "a class MyLoss .*, and defines Config, Guess"),
        ("broken.py", "import nothing_of_this_name", "cannot be imported: ModuleNotFoundError"),
        ("jigsaw.py", TRANSFORM.replace("UpsideDown", "Jigsaw"), "which raysl.pretext has already"),
    ],
)
def test_what_is_no_plugin_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        plugins.load_module(str(tmp_path / name))


def test_a_path_that_the_list_of_trusted_plugins_cannot_hold_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a:b").mkdir()
    file = tmp_path / "a:b" / "upside_down.py"
    file.write_text(TRANSFORM)
    with pytest.raises(UserError, match=r"a:b/upside_down\.py' contains ':'"):
        Pretraining("d", "r", "predict-upside_down", plugin=(str(file),))


def test_the_hash_of_a_source_follows_its_text_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "hashed.py"
    file.write_text("raise RuntimeError")
    before = plugins.source_hash("hashed")
    assert plugins.source_hash(str(file)) == before == plugins.source_hash("hashed")
    file.write_text("x = 1")
    now = plugins.source_hash(str(file))
    assert plugins.source_hash("hashed") == now != before
    plugins.import_module(str(file))
    assert plugins.source_hash(str(file)) == now
    file.write_text("x = 2")  # This process has the old version, and a new one the new version.
    assert plugins.source_hash(str(file)) not in (now, plugins.source_hash("hashed"))
    for missing in (str(tmp_path / "nothing.py"), "nothing_of_this_name", "nothing.of_this_name"):
        with pytest.raises(UserError, match=r"The source of .*nothing.* cannot be read"):
            plugins.source_hash(missing)


def test_a_missing_plugin_is_refused() -> None:
    with pytest.raises(UserError, match="there is no Python file"):
        plugins.load_module("nowhere.py")


def test_the_example_of_an_objective_is_its_papers_equation() -> None:
    plugins.load_module(str(EXAMPLES / "uniformity.py"))
    config_type, objective_type = methods.load_objective("uniformity")
    with pytest.raises(UserError, match=r"^--uniformity\.weight is -1"):
        config_type(weight=-1.0)
    backbone, of_run = setup()
    objective = objective_type(config_type(dim=8, weight=0.5), of_run)
    of = batch(objective, 5)
    outputs = objective(backbone, of.views)
    a_bd, b_bd = (outputs[view].detach().double().numpy() for view in "ab")
    np.testing.assert_allclose(np.linalg.norm(a_bd, axis=1), 1, rtol=1e-5)
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    spread = [
        np.log(np.mean([np.exp(-2 * ((x[i] - x[j]) ** 2).sum()) for i, j in pairs])) for x in (a_bd, b_bd)
    ]
    expected = ((a_bd - b_bd) ** 2).sum(1).mean() + 0.5 * np.mean(spread)
    assert objective.loss(outputs, of, None).loss.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("orders", "labels"), [("all", 6), ("cyclic", 3)])
def test_the_example_of_a_transform_permutes_channels_by_the_label(orders: str, labels: int) -> None:
    plugins.load_module(str(EXAMPLES / "color_order.py"))
    config_type, _ = pretext.load("color_order")
    made = pretext.build("color_order", {"color_order": config_type(orders=orders)}, pretext.Geometry(8))
    x = torch.arange(3, dtype=torch.uint8)[None, :, None, None].expand(200, 3, 8, 8)
    indices = np.arange(200)
    result = made.transform(x, ImageRng(0, np.zeros(200, np.int64), indices))
    assert result.target is not None
    seen = {
        (int(label), tuple(crop[:, 0, 0].tolist()))
        for label, crop in zip(result.target, result.crops_bpchw[:, 0], strict=True)
    }
    assert len(seen) == made.num_labels == labels  # each label has one order
    assert len({order for _, order in seen}) == labels
    assert (0, (0, 1, 2)) in seen
    assert all(bool((crop == crop[:, :1, :1]).all()) for crop in result.crops_bpchw[:, 0])


def test_the_example_of_a_probe_is_its_papers_equation() -> None:
    plugins.load_module(str(EXAMPLES / "class_separation.py"))
    config_type, probe_type = probes.load("class_separation")
    labels_n = np.repeat(np.arange(4), (5, 3, 8, 1))
    x = np.random.default_rng(0).normal(size=(17, 6)).astype(np.float32) + labels_n[:, None]
    data = probes.Labeled(x, labels_n)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    distance = 1 - unit @ unit.T
    pairs = [[distance[np.ix_(labels_n == i, labels_n == j)].mean() for j in range(3)] for i in range(3)]
    expected = 1 - np.mean(np.diag(pairs)) / np.mean(pairs)
    (row,) = probe_type(config_type()).run(data, data)  # the class of one image is left out
    assert row.value == pytest.approx(expected, abs=1e-6)


def _trained(tmp_path: Path, files: dict[str, str], **more: Any) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    data, plugin = str(make_dataset(tmp_path / "set", 40).folder), tuple(str(tmp_path / one) for one in files)
    given: dict[str, Any] = {"epochs": 1, "batch_size": 8, "workers": 1, "plugin": plugin, **more}
    pretrain(Pretraining(data, str(tmp_path / "run"), "guess-upside_down", **given), local=True)


@pytest.mark.parametrize("place", ["data", "trainer"])
def test_a_target_that_is_no_label_is_refused(place: Literal["data", "trainer"], tmp_path: Path) -> None:
    transform = TRANSFORM.replace("crops[:, None], label_b", "crops[:, None], label_b * 9")
    answer = (
        r"'upside_down' of '.*upside_down\.py' gave the target 9, and num_labels is 2\. .* between 0 and 1"
    )
    files = {"upside_down.py": transform, "guess.py": OBJECTIVE}
    with pytest.raises(UserError, match=answer):
        _trained(tmp_path, files, stream=StreamConfig(place=place))


@pytest.mark.parametrize("target", ["label_b.float()", "label_b[:, None]"])
def test_a_target_of_another_form_is_refused(target: str, tmp_path: Path) -> None:
    transform = TRANSFORM.replace("crops[:, None], label_b", f"crops[:, None], {target}")
    with pytest.raises(UserError, match=r"gave a target of torch.* must be int64 \(b,\)"):
        _trained(tmp_path, {"upside_down.py": transform, "guess.py": OBJECTIVE})


IN_TRANSFORM = "return Transformed", "1 / (len(crops) == 1); return Transformed"  # fails for the second image
IN_LOSS = 'targets["changed"]', 'targets["other"]'


@pytest.mark.parametrize(
    ("transform", "objective", "answer"),
    [
        (
            IN_TRANSFORM,
            ("", ""),
            r"upside_down\.py' failed in line 20, in 'transform': ZeroDivisionError: division",
        ),
        (("", ""), IN_LOSS, r"guess\.py' failed in line 24, in 'loss': KeyError: 'other'\."),
    ],
)
def test_an_error_in_a_plugin_names_its_line(
    transform: tuple[str, str], objective: tuple[str, str], answer: str, tmp_path: Path
) -> None:
    files = {"upside_down.py": TRANSFORM.replace(*transform), "guess.py": OBJECTIVE.replace(*objective)}
    with pytest.raises(UserError, match=answer):
        _trained(tmp_path, files)


def test_a_method_of_raysl_is_not_blamed() -> None:
    with pytest.raises(ZeroDivisionError), name_plugin_in_errors():
        1 / 0  # noqa: B018


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("open('/nowhere/to/be/found')", FileNotFoundError),
        ("from torch import distributed; distributed.all_reduce(None)", TypeError),
    ],
)
def test_an_error_of_the_machine_below_a_plugin_passes(line: str, error: type[Exception]) -> None:
    names: dict[str, Any] = {"__name__": "raysl_plugin_mine"}
    exec(f"def work():\n    {line}\n", names)
    with pytest.raises(error), name_plugin_in_errors():
        names["work"]()


def test_the_example_of_an_objective_trains(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "set", 40)
    given: dict[str, Any] = {
        "workers": 1,
        "method": "uniformity-rotation",
        "epochs": 1,
        "batch_size": 8,
        "plugin": (str(EXAMPLES / "uniformity.py"),),
    }
    config = Pretraining(str(data.folder), str(tmp_path / "run"), **given)
    run = pretrain(config, local=True)
    assert run.newest().step == 5
    assert {"alignment", "uniformity"} <= run.metrics()[-1].keys()


def test_code_of_a_run_is_trusted_by_any_of_its_paths_and_missed_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "net.py"
    file.write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAYSL_PLUGINS", "net.py")
    assert plugins.check_trusted([str(file)], "runs/a") == {str(file): str(file)}
    (tmp_path / "new").mkdir()
    now = file.rename(tmp_path / "new/net.py")
    with pytest.raises(
        UserError, match=r"there is no such file\. If you have moved it .* set RAYSL_PLUGINS=PLACE/net\.py"
    ):
        plugins.check_trusted([str(file)], "runs/a")
    monkeypatch.setenv("RAYSL_PLUGINS", "new/net.py")
    assert plugins.check_trusted([str(file)], "runs/a") == {str(file): str(now)}
    with pytest.raises(UserError, match=r"new/net\.py' has other content"):
        plugins.check_trusted([str(file)], "runs/a", {str(file): "0" * 16})


def test_a_run_is_opened_with_a_backbone_whose_file_has_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYSL_PLUGINS", "")
    file = tmp_path / "net.py"
    file.write_text("# a network")
    config = Pretraining("unused", str(tmp_path / "run"), backbone=BackboneConfig(f"{file}:Net"))
    run = Run.begin(config, make_dataset(tmp_path / "set", 8), {})
    monkeypatch.setenv("RAYSL_PLUGINS", str(now := file.rename(tmp_path / "network.py")))
    assert run.config().backbone.name == f"{now}:Net"

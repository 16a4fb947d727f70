"""`import raysl`: every name is there, and what callers give is checked before anything starts."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

import raysl
from raysl import UserError
from raysl.__main__ import VERBS
from raysl.api import arguments
from raysl.config import Pretraining
from raysl.run import METADATA
from raysl.run.unchanged import check_same
from raysl.storage import Folder
from raysl.storage.records import write_record
from raysl.stream.pixels import DecodeConfig
from tests.data import make_dataset

NO_PATH: Any = 3
NOT_IN_PYTHON = {"demo", "methods", "cache"}
# Images that `raysl.ingest` takes and no other verb.
IN_MEMORY: tuple[Any, ...] = (
    np.zeros((3, 8, 8), np.uint8),
    torch.zeros(3, 3, 8, 8, dtype=torch.uint8),
    [Image.new("RGB", (8, 8))],
    (["a.jpg"], [1]),
    TensorDataset(torch.zeros(3)),
)


def test_every_verb_is_a_function_and_every_name_is_typed() -> None:
    assert set(VERBS) - NOT_IN_PYTHON <= set(raysl.__all__) <= set(dir(raysl))
    stub = ast.parse(Path(raysl.__file__).with_suffix(".pyi").read_text())
    typed = {alias.name for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == set(raysl.__all__) - {"__version__"}
    for name in typed:
        assert getattr(raysl, name).__name__ == name
    assert f'version = "{raysl.__version__}"' in (Path(__file__).parents[2] / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        (lambda: raysl.pretrain("/nowhere", "run"), "'/nowhere' does not exist"),
        (lambda: raysl.pretrain("d", "r", nothing=1), "Unknown argument or part of the method"),
        (
            lambda: raysl.pretrain("d", "r", lr=0.1),
            r"'lr' is no argument of its own\. Give optim={\"lr\": \.\.\.}\.",
        ),
        (lambda: raysl.pretrain("d", "r", temperature=1), r"Give pirl={\"temperature\": \.\.\.}"),
        (
            lambda: raysl.pretrain("d", "r", method="simclr", pirl={}),
            "'simclr' has no part 'pirl'; it has 'simclr'",
        ),
        (lambda: raysl.pretrain("d", "r", optim=0.1), "an OptimConfig, a mapping of its fields, or a name"),
        (
            lambda: raysl.pretrain("d", "r", epoch=2),
            "Did you mean 'epochs'.* Known: .*, callbacks, .*, probe_every,",
        ),
        (lambda: raysl.load("/nowhere/run"), "There is no checkpoint at '/nowhere/run'"),
        (
            lambda: raysl.probe("/nowhere/run", "shapes:9", "shapes:9#test", ("knn",)),
            "There is no checkpoint at",
        ),
        (lambda: raysl.pretrain("d", "r", pirl={"temprature": 1}), "'temperature'"),
        (lambda: raysl.pretrain(raysl.Pretraining("d", "r")), r"as in raysl\.pretrain\(config="),  # type: ignore[arg-type]
        (lambda: raysl.pretrain("d"), "lacks 'run'.* Give run=FOLDER"),
        (lambda: raysl.pretrain("d", "r", callback=[]), "Did you mean 'callbacks'"),
        (lambda: raysl.pretrain("d", "r", image_size=1), "image.size is 1"),
        (
            lambda: raysl.features("random", "shapes:9", Path(__file__).parent),
            "not empty and holds no features",
        ),
        *(
            (
                call,
                f"type {type(images).__name__} is given where one path, data set or run is expected.* raysl.ingest",
            )
            for images in IN_MEMORY
            for call in (
                partial(raysl.features, "random", images, "f"),
                partial(raysl.pretrain, images, "r"),
                partial(raysl.probe, "random", images, "shapes:9#test", ("knn",)),
                partial(raysl.views, images),
            )
        ),
        (lambda: raysl.pretrain(3, "r"), "type int"),  # type: ignore[arg-type]
        (lambda: raysl.ingest("shapes:10", "d", {"shard_image": 1}), "shard_images"),  # type: ignore[arg-type]
        (lambda: raysl.sweep("d", out="o", vary=("lam",), train=Path("/nowhere")), "'d' does not exist"),
        (lambda: raysl.sweep("d", out="o", vary="lam", sample=1), "Did you mean 'samples'"),
        (lambda: raysl.sweep("d", out="o", vary="lam", lr=1), r"Give optim={\"lr\": \.\.\.}"),
        (
            lambda: raysl.sweep("d", out="o", vary={"lam": ["0.1,1"]}),
            "'lam' over '0.1,1': a value may have no comma",
        ),
        (
            lambda: raysl.sweep(raysl.Pretraining("d", "-"), out="o", vary="lam"),  # type: ignore[arg-type]
            r"`data` is expected\. Give it as base=",
        ),
        (lambda: raysl.export("/nowhere", format="onnx"), "No run at '/nowhere'"),
        (lambda: raysl.ingest("shapes:9", "d", frame="all"), "Did you mean 'frames'"),
        (lambda: raysl.sweep("d", out="o", vary=3), "vary is 3; give names of fields"),  # type: ignore[arg-type]
        *(
            (call, "is given where")
            for call in (
                partial(raysl.ingest, "shapes:9", NO_PATH),
                partial(raysl.views, "shapes:9", NO_PATH),
                partial(raysl.cluster, "nowhere", k=3, out=NO_PATH),
                partial(raysl.probe, "random", "shapes:9", "shapes:9#test", "knn", out=NO_PATH),
                partial(raysl.load, NO_PATH),
                partial(raysl.DataSet.open, NO_PATH),
                partial(raysl.Run.open, NO_PATH),
            )
        ),
        (lambda: raysl.report([]), "No folder"),
        (lambda: raysl.views("d", "picture.doc"), "ends in .png"),
        (lambda: raysl.views("d", images="2"), "a whole number of at least 1"),  # type: ignore[arg-type]
        (lambda: raysl.probe("random", "a", "b", ("knn",), linear={}), "'linear' is neither"),
        *(
            (
                partial(raysl.probe, "random", "shapes:9", "shapes:9#test", **empty),
                f"--{name} is empty. Name at least one",
            )
            for name in ("probes", "layers", "encoders")
            for empty in [dict[str, Any]({"probes": "knn", name: []})]
        ),
        (
            lambda: raysl.probe("/nowhere/run", "shapes:9", "shapes:9#test", "knn"),
            "There is no checkpoint at",
        ),
        (
            lambda: raysl.pretrain("d", "r", backbone=3),
            "a BackboneConfig, a mapping of its fields, or a name",
        ),
    ],
)
def test_mistakes_are_one_clear_error(call: Any, answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raysl.ray_cluster.start", lambda: pytest.fail("Ray starts before the checks"))
    with pytest.raises(UserError, match=answer):
        call()


def test_a_run_among_the_images_that_it_reads_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raysl.ray_cluster.start", lambda: pytest.fail("Ray starts before the checks"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lab/test/cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "lab/test/cat/1.png")
    said = r"--run is 'lab/test/run1', a folder among the images .* such as .*/runs/run1\."
    for exists in (False, True):
        with pytest.raises(UserError, match=said):
            raysl.pretrain("lab", "lab/test/run1")
        assert (tmp_path / "lab/test/run1").exists() == exists
        (tmp_path / "lab/test/run1").mkdir(exist_ok=True)


def test_a_configuration_is_an_object_fields_or_both(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "set", 10)
    config = Pretraining(
        str(data.folder), "run", view=raysl.ViewConfig(16), parts={"pirl": {"temperature": 0.1}}
    )
    fields = {"view": {"min_scale": 0.5}, "jigsaw": {"grid": 2}}
    again = arguments.run_config(data, tmp_path / "run", config, fields, workers=False)
    assert (again.view.image_size, again.view.min_scale, again.parts["jigsaw"].grid) == (16, 0.5, 2)
    assert (again.run, again.parts["pirl"].temperature) == (str(tmp_path / "run"), 0.1)
    chosen = arguments.run_config(data, "-", None, {"pirl": {"temperature": 0.1}}, workers=False)
    assert (chosen.parts["pirl"].temperature, chosen.parts["pirl"].head) == (0.1, "bn")
    assert arguments.dataset(data) is data


def test_a_run_without_its_source_names_the_copy_of_its_images(tmp_path: Path) -> None:
    kept, run = make_dataset(tmp_path / "kept copy", 10), tmp_path / "run"
    images = {"uri": str(kept.folder), "fingerprint": kept.manifest.fingerprint}
    metadata = {"config": {}, "sessions": [], "data": {**images, "num_images": 10, "num_classes": 4}}
    write_record(Folder(str(run)), METADATA, metadata)
    named = re.escape(f"--data '{kept.folder}'")
    with pytest.raises(UserError, match=f"'/nowhere' does not exist.* {named}"):
        raysl.pretrain("/nowhere", run)
    with pytest.raises(UserError, match=f"the images or labels differ.* {named}"):
        check_same(metadata, {}, make_dataset(tmp_path / "others", 8), str(run))
    kept.folder.delete()
    with pytest.raises(UserError, match=r"the images or labels differ\. Give the data set it was begun on"):
        check_same(metadata, {}, make_dataset(tmp_path / "more", 6), str(run))


def test_the_image_size_leaves_the_rest_of_the_view(tmp_path: Path) -> None:
    given = {"view": {"min_scale": 0.5}, "backbone": "small"}
    made = arguments.run_config("shapes:20", tmp_path / "run", given, {"image_size": 48}, workers=False)
    assert (made.view.min_scale, made.view.image_size, made.backbone.name) == (0.5, 48, "small")


def test_weights_are_checked_before_a_source_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(data: str) -> None:
        raise AssertionError(f"{data} was read")

    monkeypatch.setattr("raysl.ingestion.open_or_ingest", read)
    file = tmp_path / "weights.pth"
    file.write_text("no weights")
    calls: list[Callable[[], object]] = [
        lambda: raysl.features(file, data="shapes:9", out=tmp_path / "features"),
        lambda: raysl.probe(file, "shapes:9", "shapes:8", out=tmp_path / "out"),
        lambda: raysl.clusterfit(file, data="shapes:9", run=tmp_path / "run", k=2),
        lambda: raysl.pretrain("shapes:9", tmp_path / "run", backbone={"weights": str(file)}),
    ]
    for call in calls:
        with pytest.raises(UserError, match="it is a text file"):
            call()
    with pytest.raises(UserError, match="has no folder for results"):
        raysl.probe("random", "shapes:9", "shapes:8")


def test_flags_of_decoding_are_arguments_of_ingest(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    (photos := tmp_path / "in").mkdir()
    frames[0].save(photos / "a.tif", save_all=True, append_images=frames[1:])
    given: list[Any] = [{}, {"decoding": {"range": [0, 9]}}, {"decoding": DecodeConfig(range=(0, 9))}]
    for number, fields in enumerate(given):
        made = raysl.ingest(photos, tmp_path / str(number), frames="all", **fields)
        assert made.num_images == 2
        assert made.manifest.decoding["range"] == ([0, 9] if fields else None)
    with pytest.raises(UserError, match="--background is 'whit'"):
        raysl.ingest(photos, tmp_path / "no", {"background": "whit"})  # type: ignore[arg-type]

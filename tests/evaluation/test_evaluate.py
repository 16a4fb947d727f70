"""Probing a run or a model from end to end."""

from __future__ import annotations

import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raysl.backbone.network import BackboneConfig
from raysl.cli.verbs import probe as command
from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.evaluation import evaluate
from raysl.evaluation.evaluate import probe, probe_encoder
from raysl.evaluation.results import protocol_hash, rows_of, tables
from raysl.extraction import FeatureProtocol, encoder_by_name
from raysl.ingestion.subset import subset
from raysl.probes import common_labels
from raysl.probes.collapse import Config as Collapse
from raysl.probes.invariance import Config as Invariance
from raysl.probes.knn import Config as Knn
from raysl.probes.linear import Config as Linear
from raysl.probes.lowshot import Config as Lowshot
from raysl.reporting import retrieval_grid
from raysl.run import Run
from raysl.storage import Folder
from tests.data import make_dataset
from tests.extraction.test_feature_tasks import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str, str]:
    folder = tmp_path_factory.mktemp("probe")
    train, test = make_dataset(folder / "train", 120), make_dataset(folder / "test", 60, seed=1)
    return make_run(train, folder / "run")[0], str(train.folder), str(test.folder)


@pytest.mark.ray
def test_rows_of_every_encoder_and_probe(ray_session: None, run: tuple[Run, str, str]) -> None:
    rows = probe(*run)
    assert {(row["encoder"], row["probe"]) for row in rows} == {
        (encoder, name) for encoder in ("trained", "random", "pixels") for name in ("knn", "linear")
    }
    primary = {(row["encoder"], row["probe"]): row["value"] for row in rows if row["primary"]}
    assert len(primary) == 6
    # The classes of the tiny set differ in the mean color, which every encoder shows.
    assert primary["pixels", "linear"] > 0.9
    assert rows_of(run[0]) == rows
    again = probe(*run, probes=["knn"], configs={"knn": Knn()}, encoders=["trained"])
    assert sorted(rows_of(run[0]), key=str) == sorted(rows, key=str)
    assert again == [row for row in rows if row["probe"] == "knn" and row["encoder"] == "trained"]
    probe(*run, probes=["knn"], configs={"knn": Knn(ks=(3,))}, encoders=["trained"])
    assert len(rows_of(run[0])) > len(rows)


def test_images_that_a_sweep_scores_are_not_called_test_images(
    run: tuple[Run, str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "raysl"):
        cache = Folder(str(tmp_path))
        probe(*run, probes=["knn"], encoders=["pixels"], cache=cache)
    assert "Computing the features of 120 images to learn from and 60 images to score ..." in caplog.messages
    assert "test images" not in caplog.text


def test_shared_images_are_told(
    run: tuple[Run, str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def said(test: str) -> str:
        caplog.clear()
        probe(run[0], run[1], test, probes=["knn"], encoders=["pixels"])
        return caplog.text

    assert "Train and test set are the same images (knn)" in said(run[1])
    assert not re.search("share|same images", said(run[2]))
    some = subset(DataSet.open(run[1]), 40, Folder(str(tmp_path / "some")))
    assert "40 of 40 test images are also in the train set" in said(str(some.folder))


def test_bn_statistics_are_part_of_the_protocol(run: tuple[Run, str, str]) -> None:
    made = {
        statistics: probe(*run, probes=["collapse"], bn_statistics=statistics)
        for statistics in ("reestimated", "kept")
    }
    protocols = {name: {row["protocol"] for row in rows} for name, rows in made.items()}
    assert protocols["kept"] == {protocol_hash("collapse", Collapse(), FeatureProtocol(16))}
    assert protocols["kept"].isdisjoint(protocols["reestimated"])
    # Re-estimated statistics depend on the train set, and a probe without labels else does not.
    assert {row["train"] for row in made["kept"]} == {""}
    assert "" not in {row["train"] for row in made["reestimated"]}
    values = {
        name: {row["encoder"]: row["value"] for row in rows if row["primary"]} for name, rows in made.items()
    }
    assert values["kept"]["pixels"] == values["reestimated"]["pixels"]
    assert values["kept"]["trained"] != values["reestimated"]["trained"]


def test_a_run_in_a_read_only_folder_is_probed_into_another(
    run: tuple[Run, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, train, test = run
    out = Folder(str(tmp_path / "out"))
    write = Folder.write

    def refuse(self: Folder, name: str, data: bytes) -> None:
        if str(self).startswith(str(source.folder)):
            raise UserError(f"Cannot write {self}: read-only.")
        write(self, name, data)

    monkeypatch.setattr(Folder, "write", refuse)
    monkeypatch.setattr(Folder, "check_writable", lambda self: refuse(self, "x", b""))
    before = rows_of(source)
    with pytest.raises(UserError, match="--out FOLDER"):
        probe(source, train, test, probes=["knn"])
    rows = probe(str(source.folder), train, test, probes=["knn"], encoders=["trained"], out=str(out))
    assert rows_of(Run(out)) == rows
    assert rows_of(source) == before
    assert (out / "features").list()
    with pytest.raises(UserError, match="holds results of another model"):
        probe_encoder(encoder_by_name("random", BackboneConfig()), "x", train, test, out=str(out))


def test_all_layers_by_probes_of_every_kind(run: tuple[Run, str, str]) -> None:
    configs = {"invariance": Invariance(("rotation",)), "linear": Linear("fast")}
    names = ["linear", "collapse", "invariance"]
    rows = probe(
        *run,
        probes=names,
        layers=["all"],
        configs=configs,
        encoders=["trained", "pixels"],
        bn_statistics="kept",
    )
    every = {(name, layer) for name in names for layer in ("conv1", "res2", "res3", "res4", "pooled")}
    of_trained = {(row["probe"], row["layer"]) for row in rows if row["encoder"] == "trained"}
    assert of_trained == {*every, ("invariance", "heads")}
    assert {row["layer"] for row in rows if row["encoder"] == "pixels"} == {"pooled"}
    assert {row["train"] for row in rows if row["probe"] == "collapse"} == {""}
    folder = run[0].folder / "probes/invariance"
    (of_checkpoint,) = (name for name in folder.list() if name.startswith("trained-"))
    drawn = (folder / of_checkpoint).read_json("histogram.json")
    # Every image with its transformed copy, and with each of the 59 others.
    sums = {layer: {name: sum(c) for name, c in of.items()} for layer, of in drawn["counts"].items()}
    assert sums.pop("heads") == {"jigsaw": 60, "others": 60 * 59}
    # Images rotated by 0 degrees are left out.
    (turned,) = {of["rotation"] for of in sums.values()}
    assert 30 < turned < 60
    assert {of["others"] for of in sums.values()} == {60 * 59}


def test_probes_without_labels_take_data_without_labels(run: tuple[Run, str, str], tmp_path: Path) -> None:
    plain = with_classes(make_dataset(tmp_path / "plain", 30))
    place = str(plain.folder)
    assert probe(run[0], place, place, probes=["collapse"], encoders=["trained"])
    with pytest.raises(UserError, match="no labels"):
        probe(run[0], place, place, probes=["collapse", "knn"], encoders=["trained"])


def test_features_can_be_shared_by_runs(run: tuple[Run, str, str], tmp_path: Path) -> None:
    probe(*run, probes=["knn"], encoders=["pixels"], cache=Folder(str(tmp_path)))
    assert len(list(tmp_path.iterdir())) == 2


def test_rows_are_kept_though_a_later_probe_fails(run: tuple[Run, str, str], tmp_path: Path) -> None:
    source, out = encoder_by_name("random", BackboneConfig()), str(tmp_path / "rows")
    configs = {"lowshot": Lowshot(ks=(100,))}
    names = ["knn", "lowshot", "collapse"]
    with pytest.raises(UserError, match=r"--lowshot\.ks begins with 100"):
        probe_encoder(source, "random", *run[1:], probes=names, out=out, image_size=16, configs=configs)
    kept = rows_of(Run(Folder(out)))
    assert {row["probe"] for row in kept} == {"knn"}
    assert kept == probe_encoder(source, "random", *run[1:], probes=["knn"], out=out, image_size=16)


def test_a_probe_that_is_refused_leaves_nothing(run: tuple[Run, str, str], tmp_path: Path) -> None:
    source, out = encoder_by_name("random", BackboneConfig()), tmp_path / "rows"
    with pytest.raises(UserError, match="does not exist"):
        probe_encoder(source, "random", run[1], str(tmp_path / "nowhere"), probes=["knn"], out=str(out))
    assert not out.exists()


def test_a_retrieval_grid_has_a_name_of_its_own() -> None:
    one, other = "1" * 32, "2" * 32
    asked = [(5, one, other), (9, one, other), (5, one, one), (5, other, other)]
    assert len({retrieval_grid.grid_name(*each) for each in asked}) == 4


def with_classes(dataset: DataSet, *classes: str) -> DataSet:
    manifest = dataset.manifest.to_json() | {"classes": list(classes)}
    dataset.folder.write_json("manifest.json", manifest)
    return DataSet.open(str(dataset.folder))


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    train = make_dataset(tmp_path / "train", 20)
    test = with_classes(make_dataset(tmp_path / "test", 40), "d", "b", "z", "a")
    assert evaluate._names_besides(test, train) == f": z {(test.labels() == 2).sum()}"
    _, test_n = common_labels(train, test)
    assert test_n.tolist() == np.array([3, 1, 4, 0])[test.labels()].tolist()


def test_data_without_common_classes_or_without_labels_are_refused(tmp_path: Path) -> None:
    train, test = make_dataset(tmp_path / "train", 20), make_dataset(tmp_path / "test", 20)
    with pytest.raises(UserError, match="no class in common"):
        common_labels(train, with_classes(test, "w", "x", "y", "z"))
    with pytest.raises(UserError, match="no labels"):
        common_labels(train, with_classes(test))


def test_unknown_names_are_answered_with_the_nearest(run: tuple[Run, str, str]) -> None:
    with pytest.raises(UserError, match="'linear'"):
        probe(*run, probes=["liner"])
    with pytest.raises(UserError, match="'random'"):
        probe(*run, encoders=["randm"])
    with pytest.raises(UserError, match="'layers'"):
        probe(*run, layer=["pooled"])
    with pytest.raises(UserError, match="'kept'"):
        probe(*run, bn_statistics="keep")


def test_an_unknown_layer_is_answered_with_the_nearest(run: tuple[Run, str, str]) -> None:
    with pytest.raises(UserError, match="'res3'"):
        probe(*run, probes=["invariance"], layers=["rse3"], encoders=["trained"])


def test_retrieval_draws_a_grid_of_its_nearest_images(run: tuple[Run, str, str], tmp_path: Path) -> None:
    source, train, test = run
    prints = [DataSet.open(one).manifest.fingerprint for one in (train, test)]
    model = Folder(str(tmp_path / "model"))
    for name, folder, flags in (
        (str(source.folder), source.folder, []),
        ("random", model, ["--out", str(model), "--image-size", "16"]),
    ):
        command([name, "--train", train, "--test", test, "--probes", "retrieval", *flags])
        step = {row["step"] for row in rows_of(Run(folder)) if row["encoder"] in ("trained", name)}
        grid = retrieval_grid.grid_name(step.pop(), *prints)
        with Image.open(BytesIO((folder / retrieval_grid.GRIDS).read(grid))) as picture:
            assert min(picture.size) > 100


def test_a_run_without_a_checkpoint_is_refused(run: tuple[Run, str, str], tmp_path: Path) -> None:
    Folder(str(tmp_path)).write("metadata.json", run[0].folder.read("metadata.json"))
    with pytest.raises(UserError, match="no complete checkpoint"):
        probe(str(tmp_path), *run[1:])


def test_a_model_that_is_not_a_run_has_rows_in_its_own_folder(
    run: tuple[Run, str, str], tmp_path: Path
) -> None:
    out = str(tmp_path / "rows")
    source = encoder_by_name("random", BackboneConfig())
    rows = probe_encoder(source, "random (small)", *run[1:], probes=["knn"], out=out, image_size=16)
    assert {row["encoder"] for row in rows} == {"random"}
    assert rows_of(Run(Folder(out))) == rows
    assert tables(rows)
    # The view is that of the run, so it shares a table with the run's own untrained backbone.
    cache = Folder(str(tmp_path / "features"))
    own = probe(*run, probes=["knn"], encoders=["random"], cache=cache)
    assert {(row["name"], row["value"], row["protocol"]) for row in rows} == {
        (row["name"], row["value"], row["protocol"]) for row in own
    }
    with pytest.raises(UserError, match="another model"):
        probe_encoder(source, "another", *run[1:], out=out, image_size=16)
    with pytest.raises(UserError, match="--out"):
        probe_encoder(source, "random", *run[1:])

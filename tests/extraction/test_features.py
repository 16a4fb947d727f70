"""Folders of features have the requested precision, norm and components, and nothing is computed twice."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.extraction import FeaturesConfig, FeatureStore, compute_features, feature_tasks, features, pca
from raysl.storage import Folder, StorageError
from raysl.storage.feature_files import FINISHED, STARTED, FeatureForm, part_file, write_part
from tests.data import make_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return make_dataset(tmp_path_factory.mktemp("data") / "set", 80)


@pytest.fixture(scope="module")
def plain(dataset: DataSet, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Features of the third stage with default options."""
    return compute_features("random", config(dataset, tmp_path_factory.mktemp("plain") / "f"))


def config(dataset: DataSet, out: Path, **changes: Any) -> FeaturesConfig:
    values = {"layer": "res3", "image_size": 16, **changes}
    return FeaturesConfig(data=str(dataset.folder), out=str(out), **values)


def test_rows_by_index_with_their_origin(plain: FeatureStore, dataset: DataSet) -> None:
    assert plain.load().shape == (80, 96)
    stored = pq.read_table(f"{plain.folder}/{part_file((0, 80))}")
    assert stored.column("index").to_pylist() == list(range(80))
    assert stored.to_pandas()["path"].tolist() == dataset.paths()
    facts = plain.folder.read_json(FINISHED)
    assert facts["fingerprint"] == dataset.manifest.fingerprint
    assert facts["teacher"].startswith("random small")
    assert (plain.num_rows, plain.dim, plain.layer) == (80, 96, "res3")


def test_half_precision_and_length(plain: FeatureStore, dataset: DataSet, tmp_path: Path) -> None:
    made = compute_features("random", config(dataset, tmp_path, dtype="float16", l2=True))
    expected = plain.load()
    expected /= np.linalg.norm(expected, axis=1, keepdims=True) + 1e-5
    np.testing.assert_allclose(made.load(), expected, rtol=2e-3, atol=1e-6)
    assert made.itemsize == 2


def test_components_and_projections_of_other_features(
    plain: FeatureStore, dataset: DataSet, tmp_path: Path
) -> None:
    made = compute_features("random", config(dataset, tmp_path / "a", pca=5)).load()
    centered = plain.load() - plain.load().mean(axis=0)
    expected = np.linalg.svd(centered, full_matrices=False)
    np.testing.assert_allclose(
        np.abs(made), np.abs(expected[0][:, :5] * expected[1][:5]), rtol=1e-2, atol=1e-4
    )
    assert not (tmp_path / "a" / "unreduced").exists()
    assert FeatureStore.open(str(tmp_path / "a")).has_paths
    again = compute_features("random", config(dataset, tmp_path / "b", pca_of=str(tmp_path / "a")))
    np.testing.assert_array_equal(again.load(), made)
    with pytest.raises(UserError, match="at most"):
        compute_features("random", config(dataset, tmp_path / "c", pca=200))
    assert not list((tmp_path / "c").iterdir())
    with pytest.raises(UserError, match="rows of 96 numbers and these have 48"):
        compute_features("random", config(dataset, tmp_path / "d", layer="res2", pca_of=str(tmp_path / "a")))


def test_a_full_disk_leaves_a_projection_that_only_the_same_network_continues(
    dataset: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_tasks, "_PART_IMAGES", 40)
    with failing_at(2, StorageError("No space left")), pytest.raises(StorageError, match="No space left"):
        compute_features("random", config(dataset, tmp_path / "a", pca=4))
    assert part_file((0, 40)) in {file.name for file in (tmp_path / "a").iterdir()}
    with pytest.raises(UserError, match="they differ in the network"):
        compute_features("random", config(dataset, tmp_path / "a", pca=4, seed=1))
    made = compute_features("random", config(dataset, tmp_path / "a", pca=4))
    whole = compute_features("random", config(dataset, tmp_path / "b", pca=4))
    np.testing.assert_array_equal(made.load(), whole.load())


def test_a_refused_projection_leaves_an_empty_folder(
    dataset: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_tasks, "_PART_IMAGES", 40)
    with failing_at(2, UserError("refused")), pytest.raises(UserError, match="refused"):
        compute_features("random", config(dataset, tmp_path / "a", pca=4))
    assert not list((tmp_path / "a").iterdir())


@contextmanager
def failing_at(call: int, error: Exception) -> Iterator[None]:
    """Let the writing of the projected part of this number fail."""
    calls = count(1)

    def failing(*arguments: Any) -> None:
        if next(calls) == call:
            raise error
        write_part(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pca, "write_part", failing)
        yield


def test_another_projection_in_the_folder_of_pca_of_is_noticed(dataset: DataSet, tmp_path: Path) -> None:
    compute_features("random", config(dataset, tmp_path / "a", pca=4))
    settings = config(dataset, tmp_path / "b", pca_of=str(tmp_path / "a"))
    made = compute_features("random", settings)
    assert compute_features("random", settings) == made
    shutil.rmtree(tmp_path / "a")
    compute_features("random", config(dataset, tmp_path / "a", pca=4, l2=True))
    with pytest.raises(UserError, match="they differ in --dtype"):
        compute_features("random", settings)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_components_of_a_diverged_network_are_refused(tmp_path: Path, number: float) -> None:
    rows_nd = np.ones((9, 4), np.float32)
    rows_nd[3, 2] = number
    write_part(Folder(str(tmp_path)), (0, 9), "pooled", rows_nd, FeatureForm())
    with pytest.raises(UserError, match="the first such row has index 3"):
        pca.fit(FeatureStore.open(str(tmp_path)), 2)


@pytest.mark.ray
def test_tasks_of_ray_find_the_same_components(plain: FeatureStore, ray_session: None) -> None:
    found = pca.fit(plain, 5)
    whole = plain.load().astype(np.float64)
    variances = np.linalg.eigvalsh(np.cov(whole.T, bias=True))[::-1]
    np.testing.assert_allclose(found.mean_d, whole.mean(axis=0), rtol=1e-9)
    assert found.variance == pytest.approx(variances[:5].sum() / variances.sum())


def test_a_network_that_cannot_be_loaded_leaves_the_folder_to_another(
    dataset: DataSet, tmp_path: Path
) -> None:
    config = FeaturesConfig(str(dataset.folder), str(tmp_path / "features"), image_size=16)
    (tmp_path / "weights.pth").write_text("no weights")
    with pytest.raises(UserError, match="it is a text file"):
        compute_features(str(tmp_path / "weights.pth"), config)
    assert compute_features("random", config).num_rows == dataset.num_images


def test_existing_parts_are_kept(dataset: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_tasks, "_PART_IMAGES", 40)
    settings = config(dataset, tmp_path)
    table = compute_features("pixels", config(dataset, tmp_path, layer="pooled"))
    with pytest.raises(UserError, match="they differ in the network, the layer"):
        compute_features("random", settings)
    table.folder.delete(FINISHED)
    first, second = (table.folder / group.file for group in table.groups)
    Path(str(second)).unlink()
    written = Path(str(first)).stat().st_mtime_ns
    assert not table.folder.exists(FINISHED)
    assert table.folder.exists(STARTED)
    again = compute_features("pixels", config(dataset, tmp_path, layer="pooled"))
    assert Path(str(first)).stat().st_mtime_ns == written
    assert len(again.load()) == 80
    monkeypatch.setattr(features, "compute", None)
    assert compute_features("pixels", config(dataset, tmp_path, layer="pooled")) == again


def test_a_folder_of_other_files_is_refused_before_the_work(
    dataset: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metadata.json").write_text("{}")
    monkeypatch.setattr(features, "open_or_ingest", lambda data: pytest.fail("the data are opened"))
    with pytest.raises(UserError, match=r"is not empty and holds no features .* Give --out .*run-features'"):
        compute_features("pixels", config(dataset, run))
    assert [file.name for file in run.iterdir()] == ["metadata.json"]
    for held in ((), (".DS_Store", "a.log"), (STARTED, "x"), (FINISHED, "clusters")):
        features.check_out(str(folder_of(tmp_path / "-".join(["f", *held]), held)))
    features.check_out(str(tmp_path / "absent"))


@pytest.mark.parametrize("held", [part_file((0, 9)), pca.FILE, "unreduced"])
def test_files_of_unknown_features_are_neither_used_nor_deleted(tmp_path: Path, held: str) -> None:
    folder = folder_of(tmp_path / "f", [held])
    with pytest.raises(UserError, match="holds no features that raysl can continue"):
        features.check_out(str(folder))
    assert (folder / held).exists()


def folder_of(folder: Path, names: Iterable[str]) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    return folder


def test_options_that_exclude_each_other(dataset: DataSet, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Both --pca and --pca-of"):
        config(dataset, tmp_path, pca=2, pca_of="x")

"""Folders of features: numbers, length and components as asked for, and nothing computed twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from raysl.clustering.feature_rows import Rows
from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.extraction import FeaturesConfig, FeatureTable, feature_tasks, make
from raysl.extraction.store import BEGUN
from raysl.extraction.table import DONE, file
from tests.data import make_dataset

pytestmark = pytest.mark.ray


def quiet(line: str) -> None:
    """Takes a line of progress."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return make_dataset(tmp_path_factory.mktemp("data") / "set", 80)


@pytest.fixture(scope="module")
def plain(ray_session: None, dataset: DataSet, tmp_path_factory: pytest.TempPathFactory) -> FeatureTable:
    """Features of the third stage, without any option."""
    return make("random", config(dataset, tmp_path_factory.mktemp("plain") / "f"), quiet)


def config(dataset: DataSet, out: Path, **changes: Any) -> FeaturesConfig:
    values = {"layer": "res3", "image_size": 16, **changes}
    return FeaturesConfig(data=str(dataset.folder), out=str(out), **values)


def test_rows_by_index_that_say_whose_they_are(plain: FeatureTable, dataset: DataSet) -> None:
    assert plain.load("res3").shape == (80, 96)
    stored = pq.read_table(f"{plain.folder}/{file(plain.parts[0])}")
    assert stored.column("index").to_pylist() == list(range(*plain.parts[0]))
    facts = plain.folder.read_json(DONE)
    assert facts["fingerprint"] == dataset.manifest.fingerprint
    assert facts["teacher"].startswith("random small")
    rows = Rows.open(str(plain.folder))
    assert (rows.num_rows, rows.dim, rows.column) == (80, 96, "res3")


def test_half_precision_and_length(plain: FeatureTable, dataset: DataSet, tmp_path: Path) -> None:
    made = make("random", config(dataset, tmp_path, dtype="float16", l2=True), quiet)
    expected = plain.load("res3")
    expected /= np.linalg.norm(expected, axis=1, keepdims=True) + 1e-5
    np.testing.assert_allclose(made.load("res3"), expected, rtol=2e-3, atol=1e-6)
    assert Rows.open(str(tmp_path)).itemsize == 2


def test_components_and_those_of_other_features(
    plain: FeatureTable, dataset: DataSet, tmp_path: Path
) -> None:
    made = make("random", config(dataset, tmp_path / "a", pca=5), quiet).load("res3")
    centred = plain.load("res3") - plain.load("res3").mean(axis=0)
    expected = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(
        np.abs(made), np.abs(expected[0][:, :5] * expected[1][:5]), rtol=1e-2, atol=1e-4
    )
    assert not (tmp_path / "a" / "unreduced").exists()
    again = make("random", config(dataset, tmp_path / "b", pca_of=str(tmp_path / "a")), quiet)
    np.testing.assert_array_equal(again.load("res3"), made)
    with pytest.raises(UserError, match="at most"):
        make("random", config(dataset, tmp_path / "c", pca=200), quiet)
    assert not list((tmp_path / "c").iterdir())
    with pytest.raises(UserError, match="rows of 96 numbers and these have 48"):
        make("random", config(dataset, tmp_path / "d", layer="res2", pca_of=str(tmp_path / "a")), quiet)


def test_what_is_there_is_kept(
    ray_session: None, dataset: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_tasks, "_PART_IMAGES", 40)
    settings = config(dataset, tmp_path)
    table = make("pixels", config(dataset, tmp_path, layer="pooled"), quiet)
    with pytest.raises(UserError, match=r"these differ: encoder, protocol"):
        make("random", settings, quiet)
    table.folder.delete(DONE)
    first, second = (table.folder / file(part) for part in table.parts)
    Path(str(second)).unlink()
    written = Path(str(first)).stat().st_mtime_ns
    assert not table.folder.exists(DONE)
    assert table.folder.exists(BEGUN)
    again = make("pixels", config(dataset, tmp_path, layer="pooled"), quiet)
    assert Path(str(first)).stat().st_mtime_ns == written
    assert len(again.load()) == 80
    monkeypatch.setattr(feature_tasks, "compute", None)
    assert make("pixels", config(dataset, tmp_path, layer="pooled"), quiet) == again


def test_options_that_exclude_each_other(dataset: DataSet, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Both pca and pca_of"):
        config(dataset, tmp_path, pca=2, pca_of="x")

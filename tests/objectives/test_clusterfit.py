"""Predicting cluster ids from a table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from raysl.errors import MissingValueError, UserError
from raysl.objectives.clusterfit import Assignments, Clusterfit, Config
from tests.objectives.setups import N, batch, clusters, setup

IDS = np.arange(N) * 3 % 5


def test_the_loss_is_the_cross_entropy_of_the_cluster_of_the_image(tmp_path: Path) -> None:
    backbone, of_run = setup()
    objective = Clusterfit(Config(clusters(tmp_path / "labels.parquet", IDS)), of_run)
    of = batch(objective, 6, step=3)
    logits_bk = objective(backbone, of.views)["logits"]
    assert logits_bk.shape == (6, 5)
    found = objective.loss({"logits": logits_bk}, of, None)
    label_b = torch.from_numpy(IDS[of.rows.indices_b])
    assert found.loss.item() == F.cross_entropy(logits_bk, label_b).item()
    assert found.metrics["accuracy"].item() == (logits_bk.argmax(dim=1) == label_b).float().mean().item()


def test_labels_are_not_kept_with_every_checkpoint(tmp_path: Path) -> None:
    objective = Clusterfit(Config(clusters(tmp_path / "labels.parquet", IDS)), setup()[1])
    assert set(objective.state_dict()) == {"classify.weight", "classify.bias"}


def test_what_the_table_says_goes_to_the_metadata(tmp_path: Path) -> None:
    place = clusters(tmp_path / "labels.parquet", IDS, K="8", teacher="runs/first", fingerprint="abc")
    objective = Clusterfit(Config(place), replace(setup()[1], fingerprint="abc"))
    assert objective.classify.out_features == 8
    metadata = objective.describe()
    assert metadata["labels"] == {"K": "8", "teacher": "runs/first", "fingerprint": "abc"}
    assert metadata["num_clusters"] == 8
    other = Assignments.read(clusters(tmp_path / "other.parquet", IDS[::-1]), N)
    assert other.metadata["labels_digest"] != metadata["labels_digest"]


def test_a_folder_of_parts_is_one_table(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    for part, index in enumerate(np.array_split(np.arange(N)[::-1], 3)):
        pq.write_table(
            pa.table({"index": index, "cluster": IDS[index]}), tmp_path / "parts" / f"{part}.parquet"
        )
    assert Assignments.read(str(tmp_path / "parts"), N).clusters_n.tolist() == IDS.tolist()


def test_labels_of_other_images_are_refused(tmp_path: Path) -> None:
    place = clusters(tmp_path / "labels.parquet", IDS, fingerprint="abc")
    with pytest.raises(UserError, match="fingerprint abc, and --data has fingerprint xyz"):
        Assignments.read(place, N, "xyz")


@pytest.mark.parametrize(
    ("index", "answer"),
    [
        (np.arange(N - 2), "62 rows for a data set of 64 images: 2 images have no row, 0 rows repeat"),
        (
            np.arange(N + 1),
            "65 rows .* 0 images have no row, 0 rows repeat an index and 1 have an index outside",
        ),
        (np.arange(N) // 2, "64 rows .* 32 images have no row, 32 rows repeat an index and 0 have"),
        (np.arange(N) - 1, "64 rows .* 1 images have no row, 0 rows repeat an index and 1 have"),
    ],
)
def test_every_image_must_be_there_once(tmp_path: Path, index: np.ndarray, answer: str) -> None:
    pq.write_table(pa.table({"index": index, "cluster": index % 5}), tmp_path / "labels.parquet")
    with pytest.raises(UserError, match=answer):
        Assignments.read(str(tmp_path / "labels.parquet"), N)


@pytest.mark.parametrize(
    ("ids", "metadata", "answer"),
    [
        (IDS - 1, {}, "clusters from -1 to 3"),
        (IDS, {"K": "3"}, "from 0 to 4 and K = 3"),
        (IDS * 0, {}, "at least two clusters"),
    ],
)
def test_clusters_are_counted_from_zero(
    tmp_path: Path, ids: np.ndarray, metadata: dict[str, str], answer: str
) -> None:
    with pytest.raises(UserError, match=answer):
        Assignments.read(clusters(tmp_path / "labels.parquet", ids, **metadata), N)


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        Assignments.read(str(tmp_path / "missing.parquet"), N)
    (tmp_path / "text.parquet").write_text("index,cluster\n")
    with pytest.raises(UserError, match="cannot be read"):
        Assignments.read(str(tmp_path / "text.parquet"), N)
    pq.write_table(pa.table({"index": np.arange(N)}), tmp_path / "lacks.parquet")
    with pytest.raises(UserError, match=r"lacks\.parquet' .*cluster"):
        Assignments.read(str(tmp_path / "lacks.parquet"), N)
    pq.write_table(pa.table({"index": np.arange(N), "cluster": np.ones(N)}), tmp_path / "floats.parquet")
    with pytest.raises(UserError, match="no column 'cluster' of integers"):
        Assignments.read(str(tmp_path / "floats.parquet"), N)


def test_it_must_be_given_labels_and_takes_no_transform() -> None:
    with pytest.raises(MissingValueError, match=r"--clusterfit\.labels"):
        Clusterfit(Config(), setup()[1])
    with pytest.raises(UserError, match="'clusterfit' takes no pretext transform"):
        Clusterfit(Config(), setup("rotation")[1])

"""LiDAR is the published equation, and tells views that agree from views that do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from raysl.backbone.network import BackboneConfig
from raysl.extraction import RandomBackbone
from raysl.probes import Subject, lidar
from raysl.storage import Folder
from tests.data import make_dataset


def test_the_value_is_that_of_the_equations() -> None:
    """Thilak et al. 2023, with the square root of the inverse by eigenvectors and covariances as loops."""
    random = np.random.default_rng(0)
    views = random.normal(size=(30, 1, 5)) * np.arange(1, 6) + random.normal(size=(30, 7, 5)) + 4
    scatter = lidar.Scatter(5)
    scatter.add(views[:11])
    scatter.add(views[11:])
    means = views.mean(1)
    between = sum(np.outer(m - means.mean(0), m - means.mean(0)) for m in means) / 30
    within = sum(np.outer(e - m, e - m) for m, es in zip(means, views, strict=True) for e in es) / (30 * 7)
    values, vectors = np.linalg.eigh(within + 1e-4 * np.eye(5))
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    eigenvalues = np.linalg.eigvalsh(root @ between @ root)
    p = eigenvalues / np.abs(eigenvalues).sum() + 1e-7
    assert scatter.lidar(1e-4) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-9)


def test_directions_that_views_do_not_agree_on_count_less() -> None:
    random = np.random.default_rng(0)
    agreed = np.repeat(random.normal(size=(400, 1, 8)), 10, axis=1)
    noise = random.normal(size=(400, 10, 8))
    noise[..., :2] *= 0.01
    values = []
    for views in (agreed + 0.01 * random.normal(size=agreed.shape), agreed + noise * 5, 0 * agreed + 1):
        scatter = lidar.Scatter(8)
        scatter.add(views)
        values.append(scatter.lidar(1e-6))
    assert values[0] == pytest.approx(8, rel=0.1)
    assert values[1] == pytest.approx(2, rel=0.1)
    assert values[2] == 0


def test_the_number_of_views_changes_little_and_layers_have_rows(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "set", 40)
    encoder = RandomBackbone(BackboneConfig(), 0)
    subject = Subject(encoder, ("res2", "pooled"), 16, data, data, 0, Folder(str(tmp_path / "out")))
    found = {(row.layer, row.name): row.value for row in lidar.Lidar(lidar.Config(views=4)).rows(subject)}
    assert set(found) == {(layer, name) for layer in ("res2", "pooled") for name in ("lidar", "lidar_share")}
    assert all(0 < found[layer, "lidar_share"] <= 1 for layer in ("res2", "pooled"))

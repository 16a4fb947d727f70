"""On a small machine, this process alone ingests images, trains a run, probes it and computes features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

import raysl
from raysl.ray_cluster import this_machine

FIELDS: dict[str, Any] = {"epochs": 1, "view": {"image_size": 16}, "method": "predict-rotation"}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine that needs no Ray, where the start of Ray fails the test."""
    monkeypatch.setattr(this_machine, "needs_ray", lambda: False)
    monkeypatch.setattr("raysl.ray_cluster.start", lambda *_: pytest.fail("Ray starts"))
    monkeypatch.setenv("RAYSL_CACHE", str(tmp_path / "cache"))


def test_every_step_from_images_to_features_needs_no_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # Other tests may have started one.
    run = raysl.pretrain("shapes:64", tmp_path / "run", **FIELDS)
    assert run.config().workers == 1
    protocol = {"shares": (0.5,), "epochs": 1}
    probes = ("knn", "semisup", "retrieval")
    rows = raysl.probe(run, "shapes:64", "shapes:32#test", probes, semisup=protocol)
    assert {row["probe"] for row in rows} == set(probes)
    whole = raysl.features(run, "shapes:64", tmp_path / "whole")
    reduced = raysl.features(run, "shapes:64", tmp_path / "reduced", pca=3)
    assert (whole.num_rows, reduced.dim) == (64, 3)
    assert np.isfinite(reduced.load()).all()
    assert raysl.reproduce(run).same


@pytest.mark.ray
def test_one_process_makes_the_same_data_set_as_ray(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = raysl.ingest("shapes:40", tmp_path / "here", shard_images=20)
    monkeypatch.setattr(this_machine, "needs_ray", lambda: True)
    monkeypatch.setattr("raysl.ray_cluster.start", lambda *_: None)
    on_ray = raysl.ingest("shapes:40", tmp_path / "ray", shard_images=20)
    assert here.manifest.fingerprint == on_ray.manifest.fingerprint
    assert [shard.num_images for shard in here.manifest.shards] == [20, 20]

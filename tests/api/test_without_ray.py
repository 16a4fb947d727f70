"""On a small machine, this process alone ingests images, trains a run, probes it and computes features."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

import raysl
from raysl.errors import UserError
from raysl.ray_cluster import this_machine
from raysl.run import Run
from raysl.storage import Folder

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


def test_a_run_starts_from_a_run_or_an_export_and_is_probed_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.chdir(tmp_path)
    fields = {**FIELDS, "epochs": 0.1}
    first = raysl.pretrain("shapes:64", tmp_path / "first", **fields, backbone={"norm": "group"})
    exported = raysl.export(first, format="safetensors")
    saved = first.newest().folder / "state.pt"
    for place, file in ((exported, f"{exported}/model.safetensors"), (str(first.folder), str(saved))):
        run = f"{tmp_path}/from-{Path(place).name}"
        for one in (place, os.path.relpath(place)):
            tuned = raysl.pretrain("shapes:64", run, **fields, backbone={"weights": one})
        backbone = tuned.config().backbone
        assert (backbone.weights, backbone.norm) == (file, "group")
    unfinished = pytest.raises(
        UserError, match=r"is the run .*, which is not finished. Finish it, or run `raysl export"
    )
    with unfinished, monkeypatch.context() as other:
        other.setattr(Run, "is_finished", lambda _: False)
        raysl.pretrain("shapes:64", tmp_path / "third", **fields, backbone={"weights": str(first.folder)})
    with pytest.raises(UserError, match=r"a folder that holds neither a run nor exported weights"):
        raysl.pretrain("shapes:64", tmp_path / "third", **fields, backbone={"weights": str(tmp_path)})
    with pytest.raises(UserError, match=rf"does not exist. Did you mean {str(first.folder)!r}\?"):
        raysl.pretrain("shapes:64", tmp_path / "third", **fields, backbone={"weights": f"{first.folder}t"})
    assert raysl.reproduce(tuned).same
    Folder(str(first.folder)).delete()
    raysl.pretrain("shapes:64", tuned.folder.uri, **fields, backbone={"weights": str(first.folder)})
    rows = raysl.probe(tuned, "shapes:64", "shapes:32#test", "knn")
    assert {row["encoder"] for row in rows} == {"trained", "pixels"}
    assert "The row of the untrained network, which starts from a file, is left out." in caplog.text
    assert raysl.rows([tuned.folder.uri]) == [{"run": tuned.folder.uri, **row} for row in rows]


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

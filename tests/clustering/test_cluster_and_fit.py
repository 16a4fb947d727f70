"""ClusterFit goes from a teacher to a student that names it, and skips finished steps."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest

from raysl.clustering.cluster_and_fit import ClusterfitConfig, clusterfit
from raysl.config import Pretraining, ViewConfig
from raysl.errors import UserError
from tests.data import make_dataset


@pytest.mark.ray
@pytest.mark.slow
def test_two_rounds(ray_session: None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = make_dataset(tmp_path / "set", 80)
    student = Pretraining(
        data=str(dataset.folder),
        run=str(tmp_path / "run"),
        method="clusterfit",
        epochs=1,
        batch_size=16,
        workers=1,
        view=ViewConfig(image_size=16),
    )
    config = ClusterfitConfig(teacher="random", k=6, rounds=2)
    run = clusterfit(config, student)
    assert str(run.folder).endswith("round-2/run")
    facts = run.metadata()["facts"]
    assert facts["num_clusters"] == 6
    named = facts["labels"]
    assert "round-1/run step 5" in named["teacher"]
    assert (named["K"], named["objective"]) == ("6", "clusterfit")
    assert named["fingerprint"] == dataset.manifest.fingerprint
    with caplog.at_level(logging.INFO, "raysl"):
        clusterfit(config, student)
    assert caplog.text.count("already") >= 4
    with pytest.raises(UserError, match="these differ: k"):
        clusterfit(dataclasses.replace(config, k=7), student)


def test_one_cluster_is_refused() -> None:
    with pytest.raises(UserError, match="--k is 1"):
        ClusterfitConfig(teacher="random", k=1)

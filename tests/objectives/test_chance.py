"""An objective that publishes `chance` has that loss when all scores are equal, here by a high temperature."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raysl.config import methods
from raysl.contrastive.bank import BankConfig, MemoryBank
from raysl.objectives import Batch
from raysl.objectives.clusterfit import Clusterfit
from raysl.objectives.clusterfit import Config as ClusterfitConfig
from raysl.objectives.predict import Config as PredictConfig
from raysl.objectives.predict import Predict
from raysl.objectives.supervised import Config as SupervisedConfig
from raysl.objectives.supervised import Supervised
from raysl.pretext import Geometry
from raysl.pretext.frame_order import Config as FrameOrderConfig
from raysl.pretext.frame_order import FrameOrder
from tests.objectives.setups import N, batch, clusters, setup


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("npid", {"num_negatives": 12, "loss": "infonce"}),
        ("npid", {"num_negatives": 12, "loss": "nce"}),
        ("pirl", {"num_negatives": N - 1, "loss": "paper_h"}),
        ("simclr", {}),
        ("moco", {"queue": 32}),
    ],
)
def test_chance_is_the_loss_of_equal_scores(name: str, fields: dict[str, Any]) -> None:
    config_type, objective_type = methods.load_objective(name)
    backbone, of_run = setup("rotation" if name == "pirl" else "")
    config = config_type(temperature=100, dim=16, **fields)
    objective = objective_type(config, replace(of_run, batch_size=4))
    of, bank = batch(objective), MemoryBank(N, 16, BankConfig(), seed=0)
    loss = objective.loss(objective(backbone, of.views), of, bank).loss
    assert loss.item() == pytest.approx(objective.chance, rel=0.01)


def test_chance_of_clusters_follows_their_sizes(tmp_path: Path) -> None:
    ids = (np.arange(N) % 8 == 0).astype(np.int64)
    objective = Clusterfit(ClusterfitConfig(clusters(tmp_path / "labels.parquet", ids)), setup()[1])
    share = ids.mean()
    assert objective.chance == pytest.approx(-share * np.log(share) - (1 - share) * np.log(1 - share))


def test_chance_of_labels_is_the_loss_of_equal_scores() -> None:
    objective = Supervised(SupervisedConfig(label_smoothing=0.1), replace(setup()[1], num_classes=5))
    of: Batch = replace(batch(objective), labels_b=torch.arange(4) % 5)
    assert objective.loss({"logits": torch.zeros(4, 5)}, of, None).loss.item() == pytest.approx(
        objective.chance
    )


def test_chance_of_ordered_frames_follows_the_share_of_right_tuples() -> None:
    transform = FrameOrder(FrameOrderConfig(task="verify", positives=0.25), Geometry(image_size=32))
    objective = Predict(PredictConfig(), replace(setup()[1], pretext=transform))
    assert objective.chance == pytest.approx(-0.25 * np.log(0.25) - 0.75 * np.log(0.75))

"""An objective that publishes `chance` has that loss when all scores are equal, here by a high temperature."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from raysl.config import methods
from raysl.contrastive.bank import BankConfig, MemoryBank
from tests.objectives.setups import N, batch, setup


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

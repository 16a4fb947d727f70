"""Learning the labels of the data set."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from torch import nn

from raysl.errors import UserError
from raysl.objectives.supervised import Config, Supervised
from tests.objectives.setups import batch, setup


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_cross_entropy_of_the_label(smoothing: float) -> None:
    backbone, of_supervised = setup(num_classes=4)
    objective = Supervised(Config(label_smoothing=smoothing), of_supervised)
    of = batch(objective, 6)
    logits_bk = objective(backbone, of.views)["logits"]
    found = objective.loss({"logits": logits_bk}, of, None)
    assert of.labels_b is not None
    assert found.loss.item() == F.cross_entropy(logits_bk, of.labels_b, label_smoothing=smoothing).item()
    right = (logits_bk.argmax(dim=1) == of.labels_b).float().mean()
    assert found.metrics == {"accuracy": right}
    found.loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None for p in nn.ModuleList([backbone, objective]).parameters())


def test_a_data_set_without_labels_is_refused() -> None:
    with pytest.raises(UserError, match="needs labels of at least two classes and the data set has 0"):
        Supervised(Config(), setup()[1])

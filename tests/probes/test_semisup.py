"""Labels are sampled by class and share, and the network learns from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from raysl.errors import UserError
from raysl.extraction import Pixels
from raysl.optim import OptimConfig
from raysl.probes import semisup
from tests.probes.test_finetune import subject

LABELS = np.repeat([0, 1, 2], [200, 30, 3])


def test_a_share_of_each_class_and_at_least_one_image() -> None:
    for share, wanted in ((0.1, [20, 3, 1]), (0.01, [2, 1, 1]), (1.0, [200, 30, 3])):
        chosen_n = semisup.few(LABELS, share, 0)
        assert np.bincount(LABELS[chosen_n]).tolist() == wanted
        assert (np.diff(chosen_n) > 0).all()


def test_shares_are_nested_and_depend_on_the_seed_only() -> None:
    few, more = semisup.few(LABELS, 0.01, 0), semisup.few(LABELS, 0.1, 0)
    assert set(few.tolist()) < set(more.tolist())
    np.testing.assert_array_equal(more, semisup.few(LABELS, 0.1, 0))
    assert set(more.tolist()) != set(semisup.few(LABELS, 0.1, 1).tolist())


def test_rows_are_named_by_their_share(tmp_path: Path) -> None:
    optim = OptimConfig(lr=0.5, weight_decay=0.0)
    config = semisup.Config(epochs=5, batch_size=16, optim=optim, shares=(0.05, 1.0))
    probe = semisup.Semisup(config)
    found = {row.name: row.value for row in probe.examine(subject(tmp_path))}
    names = {f"{name}@{share}" for share in ("5%", "100%") for name in ("top1", "train_loss", "images")}
    assert names <= set(found)
    assert probe.primary_metric == "top1@5%"
    assert found["images@100%"] == 80
    assert 4 <= found["images@5%"] <= 5
    assert found["top1@100%"] > max(0.6, found["top1@5%"])


def test_pixels_cannot_be_trained_and_give_no_rows(tmp_path: Path) -> None:
    encoder = replace(subject(tmp_path, 8, 8), encoder=Pixels())
    assert not list(semisup.Semisup(semisup.Config()).examine(encoder))


def test_a_share_that_is_given_twice_is_refused() -> None:
    with pytest.raises(UserError, match=r"--semisup\.shares"):
        semisup.Config(shares=(0.1, 0.1))

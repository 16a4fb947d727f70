"""Negatives: other images, exactly K of them, the same for everybody who knows the step or the image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from raysl.contrastive import negatives
from raysl.contrastive.bank import BankConfig, MemoryBank
from raysl.dataset import Rows
from raysl.errors import UserError

N = D = 40


@pytest.fixture
def bank() -> MemoryBank:
    """A bank of the axes, so that the scores of a query of ones name the rows that were drawn."""
    bank = MemoryBank(N, D, BankConfig(), seed=3)
    bank.rows_nd = torch.eye(N)
    return bank


def rows(*indices: int, epoch: int = 0) -> Rows:
    return Rows(np.array(indices), np.full(len(indices), epoch))


def drawn(bank: MemoryBank, scores_bk: Tensor, queries: int) -> list[list[int]]:
    """Which rows a query of (1, 2, ..., N) met: its score names the row."""
    return [[int(s) - 1 for s in row[torch.isfinite(row)]] for row in scores_bk[:queries]]


NAMES = torch.arange(1.0, N + 1)


@pytest.mark.parametrize("count", [1, 12, N - 1])
def test_shared_negatives_are_k_distinct_other_images(bank: MemoryBank, count: int) -> None:
    batch = rows(*range(N))
    for step in range(20):
        scores_bk = negatives.shared_scores(bank, NAMES.expand(N, D), batch, step, count)
        assert scores_bk.shape == (N, count + 1)
        for own, met in enumerate(drawn(bank, scores_bk, N)):
            assert len(set(met)) == len(met) == count
            assert own not in met


def test_shared_negatives_depend_on_seed_and_step_alone(bank: MemoryBank) -> None:
    def met(step: int, *indices: int) -> Tensor:
        return negatives.shared_scores(bank, NAMES.expand(len(indices), D), rows(*indices), step, 12)

    assert torch.equal(met(4, 1, 2, 3)[1:2], met(4, 2))
    assert not torch.equal(met(4, 2), met(5, 2))
    bank.seed = 4
    assert not torch.equal(met(4, 2), negatives.shared_scores(bank, NAMES[None], rows(2), 5, 12))


@pytest.mark.parametrize("count", [1, 12, N - 1])
def test_own_negatives_are_k_other_images_for_each(bank: MemoryBank, count: int) -> None:
    scores_bk = negatives.per_image_scores(bank, NAMES.expand(N, D), rows(*range(N)), count)
    assert scores_bk.shape == (N, count)
    assert all(own not in met for own, met in enumerate(drawn(bank, scores_bk, N)))


def test_own_negatives_are_uniform_over_the_others(bank: MemoryBank) -> None:
    met = drawn(bank, negatives.per_image_scores(bank, NAMES[None], rows(7), 39_000), 1)[0]
    counts = np.bincount(met, minlength=N)
    assert counts[7] == 0
    np.testing.assert_allclose(np.delete(counts, 7), 1000, atol=150)


def test_own_negatives_depend_on_seed_epoch_and_index_alone(bank: MemoryBank) -> None:
    def met(*indices: int, epoch: int = 0) -> Tensor:
        return negatives.per_image_scores(
            bank, NAMES.expand(len(indices), D), rows(*indices, epoch=epoch), 12
        )

    assert torch.equal(met(1, 2, 3)[1], met(2)[0])
    assert not torch.equal(met(2), met(2, epoch=1))
    assert not torch.equal(met(2), met(3))


@pytest.mark.parametrize("mode", ["shared", "own"])
def test_several_queries_of_an_image_meet_the_same_negatives(bank: MemoryBank, mode: str) -> None:
    queries_qbd = torch.stack([NAMES.expand(3, D), 2 * NAMES.expand(3, D)])
    batch = rows(4, 5, 6)
    if mode == "shared":
        scores_qbk = negatives.shared_scores(bank, queries_qbd, batch, 0, 12)
    else:
        scores_qbk = negatives.per_image_scores(bank, queries_qbd, batch, 12)
    assert torch.equal(scores_qbk[1], 2 * scores_qbk[0])


@pytest.mark.parametrize("mode", ["shared", "own"])
def test_scores_keep_float32_under_autocast(mode: str) -> None:
    bank = MemoryBank(N, D, BankConfig(), seed=0)
    queries_bd = F.normalize(torch.randn(3, D, generator=torch.Generator().manual_seed(0)), dim=1)

    def scores() -> Tensor:
        if mode == "shared":
            return negatives.shared_scores(bank, queries_bd, rows(1, 2, 3), 0, 12)
        return negatives.per_image_scores(bank, queries_bd, rows(1, 2, 3), 12)

    with torch.autocast("cpu", torch.bfloat16):
        found = scores()
    assert found.dtype == torch.float32
    assert torch.equal(found, scores())


@pytest.mark.parametrize("count", [-1, 0, N, N + 1])
def test_as_many_negatives_as_images_or_none_are_refused(count: int) -> None:
    with pytest.raises(UserError, match=rf"--pirl.num-negatives is {count} .* 1 to {N - 1}"):
        negatives.check(count, N, "pirl")

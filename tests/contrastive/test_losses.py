"""Equations of contrast against plain NumPy, and the values that they must have before anything is learned."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from raysl.contrastive import losses

N = 20_000
Array = NDArray[np.float64]


def scores(b: int = 5, k: int = 7, absent: bool = True, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Scores with one absent negative in each row."""
    generator = torch.Generator().manual_seed(1)
    negatives_bk = torch.randn(b, k + absent, generator=generator) * scale
    if absent:
        negatives_bk[torch.arange(b), torch.arange(b) % (k + 1)] = -math.inf
    return torch.randn(b, generator=generator) * scale, negatives_bk


def by_hand(positive_b: Tensor, negatives_bk: Tensor) -> list[tuple[float, Array]]:
    """The positive and the present negatives of each query, in float64."""
    rows = negatives_bk.double().numpy()
    return [(float(p), row[np.isfinite(row)]) for p, row in zip(positive_b.double(), rows, strict=True)]


def test_info_nce_is_the_negative_log_softmax_of_the_positive() -> None:
    positive_b, negatives_bk = scores()
    expected = [
        -math.log(math.exp(p) / (math.exp(p) + np.exp(n).sum())) for p, n in by_hand(positive_b, negatives_bk)
    ]
    np.testing.assert_allclose(losses.info_nce(positive_b, negatives_bk), expected, rtol=1e-5)


def test_paper_h_is_equations_3_and_4() -> None:
    positive_b, negatives_bk = scores()
    expected = []
    for p, n in by_hand(positive_b, negatives_bk):
        total = math.exp(p) + np.exp(n).sum()
        expected.append(-math.log(math.exp(p) / total) - np.log(1 - np.exp(n) / total).sum())
    np.testing.assert_allclose(losses.paper_h(positive_b, negatives_bk), expected, rtol=1e-4)


def test_nce_is_k_plus_one_binary_problems_with_uniform_noise() -> None:
    positive_b, negatives_bk = scores()
    z, num_images = 2.2 * 100, 100
    expected = []
    for p, n in by_hand(positive_b, negatives_bk):
        noise = len(n) / num_images  # K Pn, with Pn = 1 / N
        attract = -math.log(math.exp(p) / z / (math.exp(p) / z + noise))
        expected.append(attract - np.log(noise / (np.exp(n) / z + noise)).sum())
    found = losses.nce(positive_b, negatives_bk, torch.tensor(z), num_images)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_z_is_the_mean_of_the_exponentials_times_the_number_of_images() -> None:
    positive_b, negatives_bk = scores()
    values = np.concatenate([np.exp([p, *n]) for p, n in by_hand(positive_b, negatives_bk)])
    assert losses.estimate_z(positive_b, negatives_bk, 100).item() == pytest.approx(
        values.mean() * 100, rel=1e-5
    )


@pytest.fixture(scope="module")
def fresh() -> tuple[Tensor, Tensor]:
    """Scores of random unit queries against random unit rows: 128 dimensions, temperature 0.07, 4096 negatives."""
    generator = torch.Generator().manual_seed(0)
    queries_bd = F.normalize(torch.randn(64, 128, generator=generator), dim=1)
    rows_kd = F.normalize(torch.randn(4097, 128, generator=generator), dim=1)
    scores_bk = queries_bd @ rows_kd.T / 0.07
    return scores_bk[:, 0], scores_bk[:, 1:]


def test_z_at_the_start(fresh: tuple[Tensor, Tensor]) -> None:
    assert losses.estimate_z(*fresh, N).item() / N == pytest.approx(2.21, rel=0.03)


@pytest.mark.parametrize(("name", "extra"), [("info_nce", 0.0), ("paper_h", 1.0), ("nce", 1.0)])
def test_losses_at_the_start(fresh: tuple[Tensor, Tensor], name: str, extra: float) -> None:
    arguments: tuple[Any, ...] = (losses.estimate_z(*fresh, N), N) if name == "nce" else ()
    loss = getattr(losses, name)(*fresh, *arguments).mean().item()
    assert loss == pytest.approx(math.log(4096) + math.log(2.21) + extra, abs=0.3)


@pytest.mark.parametrize("name", ["info_nce", "paper_h", "nce"])
@pytest.mark.parametrize("gap", [0.0, 30.0, 200.0])
def test_losses_and_gradients_are_finite_when_one_score_stands_out(name: str, gap: float) -> None:
    positive_b = torch.tensor([0.0, gap], requires_grad=True)
    negatives_bk = torch.tensor([[gap, 0.0, -math.inf], [0.0, -math.inf, 1.0]], requires_grad=True)
    arguments: tuple[Any, ...] = (torch.tensor(2.2 * N), N) if name == "nce" else ()
    loss_b = getattr(losses, name)(positive_b, negatives_bk, *arguments)
    loss_b.sum().backward()
    assert positive_b.grad is not None
    assert negatives_bk.grad is not None
    for tensor in (loss_b, positive_b.grad, negatives_bk.grad):
        assert tensor.isfinite().all()
    assert (negatives_bk.grad[negatives_bk.isinf()] == 0).all()


def test_paper_h_of_a_negative_that_stands_out_by_far() -> None:
    # -log p0 = 40 and log(1 - p1) = -40: both to the full, where 1 - p1 itself rounds to 0.
    loss = losses.paper_h(torch.tensor([0.0]), torch.tensor([[40.0]]))
    assert loss.item() == pytest.approx(80.0)


@pytest.mark.parametrize("name", ["info_nce", "paper_h"])
def test_half_precision_scores_are_worked_on_in_float32(name: str) -> None:
    loss_b = getattr(losses, name)(torch.tensor([14.0]).half(), torch.tensor([[13.0, -14.0]]).half())
    assert loss_b.dtype == torch.float32
    assert loss_b.isfinite().all()

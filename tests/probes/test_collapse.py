"""Measures of collapse with known answers, and the published equations in plain NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from raysl.probes import collapse
from raysl.probes.collapse import Collapse


def values(features_nd: npt.NDArray[Any]) -> dict[str, float]:
    found = collapse.Collapse(collapse.Config()).measure(features_nd.astype(np.float32))
    return {row.name: row.value for row in found}


def test_features_on_the_whole_sphere() -> None:
    found = values(np.random.default_rng(0).normal(size=(4000, 32)))
    assert found["effective_rank"] == pytest.approx(32, rel=0.01)
    assert found["effective_rank_share"] == pytest.approx(1, rel=0.01)
    assert found["spread"] == pytest.approx(1, rel=0.01)
    # Of the squared distance of two random unit vectors, 2 - 2 cos with var(cos) = 1 / d: exp(-4 + 16 / 2d).
    assert found["uniformity"] == pytest.approx(-4 + 8 / 32, abs=0.05)
    assert found["constant"] == 0


def test_features_on_a_line_and_in_a_point() -> None:
    random = np.random.default_rng(0)
    line = values(5 + random.normal(size=(500, 1)) * random.normal(size=(1, 8)))
    assert line["effective_rank"] == pytest.approx(1, abs=0.01)
    point = values(np.full((50, 8), 3.0))
    assert (point["effective_rank"], point["constant"]) == (0, 1)
    assert point["spread"] == pytest.approx(0, abs=1e-6)
    assert point["uniformity"] == pytest.approx(0, abs=1e-6)


def test_a_sentence_says_if_features_have_collapsed() -> None:
    random = np.random.default_rng(0)
    whole = Collapse.finding("res2", values(random.normal(size=(4000, 32))))
    assert whole == "The res2 features have not collapsed: effective rank 32 of 32 and no constant features."
    line = random.normal(size=(500, 1)) * random.normal(size=(1, 8))
    close = 1 + 1e-4 * random.normal(size=(500, 8))
    dead = random.normal(size=(500, 8)) * ([1, 1, 1] + [0] * 5)
    for features_nd in (np.full((50, 8), 3.0), line, close, dead):
        assert "features have collapsed: " in Collapse.finding("pooled", values(features_nd))
    assert "effective rank 3 of 8 and 62 % constant features" in Collapse.finding("pooled", values(dead))
    two_images = Collapse.finding("pooled", values(np.array([[0.0, 1.0], [1.0, 0.0]])))
    assert "have not collapsed: effective rank 1 of 1 and" in two_images
    assert "spread 0.0001 and" in Collapse.finding("pooled", values(close))


def test_uniformity_equals_a_sum_over_pairs() -> None:
    x = np.random.default_rng(0).normal(size=(9, 3))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    pairs = [np.exp(-2 * ((x[i] - x[j]) ** 2).sum()) for i in range(9) for j in range(i)]
    assert collapse.uniformity(x) == pytest.approx(np.log(np.mean(pairs)))


def test_rankme_is_the_published_equation_and_is_not_centered() -> None:
    """Garrido et al. 2023, equation 1: exp(-sum p log p) with p = sigma / sum(sigma) + 1e-7, of the raw features."""
    x = (np.random.default_rng(0).normal(size=(200, 16)) @ np.diag(np.arange(1, 17.0)) + 30).astype(
        np.float32
    )
    sigma = np.sqrt(np.linalg.eigvalsh(x.astype(np.float64).T @ x.astype(np.float64)))
    p = sigma / sigma.sum() + 1e-7
    found = values(x)
    assert found["rankme"] == pytest.approx(np.exp(-np.sum(p * np.log(p))), rel=1e-5)
    assert found["rankme"] < 0.7 * found["effective_rank"]
    centered = x.astype(np.float64) - x.mean(0, dtype=np.float64)
    share = np.linalg.svd(centered, compute_uv=False)
    share /= share.sum()
    assert found["effective_rank"] == pytest.approx(np.exp(-np.sum(share * np.log(share))), rel=1e-5)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alpha_req_is_the_exponent_of_the_eigenvalues(alpha: float) -> None:
    """Agrawal et al. 2022: lambda_j ~ j^-alpha for the eigenvalues of the covariance."""
    random = np.random.default_rng(0)
    basis, _ = np.linalg.qr(random.normal(size=(400, 30)) - 0.0)
    basis -= basis.mean(0)
    basis, _ = np.linalg.qr(basis)
    turn, _ = np.linalg.qr(random.normal(size=(30, 30)))
    x = basis * np.arange(1, 31.0) ** (-alpha / 2) @ turn
    assert values(100 * x + 3)["alpha_req"] == pytest.approx(alpha, abs=1e-2)


def test_features_of_zeros_are_one_point() -> None:
    found = values(np.zeros((50, 8)))
    assert (found["uniformity"], found["constant"]) == (0, 1)
    assert "100 % constant features" in Collapse.finding("pooled", found)

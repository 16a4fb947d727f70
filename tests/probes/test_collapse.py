"""Measures of collapse where the answer is known."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from raysl.errors import UserError
from raysl.probes import collapse


def values(features_nd: npt.NDArray[np.float64]) -> dict[str, float]:
    found = collapse.Collapse(collapse.Config()).measure(features_nd.astype(np.float32))
    return {row.name: row.value for row in found}


def test_features_that_fill_the_sphere() -> None:
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


def test_uniformity_equals_a_sum_over_pairs() -> None:
    x = np.random.default_rng(0).normal(size=(9, 3))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    pairs = [np.exp(-2 * ((x[i] - x[j]) ** 2).sum()) for i in range(9) for j in range(i)]
    assert collapse.uniformity(x) == pytest.approx(np.log(np.mean(pairs)))


def test_one_image_is_refused() -> None:
    with pytest.raises(UserError, match="was given one"):
        values(np.ones((1, 4)))

"""Ridge regression from sums is that of scikit-learn on the rows themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raysl.probes._ridge import PENALTIES, Moments, fit


def rows(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    random = np.random.default_rng(seed)
    features_nd = random.normal(size=(n, 6)) * [1, 10, 0.1, 3, 1, 1] + [0, 50, 0, -3, 0, 2]
    features_nd[:, 5] = 2
    targets_nk = features_nd[:, :3] @ random.normal(size=(3, 2)) + 0.1 * random.normal(size=(n, 2)) + 7
    return torch.from_numpy(features_nd).double(), torch.from_numpy(targets_nk).double()


def moments(features_nd: torch.Tensor, targets_nk: torch.Tensor) -> Moments:
    made = Moments(features_nd.shape[1], targets_nk.shape[1])
    for first in range(0, len(features_nd), 7):
        made.add(features_nd[first : first + 7], targets_nk[first : first + 7])
    return made


@pytest.mark.parametrize("penalty", [1.0, 1e-3])
def test_the_readout_and_its_error_are_those_of_scikit_learn(penalty: float) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    features_nd, targets_nk = rows(50)
    varying_nd = features_nd[:, :5]
    standard_nd = (varying_nd - varying_nd.mean(0)) / varying_nd.std(0, correction=0)
    wanted = linear_model.Ridge(alpha=penalty * 50).fit(standard_nd, targets_nk)
    found = moments(features_nd, targets_nk)
    readout = found.solve(penalty)
    said_nk = readout(features_nd.float())
    np.testing.assert_allclose(said_nk, wanted.predict(standard_nd), rtol=1e-4, atol=1e-4)
    squared = ((said_nk.double() - targets_nk) ** 2).sum(1).mean()
    assert found.error(readout) == pytest.approx(float(squared), rel=1e-3)


def test_the_penalty_is_the_best_on_held_out_rows() -> None:
    fitted, held = moments(*rows(40)), moments(*rows(15, seed=1))
    errors = [
        float(((fitted.solve(p)(rows(15, 1)[0].float()) - rows(15, 1)[1]) ** 2).sum()) for p in PENALTIES
    ]
    readout, chosen = fit(fitted, held)
    assert chosen == PENALTIES[int(np.argmin(errors))]
    together = moments(*(torch.cat(parts) for parts in zip(rows(40), rows(15, 1), strict=True)))
    torch.testing.assert_close(readout.weights_dk, together.solve(chosen).weights_dk)
    assert fit(fitted, Moments(6, 2))[1] == PENALTIES[0]

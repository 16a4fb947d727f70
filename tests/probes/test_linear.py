"""The linear probe finds the optimum of logistic regression, whatever the scale of the features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from raysl.probes import Labeled, Tiles, linear, tile_rows

# All rows in one tile.
WHOLE = Tiles(torch.device("cpu"), 1 << 30)


def blobs(n: int, classes: int = 4, seed: int = 0, dim: int = 10) -> Labeled:
    """Overlapping clouds with correlated features."""
    means = np.random.default_rng(7).normal(size=(classes, dim))
    mix = np.random.default_rng(8).normal(size=(dim, dim))
    random = np.random.default_rng(seed)
    labels_n = random.integers(0, classes, n)
    features_nd = (means[labels_n] + random.normal(size=(n, dim))) @ mix
    return Labeled(features_nd.astype(np.float32), labels_n)


def test_schedules_are_pinned() -> None:
    # Schedules are not part of the protocol hash. If one changes, raise `version` of the probe and pin it here.
    pinned = {
        "imagenet": linear.Sgd(epochs=28, drops=(8, 16, 24), lr=0.01, weight_decay=5e-4),
        "places205": linear.Sgd(epochs=14, drops=(4, 8, 12), lr=0.01, weight_decay=5e-4),
        "inat18": linear.Sgd(epochs=84, drops=(24, 48, 72), lr=0.01, weight_decay=5e-4),
        "fast": linear.Sgd(epochs=7, drops=(2, 4, 6), lr=0.01, weight_decay=5e-4),
    }
    assert (pinned, 2) == (linear.SCHEDULES, linear.Config.version)


def values(train: Labeled, test: Labeled) -> dict[str, float]:
    return {row.name: row.value for row in linear.Linear(linear.Config()).run(train, test)}


def standardized(data: Labeled) -> tuple[Tensor, Tensor]:
    features_nd = torch.from_numpy(data.features_nd)
    return (features_nd - features_nd.mean(0)) / features_nd.std(0), torch.from_numpy(data.labels_n)


@pytest.mark.parametrize("weight_decay", [1e-1, 1e-4])
def test_gradient_vanishes_at_the_solution(weight_decay: float) -> None:
    features_nd, labels_n = standardized(blobs(600))
    fit = linear.Fit(features_nd, 4, linear.Config(), WHOLE)
    found = fit(features_nd, labels_n, weight_decay, fit.zero())
    weights_dc = found.weights_cd.T.double().requires_grad_()
    bias_c = found.bias_c.double().requires_grad_()
    scores_nc = features_nd.double() @ weights_dc + bias_c
    loss = torch.nn.functional.cross_entropy(scores_nc, labels_n)
    gradient = torch.autograd.grad(loss + weight_decay / 2 * weights_dc.square().sum(), [weights_dc, bias_c])
    assert max(float(g.abs().max()) for g in gradient) < 1e-3


def test_the_test_set_is_standardized_by_the_train_set() -> None:
    """A test set of two of the four classes has another mean and spread."""
    sklearn = pytest.importorskip("sklearn.linear_model")
    train, test = blobs(400), blobs(400, seed=1)
    few = Labeled(test.features_nd[test.labels_n < 2], test.labels_n[test.labels_n < 2])
    (found,) = (
        row.value
        for row in linear.Linear(linear.Config(weight_decays=(1e-2,))).run(train, few)
        if row.name == "top1"
    )
    mean_d, std_d = train.features_nd.mean(0), train.features_nd.std(0)
    theirs = sklearn.LogisticRegression(C=1 / (1e-2 * 400), tol=1e-8, max_iter=1000)
    theirs.fit((train.features_nd - mean_d) / std_d, train.labels_n)
    assert found == pytest.approx(theirs.score((few.features_nd - mean_d) / std_d, few.labels_n), abs=1e-6)


def test_scale_and_shift_of_a_feature_do_not_matter() -> None:
    train, test = blobs(400), blobs(400, seed=1)
    scale = np.geomspace(1e-2, 1e2, 10, dtype=np.float32)
    moved = [Labeled(x.features_nd * scale + 3, x.labels_n) for x in (train, test)]
    plain = values(train, test)
    assert values(*moved)["top1"] == pytest.approx(plain["top1"], abs=0.01)
    assert plain["top1"] > 0.8


def test_constant_and_repeated_features_are_harmless() -> None:
    train, test = blobs(400), blobs(400, seed=1)

    def wider(data: Labeled) -> Labeled:
        constant = np.full((len(data.labels_n), 1), 1e3, np.float32)
        return Labeled(np.hstack([data.features_nd, data.features_nd, constant]), data.labels_n)

    assert values(wider(train), wider(test))["top1"] == pytest.approx(values(train, test)["top1"], abs=0.02)


def test_noise_gets_strong_weight_decay() -> None:
    random = np.random.default_rng(0)
    noise = Labeled(random.normal(size=(300, 100)).astype(np.float32), random.integers(0, 2, 300))
    assert (
        values(noise, blobs(50, 2, dim=100))["weight_decay"] >= values(blobs(300), blobs(50))["weight_decay"]
    )


def test_few_images_get_the_strongest_weight_decay() -> None:
    train = Labeled(np.eye(2, 10, dtype=np.float32), np.array([0, 1]))
    assert values(train, blobs(20, 2))["weight_decay"] == 1.0


def test_the_published_schedule_is_close_to_the_optimum() -> None:
    train, test = blobs(2000), blobs(400, seed=1)
    found = {row.name: row.value for row in linear.Linear(linear.Config("imagenet")).run(train, test)}
    assert found["top1"] == pytest.approx(values(train, test)["top1"], abs=0.04)
    assert found["weight_decay"] == 5e-4


def test_sgd_is_the_published_update() -> None:
    """One batch an epoch, so that every step is known: Nesterov momentum, weight decay, a drop."""
    data = blobs(50, classes=3)
    features_nd, labels_n = standardized(data)
    schedule = linear.Sgd(epochs=3, drops=(2,), lr=0.5, weight_decay=0.1)
    found = linear.descend(features_nd, labels_n, schedule)
    x, onehot = features_nd.double().numpy(), np.eye(3)[data.labels_n]
    weights_cd, bias_c = np.zeros((3, 10)), np.zeros(3)
    speed, speed_of_bias = np.zeros((3, 10)), np.zeros(3)
    for epoch in range(3):
        logits = x @ weights_cd.T + bias_c
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        slope = (p - onehot).T @ x / 50 + 0.1 * weights_cd
        slope_of_bias = (p - onehot).mean(0)
        speed, speed_of_bias = 0.9 * speed + slope, 0.9 * speed_of_bias + slope_of_bias
        lr = 0.5 if epoch < 2 else 0.05
        weights_cd -= lr * (slope + 0.9 * speed)
        bias_c -= lr * (slope_of_bias + 0.9 * speed_of_bias)
    np.testing.assert_allclose(found.weights_cd.numpy(), weights_cd, atol=1e-5)
    np.testing.assert_allclose(found.bias_c.numpy(), bias_c, atol=1e-5)


@pytest.mark.parametrize("weight_decay", [1e-1, 1e-4])
def test_several_tiles_give_the_solution_of_one(weight_decay: float) -> None:
    features_nd, labels_n = standardized(blobs(601))
    found = {}
    for rows in (len(labels_n), 150):
        fit = linear.Fit(features_nd, 4, linear.Config(), Tiles(torch.device("cpu"), rows))
        found[rows] = fit(features_nd, labels_n, weight_decay, fit.zero())
    whole, tiled = found.values()
    torch.testing.assert_close(tiled.weights_cd, whole.weights_cd, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(tiled.bias_c, whole.bias_c, atol=1e-3, rtol=1e-3)


def test_the_tiles_are_those_of_a_gpu_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    features_nd, gpu = np.zeros((1000, 100), np.float32), torch.device("cuda:0")
    rows = {}
    for num_bytes in (10**6, 800_000, 799_999):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, total=num_bytes: (0, total))
        rows[num_bytes] = tile_rows(features_nd, gpu)
    assert rows == {10**6: 1000, 800_000: 1000, 799_999: 124}
    assert tile_rows(features_nd, torch.device("cpu")) == 1000

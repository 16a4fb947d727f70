"""The space of a sweep: names, values, points, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ray import tune

from raysl import ray_cluster
from raysl.config import Pretraining
from raysl.errors import UserError
from raysl.tuning.space import Space, apply_values, domain_ends, space
from raysl.tuning.trainable import tune_trainable

BASE = Pretraining("data", "run", parts={"pirl": {"dim": 16}})


def made(*vary: str, listed: bool = True, base: Pretraining = BASE) -> Space:
    return space(base, vary, listed)


def test_a_short_name_takes_the_values_of_the_field_itself() -> None:
    (temperature, lam) = made("temperature", "lam").dimensions
    assert (temperature.name, lam.name) == ("pirl.temperature", "pirl.lam")
    assert temperature.values == (0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.5)
    assert lam.values == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert made("num_permutations").dimensions[0].name == "jigsaw.num_permutations"
    assert made("pirl.head").dimensions[0].values == ("linear", "mlp", "bn")
    assert made("per_patch_color").dimensions[0].values == (False, True)


def test_values_are_of_the_type_of_the_field() -> None:
    assert made("jigsaw.num_permutations=none,100,2_000").dimensions[0].values == (None, 100, 2000)
    assert made("temperature=.1,0.2").dimensions[0].values == (0.1, 0.2)
    assert made("pirl.loss=nce,infonce").dimensions[0].values == ("nce", "infonce")


def test_a_grid_is_every_combination_and_becomes_configurations() -> None:
    points = made("temperature=0.1,0.2", "lam=0,1", "optim.lr=0.1")
    assert [tuple(p.values()) for p in points.grid()] == [
        (0.1, 0.0, 0.1),
        (0.1, 1.0, 0.1),
        (0.2, 0.0, 0.1),
        (0.2, 1.0, 0.1),
    ]
    config = apply_values(BASE, points.grid()[1])
    assert (config.parts["pirl"].temperature, config.parts["pirl"].lam, config.optim.lr) == (0.1, 1.0, 0.1)
    assert config.parts["pirl"].dim == 16


def test_methods_can_vary_with_a_field_that_all_of_them_have() -> None:
    points = made("method=predict-jigsaw,pirl-jigsaw", "num_permutations=10,20")
    configs = [apply_values(BASE, p) for p in points.grid()]
    assert [(c.method, c.parts["jigsaw"].num_permutations) for c in configs][1:3] == [
        ("predict-jigsaw", 20),
        ("pirl-jigsaw", 10),
    ]
    with pytest.raises(UserError, match="temperature"):
        made("method=predict-jigsaw,pirl-jigsaw", "temperature")


def test_a_method_with_a_comma_in_its_name_and_a_path_with_dots() -> None:
    base = Pretraining("data", "run", "multitask-rotation,jigsaw")
    assert made("optim.lr=0.1,0.2", base=base).names == ["optim.lr"]
    assert made("view.recipe=pirl,../own.py:noisy").dimensions[0].values == ("pirl", "../own.py:noisy")


@pytest.mark.parametrize(("low", "high"), [(0.99, 0.99999), (0.030001, 0.123456)])
def test_rounded_values_stay_in_the_interval(low: float, high: float) -> None:
    (dimension,) = made(f"optim.momentum={low}..{high}", listed=False).dimensions
    assert (dimension.rounded(low), dimension.rounded(high)) == (low, high)


def test_random_points_lie_in_the_interval_and_depend_on_the_number_alone() -> None:
    points = made("temperature=0.03..0.5", "num_negatives=64..4096", "pirl.head", listed=False)
    drawn = [points.sample(0, trial) for trial in range(200)]
    temperatures = np.array([p["pirl.temperature"] for p in drawn])
    assert 0.03 <= temperatures.min() < 0.04
    assert 0.4 < temperatures.max() <= 0.5
    # Logarithmic: as many below the geometric mean as above.
    assert 80 <= (temperatures < (0.03 * 0.5) ** 0.5).sum() <= 120
    assert all(isinstance(p["pirl.num_negatives"], int) for p in drawn)
    assert {p["pirl.head"] for p in drawn} == {"linear", "mlp", "bn"}
    assert points.sample(0, 150) == drawn[150]
    assert points.sample(1, 150) != drawn[150]


def test_corners_hold_every_end() -> None:
    points = made("temperature=0.1..0.2", "lam=0..1", listed=False)
    corners = {tuple(p.values()) for p in points.corners()}
    assert corners == {(0.1, 0.0), (0.1, 1.0), (0.2, 0.0), (0.2, 1.0)}


def test_domains_of_ray_tune_hold_the_same_values() -> None:
    points = made("temperature=0.03..0.5", "num_negatives=64..4096", "pirl.head", listed=False)
    domains = {d.name: d.domain() for d in points.dimensions}
    assert (domains["pirl.temperature"].lower, domains["pirl.temperature"].upper) == (0.03, 0.5)
    assert (domains["pirl.num_negatives"].lower, domains["pirl.num_negatives"].upper) == (64, 4097)
    assert domains["pirl.head"].categories == ["linear", "mlp", "bn"]


def test_changed_values_are_moved_back_into_their_intervals() -> None:
    points = made("temperature=0.1..0.2", "lam=0,0.5,1", listed=False)
    assert points.clipped({"pirl.temperature": 0.2400001, "pirl.lam": 0.5}) == {
        "pirl.temperature": 0.2,
        "pirl.lam": 0.5,
    }


@pytest.mark.parametrize(
    ("values", "answer"),
    [
        ({"pirl.temperatur": 0.1}, r"Did you mean 'pirl\.temperature'"),
        ({"pirl.temperature": lambda: 0.1}, "'pirl.temperature' is a function"),
        ({"pirl.num_negatives": 0.5}, r"whole numbers and was given 0\.5"),
        ({"pirl.temperature": -1.0}, "temperature"),
        ({"epochs": 3}, "cannot vary"),
        ({"temperature": 0.1, "pirl.temperature": 0.2}, "'pirl.temperature' is varied twice"),
    ],
)
def test_values_of_ray_tune_that_are_refused(values: dict[str, Any], answer: str) -> None:
    with pytest.raises(UserError, match=answer):
        apply_values(BASE, values)


def test_numbers_of_numpy_become_plain() -> None:
    config = apply_values(BASE, {"pirl.temperature": np.float64(0.1), "pirl.num_negatives": np.int64(32)})
    assert type(config.parts["pirl"].num_negatives) is int


def test_another_method_has_as_many_negatives() -> None:
    base = apply_values(BASE, {"pirl.num_negatives": 32})
    assert apply_values(base, {"method": "npid"}).parts["npid"].num_negatives == 32
    assert apply_values(base, {"method": "simclr"}).parts.keys() == {"simclr"}


@pytest.mark.parametrize(
    ("vary", "answer"),
    [
        ("temperatur", r"Did you mean 'pirl\.temperature'"),
        ("npid.temperature", r"Did you mean 'pirl\.temperature'"),
        (
            "jigsaw.num_perms",
            r"Did you mean 'jigsaw\.num_permutations'\? Known: jigsaw\.criterion",
        ),
        ("pirl", r"'pirl' is a group of fields. Vary one of pirl\.dim"),
        ("min_scale", "jigsaw.min_scale, view.min_scale"),
        ("momentum", "bank.momentum, optim.momentum"),
        ("epochs", "cannot vary"),
        ("data=a,b", "cannot vary"),
        ("seed=0,1", "--seeds"),
        ("dim", "no list of values"),
        ("temperature=", "empty"),
        ("temperature=warm", "'warm' of 'pirl.temperature'.*must be a number"),
        ("temperature=nan", "must be a number"),
        ("num_negatives=1.5", "must be a whole number"),
        ("pirl.head=deep", "must be one of linear, mlp, bn"),
        ("temperature=0.1..0.2", "is an interval"),
        (
            "method=pirl-jigsaw,simclr temperature",
            "pirl.temperature of pirl-jigsaw, simclr.temperature of simclr",
        ),
        ("method=pirl-jigsaw,simclr lam=0,1", "pirl.lam of pirl-jigsaw, and not a field of all"),
    ],
)
def test_what_is_refused(vary: str, answer: str) -> None:
    with pytest.raises(UserError, match=answer):
        made(*vary.split())


def test_an_interval_the_wrong_way_round_is_empty() -> None:
    with pytest.raises(UserError, match="empty"):
        made("temperature=0.5..0.1", listed=False)


def test_a_field_is_given_once() -> None:
    with pytest.raises(UserError, match="twice"):
        made("temperature", "pirl.temperature=0.1")


def test_a_value_that_the_field_does_not_allow_is_named() -> None:
    points = made("lam=0.5,2")
    with pytest.raises(UserError, match=r"pirl.lam is 2"):
        apply_values(BASE, points.grid()[1])


def test_the_ends_of_domains_of_ray_tune() -> None:
    ends = domain_ends(
        {
            "temperature": tune.loguniform(0.03, 0.5),
            "pirl.num_negatives": tune.randint(8, 65),
            "pirl.head": tune.choice(["linear", "bn"]),
            "optim.lr": tune.grid_search([0.1, 0.2]),
            "pirl.lam": 0.5,
        }
    )
    assert {name: tuple(values) for name, values in ends.items()} == {
        "temperature": (0.03, 0.5),
        "pirl.num_negatives": (8, 64),
        "pirl.head": ("linear", "bn"),
        "optim.lr": (0.1, 0.2),
        "pirl.lam": (0.5,),
    }


@pytest.mark.parametrize(
    ("name", "domain", "answer"),
    [
        ("pirl.temperatur", tune.uniform(0, 1), r"Did you mean 'pirl\.temperature'"),
        ("pirl.temperature", tune.uniform(0.5, 0.1), "domain of 'pirl.temperature' is empty"),
        ("pirl.temperature", tune.choice([]), "domain of 'pirl.temperature' is empty"),
        ("pirl.temperature", tune.randn(0, 1), "'pirl.temperature' has no bounds"),
        ("pirl.temperature", tune.sample_from(lambda spec: 0.1), "'pirl.temperature' is a function"),
        ("pirl.temperature", lambda: 0.1, "'pirl.temperature' is a function"),
        ("pirl.num_negatives", tune.uniform(0.5, 8.5), r"whole numbers and was given 0\.5"),
        ("seed", tune.randint(0, 9), "Seeds are given to --seeds"),
        (
            "pirl.lam",
            tune.uniform(0, 2),
            r"trial with pirl\.lam=2 could not run, so the sweep was not started",
        ),
        ("pirl.head", tune.choice(["bn", "deep"]), r"trial with pirl\.head=deep could not run"),
    ],
)
def test_a_space_of_ray_tune_is_refused_before_ray_starts(
    name: str, domain: Any, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "start", lambda: pytest.fail("Ray was started"))
    with pytest.raises(UserError, match=answer):
        tune_trainable(BASE, "out", param_space={name: domain})


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"probe": "knm"}, "Did you mean 'knn'"),
        ({"seeds": ()}, "at least one seed"),
        ({"rungs": (0.5, 0.2, 1)}, "increasing shares"),
        ({"rungs": (0.5,)}, "the last is 1"),
    ],
)
def test_arguments_of_a_trainable_are_refused(changes: dict[str, Any], answer: str) -> None:
    with pytest.raises(UserError, match=answer):
        tune_trainable(BASE, "out", **changes)


def test_whole_numbers_are_drawn_equally_often_and_the_size_of_a_batch_from_its_list() -> None:
    points = made("jigsaw.grid=2..5", "batch_size", listed=False)
    drawn = [points.sample(0, trial) for trial in range(1000)]
    counts = np.bincount([p["jigsaw.grid"] for p in drawn], minlength=6)
    assert 200 < counts[2:].min() <= counts[2:].max() < 300
    assert {p["batch_size"] for p in drawn} == set(points.dimensions[1].values)
    with pytest.raises(UserError, match=r"batch_size=64\.\.512 is an interval"):
        made("batch_size=64..512", listed=False)

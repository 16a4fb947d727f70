"""What a sweep decides: a function of scores, in whatever order they came and however often it was interrupted."""

from __future__ import annotations

import random
from typing import Any

import pytest

from raysl import rng
from raysl.config import Pretraining
from raysl.errors import UserError
from raysl.tuning import schedulers, table
from raysl.tuning.config import SweepConfig
from raysl.tuning.space import space
from raysl.tuning.standing import Climb, Standing

BASE = Pretraining("data", "run")
VARY = ("temperature=0.03..0.5", "lambda=0..1")


def setting(**changes: Any) -> SweepConfig:
    return SweepConfig("out", "test", VARY, **{"searcher": "random", "samples": 9, **changes})


def stand(config: SweepConfig, rows: list[dict[str, Any]]) -> Standing:
    return Standing(config, space(BASE, config.vary, config.searcher == "grid"), rows)


def measured(standing: Standing, climb: Climb) -> dict[str, Any]:
    """A made-up score that depends on the point, the seed and the rung."""
    values = standing.values(climb.trial, climb.rung)
    noise = rng.generator("noise", str(values), climb.seed, climb.rung).random()
    assert values is not None
    score = (climb.rung + 1) / 10 - abs(values["pirl.lam"] - 0.5) + noise / 50
    if climb.trial == 4 and climb.seed == 1:
        return {"event": "failed", **vars(climb), "reason": "the loss is nan"}
    return {"event": "score", **vars(climb), "score": score}


def play(config: SweepConfig, at_once: int, shuffle: int) -> list[dict[str, Any]]:
    """A whole sweep: runs end in a shuffled order, and every so often all that is under way is lost."""
    chance = random.Random(shuffle)
    rows: list[dict[str, Any]] = []
    running: list[Climb] = []
    while True:
        standing = stand(config, rows)
        running += [climb for climb in standing.ready() if climb not in running][: at_once - len(running)]
        if not running:
            return table.rows(standing)
        if chance.random() < 0.2:
            running = []
            continue
        done = running.pop(chance.randrange(len(running)))
        if done.trial not in standing.failures:
            rows.append(measured(standing, done))


@pytest.mark.parametrize("scheduler", ["none", "asha", "median", "pbt"])
def test_decisions_do_not_depend_on_order_concurrency_or_interruptions(scheduler: str) -> None:
    config = setting(scheduler=scheduler)
    expected = play(config, at_once=1, shuffle=0)
    states = {row["state"] for row in expected}
    assert states == {"finished", "failed"} | ({"stopped"} if scheduler in ("asha", "median") else set())
    for shuffle in range(1, 6):
        assert play(config, at_once=shuffle, shuffle=shuffle) == expected


def test_optuna_proposes_the_same_after_any_interruption() -> None:
    pytest.importorskip("optuna")
    config = setting(searcher="optuna", scheduler="asha", samples=14)
    expected = play(config, at_once=1, shuffle=0)
    assert play(config, at_once=4, shuffle=3) == expected
    assert len({str(row["values"]) for row in expected}) == 14


def test_what_optuna_proposed_stays_as_it_was_tried() -> None:
    values = {"pirl.temperature": 0.123, "pirl.lam": 0.456}
    rows: list[dict[str, Any]] = [{"event": "trial", "trial": 2, "rung": 0, "values": values}]
    assert stand(setting(searcher="optuna"), rows).values(2) == values


def test_more_samples_leave_the_first_as_they_were() -> None:
    few, more = play(setting(), 1, 0), play(setting(samples=12), 2, 1)
    by_trial = {row["trial"]: row for row in more}
    assert all(by_trial[row["trial"]] == row for row in few)


def test_every_trial_is_judged_at_the_same_shares_of_one_schedule() -> None:
    assert setting(scheduler="asha").shares() == pytest.approx((1 / 9, 1 / 3, 1))
    assert setting(scheduler="median").shares() == (0.25, 0.5, 0.75, 1.0)
    assert setting().shares() == (1.0,)
    assert setting(rungs=2, reduction=4).shares() == (0.25, 1.0)


def test_seeds_are_averaged_and_their_spread_is_told() -> None:
    config = setting(samples=1, seeds=(3, 5))
    rows = [
        {"event": "score", "trial": 0, "seed": seed, "rung": 0, "score": score}
        for seed, score in ((3, 0.2), (5, 0.4))
    ]
    (row,) = table.rows(stand(config, rows))
    assert (row["score"], row["spread"], row["state"]) == (
        pytest.approx(0.3),
        pytest.approx(0.1414, rel=1e-3),
        "finished",
    )
    (row,) = table.rows(stand(config, rows[:1]))
    assert row["score"] is None


def test_a_failed_trial_is_marked_and_can_be_tried_again() -> None:
    config = setting(samples=2, seeds=(0,))
    failed = {"event": "failed", "trial": 0, "seed": 0, "rung": 0, "reason": "disk full"}
    standing = stand(config, [failed])
    assert [climb.trial for climb in standing.ready()] == [1]
    assert table.rows(standing)[-1]["reason"] == "disk full"
    again = stand(config, [failed, {"event": "retry", "trial": 0}])
    assert [climb.trial for climb in again.ready()] == [0, 1]


def test_a_trial_of_the_last_quarter_goes_on_from_one_of_the_first() -> None:
    config = setting(scheduler="pbt", samples=4, seeds=(0,), rungs=2)
    scores = [0.5, 0.1, 0.3, 0.4]
    rows = [
        {"event": "score", "trial": n, "seed": 0, "rung": 0, "score": score} for n, score in enumerate(scores)
    ]
    assert stand(config, rows[:3]).ready() == [Climb(3, 0, 0)]
    standing = stand(config, rows)
    assert [standing.donor(trial, 1) for trial in range(4)] == [None, 0, None, None]
    assert standing.folder(1, 0, 1) == "trials/0001/seed-0-from-rung-1"
    assert standing.folder(0, 0, 1) == "trials/0000/seed-0"
    values, copied = standing.values(1, 1), standing.values(0, 0)
    assert values
    assert copied
    assert values != standing.values(1, 0)
    assert values["pirl.temperature"] / copied["pirl.temperature"] == pytest.approx(1, abs=0.21)


def test_asha_keeps_the_best_share_of_those_before() -> None:
    assert schedulers.asha(0.1, [], 3)
    assert not schedulers.asha(0.1, [0.2], 3)
    assert schedulers.asha(0.9, [0.1, 0.5, 0.8], 3)
    assert not schedulers.asha(0.6, [0.1, 0.5, 0.8, 0.9], 3)


def test_median_waits_for_three_and_stops_the_lower_half() -> None:
    earlier = [[0.1, 0.3], [0.2, 0.4], [0.5, 0.7]]
    assert schedulers.median([0.0, 0.1], earlier[:2])
    assert not schedulers.median([0.25, 0.1], earlier)
    assert schedulers.median([0.31, 0.1], earlier)


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"seeds": (1, 1)}, "each once"),
        ({"samples": 0}, "samples is 0"),
        ({"reduction": 1}, "reduction is 1"),
        ({"probe": "knm"}, "Did you mean 'knn'"),
        ({"gpus_per_worker": 2}, "at most 1"),
        ({"scheduler": "pbt", "rungs": 1}, "nothing for pbt"),
        ({"scheduler": "pbt", "retry": True}, "Leave out --retry"),
        ({"probe": "detection"}, r"needs --detection\.data"),
        ({"probe": "voc_svm"}, r"needs --voc-svm\.data"),
        ({"scheduler": "pbt", "searcher": "optuna"}, "searcher random"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], answer: str) -> None:
    with pytest.raises(UserError, match=answer):
        setting(**changes)

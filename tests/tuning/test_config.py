"""Configuration of a sweep: rungs, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from raysl.errors import UserError
from raysl.tuning.config import SweepConfig
from raysl.tuning.sweep import _with_defaults


def made(**changes: Any) -> SweepConfig:
    return SweepConfig("out", ("temperature",), **{"searcher": "random", **changes})


def test_every_trial_is_scored_at_the_same_shares_of_one_schedule() -> None:
    assert made(scheduler="asha").shares() == pytest.approx((1 / 9, 1 / 3, 1))
    assert made(scheduler="median").shares() == (0.25, 0.5, 0.75, 1.0)
    assert made().shares() == (1.0,)
    assert made(rungs=2, reduction=4).shares() == (0.25, 1.0)


def test_what_may_change_between_sessions_are_fields() -> None:
    assert set(made().may_change()) <= {field.name for field in dataclasses.fields(SweepConfig)}
    assert "samples" in made(scheduler="asha").may_change()
    assert "samples" not in made(scheduler="pbt").may_change()


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"vary": ()}, "at least one field"),
        ({"seeds": (1, 1)}, "each once"),
        ({"samples": 0}, "--samples is 0"),
        ({"reduction": 1}, "--reduction is 1"),
        ({"probe": "knm"}, "Did you mean 'knn'"),
        ({"gpus_per_worker": 2}, "at most 1"),
        ({"scheduler": "pbt", "rungs": 1}, "at least --rungs 2"),
        ({"scheduler": "pbt", "retry": True}, "Leave out --retry"),
        ({"probe": "collapse"}, "gives no score"),
        ({"probe": "detection"}, r"needs --detection\.data"),
        ({"probe": "voc_svm"}, r"needs --voc-svm\.data"),
        ({"scheduler": "hyperband", "searcher": "optuna"}, "searcher random"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], answer: str) -> None:
    with pytest.raises(UserError, match=answer):
        SweepConfig(**{"out": "out", "vary": ("temperature",), "searcher": "random", **changes})


def test_a_field_that_is_newer_than_a_sweep_has_its_default() -> None:
    defaults = {"stream": {"place": "data", "decode": "data"}, "epochs": 1, "parts": {}}
    begun = {"stream": {"place": "trainer"}, "epochs": 2, "parts": {"pirl": {"dim": 8}}}
    assert _with_defaults(begun, defaults) == {
        "stream": {"place": "trainer", "decode": "data"},
        "epochs": 2,
        "parts": {"pirl": {"dim": 8}},
    }

"""Verdicts on claims follow from intervals over seeds."""

from __future__ import annotations

from typing import Any

import pytest

from raysl.experiment.claims import CLAIMS
from raysl.experiment.lectures import Claim, Contrast, Measured, Term, judge, observations, page

BETTER = Contrast("a less b", (Term("a", "knn"), -Term("b", "knn")))


def results(a: list[float], b: list[float]) -> dict[tuple[str, str, str], dict[int, float]]:
    return {("a", "knn", "pooled"): dict(enumerate(a)), ("b", "knn", "pooled"): dict(enumerate(b))}


@pytest.mark.parametrize(
    ("a", "verdict"),
    [
        ([0.52, 0.53, 0.54], "shows"),
        ([0.50, 0.501, 0.502], "does not"),  # the interval ends below half a point
        ([0.40, 0.41, 0.42], "does not"),
        ([0.45, 0.50, 0.60], "cannot tell"),
        ([0.60, 0.61], "cannot tell"),  # two seeds
        ([], "cannot tell"),
    ],
)
def test_a_verdict_follows_from_the_interval(a: list[float], verdict: str) -> None:
    claim = Claim("a is better", "figure", (BETTER,))
    assert judge(claim, results(a, [0.5, 0.5, 0.5]))[0] == verdict


def test_the_interval_is_that_of_student() -> None:
    low, high = Measured(BETTER, (0.01, 0.02, 0.03)).interval() or (0, 0)
    # t(0.975, 2) = 4.3027, standard error 0.01 / sqrt(3)
    assert (low, high) == pytest.approx((0.02 - 0.024841, 0.02 + 0.024841), abs=1e-6)


def test_seeds_are_compared_in_pairs_and_all_contrasts_are_needed() -> None:
    found = results([0.1, 0.5, 0.9], [0.08, 0.48, 0.88])
    other = Contrast("b less a", tuple(-term for term in BETTER.terms))
    assert judge(Claim("", "", (BETTER,)), found)[0] == "shows"
    assert judge(Claim("", "", (BETTER, other)), found)[0] == "does not"
    unknown = Contrast("c less a", (Term("c", "knn"), -Term("a", "knn")))
    assert judge(Claim("", "", (BETTER, unknown)), found)[0] == "cannot tell"


def test_rows_of_probes_sweeps_and_label_noise_become_results() -> None:
    probe: dict[str, Any] = {"layer": "pooled", "seed": 1, "protocol": "fast", "value": 0.25}
    rows: list[dict[str, Any]] = [
        {**probe, "label": "x", "probe": "knn", "name": "top1/k=20,T=0.07"},
        {**probe, "label": "x", "probe": "knn", "name": "top5/k=20,T=0.07"},
        {**probe, "label": "x", "probe": "linear", "name": "top1"},
        {**probe, "label": "x", "probe": "linear", "name": "top1", "protocol": "slow"},
        {**probe, "label": "x", "probe": "invariance", "name": "closer/jigsaw"},
        {**probe, "label": "x", "probe": "invariance", "name": "closer/jigsaw", "protocol": "2x2"},
        {**probe, "arm": "teacher", "noise": 0.75, "probe": "linear", "name": "top1", "protocol": "slow"},
        {"values": {"pirl.lam": 0.5}, "seeds": {"1": 0.25}, "state": "finished"},
    ]
    assert observations(rows, ("fast",), ("2x2",)) == {
        key: {1: 0.25}
        for key in (
            ("x", "knn", "pooled"),
            ("x", "linear by layer", "pooled"),
            ("x", "linear", "pooled"),
            ("x", "invariance/jigsaw", "pooled"),
            ("x", "invariance/jigsaw 2x2", "pooled"),
            ("teacher, noise 0.75", "linear", "pooled"),
            ("lambda=0.5", "knn", "pooled"),
        )
    }


def test_every_claim_has_a_line() -> None:
    lines = page(CLAIMS, {"nothing": {}}).splitlines()
    assert all(any(claim.says in line and "not measured" in line for line in lines) for claim in CLAIMS)
    assert len({claim.says for claim in CLAIMS}) == len(CLAIMS)


def test_the_page_counts_verdicts_and_prints_a_claim_once() -> None:
    claim = Claim("a is better", "figure", (BETTER,))
    few, enough = results([0.1, 0.2], [0.2, 0.1]), results([0.5, 0.6, 0.7], [0.4, 0.5, 0.6])
    said = page([claim], {"X": few, "Y": enough, "Z": {}})
    assert [name for name in "XYZ" if f"| {name} |" in said] == ["X", "Y"]
    assert said.startswith(
        "2 verdicts, each on a claim and a data set: 1 confirmed, 0 contradicted, 1 inconclusive."
    )
    assert said.count("a is better | figure") == 1

"""Judge the claims of the lectures by rows of probes, and write a page of verdicts.

A claim is a list of contrasts: sums of results that it says are positive. Each seed gives one value of a contrast, so
results of the same seed are compared in pairs. With the 95 % interval of the mean over seeds, by Student's t,

    shows         every interval lies above 0
    does not      an interval lies below `SMALLEST`, the smallest effect that counts
    cannot tell   otherwise, or with fewer than three seeds

The claim needs all of its contrasts, so several of them need no correction. A page has many claims, and one interval in
twenty misses its value by chance.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any, Literal

from raysl.errors import counted
from raysl.reporting.tables import Estimate

MIN_SEEDS = 3
# In shares of 1: half a point of accuracy.
SMALLEST = 0.005
Verdict = Literal["shows", "does not", "cannot tell"]
_PRINTED = {"shows": "confirmed", "does not": "contradicted", "cannot tell": "inconclusive"}
# The value of a measure by seed, by (label, measure, layer).
Observations = Mapping[tuple[str, str, str], Mapping[int, float]]


@dataclass(frozen=True)
class Term:
    """A result that takes part in a contrast."""

    label: str  # method, "untrained", or the value of a sweep such as "lambda=0.5"
    measure: str  # see `observations`
    layer: str = "pooled"  # layer of the features
    sign: int = 1  # 1 or -1

    def __neg__(self) -> Term:
        return replace(self, sign=-self.sign)


@dataclass(frozen=True)
class Contrast:
    """A sum of results that a claim says is positive."""

    says: str  # description for people, without the number
    terms: tuple[Term, ...]  # the results

    def by_seed(self, found: Observations) -> dict[int, float]:
        """Return the value for each seed that has all results."""
        results = [(term.sign, found.get((term.label, term.measure, term.layer), {})) for term in self.terms]
        seeds = sorted(set.intersection(*(set(by_seed) for _, by_seed in results)))
        return {seed: sum(sign * by_seed[seed] for sign, by_seed in results) for seed in seeds}


@dataclass(frozen=True)
class Claim:
    """A claim of a lecture, where it is published, and the contrasts that it says are positive."""

    says: str
    figure: str
    contrasts: tuple[Contrast, ...]


@dataclass(frozen=True)
class Measured:
    """A contrast, and its value for each seed."""

    contrast: Contrast
    values: tuple[float, ...]

    def interval(self) -> tuple[float, float] | None:
        """Return the 95 % interval of the mean; None for fewer than two seeds."""
        half = Estimate(self.values).half_width
        return None if half is None else (mean(self.values) - half, mean(self.values) + half)

    def verdict(self) -> Verdict:
        """Judge one contrast."""
        interval = self.interval()
        if interval is None or len(self.values) < MIN_SEEDS:
            return "cannot tell"
        low, high = interval
        return "shows" if low > 0 else "does not" if high < SMALLEST else "cannot tell"

    def __str__(self) -> str:
        if not self.values:
            return f"{self.contrast.says}: not measured"
        interval = self.interval()
        around = f" [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]" if interval else ""
        return f"{self.contrast.says}: {100 * mean(self.values):+.1f}{around}, {counted(len(self.values), 'seed')}"


def judge(claim: Claim, found: Observations) -> tuple[Verdict, list[Measured]]:
    """Return the verdict on a claim and its measured contrasts."""
    measured = [Measured(one, tuple(one.by_seed(found).values())) for one in claim.contrasts]
    verdicts = {one.verdict() for one in measured}
    if "does not" in verdicts:
        return "does not", measured
    return ("shows" if verdicts == {"shows"} else "cannot tell"), measured


def observations(
    rows: Iterable[Mapping[str, Any]], fast_linear: Sequence[str] = (), own_jigsaw: Sequence[str] = ()
) -> Observations:
    """Return the results of rows by label, measure, layer and seed.

    The measures are "knn", "linear" and "linear by layer" (the short schedule), top-1; "invariance" and
    "invariance/jigsaw", how often a transformed image is closer than another, or "invariance 2x2" and
    "invariance/jigsaw 2x2"; "top1@1%", "AP75", "mAP" and other names.

    Args:
        rows: rows of probes with a "label"; of sweeps; or of label noise, with an "arm".
        fast_linear: protocols of the short schedule of the linear probe.
        own_jigsaw: protocols of invariance to a jigsaw of 2 x 2 patches.
    """
    found: dict[tuple[str, str, str], dict[int, float]] = {}
    for row in rows:
        if "seeds" in row:
            (name, value), *_ = row["values"].items()
            short = name.rpartition(".")[2]
            label = f"{'lambda' if short == 'lam' else short}={value:g}"
            found[label, "knn", "pooled"] = {int(seed): score for seed, score in row["seeds"].items()}
            continue
        if not ({"label", "arm"} & row.keys() and "name" in row):
            continue
        label = row.get("arm", row.get("label"))
        label += f", noise {row['noise']:g}" if "noise" in row else ""
        if measure := _measure(row, fast_linear):
            measure += " 2x2" if row["protocol"] in own_jigsaw else ""
            found.setdefault((label, measure, row["layer"]), {})[row["seed"]] = row["value"]
    return found


def _measure(row: Mapping[str, Any], fast_linear: Sequence[str]) -> str:
    probe, name = row["probe"], row["name"]
    if probe == "knn":
        return "knn" if name == "top1/k=20,T=0.07" else ""
    if probe == "linear":
        return {"top1": "linear by layer" if row["protocol"] in fast_linear else "linear"}.get(name, "")
    if probe == "invariance":
        kind = re.fullmatch(r"closer(/\w+)?", name)
        return f"invariance{kind[1] or ''}" if kind else ""
    return str(name)


def page(claims: Sequence[Claim], found: Mapping[str, Observations]) -> str:
    """Return the number of claims of each verdict, and the Markdown table of claims.

    Args:
        claims: the claims, such as `raysl.experiment.claims.CLAIMS`.
        found: results by the name of a data set.
    """
    table = [
        "| claim | source | data | verdict | measured, in points, with the 95 % interval |",
        f"|{'---|' * 5}",
    ]
    decided, verdicts = 0, Counter[str]()
    for claim in claims:
        judged = {data: judge(claim, results) for data, results in found.items()}
        decided += sum(len(one.values) >= MIN_SEEDS for _, all_of in judged.values() for one in all_of)
        about = f"{claim.says} | {claim.figure}"
        measured_on = [data for data, (_, all_of) in judged.items() if any(one.values for one in all_of)]
        for data in measured_on:
            verdict, all_of = judged[data]
            verdicts[_PRINTED[verdict]] += 1
            table.append(f"| {about} | {data} | **{_PRINTED[verdict]}** | {'<br>'.join(map(str, all_of))} |")
            about = " | "  # A claim is printed once, above its data sets.
        if not measured_on:
            table.append(f"| {about} | | **{_PRINTED['cannot tell']}** | not measured |")
    counts = ", ".join(f"{verdicts[word]} {word}" for word in _PRINTED.values())
    return "\n".join(
        [
            f"{counted(verdicts.total(), 'verdict')}, each on a claim and a data set: {counts}.",
            "",
            *table,
            "",
            f"{decided} of the intervals have at least {MIN_SEEDS} seeds. One 95 % interval in 20 misses the true "
            f"value by chance; of {decided}, about {decided / 20:.1f}.",
            "Doubt first what rests on an interval that ends near 0.",
        ]
    )

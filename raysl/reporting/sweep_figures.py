"""The figures of a sweep. Each is a function of its journal alone, so the same sweep gives the same picture."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from statistics import mean, stdev
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from raysl.reporting.figure import Figure, drawn
from raysl.tuning.record import Record
from raysl.tuning.space import Dimension
from raysl.tuning.standing import Climb, Standing
from raysl.tuning.table import shown

_MOST_PAIRS = 6
_STATES = {"finished": "-", "stopped": ":", "failed": "--", "running": "-", "waiting": "-"}


def figures(record: Record) -> Iterator[Figure]:
    """All figures that the sweep has data for."""
    standing = record.standing
    if not _scored(standing, 0):
        return
    dimensions = standing.space.dimensions
    for dimension in dimensions:
        yield _curve(standing, dimension)
    for one, other in list(itertools.combinations(dimensions, 2))[:_MOST_PAIRS]:
        yield _pair(standing, one, other)
    if len(dimensions) > 1:
        yield _parallel(standing)
    if standing.num_rungs > 1:
        yield _learning(standing, record.base.epochs)
        yield from _early(record)


def _scored(standing: Standing, rung: int) -> list[int]:
    return [n for n in range(standing.num_trials) if standing.score(n, rung) is not None]


def _value(standing: Standing, trial: int, dimension: Dimension, rung: int) -> Any:
    """What the trial had on its way to a rung."""
    return (standing.values(trial, rung) or {})[dimension.name]


def _last(standing: Standing, trial: int) -> int:
    """The last rung at which the trial was scored."""
    return len(standing.scores_of(trial)) - 1


class _Axis:
    """Places of the values of a dimension on an axis: themselves where they are numbers, else 0, 1, 2, ..."""

    def __init__(self, standing: Standing, dimension: Dimension) -> None:
        begun = [n for n in range(standing.num_trials) if standing.values(n) is not None]
        seen = [
            _value(standing, n, dimension, rung)
            for n in begun
            for rung in range(max(1, _last(standing, n) + 1))
        ]
        self.name = dimension.name
        self.listed = bool(dimension.values)
        self.values = list(dimension.values) or sorted(set(seen))
        self.numeric = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in self.values)
        self.log = dimension.log and self.numeric and all(v > 0 for v in self.values)

    def place(self, value: Any) -> float:
        return float(value) if self.numeric else float(self.values.index(value))

    def share(self, value: Any) -> float:
        """Where the value lies between the least and the greatest, in 0..1."""
        places = [np.log(self.place(v)) if self.log else self.place(v) for v in self.values]
        here = np.log(self.place(value)) if self.log else self.place(value)
        return float((here - min(places)) / ((max(places) - min(places)) or 1.0))

    def dress(self, axes: Any) -> None:
        axes.set_xlabel(self.name)
        if self.log:
            axes.set_xscale("log")
            _plain(axes.xaxis)
        # Values that were drawn lie anywhere, and their names would lie on one another.
        if not self.numeric or (self.listed and len(self.values) <= 8):
            axes.set_xticks([self.place(v) for v in self.values], [shown(v) for v in self.values])
            axes.minorticks_off()


def _plain(axis: Any) -> None:
    """Ticks of a logarithmic axis at 1, 2, 5, 10, ..., as people write numbers."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


def _curve(standing: Standing, dimension: Dimension) -> Figure:
    axis = _Axis(standing, dimension)
    last = standing.num_rungs - 1
    rungs = {last: "at the end"} if last == 0 else {0: "at the first rung, all trials", last: "at the end"}

    def draw(axes: Any) -> None:
        for rung, label in rungs.items():
            groups: dict[float, list[float]] = {}
            for trial in _scored(standing, rung):
                place = axis.place(_value(standing, trial, dimension, rung))
                groups.setdefault(place, []).extend(_by_seed(standing, trial, rung))
            if not groups:
                continue
            places = sorted(groups)
            means = [mean(groups[p]) for p in places]
            spreads = [stdev(groups[p]) if len(groups[p]) > 1 else 0.0 for p in places]
            line = axes.errorbar(places, means, spreads, marker="o", capsize=3, label=label)
            dots = [(p, score) for p in places for score in groups[p]]
            axes.plot(*zip(*dots, strict=True), ".", color=line[0].get_color(), alpha=0.4)
        axis.dress(axes)
        axes.set_ylabel(standing.config.probe)
        axes.legend()

    text = (
        f"Mean and standard deviation of {standing.config.probe} over the {len(standing.config.seeds)} seeds and all "
        "other fields; a dot is one run."
    )
    return Figure(f"curve-{dimension.name}", dimension.name, text, drawn(draw))


def _by_seed(standing: Standing, trial: int, rung: int) -> list[float]:
    return [standing.scores[Climb(trial, seed, rung)] for seed in standing.config.seeds]


def _pair(standing: Standing, one: Dimension, other: Dimension) -> Figure:
    """A heat map of the end where both have few values, else dots for all trials at the first rung."""
    x, y = _Axis(standing, one), _Axis(standing, other)
    listed = x.listed and y.listed
    rung = standing.num_rungs - 1 if listed else 0
    points = [
        (_value(standing, n, one, rung), _value(standing, n, other, rung), standing.scores_of(n)[rung])
        for n in _scored(standing, rung)
    ]

    def heat(axes: Any) -> None:
        cells = np.full((len(y.values), len(x.values)), np.nan)
        for j, i in itertools.product(range(len(y.values)), range(len(x.values))):
            here = [score for a, b, score in points if (a, b) == (x.values[i], y.values[j])]
            if here:
                cells[j, i] = mean(here)
                axes.text(
                    i, j, f"{cells[j, i]:.3f}", ha="center", va="center", bbox={"fc": "white", "ec": "none"}
                )
        axes.grid(visible=False)
        axes.imshow(cells, origin="lower", aspect="auto", cmap="viridis")
        axes.set_xticks(range(len(x.values)), [shown(v) for v in x.values])
        axes.set_yticks(range(len(y.values)), [shown(v) for v in y.values])

    def dots(axes: Any) -> None:
        xs, ys = [x.place(a) for a, _, _ in points], [y.place(b) for _, b, _ in points]
        dots_drawn = axes.scatter(xs, ys, c=[score for _, _, score in points], cmap="viridis")
        axes.figure.colorbar(dots_drawn, label=standing.config.probe)
        x.dress(axes)
        if y.log:
            axes.set_yscale("log")
            _plain(axes.yaxis)

    def draw(axes: Any) -> None:
        (heat if listed else dots)(axes)
        axes.set_xlabel(one.name)
        axes.set_ylabel(other.name)

    text = f"Mean {standing.config.probe} at the end; what is empty was stopped, failed, or not tried."
    if not listed:
        text = f"A dot is a trial, with its mean {standing.config.probe} at the first rung, where all can be compared."
    return Figure(f"pair-{one.name}-{other.name}", f"{one.name} and {other.name}", text, drawn(draw))


def _parallel(standing: Standing) -> Figure:
    axes_of = [_Axis(standing, d) for d in standing.space.dimensions]
    trials = _scored(standing, 0)
    scores = {n: standing.scores_of(n)[-1] for n in trials}
    low, high = min(scores.values()), max(scores.values())

    def draw(axes: Any) -> None:
        for n in sorted(trials, key=lambda n: scores[n]):
            shares = [
                axis.share(_value(standing, n, d, _last(standing, n)))
                for axis, d in zip(axes_of, standing.space.dimensions, strict=True)
            ]
            share = (scores[n] - low) / ((high - low) or 1.0)
            style = _STATES[standing.state(n)]
            axes.plot([*shares, share], style, color=colormaps["viridis"](share), alpha=0.8)
        axes.set_xticks(range(len(axes_of) + 1), [*(axis.name for axis in axes_of), standing.config.probe])
        for i, axis in enumerate(axes_of):
            axes.text(i, -0.06, shown(axis.values[0]), ha="center", fontsize=8)
            axes.text(i, 1.03, shown(axis.values[-1]), ha="center", fontsize=8)
        axes.text(len(axes_of), -0.06, f"{low:.3f}", ha="center", fontsize=8)
        axes.text(len(axes_of), 1.03, f"{high:.3f}", ha="center", fontsize=8)
        axes.set_ylim(-0.1, 1.1)
        axes.set_yticks([])

    text = "A line is a trial, at the score of the last rung it was at; dotted lines were stopped before the end."
    return Figure("parallel", "All fields together", text, drawn(draw, 8.0))


def _learning(standing: Standing, epochs: float) -> Figure:
    at = [epochs * share for share in standing.config.shares()]

    def draw(axes: Any) -> None:
        for n in _scored(standing, 0):
            scores = standing.scores_of(n)
            by_seed = [_by_seed(standing, n, rung) for rung in range(len(scores))]
            style = _STATES[standing.state(n)]
            (line,) = axes.plot(
                at[: len(scores)], scores, style, marker="o", markersize=3, label=f"trial {n}"
            )
            lows, highs = [min(values) for values in by_seed], [max(values) for values in by_seed]
            axes.fill_between(at[: len(scores)], lows, highs, color=line.get_color(), alpha=0.12)
        axes.set_xscale("log" if standing.config.scheduler in ("none", "asha") else "linear")
        axes.set_xticks(at, [f"{epoch:.3g}" for epoch in at])
        axes.minorticks_off()
        axes.set_xlabel("epoch")
        axes.set_ylabel(standing.config.probe)
        if standing.num_trials <= 16:
            axes.legend(fontsize=7, ncols=2)

    text = "The mean over seeds, and the range of them; every trial is on the schedule of the whole run."
    return Figure("learning", "Learning curves", text, drawn(draw, 8.0))


def _early(record: Record) -> Iterator[Figure]:
    """How well the first rung foretells the last: by the probe, and by the loss of the pretext task."""
    standing, last = record.standing, record.standing.num_rungs - 1
    final = {climb: score for climb, score in standing.scores.items() if climb.rung == last}
    losses = {
        Climb(row["trial"], row["seed"], row["rung"]): row["loss"] for row in record.journal.of("score")
    }
    firsts = {climb: Climb(climb.trial, climb.seed, 0) for climb in final}
    for name, early in (("probe", standing.scores), ("loss", losses)):
        pairs = [(early[firsts[climb]], score) for climb, score in final.items() if firsts[climb] in early]
        if len(pairs) < 3:
            continue
        xs, ys = zip(*pairs, strict=True)
        agreement = rank_correlation(xs, ys)
        label = standing.config.probe if name == "probe" else "training loss"

        def draw(axes: Any, xs: Any = xs, ys: Any = ys, label: str = label) -> None:
            axes.plot(xs, ys, "o", alpha=0.7)
            axes.set_xlabel(f"{label} at the first rung")
            axes.set_ylabel(f"{standing.config.probe} at the end")

        text = (
            f"Rank correlation (Spearman) over {len(pairs)} runs that came to the end: {agreement:+.2f}. Runs that "
            "were stopped are not in it, so it is lower than over all."
        )
        yield Figure(f"early-{name}", f"What the {label} foretells early", text, drawn(draw))


def rank_correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Spearman's: the correlation of ranks, where equal numbers share the mean of theirs; 0 where all are equal."""

    def ranks(values: Sequence[float]) -> Any:
        _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts + 1) / 2)[inverse]

    a, b = ranks(xs), ranks(ys)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else 0.0

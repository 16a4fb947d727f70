"""Draw the figures of a sweep. Each depends only on the journal, so the same sweep gives the same picture."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from statistics import mean, stdev
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from raysl.errors import counted
from raysl.reporting.figure import Figure, plot_png
from raysl.tuning.results import LABELS, SweepResults, format_sweep_value
from raysl.tuning.space import Dimension

_MOST_PAIRS = 6
_STATES = {"finished": "-", "stopped": ":", "failed": "--", "running": "-"}


def figures(results: SweepResults) -> Iterator[Figure]:
    """Yield all figures that the sweep has data for."""
    if not results.scored(0):
        return
    dimensions = results.space.dimensions
    for dimension in dimensions:
        yield _score_by_value(results, dimension)
    for one, other in list(itertools.combinations(dimensions, 2))[:_MOST_PAIRS]:
        yield _score_by_pair(results, one, other)
    if len(dimensions) > 1:
        yield _parallel_coordinates(results)
    if results.num_rungs > 1:
        yield _learning_curves(results, results.base.epochs)
        yield from _early_vs_final(results)


def _last(results: SweepResults, trial: int) -> int:
    """Return the last rung at which the trial was scored."""
    return len(results.means(trial)) - 1


class _Axis:
    """An axis for a dimension. Numbers lie at their value, other values at 0, 1, 2, ..."""

    def __init__(self, results: SweepResults, dimension: Dimension) -> None:
        rungs = [(n, rung) for n in results.trials for rung in range(max(1, _last(results, n) + 1))]
        seen = {results.values(n, rung)[dimension.name] for n, rung in rungs}
        self.name = dimension.name
        self.listed = bool(dimension.values)
        self.values = list(dimension.values) or sorted(seen)
        self.numeric = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in self.values)
        self.log = dimension.log and self.numeric and all(v > 0 for v in self.values)

    def place(self, value: Any) -> float:
        return float(value) if self.numeric else float(self.values.index(value))

    def share(self, value: Any) -> float:
        """Return where the value lies between the least and the greatest, in 0..1."""
        places = [np.log(self.place(v)) if self.log else self.place(v) for v in self.values]
        here = np.log(self.place(value)) if self.log else self.place(value)
        return float((here - min(places)) / ((max(places) - min(places)) or 1.0))

    def apply_to(self, axes: Any) -> None:
        axes.set_xlabel(self.name)
        if self.log:
            axes.set_xscale("log")
            _plain_ticks(axes.xaxis)
        # Sampled values lie anywhere, and their labels would overlap.
        if not self.numeric or (self.listed and len(self.values) <= 8):
            axes.set_xticks(
                [self.place(v) for v in self.values], [format_sweep_value(v) for v in self.values]
            )
            axes.minorticks_off()


def _plain_ticks(axis: Any) -> None:
    """Set the ticks of a logarithmic axis to 1, 2, 5, 10, ..., written as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


def _score_by_value(results: SweepResults, dimension: Dimension) -> Figure:
    axis = _Axis(results, dimension)
    last = results.num_rungs - 1
    rungs = {last: "at the end"} if last == 0 else {0: "at the first rung, all trials", last: "at the end"}

    def draw(axes: Any) -> None:
        for rung, label in rungs.items():
            groups: dict[float, list[float]] = {}
            for trial in results.scored(rung):
                place = axis.place(results.values(trial, rung)[dimension.name])
                groups.setdefault(place, []).extend(results.by_seed(trial, rung))
            if not groups:
                continue
            places = sorted(groups)
            means = [mean(groups[p]) for p in places]
            spreads = [stdev(groups[p]) if len(groups[p]) > 1 else 0.0 for p in places]
            # Neighbors among sampled values differ in all other fields, so no line joins them.
            joined = "o-" if axis.listed else "o"
            line = axes.errorbar(places, means, spreads, fmt=joined, capsize=3, label=label)
            dots = [(p, score) for p in places for score in groups[p]]
            axes.plot(*zip(*dots, strict=True), ".", color=line[0].get_color(), alpha=0.4)
        for encoder, scores in results.extras("baseline").items():
            style = {"random": "--", "pixels": ":"}[encoder]
            axes.axhline(mean(scores), linestyle=style, color="gray", label=LABELS[encoder])
        axis.apply_to(axes)
        axes.set_ylabel(results.config.probe)
        axes.legend()

    text = (
        f"Mean and standard deviation of {results.config.probe} over {counted(len(results.config.seeds), 'seed')} and "
        "all other fields; a dot is one run."
    )
    return Figure(f"curve-{dimension.name}", dimension.name, text, plot_png(draw))


def _score_by_pair(results: SweepResults, one: Dimension, other: Dimension) -> Figure:
    """Draw a heat map of the end if both have few values, else dots for all trials at the first rung."""
    x, y = _Axis(results, one), _Axis(results, other)
    listed = x.listed and y.listed
    rung = results.num_rungs - 1 if listed else 0
    values = {n: results.values(n, rung) for n in results.scored(rung)}
    points = [(at[one.name], at[other.name], results.means(n)[rung]) for n, at in values.items()]

    def heat(axes: Any) -> None:
        cells = np.full((len(y.values), len(x.values)), np.nan)
        for j, i in itertools.product(range(len(y.values)), range(len(x.values))):
            here = [score for a, b, score in points if (a, b) == (x.values[i], y.values[j])]
            if here:
                cells[j, i] = mean(here)
                box = {"fc": "white", "ec": "none"}
                axes.text(i, j, f"{cells[j, i]:.3f}", ha="center", va="center", bbox=box)
        axes.grid(visible=False)
        axes.imshow(cells, origin="lower", aspect="auto", cmap="viridis")
        axes.set_xticks(range(len(x.values)), [format_sweep_value(v) for v in x.values])
        axes.set_yticks(range(len(y.values)), [format_sweep_value(v) for v in y.values])

    def dots(axes: Any) -> None:
        xs, ys = [x.place(a) for a, _, _ in points], [y.place(b) for _, b, _ in points]
        dots_drawn = axes.scatter(xs, ys, c=[score for _, _, score in points], cmap="viridis")
        axes.figure.colorbar(dots_drawn, label=results.config.probe)
        x.apply_to(axes)
        if y.log:
            axes.set_yscale("log")
            _plain_ticks(axes.yaxis)

    def draw(axes: Any) -> None:
        (heat if listed else dots)(axes)
        axes.set_xlabel(one.name)
        axes.set_ylabel(other.name)

    text = f"Mean {results.config.probe} at the end; what is empty was stopped, failed, or not tried."
    if not listed:
        text = f"A dot is a trial, with its mean {results.config.probe} at the first rung, where all can be compared."
    return Figure(f"pair-{one.name}-{other.name}", f"{one.name} and {other.name}", text, plot_png(draw))


def _parallel_coordinates(results: SweepResults) -> Figure:
    axes_of = [_Axis(results, d) for d in results.space.dimensions]
    trials = results.scored(0)
    scores = {n: results.means(n)[-1] for n in trials}
    low, high = min(scores.values()), max(scores.values())

    def draw(axes: Any) -> None:
        for n in sorted(trials, key=lambda n: scores[n]):
            values = results.values(n, _last(results, n))
            shares = [axis.share(values[axis.name]) for axis in axes_of]
            share = (scores[n] - low) / ((high - low) or 1.0)
            style = _STATES[results.state(n)]
            axes.plot([*shares, share], style, color=colormaps["viridis"](share), alpha=0.8)
        names = [*(axis.name for axis in axes_of), results.config.probe]
        slant: dict[str, Any] = {"rotation": 25, "ha": "right"} if len(names) > 5 else {}
        axes.set_xticks(range(len(names)), names, **slant)
        ends = [(format_sweep_value(axis.values[0]), format_sweep_value(axis.values[-1])) for axis in axes_of]
        for i, (least, greatest) in enumerate([*ends, (f"{low:.3f}", f"{high:.3f}")]):
            axes.text(i, -0.06, least, ha="center", fontsize=8)
            axes.text(i, 1.03, greatest, ha="center", fontsize=8)
        axes.set_ylim(-0.1, 1.1)
        axes.set_yticks([])

    text = "A line is a trial, at the score of the last rung it was at; dotted lines were stopped before the end."
    return Figure("parallel", "All fields together", text, plot_png(draw, 8.0))


def _learning_curves(results: SweepResults, epochs: float) -> Figure:
    at = [epochs * share for share in results.config.shares()]

    def draw(axes: Any) -> None:
        axes.set_prop_cycle(color=colormaps["tab20"](range(20)))
        for n in results.scored(0):
            scores = results.means(n)
            by_seed = [results.by_seed(n, rung) for rung in range(len(scores))]
            style = _STATES[results.state(n)]
            epochs_n = at[: len(scores)]
            (line,) = axes.plot(epochs_n, scores, style, marker="o", markersize=3, label=f"trial {n}")
            lows, highs = list(map(min, by_seed)), list(map(max, by_seed))
            axes.fill_between(epochs_n, lows, highs, color=line.get_color(), alpha=0.12)
        axes.set_xscale("log" if results.config.scheduler in ("none", "asha") else "linear")
        axes.set_xticks(at, [f"{epoch:.3g}" for epoch in at])
        axes.minorticks_off()
        axes.set_xlabel("epoch")
        axes.set_ylabel(results.config.probe)
        if len(results.trials) <= 16:
            axes.legend(fontsize=7, ncols=2)

    text = "The mean over seeds, and the range of them; every trial is on the schedule of the whole run."
    return Figure("learning", "Learning curves", text, plot_png(draw, 8.0))


def _early_vs_final(results: SweepResults) -> Iterator[Figure]:
    """Yield figures of how well the first rung predicts the last: by the probe, and by the training loss."""
    scores, last = results.scores, results.num_rungs - 1
    ended = [(trial, seed) for trial, seed, rung in scores if rung == last and (trial, seed, 0) in scores]
    if len(ended) < 3:
        return
    ys = [scores[trial, seed, last]["score"] for trial, seed in ended]
    for name, key, label in (("probe", "score", results.config.probe), ("loss", "loss", "training loss")):
        xs = [scores[trial, seed, 0][key] for trial, seed in ended]

        def draw(axes: Any, xs: Any = xs, label: str = label) -> None:
            axes.plot(xs, ys, "o", alpha=0.7)
            axes.set_xlabel(f"{label} at the first rung")
            axes.set_ylabel(f"{results.config.probe} at the end")

        text = (
            f"Rank correlation (Spearman) over {len(ended)} runs that came to the end: "
            f"{rank_correlation(xs, ys):+.2f}. Runs that were stopped are not included, so it is lower than over all "
            "runs."
        )
        yield Figure(f"early-{name}", f"How the {label} predicts the end", text, plot_png(draw))


def rank_correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return Spearman's rank correlation; 0 where all values are equal."""
    from scipy.stats import spearmanr

    return float(spearmanr(xs, ys).statistic) if len(set(xs)) > 1 and len(set(ys)) > 1 else 0.0

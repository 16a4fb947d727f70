"""Tables of probes that can be trusted: means with their 95 % confidence intervals over seeds, and what is a tie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, variance
from typing import Any

from raysl.evaluation.results import of_images
from raysl.reporting.report_runs import PROTOCOL, Found, layers


@dataclass(frozen=True)
class Estimate:
    """A number that was found for several seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def half_width(self) -> float | None:
        """Of the 95 % confidence interval of the mean; None for one seed."""
        if len(self.values) < 2:
            return None
        return t_quantile(len(self.values) - 1) * math.sqrt(self._squared_error())

    def _squared_error(self) -> float:
        return variance(self.values) / len(self.values)

    def differs(self, other: Estimate) -> bool | None:
        """Whether the means differ by more than the noise of seeds: Welch's t test (Welch 1947, "The generalization of
        Student's problem when several different population variances are involved"), two-sided, at 5 %. None where one
        of them has one seed, or none has any spread: few seeds that agree by chance do not show that there is none."""
        if min(len(self.values), len(other.values)) < 2:
            return None
        ours, theirs = self._squared_error(), other._squared_error()
        if ours + theirs == 0:
            return False if self.mean == other.mean else None
        parts = ours**2 / (len(self.values) - 1) + theirs**2 / (len(other.values) - 1)
        freedom = (ours + theirs) ** 2 / parts
        return abs(self.mean - other.mean) > t_quantile(freedom) * math.sqrt(ours + theirs)

    def __str__(self) -> str:
        half = self.half_width
        return f"{self.mean:.4f}" if half is None else f"{self.mean:.4f} ± {half:.4f}"


def t_quantile(freedom: float) -> float:
    """Student's t at 97.5 %, for any degrees of freedom above 0."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975))


@dataclass(frozen=True)
class Table:
    """Rows of one probe under one protocol on the same images.

    Args:
        probe: its name.
        caption: what was compared.
        columns: layer and name of each number.
        lines: label, and an estimate for each column where there is one; the best by the last column first.
    """

    probe: str
    caption: str
    columns: tuple[tuple[str, str], ...]
    lines: tuple[tuple[str, tuple[Estimate | None, ...]], ...]

    def best(self, column: int) -> Estimate | None:
        """The estimate with the highest mean in a column."""
        there = [cells[column] for _, cells in self.lines]
        return max((cell for cell in there if cell is not None), key=lambda cell: cell.mean, default=None)

    def tied(self, column: int, cell: Estimate) -> bool:
        """Whether the difference from the best of the column is within the noise of seeds."""
        best = self.best(column)
        return best is not None and best != cell and best.differs(cell) is False

    def compared(self, column: int) -> bool:
        """Whether the best of a column can be told from any other: both have seeds enough."""
        best = self.best(column)
        others = [cells[column] for _, cells in self.lines if cells[column] not in (None, best)]
        return best is not None and any(best.differs(cell) is not None for cell in others if cell)


def tables(rows: Sequence[Found], headlines: bool = True) -> list[Table]:
    """A table for each probe, protocol and pair of data sets.

    Args:
        headlines: only the number that stands for its probe, of every layer; else all the others.
    """
    together: dict[tuple[Any, ...], list[Found]] = {}
    for item in rows:
        if bool(item.row["primary"]) == headlines:
            together.setdefault(tuple(item.row[name] for name in PROTOCOL), []).append(item)
    return [_table(members) for _, members in sorted(together.items())]


def _table(members: Sequence[Found]) -> Table:
    probe, protocol, train, test = (members[0].row[name] for name in PROTOCOL)
    names = dict.fromkeys(item.row["name"] for item in members)
    # A layer need not have all names.
    there = {(item.row["layer"], item.row["name"]) for item in members}
    columns = tuple((layer, name) for layer in layers(members) for name in names if (layer, name) in there)
    cells = estimates(members)
    lines = [
        (label, tuple(cells.get((label, *column)) for column in columns))
        for label in dict.fromkeys(item.label for item in members)
    ]
    lines.sort(key=lambda line: (-(line[1][-1].mean if line[1][-1] else -math.inf), line[0]))
    return Table(probe, f"protocol {protocol}, {of_images(train, test)}", columns, tuple(lines))


def estimates(rows: Sequence[Found]) -> dict[tuple[str, str, str], Estimate]:
    """The estimate of each (label, layer, name) of rows of one protocol. A seed counts once, with the mean of what
    several runs of it have given."""
    values: dict[tuple[str, str, str], dict[int | None, dict[str | None, float]]] = {}
    for item in rows:
        key = (item.label, item.row["layer"], item.row["name"])
        # Pixels have no seed, though the runs that they stand beside have.
        seed = None if item.row["encoder"] == "pixels" else item.row["seed"]
        values.setdefault(key, {}).setdefault(seed, {})[item.row["weights"]] = item.row["value"]
    return {
        key: Estimate(tuple(mean(by_weights.values()) for by_weights in by_seed.values()))
        for key, by_seed in values.items()
    }

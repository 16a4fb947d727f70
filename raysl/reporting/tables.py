"""Make tables of probe results: means over seeds, 95 % confidence intervals, and ties."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from raysl.evaluation.results import describe_images
from raysl.reporting.report_runs import PROTOCOL, LabeledRow, by_protocol, layers


@dataclass(frozen=True)
class Estimate:
    """A result for one or more seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def half_width(self) -> float | None:
        """Half the width of the 95 % confidence interval of the mean; None for one seed."""
        if len(self.values) < 2:
            return None
        from scipy.stats import sem, t

        return float(t.ppf(0.975, len(self.values) - 1) * sem(self.values))

    def differs(self, other: Estimate) -> bool | None:
        """Test if the means differ by more than the noise of seeds.

        Welch's t test (1947), two-sided, at 5 %. Returns None if one of them has one seed, or if neither has any
        spread and the means differ: a few seeds that agree by chance do not show that there is no noise.
        """
        if min(len(self.values), len(other.values)) < 2:
            return None
        if len(set(self.values)) == len(set(other.values)) == 1:
            return False if self.mean == other.mean else None
        from scipy.stats import ttest_ind

        return bool(ttest_ind(self.values, other.values, equal_var=False).pvalue < 0.05)

    def __str__(self) -> str:
        half = self.half_width
        return f"{self.mean:.4f}" if half is None else f"{self.mean:.4f} ± {half:.4f}"


@dataclass(frozen=True)
class Table:
    """Results of one probe with one protocol on the same images."""

    probe: str  # name of the probe
    caption: str  # protocol and images
    columns: tuple[tuple[str, str], ...]  # (layer, name) of each number
    # Label, and an estimate or None for each column; sorted by the last column, the best first.
    lines: tuple[tuple[str, tuple[Estimate | None, ...]], ...]

    def best(self, column: int) -> Estimate | None:
        """Return the estimate with the highest mean in a column."""
        cells = [cells[column] for _, cells in self.lines]
        return max((cell for cell in cells if cell is not None), key=lambda cell: cell.mean, default=None)

    def tied(self, column: int, cell: Estimate) -> bool:
        """Return True if the cell differs from the best of its column by no more than the noise of seeds."""
        best = self.best(column)
        return best is not None and best != cell and best.differs(cell) is False

    def compared(self, column: int) -> bool:
        """Return True if the best of a column has enough seeds to be compared with another cell."""
        best = self.best(column)
        others = [cells[column] for _, cells in self.lines if cells[column] not in (None, best)]
        return best is not None and any(best.differs(cell) is not None for cell in others if cell)


def tables(rows: Sequence[LabeledRow], primary: bool = True) -> list[Table]:
    """Return a table for each probe, protocol and pair of data sets: of the primary metric, or of all other numbers."""
    chosen = [item for item in rows if bool(item.row["primary"]) == primary]
    return [_table(members) for _, members in by_protocol(chosen)]


def _table(members: Sequence[LabeledRow]) -> Table:
    probe, protocol, train, test = (members[0].row[name] for name in PROTOCOL)
    names = dict.fromkeys(item.row["name"] for item in members)
    present = {(item.row["layer"], item.row["name"]) for item in members}
    columns = tuple((layer, name) for layer in layers(members) for name in names if (layer, name) in present)
    cells = estimates(members)
    lines = [
        (label, tuple(cells.get((label, *column)) for column in columns))
        for label in dict.fromkeys(item.label for item in members)
    ]
    lines.sort(key=lambda line: (-(line[1][-1].mean if line[1][-1] else -math.inf), line[0]))
    return Table(probe, f"protocol {protocol}, {describe_images(train, test)}", columns, tuple(lines))


def estimates(rows: Sequence[LabeledRow]) -> dict[tuple[str, str, str], Estimate]:
    """Return the estimate of each (label, layer, name) of rows of one protocol; a seed counts once, with its mean."""
    values: dict[tuple[str, str, str], dict[int | None, dict[str | None, float]]] = {}
    for item in rows:
        key = (item.label, item.row["layer"], item.row["name"])
        # Results of pixels do not depend on the seed of the run that they were measured with.
        seed = None if item.row["encoder"] == "pixels" else item.row["seed"]
        values.setdefault(key, {}).setdefault(seed, {})[item.row.get("weights")] = item.row["value"]
    return {
        key: Estimate(tuple(mean(by_weights.values()) for by_weights in by_seed.values()))
        for key, by_seed in values.items()
    }

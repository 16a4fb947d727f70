"""The results of a sweep, read from its journal: values, scores and states of its trials, and the final table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from statistics import NormalDist, mean, stdev, variance
from typing import TYPE_CHECKING, Any, Literal

from raysl import probes
from raysl.config import Pretraining
from raysl.errors import UserError, counted
from raysl.evaluation.results import margin
from raysl.storage import Folder
from raysl.tuning.config import SweepConfig
from raysl.tuning.journal import NAME, Journal
from raysl.tuning.space import Dimension, Space, Values, apply_values, with_method_values

if TYPE_CHECKING:
    from rich.console import RenderableType

State = Literal["finished", "stopped", "failed", "running"]


@dataclass(frozen=True)
class SweepResults:
    """The results of a sweep, finished or not."""

    journal: Journal

    @staticmethod
    def open(uri: str) -> SweepResults:
        """Return the results of the sweep at `uri`. Raise UserError when there is none, or its journal is damaged."""
        folder = Folder(uri)
        if not folder.exists(NAME):
            raise UserError(
                f"No sweep at {uri!r}: there is no {NAME}. Make one with `raysl sweep --out {uri}`."
            )
        return SweepResults(Journal(folder))

    @cached_property
    def config(self) -> SweepConfig:
        """The configuration of the sweep, without the places of its data."""
        settings = _known(SweepConfig, self.journal.header["config"])
        if settings.get("probe", SweepConfig.probe) not in probes.names():
            _ = self.base  # adds the plugins of the sweep, or raises if one is not trusted
        return SweepConfig(str(self.journal.folder), tuple(self.space.names), **settings)

    @cached_property
    def space(self) -> Space:
        return Space(tuple(Dimension(**_known(Dimension, row)) for row in self.journal.header["space"]))

    @cached_property
    def base(self) -> Pretraining:
        """The configuration of every run, except what varies. Raises UserError for a plugin that is not trusted."""
        return Pretraining.stored({**self.journal.header["base"], "run": "-"}, str(self.journal.folder))

    @property
    def validation_uri(self) -> str:
        """The URI of the images that trials are compared on. Sweeps of raysl 0.1 have only test images."""
        uris = self.journal.header["uris"]
        return str(uris.get("validation", uris.get("test")))

    @property
    def chosen_on_test(self) -> bool:
        """True if trials are compared on the test split of a source."""
        header = self.journal.header
        source = str(header.get("sources", {}).get("validation", ""))
        return "validation" not in header["uris"] or source.endswith("#test")

    @property
    def validation_description(self) -> str:
        """What the images are that trials are compared on, in words."""
        uri, uris = self.validation_uri, self.journal.header["uris"]
        source = self.journal.header.get("sources", {}).get("validation") or uri.rpartition("/")[2]
        held_out = uri.endswith("/images/validation") and uris["train"].endswith("/images/learn")
        kind = "test" if self.chosen_on_test else "held-out validation" if held_out else "validation"
        return f"{kind} images ({source})"

    @property
    def num_rungs(self) -> int:
        return len(self.config.shares())

    @cached_property
    def trials(self) -> list[int]:
        """The numbers of the trials that have begun."""
        return sorted({row["trial"] for row in self.journal.of("trial")})

    @cached_property
    def failures(self) -> dict[int, str]:
        return self.journal.failures()

    @cached_property
    def scores(self) -> dict[tuple[int, int, int], dict[str, Any]]:
        """The rows of scores by trial, seed and rung."""
        return {(row["trial"], row["seed"], row["rung"]): row for row in self.journal.of("score")}

    @cached_property
    def _stopped(self) -> set[int]:
        return {row["trial"] for row in self.journal.of("decision") if not row["goes_on"]}

    @cached_property
    def _values(self) -> dict[tuple[int, int], Values]:
        return {(row["trial"], row["rung"]): row["values"] for row in self.journal.of("trial")}

    def values(self, trial: int, rung: int = 0) -> Values:
        """Return the values of a trial on its way to a rung. Only population based training changes them."""
        return next(self._values[trial, r] for r in range(rung, -1, -1) if (trial, r) in self._values)

    def by_seed(self, trial: int, rung: int) -> list[float]:
        """Return the scores of a trial at a rung, for every seed; empty while one is missing."""
        rows = [self.scores.get((trial, seed, rung)) for seed in self.config.seeds]
        return [float(row["score"]) for row in rows if row] if all(rows) else []

    def means(self, trial: int) -> list[float]:
        """Return the means over seeds at the rungs that the trial has reached."""
        return [mean(scores) for rung in range(self.num_rungs) if (scores := self.by_seed(trial, rung))]

    def scored(self, rung: int) -> list[int]:
        """Return the trials that have a score at a rung."""
        return [trial for trial in self.trials if self.by_seed(trial, rung)]

    def state(self, trial: int) -> State:
        if trial in self.failures:
            return "failed"
        if self.by_seed(trial, self.num_rungs - 1):
            return "finished"
        return "stopped" if trial in self._stopped else "running"

    def best(self) -> int | None:
        """Return the finished trial with the best score; None while none is finished."""
        done = {n: self.means(n)[-1] for n in self.trials if self.state(n) == "finished"}
        return max(done, key=lambda n: (done[n], -n)) if done else None

    def best_config(self) -> Pretraining | None:
        """Return the configuration of the best finished trial, for its first seed."""
        best = self.best()
        if best is None:
            return None
        values = with_method_values(self.values(best, self.num_rungs - 1), self.journal.method_values)
        return dataclasses.replace(apply_values(self.base, values), seed=self.config.seeds[0])

    def expected_lead_by_chance(self) -> tuple[int, float, float] | None:
        """Return how far the best of equally good trials would be ahead; None for fewer than two, or with one seed.

        Returns:
            The number of finished trials, the standard deviation between seeds, and the expected lead of the best over
            the mean of all.
        """
        scores = [self.by_seed(trial, self.num_rungs - 1) for trial in self.trials]
        variances = [variance(of_trial) for of_trial in scores if len(of_trial) > 1]
        if len(variances) < 2:
            return None
        deviation, count = sqrt(mean(variances)), len(variances)
        # Blom's approximation of the expected largest of `count` standard normal numbers.
        largest = NormalDist().inv_cdf((count - 0.375) / (count + 0.25))
        return count, deviation, largest * deviation / sqrt(len(self.config.seeds))

    def margin(self) -> tuple[int, float] | None:
        """Return how far two accuracies may differ by chance, because the images that judge the trials are few.

        Returns:
            The number of these images, and two standard errors of the difference of two accuracies like the best, of
            independent images. None for other scores than accuracies, and for sweeps that do not tell the number.
        """
        best = self.best()
        if best is None:
            return None
        row = self.scores[best, self.config.seeds[0], self.num_rungs - 1]
        accuracy, images = self.means(best)[-1], int(row.get("num_images", 0))
        by_chance = margin(str(row.get("metric", "")), (accuracy, accuracy), images)
        return (images, by_chance) if by_chance else None

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each trial: those that came farthest first, and among them the best.

        Keys: "trial", "values" (at its last rung), "state", "share" (of the schedule, where it was scored last),
        "score" (mean over seeds), "spread" (standard deviation over seeds; None for one seed), "seeds" (score by
        seed) and "reason" (of a failure).
        """
        rows: list[dict[str, Any]] = []
        for trial in self.trials:
            rung = len(self.means(trial)) - 1
            scores = self.by_seed(trial, rung) if rung >= 0 else []
            rows.append(
                {
                    "trial": trial,
                    "values": self.values(trial, max(rung, 0)),
                    "state": self.state(trial),
                    "share": self.config.shares()[rung] if scores else 0.0,
                    "score": mean(scores) if scores else None,
                    "spread": spread(scores),
                    "seeds": dict(zip(map(str, self.config.seeds), scores, strict=False)),
                    "reason": self.failures.get(trial, ""),
                }
            )
        return sorted(rows, key=lambda row: (row["state"] == "failed", -row["share"], -(row["score"] or 0.0)))

    def extras(self, event: str) -> dict[str, list[float]]:
        """Return the scores of "baseline" or "test" rows, by encoder.

        Rows of "test" hold scores of the best trial on the test images that were given last.
        """
        found: dict[str, list[float]] = {}
        rows = self.journal.of(event)
        for row in rows:
            if row["chosen"] in (None, self.best()) and row.get("images") == rows[-1].get("images"):
                found.setdefault(row["encoder"], []).append(float(row["score"]))
        return found

    def extra_rows(self, prefix: str) -> Iterator[tuple[str, tuple[float, float | None]]]:
        """Yield a label, a mean and a spread for each baseline and, after `prefix`, each score on the test images."""
        for event, before in (("baseline", ""), ("test", prefix)):
            for encoder, scores in self.extras(event).items():
                yield f"{before}{LABELS[encoder]}", (mean(scores), spread(scores))


def _known(kind: type[Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the stored values of the fields that a dataclass has in this version, with tuples for lists."""
    there = {field.name: stored[field.name] for field in dataclasses.fields(kind) if field.name in stored}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in there.items()}


def described(values: Mapping[str, Any]) -> str:
    """Return a point in one line."""
    return ", ".join(f"{name}={format_sweep_value(value)}" for name, value in values.items())


def format_sweep_value(value: Any) -> str:
    """Return a value as it can be typed on the command line."""
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def lead(results: SweepResults) -> str:
    """Return a sentence that says how far the best trial is ahead, and if that may be chance; empty for one trial."""
    best = results.best()
    means = [results.means(n)[-1] for n in results.trials if results.state(n) == "finished"]
    if best is None or len(means) < 2:
        return ""
    if max(means) == min(means):
        return f"All {len(means)} finished trials have the same score."
    ahead = max(means) - mean(means)
    text = f"Trial {best} is {number(ahead)} ahead of the mean of the {len(means)} finished trials"
    found = results.expected_lead_by_chance()
    if found is None:
        return f"{text}; this may be chance, which trials of one seed cannot show."
    _, deviation, gap = found
    equal = f"the best of equal trials would be {number(gap)} ahead on average, because seeds differ by ±"
    if ahead <= gap:
        return f"{text}, which may be chance: {equal} {number(deviation)}."
    return f"{text}; by chance, {equal} {number(deviation)}, and more seeds would show if the rest is real."


def doubts(results: SweepResults) -> list[str]:
    """Return sentences about trials that few images do not tell from the best, and baselines that it does not beat."""
    best, sentences = results.best(), []
    if best is None:
        return []
    score = results.means(best)[-1]
    if found := results.margin():
        images, most = found
        others = [n for n in results.trials if results.state(n) == "finished" and n != best]
        near = sum(score - results.means(n)[-1] < most for n in others)
        if near:
            count = counted(len(others), "other finished trial")
            of_others = f"{near} of the {count}" if near < len(others) else f"the {count.removeprefix('1 ')}"
            sentences.append(
                f"With {counted(images, 'validation image')}, a difference of {number(most)} may be chance: "
                f"{of_others} may be as good."
            )
    beaten = {"random": "the untrained network", "pixels": "raw pixels"}
    above = [
        f"{what} ({number(mean(scores))})"
        for encoder, what in beaten.items()
        if (scores := results.extras("baseline").get(encoder)) and mean(scores) >= score
    ]
    if above:
        sentences.append(
            f"The best trial ({number(score)}) is not better than {' and '.join(above)}: train for more epochs, or on "
            "more images, before you compare hyperparameters."
        )
    return sentences


def render(results: SweepResults) -> RenderableType:
    """Return a table of one line a trial, the baselines and the reasons of failures; and `lead` and `doubts`."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    rows, probe, names = results.rows(), results.config.probe, results.space.names
    why = Text("\n".join(f"Trial {row['trial']}: {row['reason']}" for row in rows if row["reason"]))
    title = Text(f"{len(rows)} trials by {probe} on {results.validation_description}")
    made = Table(title=title, box=box.SIMPLE, caption=why, caption_justify="left", padding=0)
    shorts = [name.rpartition(".")[2] for name in names]
    fields = [n if shorts.count(s) > 1 else s for n, s in zip(names, shorts, strict=True)]
    for column in ("trial", *(field.replace("_", "\n") for field in fields), probe, "±", "epoch"):
        made.add_column(column, justify="right", min_width=max(map(len, column.split())))
    made.add_column("")

    for row in rows:
        values = [
            f"{v:.3g}" if isinstance(v, float) else format_sweep_value(v)
            for v in (row["values"][n] for n in names)
        ]
        epoch, scores = f"{results.base.epochs * row['share']:.3g}", (row["score"], row["spread"])
        made.add_row(str(row["trial"]), *values, *map(number, scores), epoch, row["state"])
    blank = [""] * (1 + len(names))
    for label, scores in results.extra_rows("test: "):
        made.add_row(*blank, *map(number, scores), "", label)
    return Group(made, *map(Text, filter(None, [lead(results), *doubts(results)])))


LABELS = {"trained": "chosen trial", "random": "untrained", "pixels": "raw pixels"}


def number(score: float | None) -> str:
    """Return a score as tables show it."""
    return "" if score is None else f"{score:.4f}"


def spread(scores: Sequence[float]) -> float | None:
    """Return the standard deviation; None for one score."""
    return stdev(scores) if len(scores) > 1 else None

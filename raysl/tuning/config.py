"""What a sweep tries, and how it decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from raysl import probes
from raysl.errors import UserError

Searcher = Literal["grid", "random", "optuna"]
Scheduler = Literal["none", "asha", "median", "pbt"]

_RUNGS = {"none": 1, "asha": 3, "median": 4, "pbt": 4}


@dataclass(frozen=True)
class SweepConfig:
    """Tries values of fields, each for several seeds, and judges them by a probe at equal epochs. Takes the flags of
    `raysl pretrain` too, all but --run: --data, --method, --epochs, --workers, --pirl.head and so on.

    Args:
        out: folder of the sweep, a path or a URI. The same command again continues it.
        test: labelled data that the probe is scored on.
        vary: fields to vary, by their dotted or short names: "temperature" tries the values that the field itself
            names, "temperature=0.05,0.1" these, and "temperature=0.03..0.5" is an interval to draw from.
        train: labelled data that the probe learns from; by default the images that are learned from.
        probe: whose primary metric is the score; more is better.
        seeds: every trial is run once with each, and judged by the mean.
        searcher: "grid" tries all combinations, "random" draws, "optuna" proposes by TPE (needs the package optuna).
        samples: trials of "random" and "optuna". More may be asked for when the sweep is continued.
        scheduler: "none" runs every trial to its end. "asha" and "median" stop trials that are behind earlier ones;
            "pbt" lets the last quarter go on from the checkpoints of the first, with values changed a little.
        rungs: how many times a trial is scored on its way; 0 is 1 for none, 3 for asha, 4 for median and pbt.
        reduction: of asha: one trial in so many goes on from a rung to the next, which is so many times as far.
        max_concurrent: runs at the same time; 0 is as many as have a whole CPU for each trainer.
        gpus_per_worker: below 1, several small trainers share a GPU, where there are GPUs.
        share_stream: runs at the same time that read the same images in the same order share one stream of them.
        lag: the proposal of trial n of optuna knows the outcome of trials up to n - lag, so that as many can run.
        seed: of what is drawn.
        retry: try those trials again that failed when the sweep ran before.
    """

    out: str
    test: str
    vary: tuple[str, ...]
    train: str = ""
    probe: str = "knn"
    seeds: tuple[int, ...] = (0, 1)
    searcher: Searcher = "grid"
    samples: int = 16
    scheduler: Scheduler = "none"
    rungs: int = 0
    reduction: int = 3
    max_concurrent: int = 0
    gpus_per_worker: float = 1
    share_stream: bool = True
    lag: int = 4
    seed: int = 0
    retry: bool = False

    def __post_init__(self) -> None:
        if not self.vary:
            raise UserError("A sweep varies at least one field. Give --vary, such as --vary temperature.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds is {self.seeds}; give one or more, each once.")
        for name, least in (
            ("samples", 1),
            ("rungs", 0),
            ("reduction", 2),
            ("max_concurrent", 0),
            ("lag", 1),
        ):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        if not 0 < self.gpus_per_worker <= 1:
            raise UserError(
                f"gpus_per_worker is {self.gpus_per_worker}; it must be above 0 and at most 1, a whole GPU."
            )
        flags = " and ".join(probes.required(self.probe))
        if flags:
            raise UserError(
                f"A sweep is scored on the images of --test, and the probe {self.probe} needs {flags}. Use another "
                f"probe, such as knn or linear, and {self.probe} on its best run."
            )
        if self.scheduler == "pbt" and self.searcher == "optuna":
            raise UserError(
                "Population based training compares all trials on their way, and optuna begins some only when others "
                "have ended. Use --searcher random with it."
            )
        if self.scheduler == "pbt" and self.retry:
            raise UserError(
                "Who is copied in population based training depends on all trials, so none that failed can come back "
                "later. Leave out --retry, or give another --out."
            )
        if self.scheduler == "pbt" and self.rungs == 1:
            raise UserError("With 1 rung there is nothing for pbt to go on from. Give --rungs 2 or more.")

    def shares(self) -> tuple[float, ...]:
        """How far into its schedule a trial is at each rung, as shares of the run; the last is 1.

        Every trial is on the schedule of the whole run, so that those that are compared have had the same learning
        rates. "none" and "asha" multiply by `reduction` from rung to rung, the others add.
        """
        count = self.rungs or _RUNGS[self.scheduler]
        if self.scheduler in ("none", "asha"):
            return tuple(float(self.reduction) ** -(count - 1 - i) for i in range(count))
        return tuple((i + 1) / count for i in range(count))

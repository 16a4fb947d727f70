"""Configuration of a sweep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from raysl import fields, probes
from raysl.errors import UserError
from raysl.fields import Bounds, Seed

Searcher = Literal["grid", "random", "optuna"]
Scheduler = Literal["none", "asha", "median", "pbt", "hyperband"]

_RUNGS = {"none": 1, "asha": 3, "median": 4, "pbt": 4, "hyperband": 3}
# Schedulers that compare all trials at every rung, so that the number of trials is fixed.
POPULATION = ("pbt", "hyperband")
# Fields that may change when a sweep continues. In the place of `train`, `validation` and `vary`, the journal compares
# the images and the values that they stand for.
_MAY_CHANGE = (
    *("out", "retry", "max_concurrent", "gpus_per_worker", "share_stream"),
    *("train", "validation", "test", "vary"),
)


@dataclass(frozen=True)
class SweepConfig:
    """Try values of hyperparameters, with several seeds each, and compare them by a probe at equal epochs. Takes the
    flags of `raysl pretrain` except --run: --data, --method, --epochs, --workers, --pirl.head and so on.

    Args:
        out: folder of the sweep, a path or a URI. The same command again continues the sweep.
        vary: hyperparameters to vary, by their dotted or short names: "temperature" tries values that raysl suggests
            and prints at the start; "temperature=0.05,0.1" tries these two; "temperature=0.03..0.5" lets the searcher
            choose values in this interval. With "method=A,B" each method gets what `raysl pretrain` would choose.
        train: labeled data that the probe learns from; by default the pretraining images.
        validation: labeled data that trials are compared on; by default a tenth of --train, which is then held out of
            the data that the probe learns from.
        test: labeled data on which the chosen trial is scored once, at the end; none by default.
        probe: probe whose primary metric is the score; higher is better.
        seeds: every trial runs once with each seed; trials are compared by the mean.
        searcher: "grid" tries all combinations, "random" chooses values at random, "optuna" chooses them from the
            scores so far.
        samples: number of trials, for every searcher but "grid". You may raise it when you continue a sweep, except
            with the schedulers "hyperband" and "pbt".
        scheduler: "none" runs every trial to its end; "asha" and "median" stop trials that are behind earlier
            ones; "hyperband" runs several groups of trials and stops part of each group at every rung; "pbt" lets
            the worst quarter of the trials continue from checkpoints of the best quarter with changed values.
        rungs: number of times that a trial is scored (rungs); 0 means 1 with the scheduler "none", 3 with "asha"
            and "hyperband", 4 with "median" and "pbt".
        reduction: for "none", "asha" and "hyperband": factor between the epochs of one rung and of the next. With a
            reduction of 3, "asha" and "hyperband" let a third of the trials continue at each rung.
        max_concurrent: maximum number of runs at the same time; 0 for as many as possible with a whole CPU for each
            trainer.
        gpus_per_worker: a value below 1 lets several small trainers share a GPU, where there are GPUs.
        share_stream: read, decode and augment images once for concurrent runs that need the same images in the same
            order.
        lag: for optuna: maximum number of trials that run at once. Optuna chooses the values of a trial without the
            scores of the LAG - 1 trials before it, so that a repeated sweep chooses the same values.
        seed: seed of the searcher and the scheduler.
        retry: run again the trials that failed in an earlier session of the sweep.
    """

    out: str
    vary: tuple[str, ...]
    train: str = ""
    validation: str = ""
    test: str = ""
    probe: str = "knn"
    seeds: Annotated[tuple[int, ...], Bounds(0, 2**63 - 1)] = (0, 1)
    searcher: Searcher = "grid"
    samples: Annotated[int, Bounds(low=1)] = 16
    scheduler: Scheduler = "none"
    rungs: Annotated[int, Bounds(low=0)] = 0
    reduction: Annotated[int, Bounds(low=2)] = 3
    max_concurrent: Annotated[int, Bounds(low=0)] = 0
    gpus_per_worker: Annotated[float, Bounds(above=0, high=1, hint="a whole GPU")] = 1
    share_stream: bool = True
    lag: Annotated[int, Bounds(low=1)] = 4
    seed: Seed = 0
    retry: bool = False

    def __post_init__(self) -> None:
        fields.check(self)
        if not self.vary:
            raise UserError("A sweep varies at least one field. Give --vary, for example --vary temperature.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"--seeds is {self.seeds}; give at least one seed, each once.")
        if flags := " and ".join(probes.required(self.probe)):
            raise UserError(
                f"The probe {self.probe!r} needs {flags}, which a sweep does not have. Use knn or linear for the "
                f"sweep, and {self.probe} on its best run."
            )
        if not probes.is_score(self.probe):
            raise UserError(
                f"The probe {self.probe!r} gives no score: more is not always better, so a sweep cannot choose by it. "
                "Use knn or linear."
            )
        self._check_combination()

    def _check_combination(self) -> None:
        if self.scheduler not in POPULATION:
            return
        if self.searcher not in ("grid", "random"):
            raise UserError(
                f"--scheduler {self.scheduler} compares all trials at every rung, and --searcher {self.searcher} "
                "proposes new trials only after others have ended. Use --searcher random."
            )
        if self.retry:
            raise UserError(
                f"--retry does not work with --scheduler {self.scheduler}: its decisions depend on all trials, so a "
                "failed trial cannot be added later. Leave out --retry, or give another --out."
            )
        if self.rungs == 1:
            raise UserError(f"--scheduler {self.scheduler} needs at least --rungs 2; --rungs is 1.")

    def may_change(self) -> tuple[str, ...]:
        """Return the fields that may change when the sweep continues; those of a run are in `raysl.config`."""
        # With a population, decisions depend on how many trials there are.
        return _MAY_CHANGE if self.scheduler in POPULATION else (*_MAY_CHANGE, "samples")

    def shares(self) -> tuple[float, ...]:
        """Return the share of a run's schedule that is done at each rung; the last is 1.

        Every trial follows the schedule of the whole run, so trials at the same rung have had the same learning rates.
        The rungs of "median" and "pbt" are equally spaced; those of the others grow by the factor `reduction`.
        """
        count = self.rungs or _RUNGS[self.scheduler]
        if self.scheduler in ("median", "pbt"):
            return tuple((i + 1) / count for i in range(count))
        return tuple(float(self.reduction) ** -(count - 1 - i) for i in range(count))

"""Checks of a sweep before any trial begins: its space, its data, and what the cluster can run at a time."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from raysl import ray_cluster, rng
from raysl.backbone.network import BackboneConfig
from raysl.config import Pretraining
from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.evaluation.evaluate import check_apart
from raysl.ingestion import resolve
from raysl.ingestion.subset import relabelled
from raysl.model import Model
from raysl.probes import common_labels
from raysl.ray_cluster import placement as cluster_placement
from raysl.ray_cluster.placement import Placement
from raysl.storage import Folder
from raysl.tuning.config import SweepConfig
from raysl.tuning.record import described
from raysl.tuning.space import Space, Values, configured, space

_log = logging.getLogger("raysl.tuning")

# Without --validation, one image in so many is held out of the labelled data, if these are no larger than this.
_HELD_OUT = 10
_MOST_BYTES = 4 << 30


@dataclass(frozen=True)
class Settings:
    """A sweep that has passed all checks.

    Args:
        base: configuration of every run, except what varies.
        config: configuration of the sweep.
        space: its dimensions.
        num_trials: number of trials.
        images: pretraining images.
        train: labelled data that the probe learns from.
        validation: labelled data that trials are compared on.
        test: labelled data that the chosen trial is scored on; None without.
        trials_at_once: trials at the same time.
        seeds_at_once: runs of one trial at the same time.
        placement: CPUs and GPUs of the trainers of a run.
    """

    base: Pretraining
    config: SweepConfig
    space: Space
    num_trials: int
    images: DataSet
    train: DataSet
    validation: DataSet
    test: DataSet | None
    trials_at_once: int
    seeds_at_once: int
    placement: Placement

    def cost(self) -> dict[str, float]:
        """Return the CPUs and GPUs that a run holds."""
        workers = self.base.worker_counts()[0]
        cpus = self.placement.cpus_per_worker + self.placement.share.cpus
        return {"cpus": workers * cpus, "gpus": workers * self.placement.gpus_per_worker}

    def point(self) -> Callable[[int], Values] | None:
        """Return the values of a trial as a function of its number; None where they depend on scores."""
        config, points = self.config, self.space
        if config.searcher == "grid":
            return points.grid().__getitem__
        return (lambda trial: points.drawn(config.seed, trial)) if config.searcher == "random" else None


def check(base: Pretraining, config: SweepConfig) -> tuple[Space, list[tuple[Values, Pretraining]]]:
    """Return the space of a sweep and the trials that can be known before it begins; needs neither Ray nor data.

    Raises:
        UserError: a package is missing, or the space or a trial is not allowed.
    """
    package = config.searcher
    if package not in ("grid", "random") and importlib.util.find_spec(package) is None:
        raise UserError(
            f"--searcher {package} needs the package {package}, which is not installed. Install "
            f"{'raysl[search]' if package == 'optuna' else package}, or use --searcher random."
        )
    check_workers(base)
    points = space(base, config.vary, listed=config.searcher == "grid")
    fixed = [d.name for d in points.dimensions if not d.mutable]
    if config.scheduler == "pbt" and fixed:
        raise UserError(
            f"--scheduler pbt changes values in the middle of a run, and {', '.join(fixed)} cannot change there. Vary "
            "fields such as optim.lr or a temperature, or use --scheduler asha."
        )
    return points, _trials(base, config, points)


def prepare(base: Pretraining, config: SweepConfig) -> Settings:
    """Check a sweep and divide the cluster among its runs.

    Raises:
        UserError: the space, the data, the cluster or a trial does not allow the sweep.
    """
    points, trials = check(base, config)
    num_trials = len(points.grid()) if config.searcher == "grid" else config.samples
    ray_cluster.start()
    images = resolve(base.data)
    labelled = resolve(config.train) if config.train else images
    given = resolve(config.validation) if config.validation else None
    test = resolve(config.test) if config.test else None
    for judged in filter(None, (given, test)):
        common_labels(labelled, judged)
        check_apart([config.probe], labelled, judged)
    _build(trials, images)
    trials_at_once, seeds_at_once, placement = share(
        base, config.max_concurrent, config.gpus_per_worker, num_trials, len(config.seeds)
    )
    train, validation = (labelled, given) if given else hold_out(labelled, Folder(config.out))
    return Settings(
        *(base, config, points, num_trials, images, train, validation, test),
        *(trials_at_once, seeds_at_once, placement),
    )


def check_workers(base: Pretraining) -> None:
    """Raise UserError for runs that change their number of workers."""
    if len(base.worker_counts()) > 1:
        raise UserError(
            f"--workers is {base.workers!r}. The runs of a sweep share the cluster, so each has a fixed number of "
            "workers. Give one number."
        )


def hold_out(labelled: DataSet, out: Folder) -> tuple[DataSet, DataSet]:
    """Return the data that a probe learns from and the data that trials are compared on, out of one labelled set.

    A tenth of the images, drawn by a fixed rule, is held out; both parts are copied to the folder of the sweep.

    Raises:
        UserError: there are no labels or too few images, or they are too large to be copied.
    """
    number = labelled.num_images // _HELD_OUT
    if labelled.manifest.num_bytes > _MOST_BYTES or not number:
        why = "too few" if not number else "too large to be copied"
        raise UserError(
            f"The labelled images of {str(labelled.folder)!r} are {why} for a tenth of them to be held out. Give "
            "--validation, labelled data on which the trials are compared."
        )
    labels_n = labelled.labels()
    chosen = rng.generator("validation", labelled.num_images).permutation(labelled.num_images)[:number]
    held_n = np.zeros(labelled.num_images, dtype=bool)
    held_n[chosen] = True
    made = []
    for name, inside_n in (("learn", ~held_n), ("validation", held_n)):
        indices = np.flatnonzero(inside_n).astype(np.int64)
        source = f"{len(indices)} images of {labelled.manifest.source}"
        classes = labelled.manifest.classes
        made.append(relabelled(labelled, indices, labels_n[indices], classes, out / "images" / name, source))
    return made[0], made[1]


def _trials(base: Pretraining, config: SweepConfig, points: Space) -> list[tuple[Values, Pretraining]]:
    """Return the configuration of every trial; of the ends of the space, where trials are not known before."""
    if config.searcher == "grid":
        tried = points.grid()
    elif config.searcher == "random" and config.scheduler != "pbt":
        tried = [points.drawn(config.seed, trial) for trial in range(config.samples)]
    else:
        tried = list(points.ends())
    made = []
    for values in tried:
        try:
            made.append((values, configured(base, values)))
        except UserError as error:
            raise _refused(values, error) from error
    return made


def _build(trials: list[tuple[Values, Pretraining]], images: DataSet) -> None:
    """Build the model and the plan of each trial, which finds mistakes that the fields alone do not show."""
    backbones: set[BackboneConfig] = set()
    for values, config in trials:
        # Each backbone is built once; heads and transforms do not need a large one.
        known, light = config.backbone in backbones, replace(config.backbone, name="small")
        backbones.add(config.backbone)
        try:
            config.plan(images)
            built = replace(config, backbone=light) if known else config
            Model.of(built, images).check()
        except UserError as error:
            raise _refused(values, error) from error


def _refused(values: Values, error: UserError) -> UserError:
    return UserError(f"The trial with {described(values)} could not run, so none has begun. {error}")


def share(
    base: Pretraining, at_once: int, gpus_per_worker: float, num_trials: int, num_seeds: int
) -> tuple[int, int, Placement]:
    """Return the trials at a time, the seeds of each at a time, and what the trainers of a run get.

    The trainers of all runs are placed together, as if they were one large run, on the machines of the cluster and
    those that it can grow to; so runs never wait for each other's CPUs. Trials come before seeds.

    Args:
        base: configuration of a run.
        at_once: runs at the same time; 0 for as many as have a whole CPU for each trainer.
        gpus_per_worker: GPUs of a trainer, where there are GPUs.
        num_trials: number of trials.
        num_seeds: number of seeds.

    Raises:
        UserError: the cluster can never run so many.
    """
    found = cluster_placement.machines()
    workers = base.worker_counts()[0]

    def placed(count: int) -> Placement:
        try:
            return cluster_placement.place(count * workers, found, gpus_per_worker)
        except UserError as error:
            raise UserError(f"{count} runs at a time with {workers} workers each: {error}") from error

    if gpus_per_worker < 1 and workers > 1:
        raise UserError(
            f"--gpus-per-worker is {gpus_per_worker} and --workers is {workers}. Trainers of one run cannot share a "
            "GPU: use --workers 1."
        )
    runs = at_once or _most(placed, num_trials * num_seeds)
    trials = min(runs, num_trials)
    seeds = min(max(1, runs // trials), num_seeds)
    return trials, seeds, placed(runs if at_once else trials * seeds)


def _most(placed: Callable[[int], Placement], runs: int) -> int:
    """Return how many runs have a whole CPU for each trainer."""
    most = 1
    placed(1)
    while most < runs:
        try:
            more = placed(most + 1)
        except UserError:
            break
        if more.cpus_per_worker < 1:
            break
        most += 1
    return most


def scheduler(config: SweepConfig, points: Space, times: tuple[int, ...]) -> Any:
    """Return the scheduler of Ray Tune that a sweep asks for.

    Args:
        config: configuration of the sweep.
        points: its space.
        times: the time of each rung, as trials report it under "t".
    """
    from ray.tune import schedulers

    made = schedulers
    if config.scheduler == "asha":
        return made.ASHAScheduler(
            time_attr="t", max_t=times[-1], grace_period=1, reduction_factor=config.reduction
        )
    if config.scheduler == "median":
        return made.MedianStoppingRule(time_attr="rung", grace_period=1, min_samples_required=3)
    if config.scheduler == "hyperband":
        return made.HyperBandScheduler(time_attr="t", max_t=times[-1], reduction_factor=config.reduction)
    if config.scheduler == "pbt":
        return made.PopulationBasedTraining(
            time_attr="rung",
            perturbation_interval=1,
            hyperparam_mutations=points.mutations(),
            custom_explore_fn=points.clipped,
            log_config=False,
            synch=True,
        )
    return made.FIFOScheduler()


def searcher(config: SweepConfig) -> Any:
    """Return the searcher of Ray Tune that a sweep asks for."""
    from ray.tune import search

    if config.searcher == "optuna":
        optuna = importlib.import_module("optuna")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        return search.create_searcher("optuna", seed=config.seed)
    if config.searcher == "hyperopt":
        return search.create_searcher("hyperopt", random_state_seed=config.seed, n_initial_points=8)
    optimizers = importlib.import_module("nevergrad").optimizers
    return search.create_searcher("nevergrad", optimizer=optimizers.NGOpt)

"""What all trials of a sweep share, and the checks that every trial passes before any begins."""

from __future__ import annotations

from dataclasses import dataclass, replace

from raysl import ray_cluster
from raysl.backbone.network import BackboneConfig
from raysl.config import Pretraining
from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.evaluation.evaluate import check_apart
from raysl.ingestion import resolve
from raysl.model import Model
from raysl.probes import common_labels
from raysl.ray_cluster import placement as cluster_placement
from raysl.ray_cluster.placement import Placement
from raysl.tuning import searchers, table
from raysl.tuning.config import SweepConfig
from raysl.tuning.space import Space, Values, space


@dataclass(frozen=True)
class Setting:
    """What all trials share.

    Args:
        base: the configuration, but for what varies.
        config: of the sweep.
        space: of its points.
        images: that are learned from.
        train: labelled data that the probe learns from.
        test: that it is scored on.
        at_once: runs at the same time.
        placement: what the trainers of a run get.
    """

    base: Pretraining
    config: SweepConfig
    space: Space
    images: DataSet
    train: DataSet
    test: DataSet
    at_once: int
    placement: Placement

    @property
    def workers(self) -> int:
        """Trainers of a run."""
        return self.base.worker_counts()[0]

    def cost(self) -> dict[str, float]:
        """The CPUs and GPUs that a run holds."""
        cpus = self.placement.cpus_per_worker + self.placement.share.cpus
        return {"cpus": self.workers * cpus, "gpus": self.workers * self.placement.gpus_per_worker}

    def until(self, config: Pretraining, rung: int) -> int:
        """The step of a rung."""
        plan = config.plan(self.images)
        return max(1, round(self.config.shares()[rung] * plan.num_steps))


def prepare(base: Pretraining, config: SweepConfig) -> Setting:
    """Check every trial before any of them begins, and divide the cluster.

    Raises:
        UserError: the space, the data, the cluster or a trial is wrong.
    """
    points, trials = check(base, config)
    ray_cluster.start()
    runs = len(config.seeds) * (len(trials) if config.searcher == "grid" else config.samples)
    at_once, placement = _share(base.worker_counts()[0], config, runs)
    images, test = resolve(base.data), resolve(config.test)
    train = resolve(config.train) if config.train else images
    common_labels(train, test)
    check_apart([config.probe], train, test)
    _build(trials, images)
    return Setting(base, config, points, images, train, test, at_once, placement)


def check(base: Pretraining, config: SweepConfig) -> tuple[Space, list[tuple[Values, Pretraining]]]:
    """Check all that needs neither data nor Ray; return the space and the configurations of the trials.

    Raises:
        UserError: a package is missing, a field or a value cannot be varied, or a trial cannot run.
    """
    if config.searcher == "optuna":
        searchers.need_optuna()
    if len(base.worker_counts()) > 1:
        raise UserError(
            f"The runs of a sweep share the cluster, so each has a fixed number of workers, and --workers is "
            f"{base.workers!r}. Give one number."
        )
    points = space(base, config.vary, listed=config.searcher == "grid")
    fixed = [d.name for d in points.dimensions if not d.live]
    if config.scheduler == "pbt" and fixed:
        raise UserError(
            f"Population based training changes values during a run, and {', '.join(fixed)} cannot change. Vary "
            "fields such as optim.lr or a temperature, or use --scheduler asha."
        )
    return points, _trials(base, config, points)


def _trials(base: Pretraining, config: SweepConfig, points: Space) -> list[tuple[Values, Pretraining]]:
    """The configuration of every trial; of the ends of the space, where what will be tried is not known yet."""
    if config.searcher == "grid":
        tried = points.grid()
    elif config.searcher == "random" and config.scheduler != "pbt":
        tried = [points.drawn(config.seed, trial) for trial in range(config.samples)]
    else:
        tried = list(points.ends())
    made = []
    for values in tried:
        try:
            made.append((values, points.configured(base, values)))
        except UserError as error:
            raise _refused(values, error) from error
    return made


def _build(trials: list[tuple[Values, Pretraining]], images: DataSet) -> None:
    """Builds what each trial would train, and its plan, which finds what the fields alone do not show."""
    backbones: set[BackboneConfig] = set()
    for values, config in trials:
        # Each backbone once; heads and transforms do not need a large one.
        known, light = config.backbone in backbones, replace(config.backbone, name="small")
        backbones.add(config.backbone)
        try:
            config.plan(images)
            built = replace(config, backbone=light) if known else config
            Model.of(built, images).check()
        except UserError as error:
            raise _refused(values, error) from error


def _refused(values: Values, error: UserError) -> UserError:
    return UserError(f"The trial with {table.described(values)} could not run, so none was begun. {error}")


def _share(workers: int, config: SweepConfig, runs: int) -> tuple[int, Placement]:
    """How many of the runs go on at the same time, and what the trainers of each get.

    The trainers of all of them are placed together, as if they were one large run, on the machines that are there and
    those that the cluster can grow to: what fits so can never wait for ever.
    """
    found = cluster_placement.machines()

    def placed(count: int) -> Placement:
        try:
            return cluster_placement.place(count * workers, found, config.gpus_per_worker)
        except UserError as error:
            raise UserError(f"{count} runs at a time with {workers} workers each: {error}") from error

    if config.gpus_per_worker < 1 and workers > 1:
        raise UserError(
            f"Trainers of one run cannot share a GPU, and gpus_per_worker is {config.gpus_per_worker} for {workers} "
            "workers. Use --workers 1."
        )
    if config.max_concurrent:
        return config.max_concurrent, placed(config.max_concurrent)
    most = 1
    placement = placed(1)
    while most < runs:
        try:
            more = placed(most + 1)
        except UserError:
            break
        if more.cpus_per_worker < 1:
            break
        most, placement = most + 1, more
    return most, placement

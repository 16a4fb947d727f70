"""Check a sweep before any trial begins: its space, its data, and the runs that the cluster can hold at a time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from raysl import probes, ray_cluster, rng
from raysl.backbone.network import BackboneConfig
from raysl.config import Pretraining, run_folder
from raysl.config.defaults import choose_for_methods
from raysl.dataset import DataSet
from raysl.errors import UserError, counted
from raysl.evaluation.evaluate import check_data, probe
from raysl.evaluation.options import ProbeConfig
from raysl.evaluation.train_test_overlap import refuse_same_images
from raysl.ingestion import open_or_ingest
from raysl.ingestion.subset import part
from raysl.model import Model
from raysl.probes import common_labels
from raysl.ray_cluster import placement as cluster_placement
from raysl.ray_cluster import shared_paths
from raysl.ray_cluster.placement import Placement
from raysl.run import Run
from raysl.storage import Folder
from raysl.tuning import algorithms
from raysl.tuning.config import SweepConfig
from raysl.tuning.results import described
from raysl.tuning.space import Space, Values, apply_values, space, with_method_values

# Without --validation, one labeled image in ten is held out, if the labeled data take no more bytes than this.
_HELD_OUT = 10
_MAX_COPY_BYTES = 4 << 30


@dataclass(frozen=True)
class TrialContext:
    """What all trials of a sweep share. Picklable."""

    base: Pretraining  # configuration of every run, except what varies, the seed and the folder
    images: DataSet  # pretraining images
    out: str  # folder of the sweep; runs are in `trials/NAME/seed-S` inside
    train: DataSet  # labeled data that the probe learns from
    validation: DataSet  # labeled data that trials are compared on
    probe: str  # name of the probe
    seeds: tuple[int, ...]  # seeds of each trial
    shares: tuple[float, ...]  # shares of the schedule at the rungs; the last is 1
    trials_at_once: int  # trials at the same time
    seeds_at_once: int  # runs of one trial at the same time
    placement: Placement  # CPUs and GPUs of the trainers of a run
    # Values of the trials of each method, where the method varies; what a trial varies wins.
    method_values: Mapping[str, Values] = field(default_factory=dict)
    keep_rungs: bool = True  # keep the checkpoints of the last two rungs, so that other trials can copy them
    # Results of earlier sessions by trial name and rung, which are not measured again.
    known: Mapping[tuple[str, int], Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    # Reasons of the trials that failed in earlier sessions, by name.
    failures: Mapping[str, str] = field(default_factory=dict)
    broker: Any = None  # actor that shares streams; see `raysl.tuning.shared_streams`. None without sharing.
    # A `ray.util.queue.Queue` that gets (level, text) of what the runs log; None for no messages.
    messages: Any = None

    @property
    def in_process(self) -> bool:
        """True if the actor of a trial trains and probes itself, one seed after the other.

        Its data processes are forks, which cannot use the clients of object stores that the actor has opened. A probe
        of the network runs in tasks of Ray, which would wait for the CPUs that the actors hold.
        """
        one = self.base.worker_counts() == (1,) and self.seeds_at_once == 1
        frozen = not hasattr(probes.load(self.probe)[1], "examine")
        return one and frozen and self.images.folder.is_local

    def config_of(self, values: Values) -> Pretraining:
        """Return the configuration of a trial. Raises UserError as `apply_values`."""
        return apply_values(self.base, with_method_values(values, self.method_values))

    def resources(self) -> dict[str, float]:
        """Return the resources of the actor of a trial.

        An actor that trains itself takes the CPUs and GPUs of its run, but for those of a shared stream. One that
        trains through Ray Train takes no CPU, since the trainers ask for theirs, and runs on the head; its share of the
        head bounds how many there are.
        """
        if self.in_process:
            cpus = self.placement.slot if self.broker is None else self.placement.cpus_per_worker
            return {"CPU": cpus, "GPU": self.placement.gpus_per_worker}
        count = self.trials_at_once
        # Ray Train needs a thousandth of the head for each run.
        share = max(1e-4, min(1 / (count + 0.5), (1 - 0.002 * count) / count))
        return {"node:__internal_head__": math.floor(1e4 * share) / 1e4}

    def cost(self) -> dict[str, float]:
        """Return the CPUs and GPUs that a run holds."""
        workers, placement = self.base.worker_counts()[0], self.placement
        cpus = workers * (placement.cpus_per_worker + placement.share.cpus)
        return {"cpus": cpus, "gpus": workers * placement.gpus_per_worker}

    def until(self, config: Pretraining, rung: int) -> int:
        """Return the step of a rung, counted from 0; 0 for the rung before the first."""
        return max(1, round(self.shares[rung] * config.plan(self.images).num_steps)) if rung >= 0 else 0

    def scored(
        self, run: Run, eval_set: DataSet, encoders: Sequence[str], name: str, **how: Any
    ) -> list[dict[str, Any]]:
        """Probe a run and return the rows of the primary metric.

        The features in `features-NAME` are larger than a checkpoint and are used only once, so they are deleted.
        """
        cache = run.folder / f"features-{name}"
        try:
            rows = probe(
                run, self.train, eval_set, probes=(self.probe,), encoders=tuple(encoders), cache=cache, **how
            )
        finally:
            cache.delete()
        return [row for row in rows if row["primary"]]

    @property
    def times(self) -> tuple[int, ...]:
        """Whole numbers proportional to the shares, for schedulers that count time."""
        return tuple(max(i + 1, round(share / self.shares[0])) for i, share in enumerate(self.shares))


@dataclass(frozen=True)
class PreparedSweep:
    """A sweep that has passed all checks. The chosen trial is scored on `test`, if that is given."""

    config: SweepConfig
    space: Space
    num_trials: int
    test: DataSet | None
    context: TrialContext

    def point(self) -> Callable[[int], Values] | None:
        """Return the values of a trial as a function of its number; None where they depend on scores."""
        if self.config.searcher == "grid":
            return self.space.grid().__getitem__
        if self.config.searcher == "random":
            return lambda trial: self.space.sample(self.config.seed, trial)
        return None


def check_and_list_points(base: Pretraining, config: SweepConfig) -> tuple[Space, list[Values]]:
    """Return the space of a sweep, and the points at which it is checked; needs neither Ray nor data.

    The points are those of all trials, if they are known before the sweep begins; otherwise corners of the space.

    Raises:
        UserError: a package is missing, the folder holds something else, or the space or a trial is not allowed.
    """
    run_folder.check_free_for_sweep(config.out)
    algorithms.check_installed(config.searcher)
    check_workers(base)
    space_ = space(base, config.vary, listed=config.searcher == "grid")
    fixed = [dimension.name for dimension in space_.dimensions if not dimension.mutable]
    if config.scheduler == "pbt" and fixed:
        raise UserError(
            f"--scheduler pbt changes values during a run, and {', '.join(fixed)} cannot change. Vary fields such as "
            "optim.lr or a temperature, or use --scheduler asha."
        )
    if config.searcher == "grid":
        points = space_.grid()
    elif config.searcher == "random" and config.scheduler != "pbt":
        points = [space_.sample(config.seed, trial) for trial in range(config.samples)]
    else:
        points = list(space_.corners())
    check_points(base, points)
    return space_, points


def prepare(
    base: Pretraining,
    config: SweepConfig,
    given: Mapping[str, Any] | None = None,
    method_values: Mapping[str, Values] | None = None,
) -> PreparedSweep:
    """Check a sweep and divide the cluster among its runs. Raise UserError if it cannot run.

    Args:
        given: the fields that the user gives; each method gets what suits the images for the others. None: every method
            has the values of its class.
        method_values: the values of each method, if they are known; see `TrialContext`.
    """
    space_, points = check_and_list_points(base, config)
    num_trials = len(space_.grid()) if config.searcher == "grid" else config.samples
    names = next((dimension.values for dimension in space_.dimensions if dimension.name == "method"), ())
    if method_values is None:
        images = open_or_ingest(base.data)
        method_values = (
            choose_for_methods(given, images, base, names, space_.names)
            if names and given is not None
            else {}
        )
    whole = [with_method_values(point, method_values) for point in points]
    context, test = make_trial_context(base, config, whole, num_trials, config.shares())
    # Only population based training copies checkpoints.
    context = replace(context, keep_rungs=config.scheduler == "pbt", method_values=method_values)
    return PreparedSweep(config, space_, num_trials, test, context)


def make_trial_context(
    base: Pretraining,
    config: SweepConfig,
    points: Sequence[Values],
    num_trials: int,
    shares: tuple[float, ...],
) -> tuple[TrialContext, DataSet | None]:
    """Start Ray, open the data, and return what all trials share, and the test images if there are any.

    Raises:
        UserError: the data, the cluster or a trial at one of the points is invalid.
    """
    ray_cluster.start()
    shared_paths.refuse_local({"--out": config.out})
    images = open_or_ingest(base.data)
    labeled = open_or_ingest(config.train) if config.train else images
    if not labeled.has_labels and not config.train:
        raise UserError(
            f"The images {images.name!r} have no labels, and a sweep compares its trials on labeled images. Give "
            "--train, labeled images."
        )
    given = open_or_ingest(config.validation) if config.validation else None
    test = open_or_ingest(config.test) if config.test else None
    for eval_set in filter(None, (given, test)):
        common_labels(labeled, eval_set)
        refuse_same_images([config.probe], labeled, eval_set)
    if test and given and test.manifest.fingerprint == given.manifest.fingerprint:
        raise UserError(
            f"--validation is {config.validation!r} and --test is {config.test!r}, which hold the same images. Trials "
            "are chosen on --validation, so the chosen one would have no honest score. Leave out one of them; without "
            "--validation, a tenth of the training images is held out."
        )
    check_points(base, points, images)
    shared = share(base, config.max_concurrent, config.gpus_per_worker, num_trials, len(config.seeds))
    train, validation = (labeled, given) if given else hold_out(labeled, Folder(config.out))
    check_data(ProbeConfig((config.probe,)).ready(), train, validation)
    base = replace(base, data=str(images.folder))
    where = images, str(Folder(config.out)), train, validation
    return TrialContext(base, *where, config.probe, config.seeds, shares, *shared), test


def check_workers(base: Pretraining) -> None:
    """Raise UserError for runs that change their number of workers."""
    if len(base.worker_counts()) > 1:
        raise UserError(
            f"--workers is {base.workers!r}. The runs of a sweep share the cluster, so each has a fixed number of "
            "workers. Give one number."
        )


def hold_out(labeled: DataSet, out: Folder) -> tuple[DataSet, DataSet]:
    """Return the data that a probe learns from and the data that trials are compared on, out of one labeled set.

    A tenth of the images, drawn by a fixed rule, is held out; both parts are copied to the folder of the sweep.

    Raises:
        UserError: there are no labels or too few images, or they are too large to be copied.
    """
    number = labeled.num_images // _HELD_OUT
    size = f"{labeled.num_images} images, fewer than {_HELD_OUT}" if not number else ""
    if labeled.manifest.num_bytes > _MAX_COPY_BYTES:
        size = f"{labeled.manifest.num_bytes / 2**30:.1f} GiB, more than {_MAX_COPY_BYTES >> 30}"
    if size:
        raise UserError(
            f"A tenth of the labeled data {labeled.name!r} cannot be held out for validation: it has {size}. "
            "Give --validation, labeled data on which the trials are compared."
        )
    labeled.labels()  # Raises, if there are none.
    order_n = rng.generator("validation", labeled.num_images).permutation(labeled.num_images)
    learn, validation = np.sort(order_n[number:]), np.sort(order_n[:number])
    images = out / "images"
    return part(labeled, learn, images / "learn"), part(labeled, validation, images / "validation")


def check_points(base: Pretraining, points: Iterable[Values], images: DataSet | None = None) -> None:
    """Check the configuration at each point; given the images, also its plan and its model.

    Raises:
        UserError: a trial at one of the points could not run.
    """
    backbones: set[BackboneConfig] = set()
    for values in points:
        try:
            config = apply_values(base, values)
            if images is not None:
                config.plan(images)
                # Each backbone is built once.
                known = config.backbone in backbones
                backbones.add(config.backbone)
                model = light_model(config, images) if known else Model.of(config, images)
                model.check(config.backbone)
        except UserError as error:
            raise UserError(
                f"The trial with {described(values)} could not run, so the sweep was not started. {error}"
            ) from error


def light_model(config: Pretraining, images: DataSet) -> Model:
    """Return a model with the views and heads of a configuration, on a small backbone where the method allows it."""
    try:
        return Model.of(replace(config, backbone=replace(config.backbone, name="small", weights="")), images)
    except UserError:  # the method or a field needs the backbone itself
        return Model.of(config, images)


def share(
    base: Pretraining, at_once: int, gpus_per_worker: float, num_trials: int, num_seeds: int
) -> tuple[int, int, Placement]:
    """Return the trials at a time, the seeds of each at a time, and what the trainers of a run get.

    The trainers of all runs are placed together, as if they were one large run, on the machines of the cluster and
    those that it can grow to; so runs never wait for each other's CPUs. Trials come before seeds. With `at_once` 0, as
    many run as leave a whole CPU to each trainer. Raises UserError if the cluster can never run so many.
    """
    found = cluster_placement.machines()
    workers = base.worker_counts()[0]
    if gpus_per_worker < 1 and workers > 1:
        raise UserError(
            f"--gpus-per-worker is {gpus_per_worker} and --workers is {workers}. Trainers of one run cannot share a "
            "GPU: use --workers 1."
        )

    def placed(count: int) -> Placement:
        try:
            return cluster_placement.make_placement(count * workers, found, gpus_per_worker)
        except UserError as error:
            raise UserError(
                f"{counted(count, 'run')} at a time with {counted(workers, 'worker')} each: {error}"
            ) from error

    def has_room(count: int) -> bool:
        with contextlib.suppress(UserError):
            return placed(count).cpus_per_worker >= 1
        return False

    runs = at_once or 1
    while not at_once and runs < num_trials * num_seeds and has_room(runs + 1):
        runs += 1
    trials = min(runs, num_trials)
    seeds = min(max(1, runs // trials), num_seeds)
    placement = placed(runs if at_once else trials * seeds)
    if workers == 1 and seeds == 1:  # Its data processes are on its machine.
        cpus = placement.slot - placement.cpus_per_worker
        placement = replace(placement, share=replace(placement.share, cpus=cpus))
    return trials, seeds, placement

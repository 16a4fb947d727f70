"""Measure the stages of a run, predict its speed, and list the machines of a cluster with the price of a run."""

from __future__ import annotations

import io
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from raysl import ray_cluster
from raysl.backbone.network import BackboneConfig
from raysl.config import Pretraining, ViewConfig, defaults, methods
from raysl.dataset import DataSet
from raysl.diagnostics import gpu_check, machines
from raysl.diagnostics.gpu_check import Certificate
from raysl.diagnostics.machines import Fleet
from raysl.diagnostics.measurement import measure_data, measure_training
from raysl.diagnostics.prediction import Costs, Prediction, predict
from raysl.errors import UserError, counted
from raysl.fields import Bounds, CheckedTop
from raysl.ingestion import open_or_ingest
from raysl.model import Model
from raysl.ray_cluster import gpus
from raysl.ray_cluster import placement as cluster_placement
from raysl.ray_cluster.placement import Placement
from raysl.ray_cluster.versions import versions
from raysl.run import Run
from raysl.storage import Folder
from raysl.training.worker import Job

_log = logging.getLogger("raysl.diagnostics")


@dataclass(frozen=True)
class DoctorConfig(CheckedTop):
    """Measure the stages of a run and name its bottleneck, or survey a cluster with --cluster.

    Args:
        data: a data set made by `raysl ingest`, or any source that it reads; shapes:2000 generates 2,000 images.
        method: an objective and a pretext transform, such as pirl-jigsaw.
        view, backbone: as of `raysl pretrain`. Photos need --image-size and --backbone too: without them, the doctor
            measures the backbone "small" at 32 pixels, while `raysl pretrain` chooses more for them.
        batch_size: images in the global batch; 0 takes as many as `raysl pretrain` would for these data.
        workers: number of Ray Train workers; 0 takes as many as `raysl pretrain` would on this machine or cluster.
        cluster: measure nothing, but show the machines of the cluster, which of them the run would use, which it would
            wait for, what it would cost, and which machines run other code or packages.
        gpu: instead check and measure the GPUs of this machine with training steps of PIRL, ResNet-50 at 224 pixels. Of
            the other flags, only --data and --out have an effect. Without a GPU, the checks run at a small size and
            list what they could not check.
        out: file for the results of --gpu (a certificate, in JSON).
        prices: US dollars per hour for each type of machine, such as gpu_spot=0.49; they override the prices in
            cluster.yaml. Machines that were not started by an autoscaler have the type "machine".
    """

    data: str = "shapes:2000"
    method: str = "pirl-jigsaw"
    view: ViewConfig = field(default_factory=ViewConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    batch_size: Annotated[int, Bounds(0, 1_048_576)] = 0
    workers: Annotated[int, Bounds(0, 10**6)] = 0
    cluster: bool = False
    gpu: bool = False
    out: str = ""
    prices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        methods.parse(self.method)  # Before the data are read and Ray starts.

    def price_list(self) -> dict[str, float]:
        """Return the prices by type. Raise UserError if one is not TYPE=NUMBER."""
        found = {}
        for entry in self.prices:
            name, _, usd = entry.partition("=")
            try:
                found[name] = float(usd)
            except ValueError as error:
                raise UserError(
                    f"--prices is {entry!r}; it must be the type of a machine and US dollars an hour, such as "
                    "gpu_spot=0.49."
                ) from error
        return found


def diagnose(given: DoctorConfig) -> Diagnosis:
    """Check the GPUs, look at the cluster or measure a run, as the configuration says. Raises as `look`, `examine`."""
    if given.gpu:
        ray_cluster.start()
        return gpu_check.check(open_or_ingest(given.data), given.out)
    return look(given) if given.cluster else examine(given)


def look(given: DoctorConfig) -> Fleet:
    """Show the machines of the cluster, what a run would take of them, and machines that run other code.

    Raises UserError if there is no cluster, or a price is malformed.
    """
    prices = given.price_list()
    ray_cluster.start(compare=False)
    workers = given.workers or cluster_placement.default_workers()
    fleet = machines.survey(workers, prices)
    for part in (_text(machines.table(fleet)), *machines.sentences(fleet, workers)):
        _log.info(part)
    return fleet


@dataclass(frozen=True)
class Report:
    """Result of `examine`."""

    versions: Mapping[str, Any]  # versions of Python and packages, and the hash of raysl's code
    resources: Mapping[str, float]  # totals of the cluster
    placement: Placement  # CPUs and GPUs of the workers and their data tasks
    costs: Costs  # cost of each stage
    prediction: Prediction  # predicted speed


Diagnosis = Report | Fleet | Certificate


def examine(given: DoctorConfig) -> Report:
    """Measure the stages of a run and show what limits its speed. Takes about half a minute.

    Raises UserError if the run cannot be started, or the trainers did not get resources for three minutes.
    """
    ray_cluster.start()
    import ray

    resources: dict[str, float] = ray.cluster_resources()
    found, there = versions(), cluster_placement.machines()
    dataset = open_or_ingest(given.data)
    config = pretraining(given, dataset, cluster_placement.default_workers(there), there.has_gpus)
    workers = int(config.workers)
    placement = cluster_placement.make_placement(workers)
    if placement.gpus_per_worker:
        gpus.check(placement.gpus_per_worker, config.precision)
    stream = Model.of(config, dataset).stream(dataset, placement.share, world=workers)
    _log.info(_text(_machine(found, resources, placement)))
    with tempfile.TemporaryDirectory() as folder:
        job = Job(config.to_json(), Run(Folder(folder)), dataset, placement)
        costs = Costs(**measure_data(stream), **measure_training(job, workers))
    prediction = predict(costs, placement, workers, config.batch_size, resources.get("CPU", 1.0))
    _log.info(_text(_stages(costs, config)))
    _log.info("%s", prediction)
    return Report(found, resources, placement, costs, prediction)


def pretraining(given: DoctorConfig, dataset: DataSet, default_workers: int, has_gpus: bool) -> Pretraining:
    """Return the configuration that is measured: what is given, and for the rest what `raysl pretrain` would choose.

    Args:
        given: the flags; a batch size or a number of workers of 0 is chosen.
        dataset: the images.
        default_workers, has_gpus: of the machine, as for `raysl.config.defaults.choose_defaults`.
    """
    names = ("data", "method", "batch_size", "workers", "view", "backbone")
    own = {name: value for name in names if (value := getattr(given, name)) != 0}
    unlisted = defaults.CHOSEN - {"batch_size", "workers"}  # the doctor has no flags for them
    wanted = {"run": "-", "epochs": 1, **own}
    return defaults.choose_defaults(wanted, dataset, default_workers, has_gpus, unlisted)


def _machine(found: Mapping[str, Any], resources: Mapping[str, float], placement: Placement) -> Table:
    table = Table(title="versions and resources", show_header=False)
    table.add_row("raysl", escape(f"code {found['code']}"))
    table.add_row("python", found["python"])
    for name in ("ray", "torch", "torchvision", "pyarrow"):
        table.add_row(name, escape(found["packages"][name]))
    table.add_row("processor", f"{torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores here")
    table.add_row("cluster", f"{resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs")
    gib = 2.0**30
    memory, objects = resources.get("memory", 0) / gib, resources.get("object_store_memory", 0) / gib
    table.add_row("memory", f"{memory:.1f} GiB for tasks, {objects:.1f} GiB for objects")
    cpus, share = placement.cpus_per_worker, placement.share
    trainer = f"{cpus:g} CPUs, {placement.gpus_per_worker:g} GPUs, {placement.threads_per_worker} threads"
    table.add_row("each trainer", trainer)
    table.add_row("its data tasks", f"{share.cpus:g} CPUs, {share.cpus_per_task:g} each")
    return table


def _stages(costs: Costs, config: Pretraining) -> Table:
    workers, size = int(config.workers), config.view.image_size
    local = config.batch_size // workers
    title = f"{config.method}, {size} pixels, {counted(workers, 'worker')} x {local} images"
    table = Table(title=escape(title))
    for column in ("stage", "us / image", "ms / step of one worker"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for field_name, value in asdict(costs).items():
        name = field_name.rpartition("_")[0]
        us = value * 1e6 / local if name in ("step", "all_reduce") else value
        table.add_row(name.replace("_", "-"), f"{us:,.0f}", f"{us * local / 1000:,.1f}")
    return table


def _text(table: Table) -> str:
    console = Console(file=io.StringIO(), width=100)
    with console.capture() as captured:
        console.print(table)
    return captured.get()

"""Measure the stages of a run, predict its speed, and list the machines of a cluster with the price of a run."""

from __future__ import annotations

import dataclasses
import io
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from raysl import ray_cluster
from raysl.backbone.network import BackboneConfig
from raysl.config import Pretraining, ViewConfig, methods
from raysl.dataset import DataSet
from raysl.diagnostics import gpu_check, machines
from raysl.diagnostics.gpu_check import Certificate
from raysl.diagnostics.machines import Fleet
from raysl.diagnostics.measurement import measure_data, measure_training
from raysl.diagnostics.prediction import Costs, Prediction, predict
from raysl.errors import UserError
from raysl.fields import Bounds, check
from raysl.ingestion import resolve
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
class DoctorConfig:
    """Measure the stages of a run and name its bottleneck, or survey a cluster with --cluster.

    Args:
        data: a data set made by `raysl ingest`, or any source that it reads; shapes:2000 generates 2,000 images.
        method: an objective and a pretext transform, such as pirl-jigsaw.
        view, backbone: as of `raysl pretrain`.
        batch_size: images in the global batch.
        workers: number of Ray Train workers; 0 means 1 if there is exactly one GPU, else 2.
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
    batch_size: Annotated[int, Bounds(1, 1_048_576)] = 64
    workers: Annotated[int, Bounds(0, 10**6)] = 0
    cluster: bool = False
    gpu: bool = False
    out: str = ""
    prices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check(self)

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
    """Check the GPUs, look at the cluster or measure a run, as the configuration says. Ray must have been started.

    Raises:
        UserError: as `look` and `examine` do.
    """
    if given.gpu:
        return gpu_check.check(resolve(given.data), given.out)
    return look(given) if given.cluster else examine(given)


def look(given: DoctorConfig) -> Fleet:
    """Show the machines of the cluster, what a run would take of them, and machines that run other code.

    Args:
        given: the run; only its workers and prices matter.

    Raises:
        UserError: there is no cluster, or a price is malformed.
    """
    prices = given.price_list()
    ray_cluster.start(compare=False)
    given = _with_workers(given)
    fleet = machines.survey(given.workers, prices)
    for part in (_text(machines.table(fleet)), *machines.sentences(fleet, given.workers)):
        _log.info(part)
    return fleet


def _with_workers(given: DoctorConfig) -> DoctorConfig:
    return replace(given, workers=given.workers or cluster_placement.usual_workers())


@dataclass(frozen=True)
class Report:
    """Result of `examine`.

    Args:
        versions: versions of Python and packages, and the hash of raysl's code.
        resources: totals of the cluster.
        placement: CPUs and GPUs of the workers and their data tasks.
        costs: cost of each stage.
        prediction: predicted speed.
    """

    versions: Mapping[str, Any]
    resources: Mapping[str, float]
    placement: Placement
    costs: Costs
    prediction: Prediction


Diagnosis = Report | Fleet | Certificate


def examine(given: DoctorConfig) -> Report:
    """Measure the stages of a run and show what limits its speed. Takes about half a minute.

    Raises:
        UserError: the run cannot be started, or the trainers did not get resources for three minutes.
    """
    ray_cluster.start()
    import ray

    given = _with_workers(given)
    resources: dict[str, float] = ray.cluster_resources()
    found = versions()
    dataset = resolve(given.data)
    config = _pretraining(given, dataset)
    placement = cluster_placement.place(given.workers)
    if placement.gpus_per_worker:
        gpus.check(placement.gpus_per_worker, config.precision)
    stream = Model.of(config, dataset).stream(dataset, placement.share, world=given.workers)
    _log.info(_text(_machine(found, resources, placement)))
    with tempfile.TemporaryDirectory() as folder:
        job = Job(config.to_json(), Run(Folder(folder)), dataset, placement)
        costs = Costs(**measure_data(stream), **measure_training(job, given.workers))
    prediction = predict(costs, placement, given.workers, given.batch_size, resources.get("CPU", 1.0))
    _log.info(_text(_stages(costs, given)))
    _log.info(_sentence(prediction))
    return Report(found, resources, placement, costs, prediction)


def _pretraining(given: DoctorConfig, dataset: DataSet) -> Pretraining:
    """Return the configuration of the run, with fewer negatives if the data set is small."""
    method = methods.parse(given.method)
    config_type, _ = methods.load_objective(method.objective)
    wanted = getattr(config_type(), "num_negatives", 0)
    part = {"num_negatives": max(1, dataset.num_images // 2)} if wanted >= dataset.num_images else {}
    return Pretraining(
        data=given.data,
        run="-",
        method=given.method,
        epochs=1,
        batch_size=given.batch_size,
        workers=given.workers,
        view=given.view,
        backbone=given.backbone,
        parts={method.objective: part},
    )


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
    share = placement.share
    table.add_row(
        "each trainer",
        f"{placement.cpus_per_worker:g} CPUs, {placement.gpus_per_worker:g} GPUs, "
        f"{placement.threads_per_worker} threads",
    )
    table.add_row("its data tasks", f"{share.cpus:g} CPUs, {share.cpus_per_task:g} each")
    return table


def _stages(costs: Costs, given: DoctorConfig) -> Table:
    local = given.batch_size // given.workers
    table = Table(
        title=escape(
            f"{given.method}, {given.view.image_size} pixels, {given.workers} workers x {local} images"
        )
    )
    for column in ("stage", "us / image", "ms / step of one worker"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    values = {f.name.rpartition("_")[0]: getattr(costs, f.name) for f in dataclasses.fields(costs)}
    for name, value in values.items():
        us = value * 1e6 / local if name in ("step", "all_reduce") else value
        table.add_row(name.replace("_", "-"), f"{us:,.0f}", f"{us * local / 1000:,.1f}")
    return table


def _sentence(prediction: Prediction) -> str:
    together = "" if prediction.together == float("inf") else f", {prediction.together:,.0f} on shared cores"
    return (
        f"Data tasks can make {prediction.data:,.0f} images/s and trainers take {prediction.training:,.0f}{together}: "
        f"expect about {prediction.images_per_s:,.0f} images/s. {prediction.advice}"
    )


def _text(table: Table) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text

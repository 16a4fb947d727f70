"""Where time goes: versions, resources, what each stage costs for an image, and what limits the speed. For a cluster:
what it has, and what a run would wait for and cost there."""

from __future__ import annotations

import dataclasses
import io
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from raysl import methods, ray_cluster
from raysl.backbone.network import BackboneConfig
from raysl.config import Pretraining, ViewConfig
from raysl.dataset import DataSet
from raysl.diagnostics import machines
from raysl.diagnostics.measurement import measure_data, measure_training
from raysl.diagnostics.prediction import Costs, Prediction, predict
from raysl.errors import UserError
from raysl.ingestion import resolve
from raysl.model import Model
from raysl.ray_cluster import placement as cluster_placement
from raysl.ray_cluster.placement import Placement
from raysl.ray_cluster.versions import versions
from raysl.run import Run
from raysl.storage import Folder
from raysl.training.worker import Job

__all__ = ["Costs", "DoctorConfig", "Prediction", "Report", "examine", "look", "predict"]


@dataclass(frozen=True)
class DoctorConfig:
    """What a run would be, as far as its speed goes.

    Args:
        data: a data set made by `raysl ingest`, or any source that it takes.
        method: an objective and a pretext transform, such as pirl-jigsaw.
        image_size: side of an ordinary view in pixels.
        backbone: name of the network, such as small or resnet50.
        batch_size: images in the global batch.
        workers: Ray Train workers; 0 for two, or for one where there is one GPU.
        cluster: look at the cluster instead: what it has and could have, what the run would take, wait for and cost,
            and whether all machines run the same code and packages. Measures nothing.
        prices: US dollars an hour by type of machine, such as gpu_spot=0.49, where cluster.yaml does not say or says
            otherwise. Machines that no autoscaler started are of the type "machine".
    """

    data: str = "shapes:2000"
    method: str = "pirl-jigsaw"
    image_size: int = 32
    backbone: str = "small"
    batch_size: int = 64
    workers: int = 0
    cluster: bool = False
    prices: tuple[str, ...] = ()

    def price_list(self) -> dict[str, float]:
        """`prices` by type. Raises UserError when one is not written so."""
        found = {}
        for entry in self.prices:
            name, _, usd = entry.partition("=")
            try:
                found[name] = float(usd)
            except ValueError as error:
                raise UserError(
                    f"{entry!r} is no price. Write the type of a machine and US dollars an hour, such as gpu_spot=0.49."
                ) from error
        return found


def look(given: DoctorConfig, say: Callable[[str], None] = print) -> machines.Fleet:
    """Says what the cluster has, what a run would take of it, and which machines run something else.

    Args:
        given: the run in question; only its workers matter.
        say: takes tables and sentences, as text.

    Raises:
        UserError: there is no cluster, or a price is not written as one.
    """
    prices = given.price_list()
    ray_cluster.start(compare=False)
    given = _with_workers(given)
    fleet = machines.survey(given.workers, prices)
    say(_text(machines.table(fleet)))
    for sentence in machines.sentences(fleet, given.workers):
        say(sentence)
    return fleet


def _with_workers(given: DoctorConfig) -> DoctorConfig:
    return replace(given, workers=given.workers or cluster_placement.usual_workers())


@dataclass(frozen=True)
class Report:
    """What `examine` found.

    Args:
        versions: of Python, of packages, and the hash of raysl's code.
        resources: totals of the cluster.
        placement: who would get what.
        costs: of each stage.
        prediction: of the speed.
    """

    versions: Mapping[str, Any]
    resources: Mapping[str, float]
    placement: Placement
    costs: Costs
    prediction: Prediction


def examine(given: DoctorConfig, say: Callable[[str], None] = print) -> Report:
    """Measures what a run would cost, and says what would limit it. Takes about half a minute.

    Args:
        given: the run in question.
        say: takes tables and sentences, as text.

    Raises:
        UserError: the run could not be started as it is, or the trainers found no free place for three minutes.
    """
    ray_cluster.start()
    import ray

    given = _with_workers(given)
    resources: dict[str, float] = ray.cluster_resources()
    found = versions()
    dataset = resolve(given.data)
    config = _pretraining(given, dataset)
    placement = cluster_placement.place(given.workers)
    stream = Model.of(config, dataset).stream(dataset, placement.share, world=given.workers)
    say(_text(_machine(found, resources, placement)))
    with tempfile.TemporaryDirectory() as folder:
        job = Job(config.to_json(), Run(Folder(folder)), dataset, placement)
        costs = Costs(**measure_data(stream), **measure_training(job, given.workers))
    prediction = predict(costs, placement, given.workers, given.batch_size, resources.get("CPU", 1.0))
    say(_text(_stages(costs, given)))
    say(_sentence(prediction))
    return Report(found, resources, placement, costs, prediction)


def _pretraining(given: DoctorConfig, dataset: DataSet) -> Pretraining:
    """The run in question; a small data set gets fewer negatives, as it cannot have more than images."""
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
        view=ViewConfig(image_size=given.image_size),
        backbone=BackboneConfig(name=given.backbone),
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
        title=escape(f"{given.method}, {given.image_size} pixels, {given.workers} workers x {local} images")
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

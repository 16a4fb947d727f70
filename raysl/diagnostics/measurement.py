"""Measure the stages of a run where they would run: data in a data task, steps in all trainers at once.

Trainers are measured together because they share cores and caches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from raysl import ray_cluster
from raysl.communication import collective
from raysl.errors import UserError, explained
from raysl.rng import ImageRng
from raysl.stream.decode import DecodeError, cut, decode
from raysl.stream.reader import Batch, Stream, load
from raysl.training import rendezvous
from raysl.training.worker import Job, Worker

_STAGE_S = 0.5  # repetitions of one stage
_START_TIMEOUT_S = 180


def measure_data(stream: Stream) -> dict[str, float]:
    """Return the costs of the data in microseconds per image, measured in one data task.

    Raises UserError if a shard is damaged, or the cluster is busy.
    """
    task = ray.remote(num_cpus=stream.share.cpus_per_task, scheduling_strategy="DEFAULT")(_data_costs)
    return _answers([task.remote(stream)])[0]


def measure_training(job: Job, workers: int, distributed: bool = False) -> dict[str, float]:
    """Return the seconds of a step and of its exchange of gradients in the slowest of all workers.

    If `distributed`, gradients are exchanged in the step too, as in training. Raises UserError if the cluster is busy.
    """
    host = ray.util.get_node_ip_address()
    store = rendezvous.listen(host)
    held = {"num_cpus": job.placement.cpus_per_worker, "num_gpus": job.placement.gpus_per_worker}
    task = ray.remote(scheduling_strategy="DEFAULT", **held)(_training_costs)
    asked = [task.remote(job, rank, workers, host, store.port, distributed) for rank in range(workers)]
    found = _answers(asked)
    return {name: max(one[name] for one in found) for name in found[0]}


def _answers(tasks: Sequence[Any]) -> list[dict[str, float]]:
    try:
        found: list[dict[str, float]] = ray.get(list(tasks), timeout=_START_TIMEOUT_S)
        return found
    except ray.exceptions.GetTimeoutError as error:
        for task in tasks:
            ray.cancel(task, force=True)
        raise UserError(
            f"The measurement did not finish within {_START_TIMEOUT_S} s: other work holds the cluster's CPUs or GPUs. "
            "Wait for it to end, or use fewer --workers."
        ) from error
    except ray.exceptions.RayTaskError as error:
        raise ray_cluster.user_error(error) or error from error


def _seconds(stage: Callable[[], object]) -> float:
    """Return the median seconds of a warm stage, over half a second."""
    stage()
    taken: list[float] = []
    while sum(taken) < _STAGE_S and len(taken) < 100:
        started = time.perf_counter()
        stage()
        taken.append(time.perf_counter() - started)
    return float(np.median(taken))


def _data_costs(stream: Stream) -> dict[str, float]:
    plan = stream.plan
    rows = plan.rows(0, 0, stream.world)
    steps = range(min(plan.steps_per_block, plan.num_steps))
    piece = np.concatenate([plan.rows(step, 0, stream.world).indices_b for step in steps])
    images = stream.dataset.read(rows.indices_b, ["image"]).column("image").to_pylist()
    sources = {name: view.source for name, view in stream.views_of(0).items()}
    image_rng = ImageRng(plan.seed, rows.epochs_b, rows.indices_b)
    what = f"An image of the data set at {str(stream.dataset.folder)!r} cannot be decoded"
    with explained(what, "A shard is damaged; ingest the source again.", DecodeError):
        crops = cut(images, sources, image_rng)

    def views() -> dict[str, torch.Tensor]:
        return stream.finish(Batch(0, rows, None, {}, {}), crops).views

    columns = {name: view.numpy() for name, view in views().items()}
    image_us = 1e6 / len(rows)
    decode_us = image_us * _seconds(lambda: [decode(image) for image in images])
    return {
        "read_us": 1e6 / len(piece) * _seconds(lambda: stream.dataset.read(piece)),
        "decode_us": decode_us,
        "crop_us": max(0.0, image_us * _seconds(lambda: cut(images, sources, image_rng)) - decode_us),
        "augment_us": image_us * _seconds(views),
        "transfer_us": image_us * _seconds(lambda: [v.copy() for v in ray.get(ray.put(columns)).values()]),
    }


def _training_costs(
    job: Job, rank: int, world: int, host: str, port: int, distributed: bool
) -> dict[str, float]:
    device = torch.device("cuda" if job.placement.gpus_per_worker else "cpu")
    torch.set_num_threads(job.placement.threads_per_worker)
    store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=_START_TIMEOUT_S))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    try:
        worker = Worker(job, device)
        batch = first_batch(worker)
        model = worker.wrapped_model() if distributed else worker.model
        step_s = _together_s(lambda: worker.update(model, batch, lr=1e-3), device)
        gradients = torch.zeros(sum(p.numel() for p in worker.model.parameters()), device=device)
        all_reduce_s = _together_s(lambda: dist.all_reduce(gradients), device) if world > 1 else 0.0
        return {"step_s": step_s, "all_reduce_s": all_reduce_s}
    finally:
        dist.destroy_process_group()


def first_batch(worker: Worker) -> Batch:
    """Make the first batch of this worker without data tasks."""
    stream = worker._stream()
    return stream.batch(0, next(load(stream, [range(1)])))


def _together_s(stage: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a stage that all workers run equally often: a warm-up, a trial, then repetitions."""

    def run(times: int) -> float:
        started = time.perf_counter()
        for _ in range(times):
            stage()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / times

    run(1)
    once_s = float(collective.mean(torch.tensor([run(1)], device=device)).item())
    return run(max(2, min(50, int(2 * _STAGE_S / max(once_s, 1e-4)))))

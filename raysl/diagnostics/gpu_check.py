"""Check and measure the GPUs of this machine: `raysl doctor --gpu`. The result is a certificate in JSON.

Every check also runs without a GPU, at a small size on the CPU, so that the program is known to work before it is taken
to a machine with a GPU. What needs one, or several, is named as not done.
"""

from __future__ import annotations

import collections
import functools
import json
import logging
import os
import platform
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
import torch
import torch.nn.functional as F
from torch import nn

from raysl.backbone.network import build as build_backbone
from raysl.checkpoint import SaveConfig
from raysl.clustering.kmeans_worker import FaissSearch
from raysl.contrastive.bank import BankConfig
from raysl.dataset import DataSet
from raysl.diagnostics.bench import Bench, Numbers
from raysl.diagnostics.decoding import decoding
from raysl.diagnostics.measurement import first_batch, measure_training
from raysl.ray_cluster import gpus
from raysl.ray_cluster import placement as cluster_placement
from raysl.ray_cluster.versions import versions
from raysl.run import Run
from raysl.storage import Folder
from raysl.stream.reader import Batch, DataShare, StreamConfig
from raysl.training.worker import Job

_log = logging.getLogger("raysl.diagnostics")
# Compiling takes minutes at the start of a run, and smaller differences are within the noise of a measurement.
_LEAST_GAIN = 1.02


@dataclass(frozen=True)
class Certificate:
    """The measurements of a machine with GPUs, or with CPUs only."""

    # Names of the processor and the GPU, memory, and versions of drivers and packages.
    machine: Mapping[str, Any]
    checks: Mapping[str, Numbers] = field(default_factory=dict)  # the numbers of each check by its name
    # Why a check was not done, or how it failed, by its name.
    not_done: Mapping[str, str] = field(default_factory=dict)


def step_speed(bench: Bench) -> Numbers:
    """Measure a PIRL step in each precision, against a plain loop."""
    found: Numbers = {}
    images = bench.config.batch_size
    for name in ("fp32", "bf16"):
        worker = bench.worker(precision=name)
        model, batch = worker.wrapped_model(), first_batch(worker)
        step_s = bench.seconds(functools.partial(worker.update, model, batch, 1e-3))
        found[f"{name}_ms"] = 1e3 * step_s
        found[f"{name}_images_per_s"] = images / step_s
        found |= _peak(bench, name)
    plain_s = bench.seconds(_plain_step(bench, first_batch(bench.worker())))
    found["plain_images_per_s"] = images / plain_s
    found["step_over_plain"] = float(found["bf16_ms"]) / (1e3 * plain_s)
    return found


def _peak(bench: Bench, name: str) -> Numbers:
    """Return the most GPU memory that was taken since the last call; nothing on the CPU."""
    if bench.device.type != "cuda":
        return {}
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return {f"{name}_peak_gib": peak}


def compiled_step(bench: Bench) -> Numbers:
    """Measure a PIRL step with and without torch.compile. On the CPU nothing is compiled."""
    on_gpu = bench.device.type == "cuda"
    found: Numbers = {}
    with torch.compiler.set_stance("default" if on_gpu else "force_eager"):
        for name in ("eager", "compiled"):
            worker = bench.worker(compile=name == "compiled")
            model, batch = worker.wrapped_model(), first_batch(worker)
            started = time.perf_counter()
            worker.update(model, batch, 1e-3)
            bench.finish()
            found[f"{name}_first_step_s"] = time.perf_counter() - started
            found[f"{name}_ms"] = 1e3 * bench.seconds(functools.partial(worker.update, model, batch, 1e-3))
            found |= _peak(bench, name)
    faster = float(found["eager_ms"]) > _LEAST_GAIN * float(found["compiled_ms"])
    return {
        **found,
        "faster": "compiled" if faster else "eager",
        "flag": "--compile" if faster else "--no-compile",
    }


def _plain_step(bench: Bench, batch: Batch) -> Callable[[], object]:
    """Return a step as one would write it by hand: backbone, linear heads, one product with negatives, SGD."""
    backbone = build_backbone(bench.config.backbone).to(bench.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    patches, dim = batch.views["transformed"].shape[1], 128
    head = nn.Linear(backbone.width, dim).to(bench.device)
    patch_head = nn.Linear(backbone.width * patches, dim).to(bench.device)
    bank_nd = F.normalize(torch.randn(bench.dataset.num_images, dim, device=bench.device), dim=1)
    parameters = [p for module in (backbone, head, patch_head) for p in module.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=1e-4)
    target_b = torch.zeros(len(batch.rows), dtype=torch.long, device=bench.device)

    def encode(crops_bpchw: torch.Tensor) -> torch.Tensor:
        crops = crops_bpchw.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return backbone(crops).view(len(batch.rows), -1)  # type: ignore[no-any-return]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(bench.device.type, torch.bfloat16):
            embeddings = patch_head(encode(batch.views["transformed"])), head(encode(batch.views["image"]))
        loss = torch.zeros((), device=bench.device)
        for embedding_bd in embeddings:
            query_bd = F.normalize(embedding_bd.float(), dim=1)
            positive_b1 = (query_bd * bank_nd[batch.indices_b]).sum(1, keepdim=True)
            negatives_bk = query_bd @ bank_nd[: bench.config.parts["pirl"].num_negatives].T
            loss = loss + F.cross_entropy(torch.cat([positive_b1, negatives_bk], 1) / 0.07, target_b)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def profile(bench: Bench) -> Numbers:
    """Profile three steps: the share of the time in which the device works, and the slowest operations."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    worker = bench.worker()
    model, batch = worker.wrapped_model(), first_batch(worker)
    worker.update(model, batch, 1e-3)
    bench.finish()
    on_gpu = bench.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    started = time.perf_counter()
    with profiler(activities=activities) as recorded:
        for _ in range(3):
            worker.update(model, batch, 1e-3)
        bench.finish()
    wall_s = time.perf_counter() - started
    times = [
        (e.key, e.self_device_time_total if on_gpu else e.self_cpu_time_total)
        for e in recorded.key_averages()
    ]
    times.sort(key=lambda pair: -pair[1])
    found: Numbers = {"busy_share": sum(us for _, us in times) / 1e6 / wall_s}
    found.update({f"ms: {name[:60]}": us / 3000 for name, us in times[:8]})
    return found


def stream_speed(bench: Bench) -> Numbers:
    """Measure the stream through Ray Data, in images per second and per CPU of its tasks."""
    cpus = max(1.0, ray.cluster_resources().get("CPU", 1.0) - 1)
    stream = replace(bench.worker()._stream(), share=DataShare(1.0, cpus))
    # With an end: what goes on beside the next checks would slow them.
    steps = 10 * bench.steps
    arrivals = stream.batches(end_step=steps + 1)
    next(arrivals)
    started = time.perf_counter()
    collections.deque(arrivals, maxlen=0)
    rate = steps * bench.config.batch_size / (time.perf_counter() - started)
    return {"images_per_s": rate, "cpus": cpus, "images_per_s_and_cpu": rate / cpus}


def training(bench: Bench) -> Numbers:
    """Train through Ray Data, and measure which shares of the time the trainer waits for images and copies."""
    worker = bench.worker()
    cpus = max(1.0, ray.cluster_resources().get("CPU", 1.0) - 1)
    stream = replace(worker._stream(), share=DataShare(1.0, cpus))
    model, waited_s, steps = worker.wrapped_model(), 0.0, 5 * bench.steps
    arrivals = stream.batches(end_step=steps + 1)
    worker.update(model, next(arrivals), 1e-3)
    bench.finish()
    started = time.perf_counter()
    for batch in arrivals:
        worker.update(model, batch, 1e-3)
        waited_s += batch.wait_s
    bench.finish()
    wall_s = time.perf_counter() - started
    columns = next(stream.columns(0, 1))
    copy_s = bench.seconds(lambda: stream.batch(0, columns))
    return {
        "images_per_s": steps * bench.config.batch_size / wall_s,
        "waiting_share": waited_s / wall_s,
        "copies_share": copy_s * steps / wall_s,
    }


def several_workers(bench: Bench) -> Numbers:
    """Measure the step of a worker on each GPU, or of two on the CPU, that exchange gradients and rows of the bank."""
    count = max(2, torch.cuda.device_count())
    placement, images = cluster_placement.make_placement(count), bench.config.batch_size
    found: Numbers = {"workers": count}
    kinds: tuple[Literal["replicated", "sharded"], ...] = ("replicated", "sharded")
    for bank in kinds:
        batch_size = min(images * count, bench.dataset.num_images // count * count)
        config = replace(bench.config, workers=count, batch_size=batch_size, bank=BankConfig(placement=bank))
        job = Job(config.to_json(), Run(Folder("-")), bench.dataset, placement)
        costs = measure_training(job, count, distributed=True)
        found[f"{bank}_ms"] = 1e3 * costs["step_s"]
        found[f"{bank}_images_per_s"] = batch_size / costs["step_s"]
        found["all_reduce_ms"] = 1e3 * costs["all_reduce_s"]
    return found


def views_on_device(bench: Bench) -> Numbers:
    """Compare the losses of views made in data tasks and on the device, and measure making views on the device."""
    losses = {}
    for place in ("data", "trainer"):
        worker = bench.worker(stream=StreamConfig(place=place), deterministic=True)
        losses[place] = worker.update(worker.model, first_batch(worker), 1e-3).loss.item()
    torch.use_deterministic_algorithms(False)
    made_s = bench.seconds(lambda: first_batch(worker), times=3)
    return {"loss_equal": losses["data"] == losses["trainer"], "read_decode_and_views_ms": 1e3 * made_s}


def repeats(bench: Bench) -> Numbers:
    """Take five deterministic steps twice, and compare the losses bit for bit."""
    runs = []
    for _ in range(2):
        worker = bench.worker(deterministic=True)
        batch = first_batch(worker)
        runs.append([worker.update(worker.model, batch, 1e-3).loss.item() for _ in range(5)])
    return {"losses_equal": runs[0] == runs[1], "last_loss": runs[0][-1]}


def checkpoints(bench: Bench) -> Numbers:
    """Measure for how long a checkpoint stops training, and how long it takes to be written."""
    worker = bench.worker()
    with tempfile.TemporaryDirectory() as folder:
        worker.saver = type(worker.saver)(Folder(folder), SaveConfig(), 0, 1)
        started = time.perf_counter()
        worker.save()
        stall_s = time.perf_counter() - started
        worker.saver.wait()
        return {"stall_ms": 1e3 * stall_s, "written_ms": 1e3 * (time.perf_counter() - started)}


def features(bench: Bench) -> Numbers:
    """Measure the forward pass of the backbone in evaluation mode."""
    from raysl.extraction.layers import frozen

    backbone = build_backbone(bench.config.backbone)
    encode = frozen(backbone, bench.device, ["pooled"], by_batch=False)
    size, count = bench.config.view.image_size, bench.config.batch_size
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, device=bench.device)
    return {"images_per_s": count / bench.seconds(lambda: encode(images))}


def kmeans(bench: Bench) -> Numbers:
    """Measure the search for the nearest of 1,000 centroids by FAISS on the CPU, and on the GPU if it can."""
    rows, dim, k = (1_000_000, 128, 1000) if bench.device.type == "cuda" else (10_000, 32, 100)
    rows_nd = np.random.default_rng(0).random((rows, dim), np.float32)
    found: Numbers = {}
    for name, on_gpu in {"cpu": False, "gpu": True}.items():
        search = FaissSearch(rows_nd[:k], os.cpu_count() or 1, on_gpu)
        if search.on_gpu == on_gpu:
            found[f"{name}_rows_per_s"] = rows / bench.seconds(functools.partial(search, rows_nd, 1), times=2)
    return found


CHECKS: dict[str, Callable[[Bench], Numbers]] = {
    "step": step_speed,
    "compile": compiled_step,
    "profile": profile,
    "decode": decoding,
    "stream": stream_speed,
    "training": training,
    "several workers": several_workers,
    "views": views_on_device,
    "exactness": repeats,
    "checkpoint": checkpoints,
    "features": features,
    "k-means": kmeans,
}


def check(dataset: DataSet, out: str = "") -> Certificate:
    """Run all checks, print their numbers, and write the certificate to the JSON file `out`; "" for none."""
    on_gpu = torch.cuda.is_available()
    bench = Bench(dataset, on_gpu)
    checks: dict[str, Numbers] = {}
    not_done: dict[str, str] = {}
    if not on_gpu:
        not_done["GPU"] = (
            f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU here (NVIDIA driver: "
            f"{gpus.driver()}); the checks run at a small size on the CPU, and their speeds say nothing"
        )
        _log.info("No GPU: %s.", not_done["GPU"])
    if torch.cuda.device_count() < 2:
        count = torch.cuda.device_count() or "none"
        not_done["several GPUs"] = f"gradients and a sharded bank over NCCL need two GPUs; here are {count}"
    for name, measure in CHECKS.items():
        if name == "several workers" and torch.cuda.device_count() == 1:
            continue
        _log.info("Checking %s ...", name)
        try:
            checks[name] = measure(bench)
        except Exception as error:
            # One failed check must not hide the others; the certificate keeps what happened.
            not_done[name] = f"failed: {error}"
            _log.info("%s", traceback.format_exc())
        finally:
            torch.use_deterministic_algorithms(False)
        for label, value in checks.get(name, {}).items():
            _log.info("  %s: %s", label, _shown(value))
    made = Certificate(_machine(), checks, not_done)
    for name, why in not_done.items():
        _log.info("not done: %s (%s)", name, why)
    if on_gpu and (said := advice(checks, bench.config.precision)):
        _log.info("%s", said)
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(asdict(made), indent=1, sort_keys=True) + "\n")
        Path(out).with_suffix(".md").write_text(_page(made))
        _log.info("The certificate is in %s, and beside it as a page (.md).", out)
    return made


def advice(checks: Mapping[str, Mapping[str, Any]], precision: str) -> str:
    """Return which of the two to use on this machine, as a sentence; "" if it was not measured."""
    if not (found := checks.get("compile")):
        return ""
    return (
        f"Use {found['flag']}: a step takes {found['compiled_ms']:.4g} ms compiled and {found['eager_ms']:.4g} ms "
        f"eager ({precision}), and the first compiled step {found['compiled_first_step_s']:.4g} s."
    )


def _page(made: Certificate) -> str:
    gpu = made.machine.get("gpu")
    lines = [
        f"# {gpu['count']} x {gpu['name']}" if gpu else "# A machine without a GPU: speeds say nothing",
        "",
    ]
    if gpu and (said := advice(made.checks, "bf16")):
        lines += [said, ""]
    lines += ["| check | | |", "|---|---|---|"]
    for name, numbers in made.checks.items():
        lines += [f"| {name} | {label} | {_shown(value)} |" for label, value in numbers.items()]
    lines += ["", "Not done:", "", *(f"- {name}: {why}" for name, why in made.not_done.items())]
    return "\n".join([*lines, "", "```json", json.dumps(made.machine, indent=1, sort_keys=True), "```", ""])


def _shown(value: float | int | str | bool) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _machine() -> dict[str, Any]:
    found: dict[str, Any] = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": versions(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        if torch.cuda.is_available()
        else None,
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": gpu.name,
            "memory_gib": gpu.total_memory / 2**30,
            "count": torch.cuda.device_count(),
        }
        found["driver"] = gpus.driver()
    return found

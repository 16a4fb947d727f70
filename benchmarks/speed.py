"""Measure raysl beside other programs: the way to the first step, the stream of images, and k-means.

    make bench        # python benchmarks/speed.py --out results/bench

Every arm runs in a process of its own, and the arms of a part take turns, round after round. CPU seconds are those of
the whole process tree, so other work on the machine disturbs them less than wall time. Ratios compare arms of the same
round. The rows and a page of medians with their ranges are written to --out, where a change shows as a diff. Peers that
are not installed are left out.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import simplejpeg
import tyro

Row = dict[str, Any]

# Each script prints "first step done" when it is.
_PLAIN_TORCH = """
import sys
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18
images = torch.randint(0, 256, (4096, 3, 32, 32), dtype=torch.uint8)
loader = DataLoader(TensorDataset(images), batch_size=128, num_workers=1)
network = resnet18(num_classes=128)
optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
for (batch,) in loader:
    network(batch / 255).square().mean().backward()
    optimizer.step()
    print("first step done", flush=True)
"""
_RAY_ALONE = """
import ray, time
ray.init(log_to_driver=False)
print("first step done", flush=True)
time.sleep(60)
"""
_EMPTY_TRAINER = """
import time
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
def loop():
    print("first step done", flush=True)
    time.sleep(60)
TorchTrainer(loop, scaling_config=ScalingConfig(num_workers=1)).fit()
"""
# The second of two trainers in a process, which is what Ray Train itself takes to start again.
_EMPTY_AGAIN = (
    """
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
def nothing(): pass
TorchTrainer(nothing, scaling_config=ScalingConfig(num_workers=1)).fit()
print("now", flush=True)
"""
    + _EMPTY_TRAINER
)
# Two processes with a loader each; the first that is done says so.
_TORCHRUN = """
import torch.distributed
torch.distributed.init_process_group("gloo")
""" + _PLAIN_TORCH.replace(
    "optimizer =", "network = torch.nn.parallel.DistributedDataParallel(network)\noptimizer ="
)
# Work that ends is measured whole: the run that it reads was made before.
_FEATURES = """
import sys
import raysl
raysl.features(sys.argv[1], sys.argv[2], sys.argv[3])
print("first step done", flush=True)
"""
_PROBE = """
import sys
import raysl
raysl.probe(sys.argv[1], sys.argv[2], sys.argv[2], probes=("knn",), out=sys.argv[3])
print("first step done", flush=True)
"""
# A run says so at once, where it would show its progress every five seconds.
_RUNS = """
import importlib, os, sys
import raysl
importlib.import_module("raysl.training.launch").SHOW_EVERY_S = 0.25
data, folder, workers, local, runs = sys.argv[1:]
if local == "ray":
    os.environ["RAY_ADDRESS"] = "local"  # On a small machine, one worker would do without.
class Steps(raysl.Callback):
    def __init__(self, says): self.says = says
    def on_log(self, row): print(self.says, flush=True)
def run(name, says, epochs):
    raysl.pretrain(data, f"{folder}/{name}", epochs=epochs, log_every=1, batch_size=128, workers=int(workers),
                   local=local == "local", method="pirl-jigsaw", backbone={"name": "resnet18"},
                   callbacks=[Steps(says)])
if runs == "2":
    run("first", "before", 0.05)
    print("now", flush=True)
run("last", "first step done", 50)
"""
_STREAM_ARMS = {
    "ray": "raysl on Ray Data",
    "local": "raysl --local",
    "torch": "torch DataLoader with raysl's kernels",
    "datasets": "Hugging Face datasets, DataLoader, raysl's kernels",
    "webdataset": "WebDataset, DataLoader, raysl's kernels",
    "litdata": "LitData, its loader, raysl's kernels",
    "streaming": "MosaicML Streaming, DataLoader, raysl's kernels",
    "grain": "Grain, its loader, raysl's kernels",
    "dali": "DALI on the CPU, its own kernels",
    "limit": "raysl's kernels alone, files in memory",
}
# Packages that arms need, and that may be missing.
_OTHER_PROGRAMS = {arm: arm for arm in ("datasets", "webdataset", "litdata", "streaming", "grain")}
_OTHER_PROGRAMS["dali"] = "nvidia.dali"


@dataclass(frozen=True)
class Flags:
    """Measure raysl beside other programs.

    Args:
        out: folder of the rows and the page.
        rounds: number of rounds of every arm.
        parts: parts to measure: "start", "stream", "kmeans".
        sides: image sizes of the stream, in pixels.
        images: images of one measurement of the stream at 32 pixels; larger images are fewer.
        loaders: loaders of the stream to measure, such as "torch" and "grain"; empty for all.
        starts: starts to measure whose names hold one of these words; empty for all.
    """

    out: Path = Path("results/bench")
    rounds: int = 3
    parts: tuple[str, ...] = ("start", "stream", "kmeans")
    sides: tuple[int, ...] = (32, 64, 224)
    images: int = 12_000
    loaders: tuple[str, ...] = ()
    starts: tuple[str, ...] = ()


def main(flags: Flags) -> None:
    """Measure all parts, write after each round."""
    known = {"start": _start, "stream": _stream, "kmeans": _kmeans}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="raysl-bench-") as scratch:
        data = {side: _photos(Path(scratch), side) for side in flags.sides}
        for number in range(flags.rounds):
            for part in flags.parts:
                for row in known[part](flags, data, Path(scratch)):
                    rows.append({"part": part, "round": number, **row, "load": os.getloadavg()[0]})
                    print(json.dumps(rows[-1]), flush=True)
                flags.out.mkdir(parents=True, exist_ok=True)
                (flags.out / "speed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
                (flags.out / "README.md").write_text(page(rows))


def _photos(scratch: Path, side: int) -> Path:
    """Ingest images with the spectrum of photographs, a half larger than the views that are cut out of them."""
    from raysl import ingest

    generator = np.random.default_rng(side)
    count = 4096 if side < 200 else 512
    for label in ("even", "odd"):
        (scratch / f"photos-{side}" / label).mkdir(parents=True)
    larger = side if side <= 32 else side * 3 // 2
    height, width = larger, larger if side <= 32 else larger * 4 // 3
    falloff = 1 / np.maximum(
        np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]), 1 / max(height, width)
    )
    for number in range(count):
        noise = generator.standard_normal((3, height, width))
        channels = np.fft.irfft2(np.fft.rfft2(noise) * falloff, (height, width))
        scaled = 128 + 50 * channels / channels.std()
        pixels_hwc = np.ascontiguousarray(scaled.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
        label = "odd" if number % 2 else "even"
        (scratch / f"photos-{side}" / label / f"{number:05d}.jpg").write_bytes(
            simplejpeg.encode_jpeg(pixels_hwc, quality=90)
        )
    ingest(str(scratch / f"photos-{side}"), str(scratch / f"data-{side}"))
    return scratch / f"data-{side}"


def _start(flags: Flags, data: Mapping[int, Path], scratch: Path) -> Iterator[Row]:
    """Yield CPU and wall seconds, processes and memory from a command to the end of its first step."""
    place = Path(tempfile.mkdtemp(dir=scratch))
    smallest = str(data[min(data)])
    runs = [sys.executable, "-c", _RUNS, smallest]
    trained = _trained(smallest, scratch)
    features, probe = str(place / "features"), str(place / "probe")
    torchrun = place / "torchrun.py"
    torchrun.write_text(_TORCHRUN)
    arms: dict[str, list[str]] = {
        "raysl --local": [*runs, str(place / "local"), "1", "local", "1"],
        "raysl, 1 worker": [*runs, str(place / "one"), "1", "ray", "1"],
        "raysl, 2 workers": [*runs, str(place / "two"), "2", "ray", "1"],
        "raysl, second run of a process": [*runs, str(place / "again"), "1", "ray", "2"],
        "raysl --local, second run of a process": [*runs, str(place / "local-again"), "1", "local", "2"],
        "plain torch, one loader process": [sys.executable, "-c", _PLAIN_TORCH],
        "raysl features, whole": [sys.executable, "-c", _FEATURES, trained, smallest, features],
        "raysl probe with kNN, whole": [sys.executable, "-c", _PROBE, trained, smallest, probe],
        "torchrun, 2 workers with a loader each": [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            str(torchrun),
        ],
        "ray.init alone": [sys.executable, "-c", _RAY_ALONE],
        "TorchTrainer with an empty loop": [sys.executable, "-c", _EMPTY_TRAINER],
        "TorchTrainer with an empty loop, second of a process": [sys.executable, "-c", _EMPTY_AGAIN],
    }
    for name, command in arms.items():
        if not flags.starts or any(word in name for word in flags.starts):
            yield {"arm": name, **_until_step(command)}


def _trained(data: str, scratch: Path) -> str:
    """Return the folder of a short run with a backbone for 32 pixels, made once."""
    import raysl

    run = str(scratch / "trained")
    raysl.pretrain(data, run, epochs=0.1, batch_size=128, local=True, method="pirl-jigsaw")
    return run


def _until_step(command: Sequence[str]) -> Row:
    """Run a command until its first step is done; measure its tree of processes; kill it."""
    began, spent = time.perf_counter(), 0.0
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    ) as process:
        tree = psutil.Process(process.pid)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("now"):
                    began, spent = time.perf_counter(), _tree(tree)[0]
                # An actor's lines begin with its name in brackets.
                if line.rstrip().endswith("first step done"):
                    break
            else:
                raise SystemExit(f"{' '.join(command[:4])} ended before its first step.")
            wall_s = time.perf_counter() - began
            cpu_s, processes, memory = _tree(tree)
        finally:
            for one in [*tree.children(recursive=True), tree]:
                with suppress(psutil.Error):
                    one.send_signal(signal.SIGKILL)
    # The CPU seconds of a second run are not known: processes of the first one have ended.
    cpu = {} if spent else {"cpu_s": cpu_s}
    return {**cpu, "wall_s": wall_s, "processes": processes, "memory_gb": memory / 1e9}


def _tree(process: psutil.Process) -> tuple[float, int, float]:
    """Return CPU seconds, number and proportional memory in bytes of a process and its descendants.

    The seconds hold those of descendants that have ended and were waited for.
    """
    cpu_s, memory = 0.0, 0.0
    every = [process, *process.children(recursive=True)]
    for one in every:
        with suppress(psutil.Error):
            times = one.cpu_times()
            cpu_s += times.user + times.system + times.children_user + times.children_system
            memory += one.memory_full_info().pss
    return cpu_s, len(every), memory


def _stream(flags: Flags, data: Mapping[int, Path], scratch: Path) -> Iterator[Row]:
    """Yield CPU and wall milliseconds for each image of two views."""
    for side, folder in data.items():
        images = flags.images * 32 // side if side < 200 else flags.images // 20
        for arm, name in _STREAM_ARMS.items():
            if (flags.loaders and arm not in flags.loaders) or not _installed(arm):
                continue
            script = Path(__file__).with_name("loaders.py")
            command = [sys.executable, str(script), arm, str(folder), str(side), str(images)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
            cpu_ms, wall_ms = map(float, done.stdout.split()[-2:])
            yield {"arm": name, "side": side, "cpu_ms": cpu_ms, "wall_ms": wall_ms}


def _installed(arm: str) -> bool:
    """Return whether the package of an arm of the stream is there, without importing it."""
    try:
        return arm not in _OTHER_PROGRAMS or find_spec(_OTHER_PROGRAMS[arm]) is not None
    except ModuleNotFoundError:  # the package that holds it is missing too
        return False


def _kmeans(flags: Flags, data: Mapping[int, Path], scratch: Path) -> Iterator[Row]:
    """Yield ratios of one iteration of k-means to that of other programs."""
    out = Path(tempfile.mkdtemp(dir=scratch)) / "kmeans.jsonl"
    script = Path(__file__).with_name("kmeans.py")
    command = [sys.executable, str(script), "--sizes", "50000x128x1000", "--rounds", "1", "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found = json.loads(out.read_text())
    for name in ("raysl/faiss", "raysl/sklearn", "raysl/fastkmeans", "raysl/matmul", "whole/faiss"):
        if name in found:
            yield {"arm": name, "ratio": found[name]}


_START = """In "second run of a process", the same Python process trains again; its CPU time is not measured. "whole"
measures a command from its start to its end."""
_KMEANS = """raysl, faiss and sklearn compute all distances; matmul is only the matrix product of the distances; whole
is the mean iteration of a complete clustering by raysl, which skips most distances."""


def page(rows: Sequence[Row]) -> str:
    """Return a Markdown page with the medians of all rows."""
    parts = []
    for part, found in _by(rows, "part").items():
        loads = [row["load"] for row in found]
        rounds = 1 + max(row["round"] for row in found)
        parts.append(f"{part}: {rounds} rounds, load average {min(loads):.1f} to {max(loads):.1f}")
    lines = [
        "# Speed compared with other programs\n",
        "    make bench\n",
        f"On {os.cpu_count()} cores ({platform.machine()}, Python {platform.python_version()}).\n",
        *(f"- {part}" for part in parts),
        "\nCells are medians, with the range in brackets. CPU time is that of a program with all its child processes;",
        "ratios are of the same round. Parts that were measured by calls of their own may be from different machines.",
        "`benchmarks/speed.py` has the programs.\n",
    ]
    start = [row for row in rows if row["part"] == "start"]
    if start:
        lines += _head(
            "From the command to the end of the first step",
            "CPU seconds",
            "wall seconds",
            "processes",
            "memory, GB",
            note=_START,
        )
        for name, found in _by(start, "arm").items():
            cells = [_spread(found, key, 1) for key in ("cpu_s", "wall_s", "processes", "memory_gb")]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    for side, of_side in _by([row for row in rows if row["part"] == "stream"], "side").items():
        title = f"Stream: two views of each image, {side} pixels"
        lines += _head(title, "CPU ms per image", "wall ms per image", "CPU, ratio to torch DataLoader")
        loader = {row["round"]: row["cpu_ms"] for row in of_side if row["arm"] == _STREAM_ARMS["torch"]}
        for name, found in _by(of_side, "arm").items():
            ratios = [
                {"ratio": row["cpu_ms"] / loader[row["round"]]} for row in found if row["round"] in loader
            ]
            cells = [_spread(found, "cpu_ms", 3), _spread(found, "wall_ms", 3), _spread(ratios, "ratio", 2)]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    kmeans = [row for row in rows if row["part"] == "kmeans"]
    if kmeans:
        title = "k-means, 50,000 rows of 128 numbers, 1,000 clusters: ratios of the time of an iteration"
        lines += _head(title, "ratio", note=_KMEANS)
        lines += [f"| {name} | {_spread(found, 'ratio', 2)} |" for name, found in _by(kmeans, "arm").items()]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _head(title: str, *columns: str, note: str = "") -> list[str]:
    """Return the title of a part, a note and the head of its table."""
    notes = [f"{note}\n"] if note else []
    return [
        f"## {title}\n",
        *notes,
        f"| program | {' | '.join(columns)} |",
        "|---" * (1 + len(columns)) + "|",
    ]


def _by(rows: Sequence[Row], key: str) -> dict[Any, list[Row]]:
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(row[key], []).append(row)
    return found


def _spread(rows: Sequence[Row], key: str, digits: int) -> str:
    values = [row[key] for row in rows if key in row]
    if not values:
        return ""
    median = f"{statistics.median(values):.{digits}f}"
    return median if len(values) == 1 else f"{median} ({min(values):.{digits}f}-{max(values):.{digits}f})"


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))

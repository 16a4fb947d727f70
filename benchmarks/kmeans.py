"""Time k-means of raysl, FAISS, scikit-learn and fastkmeans, and the matrix-multiply peak, in turns on one machine.

    python benchmarks/kmeans.py --out results/kmeans.jsonl

For each size, each round times one iteration of every arm, one after the other, from the same initial centroids on the
same rows; ratios compare times of the same round. Each arm runs in its own process with as many threads as raysl's
actors have together. An iteration of raysl is the time between two iterations, including reduction and state; one of
FAISS is from its own statistics. The benchmark also measures the share of raysl's time outside of arithmetic, the peak
memory of an actor and the size of its shard, and once the mean iteration of a whole clustering, in which Hamerly bounds
save distances.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from raysl import ray_cluster, rng
from raysl.clustering.lloyd import fit
from raysl.clustering.options import KMeansConfig

SIZES = ("50000x128x1000", "200000x512x1000", "1000000x128x1000")

_FAISS = """
import faiss
faiss.omp_set_num_threads(threads)
km = faiss.Kmeans(d, k, niter=iterations, max_points_per_centroid=n, min_points_per_centroid=1)
km.train(x, init_centroids=start)
ends = [0.0] + [s["time"] for s in km.iteration_stats]
times = [b - a for a, b in zip(ends, ends[1:])]
"""
_SKLEARN = """
from sklearn.cluster import KMeans
def run(iterations):
    began = time.perf_counter()
    KMeans(k, init=start, n_init=1, max_iter=iterations, tol=0, algorithm="lloyd").fit(x)
    return time.perf_counter() - began
# Set-up and the last assignment are in both runs.
times = [(run(1 + iterations) - run(1)) / iterations]
"""
# It chooses its first centroids by itself, and works with torch.
_FASTKMEANS = """
import torch
from fastkmeans import FastKMeans
torch.set_num_threads(threads)
def run(iterations):
    began = time.perf_counter()
    FastKMeans(d, k, niter=iterations, tol=0, gpu=False).train(x)
    return time.perf_counter() - began
run(1)
times = [(run(1 + iterations) - run(1)) / iterations]
"""
_MATMUL = """
def run():
    began = time.perf_counter()
    for i in range(0, n, 4096):
        x[i : i + 4096] @ start.T
    return time.perf_counter() - began
run()
times = [run() for _ in range(iterations)]
"""
_FRAME = """
import json, sys, time
import numpy as np
x, start, (threads, iterations) = np.load({x!r}), np.load({start!r}), {settings}
(n, d), k = x.shape, len(start)
{arm}
print(json.dumps(times))
"""


@dataclass(frozen=True)
class Flags:
    """Settings of the benchmark.

    Args:
        sizes: rows x numbers in a row x clusters.
        actors: number of actors of raysl, and of threads of the other arms.
        iterations: iterations of each arm in each round.
        rounds: number of rounds.
        whole: iterations of the whole clustering.
        out: file of the rows; none by default.
    """

    sizes: tuple[str, ...] = SIZES
    actors: int = 2
    iterations: int = 4
    rounds: int = 3
    whole: int = 30
    out: Path | None = None


def main(flags: Flags) -> None:
    """Print a row for each size, and write them."""
    ray_cluster.start()
    rows = []
    for size in flags.sizes:
        n, d, k = (int(part) for part in size.split("x"))
        with tempfile.TemporaryDirectory(prefix="raysl-kmeans-") as folder:
            rows.append({"size": size, **measure(Path(folder), n, d, k, flags)})
        print(json.dumps(rows[-1], indent=1))
    if flags.out:
        flags.out.parent.mkdir(parents=True, exist_ok=True)
        flags.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


def measure(folder: Path, n: int, d: int, k: int, flags: Flags) -> dict[str, Any]:
    """Return seconds of an iteration by arm, medians over rounds, and medians of the ratios of each round."""
    x_nd = clouds(n, d)
    start_kd = x_nd[rng.generator(0, "kmeans", "rows", 0).choice(n, k, replace=False)]
    np.save(folder / "x.npy", x_nd)
    np.save(folder / "start.npy", start_kd)
    column = pa.FixedSizeListArray.from_arrays(pa.array(x_nd.ravel()), d)
    (folder / "features").mkdir()
    table = pa.table({"index": np.arange(n), "x": column})
    pq.write_table(table, folder / "features" / "0.parquet", row_group_size=65536, compression="none")
    del x_nd, column, table
    seconds: dict[str, list[float]] = {}
    about: dict[str, Any] = {}
    for number in range(flags.rounds):
        curve, about = raysl(folder, k, flags, flags.iterations, number)
        seconds.setdefault("raysl", []).append(statistics.median(row["wall_s"] for row in curve))
        for name, arm in (
            ("faiss", _FAISS),
            ("sklearn", _SKLEARN),
            ("fastkmeans", _FASTKMEANS),
            ("matmul", _MATMUL),
        ):
            other = elsewhere(folder, arm, flags)
            if other is not None:
                seconds.setdefault(name, []).append(other)
    curve, _ = raysl(folder, k, flags, flags.whole, flags.rounds)
    mean_s = statistics.mean(row["wall_s"] for row in curve)
    about |= {
        "whole_mean_s": mean_s,
        "whole/faiss": mean_s / statistics.median(seconds["faiss"]),
        "whole_distances": statistics.mean(row["computed"] for row in curve),
        "whole_last_moved": curve[-1]["moved_share"],
    }
    ratios = {
        f"raysl/{name}": statistics.median(a / b for a, b in zip(seconds["raysl"], values, strict=True))
        for name, values in seconds.items()
        if name != "raysl"
    }
    medians = {f"{name}_s": statistics.median(values) for name, values in seconds.items()}
    peak = 2e-9 * n * d * k / medians["matmul_s"]
    return {**medians, **ratios, "matmul_gflop_per_s": peak, "shard_mb": 4e-6 * n * d / flags.actors, **about}


def clouds(n: int, d: int) -> Any:
    """Return rows of norm 1 around 500 centers, similar to features, float32 (n, d)."""
    generator = np.random.default_rng(0)
    centers = generator.standard_normal((500, d), dtype=np.float32)
    x_nd = generator.standard_normal((n, d), dtype=np.float32)
    x_nd += centers[generator.integers(0, len(centers), n)]
    x_nd /= np.linalg.norm(x_nd, axis=1, keepdims=True)
    return x_nd


def raysl(
    folder: Path, k: int, flags: Flags, iterations: int, number: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the iterations after the first, the share of overhead, and the memory of the largest actor."""
    config = KMeansConfig(k=k, iterations=iterations + 1, tolerance=0, actors=flags.actors, memory_gb=1000)
    peaks = Peaks(logging.INFO)
    logger = logging.getLogger("raysl.clustering")
    logger.setLevel(logging.INFO)
    logger.addHandler(peaks)
    done = fit(str(folder / "features"), config, str(folder / f"out-{number}"))
    logger.removeHandler(peaks)
    curve = done.summary()["curves"][0][1:]
    overhead = statistics.median(1 - row["busy_s"] / row["wall_s"] for row in curve)
    return curve, {"overhead_share": overhead, "actor_mb": peaks.most}


class Peaks(logging.Handler):
    """Samples the memory of the actors at every line of progress."""

    most = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        self.most = max(self.most, peak_mb())


def peak_mb() -> float:
    """Return the largest memory that an actor has had, in megabytes."""
    most = 0.0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"ray::KMeansWorker" in (process / "cmdline").read_bytes():
                lines = (process / "status").read_text().splitlines()
                most = max(
                    most, float(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1e3
                )
        except (OSError, StopIteration):
            continue
    return most


def elsewhere(folder: Path, arm: str, flags: Flags) -> float | None:
    """Return seconds of an iteration of another arm in its own process; None if its package is not installed."""
    code = _FRAME.format(
        x=str(folder / "x.npy"),
        start=str(folder / "start.npy"),
        settings=(flags.actors, flags.iterations),
        arm=arm,
    )
    threads = str(flags.actors)
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, threads)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if "ModuleNotFoundError" in done.stderr:
        return None
    if done.returncode:
        raise RuntimeError(done.stderr)
    times: Sequence[float] = json.loads(done.stdout.strip().splitlines()[-1])
    return statistics.median(times)


if __name__ == "__main__":
    flags = tyro.cli(Flags)
    print(json.dumps({key: str(value) for key, value in asdict(flags).items()}))
    main(flags)

"""Measure the cost of a sweep beside its runs: four trials one after the other, and the same four runs without a sweep.

    python benchmarks/sweep.py --out results/sweep/overhead.jsonl

Each round times both, one after the other, in processes of their own: `runs` pretrains and probes the four
configurations in turn through the Python API, `sweep` is `raysl.tuning.sweep.sweep` over them with one run at a time,
and `rungs` is the same sweep with three rungs for each trial. The ratio is of times of the same round; the cost of a
rung is the difference of the two sweeps by their eight more rungs. Besides: seconds from the command `raysl sweep` to
the checkpoint of the first step of its first trial, and the same of `raysl pretrain`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import tyro

from raysl import ray_cluster
from raysl.ingestion import resolve

TRIALS = (0.1, 0.2, 0.3, 0.5)
_SHARED = """
import sys
from raysl.config import Pretraining
from raysl.objectives.pirl import Config as Pirl
data, test, out, epochs = sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4])
def base(run, temperature):
    parts = {"pirl": Pirl(temperature=temperature, head="bn", num_negatives=1024)}
    return Pretraining(data, run, epochs=epochs, batch_size=128, workers=1, parts=parts)
"""
_RUNS = """
from raysl.evaluation.evaluate import probe
from raysl.training.launch import pretrain
for temperature in TRIALS:
    # A sweep scores the baselines too, once.
    encoders = ("trained", "random", "pixels") if temperature == TRIALS[-1] else ("trained",)
    probe(pretrain(base(f"{out}/{temperature}", temperature)), data, test, probes=("knn",), encoders=encoders)
"""
_SWEEP = """
from raysl.tuning.config import SweepConfig
from raysl.tuning.sweep import sweep
vary = ("temperature=" + ",".join(map(str, TRIALS)),)
sweep(base("-", 0.1), SweepConfig(out, vary, validation=test, seeds=(0,), max_concurrent=1, rungs=RUNGS))
"""


@dataclass(frozen=True)
class Flags:
    """Time a sweep and its runs.

    Args:
        data: labelled images that are learned from.
        test: labelled images that the probe is scored on.
        out: file of rows, to which those of this call are added.
        rounds: of both.
        epochs: of each run; long enough that a run takes minutes, as runs do.
    """

    data: str = "shapes:10000"
    test: str = "shapes:1000#test"
    out: Path = Path("results/sweep/overhead.jsonl")
    rounds: int = 3
    epochs: float = 4


def main(flags: Flags) -> None:
    """Measure, print, and add to the file of rows."""
    ray_cluster.start()
    data, test = (str(resolve(name).folder) for name in (flags.data, flags.test))
    import ray

    ray.shutdown()
    rows: list[dict[str, Any]] = []
    for number in range(flags.rounds):
        with tempfile.TemporaryDirectory(prefix="raysl-bench-sweep-") as scratch:
            arms = {"runs": _RUNS, "sweep": f"RUNGS = 1{_SWEEP}", "rungs": f"RUNGS = 3{_SWEEP}"}
            order = list(arms) if number % 2 == 0 else list(reversed(arms))
            times = {
                arm: _timed(arms[arm], [data, test, f"{scratch}/{arm}", str(flags.epochs)]) for arm in order
            }
            first = {
                arm: _first_step(arm, data, test, f"{scratch}/first-{arm}") for arm in ("pretrain", "sweep")
            }
        row = {
            "round": number,
            "runs_s": round(times["runs"], 1),
            "sweep_s": round(times["sweep"], 1),
            "ratio": round(times["sweep"] / times["runs"], 3),
            "rung_s": round((times["rungs"] - times["sweep"]) / (2 * len(TRIALS)), 1),
            "pretrain_first_step_s": round(first["pretrain"], 1),
            "sweep_first_step_s": round(first["sweep"], 1),
            "epochs": flags.epochs,
            "cpus": os.cpu_count(),
            "load": round(os.getloadavg()[0], 1),
        }
        print(row, flush=True)
        rows.append(row)
        flags.out.parent.mkdir(parents=True, exist_ok=True)
        with flags.out.open("a") as stream:
            stream.write(json.dumps(row) + "\n")


def _timed(program: str, arguments: list[str]) -> float:
    """Return the seconds of a program in a process of its own."""
    code = f"TRIALS = {TRIALS}\n{_SHARED}{program}"
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def _first_step(verb: str, data: str, test: str, out: str) -> float:
    """Return the seconds from the command to the checkpoint of the first step; the command is then stopped."""
    command = [sys.executable, "-m", "raysl", verb, "--data", data, "--workers", "1"]
    command += "--batch-size 128 --pirl.num-negatives 1024 --save.every-steps 1".split()
    command += (
        ["--run", out]
        if verb == "pretrain"
        else ["--out", out, "--validation", test, "--vary", "temperature=0.2"]
    )
    run = Path(out) if verb == "pretrain" else Path(out) / "trials" / "0000" / "seed-0"
    started = time.perf_counter()
    process = psutil.Popen(command, stdout=subprocess.DEVNULL)
    while not list(run.glob("checkpoints/step-*/manifest-*")):
        if process.poll() is not None:
            raise RuntimeError(f"raysl {verb} ended before its first step")
        time.sleep(0.05)
    seconds = time.perf_counter() - started
    descendants = process.children(recursive=True)
    process.kill()
    process.wait()
    psutil.wait_procs(descendants, timeout=60)
    return seconds


if __name__ == "__main__":
    main(tyro.cli(Flags))

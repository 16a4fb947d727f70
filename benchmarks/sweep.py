"""Measure the cost of a sweep beside its runs: four trials as a sweep, and the same four runs without one.

    python benchmarks/sweep.py --out results/sweep/overhead.jsonl

Each round times, in processes of their own: `runs` pretrains and probes the four configurations in turn through the
Python API, and `sweep` is `raysl.tuning.sweep.sweep` over them, with one and with two runs at a time. The ratio is of
times of the same round. Besides, in a sweep that saves every step: seconds from the command to the first step
(`first_step_s`), from the last step before a rung to the first after it (`rung_s`, with the probe), and from the last
score of a trial to the first step of the next (`next_trial_s`).
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
from typing import Any, Literal

import psutil
import tyro

from raysl import ray_cluster
from raysl.ingestion import open_or_ingest

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
sweep(base("-", 0.1), SweepConfig(out, vary, validation=test, seeds=(0,), max_concurrent=AT_ONCE))
"""


@dataclass(frozen=True)
class Flags:
    """Time a sweep and its runs.

    Args:
        data: labeled images that are learned from.
        test: labeled images that the probe is scored on.
        out: file of rows, to which those of this call are added.
        rounds: of both.
        epochs: of each run; long enough that a run takes minutes, as runs do.
        arms: what is measured.
    """

    data: str = "shapes:10000"
    test: str = "shapes:1000#test"
    out: Path = Path("results/sweep/overhead.jsonl")
    rounds: int = 3
    epochs: float = 4
    arms: tuple[Literal["runs", "sweep", "sweep_2", "starts"], ...] = ("runs", "sweep", "sweep_2", "starts")


def main(flags: Flags) -> None:
    """Measure, print, and add to the file of rows."""
    ray_cluster.start()
    data, test = (str(open_or_ingest(name).folder) for name in (flags.data, flags.test))
    import ray

    ray.shutdown()
    rows: list[dict[str, Any]] = []
    for number in range(flags.rounds):
        with tempfile.TemporaryDirectory(prefix="raysl-bench-sweep-") as scratch:
            programs = {"runs": _RUNS, "sweep": f"AT_ONCE = 1{_SWEEP}", "sweep_2": f"AT_ONCE = 2{_SWEEP}"}
            timed = [arm for arm in programs if arm in flags.arms]
            times = {
                f"{arm}_s": _timed(programs[arm], [data, test, f"{scratch}/{arm}", str(flags.epochs)])
                for arm in (timed if number % 2 == 0 else reversed(timed))
            }
            if {"runs_s", "sweep_s"} <= times.keys():
                times["ratio"] = times["sweep_s"] / times["runs_s"]
            if "starts" in flags.arms:
                times.update(_starts(data, test, f"{scratch}/starts"))
        row = {
            "round": number,
            **{name: round(value, 3 if name == "ratio" else 1) for name, value in times.items()},
            "data": flags.data,
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


def _starts(data: str, test: str, out: str) -> dict[str, float]:
    """Return seconds to the first step, over a rung, and from one trial to the next, of a sweep of two trials."""
    command = [sys.executable, "-m", "raysl", "sweep", "--data", data, "--validation", test, "--out", out]
    command += "--vary temperature=0.2,0.3 --seeds 0 --rungs 2 --reduction 2 --epochs 0.2 --workers 1".split()
    command += "--max-concurrent 1 --batch-size 128 --pirl.num-negatives 1024 --save.every-steps 1".split()
    seen: dict[str, float] = {}
    started = time.perf_counter()
    process = psutil.Popen(command, stdout=subprocess.DEVNULL)
    second = Path(out, "trials", "0001", "seed-0", "checkpoints")
    while not list(second.glob("step-*/manifest-*")):
        if process.poll() is not None:
            raise RuntimeError("raysl sweep ended before its second trial")
        now, journal = time.perf_counter() - started, Path(out, "sweep.jsonl")
        for manifest in Path(out).glob("trials/0000/seed-0/checkpoints/step-*/manifest-*"):
            seen.setdefault(manifest.parent.name, now)
        scores = journal.read_text().count('"event": "score"') if journal.exists() else 0
        seen.setdefault(f"score {scores}", now)
        time.sleep(0.02)
    next_trial = time.perf_counter() - started - seen["score 2"]
    descendants = process.children(recursive=True)
    process.kill()
    process.wait()
    psutil.wait_procs(descendants, timeout=60)
    steps = sorted(name for name in seen if name.startswith("step-"))
    # The rung is after half of the steps.
    half = round(len(steps) / 2)

    return {
        "first_step_s": seen[steps[0]],
        "rung_s": seen[steps[half]] - seen[steps[half - 1]],
        "next_trial_s": next_trial,
    }


if __name__ == "__main__":
    main(tyro.cli(Flags))

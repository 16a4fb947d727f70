"""Compare the speed of `raysl ingest` with that of another checkout of raysl, on photographs and on 32 px images.

    git worktree add --detach ../before COMMIT
    python benchmarks/ingest_speed.py --before ../before --photos PHOTOS --out results/ingest/speed.jsonl

Two processes live through all rounds and ingest the same source by turns, in changing order. The tasks run inside of
the process instead of in Ray, whose own time is not of interest here. The images lie as files in class folders: the
photographs are copied under several names, the small images are noise.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import tyro
from PIL import Image

CLASSES = 10


@dataclass(frozen=True)
class Flags:
    """The speed of ingest, and its ratio to another checkout.

    Args:
        before: the other checkout.
        photos: folder of JPEG photographs.
        num_photos: photographs in the source.
        num_small: images of 32 px in the source.
        rounds: interleaved rounds.
        out: file for the rows, one JSON object a line.
    """

    before: Path
    photos: Path
    num_photos: int = 2000
    num_small: int = 8000
    rounds: int = 5
    out: Path | None = None


def make_sources(folder: Path, flags: Flags) -> dict[str, Path]:
    """Write the two sources and return their folders."""
    photos = sorted(flags.photos.resolve().glob("*.JPEG"))
    rng = np.random.default_rng(0)
    for kind, count in (("photos", flags.num_photos), ("small", flags.num_small)):
        for number in range(count):
            place = folder / kind / f"class{number % CLASSES}"
            place.mkdir(parents=True, exist_ok=True)
            if kind == "photos":
                (place / f"{number}.jpg").write_bytes(photos[number % len(photos)].read_bytes())
            else:
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(place / f"{number}.png")
    return {kind: folder / kind for kind in ("photos", "small")}


class Serial:
    """The Ray Data calls of ingest, with the tasks run here one after the other: Ray's own time is not compared."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.context = SimpleNamespace()
        self.work: Callable[[dict[str, Any]], dict[str, Any]] = dict

    def map_batches(self, work: Callable[[dict[str, Any]], dict[str, Any]], **_: Any) -> Serial:
        self.work = work
        return self

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        for number in range(self.count):
            yield {key: values[0] for key, values in self.work({"id": [number]}).items()}


def measure() -> None:
    """Ingest the source on each line of the standard input with the raysl that is imported; print the seconds."""
    from raysl.ingestion import ingest, pipeline

    pipeline.ray = SimpleNamespace(data=SimpleNamespace(range=lambda count, **_: Serial(count)))  # type: ignore[attr-defined]
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as folder:
            started, cpu_started = time.perf_counter(), time.process_time()
            made = ingest(line.strip(), f"{folder}/data")
            cpu_s, wall_s = time.process_time() - cpu_started, time.perf_counter() - started
        print(json.dumps({"images": made.num_images, "wall_s": wall_s, "cpu_s": cpu_s}), flush=True)


def begin(checkout: Path) -> subprocess.Popen[str]:
    """Start a process that measures a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
    words = [sys.executable, str(Path(__file__).resolve()), "--measure"]
    return subprocess.Popen(
        words, env=environment, cwd=checkout, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def ask(process: subprocess.Popen[str], source: Path) -> dict[str, float]:
    """Return the seconds that a process takes for a source."""
    assert process.stdin is not None
    assert process.stdout is not None
    print(source, file=process.stdin, flush=True)
    answer: dict[str, float] = json.loads(process.stdout.readline())
    return answer


def main(flags: Flags) -> None:
    """Measure, print and write."""
    checkouts = {"before": flags.before, "now": Path(__file__).resolve().parents[1]}
    rows: list[dict[str, Any]] = []
    processes = {name: begin(checkout) for name, checkout in checkouts.items()}
    with tempfile.TemporaryDirectory() as folder:
        sources = make_sources(Path(folder), flags)
        for number in range(-1, flags.rounds):  # The round -1 warms up.
            for kind, source in sources.items():
                for name in checkouts if number % 2 == 0 else reversed(checkouts):
                    row = {"round": number, "checkout": name, "source": kind, "load": os.getloadavg()[0]}
                    row |= ask(processes[name], source)
                    rows += [row] if number >= 0 else []
                    print(row, flush=True)
    for process in processes.values():
        process.communicate()
    if flags.out is not None:
        flags.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind in sources:
        for unit in ("wall_s", "cpu_s"):
            times = {
                name: [row[unit] for row in rows if (row["checkout"], row["source"]) == (name, kind)]
                for name in checkouts
            }
            before, now = (statistics.median(times[name]) for name in ("before", "now"))
            print(
                f"{kind}, {unit}: before {before:.2f}, now {now:.2f}, speed now / before {before / now:.2f}"
            )


if __name__ == "__main__":
    if sys.argv[1:] == ["--measure"]:
        measure()
    else:
        main(tyro.cli(Flags, description=(__doc__ or "").splitlines()[0]))

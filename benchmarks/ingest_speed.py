"""Compare the speed of `raysl ingest` with that of another checkout of raysl, on photographs and on 32 px images.

    git worktree add --detach ../before COMMIT
    python benchmarks/ingest_speed.py --before ../before --photos PHOTOS --out results/ingest/speed.jsonl

Each round runs both checkouts, one after the other and in changing order, each in a process and a Ray cluster of its
own. The first ingest of a process is not measured. The images lie as files in class folders: the photographs are
copied under several names, the small images are noise.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
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


def measure(sources: dict[str, str]) -> None:
    """Ingest each source with the raysl that is imported, and print the seconds of each as JSON."""
    from raysl import ray_cluster
    from raysl.ingestion import ingest

    ray_cluster.start()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        ingest("shapes:2000", f"{folder}/first")
        for kind, source in sources.items():
            before, started = cpu_seconds(), time.perf_counter()
            made = ingest(source, f"{folder}/{kind}")
            wall_s, cpu_s = time.perf_counter() - started, cpu_seconds() - before
            found[kind] = {"images": made.num_images, "wall_s": wall_s, "cpu_s": cpu_s}
    print("measured", json.dumps(found))


def cpu_seconds() -> float:
    """Return the CPU seconds so far of this process and all below it, Ray's among them."""
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total


def run(checkout: Path, sources: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Measure a checkout in a process of its own."""
    words = [sys.executable, __file__, "--measure", *(f"{kind}={place}" for kind, place in sources.items())]
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
    done = subprocess.run(words, env=environment, cwd=checkout, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("measured ")]
    if not lines:
        raise SystemExit(f"{checkout} failed:\n{done.stdout}\n{done.stderr}")
    found: dict[str, dict[str, float]] = json.loads(lines[0].removeprefix("measured "))
    return found


def main(flags: Flags) -> None:
    """Measure, print and write."""
    checkouts = {"before": flags.before, "now": Path(__file__).resolve().parents[1]}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        sources = make_sources(Path(folder), flags)
        for number in range(flags.rounds):
            for name in checkouts if number % 2 == 0 else reversed(checkouts):
                for kind, values in run(checkouts[name], sources).items():
                    load = os.getloadavg()[0]
                    rows.append({"round": number, "checkout": name, "source": kind, "load": load, **values})
                    print(rows[-1], flush=True)
                if flags.out is not None:
                    flags.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind in sources:
        for unit in ("wall_s", "cpu_s"):
            medians = {
                name: statistics.median(
                    row[unit] for row in rows if (row["checkout"], row["source"]) == (name, kind)
                )
                for name in checkouts
            }
            speed = medians["before"] / medians["now"]
            print(
                f"{kind}, {unit}: before {medians['before']:.2f}, now {medians['now']:.2f}, speed {speed:.2f}"
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(dict(word.split("=", 1) for word in sys.argv[2:]))
    else:
        main(tyro.cli(Flags, description=(__doc__ or "").splitlines()[0]))

"""What four runs that read the same images save with one stream: CPU seconds and wall time, at 32 and at 224 pixels.

Command:  python benchmarks/shared_stream.py --small CIFAR10 --photos FOLDER --out results/sweep/shared_stream.jsonl
Hardware: 2 CPU cores, no GPU.
Time:     about 5 minutes.
Expect:   the same pixels, for well under the CPU time of separate streams; least where runs have views of their own.

Rows of two kinds, for four runs of pirl-jigsaw that vary in a field of the loss (their views are equal), in the size of
the permutation set (patches differ, and start from equal crops), in colors (views differ, crops are equal), or in the
size of the crop (whole images differ from the crop on):

`work`: CPU time for an image from its bytes to the views of all runs, in one process, without Ray.
`streams`: four readers, processes of their own as trainers are, take all batches and drop them, at the same time.
With `own`, each has a stream of its own; with `shared`, all share one. CPU seconds are of all processes of Ray; the
start of Ray and of the readers is left out, that of the shared stream counts.

Rounds take the arms in turns.
"""

from __future__ import annotations

import json
import os
import threading
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
import tyro

from raysl import ray_cluster
from raysl.config import Pretraining, ViewConfig
from raysl.dataset import DataSet
from raysl.ingestion import open_or_ingest
from raysl.model import Model
from raysl.objectives.pirl import Config as Pirl
from raysl.stream import reader
from raysl.stream.plan import Plan
from raysl.stream.reader import DataShare, Stream
from raysl.stream.shared import Subscriber, batches, merge_streams, start_actors, view_keys

RUNS = 4
VARY = ("loss", "permutations", "colors", "crops")


@dataclass(frozen=True)
class Flags:
    """Times four streams of the same images, separate and shared.

    Args:
        small: data of about 32 pixels.
        photos: data of photos.
        out: file of rows, to which those of this call are added.
        rounds: of every arm.
        work_only: leave out the streams, and Ray.
        small_images: that each run reads at 32 pixels.
        photo_images: that each run reads at 224 pixels.
    """

    small: str = "shapes:10000"
    photos: str = "shapes:200"
    out: Path = Path("results/sweep/shared_stream.jsonl")
    rounds: int = 3
    work_only: bool = False
    small_images: int = 20_000
    photo_images: int = 1600


def main(flags: Flags) -> None:
    """Measures, prints, and adds to the file of rows."""
    torch.set_num_threads(1)
    if not flags.work_only:
        ray_cluster.start()
    cases = [
        (32, 128, open_or_ingest(flags.small), flags.small_images),
        (224, 32, open_or_ingest(flags.photos), flags.photo_images),
    ]
    for number in range(flags.rounds):
        for side, batch_size, dataset, images in cases:
            for vary in VARY:
                streams = [stream(dataset, side, batch_size, images, vary, run) for run in range(RUNS)]
                about = {"round": number, "side": side, "vary": vary, "runs": RUNS}
                keep(flags.out, {"kind": "work", **about, **work(streams)})
                if vary in ("loss", "permutations") and not flags.work_only:
                    found = compared(streams, number % 2 == 1)
                    keep(flags.out, {"kind": "streams", **about, "images": images, **found})


def keep(out: Path, row: dict[str, Any]) -> None:
    """Prints a row and adds it to the file."""
    row |= {"cpus": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    print(row, flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        file.write(json.dumps(row) + "\n")


def stream(dataset: DataSet, side: int, batch_size: int, images: int, vary: str, run: int) -> Stream:
    """The stream of one of the runs."""
    jigsaw = {"num_permutations": 100 * (run + 1)} if vary == "permutations" else {}
    view = ViewConfig(
        image_size=side,
        recipe=("pirl", "simclr", "mocov2", "plain")[run] if vary == "colors" else "pirl",
        min_scale=(0.08, 0.2, 0.4, 0.6)[run] if vary == "crops" else 0.2,
    )
    parts = {"pirl": Pirl(num_negatives=16), "jigsaw": jigsaw}
    config = Pretraining("-", "-", batch_size=batch_size, view=view, parts=parts)
    plan = Plan.of(dataset, batch_size, 0, images / dataset.num_images)
    share = DataShare(0.5, (os.cpu_count() or 1) / RUNS)
    return Stream(dataset, plan, Model.of(config, dataset).views(), share=share)


def work(streams: list[Stream]) -> dict[str, float]:
    """CPU microseconds for an image, from its bytes on: of all four streams, and of the one that replaces them."""
    rows = streams[0].plan.rows(0)
    table = streams[0].dataset.read(rows.indices_b)

    def us(one: Stream) -> float:
        taken = []
        for _ in range(4):
            started = time.process_time()
            reader._view_columns(one, table, rows, one.views)
            taken.append(time.process_time() - started)
        return 1e6 * median(taken[1:]) / len(rows)

    own, shared = sum(map(us, streams)), us(merge_streams(streams))
    return {"own_us": round(own), "shared_us": round(shared), "ratio": round(shared / own, 2)}


def compared(streams: list[Stream], shared_first: bool) -> dict[str, Any]:
    """What the streams cost apart and together; asserts that both bring the same pixels."""
    arms = ("shared", "own") if shared_first else ("own", "shared")
    found = {arm: measure(streams, arm == "shared") for arm in arms}
    assert found["own"].pop("pixels") == found["shared"].pop("pixels")
    row = {f"{arm}_{name}": value for arm in ("own", "shared") for name, value in found[arm].items()}
    ratios = {
        f"{name}_ratio": round(row[f"shared_{name}_s"] / row[f"own_{name}_s"], 2) for name in ("cpu", "wall")
    }
    return row | ratios


def measure(streams: list[Stream], share: bool) -> dict[str, Any]:
    """Seconds of four readers that go through their streams at the same time, and a checksum of what each got."""
    import ray

    readers = [ray.remote(num_cpus=0)(Reader).remote() for _ in streams]
    ray.get([reader.ready.remote() for reader in readers])
    actors: tuple[Any, ...] = ()
    meter = CpuMeter()
    started = time.perf_counter()
    if share:
        actors = start_actors(streams, 0, streams[0].plan.num_steps)
    subscribers = [
        Subscriber(str(i), actors, view_keys(each)) if actors else None for i, each in enumerate(streams)
    ]
    ray.get(
        [
            actor.expect.remote(subscriber.run, 0)
            for actor in actors
            for subscriber in subscribers
            if subscriber
        ]
    )
    pixels = ray.get([r.read.remote(*each) for r, *each in zip(readers, streams, subscribers, strict=True)])
    wall_s = time.perf_counter() - started
    cpu_s = meter.stop()
    for actor in actors:
        ray.kill(actor)
    return {"cpu_s": round(cpu_s, 1), "wall_s": round(wall_s, 1), "pixels": pixels}


class Reader:
    """A process that takes batches, as a trainer does."""

    def ready(self) -> None:
        """Returns when everything is imported."""

    def read(self, one: Stream, subscriber: Subscriber | None) -> int:
        """Takes all batches; a checksum of their pixels."""
        checksum = 0
        for batch in batches(one, subscriber):
            for name in sorted(batch.views):
                checksum = zlib.crc32(batch.views[name].numpy().data, checksum)
        return checksum


class CpuMeter:
    """CPU seconds of all processes under this one, from now on, those that end in between too."""

    def __init__(self) -> None:
        self._before = self._read()
        self._latest = dict(self._before)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        """Seconds since the beginning."""
        self._done.set()
        self._thread.join()
        self._latest |= self._read()
        return sum(s - self._before.get(key, 0.0) for key, s in self._latest.items())

    def _watch(self) -> None:
        while not self._done.wait(0.5):
            self._latest |= self._read()

    def _read(self) -> dict[tuple[int, float], float]:
        found = {}
        for process in psutil.Process().children(recursive=True):
            try:
                times = process.cpu_times()
                found[process.pid, process.create_time()] = times.user + times.system
            except psutil.Error:
                continue
        return found


if __name__ == "__main__":
    main(tyro.cli(Flags))

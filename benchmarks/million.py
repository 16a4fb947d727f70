"""A million images: ingested, streamed once as pirl-jigsaw views, and remembered in a bank; memory must stay flat.

Command:  python benchmarks/million.py --out results/million/rows.jsonl
Hardware: 2 CPU cores, 24 GB, no GPU.
Time:     about 10 minutes.
Expect:   memory of the driver and of the workers in the last tenth of each stage within 10 % of that in its second
          tenth (the first fills caches), plus 512 MB for the bank.

Memory is the proportional set size (PSS) of the driver and of the processes that Ray started for it, read from
/proc once a second, without the shared object store, whose size is fixed when Ray starts.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
import torch
import torch.nn.functional as F
import tyro

from raysl import ray_cluster
from raysl.augment import recipe
from raysl.contrastive.bank import BankConfig, MemoryBank
from raysl.contrastive.negatives import shared_scores
from raysl.ingestion import ingest
from raysl.pretext import Geometry, build
from raysl.stream.plan import Plan
from raysl.stream.reader import DataShare, Stream
from raysl.stream.views import View


@dataclass(frozen=True)
class Flags:
    """Ingests and streams drawn images and watches memory.

    Args:
        images: how many.
        batch_size: images in a batch.
        folder: where the data set is made; by default a temporary folder that is deleted.
        out: file for the rows, one line of JSON a stage.
    """

    images: int = 1_000_000
    batch_size: int = 512
    folder: Path | None = None
    out: Path | None = None


def private_mb(process: psutil.Process) -> float:
    """PSS of a process less what it maps of the object store, in MB."""
    text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in text.splitlines()[1:]}
    return (sizes["Pss"] - sizes.get("Pss_Shmem", 0)) / 1024


class Memory(threading.Thread):
    """Samples (driver, workers) in MB once a second until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.samples: list[tuple[float, float]] = []
        self._done = threading.Event()

    def run(self) -> None:
        driver = psutil.Process(os.getpid())
        while not self._done.wait(1.0):
            workers = 0.0
            for child in driver.children(recursive=True):
                try:
                    workers += private_mb(child)
                except (psutil.Error, OSError, KeyError):
                    continue
            self.samples.append((private_mb(driver), workers))

    def stop(self) -> None:
        """Ends the sampling."""
        self._done.set()
        self.join()


@contextmanager
def watched(stage: str, images: int, rows: list[dict[str, object]]) -> Iterator[None]:
    """Adds a row about what happens inside: time, speed, and memory early, late and at most."""
    memory, started = Memory(), time.perf_counter()
    memory.start()
    yield
    memory.stop()
    wall_s = time.perf_counter() - started
    tenth = max(1, len(memory.samples) // 10)
    row: dict[str, object] = {
        "stage": stage,
        "images": images,
        "wall_s": wall_s,
        "images_per_s": images / wall_s,
    }
    for i, who in enumerate(("driver", "workers")):
        values = [sample[i] for sample in memory.samples]
        row[f"{who}_early_mb"] = median(values[tenth : 2 * tenth])
        row[f"{who}_late_mb"] = median(values[-tenth:])
        row[f"{who}_peak_mb"] = max(values)
    rows.append(row)
    print(json.dumps(row), flush=True)


def main(flags: Flags) -> None:
    """Runs both stages."""
    ray_cluster.start()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = str(flags.folder or Path(temporary) / "set")
        with watched("ingest", flags.images, rows):
            dataset = ingest(f"shapes:{flags.images}", folder)
        geometry = Geometry(image_size=32)
        views = {
            n: View(build(s, {}, geometry), recipe("pirl")) for n, s in (("t", "jigsaw"), ("i", "identity"))
        }
        plan = Plan.of(dataset, flags.batch_size, seed=0, epochs=1)
        bank = MemoryBank(dataset.num_images, 128, BankConfig(), seed=0)
        stream = Stream(dataset, plan, views, share=DataShare(cpus_per_task=1, cpus=2))
        with watched("stream and bank", plan.num_steps * flags.batch_size, rows):
            for batch in stream.batches():
                queries_bd = F.normalize(torch.randn(len(batch.rows), 128), dim=1)
                shared_scores(bank, queries_bd, batch.rows, batch.step, 4096)
                bank.update(batch.indices_b, queries_bd)
    if flags.out is not None:
        flags.out.parent.mkdir(parents=True, exist_ok=True)
        flags.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main(tyro.cli(Flags))

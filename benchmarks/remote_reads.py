"""Requests, bytes and waiting of data tasks that read photos from a slow object store.

Command:  python -m benchmarks.remote_reads --folder /tmp/remote-reads
Hardware: any Linux machine; the table in results/remote_reads is from two shared cores.
Time:     two minutes on a quiet machine.
Expect:   from the second pass over the shards on, one request a row group, and less than a tenth of the time waiting.

A server of its own process answers S3's requests after 30 ms, and sends 80 MB/s on each connection. The data tasks of
one worker run one after another in this process, without Ray. Time in which a task waits for a core is not counted.
"""

from __future__ import annotations

import io
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import tyro
from PIL import Image

from raysl.augment import recipe
from raysl.dataset import SHARDS, DataSet, Manifest, Shard
from raysl.pretext import Geometry, build
from raysl.storage import Folder
from raysl.stream.data_tasks import MakeBatches
from raysl.stream.plan import Plan
from raysl.stream.reader import Stream
from raysl.stream.views import View
from tests.slow_store import BUCKET, counts, served


@dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        folder: where the photos are kept.
        latency_s: seconds before each answer of the store.
        bytes_per_s: speed of each connection.
        batch_per_worker: images of a step on one worker.
        workers: numbers of workers; the tasks of one of them are run.
        images: least number of images that are measured for each.
    """

    folder: Path
    latency_s: float = 0.03
    bytes_per_s: float = 80e6
    batch_per_worker: int = 32
    workers: tuple[int, ...] = (1, 8, 32)
    images: int = 1000


def photos(folder: Path, shards: int = 16, groups: int = 40, per_group: int = 36) -> Manifest:
    """Write a data set of drawn photos of about 110 kB, 4 MB in a row group, if it is not there."""
    pictures = [_photo(number) for number in range(per_group)]
    (folder / SHARDS).mkdir(parents=True, exist_ok=True)
    listed = []
    schema = pa.schema(
        [("index", pa.int64()), ("image", pa.binary()), ("path", pa.string()), ("label", pa.int64())]
    )
    for number in range(shards):
        path = folder / SHARDS / f"{number:05d}.parquet"
        if not path.exists():
            with pq.ParquetWriter(path, schema, use_dictionary=False, write_page_checksum=True) as writer:
                for group in range(groups):
                    index = (number * groups + group) * per_group + np.arange(per_group)
                    paths = [f"class/{i:08d}.jpg" for i in index]
                    writer.write_table(pa.table([index, pictures, paths, index % 4], schema))
        listed.append(Shard(path.name, (per_group,) * groups, path.stat().st_size))
    return Manifest("photos", tuple(listed), ("a", "b", "c", "d"), "f" * 32, 0)


def _photo(number: int) -> bytes:
    random = np.random.default_rng(number)
    coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
        (500, 375), Image.Resampling.BICUBIC
    )
    fine = random.normal(0, 14, (375, 500, 3))
    stream = io.BytesIO()
    Image.fromarray((np.asarray(coarse) + fine).clip(0, 255).astype(np.uint8)).save(
        stream, "JPEG", quality=88
    )
    return stream.getvalue()


def clocks() -> tuple[float, float]:
    """Return seconds of this thread that passed and were not spent waiting for a core, and its CPU seconds."""
    queued_ns = int(Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text().split()[1])
    return time.perf_counter() - queued_ns / 1e9, time.thread_time()


def measure(options: Options, manifest: Manifest, workers: int, address: str) -> list[str]:
    """Run data tasks of one worker; return the cells of a row."""
    dataset = DataSet(Folder(f"s3://{BUCKET}"), manifest)
    plan = Plan.of(dataset, options.batch_per_worker * workers, 0, 100)
    geometry = Geometry(image_size=224)
    specs = {"transformed": "jigsaw", "image": "identity"}
    views = {name: View(build(spec, {}, geometry), recipe("pirl")) for name, spec in specs.items()}
    load = MakeBatches(Stream(dataset, plan, views, rank=workers // 2, world=workers), 0, plan.num_steps)
    # Footers are read once in a process.
    dataset.read(dataset.row_group_starts[:-1], ("label",))
    counts(address)
    images = tasks = 0
    passed_s, used_s = clocks()
    while images < options.images:
        # Every third task, because the tasks between run elsewhere.
        images += sum(row["index"].shape[1] for row in load({"id": np.array([3 * tasks])}))
        tasks += 1
    passed_s, used_s = (now - before for now, before in zip(clocks(), (passed_s, used_s), strict=True))
    found = counts(address)
    requests = found.get("HEAD", 0) + found["GET"]
    image_bytes = manifest.num_bytes / manifest.num_images
    return [
        str(workers),
        f"{images / tasks:.0f}",
        f"{requests / images:.3f}",
        f"{found['bytes'] / images / image_bytes:.2f}",
        f"{used_s / images * 1e3:.1f}",
        f"{(passed_s - used_s) / images * 1e3:.1f}",
        f"{(passed_s - used_s) / passed_s:.0%}",
    ]


def main(options: Options) -> None:
    torch.set_num_threads(1)
    print(
        "| workers | images a task | requests an image | bytes read / used | CPU ms an image | waiting ms an image "
        "| share of waiting |\n" + "|---" * 7 + "|"
    )
    manifest = photos(options.folder)
    with served(options.folder, options.latency_s, options.bytes_per_s) as address:
        for workers in options.workers:
            print("| " + " | ".join(measure(options, manifest, workers, address)) + " |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

"""What a view of an image costs: raysl's stream through Ray Data beside torch DataLoaders, in one interleaved run.

Command:  python benchmarks/ingest.py --data PHOTOS_OR_DATA_SET --image-size 224 --out rows.jsonl
          python benchmarks/ingest.py --data CIFAR10 --image-size 32 --batch-size 256 --images 16384
Hardware: two CPU cores; no GPU. Each contestant has two worker processes.
Time:     five to ten minutes with the defaults.
Expect:   stream / loader at least 0.8 in images per CPU-second; stream / PIL at least 2.5 on photos at 224 pixels and
          at least 5 on images of 32; first batch of a warm pipeline within 2 seconds.

The contestants, all of them making the two views of PIRL with a jigsaw:
    stream   raysl.stream.reader.Stream: Ray Data tasks read, decode, cut, augment; uint8 through the object store
    loader   torch DataLoader whose workers run the same functions on the same images; uint8 through shared memory
    pil      torch DataLoader with PIL and torchvision's transforms of PIL images, as VISSL and solo-learn; float32
    decode   decoding alone, in one process: a part of what the others do

The encoded images of the loaders lie in memory, which spares them the reading that the stream does. Each round
measures every contestant once, in steady state: whole batches after the first ones, before the last ones. CPU time is
that of all processes of the contestant; a round in which one of them disappeared is measured again.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import tyro
from PIL import Image, ImageEnhance, ImageOps
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from raysl import pretext, ray_cluster
from raysl.augment import recipe
from raysl.dataset import DataSet
from raysl.ingestion import open_or_ingest
from raysl.ray_cluster.versions import code_hash
from raysl.rng import ImageRng
from raysl.stream.decode import cut, decode
from raysl.stream.plan import Plan
from raysl.stream.reader import DataShare, Stream
from raysl.stream.views import View

WORKERS = 2
# Batches that a loader prepares ahead, two for each worker: not measured at either end.
LEAD = 2 * WORKERS
SEED = 0


@dataclass(frozen=True)
class Flags:
    """The cost of a view, per image.

    Args:
        data: a data set made by `raysl ingest`, or any source that it takes.
        image_size: side of the ordinary view in pixels.
        batch_size: images in a batch.
        images: images that the stream and the loader make in a round; the PIL loader makes a quarter.
        rounds: interleaved rounds.
        out: file for the rows, one JSON object a line.
    """

    data: str
    image_size: int = 224
    batch_size: int = 32
    images: int = 480
    rounds: int = 5
    out: Path | None = None


@dataclass(frozen=True)
class Measured:
    """One contestant in one round.

    Args:
        cpu_ms: CPU milliseconds for an image, over all its processes.
        wall_ms: milliseconds for an image.
        first_s: seconds to the first batch.
    """

    cpu_ms: float
    wall_ms: float
    first_s: float


def make_views(image_size: int) -> dict[str, View]:
    """The two views of pirl-jigsaw, in its published geometry."""
    geometry = pretext.Geometry(image_size, min_scale=0.08 if image_size >= 224 else 0.2)
    names = {"transformed": "jigsaw", "image": "identity"}
    return {name: View(pretext.build(spec, {}, geometry), recipe("pirl")) for name, spec in names.items()}


class SameFunctions(Dataset[dict[str, Tensor]]):
    """Item i is the batch of step i, made as the stream makes it."""

    def __init__(self, images: Sequence[bytes], plan: Plan, views: dict[str, View]) -> None:
        self.images, self.plan, self.views = images, plan, views

    def __len__(self) -> int:
        return self.plan.num_steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        rows = self.plan.rows(step)
        image_rng = ImageRng(self.plan.seed, rows.epochs_b, rows.indices_b)
        sources = {name: view.source for name, view in self.views.items()}
        crops = cut([self.images[i] for i in rows.indices_b], sources, image_rng)
        made = {name: view(crops[name], image_rng.named(name)) for name, view in self.views.items()}
        return {name: view.crops_bpchw for name, view in made.items()}


class Photometric:
    """VISSL's ImgPilRandomPhotometric of PIL images."""

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() >= self.probability:
            return image
        image = ImageOps.posterize(image, random.randint(4, 8))
        image = ImageEnhance.Sharpness(image).enhance(random.uniform(0.1, 1.9))
        image = ImageOps.solarize(image, random.randint(0, 256))
        return ImageOps.autocontrast(image)


class WithPil(Dataset[tuple[Tensor, Tensor]]):
    """Item i is the image and its nine patches, one PIL image at a time."""

    def __init__(self, images: Sequence[bytes], views: dict[str, View], length: int) -> None:
        jigsaw: Any = views["transformed"].pretext
        whole = views["image"].source
        colors = [
            transforms.ColorJitter(0.4, 0.4, 0.4, 0.2),
            Photometric(0.66),
            transforms.RandomGrayscale(0.2),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
        flip = transforms.RandomHorizontalFlip()
        crop = transforms.RandomResizedCrop(whole.size, (whole.min_scale, 1.0))
        self.whole = transforms.Compose([crop, flip, *colors])
        source = transforms.RandomResizedCrop(jigsaw.source.size, (jigsaw.source.min_scale, 1.0))
        self.source = transforms.Compose([source, flip])
        self.patch = transforms.Compose([transforms.RandomCrop(jigsaw.patch_size), *colors])
        self.grid, self.cell = jigsaw.grid, jigsaw.cell_size
        self.images, self.length = images, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        image = Image.open(BytesIO(self.images[number % len(self.images)])).convert("RGB")
        source, cell = self.source(image), self.cell
        boxes = [
            (x * cell, y * cell, (x + 1) * cell, (y + 1) * cell)
            for y in range(self.grid)
            for x in range(self.grid)
        ]
        random.shuffle(boxes)
        return torch.stack([self.patch(source.crop(box)) for box in boxes]), self.whole(image)


def one_thread(_: int) -> None:
    """Each worker has one core, as a data task of Ray has."""
    torch.set_num_threads(1)


def loader(dataset: Dataset[Any], batch_size: int | None) -> DataLoader[Any]:
    """Two processes that live as long as the loader. Forking a process in which Ray runs is not safe."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=WORKERS,
        persistent_workers=True,
        multiprocessing_context="forkserver",
        worker_init_fn=one_thread,
    )


Processes = Callable[[], list[psutil.Process]]


def cpu_times(processes: Processes) -> dict[tuple[int, float], float]:
    """CPU seconds so far of each process, by its number and the time it was born."""
    times = {}
    for process in processes():
        try:
            cpu = process.cpu_times()
            times[process.pid, process.create_time()] = cpu.user + cpu.system
        except psutil.Error:
            continue
    return times


def measure(
    batches: Iterator[Any], size: int, skip: int, count: int, processes: Processes
) -> Measured | None:
    """Takes all batches and measures `count` of them after the first `skip`.

    Returns:
        None when a process disappeared meanwhile: its time is lost.
    """
    started = time.perf_counter()
    next(batches)
    first_s = time.perf_counter() - started
    for _ in range(skip - 1):
        next(batches)
    before, began = cpu_times(processes), time.perf_counter()
    for _ in range(count):
        next(batches)
    wall_s, after = time.perf_counter() - began, cpu_times(processes)
    for _ in batches:
        pass
    if before.keys() - after.keys():
        return None
    cpu_s = sum(after.values()) - sum(before.values())
    return Measured(1000 * cpu_s / (count * size), 1000 * wall_s / (count * size), first_s)


class Contest:
    """The contestants over one data set. Their worker processes live through all rounds."""

    def __init__(self, dataset: DataSet, flags: Flags) -> None:
        self.size = flags.batch_size
        views = make_views(flags.image_size)
        images = dataset.read(np.arange(dataset.num_images), ["image"]).column("image").to_pylist()
        piece = Plan.of(dataset, self.size, SEED, 1).steps_per_block
        # Whole pieces, as a data task makes them, so that both ends of the measurement see the same of its rhythm.
        self.count = -(-flags.images // (self.size * piece)) * piece
        self.margin = 2 * piece
        steps = self.count + 2 * self.margin
        plan = Plan.of(dataset, self.size, SEED, steps * self.size / dataset.num_images)
        self.stream = Stream(dataset, plan, views, share=DataShare(1.0, float(WORKERS)))
        self.slow_count = max(4, self.count // 4)
        same_plan = Plan.of(
            dataset, self.size, SEED, (self.count + 2 * LEAD) * self.size / dataset.num_images
        )
        self.loader = loader(SameFunctions(images, same_plan, views), None)
        self.pil = loader(WithPil(images, views, (self.slow_count + 2 * LEAD) * self.size), self.size)
        self.images = images[: flags.images]
        self.me = psutil.Process()

    def _ray(self) -> list[psutil.Process]:
        loaders = {p.pid for p in self._of_loaders()}
        return [self.me, *(p for p in self.me.children(recursive=True) if p.pid not in loaders)]

    def _of_loaders(self) -> list[psutil.Process]:
        found = []
        for child in self.me.children():
            if "forkserver" in " ".join(child.cmdline()):
                found += [child, *child.children(recursive=True)]
        return found

    def _loaders(self) -> list[psutil.Process]:
        return [self.me, *self._of_loaders()]

    def run(self, name: str) -> Measured:
        """One contestant, once."""
        while True:
            measured = self._try(name)
            if measured is not None:
                return measured

    def _try(self, name: str) -> Measured | None:
        if name == "stream":
            return measure(self.stream.batches(), self.size, self.margin, self.count, self._ray)
        if name == "loader":
            return measure(iter(self.loader), self.size, LEAD, self.count, self._loaders)
        if name == "pil":
            return measure(iter(self.pil), self.size, LEAD, self.slow_count, self._loaders)
        began, cpu_began = time.perf_counter(), time.process_time()
        for data in self.images:
            decode(data)
        ms = 1000 / len(self.images)
        wall_ms = ms * (time.perf_counter() - began)
        return Measured(ms * (time.process_time() - cpu_began), wall_ms, 0.0)


NAMES = ("stream", "loader", "pil", "decode")


def show(rounds: list[dict[str, Measured]], console: Console) -> None:
    """Medians over the rounds, and ratios taken inside each round."""
    table = Table(title="for an image: median of the rounds (least, most)")
    for column in ("", "CPU ms", "wall ms", "images / CPU-s", "first batch s"):
        table.add_column(column, justify="right" if column else "left")
    for name in NAMES:
        of = [one[name] for one in rounds]
        cpu = [m.cpu_ms for m in of]
        middle = statistics.median(cpu)
        table.add_row(
            name,
            f"{middle:.2f} ({min(cpu):.2f}, {max(cpu):.2f})",
            f"{statistics.median(m.wall_ms for m in of):.2f}",
            f"{1000 / middle:,.0f}",
            f"{statistics.median(m.first_s for m in of):.2f}" if name != "decode" else "",
        )
    console.print(table)
    for peer, meaning in (("loader", "the same functions in a DataLoader"), ("pil", "PIL in a DataLoader")):
        ratios = [one[peer].cpu_ms / one["stream"].cpu_ms for one in rounds]
        console.print(
            f"stream / {peer}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) times "
            f"the images per CPU-second of {meaning}"
        )


def main(flags: Flags) -> None:
    """Measures, prints and writes."""
    console = Console()
    ray_cluster.start()
    dataset = open_or_ingest(flags.data)
    contest = Contest(dataset, flags)
    common = {
        "images_in_set": dataset.num_images,
        "image_size": flags.image_size,
        "batch_size": flags.batch_size,
        "code": code_hash(),
        "cores": os.cpu_count(),
    }
    console.print(
        f"{dataset.num_images:,} images, views of {flags.image_size} pixels, batches of {flags.batch_size}; "
        f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}"
    )
    rounds, rows = [], []
    for name in NAMES:
        contest.run(name)  # imports, and the start of the worker processes
    for number in range(flags.rounds):
        one = {}
        for name in NAMES if number % 2 == 0 else reversed(NAMES):
            load = os.getloadavg()[0]
            one[name] = measured = contest.run(name)
            rows.append({**common, "round": number, "contestant": name, "load": load, **vars(measured)})
        rounds.append(one)
        if flags.out is not None:
            flags.out.parent.mkdir(parents=True, exist_ok=True)
            flags.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
        console.print(
            f"round {number + 1}: " + ", ".join(f"{n} {one[n].cpu_ms:.2f}" for n in NAMES) + " CPU ms"
        )
    show(rounds, console)


if __name__ == "__main__":
    main(tyro.cli(Flags, description=(__doc__ or "").splitlines()[0]))

"""What very large runs would take: arithmetic from unit costs, of PIRL with a jigsaw on photos of 224 pixels.

Command:  python benchmarks/scale_model.py
Hardware: any; it only calculates.
Time:     a few seconds.
Expect:   the tables of docs/scale.md.

Measured on this project's machine, a slow core of a shared server: the CPU time of data, arithmetic of k-means, bytes.
Assumed, since no run of this project has been on GPUs: the speed of a GPU, of networks and of object stores. Each is a
flag; put in what you measure (`raysl doctor` measures the first two).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tyro

from raysl.dataset import DataSet, Manifest, Shard
from raysl.storage import Folder
from raysl.stream.plan import Plan

GB = 1e9
# Memory of one GPU.
GPU_GB = 80
# Floats of ResNet-50 without its classifier, and of the heads of PIRL (2048 to 128, and 9 x 128 to 128).
PARAMETERS = 23.5e6 + 2048 * 128 + 9 * 128 * 128


@dataclass(frozen=True)
class Costs:
    """Unit costs, and the run.

    Args:
        data_s: CPU seconds of one image through the stream, both views (results/ingest, photos-224: 5.6 ms).
        image_bytes: of an encoded photo (results/ingest: 110 kB).
        kmeans_flops: floating point operations a second of one core in k-means (results/kmeans: 1,000,000 x 128, K =
            1,000, 256 GFLOP in 2.29 s on two cores).
        gpu_images_per_s: images of 224 pixels that one GPU trains ResNet-50 on in mixed precision. Assumed: the order
            of what makers of GPUs publish for an A100.
        machine_gpus: GPUs of a machine.
        machine_cpus: CPUs of a machine, besides those of the trainers.
        inside_bytes_per_s: all-reduce between the GPUs of a machine. Assumed.
        between_bytes_per_s: all-reduce between machines with 100 Gbit/s, of each GPU's ring. Assumed.
        store_bytes_per_s: one worker writing to an object store. Assumed.
        batch_per_gpu: images of a step on one GPU (PIRL: 1,024 on 32 GPUs).
        negatives: K.
        dim: of an embedding.
        epochs: visits to every image.
        clusters: of k-means (ClusterFit: 16,000).
        features: numbers of a row that is clustered, after PCA.
        iterations: of k-means.
    """

    data_s: float = 0.0056
    image_bytes: float = 110e3
    kmeans_flops: float = 256e9 / 2.29 / 2
    gpu_images_per_s: float = 2500
    machine_gpus: int = 8
    machine_cpus: int = 88
    inside_bytes_per_s: float = 100 * GB
    between_bytes_per_s: float = 7.5 * GB
    store_bytes_per_s: float = 0.2 * GB
    batch_per_gpu: int = 32
    negatives: int = 32_000
    dim: int = 128
    epochs: float = 100
    clusters: int = 16_000
    features: int = 256
    iterations: int = 20

    @property
    def pixels(self) -> float:
        """An image and its nine patches of 64 pixels, in images of 224."""
        return 1 + 9 * (64 / 224) ** 2

    def reduce_s(self, num_bytes: float, gpus: int) -> float:
        """Sum of a buffer over all GPUs, by rings: each sends nearly twice its size."""
        if gpus == 1:
            return 0.0
        speed = self.inside_bytes_per_s if gpus <= self.machine_gpus else self.between_bytes_per_s
        return 2 * (gpus - 1) / gpus * num_bytes / speed


@dataclass(frozen=True)
class Size:
    """A run of so many images on so many GPUs."""

    images: float
    gpus: int
    costs: Costs

    @property
    def compute_s(self) -> float:
        """Arithmetic of a step."""
        return self.costs.batch_per_gpu * self.costs.pixels / self.costs.gpu_images_per_s

    @property
    def gradients_s(self) -> float:
        """Sum of the gradients of a step, hidden behind the backward pass where it is shorter than that."""
        return self.costs.reduce_s(4 * PARAMETERS, self.gpus)

    @property
    def bank_s(self) -> float:
        """Rows of a sharded bank of a step: negatives and positives, summed over workers of which one has each."""
        rows = self.costs.negatives + self.costs.batch_per_gpu * self.gpus
        return self.costs.reduce_s(4 * rows * self.costs.dim, self.gpus)

    @property
    def trainers_per_s(self) -> float:
        """Images a second that the GPUs take, with a sharded bank."""
        exposed = max(0.0, self.gradients_s - 2 / 3 * self.compute_s)
        return self.costs.batch_per_gpu * self.gpus / (self.compute_s + exposed + self.bank_s)

    @property
    def data_per_s(self) -> float:
        """Images a second that the CPUs of the same machines prepare."""
        cpus = self.costs.machine_cpus * self.gpus / self.costs.machine_gpus
        return cpus / self.costs.data_s

    @property
    def images_per_s(self) -> float:
        """Of the slower of both."""
        return min(self.trainers_per_s, self.data_per_s)

    @property
    def days(self) -> float:
        """Of the whole run."""
        return self.images * self.costs.epochs / self.images_per_s / 86400

    @property
    def bank_bytes(self) -> float:
        """Of all rows in float32."""
        return 4 * self.images * self.costs.dim

    @property
    def checkpoint_s(self) -> float:
        """The slowest worker's writing: weights and momentum by one, a part of the bank by each."""
        return (8 * PARAMETERS + self.bank_bytes / self.gpus) / self.costs.store_bytes_per_s

    @property
    def kmeans_hours(self) -> float:
        """All iterations on the CPUs of as many machines."""
        flops = 2 * self.images * self.costs.clusters * self.costs.features * self.costs.iterations
        machines = max(1.0, self.gpus / self.costs.machine_gpus)
        return flops / (self.costs.kmeans_flops * self.costs.machine_cpus * machines) / 3600


def main(costs: Costs) -> None:
    """Prints the tables."""
    _header("images", "GPUs", "images/s", "time", "bank on a GPU, GB", "checkpoint, s", "k-means, h")
    for images in (1.28e6, 1e8, 1e9):
        for gpus in (1, 8, 32, 256):
            one = Size(images, gpus, costs)
            bank = one.bank_bytes / gpus / GB
            fits = "" if bank < GPU_GB else f" (more than {GPU_GB})"
            took = f"{one.days:,.1f} days" if one.days >= 1 else f"{24 * one.days:.1f} hours"
            print(
                f"| {images:,.0f} | {gpus} | {one.images_per_s:,.0f} | {took} | {bank:,.2f}{fits} | "
                f"{one.checkpoint_s:,.0f} | {one.kmeans_hours:,.2f} |"
            )
    print()
    _header("GPUs", "step, ms", "gradients, ms", "rows of a sharded bank, ms", "CPUs for data of one GPU")
    for gpus in (1, 8, 32, 256):
        one = Size(1e8, gpus, costs)
        times = (one.compute_s, one.gradients_s, one.bank_s)
        cpus = one.trainers_per_s / gpus * costs.data_s
        print(f"| {gpus} | {' | '.join(f'{1e3 * seconds:.1f}' for seconds in times)} | {cpus:.1f} |")
    print()
    _header("GPUs", "requests an image", "bytes read / used", "requests/s", "read, GB/s")
    for gpus in (1, 8, 32, 256):
        images_per_s = Size(1e8, gpus, costs).images_per_s
        requests, amplification = counted(gpus, costs)
        read = images_per_s * amplification * costs.image_bytes / GB
        print(
            f"| {gpus} | {requests:.3f} | {amplification:.2f} | {requests * images_per_s:,.0f} | {read:.2f} |"
        )


def counted(gpus: int, costs: Costs, tasks: int = 8) -> tuple[float, float]:
    """Count the row groups that data tasks read from the plan of a run on 1.28 M photos.

    Returns:
        Requests an image, one for each row group, and bytes that are read over bytes that are used.
    """
    per_group, groups = int(4e6 // costs.image_bytes), 64
    shard = Shard("shard.parquet", (per_group,) * groups, int(per_group * groups * costs.image_bytes))
    manifest = Manifest("photos", (shard,) * round(1.28e6 / (per_group * groups)), (), "", 0)
    plan = Plan.of(
        DataSet(Folder("s3://bucket/photos"), manifest), costs.batch_per_gpu * gpus, 0, costs.epochs
    )
    random = np.random.default_rng(0)
    requests = images = 0
    for _ in range(tasks):
        first, rank = (
            int(random.integers(1, plan.num_steps // plan.steps_per_block - 1)) * plan.steps_per_block,
            random.integers(gpus),
        )
        rows = [
            plan.rows(step, int(rank), gpus).indices_b for step in range(first, first + plan.steps_per_block)
        ]
        taken = np.concatenate(rows)
        requests += len(np.unique(taken // per_group))
        images += len(taken)
    return requests / images, requests * per_group / images


def _header(*columns: str) -> None:
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")


if __name__ == "__main__":
    main(tyro.cli(Costs))

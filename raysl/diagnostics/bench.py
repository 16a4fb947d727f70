"""What the checks of `raysl doctor --gpu` share: their sizes, workers that take real steps, and a clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from raysl.backbone.network import BackboneConfig
from raysl.config import Pretraining, ViewConfig
from raysl.dataset import DataSet
from raysl.ray_cluster.placement import Placement
from raysl.run import Run
from raysl.storage import Folder
from raysl.stream.reader import DataShare
from raysl.training.worker import Job, Worker

Numbers = dict[str, float | int | str | bool]


class Bench:
    """The sizes of the checks, and workers that take real training steps without Ray.

    Args:
        on_gpu: use the GPU with the backbone and image size of PIRL's paper; otherwise the CPU, at a small size.
    """

    def __init__(self, dataset: DataSet, on_gpu: bool) -> None:
        self.dataset = dataset
        self.device = torch.device("cuda:0" if on_gpu else "cpu")
        self.steps = 20 if on_gpu else 2
        self.config = Pretraining(
            data=str(dataset.folder),
            run="-",
            method="pirl-jigsaw",
            # Longer than any check takes, so that no stream ends before.
            epochs=1000,
            batch_size=min(128 if on_gpu else 8, dataset.num_images),
            workers=1,
            precision="bf16" if on_gpu else "fp32",
            view=ViewConfig(224 if on_gpu else 32),
            backbone=BackboneConfig("resnet50" if on_gpu else "small"),
            parts={"pirl": {"num_negatives": min(4096, dataset.num_images - 1)}},
        )

    def worker(self, **changes: Any) -> Worker:
        """Return a training worker on the device with changed fields of the configuration."""
        config = replace(self.config, **changes)
        job = Job(config.to_json(), Run(Folder("-")), self.dataset, Placement(1.0, 1.0, DataShare(), 1))
        return Worker(job, self.device)

    def seconds(self, work: Callable[[], object], times: int | None = None) -> float:
        """Return the mean seconds of work on the device after two runs to warm up."""
        times = times or self.steps
        for _ in range(2):
            work()
        self.finish()
        started = time.perf_counter()
        for _ in range(times):
            work()
        self.finish()
        return (time.perf_counter() - started) / times

    def finish(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

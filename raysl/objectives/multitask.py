"""Multi-task: several pretext tasks on one backbone, each with a head of its own; every batch is one task's.

Doersch and Zisserman, "Multi-task Self-Supervised Visual Learning", arXiv 1708.07860: tasks together give
better features than the best of them alone. Here the head is swapped by batch: a step takes one task, round robin or
drawn by weight from seed and step, and only that task's view is cut and transformed. The heads of other tasks stay as
they are, momentum and weight decay included.

"multitask-rotation,jigsaw" names the tasks. Each is predicted as by `predict`; with weight, labels and Config of its
own transform, and "rotation+jigsaw" among them is one task. Colorization shows its images in grey, which no other
task does: `--multitask.grey` shows all of them so (with `--relative-position.colour-drop none`, which then has
nothing to add).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from raysl import rng
from raysl.contrastive.bank import MemoryBank
from raysl.errors import UserError
from raysl.objectives import Loss, Setup, predict
from raysl.pretext import Grey, Pretext
from raysl.stream.reader import Batch

COMMAND = "raysl pretrain --data DATA --run RUN --method multitask-relative_position,colorization"


@dataclass(frozen=True)
class Config:
    """Hyperparameters of multi-task learning.

    Args:
        weights: how often each task comes, in the order of the method's name, in any unit; none for round robin.
        grey: whether every task sees grey images, as colorization does.
        crop_width: numbers kept of each crop before they are concatenated, as in `predict`.
    """

    weights: tuple[float, ...] = ()
    grey: bool = False
    crop_width: int = 256

    def __post_init__(self) -> None:
        if any(not 0 < weight < float("inf") for weight in self.weights):
            raise UserError(
                f"multitask.weights is {self.weights}; each must be more than 0. Leave a task out of the method's "
                "name to do without it."
            )


class Multitask(nn.Module):
    """One `predict` for each task, and which of them a step takes."""

    predicts = True
    bank_dim = 0
    several = True

    def __init__(self, config: Config, setup: Setup) -> None:
        super().__init__()
        tasks = setup.tasks or {"transformed": setup.transform("multitask", "rotation,jigsaw")}
        if len(config.weights) not in (0, len(tasks)):
            raise UserError(
                f"multitask.weights has {len(config.weights)} values for {len(tasks)} tasks ({', '.join(tasks)}). "
                "Give one for each, or none for round robin."
            )
        self.turns = Turns(tuple(tasks), config.weights, setup.seed)
        self.views: dict[str, Pretext] = {
            name: Grey(transform) if config.grey else transform for name, transform in tasks.items()
        }
        one = predict.Config(crop_width=config.crop_width)
        self.heads = nn.ModuleDict(
            {name: predict.Predict(one, replace(setup, pretext=task)) for name, task in tasks.items()}
        )

    def schedule(self) -> Callable[[int], Collection[str]]:
        """The task of a step."""
        return self.turns

    def forward(self, backbone: nn.Module, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `predict` puts out for the tasks whose views are there, under "task/output"."""
        return {
            f"{task}/{name}": output
            for task in views
            for name, output in self.heads[task](backbone, {"transformed": views[task]}).items()
        }

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch, bank: MemoryBank | None) -> Loss:
        """The loss of the task; of several at once, their sum."""
        found: dict[str, Loss] = {}
        for task in batch.views:
            own = {n.removeprefix(f"{task}/"): x for n, x in outputs.items() if n.startswith(f"{task}/")}
            head: predict.Predict = self.heads[task]  # type: ignore[assignment]
            found[task] = head.loss(own, replace(batch, targets={"transformed": batch.targets[task]}), None)
        metrics = {f"{n}/{task}": x for task, one in found.items() for n, x in one.metrics.items()}
        metrics |= {f"loss/{task}": one.loss.detach() for task, one in found.items()}
        return Loss(torch.stack([one.loss for one in found.values()]).sum(), metrics)


@dataclass(frozen=True)
class Turns:
    """Which task a step takes.

    Args:
        tasks: their names.
        weights: of each; empty for round robin.
        seed: of the run.
    """

    tasks: tuple[str, ...]
    weights: tuple[float, ...]
    seed: int

    def __call__(self, step: int) -> tuple[str]:
        """The one task of a step."""
        if not self.weights:
            return (self.tasks[step % len(self.tasks)],)
        share = np.array(self.weights) / sum(self.weights)
        return (self.tasks[rng.generator(self.seed, "task", step).choice(len(self.tasks), p=share)],)

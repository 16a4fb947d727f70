"""Multi-task: train several pretext tasks on one backbone, each with its own head; a step takes one task.

Doersch and Zisserman, "Multi-task Self-Supervised Visual Learning", arXiv 1708.07860: several tasks together give
better features than the best of them alone. Each step takes one task, round robin or sampled by weight from seed and
step, and makes only the view of that task. The heads of the other tasks stay unchanged, without momentum and weight
decay.

"multitask-rotation,jigsaw" names the tasks; "rotation+jigsaw" among them is one task. Each is predicted as by
`predict`, with the Config of its own transform. Colorization shows gray images and the other tasks do not:
`--multitask.gray` makes all views gray. Then add `--relative-position.color-drop none`: gray images have no colors to
drop.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn

from raysl import rng
from raysl.errors import UserError
from raysl.fields import Bounds, Checked
from raysl.objectives import Base, Batch, Loss, MemoryBank, Setup, predict
from raysl.pretext import Grayscale, Pretext, of_clips

COMMAND = "raysl pretrain --data DATA --run RUN --method multitask-relative_position,colorization"


@dataclass(frozen=True)
class Config(Checked):
    """Hyperparameters of multi-task learning.

    Args:
        weights: relative frequency of each task, > 0, in the order of the method's name; empty for round robin.
        gray: show gray images to every task, as colorization does.
        crop_width: width of the projection of each crop, as in `predict`.
    """

    weights: Annotated[tuple[float, ...], Bounds(above=0, high=1e9)] = ()
    gray: bool = False
    crop_width: Annotated[int, Bounds(1, 65_536)] = 256


class Multitask(Base):
    """One `predict` for each task, and the schedule of the tasks."""

    predicts = True
    several = True

    def __init__(self, config: Config, setup: Setup) -> None:
        super().__init__(config, setup)
        tasks = setup.tasks or {"transformed": setup.transform("multitask", "rotation,jigsaw")}
        if len(config.weights) not in (0, len(tasks)):
            raise UserError(
                f"--multitask.weights has {len(config.weights)} values for {len(tasks)} tasks ({', '.join(tasks)}). "
                "Give one weight for each task, or none for round robin."
            )
        clips = [name for name, transform in tasks.items() if config.gray and of_clips(transform)]
        if clips:
            raise UserError(
                f"--multitask.gray is for tasks of images, and {clips[0]!r} learns from clips. Leave it out."
            )
        self.turns = Turns(tuple(tasks), config.weights, setup.seed)
        self.views: dict[str, Pretext] = {
            name: Grayscale(transform) if config.gray else transform for name, transform in tasks.items()
        }
        one = predict.Config(crop_width=config.crop_width)
        self.heads = nn.ModuleDict(
            {name: predict.Predict(one, replace(setup, pretext=task)) for name, task in tasks.items()}
        )

    @property
    def chance(self) -> float | None:
        """The loss of guessing, averaged over steps; None if a task has none, as colorization."""
        each: list[Any] = [getattr(head, "chance", None) for head in self.heads.values()]
        return None if None in each else float(np.average(each, weights=self.config.weights or None))

    def schedule(self) -> Callable[[int], Collection[str]]:
        """Return the function from a step to its task."""
        return self.turns

    def forward(self, backbone: nn.Module, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the outputs of `predict` for the tasks whose views are given, under "task/output"."""
        return {
            f"{task}/{name}": output
            for task in views
            for name, output in self.heads[task](backbone, {"transformed": views[task]}).items()
        }

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch, bank: MemoryBank | None) -> Loss:
        """Compute the loss of the task, or the sum over tasks when several views are given."""
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
    """The schedule of the tasks.

    Args:
        tasks: names of the tasks.
        weights: relative frequency of each task; empty for round robin.
        seed: seed of the run.
    """

    tasks: tuple[str, ...]
    weights: tuple[float, ...]
    seed: int

    def __call__(self, step: int) -> tuple[str]:
        if not self.weights:
            return (self.tasks[step % len(self.tasks)],)
        share = np.array(self.weights) / sum(self.weights)
        return (self.tasks[rng.generator(self.seed, "task", step).choice(len(self.tasks), p=share)],)

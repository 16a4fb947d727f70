"""Optimisers and learning rate schedules, as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from raysl.errors import UserError


@dataclass(frozen=True)
class OptimConfig:
    """How weights are updated.

    Args:
        name: "sgd" with momentum, or "adamw".
        lr: learning rate for 256 images; scaled linearly by the global batch (patches are not counted).
        momentum: of SGD.
        weight_decay: not applied to biases and normalisation layers.
        schedule: "cosine" from lr to lr / 1000, or "step": times 0.1 at each milestone.
        milestones: shares of the run, in 0..1, for "step".
        warmup: share of the run over which the rate rises linearly from 0, in 0..1.
        clip_norm: largest norm of the gradient; 0 for no limit.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.03
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: Literal["cosine", "step"] = "cosine"
    milestones: tuple[float, ...] = (0.6, 0.8)
    warmup: float = 0.0
    clip_norm: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise UserError(f"optim.lr is {self.lr}; it must be more than 0 (PIRL uses 0.03 for 256 images).")
        if not 0 <= self.warmup < 1:
            raise UserError(f"optim.warmup is {self.warmup}; it is a share of the run, from 0 up to below 1.")
        for name in ("weight_decay", "clip_norm", "momentum"):
            if not getattr(self, name) >= 0:
                raise UserError(f"optim.{name} is {getattr(self, name)}; it must not be negative.")
        if not all(0 <= milestone <= 1 for milestone in self.milestones):
            raise UserError(
                f"optim.milestones is {self.milestones}; each is a share of the run, from 0 to 1, such as 0.6."
            )

    def lr_at(self, step: int, num_steps: int, batch_size: int) -> float:
        """The learning rate of a step (0-based) of a run of `num_steps`.

        Cosine ends at a thousandth of the start, as PIRL's 0.12 to 1.2e-4 (Loshchilov and Hutter 2017 for the form).
        """
        peak = self.lr * batch_size / 256
        done = step / num_steps
        if done < self.warmup:
            return peak * (step + 1) / math.ceil(self.warmup * num_steps)
        if self.schedule == "step":
            return peak * 0.1 ** sum(done >= milestone for milestone in self.milestones)
        share = (done - self.warmup) / (1 - self.warmup)
        floor = peak / 1000
        return floor + (peak - floor) * (1 + math.cos(math.pi * share)) / 2


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Weights of two or more dimensions with decay; biases and normalisation layers without; frozen ones not at all."""
    trained = [p for p in network.parameters() if p.requires_grad]
    decayed: Sequence[nn.Parameter] = [p for p in trained if p.ndim > 1]
    plain: Sequence[nn.Parameter] = [p for p in trained if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def build(config: OptimConfig, network: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of a network; the loop sets the rate before every step."""
    groups = parameter_groups(network, config.weight_decay)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)

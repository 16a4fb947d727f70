"""Optimisers and learning rate schedules, as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import nn

from raysl.errors import UserError
from raysl.fields import Range


@dataclass(frozen=True)
class OptimConfig:
    """How weights are updated.

    Args:
        name: "sgd" with momentum; "lars", which is for batches of thousands (see `Lars`); or "adamw".
        lr: learning rate for 256 images; scaled linearly by the global batch (patches are not counted).
        momentum: of SGD and LARS.
        weight_decay: not applied to biases and normalisation layers.
        schedule: "cosine" from lr to lr / 1000, or "step": times 0.1 at each milestone.
        milestones: shares of the run, in 0..1, for "step".
        warmup: share of the run over which the rate rises linearly, in 0..1.
        warmup_start: where it rises from, as a share of the full rate, in 0..1.
        clip_norm: largest norm of the gradient; 0 for no limit.
    """

    name: Literal["sgd", "lars", "adamw"] = "sgd"
    lr: Annotated[float, Range((0.01, 0.03, 0.12, 0.3), log=True, mutable=True)] = 0.03
    momentum: float = 0.9
    weight_decay: Annotated[float, Range((1e-6, 1e-5, 1e-4, 1e-3), log=True)] = 1e-4
    schedule: Literal["cosine", "step"] = "cosine"
    milestones: tuple[float, ...] = (0.6, 0.8)
    warmup: Annotated[float, Range((0.0, 0.05, 0.1))] = 0.0
    warmup_start: float = 0.0
    clip_norm: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise UserError(f"optim.lr is {self.lr}; it must be more than 0 (PIRL uses 0.03 for 256 images).")
        if not 0 <= self.warmup < 1:
            raise UserError(f"optim.warmup is {self.warmup}; it is a share of the run, from 0 up to below 1.")
        if not 0 <= self.warmup_start <= 1:
            raise UserError(
                f"optim.warmup_start is {self.warmup_start}; it is a share of the full rate, from 0 to 1."
            )
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
            risen = (step + 1) / math.ceil(self.warmup * num_steps)
            return peak * (self.warmup_start + (1 - self.warmup_start) * risen)
        if self.schedule == "step":
            return peak * 0.1 ** sum(done >= milestone for milestone in self.milestones)
        share = (done - self.warmup) / (1 - self.warmup)
        floor = peak / 1000
        return floor + (peak - floor) * (1 + math.cos(math.pi * share)) / 2


class Lars(torch.optim.SGD):
    """SGD in which each weight moves in proportion to its own norm, which batches of thousands of images need.

    You, Gitman and Ginsburg, "Large Batch Training of Convolutional Networks", arXiv 1708.03888: of a weight w with
    gradient g and decay d, the momentum takes up TRUST * |w| / (|g| + d * |w|) * (g + d * w). Biases and normalisation
    layers take ordinary steps.
    """

    TRUST = 0.001

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; it changes the gradients."""
        decays = [group["weight_decay"] for group in self.param_groups]
        for group, decay in zip(self.param_groups, decays, strict=True):
            for weight in group["params"]:
                if weight.ndim > 1 and weight.grad is not None:
                    length = weight.norm()
                    scale = self.TRUST * length / (weight.grad.norm() + decay * length).clamp(min=1e-12)
                    # A weight that is zero would stay so; it takes an ordinary step.
                    scale = torch.where(length > 0, scale, torch.ones_like(scale))
                    weight.grad.add_(weight, alpha=decay).mul_(scale)
                    group["weight_decay"] = 0.0  # it is in the gradient now
        done = super().step(closure)
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        return done


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
    if config.name == "lars":
        return Lars(groups, lr=config.lr, momentum=config.momentum)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)

"""Build optimizers, and compute learning rates as functions of the step."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import nn

from raysl.fields import Bounds, Checked, Range


@dataclass(frozen=True)
class OptimConfig(Checked):
    """Configuration of the optimizer.

    Args:
        name: "sgd" with momentum; "lars", for batches of thousands of images; or "adamw".
        lr: learning rate for a global batch of 256 images, > 0; it is scaled linearly with the batch size. Jigsaw
            patches do not count as images.
        momentum: momentum of SGD and LARS, from 0 to below 1.
        weight_decay: weight decay; biases and normalization layers have none.
        schedule: "cosine" from lr to lr / 1000, or "step": a factor of 0.1 at each milestone.
        milestones: milestones of "step" as fractions of the training steps, 0 to 1.
        warmup: fraction of the training steps in which the learning rate rises linearly, from 0 to below 1.
        warmup_start: learning rate at the start of the warm-up, as a fraction of the full rate, 0 to 1.
        clip_norm: scale the gradient down to this norm where its norm is larger; 0 for no limit.
    """

    name: Literal["sgd", "lars", "adamw"] = "sgd"
    lr: Annotated[
        float,
        Bounds(above=0, high=1e30, hint="PIRL uses 0.03 for 256 images"),
        Range((0.01, 0.03, 0.12, 0.3), log=True, mutable=True),
    ] = 0.03
    momentum: Annotated[float, Bounds(0, below=1)] = 0.9
    weight_decay: Annotated[float, Bounds(0, 10), Range((1e-6, 1e-5, 1e-4, 1e-3), log=True)] = 1e-4
    schedule: Literal["cosine", "step"] = "cosine"
    milestones: Annotated[tuple[float, ...], Bounds(0, 1, hint="a share of the run")] = (0.6, 0.8)
    warmup: Annotated[float, Bounds(0, below=1, hint="a share of the run"), Range((0.0, 0.05, 0.1))] = 0.0
    warmup_start: Annotated[float, Bounds(0, 1, hint="a share of the full rate")] = 0.0
    clip_norm: Annotated[float, Bounds(0, 1e30)] = 0.0

    def lr_at(self, step: int, num_steps: int, batch_size: int) -> float:
        """Return the learning rate of a step (0-based) of a run of `num_steps`.

        Cosine ends at a thousandth of the start, like PIRL's 0.12 to 1.2e-4 (form: Loshchilov and Hutter 2017).
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


def _undecorated(method: Any) -> Any:
    """Return the function of a method without its decorators, if it has any."""
    return inspect.unwrap(method.__func__)


class WithoutCompiler(torch.optim.Optimizer):
    """An optimizer whose methods do not import torch's compiler, which takes about as long as torch itself.

    The decorators of torch's methods import it. They matter only where the step of an optimizer is compiled.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _undecorated(super().add_param_group)(self, param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        _undecorated(super().zero_grad)(self, set_to_none)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = _undecorated(super().state_dict)(self)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        _undecorated(super().load_state_dict)(self, state_dict)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        return _undecorated(super().step)(self, closure)


class Sgd(WithoutCompiler, torch.optim.SGD):
    """torch's SGD, without its compiler."""


class AdamW(WithoutCompiler, torch.optim.AdamW):
    """torch's AdamW, without its compiler."""


class Lbfgs(WithoutCompiler, torch.optim.LBFGS):
    """torch's L-BFGS, without its compiler."""


class Lars(Sgd):
    """SGD with a learning rate per weight, in proportion to its norm, for batches of thousands of images.

    You, Gitman and Ginsburg, "Large Batch Training of Convolutional Networks", arXiv 1708.03888: for a weight w with
    gradient g and decay d, TRUST * |w| / (|g| + d * |w|) * (g + d * w) is added to the momentum. Biases and
    normalization layers take ordinary steps.
    """

    TRUST = 0.001

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step. It changes the gradients."""
        decays = [group["weight_decay"] for group in self.param_groups]
        for group, decay in zip(self.param_groups, decays, strict=True):
            weights = [w for w in group["params"] if w.ndim > 1 and w.grad is not None]
            if not weights:
                continue
            gradients = [weight.grad for weight in weights]
            # The norms of all weights at once take a few kernels on a GPU, not one for each weight.
            lengths_w, steep_w = (torch.stack(torch._foreach_norm(many)) for many in (weights, gradients))
            scales_w = self.TRUST * lengths_w / (steep_w + decay * lengths_w).clamp(min=1e-12)
            # A weight of norm 0 would stay 0, so it takes an ordinary step.
            scales_w = torch.where(lengths_w > 0, scales_w, 1.0)
            torch._foreach_add_(gradients, weights, alpha=decay)
            torch._foreach_mul_(gradients, scales_w.unbind())
            group["weight_decay"] = 0.0  # the gradients contain it
        done = super().step(closure)
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        return done


def build(config: OptimConfig, network: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer of a network, without its frozen weights; biases and normalization layers do not decay.

    The training loop sets the rate before every step.
    """
    trained = [p for p in network.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = any(p.is_cuda for p in network.parameters()) or None
    if config.name == "adamw":
        return AdamW(groups, lr=config.lr, fused=fused)
    if config.name == "lars":
        return Lars(groups, lr=config.lr, momentum=config.momentum)
    optimizer = Sgd(groups, lr=config.lr, momentum=config.momentum, fused=fused)
    if fused and config.momentum:
        # Tasks that alternate leave some weights without momentum, which fused SGD refuses. Zeros change nothing.
        for weight in trained:
            optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    return optimizer

"""Objectives: one file each, found by its name. What is asked of the network, given views of the images.

A file `objectives/foo.py` describes the objective `foo` with

    @dataclass(frozen=True)
    class Config: ...                    its dials
    class Foo(nn.Module): ...            the objective; see `Objective`

A method is an objective and, where it needs one, a pretext transform: "pirl-jigsaw", "predict-rotation", "npid".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from raysl.bank import MemoryBank
from raysl.errors import UserError
from raysl.pretext import Pretext
from raysl.stream.reader import Batch


@dataclass(frozen=True)
class Setup:
    """What an objective may know of the run.

    Args:
        pretext: the transform of the method; None when the method names none.
        identity: the ordinary view.
        width: features of the trunk.
        num_images: N.
        num_classes: of the data set; 0 when it has no labels.
        seed: seed of the run.
        trunk: the network that is trained, for an objective that begins from a copy of it. It is not the objective's
            to keep; the identity stands for it where no copy is needed.
    """

    pretext: Pretext | None
    identity: Pretext
    width: int
    num_images: int
    num_classes: int
    seed: int
    trunk: nn.Module = field(default_factory=nn.Identity)

    def transform(self, objective: str) -> Pretext:
        """The pretext transform. Raises UserError when the method names none."""
        if self.pretext is None:
            raise UserError(
                f"The objective {objective!r} needs a pretext transform, as in '{objective}-jigsaw'."
            )
        return self.pretext

    def no_transform(self, objective: str) -> None:
        """Raises UserError when the method names a pretext transform."""
        if self.pretext is not None:
            raise UserError(
                f"The objective {objective!r} has no use for a pretext transform. Write the method as "
                f"'{objective}', or choose another objective; `raysl methods` shows which combine."
            )


@dataclass
class Loss:
    """What a step gives.

    Args:
        loss: scalar with gradient, the mean over this worker's images.
        metrics: scalars to log, without gradient.
        remember_bd: unit embeddings of the batch for the memory bank; None without a bank.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    remember_bd: Tensor | None = None


class Objective(Protocol):
    """The heads of a method and its loss. An `nn.Module` too.

    Attributes:
        views: the views it needs: their names and the transforms that make them.
        predicts: whether the label of the transform is predicted (the covariant use) or the transform is compared.
        bank_dim: D of the memory bank; 0 when it needs none.
    """

    views: Mapping[str, Pretext]
    predicts: bool
    bank_dim: int

    def __init__(self, config: Any, setup: Setup) -> None: ...

    def forward(self, trunk: nn.Module, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Embeddings or logits from uint8 views (b, p, c, h, w). Every parameter that is trained takes part."""
        ...

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch, bank: MemoryBank | None) -> Loss:
        """The loss of a batch. May use collectives; every worker calls it once a step."""
        ...


@runtime_checkable
class AfterStep(Protocol):
    """What an objective has besides `Objective` when it follows the weights, such as a momentum encoder."""

    def after_step(self, trunk: nn.Module) -> None:
        """Called once after every step of the optimiser, on every worker alike."""
        ...

"""Objectives: one file each, found by its name. What is asked of the network, given views of the images.

A file `objectives/foo.py` describes the objective `foo` with

    @dataclass(frozen=True)
    class Config: ...                    its hyperparameters
    class Foo(nn.Module): ...            the objective; see `Objective`

A method is an objective and, where it needs one, a pretext transform: "pirl-jigsaw", "predict-rotation", "npid". An
objective whose class says `several = True` may be given more of them: "multitask-rotation,jigsaw".
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from raysl.contrastive.bank import MemoryBank
from raysl.errors import UserError
from raysl.pretext import Pretext
from raysl.stream.reader import Batch


@dataclass(frozen=True)
class Setup:
    """What an objective may know of the run.

    Args:
        pretext: the transform of the method; None when the method names none, or several.
        identity: the ordinary view.
        width: features of the backbone.
        num_images: N.
        num_classes: of the data set; 0 when it has no labels.
        seed: seed of the run.
        backbone: the network that is trained, for an objective that begins from a copy of it. It is not the objective's
            to keep; the identity stands for it where no copy is needed.
        tasks: the transforms that the method names, by their names; more than one only for an objective that says
            `several`.
        fingerprint: of the data set; empty when it is not known.
        num_steps: steps of the run, for schedules.
    """

    pretext: Pretext | None
    identity: Pretext
    width: int
    num_images: int
    num_classes: int
    seed: int
    backbone: nn.Module = field(default_factory=nn.Identity)
    tasks: Mapping[str, Pretext] = field(default_factory=dict)
    fingerprint: str = ""
    num_steps: int = 1

    def transform(self, objective: str, example: str = "jigsaw") -> Pretext:
        """The pretext transform. Raises UserError when the method names none."""
        if self.pretext is None:
            raise UserError(
                f"The objective {objective!r} needs a pretext transform, as in '{objective}-{example}'."
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
    bank_update_bd: Tensor | None = None


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

    def forward(self, backbone: nn.Module, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Embeddings or logits from uint8 views (b, p, c, h, w). Every parameter that is trained takes part, but for
        an objective that `Alternates`."""
        ...

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch, bank: MemoryBank | None) -> Loss:
        """The loss of a batch. May use collectives; every worker calls it once a step."""
        ...


@runtime_checkable
class AfterStep(Protocol):
    """What an objective has besides `Objective` when it follows the weights, such as a momentum encoder."""

    def after_step(self, backbone: nn.Module) -> None:
        """Called once after every step of the optimiser, on every worker alike."""
        ...


@runtime_checkable
class Alternates(Protocol):
    """What an objective has besides `Objective` when a step takes some of its views only, such as one task of several.

    Parameters that have no part in a step get no gradient there, and the optimiser leaves them alone.
    """

    def schedule(self) -> Callable[[int], Collection[str]]:
        """The views of a step, by its number: a pure function that pickles small, the same on every worker."""
        ...


class Compares(Protocol):
    """What the class of an objective has besides `Objective` when it learns that an image and its transformed version
    are alike: how alike they have become is measured on its heads too.

    Attributes:
        compared: the views of the image and of its transformed version. `forward` gives their embeddings, (b, d) each,
            under the same names.
    """

    compared: tuple[str, str]


@runtime_checkable
class Describes(Protocol):
    """What an objective has besides `Objective` when its Config alone does not say what it learns from."""

    def describe(self) -> dict[str, Any]:
        """JSON facts for the run's metadata, such as whose labels they are."""
        ...

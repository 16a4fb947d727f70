"""Objectives: one file each, found by its name. An objective turns views of images into a loss.

A file `objectives/foo.py` describes the objective `foo` with

    @dataclass(frozen=True)
    class Config(Checked): ...           its hyperparameters
    class Foo(nn.Module): ...            the objective; see `Objective`, and `Base`

A method is an objective and, where it needs one, a pretext transform: "pirl-jigsaw", "predict-rotation", "npid". An
objective with the class attribute `several = True` takes several transforms: "multitask-rotation,jigsaw".
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from raysl.contrastive.bank import MemoryBank as MemoryBank
from raysl.errors import UserError
from raysl.pretext import Pretext
from raysl.stream.reader import Batch as Batch


@dataclass(frozen=True)
class Setup:
    """Facts of the run that an objective may use.

    Args:
        pretext: the transform of the method; None when the method names none, or several.
        identity: the transform of an ordinary view.
        width: number of features of the backbone.
        num_images: N, images in the data set.
        num_classes: classes of the data set; 0 when it has no labels.
        seed: seed of the run.
        backbone: the network that is trained, for an objective that starts from a copy of it. The objective must not
            keep it. The identity stands in where no copy is needed.
        tasks: the transforms that the method names, by name; more than one only for an objective with `several`.
        fingerprint: fingerprint of the data set; empty when it is not known.
        num_steps: steps of the run, for schedules.
        batch_size: images of a step, of all workers; with `num_images`, the length of an epoch in steps.
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
    batch_size: int = 1

    def transform(self, objective: str, example: str = "jigsaw") -> Pretext:
        """Return the pretext transform. Raise UserError when the method names none."""
        if self.pretext is None:
            raise UserError(
                f"The objective {objective!r} needs a pretext transform, as in '{objective}-{example}'."
            )
        return self.pretext

    def no_transform(self, objective: str) -> None:
        """Raise UserError when the method names a pretext transform."""
        if self.pretext is not None:
            raise UserError(
                f"The objective {objective!r} takes no pretext transform. Write the method as '{objective}', or choose "
                "another objective; `raysl methods` shows which combinations work."
            )


@dataclass
class Loss:
    """The result of a step.

    Args:
        loss: scalar with gradient, the mean over this worker's images.
        metrics: scalars to log, without gradient.
        bank_update_bd: unit embeddings of the batch for the memory bank; None without a bank.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    bank_update_bd: Tensor | None = None


class Objective(Protocol):
    """The heads of a method and its loss. It is an `nn.Module` too.

    Attributes:
        views: the transforms that make the views, by the name of the view.
        predicts: True when the label of the transform is predicted (covariant use), False when the views are compared
            (invariant use).
        bank_dim: D of the memory bank; 0 when it needs none.
        moving_backbone: optional, of the class: name of the attribute that holds a moving average of the backbone.
            Probes measure it as the encoder "momentum".
        chance: optional: a number, the loss of equal scores or of a guess by the frequencies of the labels. A run whose
            loss stays there says so. A class that inherits it and adds terms to the loss sets it to None.
        invariant_views: optional, of the class: the names of the views of an image and of its transformed version that
            the objective learns to embed alike. `forward` returns their embeddings, (b, d) each, under the same names.
            The probe `invariance` measures them.
    """

    views: Mapping[str, Pretext]
    predicts: bool
    bank_dim: int

    def __init__(self, config: Any, setup: Setup) -> None: ...

    def forward(self, backbone: nn.Module, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute embeddings or logits from uint8 views (b, p, c, h, w).

        Every trained parameter takes part, except in an objective that `Alternates`.
        """
        ...

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch, bank: MemoryBank | None) -> Loss:
        """Compute the loss of a batch. It may use collectives: every worker calls it once per step."""
        ...


class Base(nn.Module):
    """Base of an objective with what most have: views that are compared with each other, and no memory bank."""

    predicts = False
    bank_dim = 0

    def __init__(self, config: Any, setup: Setup) -> None:
        super().__init__()
        self.config = config


@runtime_checkable
class AfterStep(Protocol):
    """Optional part of an objective that follows the weights, such as a momentum encoder."""

    def after_step(self, backbone: nn.Module, step: int) -> None:
        """Update the objective after a step of the optimizer. Every worker calls it once per step.

        Args:
            step: number of the step that has just been taken, 0-based.
        """
        ...


@runtime_checkable
class AfterEpoch(Protocol):
    """Optional part of an objective that acts between epochs, such as a new assignment of images to clusters."""

    def after_epoch(self, backbone: nn.Module, epoch: int) -> None:
        """Update the objective after the step that completes an epoch. Every worker calls it once per epoch.

        Args:
            epoch: number of the epoch that has ended, 0-based.
        """
        ...


@runtime_checkable
class ViewRecipes(Protocol):
    """Optional part of an objective with different color recipes for its views.

    Attributes:
        recipes: name of the color recipe (see `raysl.augment.RECIPES`) of a view, by the name of the view. Other views
            have the recipe of the run.
    """

    recipes: Mapping[str, str]


@runtime_checkable
class Alternates(Protocol):
    """Optional part of an objective whose steps take only some of its views, such as one task of several.

    Parameters without a part in a step get no gradient there, and the optimizer leaves them unchanged.
    """

    def schedule(self) -> Callable[[int], Collection[str]]:
        """Return a pure function from the step to the names of its views. It pickles small."""
        ...


@runtime_checkable
class Describes(Protocol):
    """Optional part of an objective that learns from more than its Config says."""

    def describe(self) -> dict[str, Any]:
        """Return JSON facts for the run's metadata, such as the source of the labels."""
        ...

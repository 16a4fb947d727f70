"""Distillation: learn the softened predictions of a trained network, the teacher.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531. With s and t the logits
of student and teacher, y the label of the data set and T the temperature,

    L = alpha * T^2 * KL(softmax(t / T) || softmax(s / T)) + (1 - alpha) * -log softmax(s)_y

where T^2 keeps the scale of the gradient when T changes. alpha = 1 needs no labels; the ClusterFit paper compares with
it, because distillation keeps the teacher's label space and clusters do not.

The teacher is any raysl run whose objective classifies single views: supervised, clusterfit, distill, or predict with
a transform of one crop. Teacher and student see the same view: "distill-rotation" shows both the rotated image. The
teacher is frozen, in evaluation mode, and not saved with the run. It sees views of this run's size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch.nn.functional as F
from torch import Tensor, nn

from raysl.backbone.network import encode
from raysl.errors import MissingValueError, UserError
from raysl.fields import Bounds, Checked, Range
from raysl.objectives import Base, Batch, Loss, MemoryBank, Setup, _teacher

COMMAND = "raysl pretrain --data DATA --run RUN --method distill --distill.teacher TEACHER"


@dataclass(frozen=True)
class Config(Checked):
    """Hyperparameters of distillation.

    Args:
        teacher: folder of the teacher's run, a path or a URI.
        step: step of the teacher's checkpoint; 0 for the newest.
        temperature: T, > 0, softens both predictions (paper: 2.5 to 4 for small students, 8 and more for large ones).
        alpha: weight of the teacher's predictions, in 0..1; the labels of the data set have 1 - alpha (VISSL: 0.1).
    """

    teacher: str = ""
    step: Annotated[int, Bounds(low=0)] = 0
    temperature: Annotated[
        float, Bounds(above=0, high=1000), Range((1.0, 2.0, 4.0, 8.0), log=True, mutable=True)
    ] = 4.0
    alpha: Annotated[float, Bounds(0, 1), Range((0.1, 0.5, 0.9, 1.0), mutable=True)] = 1.0


class Distill(Base):
    """A linear classifier that learns the teacher's prediction for the same view."""

    def __init__(self, config: Config, setup: Setup) -> None:
        super().__init__(config, setup)
        if not config.teacher:
            raise MissingValueError(
                "The objective 'distill' needs a teacher: give the folder of a trained run with --distill.teacher."
            )
        self.views = {"image": setup.pretext or setup.identity}
        self.teacher = _teacher.load(config.teacher, config.step)
        _, _, transforms = self.teacher.method.partition("-")
        if transforms and setup.pretext is None:
            raise UserError(
                f"The teacher at {config.teacher!r} was trained by {self.teacher.method!r} and classifies transformed "
                f"images; for ordinary images its prediction is constant. Write the method as 'distill-{transforms}'."
            )
        classes = self.teacher.num_classes
        if config.alpha < 1 and setup.num_classes != classes:
            raise UserError(
                f"--distill.alpha is {config.alpha}, which uses the labels of the data set, but the teacher has "
                f"{classes} classes and the data set has {setup.num_classes}. Use --distill.alpha 1, or a teacher that "
                "was trained on these labels."
            )
        self.classify = nn.Linear(setup.width, classes)

    def forward(self, backbone: nn.Module, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute logits (b, p, classes) of both; those of the teacher have no gradient."""
        logits_bpk = self.classify(encode(backbone, views["image"]))
        return {"logits": logits_bpk, "teacher": self.teacher.logits(views["image"])}

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch, bank: MemoryBank | None) -> Loss:
        """Compute the loss, averaged over all crops of the batch."""
        student_bpk, teacher_bpk = outputs["logits"].float(), outputs["teacher"].float()
        loss = soft_targets(student_bpk, teacher_bpk, self.config.temperature).mean()
        agree = (student_bpk.argmax(dim=2) == teacher_bpk.argmax(dim=2)).float().mean()
        if self.config.alpha == 1:
            return Loss(loss, {"agreement": agree})
        assert batch.labels_b is not None
        label_bp = batch.labels_b[:, None].expand(student_bpk.shape[:2])
        of_labels = F.cross_entropy(student_bpk.flatten(0, 1), label_bp.flatten())
        metrics = {"agreement": agree, "loss/teacher": loss.detach(), "loss/labels": of_labels.detach()}
        return Loss(self.config.alpha * loss + (1 - self.config.alpha) * of_labels, metrics)

    def describe(self) -> dict[str, Any]:
        """Return run, step and checksum of the teacher."""
        return {"teacher": self.teacher.metadata}


def soft_targets(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Compute T^2 * KL(softmax(teacher / T) || softmax(student / T)) over the last axis.

    Args:
        student: logits, float32 (..., classes).
        temperature: T, > 0.

    Returns:
        (...).
    """
    log_s, log_t = (F.log_softmax(logits / temperature, dim=-1) for logits in (student, teacher))
    return temperature**2 * (log_t.exp() * (log_t - log_s)).sum(dim=-1)

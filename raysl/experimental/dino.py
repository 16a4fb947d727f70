"""DINO: predict the output distribution of a momentum encoder for ordinary views from other views.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", arXiv 2104.14294. With g_s and g_t the
outputs (K numbers) of student and teacher for a view and c the center,

    P_t = softmax((g_t - c) / tau_t), P_s = softmax(g_s / tau_s)                                         (eq. 1)
    L = mean over the two ordinary views x and all other views x' of -sum P_t(x) log P_s(x')              (eq. 3)
    c <- m_c * c + (1 - m_c) * mean of g_t over the global batch                                         (eq. 4)
    teacher weights <- m * teacher weights + (1 - m) * student weights, after every step

with m rising from `momentum` to 1 on a cosine. tau_t rises linearly over the warm-up. Published with ViT-S/16, 800
epochs of ImageNet, 2 ordinary and 10 small views: 77.0 % top-1 of a linear probe and 74.5 % of kNN; with ResNet-50
75.3 and 67.5 %. The frozen last layer of the first epoch is left out.

"dino" compares two ordinary views. "dino-multi_crop" adds `crops` small views for the student. A backbone such as
`--backbone.name timm/vit_small_patch16_224` takes views of several sizes. The paper's colors are those of BYOL:
`--view.recipe byol_a`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysl.backbone.network import encode_views
from raysl.communication import collective
from raysl.fields import Bounds, Checked, Range
from raysl.objectives import Base, Batch, Loss, MemoryBank, Setup
from raysl.objectives._heads import ema_update, frozen_copy, rising_momentum

_Temperature = Annotated[float, Bounds(above=0, high=100)]


@dataclass(frozen=True)
class Config(Checked):
    """Hyperparameters of DINO.

    Args:
        student_temperature: tau_s, > 0 (paper: 0.1).
        teacher_temperature: tau_t after the warm-up, > 0 (paper: 0.07).
        first_temperature: tau_t at the first step, > 0 (paper: 0.04).
        warmup: share of the run in which tau_t rises, in 0..1 (paper: 30 of 800 epochs).
        momentum: first momentum of the teacher, in 0..1 (paper: 0.996).
        center_momentum: m_c, in 0..1 (paper: 0.9).
        outputs: K, size of the output (paper: 65,536).
        crops: additional student views of the method's transform, such as multi_crop (paper: 10).
        hidden: width of the hidden layers of the head (paper: 2,048).
        bottleneck: width of the layer before the output (paper: 256).
    """

    student_temperature: _Temperature = 0.1
    teacher_temperature: Annotated[
        float, Bounds(above=0, high=100), Range((0.04, 0.05, 0.07), log=True, mutable=True)
    ] = 0.04
    first_temperature: _Temperature = 0.04
    warmup: Annotated[float, Bounds(0, 1)] = 0.04
    momentum: Annotated[float, Bounds(0, 1), Range((0.9, 0.97, 0.99, 0.996))] = 0.99
    center_momentum: Annotated[float, Bounds(0, 1), Range((0.9, 0.99))] = 0.9
    outputs: Annotated[int, Bounds(2, 1_048_576), Range((256, 1024, 4096), log=True)] = 1024
    crops: Annotated[int, Bounds(1, 32)] = 4
    hidden: Annotated[int, Bounds(1, 65_536)] = 512
    bottleneck: Annotated[int, Bounds(1, 16_384)] = 128


class Dino(Base):
    """The student's head, the teacher, and the center of its outputs."""

    moving_backbone = "teacher_backbone"
    center_k: Tensor
    temperature: Tensor

    def __init__(self, config: Config, setup: Setup) -> None:
        super().__init__(config, setup)
        self.num_steps = setup.num_steps
        small = {f"small_{i}": setup.pretext for i in range(config.crops)} if setup.pretext else {}
        # Ordinary views last: the running statistics of BatchNorm then end on whole images.
        self.views = {**small, "b": setup.identity, "a": setup.identity}
        self.head = _Head(setup.width, config)
        self.teacher_backbone = frozen_copy(setup.backbone)
        self.teacher_head = frozen_copy(self.head)
        self.register_buffer("center_k", torch.zeros(config.outputs))
        self.register_buffer("temperature", torch.tensor(self._temperature(0)))

    def forward(self, backbone: nn.Module, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the student's outputs (b, v, k), small views first, and the teacher's (b, 2, k)."""
        student = encode_views(backbone, [views[name] for name in self.views])
        with torch.no_grad():
            teacher = encode_views(self.teacher_backbone, [views["b"], views["a"]])
            teacher_b2k = torch.stack([self.teacher_head(f.mean(dim=1)) for f in teacher], dim=1)
        student_bvk = torch.stack([self.head(f.mean(dim=1)) for f in student], dim=1)
        return {"student": student_bvk, "teacher": teacher_b2k}

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch, bank: MemoryBank | None) -> Loss:
        """Compute equation 3, averaged over the batch. Then move the center: equation 4."""
        student_bvk, teacher_b2k = outputs["student"].float(), outputs["teacher"].float()
        targets_b2k = F.softmax((teacher_b2k - self.center_k) / self.temperature, dim=2)
        log_p_bvk = F.log_softmax(student_bvk / self.config.student_temperature, dim=2)
        v = student_bvk.shape[1]
        pairs = [(i, t) for i in range(2) for t in range(v) if t != v - 2 + i]
        terms = [-(targets_b2k[:, i] * log_p_bvk[:, t]).sum(dim=1).mean() for i, t in pairs]
        mean_k = collective.mean(teacher_b2k.mean(dim=(0, 1)))
        self.center_k = self.center_k.lerp(mean_k, 1 - self.config.center_momentum)
        entropy = torch.special.entr(targets_b2k).sum(dim=2).mean()
        return Loss(torch.stack(terms).mean(), {"teacher_entropy": entropy})

    def after_step(self, backbone: nn.Module, step: int) -> None:
        """Move the teacher, and set its temperature for the next step."""
        momentum = rising_momentum(self.config.momentum, step, self.num_steps)
        ema_update(self.teacher_backbone, backbone, momentum)
        ema_update(self.teacher_head, self.head, momentum)
        self.temperature.fill_(self._temperature(step + 1))

    def _temperature(self, step: int) -> float:
        """Return tau_t of a step."""
        config: Config = self.config
        rise = config.teacher_temperature - config.first_temperature
        return config.first_temperature + rise * min(1.0, step / max(1.0, config.warmup * self.num_steps))


class _Head(nn.Module):
    """Three linear layers with GELU, a unit-length bottleneck, and unit-length output weights (appendix C)."""

    def __init__(self, width: int, config: Config) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.bottleneck),
        )
        self.weight_kd = nn.Parameter(torch.randn(config.outputs, config.bottleneck))

    def forward(self, features_bd: Tensor) -> Tensor:
        bottleneck_bd = F.normalize(self.layers(features_bd).float(), dim=1)
        return F.linear(bottleneck_bd, F.normalize(self.weight_kd, dim=1))

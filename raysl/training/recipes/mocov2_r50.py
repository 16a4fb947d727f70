"""MoCo v2, ResNet-50, 200 epochs of ImageNet: 67.7 % top-1 of a linear probe.

Chen et al., "Improved Baselines with Momentum Contrastive Learning", arXiv 2003.04297, as in the authors' code: MLP
head, blur, cosine schedule, and a queue of 65,536 keys. With `--epochs 800`: 71.1 %.

Hardware: 8 GPUs with two views of 32 images of 224 pixels each.

Differences from the authors' code: older keys of the query's own image in the queue are no negatives, biases and
normalization layers do not decay, and the rate ends at a thousandth of its peak and not at zero.
"""

from __future__ import annotations

from raysl.config import ViewConfig
from raysl.objectives.moco import Config
from raysl.optim import OptimConfig
from raysl.training.recipes._imagenet import resnet50

_VIEW = ViewConfig(min_scale=0.2, recipe="mocov2")
_OPTIM = OptimConfig("sgd", lr=0.03, momentum=0.9, weight_decay=1e-4, schedule="cosine")
_PARTS = {"moco": Config(momentum=0.999, queue=65_536, temperature=0.2, dim=128, head="mlp")}
CONFIG = resnet50("moco", epochs=200, batch_size=256, view=_VIEW, optim=_OPTIM, parts=_PARTS)

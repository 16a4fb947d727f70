"""MoCo v2, ResNet-50, 200 epochs of ImageNet: 67.7 % top-1 of a linear probe.

Chen et al., "Improved Baselines with Momentum Contrastive Learning", arXiv 2003.04297, as in the authors' code: MLP
head, blur, cosine schedule, and a queue of 65,536 keys. With `--epochs 800`: 71.1 %.

Hardware: 8 GPUs with two views of 32 images of 224 pixels each.

Differences from the authors' code: older keys of the query's own image in the queue are no negatives, biases and
normalisation layers do not decay, and the rate ends at a thousandth of its peak and not at zero.
"""

from __future__ import annotations

from raysl.backbone.network import BackboneConfig
from raysl.config import Pretraining, ViewConfig
from raysl.objectives.moco import Config
from raysl.optim import OptimConfig

# The data are the 1,281,167 training images of ImageNet-1k.
CONFIG = Pretraining(
    data="",
    run="",
    method="moco",
    epochs=200,
    batch_size=256,
    workers=8,
    view=ViewConfig(image_size=224, min_scale=0.2, recipe="mocov2"),
    backbone=BackboneConfig("resnet50"),
    optim=OptimConfig("sgd", lr=0.03, momentum=0.9, weight_decay=1e-4, schedule="cosine"),
    parts={"moco": Config(momentum=0.999, queue=65_536, temperature=0.2, dim=128, head="mlp")},
)

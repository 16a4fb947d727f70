"""SimCLR, ResNet-50, 800 epochs of ImageNet in batches of 4,096: 69.7 % top-1 of a linear probe.

Chen et al., arXiv 2002.05709; configuration and result are VISSL's (64.4, 66.6 and 67.7 % after 100, 200 and 400
epochs: `--epochs 100 --optim.warmup 0.1` and so on, because the warm-up is 10 epochs).

Hardware: two views of 4,096 images in each step, with BatchNorm statistics over all of them, for example 64 GPUs with
two views of 64 images of 224 pixels each.

Differences from VISSL: BatchNorm statistics are those of one view of all images (VISSL: both views, in groups of 8
GPUs); biases and normalization layers do not decay and take ordinary steps; the rate ends at a thousandth of its peak
and not at zero.
"""

from __future__ import annotations

from raysl.backbone.network import BackboneConfig
from raysl.config import ViewConfig
from raysl.objectives.simclr import Config
from raysl.optim import OptimConfig
from raysl.training.recipes._imagenet import resnet50

_VIEW = ViewConfig(min_scale=0.08, recipe="simclr")
_BACKBONE = BackboneConfig("resnet50", norm="sync")
_OPTIM = OptimConfig("lars", lr=0.3, momentum=0.9, weight_decay=1e-6, schedule="cosine", warmup=10 / 800)
_PARTS = {"simclr": Config(temperature=0.1, dim=128, head="mlp")}
CONFIG = resnet50("simclr", 800, 4096, _VIEW, workers=64, backbone=_BACKBONE, optim=_OPTIM, parts=_PARTS)

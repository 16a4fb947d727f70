"""Rotation prediction (RotNet), ResNet-50, 105 epochs of ImageNet: 48.2 % top-1 of a linear probe.

Gidaris, Singh and Komodakis, arXiv 1803.07728, on a ResNet; configuration and result are VISSL's. The PIRL paper
compares with 48.9 %.

Hardware: 8 GPUs with 32 images of 224 pixels each.

Differences from VISSL: images are rotated after the crop, as in the authors' code, and biases do not decay.
"""

from __future__ import annotations

from raysl.backbone.network import BackboneConfig
from raysl.config import Pretraining, ViewConfig
from raysl.training.recipes import _goyal

# The data are the 1,281,167 training images of ImageNet-1k.
CONFIG = Pretraining(
    data="",
    run="",
    method="predict-rotation",
    epochs=_goyal.EPOCHS,
    batch_size=256,
    workers=8,
    view=ViewConfig(image_size=224, min_scale=0.08, recipe="plain"),
    backbone=BackboneConfig("resnet50"),
    optim=_goyal.optim(),
)

"""Rotation prediction (RotNet), ResNet-50, 105 epochs of ImageNet: 48.2 % top-1 of a linear probe (VISSL).

Gidaris, Singh and Komodakis, arXiv 1803.07728, on a ResNet; configuration and result are VISSL's. The PIRL paper
compares with 48.9 %.

Hardware: 8 GPUs with 32 images of 224 pixels each.

Differences from VISSL: images are rotated after the crop, as in the authors' code, and biases do not decay.
"""

from __future__ import annotations

from raysl.config import ViewConfig
from raysl.training.recipes import _goyal
from raysl.training.recipes._imagenet import resnet50

_VIEW = ViewConfig(min_scale=0.08, recipe="plain")
CONFIG = resnet50("predict-rotation", _goyal.EPOCHS, batch_size=256, view=_VIEW, optim=_goyal.optim())

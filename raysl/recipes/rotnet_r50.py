"""Rotation predicted (RotNet), ResNet-50, 105 epochs of ImageNet: 48.2 % top-1 of a linear probe.

Gidaris, Singh and Komodakis, arXiv 1803.07728, on a ResNet: VISSL's configuration and its result. The PIRL paper
compares with 48.9 %.

Hardware: 8 GPUs with 32 images of 224 pixels each.

Where raysl does otherwise: images are turned after they are cropped, as in the authors' own code, and biases do not
decay.
"""

from __future__ import annotations

from raysl.backbone.network import BackboneConfig
from raysl.config import Pretraining, ViewConfig
from raysl.optim import OptimConfig

_EPOCHS = 105


def pretraining(data: str, run: str) -> Pretraining:
    """The configuration; the data are the 1,281,167 training images of ImageNet-1k."""
    return Pretraining(
        data=data,
        run=run,
        method="predict-rotation",
        epochs=_EPOCHS,
        batch_size=256,
        workers=8,
        view=ViewConfig(image_size=224, min_scale=0.08, recipe="plain"),
        backbone=BackboneConfig("resnet50"),
        optim=OptimConfig(
            "sgd",
            lr=0.1,
            momentum=0.9,
            weight_decay=1e-4,
            schedule="step",
            milestones=(30 / _EPOCHS, 60 / _EPOCHS, 90 / _EPOCHS, 100 / _EPOCHS),
        ),
    )

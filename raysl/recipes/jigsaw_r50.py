"""Jigsaw predicted, ResNet-50, 105 epochs of ImageNet: 46.7 % top-1 of a linear probe with 2,000 orders.

Noroozi and Favaro, arXiv 1603.09246, on a ResNet as in Goyal et al., arXiv 1905.01235; this is VISSL's configuration
and its result (48.6 % with 100 orders, 48.1 % with 10,000). The PIRL paper compares with 45.7 %.

Hardware: 8 GPUs with 288 patches of 64 pixels each.

Where raysl does otherwise: the crop that is cut shows 60 % to 100 % of the image rather than a square from its whole
height or width, and biases do not decay. Choosing the orders takes each process about a minute.
"""

from __future__ import annotations

from raysl.backbone.network import BackboneConfig
from raysl.config import Pretraining, ViewConfig
from raysl.objectives import predict
from raysl.optim import OptimConfig
from raysl.pretext import jigsaw

_EPOCHS = 105


def pretraining(data: str, run: str) -> Pretraining:
    """The configuration; the data are the 1,281,167 training images of ImageNet-1k."""
    return Pretraining(
        data=data,
        run=run,
        method="predict-jigsaw",
        epochs=_EPOCHS,
        batch_size=256,
        workers=8,
        view=ViewConfig(image_size=224, recipe="gray"),
        backbone=BackboneConfig("resnet50"),
        optim=OptimConfig(
            "sgd",
            lr=0.1,
            momentum=0.9,
            weight_decay=1e-4,
            schedule="step",
            milestones=(30 / _EPOCHS, 60 / _EPOCHS, 90 / _EPOCHS, 100 / _EPOCHS),
            warmup=5 / _EPOCHS,
            warmup_start=0.25,
        ),
        parts={
            "predict": predict.Config(crop_width=1000),
            "jigsaw": jigsaw.Config(num_permutations=2000, criterion="max_avg", per_patch_colour=False),
        },
    )

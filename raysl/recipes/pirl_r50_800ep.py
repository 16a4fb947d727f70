"""PIRL with a jigsaw, ResNet-50, 800 epochs of ImageNet: 63.6 % top-1 of a linear probe.

Misra and van der Maaten, "Self-Supervised Learning of Pretext-Invariant Representations", arXiv 1912.01991, section 3;
what the paper leaves open is as in VISSL, whose own run of it reached 64.3 %. All 9! orders of the jigsaw, 32,000
negatives drawn for each image.

Hardware: 32 GPUs with 32 images of 224 pixels and 288 patches of 64 each; the memory bank is 656 MB on every one.

Where raysl does otherwise: the rate falls with every step and not with every epoch, and the negatives leave out the
image itself, as in the equations.
"""

from __future__ import annotations

from raysl.backbone.network import BackboneConfig
from raysl.config import Pretraining, ViewConfig
from raysl.objectives.pirl import Config
from raysl.optim import OptimConfig


def pretraining(data: str, run: str) -> Pretraining:
    """The configuration; the data are the 1,281,167 training images of ImageNet-1k."""
    return Pretraining(
        data=data,
        run=run,
        method="pirl-jigsaw",
        epochs=800,
        batch_size=1024,
        workers=32,
        view=ViewConfig(image_size=224, min_scale=0.08, recipe="pirl"),
        backbone=BackboneConfig("resnet50"),
        optim=OptimConfig("sgd", lr=0.03, momentum=0.9, weight_decay=1e-4, schedule="cosine"),
        parts={"pirl": Config(temperature=0.07, num_negatives=32_000, loss="nce", negatives="own", lam=0.5)},
    )

"""Instance discrimination (NPID), ResNet-50, 200 epochs of ImageNet: 54.0 % top-1 of a linear probe.

Wu et al., arXiv 1805.01978, as in the authors' code; the result is quoted from the PIRL paper. A kNN probe with 200
neighbors in their code has 46.8 %. With `--epochs 800 --batch-size 1024 --npid.num-negatives 32000
--optim.schedule cosine --view.min-scale 0.08 --view.recipe pirl` it is the "NPID++" of the PIRL paper: 59.0 %.

Hardware: 8 GPUs with 32 images of 224 pixels each; the memory bank is 656 MB on each.

Differences from the authors' code: the negatives leave out the image itself, biases do not decay, and the initial rows
of the memory bank have length 1.
"""

from __future__ import annotations

from raysl.config import ViewConfig
from raysl.objectives.npid import Config
from raysl.optim import OptimConfig
from raysl.training.recipes._imagenet import resnet50

_VIEW = ViewConfig(min_scale=0.2, recipe="npid")
_OPTIM = OptimConfig("sgd", lr=0.03, momentum=0.9, weight_decay=1e-4, schedule="step", milestones=(0.6, 0.8))
_PARTS = {"npid": Config(temperature=0.07, num_negatives=4096, loss="nce", negatives="own")}
CONFIG = resnet50("npid", epochs=200, batch_size=256, view=_VIEW, optim=_OPTIM, parts=_PARTS)

"""Jigsaw prediction, ResNet-50, 105 epochs of ImageNet, 2,000 permutations: 46.7 % top-1 of a linear probe (VISSL).

Noroozi and Favaro, arXiv 1603.09246, on a ResNet as in Goyal et al., arXiv 1905.01235; configuration and result are
VISSL's (48.6 % with 100 permutations, 48.1 % with 10,000). The PIRL paper compares with 45.7 %.

Hardware: 8 GPUs with 288 patches of 64 pixels each.

Differences from VISSL: the source crop shows 60 % to 100 % of the image (VISSL: a square of its whole height or width),
and biases do not decay. Choosing the permutations takes about a minute in each process.
"""

from __future__ import annotations

from raysl.config import ViewConfig
from raysl.objectives import predict
from raysl.pretext import jigsaw
from raysl.training.recipes import _goyal
from raysl.training.recipes._imagenet import resnet50

_VIEW = ViewConfig(recipe="gray")
_OPTIM = _goyal.optim(warmup_epochs=5, warmup_start=0.25)
_PARTS = {
    "predict": predict.Config(crop_width=1000),
    "jigsaw": jigsaw.Config(num_permutations=2000, criterion="max_avg", per_patch_color=False),
}
CONFIG = resnet50("predict-jigsaw", _goyal.EPOCHS, batch_size=256, view=_VIEW, optim=_OPTIM, parts=_PARTS)

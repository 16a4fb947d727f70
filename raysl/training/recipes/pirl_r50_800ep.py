"""PIRL with a jigsaw, ResNet-50, 800 epochs of ImageNet: 63.6 % top-1 of a linear probe.

Misra and van der Maaten, "Self-Supervised Learning of Pretext-Invariant Representations", arXiv 1912.01991, section 3;
details that the paper leaves open are VISSL's, whose own run reached 64.3 %. All 9! permutations of the jigsaw, 32,000
negatives for each image.

Hardware: 32 GPUs with 32 images of 224 pixels and 288 patches of 64 pixels each; the memory bank is 656 MB on each.

Differences from VISSL:

- The rate falls with every step (VISSL: every epoch).
- The negatives leave out the image itself, as in the equations (VISSL: they may include it).
- Both terms of the loss share their negatives, as in PyContrast (VISSL: samples them for each term).
- The NCE loss has no epsilon in its denominators (VISSL: 1.2e-7), a relative difference of 4e-4 at the start.
- The initial rows of the memory bank have length 1 (VISSL: they are not normalized).
- Biases do not decay (VISSL: only normalization layers do not).
- The source image is flipped before it is cut, all patches alike (VISSL: each patch by itself).
- Color jitter is one affine map without clamping and hue rotates in YIQ (VISSL: four steps in random order, hue in
  HSV).
- Grayscale comes before the photometric block (VISSL: last).
- Patch offsets in a cell are 0 to 21 pixels (VISSL: 0 to 20).
"""

from __future__ import annotations

from raysl.config import ViewConfig
from raysl.objectives.pirl import Config
from raysl.optim import OptimConfig
from raysl.training.recipes._imagenet import resnet50

_VIEW = ViewConfig(min_scale=0.08, recipe="pirl")
_OPTIM = OptimConfig("sgd", lr=0.03, momentum=0.9, weight_decay=1e-4, schedule="cosine")
_PARTS = {"pirl": Config(temperature=0.07, num_negatives=32_000, loss="nce", negatives="own", lam=0.5)}
CONFIG = resnet50("pirl-jigsaw", epochs=800, batch_size=1024, view=_VIEW, optim=_OPTIM, parts=_PARTS)

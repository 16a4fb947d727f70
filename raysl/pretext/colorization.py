"""Colorization: show the image in gray; the target is its colors.

Zhang, Isola and Efros 2016, "Colorful image colorization": the network sees the lightness L and predicts the colors a
and b, as a distribution over bins of the ab plane, because the mean of several likely colors is gray. Here it predicts
the cells of a coarse grid from pooled features; the paper uses the spatial map. With bins q, the soft assignment p of
the true color to the bins, w the weight of the nearest bin, and s the output of the head,

    L = -mean over cells of w * sum over q of p_q log softmax(s)_q                        (eq. 2)

Linear ImageNet top-1 of a ResNet-50: 39.6 (Goyal et al. 2019).

With `step` 10 there are 259 bins (paper: 313), and the prior of a bin is exp(-chroma / prior_chroma), where the paper
counts it on ImageNet. The color recipe is applied first and changes the target too: a recipe that rotates hues or drops
colors leaves less to predict, so use `--view.recipe plain`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from raysl.communication.device_copy import to_device
from raysl.fields import Bounds, Checked
from raysl.pretext import Geometry, Transformed, _colors
from raysl.pretext._dense import DenseTransform, Grid
from raysl.rng import ImageRng

# The standard deviation of a and b in photographs, so that a regression starts with a loss near 1.
_AB_UNIT = 12.0


@dataclass(frozen=True)
class Config(Checked):
    """Hyperparameters of colorization.

    Args:
        mode: "classify" predicts a distribution over bins of the ab plane; "regress" predicts a and b, with the
            squared error.
        grid: cells per side of the target, an even number.
        step: side of a bin in units of a and b; smaller is harder (paper: 10).
        neighbors: number of bins that share the probability of a color.
        sigma: standard deviation of the Gaussian weights of these bins, in units of a and b.
        rebalance: share of the uniform distribution in the prior whose inverse weights the bins, in 0..1; with 1 all
            weights are equal.
        prior_chroma: scale of the prior exp(-chroma / prior_chroma) of a color; 8 fits small photographs (CIFAR-10).
    """

    mode: Literal["classify", "regress"] = "classify"
    grid: Grid = 8
    step: Annotated[int, Bounds(2, 50, hint="the paper uses 10")] = 10
    neighbors: Annotated[int, Bounds(1, 16)] = 5
    sigma: Annotated[float, Bounds(above=0, high=1000)] = 5.0
    rebalance: Annotated[float, Bounds(above=0, high=1)] = 0.5
    prior_chroma: Annotated[float, Bounds(above=0, high=1000)] = 8.0


class Colorization(DenseTransform):
    """The lightness in all three channels, with the mean color of each cell as the target."""

    def __init__(self, config: Config, geometry: Geometry) -> None:
        super().__init__("colorization", config, geometry)
        self.bins_q2 = _colors.gamut(config.step)
        self.weights_q = rebalancing(self.bins_q2, config.prior_chroma, config.rebalance)

    def transform(self, images_bchw: Tensor, image_rng: ImageRng) -> Transformed:
        """Return gray crops (b, 1, 3, h, w) and the target a + 128, b + 128, uint8 (b, 2, grid, grid)."""
        light_bchw = _colors.linear(images_bchw)
        gray_b1hw = _colors.lightness(light_bchw)
        target_b2gg = _colors.chroma(self.cell_means(light_bchw))
        return Transformed(gray_b1hw.expand(-1, 3, -1, -1).contiguous()[:, None], target_b2gg)

    def head(self, width: int) -> nn.Module:
        """Build a head that outputs logits of the bins, or a and b, for every cell."""
        channels = len(self.bins_q2) if self.config.mode == "classify" else 2
        return self.decoder(width, channels)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Compute the cross-entropy with the soft bins, weighted by the rarity of the color; or the squared error."""
        ab_n2 = target.movedim(1, -1).flatten(0, 2).float() - 128
        output_nq = output.movedim(1, -1).flatten(0, 2)
        if self.config.mode == "regress":
            return (output_nq - ab_n2 / _AB_UNIT).square().mean()
        bin_nk, share_nk = self.soft_bins(ab_n2)
        log_nk = output_nq.log_softmax(1).gather(1, bin_nk)
        weight_n = to_device(self.weights_q, output.device)[bin_nk[:, 0]]
        return -(weight_n * (share_nk * log_nk).sum(1)).mean()

    def soft_bins(self, ab_n2: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nearest bins, int64 (n, k), nearest first, and their probabilities."""
        bins_q2 = to_device(self.bins_q2, ab_n2.device)
        far_nq = torch.cdist(ab_n2, bins_q2, compute_mode="donot_use_mm_for_euclid_dist")
        far_nk, bin_nk = far_nq.topk(min(self.config.neighbors, len(bins_q2)), largest=False)
        return bin_nk, (-far_nk.square() / (2 * self.config.sigma**2)).softmax(1)

    def describe(self) -> dict[str, Any]:
        """Return the number of bins, and the smallest and largest weight."""
        low, high = (round(float(weight), 4) for weight in self.weights_q.aminmax())
        return {"num_bins": len(self.bins_q2), "bin_weights": [low, high]}


def rebalancing(bins_q2: Tensor, chroma: float, uniform: float) -> Tensor:
    """Return weights of the bins, float32 (q,), with mean 1 under the prior exp(-|ab| / chroma) (paper, section 2.2).

    Args:
        bins_q2: centers of the bins.
        chroma: scale of the prior.
        uniform: share of the uniform distribution that is mixed in before inverting.
    """
    prior_q: Tensor = (-torch.linalg.vector_norm(bins_q2.double(), dim=1) / chroma).softmax(0)
    weights_q = 1 / ((1 - uniform) * prior_q + uniform / len(bins_q2))
    return (weights_q / (prior_q * weights_q).sum()).float()

"""Colorization: the image in grey; the target is its colours.

Zhang, Isola and Efros 2016, "Colorful image colorization": the network sees the lightness L and tells the colours
a and b, as a distribution over bins of the ab plane, because the mean of several likely colours is grey. Here for the
cells of a coarse grid, from pooled features, where the paper has the spatial map. With q the bins, p the share of
the true colour that falls to each, w the weight of the bin nearest to it, and s what the head puts out,

    L = -mean over cells of w * sum over q of p_q log softmax(s)_q                        (eq. 2)

Linear ImageNet top-1 of a ResNet-50: 39.6 (Goyal et al. 2019).

The photometric recipe comes first and changes the target with the image: one that turns hues or drops colour leaves
less to predict, so "plain" suits this transform.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from raysl.augment import SourceCrop
from raysl.errors import UserError
from raysl.pretext import Geometry, Transformed, _cells, _lab
from raysl.rng import ImageRng

# About the spread of a and of b in photographs, so that a regression starts with a loss near one.
_AB_UNIT = 12.0


@dataclass(frozen=True)
class Config:
    """Hyperparameters of colorization.

    Args:
        mode: "classify" predicts a distribution over bins of the ab plane; "regress" predicts a and b, with the
            squared error.
        grid: cells per side of the target, an even number.
        step: side of a bin in units of a and b; smaller is harder (the paper: 10; Goyal et al. vary it).
        neighbours: bins that share the probability of one colour.
        sigma: width of the Gaussian over distances by which they share it.
        rebalance: share of the uniform distribution in the prior whose inverse weighs the bins; 1 weighs all alike.
        prior_chroma: the prior of a colour falls as exp(-chroma / prior_chroma), for natural photographs; 8 fits
            small photographs (CIFAR-10) best.
    """

    mode: Literal["classify", "regress"] = "classify"
    grid: int = 8
    step: int = 10
    neighbours: int = 5
    sigma: float = 5.0
    rebalance: float = 0.5
    prior_chroma: float = 8.0

    def __post_init__(self) -> None:
        if not 2 <= self.step <= 50:
            raise UserError(f"colorization.step is {self.step}; it must be 2 to 50 (the paper uses 10).")
        if not 1 <= self.neighbours <= 16:
            raise UserError(f"colorization.neighbours is {self.neighbours}; it must be 1 to 16.")
        if not 0 < self.rebalance <= 1:
            raise UserError(
                f"colorization.rebalance is {self.rebalance}; it must be above 0 and at most 1, which is none."
            )
        for name in ("sigma", "prior_chroma"):
            if not getattr(self, name) > 0:
                raise UserError(f"colorization.{name} is {getattr(self, name)}; it must be above 0.")


class Colorization:
    """The lightness, three times, with the mean colour of each cell as the target."""

    num_crops = 1
    num_labels = 0
    colour: Literal["crops", "source", "none"] = "source"

    def __init__(self, config: Config, geometry: Geometry) -> None:
        _cells.check("colorization", config.grid, geometry.image_size)
        self.config = config
        self.source = SourceCrop(geometry.image_size, geometry.min_scale)
        self.bins_q2 = _lab.gamut(config.step)
        self.weights_q = rebalancing(self.bins_q2, config.prior_chroma, config.rebalance)

    def transform(self, images_bchw: Tensor, image_rng: ImageRng) -> Transformed:
        """The crop (b, 1, 3, h, w) in grey; the target, uint8 (b, 2, grid, grid), is a + 128 and b + 128."""
        light_bchw = _lab.linear(images_bchw)
        grey_b1hw = _lab.lightness(light_bchw)
        target_b2gg = _lab.chroma(_cells.means(light_bchw, self.config.grid))
        return Transformed(grey_b1hw.expand(-1, 3, -1, -1).contiguous()[:, None], target_b2gg)

    def head(self, width: int) -> nn.Module:
        """Logits of the bins, or a and b, for every cell."""
        channels = len(self.bins_q2) if self.config.mode == "classify" else 2
        return _cells.decoder(width, channels, self.config.grid)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy with the shared bins, weighted by the rarity of the colour; or the mean squared error."""
        ab_n2 = target.movedim(1, -1).flatten(0, 2).float() - 128
        output_nq = output.movedim(1, -1).flatten(0, 2)
        if self.config.mode == "regress":
            return (output_nq - ab_n2 / _AB_UNIT).square().mean()
        bin_nk, share_nk = self.soft_bins(ab_n2)
        log_nk = output_nq.log_softmax(1).gather(1, bin_nk)
        weight_n = self.weights_q.to(output.device)[bin_nk[:, 0]]
        return -(weight_n * (share_nk * log_nk).sum(1)).mean()

    def soft_bins(self, ab_n2: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest bins, int64 (n, k), nearest first, and the probability of each, summing to one."""
        bins_q2 = self.bins_q2.to(ab_n2.device)
        far_nq = torch.cdist(ab_n2, bins_q2, compute_mode="donot_use_mm_for_euclid_dist")
        far_nk, bin_nk = far_nq.topk(min(self.config.neighbours, len(bins_q2)), largest=False)
        return bin_nk, (-far_nk.square() / (2 * self.config.sigma**2)).softmax(1)

    def describe(self) -> dict[str, Any]:
        """The number of bins, and the extremes of their weights."""
        low, high = (round(float(weight), 4) for weight in self.weights_q.aminmax())
        return {"num_bins": len(self.bins_q2), "bin_weights": [low, high]}


def rebalancing(bins_q2: Tensor, chroma: float, uniform: float) -> Tensor:
    """float32 (q,): weights of the bins, with mean one under the prior exp(-|ab| / chroma) (section 2.2 of the
    paper, which counts the prior over ImageNet).

    Args:
        bins_q2: centres of the bins.
        chroma: scale of the prior.
        uniform: share of the uniform distribution that is mixed in before inverting.
    """
    prior_q: Tensor = (-torch.linalg.vector_norm(bins_q2.double(), dim=1) / chroma).softmax(0)
    weights_q = 1 / ((1 - uniform) * prior_q + uniform / len(bins_q2))
    return (weights_q / (prior_q * weights_q).sum()).float()

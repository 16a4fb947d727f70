"""CPC: from the rows of patches above, tell the patches of the rows below among others.

Oord, Li and Vinyals, "Representation Learning with Contrastive Predictive Coding", arXiv 1807.03748 (v1); Henaff et
al., "Data-Efficient Image Recognition with Contrastive Predictive Coding", arXiv 1905.09272 (v2). With v the backbone's
features of a patch, c the output of a convolutional network that sees a patch's row and those above, and z the
targets, linear in v, of patches at row r and column s,

    L = mean over r, s, k of -log( exp(z_(r+k)s W_k c_rs) / sum over patches j exp(z_j W_k c_rs) )    (v1, eq. 4)

for k = nearest .. farthest rows below. The patches j are all those of the image itself and of other images of this
worker's batch, with gradient. Two rows below is the first without a common pixel at half overlap. Published on
ImageNet: v1 with ResNet-101, 48.7 % top-1 of a linear probe.

"cpc-patch_grid" is the method. BatchNorm would tell patches apart by what it knows of the others (v2 uses LayerNorm
instead): use `--backbone.norm group`, which also makes patches and whole images alike in the probes, where the papers
average over patches. A step costs as much as an image of P times the pixels of a patch: four times the ordinary view.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysl import pretext
from raysl.backbone.network import encode
from raysl.contrastive import losses
from raysl.contrastive.bank import MemoryBank
from raysl.errors import UserError
from raysl.objectives import Loss, Setup
from raysl.stream.reader import Batch

COMMAND = "raysl pretrain --data DATA --run RUN --method cpc-patch_grid --backbone.norm group"


@dataclass(frozen=True)
class Config:
    """Hyperparameters of CPC.

    Args:
        nearest: the first row below that is predicted; 1 is the next, which overlaps.
        farthest: the last row below that is predicted (v1: 5 of 7 rows).
        directions: "down" as in v1, or "both": also upwards from the rows below, with a network of its own (v2).
        channels: of the context network.
        depth: layers of the context network; each looks one row further up.
        dim: D, size of targets and predictions.
        norm: "layer" normalises features and every layer of the context network over their channels (v2), or "none".
        scale: of the scores; v2 scales predictions by it.
        images: of a worker's batch that meet each other, 0 for all as in the papers; the cost of the scores grows
            with it.
    """

    nearest: int = 2
    farthest: int = 5
    directions: Literal["down", "both"] = "down"
    channels: int = 128
    depth: int = 3
    dim: int = 64
    norm: Literal["layer", "none"] = "layer"
    scale: float = 0.1
    images: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.nearest <= self.farthest:
            raise UserError(
                f"cpc.nearest is {self.nearest} and cpc.farthest is {self.farthest}; they are rows below, 1 or more, "
                "and farthest is not less than nearest."
            )
        for name in ("channels", "depth", "dim"):
            if getattr(self, name) < 1:
                raise UserError(f"cpc.{name} is {getattr(self, name)}; it must be at least 1.")
        if not self.scale > 0:
            raise UserError(f"cpc.scale is {self.scale}; it must be more than 0.")
        if self.images < 0:
            raise UserError(f"cpc.images is {self.images}; it must be 0, for all, or more.")


class Cpc(nn.Module):
    """Context networks, predictions of rows below, and the loss that tells their patches among others."""

    predicts = False
    bank_dim = 0

    def __init__(self, config: Config, setup: Setup) -> None:
        super().__init__()
        transform = setup.transform("cpc", "patch_grid")
        self.columns = pretext.columns(transform)
        if not self.columns:
            raise UserError(
                "The objective 'cpc' needs a transform whose patches stay in their places, as in 'cpc-patch_grid'."
            )
        self.rows = transform.num_crops // self.columns
        if config.farthest >= self.rows:
            raise UserError(
                f"cpc.farthest is {config.farthest}, and the grid has {self.rows} rows: from the first there are "
                f"{self.rows - 1} below. Set cpc.farthest to {self.rows - 1} or less, or --patch-grid.grid higher."
            )
        self.config = config
        self.views = {"patches": transform}
        self.norm = nn.LayerNorm(setup.width) if config.norm == "layer" else nn.Identity()
        self.target = nn.Linear(setup.width, config.dim)
        count = 1 if config.directions == "down" else 2
        self.directions = nn.ModuleList(_Direction(config, setup.width) for _ in range(count))

    def forward(self, backbone: nn.Module, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The target of every patch (b, p, d), and n predictions (b, n, d); `positives` says of which patches."""
        features_bpd = self.norm(encode(backbone, views["patches"]))
        features_bhwd = features_bpd.unflatten(1, (self.rows, self.columns))
        seen = [features_bhwd, features_bhwd.flip(1)]
        predicted = [one(x) for one, x in zip(self.directions, seen, strict=False)]
        return {"targets": self.target(features_bpd), "predictions": torch.cat(predicted, dim=1)}

    def positives(self) -> Tensor:
        """int64 (n,): which patch of its image each prediction is about."""
        place_hw = torch.arange(self.rows * self.columns).view(self.rows, self.columns)
        seen = [place_hw, place_hw.flip(0)]
        steps = range(self.config.nearest, self.config.farthest + 1)
        return torch.cat(
            [x[k:].flatten() for _, x in zip(self.directions, seen, strict=False) for k in steps]
        )

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch, bank: MemoryBank | None) -> Loss:
        """InfoNCE of every prediction, averaged over them and over the images."""
        targets_bpd, predictions_bnd = outputs["targets"].float(), outputs["predictions"].float()
        b = len(targets_bpd)
        device = targets_bpd.device
        index_b, positive_n = batch.indices_b.to(device), self.positives().to(device)
        each: list[Tensor] = []
        right: list[Tensor] = []
        for i in torch.split(torch.arange(b, device=device), self.config.images or b):
            with torch.autocast(device.type, enabled=False):
                found, correct = _told(
                    targets_bpd[i], predictions_bnd[i] * self.config.scale, positive_n, index_b[i]
                )
            each.append(found)
            right.append(correct)
        return Loss(torch.cat(each).mean(), {"accuracy": torch.cat(right).float().mean()})


def _told(
    targets_bpd: Tensor, predictions_bnd: Tensor, positive_n: Tensor, index_b: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss of every prediction (b * n,), and whether its patch has the highest score of all (b * n,).

    Another copy of the same image, which comes where two epochs meet, does not count against it.
    """
    b, p, _ = targets_bpd.shape
    scores_bnbp = torch.einsum("bnd,cpd->bncp", predictions_bnd, targets_bpd)
    own_bb = torch.eye(b, dtype=torch.bool, device=index_b.device)
    copy_bb = (index_b[:, None] == index_b) & ~own_bb
    positive_np = positive_n[:, None] == torch.arange(p, device=positive_n.device)
    is_positive = (own_bb[:, None, :, None] & positive_np[:, None]).flatten(2).flatten(0, 1)
    scores_qk = scores_bnbp.masked_fill(copy_bb[:, None, :, None], float("-inf")).flatten(2).flatten(0, 1)
    positive_q = scores_qk[is_positive]
    others_qk = scores_qk.masked_fill(is_positive, float("-inf"))
    return losses.info_nce(positive_q, others_qk), positive_q > others_qk.amax(dim=1)


class _Direction(nn.Module):
    """The context network of one direction, and W_k of every row below that is predicted."""

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.steps = range(config.nearest, config.farthest + 1)
        layers = [_Above(config.channels, config.norm) for _ in range(config.depth)]
        self.context = nn.Sequential(nn.Linear(width, config.channels), *layers)
        self.predict = nn.ModuleList(nn.Linear(config.channels, config.dim) for _ in self.steps)

    def forward(self, features_bhwd: Tensor) -> Tensor:
        """Predictions (b, n, d): of rows k .. h - 1 from rows 0 .. h - 1 - k, for each k in turn."""
        context_bhwd = self.context(features_bhwd)
        made = [
            one(context_bhwd[:, :-k]).flatten(1, 2) for k, one in zip(self.steps, self.predict, strict=True)
        ]
        return torch.cat(made, dim=1)


class _Above(nn.Module):
    """A residual layer that sees, of each place, its neighbours in its row and in the row above; none below."""

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels) if norm == "layer" else nn.Identity()
        self.conv = nn.Conv2d(channels, channels, (2, 3))

    def forward(self, x_bhwd: Tensor) -> Tensor:
        x_bdhw = F.pad(F.relu(self.norm(x_bhwd)).movedim(-1, 1), (1, 1, 1, 0))
        added_bdhw: Tensor = self.conv(x_bdhw)
        return x_bhwd + added_bdhw.movedim(1, -1)

"""CPC: predict the patches of lower rows from the rows above, among other patches.

Oord, Li and Vinyals, "Representation Learning with Contrastive Predictive Coding", arXiv 1807.03748 (v1); Henaff et
al., "Data-Efficient Image Recognition with Contrastive Predictive Coding", arXiv 1905.09272 (v2). With v the backbone's
features of a patch, c the output of a convolutional network that sees a patch's row and the rows above, and z the
target of a patch, linear in v, at row r and column s,

    L = mean over r, s, k of -log( exp(z_(r+k)s W_k c_rs) / sum over patches j exp(z_j W_k c_rs) )    (v1, eq. 4)

for k = nearest .. farthest rows below. The patches j are all patches of the image and of the other images in this
worker's batch, with gradient. At half overlap, two rows below is the first row that shares no pixel. Published on
ImageNet: v1 with ResNet-101, 48.7 % top-1 of a linear probe.

The method is "cpc-patch_grid". BatchNorm leaks information between patches (v2 uses LayerNorm instead), so use
`--backbone.norm group`. Probes show the backbone whole images; the papers average over patches. A step costs about
four times as much as one ordinary view.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysl import pretext
from raysl.backbone.network import encode
from raysl.communication.device_copy import to_device
from raysl.contrastive import losses
from raysl.errors import UserError
from raysl.fields import Bounds, Checked
from raysl.objectives import Base, Batch, Loss, MemoryBank, Setup

COMMAND = "raysl pretrain --data DATA --run RUN --method cpc-patch_grid --backbone.norm group"


@dataclass(frozen=True)
class Config(Checked):
    """Hyperparameters of CPC.

    Args:
        nearest: distance of the first predicted row; 1 is the next row, which overlaps.
        farthest: distance of the last predicted row (v1: 5 of 7 rows).
        directions: "down" as in v1, or "both": also upward from the rows below, with a second network (v2).
        channels: channels of the context network.
        depth: layers of the context network; each sees one row further up.
        dim: D, size of targets and predictions.
        norm: "layer" normalizes the features and every layer of the context network over channels (v2), or "none".
        scale: factor of the scores (v2).
        images: images of a worker's batch that are compared with each other; 0 for all, as in the papers. The cost of
            the scores grows with it.
    """

    nearest: Annotated[int, Bounds(1, 64)] = 2
    farthest: Annotated[int, Bounds(1, 64)] = 5
    directions: Literal["down", "both"] = "down"
    channels: Annotated[int, Bounds(1, 8192)] = 128
    depth: Annotated[int, Bounds(1, 64)] = 3
    dim: Annotated[int, Bounds(1, 16_384)] = 64
    norm: Literal["layer", "none"] = "layer"
    scale: Annotated[float, Bounds(above=0, high=1000)] = 0.1
    images: Annotated[int, Bounds(0, 65_536)] = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nearest > self.farthest:
            raise UserError(
                f"--cpc.nearest is {self.nearest} and --cpc.farthest is {self.farthest}; farthest must not be less "
                "than nearest."
            )


class Cpc(Base):
    """Context networks, predictions of the rows below, and their contrastive loss."""

    def __init__(self, config: Config, setup: Setup) -> None:
        super().__init__(config, setup)
        transform = setup.transform("cpc", "patch_grid")
        self.columns = pretext.columns(transform)
        if not self.columns:
            raise UserError(
                "The objective 'cpc' needs a transform whose patches form a grid, as in 'cpc-patch_grid'."
            )
        self.rows = transform.num_crops // self.columns
        if config.farthest >= self.rows:
            raise UserError(
                f"--cpc.farthest is {config.farthest} and the grid has {self.rows} rows, so it must be at most "
                f"{self.rows - 1}. Lower it, or raise --patch-grid.grid."
            )
        self.views = {"patches": transform}
        self.norm = nn.LayerNorm(setup.width) if config.norm == "layer" else nn.Identity()
        self.target = nn.Linear(setup.width, config.dim)
        count = 1 if config.directions == "down" else 2
        self.directions = nn.ModuleList(_Direction(config, setup.width) for _ in range(count))

    def forward(self, backbone: nn.Module, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the target of every patch (b, p, d), and n predictions (b, n, d) in the order of `positives`."""
        features_bpd = self.norm(encode(backbone, views["patches"]))
        features_bhwd = features_bpd.unflatten(1, (self.rows, self.columns))
        seen = [features_bhwd, features_bhwd.flip(1)]
        predicted = [one(x) for one, x in zip(self.directions, seen, strict=False)]
        return {"targets": self.target(features_bpd), "predictions": torch.cat(predicted, dim=1)}

    def positives(self) -> Tensor:
        """Return the patch that each prediction is about, int64 (n,)."""
        place_hw = torch.arange(self.rows * self.columns).view(self.rows, self.columns)
        seen = [place_hw, place_hw.flip(0)]
        steps = range(self.config.nearest, self.config.farthest + 1)
        return torch.cat(
            [x[k:].flatten() for _, x in zip(self.directions, seen, strict=False) for k in steps]
        )

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch, bank: MemoryBank | None) -> Loss:
        """Compute InfoNCE of every prediction, averaged over predictions and images."""
        targets_bpd, predictions_bnd = outputs["targets"].float(), outputs["predictions"].float()
        b = len(targets_bpd)
        device = targets_bpd.device
        index_b, positive_n = batch.indices_b, to_device(self.positives(), device)
        each: list[Tensor] = []
        right: list[Tensor] = []
        for i in torch.split(torch.arange(b, device=device), self.config.images or b):
            with torch.autocast(device.type, enabled=False):
                found, correct = _contrast(
                    targets_bpd[i], predictions_bnd[i] * self.config.scale, positive_n, index_b[i]
                )
            each.append(found)
            right.append(correct)
        return Loss(torch.cat(each).mean(), {"accuracy": torch.cat(right).float().mean()})


def _contrast(
    targets_bpd: Tensor, predictions_bnd: Tensor, positive_n: Tensor, index_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the loss of every prediction (b * n,), and True where its patch has the highest score (b * n,).

    A second copy of the same image, which a batch at the end of an epoch may contain, is no negative.
    """
    b, p, _ = targets_bpd.shape
    scores_bnbp = torch.einsum("bnd,cpd->bncp", predictions_bnd, targets_bpd)
    own_bb = torch.eye(b, dtype=torch.bool, device=index_b.device)
    copy_bb = (index_b[:, None] == index_b) & ~own_bb
    positive_np = positive_n[:, None] == torch.arange(p, device=positive_n.device)
    is_positive = (own_bb[:, None, :, None] & positive_np[:, None]).flatten(2).flatten(0, 1)
    scores_qk = scores_bnbp.masked_fill(copy_bb[:, None, :, None], float("-inf")).flatten(2).flatten(0, 1)
    # By index: a mask would make the host wait for the number of its rows.
    positive_q = scores_qk.gather(1, is_positive.byte().argmax(dim=1, keepdim=True))[:, 0]
    others_qk = scores_qk.masked_fill(is_positive, float("-inf"))
    return losses.info_nce(positive_q, others_qk), positive_q > others_qk.amax(dim=1)


class _Direction(nn.Module):
    """The context network of one direction, and W_k of every predicted row."""

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.steps = range(config.nearest, config.farthest + 1)
        layers = [_Above(config.channels, config.norm) for _ in range(config.depth)]
        self.context = nn.Sequential(nn.Linear(width, config.channels), *layers)
        self.predict = nn.ModuleList(nn.Linear(config.channels, config.dim) for _ in self.steps)

    def forward(self, features_bhwd: Tensor) -> Tensor:
        """Predict (b, n, d): rows k .. h - 1 from rows 0 .. h - 1 - k, for each k in turn."""
        context_bhwd = self.context(features_bhwd)
        made = [
            one(context_bhwd[:, :-k]).flatten(1, 2) for k, one in zip(self.steps, self.predict, strict=True)
        ]
        return torch.cat(made, dim=1)


class _Above(nn.Module):
    """A residual layer that sees the neighbors of a patch in its row and in the row above, and none below."""

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels) if norm == "layer" else nn.Identity()
        self.conv = nn.Conv2d(channels, channels, (2, 3))

    def forward(self, x_bhwd: Tensor) -> Tensor:
        x_bdhw = F.pad(F.relu(self.norm(x_bhwd)).movedim(-1, 1), (1, 1, 1, 0))
        added_bdhw: Tensor = self.conv(x_bdhw)
        return x_bhwd + added_bdhw.movedim(1, -1)

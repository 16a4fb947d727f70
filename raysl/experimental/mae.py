"""MAE: reconstruct the masked patches of an image from the visible ones, with a vision transformer.

He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377. The backbone sees a random quarter of
the patches only. A small transformer gets their encodings and mask tokens, and predicts the pixels of every patch.
With x the pixels of a patch, standardized over the patch, and M the masked patches,

    L = mean over M of the squared error of x                                                  (section 3 and table 1d)

Published with ViT-L/16, 800 epochs of ImageNet: 73.5 % top-1 of a linear probe; with ViT-B/16 and 1,600 epochs 68.0 %.
The backbone is a vision transformer of timm, with learned position embeddings (paper: sine and cosine). Small images
need small patches: `--backbone.name timm/vit_tiny_patch16_224 --backbone.patch-size 4`. Views are crops and flips
without color changes, as in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysl.backbone.network import BackboneConfig
from raysl.errors import UserError
from raysl.fields import Bounds, Checked, Range
from raysl.objectives import Base, Batch, Loss, MemoryBank, Setup

COMMAND = (
    "raysl pretrain --data DATA --run RUN --method mae --backbone.name timm/vit_tiny_patch16_224 "
    "--backbone.patch-size 4"
)


@dataclass(frozen=True)
class Config(Checked):
    """Hyperparameters of MAE.

    Args:
        masked: share of the patches that are masked, in 0..1 (paper: 0.75).
        dim: width of the decoder, a multiple of 32 (paper: 512).
        depth: blocks of the decoder (paper: 8).
        standardize: standardize the pixels of every patch.
    """

    masked: Annotated[float, Bounds(above=0, below=1), Range((0.5, 0.6, 0.75, 0.9))] = 0.75
    dim: Annotated[int, Bounds(32, 8192)] = 128
    depth: Annotated[int, Bounds(1, 64)] = 2
    standardize: bool = True


class Mae(Base):
    """The decoder, and the loss of the masked patches."""

    example_backbone = BackboneConfig("timm/vit_tiny_patch16_224", patch_size=4)
    recipes = {"image": "plain"}  # noqa: RUF012

    def __init__(self, config: Config, setup: Setup) -> None:
        super().__init__(config, setup)
        setup.no_transform("mae")
        body: Any = getattr(setup.backbone, "body", setup.backbone)
        if not all(hasattr(body, name) for name in ("patch_embed", "blocks", "_pos_embed")):
            raise UserError(
                "The objective 'mae' needs a vision transformer of timm. Give one with --backbone.name, such as "
                "timm/vit_tiny_patch16_224."
            )
        if config.dim % 32:
            raise UserError(f"--mae.dim is {config.dim}; it must be a multiple of 32.")
        self.patch = int(body.patch_embed.patch_size[0])
        side = setup.identity.source.size
        if side % self.patch:
            raise UserError(
                f"--view.image-size is {side}; it must be a multiple of the patch size {self.patch}. Set it, or "
                "--backbone.patch-size."
            )
        self.num_patches = (side // self.patch) ** 2
        self.num_kept = max(1, round(self.num_patches * (1 - config.masked)))
        if self.num_kept == self.num_patches:
            raise UserError(
                f"--mae.masked is {config.masked}; of {self.num_patches} patches it masks none. Raise it, or use "
                "smaller patches."
            )
        self.views = {"image": setup.identity}
        self.embed = nn.Linear(setup.width, config.dim)
        self.mask_token = nn.Parameter(torch.zeros(config.dim))
        self.positions_nd = nn.Parameter(torch.randn(self.num_patches, config.dim) * 0.02)
        self.decoder = nn.ModuleList(
            nn.TransformerEncoderLayer(
                config.dim, config.dim // 32, 4 * config.dim, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.dim)
        self.pixels = nn.Linear(config.dim, self.patch**2 * 3)

    def forward(self, backbone: nn.Module, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute predictions and targets (b, n, pixels) of all patches, and the mask (b, n)."""
        images_bchw = backbone.normalized(views["image"][:, 0])  # type: ignore[operator]
        b = len(images_bchw)
        # torch's generator has a seed for every step and worker.
        order_bn = torch.rand(b, self.num_patches, device=images_bchw.device).argsort(dim=1)
        kept_bk = order_bn[:, : self.num_kept]
        encoded_bkd = self.embed(_encode_visible(backbone.body, images_bchw, kept_bk))
        mask_bn = torch.ones(b, self.num_patches, device=images_bchw.device).scatter(1, kept_bk, 0.0)
        tokens_bnd = self.mask_token.to(encoded_bkd.dtype).expand(b, self.num_patches, -1)
        tokens_bnd = tokens_bnd.scatter(1, _index(kept_bk, encoded_bkd), encoded_bkd) + self.positions_nd
        for block in self.decoder:
            tokens_bnd = block(tokens_bnd)
        predictions = self.pixels(self.norm(tokens_bnd))
        return {"predictions": predictions, "targets": self.targets(images_bchw), "mask": mask_bn}

    def targets(self, images_bchw: Tensor) -> Tensor:
        """Return the pixels of every patch, row by row, (b, n, pixels), standardized if wanted."""
        patches = F.unfold(images_bchw.float(), self.patch, stride=self.patch).transpose(1, 2)
        if not self.config.standardize:
            return patches
        variance, mean = torch.var_mean(patches, dim=2, keepdim=True)
        return (patches - mean) / (variance + 1e-6).sqrt()

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch, bank: MemoryBank | None) -> Loss:
        """Compute the squared error of the masked patches, averaged over the batch."""
        error_bn = (outputs["predictions"].float() - outputs["targets"]).square().mean(dim=2)
        mask_bn = outputs["mask"]
        return Loss((error_bn * mask_bn).sum() / mask_bn.sum(), {})


def _encode_visible(body: Any, images_bchw: Tensor, kept_bk: Tensor) -> Tensor:
    """Encode some of the patches by a vision transformer of timm: (b, k, width)."""
    tokens_btd = body.norm_pre(body.patch_drop(body._pos_embed(body.patch_embed(images_bchw))))
    prefix = int(body.num_prefix_tokens)
    patches_bnd = tokens_btd[:, prefix:]
    visible_bkd = patches_bnd.gather(1, _index(kept_bk, patches_bnd))
    x = torch.cat([tokens_btd[:, :prefix], visible_bkd], dim=1)
    encoded: Tensor = body.norm(body.blocks(x))
    return encoded[:, prefix:]


def _index(kept_bk: Tensor, like: Tensor) -> Tensor:
    """Repeat indices of tokens over their numbers, for gather and scatter."""
    return kept_bk[..., None].expand(-1, -1, like.shape[-1])

"""PIRL with a jigsaw in one file of plain torch.

Misra and van der Maaten, "Self-Supervised Learning of Pretext-Invariant Representations", arXiv 1912.01991. A network
learns to embed an image and its shuffled patches alike, and unlike other images. This file has all of it: the jigsaw,
the two heads, the memory bank, the loss and the training loop. It needs torch only, and learns on random images so that
it runs anywhere: `python examples/pirl_minimal.py`. `raysl pretrain --method pirl-jigsaw` does the same at scale, and a
test compares the two losses.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def jigsaw(images_bchw: Tensor, grid: int = 3) -> Tensor:
    """Cut every image into grid x grid cells, take a patch at a random offset in each, and shuffle the patches.

    Args:
        images_bchw: square images; the grid must divide their side.
        grid: cells per side.

    Returns:
        (b, p, c, s, s) with p = grid * grid patches.
    """
    b, side = len(images_bchw), images_bchw.shape[-1]
    cell = side // grid
    patch = round(cell * 64 / 85)  # PIRL: patches of 64 pixels in cells of 85
    patches = []
    for image_chw in images_bchw:
        cut = []
        for position in torch.randperm(grid * grid).tolist():
            down, right = (int(torch.randint(cell - patch + 1, ())) for _ in range(2))
            top, left = position // grid * cell + down, position % grid * cell + right
            cut.append(image_chw[:, top : top + patch, left : left + patch])
        patches.append(torch.stack(cut))
    return torch.stack(patches).view(b, grid * grid, 3, patch, patch)


def augment(images_bchw: Tensor) -> Tensor:
    """Flip half of the images and scale their channels: a stand-in for crops and color jitter."""
    flipped = torch.rand(len(images_bchw)) < 0.5
    images_bchw = torch.where(flipped[:, None, None, None], images_bchw.flip(-1), images_bchw)
    return images_bchw * (0.6 + 0.8 * torch.rand(len(images_bchw), 3, 1, 1))


class Pirl(nn.Module):
    """A backbone and the heads f (of the image) and g (of its patches).

    Args:
        backbone: network from images (b, 3, s, s) of any side to features (b, width).
        width: number of features.
        num_patches: p, patches per image.
        dim: d, size of the embeddings.
    """

    def __init__(self, backbone: nn.Module, width: int, num_patches: int = 9, dim: int = 128) -> None:
        super().__init__()
        self.backbone = backbone
        self.f = nn.Linear(width, dim)
        self.g_patch = nn.Linear(width, dim)
        self.g_mix = nn.Linear(num_patches * dim, dim)

    def forward(self, images_bchw: Tensor, patches_bpchw: Tensor) -> tuple[Tensor, Tensor]:
        """Embed the images and their patches: unit vectors (b, d) each."""
        b = len(patches_bpchw)
        patch_features = self.backbone(patches_bpchw.flatten(0, 1))
        transformed_bd = self.g_mix(self.g_patch(patch_features).view(b, -1))
        image_bd = self.f(self.backbone(images_bchw))
        return F.normalize(image_bd, dim=1), F.normalize(transformed_bd, dim=1)


class MemoryBank:
    """One unit vector per image: a moving average of its embeddings, and the negatives of other images."""

    def __init__(self, num_images: int, dim: int, momentum: float = 0.5) -> None:
        self.rows_nd = F.normalize(torch.rand(num_images, dim) * 2 - 1, dim=1)
        self.momentum = momentum

    def update(self, indices_b: Tensor, embeddings_bd: Tensor) -> None:
        """Mix new embeddings into the rows of their images."""
        mixed = self.momentum * self.rows_nd[indices_b] + (1 - self.momentum) * embeddings_bd.detach()
        self.rows_nd[indices_b] = F.normalize(mixed, dim=1)

    def negatives(self, indices_b: Tensor, count: int) -> Tensor:
        """Sample `count` other images for each image: indices (b, count)."""
        other = torch.randint(len(self.rows_nd) - 1, (len(indices_b), count))
        return other + (other >= indices_b[:, None])


def contrast(query_bd: Tensor, memory_bd: Tensor, negatives_bkd: Tensor, temperature: float) -> Tensor:
    """Compute InfoNCE: -log softmax of the score with the own memory among it and the negatives, per image."""
    positive_b1 = (query_bd * memory_bd).sum(dim=1, keepdim=True)
    negative_bk = torch.einsum("bd,bkd->bk", query_bd, negatives_bkd)
    scores = torch.cat([positive_b1, negative_bk], dim=1) / temperature
    return F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long), reduction="none")


def pirl_loss(
    image_bd: Tensor,
    transformed_bd: Tensor,
    indices_b: Tensor,
    negatives_bk: Tensor,
    rows_nd: Tensor,
    lam: float = 0.5,
    temperature: float = 0.07,
) -> Tensor:
    """Compute equation 5: both embeddings against the memory of the image, with the same negatives."""
    memory_bd, negatives_bkd = rows_nd[indices_b], rows_nd[negatives_bk]
    of_transformed = contrast(transformed_bd, memory_bd, negatives_bkd, temperature).mean()
    of_image = contrast(image_bd, memory_bd, negatives_bkd, temperature).mean()
    return lam * of_transformed + (1 - lam) * of_image


def train(
    images_nchw: Tensor, backbone: nn.Module, width: int, steps: int = 200, batch_size: int = 32
) -> nn.Module:
    """Train a backbone on images without labels, and return it."""
    model, bank = Pirl(backbone, width), MemoryBank(len(images_nchw), 128)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        indices_b = torch.randperm(len(images_nchw))[:batch_size]
        images_bchw = images_nchw[indices_b]
        image_bd, transformed_bd = model(augment(images_bchw), augment_patches(jigsaw(images_bchw)))
        negatives_bk = bank.negatives(indices_b, 64)
        loss = pirl_loss(image_bd, transformed_bd, indices_b, negatives_bk, bank.rows_nd)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        bank.update(indices_b, image_bd)
        if step % 20 == 0:
            print(f"step {step:4d}  loss {loss.item():.4f}")
    return copy.deepcopy(model.backbone)


def augment_patches(patches_bpchw: Tensor) -> Tensor:
    """Augment every patch by itself."""
    return augment(patches_bpchw.flatten(0, 1)).view(patches_bpchw.shape)


def main() -> None:
    """Train a small convolutional network on random images of 36 pixels."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    train(torch.rand(512, 3, 36, 36), nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 128)


if __name__ == "__main__":
    main()

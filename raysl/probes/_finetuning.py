"""Train a whole network on labeled images, with a new linear classifier on its output; for `finetune` and `semisup`.

Images are cropped and mirrored at random in every epoch, and scored in the evaluation view. BatchNorm is trained with
the rest. The encoded images of the train set are held in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from raysl import optim, rng
from raysl.augment import SourceCrop, hflip
from raysl.backbone.network import Backbone
from raysl.dataset import DataSet
from raysl.errors import UserError, explained
from raysl.extraction import NetworkEncoder
from raysl.fields import Bounds
from raysl.optim import OptimConfig
from raysl.probes import Row, Settings, Subject, accuracy_rows, check_labels, common_labels, rank
from raysl.ray_cluster import gpus, placement
from raysl.rng import ImageRng
from raysl.stream import decode

# The layer of the rows of a probe that trains the whole network.
LAYER = "pooled"
_MIRROR_CHANCE = 0.5
_PART_IMAGES = 1024
_BATCH = 128
_DAMAGED = "An image of the train set or the test set can no longer be decoded"


@dataclass(frozen=True)
class FinetuningConfig(Settings):
    """How the network is trained.

    Args:
        epochs: number of passes over the train set.
        batch_size: images of a step, >= 2. The incomplete last batch of an epoch is dropped, unless the train set is
            smaller than a batch.
        head_lr: learning rate of the classifier, as a multiple of that of the backbone.
        min_scale: smallest share of the area of an image that a training crop may cover, in (0, 1].
        optim: as in pretraining; the learning rate is scaled by `batch_size`, even if the train set is smaller.
    """

    epochs: Annotated[int, Bounds(1, 10**6)] = 100
    batch_size: Annotated[int, Bounds(2, 10**6)] = 256
    head_lr: Annotated[float, Bounds(1e-9, 1e9)] = 1.0
    min_scale: Annotated[float, Bounds(1e-6, 1)] = 0.08
    optim: OptimConfig = field(default_factory=OptimConfig)


class Tuned(nn.Module):
    """A backbone and a linear classifier on its output, with initial weights of zero."""

    def __init__(self, backbone: Backbone, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.width, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images_bchw: Tensor) -> Tensor:
        """Return logits (b, classes) of uint8 images."""
        logits_bc: Tensor = self.head(self.backbone(images_bchw))
        return logits_bc


def labels_of(name: str, train: DataSet, test: DataSet) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the labels of both sets, numbered as in the train set.

    Raises UserError if a set has no images or no labels, the sets are the same, they have no class in common, or the
    train set shows one class.
    """
    for kind, data in (("train", train), ("test", test)):
        if not data.num_images:
            raise UserError(f"The {kind} set of the probe has no images. Give a data set that has images.")
    train_n, test_n = common_labels(train, test)
    same = train.manifest.fingerprint == test.manifest.fingerprint
    check_labels(name, train_n, same=same)
    return train_n, test_n


def measure(
    name: str,
    subject: Subject,
    config: FinetuningConfig,
    chosen_n: NDArray[np.int64],
    labels: tuple[NDArray[np.int64], NDArray[np.int64]],
    suffix: str = "",
) -> list[Row]:
    """Train on some of the train images and return accuracies and the mean training loss of the last epoch.

    Args:
        chosen_n: indices of the images to learn from.
        labels: labels of all train and all test images; see `labels_of`.
        suffix: appended to the names of the rows.

    Raises UserError if training has diverged, or an image is damaged.
    """
    assert isinstance(subject.encoder, NetworkEncoder)
    train_n, test_n = labels
    classes = int(train_n.max()) + 1
    # Dropout draws from torch's global generator.
    with (
        torch.random.fork_rng(),
        ThreadPoolExecutor(placement.assigned_cpus()) as threads,
        explained(_DAMAGED, "A shard is damaged; ingest the source again.", decode.DecodeError),
    ):
        torch.manual_seed(rng.key(subject.seed, "tuning") >> 1)
        network = Tuned(subject.encoder.network(), classes)
        network.to(gpus.device(), memory_format=torch.channels_last)  # type: ignore[call-overload]
        losses = train(network, subject, config, chosen_n, train_n[chosen_n], threads)
        scores_nc = predict(network, subject, threads)
    if not torch.isfinite(scores_nc).all() or not math.isfinite(losses[-1]):
        raise UserError(
            f"The network has diverged in the probe {name}: its scores are not all finite. Lower --{name}.optim.lr, "
            f"which is {config.optim.lr}."
        )
    test_labels_n = torch.from_numpy(test_n)
    rows = [
        *accuracy_rows(rank(scores_nc, test_labels_n), test_labels_n, classes),
        Row("train_loss", losses[-1]),
    ]
    return [Row(row.name + suffix, row.value, LAYER) for row in rows]


def train(
    network: nn.Module,
    subject: Subject,
    config: FinetuningConfig,
    indices_n: NDArray[np.int64],
    labels_n: NDArray[np.int64],
    threads: ThreadPoolExecutor,
) -> list[float]:
    """Train a network of the parts `backbone` and `head` in place and return the mean loss of every epoch."""
    images = subject.train.read(indices_n, ("image",)).column("image").to_pylist()
    solvers = [
        (optim.build(config.optim, network.get_submodule("backbone")), 1.0),
        (optim.build(config.optim, network.get_submodule("head")), config.head_lr),
    ]
    size = min(config.batch_size, len(images))
    batches = len(images) // size
    crop, device = SourceCrop(subject.image_size, config.min_scale), gpus.device()
    network.train()
    losses = []
    for epoch in range(config.epochs):
        order_n = rng.generator("tuning", subject.seed, epoch).permutation(len(images))
        found = torch.zeros((), device=device)
        for batch in range(batches):
            rows_b = order_n[batch * size : (batch + 1) * size]
            image_rng = ImageRng(subject.seed, np.full(size, epoch), indices_n[rows_b], "tuning")
            images_bchw = _views([images[row] for row in rows_b], crop, image_rng, threads)
            loss = cross_entropy(
                network(images_bchw.to(device)), torch.from_numpy(labels_n[rows_b]).to(device)
            )
            rate = config.optim.lr_at(epoch * batches + batch, config.epochs * batches, config.batch_size)
            step(network, loss, solvers, rate, config.optim.clip_norm)
            found += loss.detach()
        losses.append(float(found) / batches)
    return losses


def step(
    network: nn.Module,
    loss: Tensor,
    solvers: list[tuple[torch.optim.Optimizer, float]],
    rate: float,
    clip_norm: float,
) -> None:
    """Take one step with each optimizer; its learning rate is a multiple of `rate`."""
    for solver, multiple in solvers:
        solver.zero_grad()
        for group in solver.param_groups:
            group["lr"] = rate * multiple
    loss.backward()  # type: ignore[no-untyped-call]
    if clip_norm:
        nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
    for solver, _ in solvers:
        solver.step()


def predict(network: nn.Module, subject: Subject, threads: ThreadPoolExecutor) -> Tensor:
    """Return logits (n, classes) of the evaluation views of all test images."""
    network.eval()
    size, device = subject.image_size, gpus.device()
    scores = []
    with torch.inference_mode():
        for images in _parts(subject.test):
            batches = [images[first : first + _BATCH] for first in range(0, len(images), _BATCH)]
            views = threads.map(lambda batch: decode.evaluation_views(batch, size), batches)
            scores += [network(images_bchw.to(device)).float().cpu() for images_bchw in views]
    return torch.cat(scores)


def _parts(data: DataSet) -> Iterator[list[bytes]]:
    """Yield the encoded images of a data set in index order, in parts that fit into memory when decoded."""
    for first in range(0, data.num_images, _PART_IMAGES):
        part_n = np.arange(first, min(first + _PART_IMAGES, data.num_images), dtype=np.int64)
        yield data.read(part_n, ("image",)).column("image").to_pylist()


def _views(images: list[bytes], crop: SourceCrop, image_rng: ImageRng, threads: ThreadPoolExecutor) -> Tensor:
    """Return uint8 (b, 3, s, s): a random crop of each image, mirrored at random."""
    share = max(1, -(-len(images) // placement.assigned_cpus()))

    def cut(first: int) -> Tensor:
        rows = slice(first, first + share)
        some = ImageRng(image_rng.seed, image_rng.epochs_b[rows], image_rng.indices_b[rows], image_rng.name)
        return hflip(decode.cut(images[rows], {"image": crop}, some)["image"], some, _MIRROR_CHANCE)

    return torch.cat(list(threads.map(cut, range(0, len(images), share))))

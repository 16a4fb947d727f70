"""Training a whole network on labelled images, with a new linear classifier on its output; for `finetune` and
`semisup`.

Images are cropped and mirrored anew in every epoch, and judged in the evaluation view. BatchNorm learns with the rest.
The encoded images of the train set are held in memory, those of the test set are not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from raysl import optim, rng
from raysl.augment import SourceCrop, hflip
from raysl.backbone.network import Backbone
from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.extraction import Trainable
from raysl.optim import OptimConfig
from raysl.probes import Row, Subject, common_labels, rank, topk_rows
from raysl.probes._task import decoders, device
from raysl.rng import ImageRng
from raysl.stream import decode

Integers = npt.NDArray[np.int64]

# Rows of a probe that trains the whole network stand beside those of its output.
LAYER = "pooled"
_MIRRORED = 0.5
_PART_IMAGES = 1024
_BATCH = 128


@dataclass(frozen=True)
class Tuning:
    """How the network is trained.

    Args:
        epochs: visits to every image.
        batch_size: images of a step, at least 2. The last images of an epoch that fill no batch are left out, unless
            there are fewer than a batch in all.
        head_lr: learning rate of the classifier, as a multiple of that of the backbone.
        min_scale: smallest share of an image's area that a training crop may show.
        optim: as in pretraining; the rate is scaled by `batch_size`, also where a train set is smaller than that.
    """

    epochs: int
    batch_size: int
    head_lr: float
    min_scale: float
    optim: OptimConfig

    def __post_init__(self) -> None:
        probe = type(self).__module__.rpartition(".")[2]
        if self.epochs < 1:
            raise UserError(f"{probe}.epochs is {self.epochs}; it must be at least 1.")
        if self.batch_size < 2:
            raise UserError(
                f"{probe}.batch_size is {self.batch_size}; it must be at least 2, because BatchNorm learns from "
                "differences between images."
            )
        if not 0 < self.head_lr < math.inf:
            raise UserError(
                f"{probe}.head_lr is {self.head_lr}; it must be more than 0 (1: as the backbone)."
            )
        if not 0 < self.min_scale <= 1:
            raise UserError(f"{probe}.min_scale is {self.min_scale}; it must be above 0 and at most 1.")


class Tuned(nn.Module):
    """A backbone and a classifier on its output, which begins with weights of zero: no class is likelier than another."""

    def __init__(self, backbone: Backbone, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.width, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images_bchw: Tensor) -> Tensor:
        """Logits (b, classes) of uint8 images."""
        logits_bc: Tensor = self.head(self.backbone(images_bchw))
        return logits_bc


def labels_of(subject: Subject) -> tuple[Integers, Integers]:
    """Labels of both sets under the numbers of the train set.

    Raises:
        UserError: a set has no images or no labels, the sets are one, they have no class in common, or the train set
            shows one class.
    """
    for kind, data in (("train", subject.train), ("test", subject.test)):
        if not data.num_images:
            raise UserError(f"The {kind} set of the probe has no images. Give one that has some.")
    if subject.train.manifest.fingerprint == subject.test.manifest.fingerprint:
        raise UserError(
            "A probe that trains the network was given one data set to learn from and to be scored on, which would "
            "measure how well it remembers. Give another test set; the probe knn can use one set for both."
        )
    train_n, test_n = common_labels(subject.train, subject.test)
    if len(np.unique(train_n)) < 2:
        raise UserError(
            "A probe that trains the network needs a train set that shows at least two classes, and this shows one."
        )
    return train_n, test_n


def measure(
    subject: Subject,
    tuning: Tuning,
    chosen_n: Integers,
    train_n: Integers,
    test_n: Integers,
    suffix: str = "",
) -> list[Row]:
    """Trains on some of the train images and scores the result: top-1, top-5 where there are more than five classes,
    and the mean loss of the last epoch.

    Args:
        chosen_n: indices of the images to learn from.
        train_n: labels of all train images.
        test_n: labels of all test images, under the same numbers; see `labels_of`.
        suffix: is appended to the names of the rows.

    Raises:
        UserError: the weights have diverged, or an image is damaged.
    """
    assert isinstance(subject.encoder, Trainable)
    classes = int(train_n.max()) + 1
    # Dropout and the like draw from torch's own generator.
    with torch.random.fork_rng(), ThreadPoolExecutor(decoders()) as threads, _told_of_damage():
        torch.manual_seed(rng.key(subject.seed, "tuning") >> 1)
        network = Tuned(subject.encoder.network(), classes)
        network.to(device(), memory_format=torch.channels_last)  # type: ignore[call-overload]
        losses = train(network, subject, tuning, chosen_n, train_n[chosen_n], threads)
        scores_nc = predict(network, subject, threads)
    if not torch.isfinite(scores_nc).all() or not math.isfinite(losses[-1]):
        raise UserError(
            "The weights of the network have diverged while it was trained on labels: its scores are not all finite. "
            f"Lower the learning rate of the probe, --PROBE.optim.lr, which is {tuning.optim.lr}."
        )
    rows = [*topk_rows(rank(scores_nc, torch.from_numpy(test_n)), classes), Row("train_loss", losses[-1])]
    return [Row(row.name + suffix, row.value, LAYER) for row in rows]


@contextmanager
def _told_of_damage() -> Iterator[None]:
    """Raises UserError when an image cannot be decoded."""
    try:
        yield
    except decode.DecodeError as error:
        raise UserError(
            f"An image of the probe that could be decoded when it was ingested no longer can: {error}. A shard of the "
            "train set or of the test set is damaged; ingest the source again."
        ) from error


def train(
    network: nn.Module,
    subject: Subject,
    tuning: Tuning,
    indices_n: Integers,
    labels_n: Integers,
    threads: ThreadPoolExecutor,
) -> list[float]:
    """Trains in place and returns the mean loss of every epoch.

    Args:
        network: from uint8 images to logits. Its part `head` has a learning rate of its own.
        indices_n: of the train images.
        labels_n: of the same images.
        threads: that decode.
    """
    images = subject.train.read(indices_n, ("image",)).column("image").to_pylist()
    solvers = [
        (optim.build(tuning.optim, network.get_submodule("backbone")), 1.0),
        (optim.build(tuning.optim, network.get_submodule("head")), tuning.head_lr),
    ]
    size = min(tuning.batch_size, len(images))
    batches = len(images) // size
    crop, place = SourceCrop(subject.image_size, tuning.min_scale), device()
    network.train()
    losses = []
    for epoch in range(tuning.epochs):
        order_n = rng.generator("tuning", subject.seed, epoch).permutation(len(images))
        found = torch.zeros((), device=place)
        for batch in range(batches):
            rows_b = order_n[batch * size : (batch + 1) * size]
            image_rng = ImageRng(subject.seed, np.full(size, epoch), indices_n[rows_b], "tuning")
            images_bchw = _views([images[row] for row in rows_b], crop, image_rng, threads)
            loss = cross_entropy(network(images_bchw.to(place)), torch.from_numpy(labels_n[rows_b]).to(place))
            rate = tuning.optim.lr_at(epoch * batches + batch, tuning.epochs * batches, tuning.batch_size)
            step(network, loss, solvers, rate, tuning.optim.clip_norm)
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
    """One step of all solvers, each with its multiple of the rate."""
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
    """Logits (n, classes) of the evaluation views of all test images."""
    network.eval()
    size, place = subject.image_size, device()
    scores = []
    with torch.inference_mode():
        for images in _parts(subject.test):
            batches = [images[first : first + _BATCH] for first in range(0, len(images), _BATCH)]
            views = threads.map(lambda batch: decode.centre(batch, size), batches)
            scores += [network(images_bchw.to(place)).float().cpu() for images_bchw in views]
    return torch.cat(scores)


def _parts(data: DataSet) -> Iterator[list[bytes]]:
    """The encoded images of a data set, in index order, as many at a time as fit into memory when decoded."""
    for first in range(0, data.num_images, _PART_IMAGES):
        part_n = np.arange(first, min(first + _PART_IMAGES, data.num_images), dtype=np.int64)
        yield data.read(part_n, ("image",)).column("image").to_pylist()


def _views(images: list[bytes], crop: SourceCrop, image_rng: ImageRng, threads: ThreadPoolExecutor) -> Tensor:
    """uint8 (b, 3, s, s): a random crop of each image, mirrored or not."""
    share = max(1, -(-len(images) // decoders()))

    def cut(first: int) -> Tensor:
        rows = slice(first, first + share)
        some = ImageRng(image_rng.seed, image_rng.epochs_b[rows], image_rng.indices_b[rows], image_rng.name)
        return hflip(decode.cut(images[rows], {"image": crop}, some)["image"], some, _MIRRORED)

    return torch.cat(list(threads.map(cut, range(0, len(images), share))))

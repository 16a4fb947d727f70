"""Encode the images that a probe reads itself: features of images, maps of layers, and frames of clips."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysl import rng
from raysl.backbone import norm
from raysl.backbone.network import Backbone
from raysl.dataset import DataSet
from raysl.dataset.clips import Clips
from raysl.errors import UserError
from raysl.extraction import Encode, EncodeMaps, reestimated
from raysl.probes import REESTIMATED, Subject
from raysl.probes._ridge import HELD_OUT
from raysl.ray_cluster.gpus import device

BATCH = 64
_PART_CLIPS = 64


def load(subject: Subject, views: Iterable[Tensor], specs: Sequence[str] | None = None) -> Encode:
    """Return the function from images to features of a subject.

    Args:
        views: batches of the images from which BatchNorm takes its statistics; see `sample`.
        specs: layers or grids; None for the layers of the subject.
    """
    specs = subject.layers if specs is None else specs
    seen = mixed(views) if subject.bn_statistics == REESTIMATED else []
    if not seen:
        return subject.encoder.load(device(), specs)
    return reestimated.load(subject.encoder, seen, device(), list(specs))


def load_maps(subject: Subject, views: Iterable[Tensor]) -> EncodeMaps:
    """Return the function from images to maps of the layers of a subject; see `load`."""
    seen = mixed(views) if subject.bn_statistics == REESTIMATED else []
    return reestimated.load_maps(subject.encoder, device(), subject.layers, seen or None)


def sample(count: int, each: int = 1) -> NDArray[np.int64]:
    """Return which of `count` images, or of clips with `each` frames, the statistics of BatchNorm come from."""
    return rng.sample(count, math.ceil(norm.STATISTICS_IMAGES / each), "bn statistics")


def mixed(views: Iterable[Tensor]) -> list[Tensor]:
    """Return the images of all batches in random batches of about equal size; none if there is only one image.

    Neighbors in a data set are often of one class, and the variance within a class is smaller than that of all images.
    """
    parts = list(views)
    images_nchw = torch.cat(parts) if parts else torch.empty(0)
    if len(images_nchw) < 2:
        return []
    order_n = rng.generator("bn statistics", "order").permutation(len(images_nchw))
    return [images_nchw[some] for some in np.array_split(order_n, math.ceil(len(order_n) / BATCH))]


def features(
    encode: Encode, views: Iterable[Tensor], reduced: Callable[[Tensor], Tensor] = lambda values_bd: values_bd
) -> dict[str, NDArray[np.float32]]:
    """Return the features of all images by layer or grid, float32 (n, d), of batches uint8 (b, 3, s, s).

    `reduced` is applied to the features of each batch.
    """
    made: dict[str, list[Tensor]] = {}
    for images_bchw in views:
        with torch.inference_mode():
            for spec, values_bd in encode(images_bchw.to(device())).items():
                made.setdefault(spec, []).append(reduced(values_bd.float()).cpu())
    return {spec: torch.cat(parts).numpy() for spec, parts in made.items()}


def cell_offset(backbone: Backbone, size: int) -> float:
    """Return where in its cell a place of the map looks, as a share of the cell: 0 for the corner, 0.5 for the middle.

    Strided convolutions with odd kernels and padding look at the corner: in a ResNet, place i of a map with stride s
    sees the surroundings of pixel s * i. A patch embedding looks at the middle. The gradient of the middle row says it.

    The backbone is in eval mode, for images of `size` pixels.
    """
    device = backbone.mean.device
    noise_bchw = 255 * torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    noise_bchw = noise_bchw.to(device).requires_grad_()
    maps_bdhw = backbone.maps(noise_bchw)
    row, stride = maps_bdhw.shape[2] // 2, size / maps_bdhw.shape[2]
    (gradient_bchw,) = torch.autograd.grad(maps_bdhw[:, :, row].square().sum(), noise_bchw)
    weight_h = gradient_bchw.abs().sum(dim=(0, 1, 3))
    center = float((weight_h * torch.arange(size, device=device)).sum() / weight_h.sum())
    return 0.0 if center < (row + 0.25) * stride else 0.5


def batches(count: int) -> Iterator[slice]:
    """Yield slices that cover `count` images in batches of equal size but for the last."""
    for first in range(0, count, BATCH):
        yield slice(first, min(first + BATCH, count))


def each_clip(
    data: DataSet, columns: Sequence[str], chosen_n: NDArray[np.int64] | None = None
) -> Iterator[tuple[int, Clips, int]]:
    """Yield chosen clips of a data set, or all: index, some clips in memory, and the row among them."""
    indices_n = np.arange(data.num_images, dtype=np.int64) if chosen_n is None else chosen_n
    for first in range(0, len(indices_n), _PART_CLIPS):
        some_n = indices_n[first : first + _PART_CLIPS]
        clips = Clips(data.read(some_n, columns))
        yield from ((index, clips, row) for row, index in enumerate(some_n.tolist()))


def seen_points(clips: Clips, row: int) -> NDArray[np.float32]:
    """Return the key points of the figure of a clip: float32 (n, points, 2), NaN where a point is not seen."""
    points_nk3 = clips.keypoints(row)
    return np.where(points_nk3[..., 2:] == 0, np.float32(np.nan), points_nk3[..., :2])


def spaced(count: int, wanted: int) -> list[int]:
    """Return the numbers of `wanted` of `count` frames, evenly spaced: the middles of equal parts."""
    return [(2 * part + 1) * count // (2 * min(wanted, count)) for part in range(min(wanted, count))]


def held_out(name: str, count: int) -> Tensor:
    """Return which images to learn from choose the penalty of a regression, at random: bool (n,); never all of them."""
    order_n = rng.generator(name, "held out").permutation(count)
    chosen_n = torch.zeros(count, dtype=torch.bool)
    chosen_n[order_n[: int(HELD_OUT * count)]] = True
    return chosen_n


def check_finite(name: str, maps: Iterable[Tensor]) -> None:
    """Raise UserError if the maps of a network are not finite."""
    if not all(torch.isfinite(one).all() for one in maps):
        raise UserError(
            f"The maps that the probe {name} reads are not all finite: training has diverged. Probe an earlier "
            "checkpoint, or train again with a lower --optim.lr."
        )

"""Nearest patches and nearest frames: what a network takes for alike, by the cosine of its features.

"patches" cuts random squares out of images and looks for the nearest among those of other images, as Doersch, Gupta and
Efros 2015 ("Unsupervised visual representation learning by context prediction", figure 4) show them. "frames" takes
whole frames of clips, as Shuffle and Learn (Misra, Zitnick and Hebert 2016) does to show that frames of the same pose
are near. The papers show pictures; the numbers here are conventions of raysl:

precision/k: share of the k nearest that come from an image, or a clip, of the same class; `chance` for random ones.
place_distance: for patches, the mean distance between the place of a patch in its image and that of the nearest,
    divided by that of random pairs. Near 0, a network finds patches by where they lie (chromatic aberration, borders).
pose_distance: for frames with key points, the mean distance between the points of a frame and those of the nearest,
    after both are centered, divided by that of random pairs. Below 1, frames of the same pose are near.

Queries come from the test set, neighbors from the train set. experiments/patches_nearest.py draws them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysl import rng
from raysl.dataset import DataSet
from raysl.errors import MissingValueError, UserError
from raysl.fields import Bounds
from raysl.probes import Row, Settings, Subject, check_features, common_labels
from raysl.probes._images import BATCH, each_clip, features, load, sample, seen_points, spaced
from raysl.probes._task import TaskProbe
from raysl.probes.retrieval import nearest
from raysl.stream import decode

_PART = 256


@dataclass(frozen=True)
class Config(Settings):
    """Protocol of nearest patches and frames.

    Args:
        of: "patches" of images, or "frames" of clips.
        share: side of a patch as a share of the side of the evaluation view; it is enlarged to the view.
        per_image: number of patches of each image, or of frames of each clip.
        max_images: largest number of images or clips of either set, sampled at random.
        ks: values of k, the number of neighbors; the first is that of the primary metric.
    """

    version: ClassVar[int] = 1
    of: Literal["patches", "frames"] = "patches"
    share: Annotated[float, Bounds(0.05, 1)] = 0.5
    per_image: Annotated[int, Bounds(1, 1000)] = 2
    max_images: Annotated[int, Bounds(2, 10**6)] = 1000
    ks: tuple[Annotated[int, Bounds(1, 10**4)], ...] = (5, 1)


@dataclass(frozen=True)
class Pieces:
    """Patches or frames, as the network sees them."""

    views_nchw: Tensor  # uint8 (n, 3, s, s)
    sources_n: NDArray[np.int64]  # int64 (n,), the image or clip of each
    # float (n, 2), the middle of a patch as a share of the view; 0.5 for frames.
    places_n2: NDArray[np.float64]
    # float (n, k, 2), key points in pixels, NaN where not seen; None without.
    points_nk2: NDArray[np.float32] | None = None


class Patches(TaskProbe[Config]):
    """Precision at each k, the first of which is the primary metric, and distances of places or poses."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.primary_metric = f"precision/k={config.ks[0]}"

    def check_data(self, train: DataSet, test: DataSet) -> None:
        """Raise UserError if frames of images are asked for, there are no labels, or there is only one image."""
        common_labels(train, test)
        if self.config.of == "frames" and not (train.manifest.clips and test.manifest.clips):
            raise MissingValueError(
                "--patches.of frames needs clips, and the data are images. Give clips, or --patches.of patches."
            )
        if train.num_images < 2:
            raise UserError("The probe patches compares images and has only one. Give more images.")

    def rows(self, subject: Subject) -> list[Row]:
        """Return the rows of each layer. Raises UserError if the features are not finite."""
        config, size = self.config, subject.image_size
        gallery, queries = (pieces(data, size, config) for data in (subject.train, subject.test))
        same = subject.train.manifest.fingerprint == subject.test.manifest.fingerprint
        encode = load(subject, [gallery.views_nchw[sample(len(gallery.views_nchw))]])
        known_of, asked_of = (
            features(encode, torch.split(one.views_nchw, BATCH)) for one in (gallery, queries)
        )
        known_n, asked_n = common_labels(subject.train, subject.test)
        known_n, asked_n = known_n[gallery.sources_n], asked_n[queries.sources_n]
        k = min(max(config.ks), max(1, len(known_n) - config.per_image * same))
        rows = []
        for layer in subject.layers:
            check_features(known_of[layer], "train")
            check_features(asked_of[layer], "test")
            index_nk = neighbors(asked_of[layer], known_of[layer], k, queries, gallery, same)
            found = {
                f"precision/k={k}": float((known_n[index_nk[:, :k]] == asked_n[:, None]).mean())
                for k in config.ks
            }
            found |= {"chance": _chance(asked_n, known_n), **_distances(queries, gallery, index_nk[:, 0])}
            rows += [Row(name, value, layer) for name, value in found.items()]
        return rows


def pieces(data: DataSet, size: int, config: Config) -> Pieces:
    """Return random patches, or frames, of a random sample of a data set."""
    chosen_n = rng.sample(data.num_images, config.max_images, "patches")
    if config.of == "frames":
        return _frames(data, chosen_n, size, config)
    side = max(1, round(config.share * size))
    drawn = rng.generator("patches", "places").integers(
        0, size - side + 1, (data.num_images, config.per_image, 2)
    )
    cut = []
    for first in range(0, len(chosen_n), _PART):
        files = data.read(chosen_n[first : first + _PART], ("image",)).column("image").to_pylist()
        for image_chw, row in zip(
            decode.evaluation_views(files, size), chosen_n[first : first + _PART], strict=True
        ):
            for top, left in drawn[row]:
                patch = image_chw[None, :, top : top + side, left : left + side]
                cut.append(torch.nn.functional.interpolate(patch, (size, size), mode="bilinear"))
    places_n2 = (drawn[chosen_n].reshape(-1, 2) + side / 2) / size
    return Pieces(torch.cat(cut), np.repeat(chosen_n, config.per_image), places_n2)


def _frames(data: DataSet, chosen_n: NDArray[np.int64], size: int, config: Config) -> Pieces:
    has_points = "keypoints" in data.manifest.clips.get("columns", [])
    columns = ["frames", "times", *(["keypoints"] if has_points else [])]
    views, sources, points = [], [], []
    for index, clips, row in each_clip(data, columns, chosen_n):
        numbers = spaced(clips.num_frames(row), config.per_image)
        views.append(decode.evaluation_views([clips.frame(row, number) for number in numbers], size))
        sources += [index] * len(numbers)
        if has_points:
            points.append(seen_points(clips, row)[numbers])
    middles_n2 = np.full((len(sources), 2), 0.5)
    return Pieces(torch.cat(views), np.array(sources), middles_n2, np.concatenate(points) if points else None)


def neighbors(
    query_nd: NDArray[np.float32],
    gallery_md: NDArray[np.float32],
    k: int,
    queries: Pieces,
    gallery: Pieces,
    same: bool,
) -> NDArray[np.int64]:
    """Return the k nearest pieces of the gallery, int64 (n, k); none of the own image if both sets are the `same`."""
    _, order_nm = nearest(query_nd, gallery_md, len(gallery_md) if same else k)
    if not same:
        return order_nm
    other_nm = gallery.sources_n[order_nm] != queries.sources_n[:, None]
    kept = [order_m[other_m][:k] for order_m, other_m in zip(order_nm, other_nm, strict=True)]
    return np.stack(kept)


def _chance(asked_n: NDArray[np.int64], known_n: NDArray[np.int64]) -> float:
    classes = int(max(asked_n.max(), known_n.max())) + 1
    shares = (np.bincount(one, minlength=classes) / len(one) for one in (asked_n, known_n))
    return float(np.multiply(*shares).sum())


def _distances(queries: Pieces, gallery: Pieces, nearest_n: NDArray[np.int64]) -> dict[str, float]:
    """Return distances of place or of pose to the nearest, relative to random pairs."""
    random_n = rng.generator("patches", "pairs").integers(0, len(gallery.sources_n), len(nearest_n))
    if queries.points_nk2 is not None and gallery.points_nk2 is not None:
        poses = [_centered(one.points_nk2) for one in (queries, gallery)]
        near, far = (_mean_distance(poses[0], poses[1][index_n]) for index_n in (nearest_n, random_n))
        return {"pose_distance": near / far} if far > 0 else {}
    if np.ptp(gallery.places_n2) == 0:
        return {}
    near, far = (
        _mean_distance(queries.places_n2[:, None], gallery.places_n2[index_n][:, None])
        for index_n in (nearest_n, random_n)
    )
    return {"place_distance": near / far} if far > 0 else {}


def _centered(points_nk2: Any) -> Any:
    seen_nk1 = np.isfinite(points_nk2).all(2, keepdims=True)
    sums_n12 = np.where(seen_nk1, points_nk2, 0).sum(1, keepdims=True)
    return points_nk2 - sums_n12 / seen_nk1.sum(1, keepdims=True).clip(1)


def _mean_distance(one_nk2: Any, other_nk2: Any) -> float:
    """Return the mean distance of points that both show; 0 without any."""
    distance_nk = np.linalg.norm(one_nk2 - other_nk2, axis=2)
    there_nk = np.isfinite(distance_nk)
    return float(distance_nk[there_nk].mean()) if there_nk.any() else 0.0

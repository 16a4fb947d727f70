"""LiDAR: how many directions tell images apart after what augmentation changes is divided out. No labels.

Thilak et al. 2023, "LiDAR: Sensing linear probing performance in joint embedding SSL architectures". Every image is a
class, and its augmented views are the members. With e_ij the features of view j of image i, mu_i their mean over j, and
mu the mean of all:

    S_b = mean_i (mu_i - mu)(mu_i - mu)^T          S_w = mean_ij (e_ij - mu_i)(e_ij - mu_i)^T + delta I
    lambda = eigenvalues of S_w^-1/2 S_b S_w^-1/2   p_k = lambda_k / sum(lambda) + 1e-7
    LiDAR = exp(-sum_k p_k log p_k)

The paper takes 1,000 images and 50 views, as here. RankMe and alpha-ReQ (in the probe `collapse`) see the features of
images once and count directions of noise too. The rank is at most the number of images less one, so that values of
other numbers of images do not compare. Views are random crops with the augmentation --lidar.augmentation, the same for
every method; delta is a constant against division by 0, and it makes features of tiny scale look collapsed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from raysl import pretext, rng
from raysl.augment import recipe
from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.fields import Bounds
from raysl.pretext import Geometry
from raysl.probes import Row, Settings, Subject, check_features
from raysl.probes._images import batches, features, load, sample
from raysl.probes._task import TaskProbe
from raysl.probes.collapse import rankme
from raysl.rng import ImageRng
from raysl.stream import decode
from raysl.stream.views import View


@dataclass(frozen=True)
class Config(Settings):
    """Protocol of LiDAR.

    Args:
        images: largest number of test images, sampled at random.
        views: number of augmented views of each.
        augmentation: name of the augmentation of the views.
        min_scale: smallest share of the area of an image that a crop covers.
        delta: added to the variance within images in every direction.
    """

    version: ClassVar[int] = 1
    images: Annotated[int, Bounds(2, 10**6)] = 1000
    views: Annotated[int, Bounds(2, 10**4)] = 50
    augmentation: str = "simclr"
    min_scale: Annotated[float, Bounds(1e-6, 1)] = 0.2
    delta: Annotated[float, Bounds(1e-12, 1)] = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        recipe(self.augmentation)


class Lidar(TaskProbe[Config]):
    """LiDAR, the primary metric, and its share of the largest possible value."""

    primary_metric = "lidar"
    is_score = False

    def check_data(self, train: DataSet, test: DataSet) -> None:
        """Raise UserError if there is only one image."""
        if test.num_images < 2:
            raise UserError("The probe lidar compares images and has only one. Give more images.")

    def rows(self, subject: Subject) -> list[Row]:
        """Return LiDAR of each layer. Raises UserError if the features are not finite."""
        config, count = self.config, min(self.config.images, subject.test.num_images)
        chosen_n = rng.sample(subject.test.num_images, count, "lidar")
        files = subject.test.read(chosen_n, ("image",)).column("image").to_pylist()
        encode = load(subject, self._views(subject, [files[i] for i in sample(count)], 0))
        scatter: dict[str, Scatter] = {}
        for some in batches(count):
            made: dict[str, list[NDArray[np.float32]]] = {}
            for number in range(config.views):
                seen = self._views(subject, files[some], number, some.start)
                for layer, values_bd in features(encode, seen).items():
                    made.setdefault(layer, []).append(values_bd)
            for layer in subject.layers:
                views_bqd = np.stack(made[layer], 1)
                check_features(views_bqd.reshape(len(views_bqd), -1), "test")
                scatter.setdefault(layer, Scatter(views_bqd.shape[2])).add(views_bqd.astype(np.float64))
        rows = []
        for layer, found in scatter.items():
            value, most = found.lidar(config.delta), min(count - 1, len(found.mean_d))
            rows += [Row("lidar", value, layer), Row("lidar_share", value / most, layer)]
        return rows

    def _views(self, subject: Subject, files: list[bytes], number: int, start: int = 0) -> Iterator[Tensor]:
        """Yield one augmented view of images, uint8 (b, 3, s, s), in batches."""
        geometry = Geometry(subject.image_size, min_scale=self.config.min_scale, seed=subject.seed)
        view = View(pretext.build("identity", {}, geometry), recipe(self.config.augmentation))
        for some in batches(len(files)):
            indices = np.arange(start + some.start, start + some.stop, dtype=np.int64)
            image_rng = ImageRng(0, np.full(len(indices), number, np.int64), indices, "lidar")
            yield view(
                decode.cut(files[some], {"view": view.source}, image_rng)["view"], image_rng.named("view")
            ).crops_bpchw[:, 0]


class Scatter:
    """The sums over images that LiDAR is made of, in float64."""

    def __init__(self, d: int) -> None:
        self.images = self.views = 0
        self.mean_d: NDArray[Any] = np.zeros(d)
        self.means_dd: NDArray[Any] = np.zeros((d, d))
        self.within_dd: NDArray[Any] = np.zeros((d, d))

    def add(self, views_bqd: NDArray[np.float64]) -> None:
        """Add images with q views each."""
        mean_bd = views_bqd.mean(1)
        apart_nd = (views_bqd - mean_bd[:, None]).reshape(-1, views_bqd.shape[2])
        self.images += len(views_bqd)
        self.views += len(apart_nd)
        self.mean_d += mean_bd.sum(0)
        self.means_dd += mean_bd.T @ mean_bd
        self.within_dd += apart_nd.T @ apart_nd

    def lidar(self, delta: float) -> float:
        """Return LiDAR; 0 if all images have the same mean."""
        mean_d = self.mean_d / self.images
        between_dd = self.means_dd / self.images - np.outer(mean_d, mean_d)
        within_dd = self.within_dd / self.views + delta * np.eye(len(mean_d))
        # L^-1 S_b L^-T has the eigenvalues of S_w^-1/2 S_b S_w^-1/2 for S_w = L L^T.
        lower_dd = np.linalg.cholesky(within_dd)
        half_dd = np.linalg.solve(lower_dd, between_dd)
        lambda_d = np.linalg.eigvalsh(np.linalg.solve(lower_dd, half_dd.T)).clip(min=0)
        if lambda_d.sum() <= 1e-12:
            return 0.0
        return rankme(lambda_d)

"""Key points: where the parts of a figure are, by a linear map from a frozen layer, judged by PCK.

PCK at t is the share of annotated points whose prediction is nearer than t times a reference length (Yang and Ramanan
2013, "Articulated human detection with flexible mixtures of parts"): the longer side of the figure's box, or, for MPII,
its length of the head (PCKh, Andriluka et al. 2014). Shuffle and Learn (Misra, Zitnick and Hebert 2016) fine-tunes an
AlexNet that regresses the points of FLIC and MPII; this probe keeps the network frozen, so that it measures the layer,
and is linear. Numbers compare with one another and not with published ones.

The head "regression" is ridge regression of the coordinates from the map of a layer, averaged into the largest square
grid with at most `dims` numbers. The head "heatmap" is ridge regression of a Gaussian around each point (Tompson et al.
2014) from the features of each place, in a grid of `side` cells; the prediction is the peak, refined by a parabola
through it and its neighbors. Penalties are chosen on a tenth of the figures to learn from. Both are exact: no learning
rate, no seed.

`PCK_without_image` is that of the mean pose of the training figures, which sees no image: below it nothing was learned.
Files and the square that a figure is seen in: COCO, MPII (.mat, or JSON as HRNet has it) and DeepLabCut (CSV); see
`raysl.probes._poses`. Without --keypoints.test, a fifth of the images, by their names, is scored. Without any file,
--train and --test must be clips with key points, as `clips:500` draws them: a figure is seen in its whole frame.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from raysl import rng
from raysl.dataset import DataSet
from raysl.errors import MissingValueError, UserError
from raysl.fields import Bounds
from raysl.probes import Row, Settings, Subject, _poses, field_values
from raysl.probes._images import batches, check_finite, held_out, load_maps, sample
from raysl.probes._poses import Figure, Figures
from raysl.probes._ridge import Moments, Readout, fit
from raysl.probes._task import TaskProbe
from raysl.ray_cluster.gpus import device
from raysl.storage import Folder

COMMAND = "raysl probe RUN --train clips:500#train --test clips:200#test --probes keypoints"

_TESTED = 0.2


@dataclass(frozen=True)
class Config(Settings):
    """Protocol of key points.

    Args:
        train: file of annotations to learn from; None for the clips of --train and --test.
        test: file of annotations to score; without one, a fifth of the images of `train`.
        images: folder of the images, relative to the file's, or a full path or URI.
        reference: length that distances are compared with: "box", or "head" for MPII's .mat.
        thresholds: PCK is given at each, the one of the primary metric first.
        head: "regression" of coordinates from the whole map, or "heatmap" from each place.
        dims: for "regression": maximum number of features of a layer, whose feature map is averaged into a grid.
        side: for "heatmap": side of the grid in cells.
        sigma: for "heatmap": standard deviation of the Gaussians as a share of the view.
        clip_frames: number of frames of each clip, evenly spaced.
        max_figures: largest number of figures to learn from, sampled at random; they are kept in memory.
    """

    version: ClassVar[int] = 1
    train: str | None = None
    test: str | None = None
    images: str = "."
    reference: Literal["box", "head"] = "box"
    thresholds: tuple[Annotated[float, Bounds(1e-6, 10)], ...] = (0.1, 0.05, 0.2)
    head: Literal["regression", "heatmap"] = "regression"
    dims: Annotated[int, Bounds(1, 10**5)] = 2048
    side: Annotated[int, Bounds(2, 256)] = 16
    sigma: Annotated[float, Bounds(1e-3, 1)] = 0.06
    clip_frames: Annotated[int, Bounds(1, 10**6)] = 2
    max_figures: Annotated[int, Bounds(10, 10**7)] = 20_000

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("train", "test"):  # Workers have another working directory.
            if file := getattr(self, name):
                object.__setattr__(self, name, str(Folder(file)))

    def settings(self) -> dict[str, Any]:
        """Return the settings with the hashes of the annotations in place of their files, and no folder of images."""
        held = {
            name: _hash(file) if file else "" for name, file in (("train", self.train), ("test", self.test))
        }
        return {**field_values(self), **held, "images": ""}


class Keypoints(TaskProbe[Config]):
    """PCK at each threshold, the first of which is the primary metric, and their mean distance."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.own_images = config.train is not None
        self.primary_metric = f"PCK@{config.thresholds[0]:g}"

    def check_data(self, train: DataSet, test: DataSet) -> None:
        """Raise UserError if there are neither annotations nor clips with key points, or one set of clips twice."""
        if self.config.train:
            return
        if not train.manifest.clips.get("keypoints"):
            raise MissingValueError(
                "The probe keypoints needs images with key points, and --train has none. Give --keypoints.train FILE, "
                "annotations of COCO, MPII or DeepLabCut, or clips that have key points, such as --train clips:500 "
                "--test clips:200#test."
            )
        if (
            not test.manifest.clips.get("keypoints")
            or train.manifest.fingerprint == test.manifest.fingerprint
        ):
            raise UserError(
                "The probe keypoints learns from the clips of --train and is scored on others. Give --test another "
                "set of clips with key points, such as clips:200#test."
            )

    def rows(self, subject: Subject) -> list[Row]:
        """Return PCK, PCK of each key point at the first threshold, and the mean distance, for each layer.

        Raises UserError if a file cannot be read (see `_poses.read`), an image is missing, or a layer has no map.
        """
        config, size = self.config, subject.image_size
        names, train, test, images = _figures(subject, config)
        chosen = [train[i] for i in sample(len(train))]
        views = (_poses.views(chosen[some], images, size)[0] for some in batches(len(chosen)))
        encode = load_maps(subject, views)

        def seen(figures: Sequence[Figure]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
            made: dict[str, list[Tensor]] = {}
            points, lengths = [], []
            for some in batches(len(figures)):
                images_bchw, points_bk2, lengths_b = _poses.views(figures[some], images, size)
                with torch.inference_mode():
                    for layer, map_bdhw in encode(images_bchw.to(device())).items():
                        made.setdefault(layer, []).append(_resized(map_bdhw.float(), config))
                points.append(points_bk2)
                lengths.append(lengths_b)
            maps = {layer: torch.cat(parts) for layer, parts in made.items()}
            return maps, torch.cat(points), torch.cat(lengths)

        maps_of, points_nk2, _ = seen(train)
        tested_of, true_nk2, lengths_n = seen(test)
        check_finite("keypoints", [*maps_of.values(), *tested_of.values()])
        held_n = held_out("keypoints", len(train))
        mean_k2 = points_nk2.nanmean(0).nan_to_num(0.5)
        blind = scores(mean_k2.expand_as(true_nk2), true_nk2, lengths_n, names, config.thresholds)
        without_image = self.primary_metric.replace("@", "_without_image@")
        rows = []
        for layer, map_ndhw in maps_of.items():
            said_nk2 = predicted(map_ndhw, points_nk2, held_n, tested_of[layer], config, mean_k2)
            found = scores(said_nk2, true_nk2, lengths_n, names, config.thresholds)
            rows += [Row(name, value, layer) for name, value in found.items()]
            rows.append(Row(without_image, blind[self.primary_metric], layer))
        return rows


def _figures(
    subject: Subject, config: Config
) -> tuple[tuple[str, ...], Sequence[Figure], Sequence[Figure], Folder | None]:
    """Return the names of the key points, the figures to learn from and to score, and the folder of their images."""
    if not config.train:
        seen, unseen = (_poses.of_clips(one, config.clip_frames) for one in (subject.train, subject.test))
        return seen.names, _sample(seen.figures, config), unseen.figures, None
    folder, file = _split(config.train)
    train = _poses.read(folder, file, config.reference)
    is_full = config.images.startswith("/") or "://" in config.images
    images = Folder(config.images) if is_full else folder / config.images
    if not config.test:
        learned, scored = _parted(train)
        return train.names, _sample(learned, config), scored, images
    test = _poses.read(*_split(config.test), config.reference)
    if test.names != train.names:
        raise UserError(
            f"The annotations {config.train!r} and {config.test!r} name other key points: {train.names} and "
            f"{test.names}. Give two files of one kind."
        )
    if shared := {str(one.image) for one in train.figures} & {str(one.image) for one in test.figures}:
        raise UserError(
            f"The annotations {config.train!r} and {config.test!r} share {len(shared)} images, the first being "
            f"{min(shared)!r}. The probe is scored on other images than it learns from: give two files that share "
            "none, or leave out --keypoints.test."
        )
    return train.names, _sample(train.figures, config), test.figures, images


def _sample(figures: Sequence[Figure], config: Config) -> list[Figure]:
    return [figures[i] for i in rng.sample(len(figures), config.max_figures, "keypoints", "sample")]


def _parted(found: Figures) -> tuple[list[Figure], list[Figure]]:
    """Return the figures to learn from and to score. All figures of an image are on one side."""
    names = sorted({str(one.image) for one in found.figures})
    order_n = rng.generator("keypoints", "test images").permutation(len(names))
    tested = {names[i] for i in order_n[: max(1, round(_TESTED * len(names)))]}
    if len(names) < 2:
        raise UserError(
            "The probe keypoints learns from some images and is scored on others, and its annotations name one image. "
            "Give annotations of more images."
        )
    return (
        [one for one in found.figures if one.image not in tested],
        [one for one in found.figures if one.image in tested],
    )


def _resized(map_bdhw: Tensor, config: Config) -> Tensor:
    """Return a map in the grid of the head, on the CPU."""
    if config.head == "heatmap":
        sides = (config.side, config.side)
        return interpolate(map_bdhw, sides, mode="bilinear", antialias=True).clone().cpu()
    _, d, height, width = map_bdhw.shape
    cells = max(1, math.isqrt(config.dims // d))
    return adaptive_avg_pool2d(map_bdhw, (min(cells, height), min(cells, width))).clone().cpu()


def predicted(
    map_ndhw: Tensor, points_nk2: Tensor, held_n: Tensor, tested_mdhw: Tensor, config: Config, mean_k2: Tensor
) -> Tensor:
    """Return the predicted points of other figures, float (m, k, 2).

    Args:
        map_ndhw: maps of the figures to learn from.
        points_nk2: their points as shares of the view, NaN where not annotated.
        held_n: bool (n,), the figures that choose the penalty.
        tested_mdhw: maps of the other figures.
        mean_k2: prediction of a point that no figure has.
    """
    shown_nk = points_nk2.isfinite().all(2)
    said_mk2 = mean_k2.expand(len(tested_mdhw), *mean_k2.shape).clone()
    for members in _alike(shown_nk):
        rows_n = shown_nk[:, members[0]]
        if not rows_n.any():
            continue
        some = map_ndhw[rows_n], points_nk2[rows_n][:, members], held_n[rows_n]
        if config.head == "heatmap":
            said_mk2[:, members] = _by_heatmap(*some, tested_mdhw, config)
        else:
            readout = _readout(some[0].flatten(1), some[1].flatten(1), some[2])
            said_mk2[:, members] = readout(tested_mdhw.flatten(1)).view(len(tested_mdhw), -1, 2)
    return said_mk2


def _alike(shown_nk: Tensor) -> list[list[int]]:
    """Return the key points in groups that the same figures show, so that a group is fitted at once."""
    groups: dict[bytes, list[int]] = {}
    for k in range(shown_nk.shape[1]):
        groups.setdefault(shown_nk[:, k].numpy().tobytes(), []).append(k)
    return list(groups.values())


def _readout(features_nd: Tensor, targets_nk: Tensor, held_n: Tensor) -> Readout:
    fitted, held_out = (Moments(features_nd.shape[1], targets_nk.shape[1]) for _ in range(2))
    fitted.add(features_nd[~held_n], targets_nk[~held_n])
    held_out.add(features_nd[held_n], targets_nk[held_n])
    return fit(fitted, held_out)[0]


def _by_heatmap(
    map_ndhw: Tensor, points_nk2: Tensor, held_n: Tensor, tested_mdhw: Tensor, config: Config
) -> Tensor:
    targets_nkhw = gaussians(points_nk2, config.side, config.sigma)
    places = config.side**2
    features_nd, targets_nk = (one.movedim(1, -1).flatten(0, 2) for one in (map_ndhw, targets_nkhw))
    readout = _readout(features_nd, targets_nk, held_n.repeat_interleave(places))
    return torch.cat(
        [peaks(readout(part.movedim(1, -1)).movedim(-1, 1)) for part in torch.split(tested_mdhw, 256)]
    )


def gaussians(points_nk2: Tensor, side: int, sigma: float) -> Tensor:
    """Return heat maps (n, k, side, side) with a peak of 1 at each point; coordinates and sigma are shares."""
    centers = (torch.arange(side) + 0.5) / side
    across, down = (-((centers - points_nk2[..., i, None]) ** 2) / (2 * sigma**2) for i in (0, 1))
    return (down[..., :, None] + across[..., None, :]).exp()


def peaks(heat_nkhw: Tensor) -> Tensor:
    """Return the places of the largest values as shares, (n, k, 2), refined by a parabola along each axis."""
    side = heat_nkhw.shape[-1]
    best_nk = heat_nkhw.flatten(2).argmax(2)
    down_nk, across_nk = best_nk // side, best_nk % side
    found = []
    for profile_nks, at_nk in (
        (heat_nkhw.gather(2, down_nk[..., None, None].expand(*down_nk.shape, 1, side))[..., 0, :], across_nk),
        (heat_nkhw.gather(3, across_nk[..., None, None].expand(*down_nk.shape, side, 1))[..., 0], down_nk),
    ):
        before, here, after = (
            profile_nks.gather(2, (at_nk + step).clamp(0, side - 1)[..., None])[..., 0] for step in (-1, 0, 1)
        )
        bend = before - 2 * here + after
        step_nk = torch.where(bend < 0, (before - after) / (2 * bend), 0.0).clamp(-0.5, 0.5)
        found.append((at_nk + 0.5 + step_nk) / side)
    return torch.stack(found, dim=2)


def scores(
    said_nk2: Tensor, true_nk2: Tensor, lengths_n: Tensor, names: Sequence[str], thresholds: Sequence[float]
) -> Mapping[str, float]:
    """Return PCK at each threshold, PCK of each key point at the first, and the mean distance over the length.

    Points and the length of each figure are shares of the view, thresholds shares of the length. A point that is not
    annotated (NaN) is not judged. Raises UserError if no point is annotated.
    """
    distance_nk = (said_nk2 - true_nk2).norm(dim=2) / lengths_n[:, None]
    there_nk = true_nk2.isfinite().all(2)
    if not there_nk.any():
        raise UserError("No key point of the figures to score is annotated. Give other annotations.")
    right_nk = distance_nk < thresholds[0]
    found = {f"PCK@{t:g}": float((distance_nk < t)[there_nk].double().mean()) for t in thresholds}
    for k, name in enumerate(names):
        if there_nk[:, k].any():
            found[f"PCK@{thresholds[0]:g}/{name}"] = float(right_nk[:, k][there_nk[:, k]].double().mean())
    return {**found, "mean_distance": float(distance_nk[there_nk].double().mean())}


@lru_cache(maxsize=16)
def _hash(file: str) -> str:
    folder, name = _split(file)
    return hashlib.blake2b(folder.read(name), digest_size=16).hexdigest()


def _split(file: str) -> tuple[Folder, str]:
    place, _, name = str(Folder(file)).rpartition("/")
    return Folder(place or "/"), name

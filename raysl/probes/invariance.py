"""Invariance: how far the features of an image move when it is transformed, and whether they predict the transform.

The distance between f(I) and f(t(I)), both of unit length, is in 0 .. 2. It is measured on the features of every layer,
so that methods without heads have it too. If t makes several crops, f(t(I)) is the unit vector of their mean features
(a convention of raysl). PIRL (Misra and van der Maaten 2020, figure 5) shows the distance between its heads, f(v_I) and
g(v_It), for the transform that it was trained with: those rows have the layer "heads".

A network that maps all images to one point is perfectly invariant, so the distance between different images is reported
too, and `closer` is the probability that a transformed image is closer to its original than another image is. It is
computed for each image with the same number of other images. Images that t does not change, such as those rotated by 0
degrees, are left out.

In training each view has a batch of its own, and so its own statistics in every BatchNorm. The running statistics are a
mixture of views, patches and whole images in a jigsaw, or those of patches alone, and move a view for that reason only.
So each view is normalized by its own statistics here too, in batches of about 128 images.

The read-out is the opposite measure: top-1 of a linear probe that predicts the label of t (permutation, angle) from the
features of all crops side by side, trained on half of the images and scored on the other half, beside chance. For a t
without labels (colorization, inpainting) it predicts if an image was transformed: `readout_whether`, with chance 0.5.

Images are evaluation views at the source size of the transform. Labels of the images are not used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from raysl import pretext, rng
from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.extraction import Heads, heads
from raysl.fields import Bounds
from raysl.pretext import Geometry, Pretext, Transformed
from raysl.pretext.jigsaw import Config as Jigsaw
from raysl.probes import Labeled, Row, Settings, Subject, check_features, field_values, primary
from raysl.probes._task import TaskProbe
from raysl.probes.linear import Config as LinearConfig
from raysl.probes.linear import Linear
from raysl.ray_cluster import gpus
from raysl.rng import ImageRng
from raysl.storage.records import write_record
from raysl.stream import decode

HISTOGRAM = "histogram.json"
OTHERS = "others"
HEADS = "heads"
EDGES = np.linspace(0, 2, 41)
_BATCH = 128
# Distances that differ by less are equal, because features are float32.
_EQUAL = 1e-6


@dataclass(frozen=True)
class Config(Settings):
    """Protocol of the measure of invariance.

    Args:
        transforms: names of pretext transforms, with their default hyperparameters, except for `grid`.
        grid: cells per side of the jigsaw. If the runs learned from a jigsaw, give the grid of theirs.
        max_images: largest number of test images, sampled at random.
        others: number of other images that each original is compared with, sampled at random.
        readout: protocol of the classifier that predicts the label of a transform.
        statistics: statistics of BatchNorm: "batch" for those of each view, or "kept" for the running statistics of
            training, which the network uses in practice.
    """

    version: ClassVar[int] = 3
    transforms: tuple[str, ...] = ("jigsaw", "rotation", "colorization", "inpainting")
    grid: Annotated[int, Bounds(2, 16)] = 3
    max_images: Annotated[int, Bounds(4, 10**9)] = 2000
    others: Annotated[int, Bounds(1, 10**6)] = 64
    readout: LinearConfig = field(default_factory=lambda: LinearConfig(dims=0))
    statistics: Literal["batch", "kept"] = "batch"

    def settings(self) -> dict[str, Any]:
        """Return the settings with the hyperparameters of the transforms. Raises UserError if one does not exist."""
        parts = sorted({part.strip() for spec in self.transforms for part in spec.split("+")})
        given = self.hyperparameters()
        used = {name: asdict(given.get(name) or pretext.load(name)[0]()) for name in parts}
        # These names are part of the protocol hash: "dials", and fields with the spelling of its first version.
        spelled = {
            name: {
                key.replace("color", "colour").replace("neighbor", "neighbour"): value
                for key, value in fields.items()
            }
            for name, fields in used.items()
        }
        values = field_values(self)
        del values["grid"]  # It is one of the hyperparameters.
        return values | {"dials": spelled}

    def hyperparameters(self) -> dict[str, Jigsaw]:
        """Return the hyperparameters by transform; a missing transform has its defaults."""
        return {"jigsaw": Jigsaw(grid=self.grid)}


class Invariance(TaskProbe[Config]):
    """Distances, the probability `closer` and read-outs of each transform, for every layer.

    Names of rows end in the name of the transform. The primary metric, `closer`, is the mean over the transforms: 1 for
    an invariant layer, 0.5 if a transformed image is as far away as another image, 0 if it is always farther. The layer
    "heads" has one transform and no mean.

    The folder of the subject gets `histogram.json`: {"edges": 41 distances, "counts": {layer: {transform or "others":
    40 counts}}}.
    """

    primary_metric = "closer"
    is_score = False

    def check_data(self, train: DataSet, test: DataSet) -> None:
        """Raise UserError if there are fewer than four images."""
        if test.num_images < 4:
            raise UserError(
                f"The probe invariance compares images and the test set has {test.num_images}. Give at least 4."
            )

    def examine(self, subject: Subject) -> Iterator[Row]:
        """Yield the rows. Raises UserError if a transform does not exist or does not suit the size of the view."""
        self.transforms(subject)
        yield from super().examine(subject)

    def transforms(self, subject: Subject) -> dict[str, Pretext]:
        """Return the transforms by name. Raises UserError as `examine`."""
        geometry = Geometry(subject.image_size, predicted=True, seed=subject.seed)
        hyperparameters = self.config.hyperparameters()
        return {name: pretext.build(name, hyperparameters, geometry) for name in self.config.transforms}

    def rows(self, subject: Subject) -> list[Row]:
        """Return the rows, and write the histogram. Raises UserError if the features are not finite."""
        config, transforms = self.config, self.transforms(subject)
        sample, device = _Sample.draw(subject, config.max_images), gpus.device()
        by_batch = config.statistics == "batch"
        encode = subject.encoder.load(device, subject.layers, by_batch)

        def seen(transform: Pretext) -> tuple[dict[str, Tensor], Tensor | None]:
            """Return the features of the views by layer, float (n, p, d), and their labels if there are any."""
            made: dict[str, list[Tensor]] = {layer: [] for layer in subject.layers}
            labels: list[Tensor] = []
            for view in sample.views(transform):
                labels += [view.target] if transform.num_labels and view.target is not None else []
                found = encode(view.crops_bpchw.flatten(0, 1).to(device))
                for layer, values in made.items():
                    values.append(found[layer].float().cpu().view(*view.crops_bpchw.shape[:2], -1))
            features_of = {layer: torch.cat(values) for layer, values in made.items()}
            return features_of, torch.cat(labels) if labels else None

        whole = pretext.build("identity", {}, Geometry(subject.image_size))
        with torch.inference_mode():
            plain, _ = seen(whole)
            moved = {name: seen(transform) for name, transform in transforms.items()}
        changed = {name: sample.changed(transform, whole) for name, transform in transforms.items()}
        rows: list[Row] = []
        counts: dict[str, Any] = {}
        for layer in subject.layers:
            check_features(plain[layer][:, 0].numpy(), "test")
            of_layer = {
                name: (features_of[layer], label_n, changed[name])
                for name, (features_of, label_n) in moved.items()
            }
            found_rows, counts[layer] = _layer(plain[layer][:, 0], of_layer, transforms, config)
            rows += [Row(row.name, row.value, layer) for row in found_rows]
        if (compared := heads(subject.encoder, device, by_batch)) is not None:
            found_rows, counts[HEADS] = _heads(compared, sample, device, config)
            rows += found_rows
        write_record(subject.folder, HISTOGRAM, {"edges": EDGES.tolist(), "counts": counts})
        return rows


@dataclass(frozen=True)
class _Sample:
    images: list[bytes]
    indices_n: NDArray[np.int64]
    seed: int

    @staticmethod
    def draw(subject: Subject, most: int) -> _Sample:
        order_n = rng.generator("invariance").permutation(subject.test.num_images)[:most]
        images = subject.test.read(order_n, ("image",)).column("image").to_pylist()
        return _Sample(images, order_n, subject.seed)

    def views(self, transform: Pretext) -> Iterator[Transformed]:
        """Yield the views of all images, in batches of about equal size."""
        for some in np.array_split(np.arange(len(self.images)), math.ceil(len(self.images) / _BATCH)):
            images_bchw = decode.evaluation_views([self.images[i] for i in some], transform.source.size)
            image_rng = ImageRng(self.seed, np.zeros_like(some), self.indices_n[some], "invariance")
            yield transform.transform(images_bchw, image_rng)

    def changed(self, transform: Pretext, whole: Pretext) -> NDArray[np.bool_]:
        """Return bool (n,): images whose view differs from the whole image; all, if no view differs."""
        parts = [
            (one.crops_bpchw != other.crops_bpchw).flatten(1).any(1)
            if one.crops_bpchw.shape == other.crops_bpchw.shape
            else torch.ones(len(one.crops_bpchw), dtype=torch.bool)
            for one, other in zip(self.views(transform), self.views(whole), strict=True)
        ]
        changed_n: NDArray[np.bool_] = torch.cat(parts).numpy()
        return changed_n if changed_n.any() else ~changed_n


def _heads(
    compared: Heads, sample: _Sample, device: torch.device, config: Config
) -> tuple[list[Row], dict[str, list[int]]]:
    """Return rows and histograms of the heads of a method, for the transform that it was trained with."""
    pairs = zip(sample.views(compared.image), sample.views(compared.transformed), strict=True)
    with torch.inference_mode():
        found = [
            compared.embed(image.crops_bpchw.to(device), transformed.crops_bpchw.to(device))
            for image, transformed in pairs
        ]
    image_nd, transformed_nd = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
    for embeddings_nd in (image_nd, transformed_nd):
        check_features(embeddings_nd.numpy(), "test")
    others_nk = to_others(image_nd, config.others)
    changed_n = sample.changed(compared.transformed, compared.image)
    distance_n = distances(image_nd, transformed_nd)[changed_n]
    moved = _moved(compared.transform, distance_n, others_nk[changed_n])
    rows = [
        Row(f"distance/{OTHERS}", float(others_nk.mean()), HEADS),
        *(Row(row.name, row.value, HEADS) for row in moved),
    ]
    return rows, {OTHERS: histogram(others_nk), compared.transform: histogram(distance_n)}


def _layer(
    plain_nd: Tensor,
    moved: Mapping[str, tuple[Tensor, Tensor | None, NDArray[np.bool_]]],
    transforms: Mapping[str, Pretext],
    config: Config,
) -> tuple[list[Row], dict[str, list[int]]]:
    """Return rows and histograms of one layer.

    Args:
        plain_nd: features of the images, in a random order.
        moved: for each transform features (n, p, d) of the transformed images, labels (n,) of the transform, and bool
            (n,), images that it changed.
    """
    others_nk = to_others(plain_nd, config.others)
    rows = [Row(f"distance/{OTHERS}", float(others_nk.mean()))]
    counts, shares = {OTHERS: histogram(others_nk)}, []
    for name, (moved_npd, label_n, changed_n) in moved.items():
        # Patches of raw pixels have fewer features than the image.
        if moved_npd.shape[2] == plain_nd.shape[1]:
            distance_n = distances(plain_nd, moved_npd.mean(1))[changed_n]
            counts[name] = histogram(distance_n)
            found = _moved(name, distance_n, others_nk[changed_n])
            shares.append(found[-1].value)
            rows += found
        half = len(plain_nd) // 2
        parts = slice(half), slice(half, None)
        if label_n is not None:
            halves = [Labeled(moved_npd[n].flatten(1).numpy(), label_n[n].numpy()) for n in parts]
            rows += _readout(f"/{name}", halves, 1 / transforms[name].num_labels, config.readout)
        elif moved_npd.shape[2] == plain_nd.shape[1]:
            # Both copies of an image are in the same half.
            moved_nd = moved_npd.mean(1)
            pairs = [(plain_nd[n], moved_nd[n]) for n in parts]
            halves = [Labeled(torch.cat(pair).numpy(), np.repeat([0, 1], len(pair[0]))) for pair in pairs]
            rows += _readout(f"_whether/{name}", halves, 0.5, config.readout)
    if len(shares) == len(moved):
        rows.append(Row("closer", float(np.mean(shares))))
    return rows, counts


def _moved(name: str, distance_n: NDArray[np.float64], others_nk: NDArray[np.float64]) -> list[Row]:
    """Return the rows of the distances of one transform; `closer` is the last."""
    return [
        Row(f"distance/{name}", float(distance_n.mean())),
        Row(f"distance_std/{name}", float(distance_n.std())),
        Row(f"closer/{name}", closer(distance_n, others_nk)),
    ]


def _readout(suffix: str, halves: Sequence[Labeled], chance: float, config: LinearConfig) -> list[Row]:
    """Return the accuracy of predicting what was done to an image; nothing if the train half shows a single label."""
    learned, judged = halves
    if len(np.unique(learned.labels_n)) < 2:
        return []
    accuracy = primary(Linear(config), learned, judged)
    return [Row(f"readout{suffix}", accuracy), Row(f"chance{suffix}", chance)]


def distances(one_nd: Tensor, other_nd: Tensor) -> NDArray[np.float64]:
    """Return float64 (n,) in 0 .. 2, the distances between the unit vectors of rows."""
    one, other = normalize(one_nd.double(), dim=1), normalize(other_nd.double(), dim=1)
    distance_n: NDArray[np.float64] = (one - other).norm(dim=1).numpy()
    return distance_n


def to_others(features_nd: Tensor, most: int) -> NDArray[np.float64]:
    """Return float64 (n, k): distances of each row to the next k rows; k is `most`, or all others if there are fewer.

    The features are in a random order, so that the next rows are a random sample.
    """
    unit_nd = normalize(features_nd.double(), dim=1)
    shifts = range(1, min(most, len(unit_nd) - 1) + 1)
    return np.stack([(unit_nd - unit_nd.roll(-shift, 0)).norm(dim=1).numpy() for shift in shifts], axis=1)


def histogram(found: NDArray[np.float64]) -> list[int]:
    """Return the number of distances in each of the 40 bins of `EDGES`."""
    counts: list[int] = np.histogram(found.clip(0, 2), EDGES)[0].tolist()
    return counts


def closer(distance_n: NDArray[np.float64], others_nk: NDArray[np.float64]) -> float:
    """Return the share of other images that are farther from an image than its transformed copy; equal ones count half.

    A network that maps all images to one point has 0.5.
    """
    apart_nk = others_nk - distance_n[:, None]
    return float(((apart_nk > _EQUAL) + (np.abs(apart_nk) <= _EQUAL) / 2).mean())

"""Invariance: how far the features of an image move when it is transformed, and whether they tell how it was.

The distance between f(I) and f(t(I)), both of unit length, lies in 0 .. 2. It is measured on the features of every
layer, so that methods without heads have it too, and where t makes several crops f(t(I)) is the unit vector of the mean
of their features: our convention. What PIRL (Misra and van der Maaten 2020, figure 5) shows of itself is the distance
between its heads, f(v_I) and g(v_It), for the transform that it was trained with: those rows have the layer "heads".

A network that maps all images to one point would look perfectly invariant, so the distance between different images
stands beside it, and `closer` is the probability that a transformed image lies closer to its original than another
image does. It is counted image by image: an original, its transformed copy and the same number of other images for
each. Images that t leaves as they are, such as those that are turned by 0 degrees, are left out.

In training each view has a batch of its own, and so its own statistics in every BatchNorm. What the network keeps of
them is a mixture of views, small patches and whole images in a jigsaw, or belongs to patches alone; under it a view
looks far away for that reason alone. So each view is normalised by its own statistics here too, in batches of about 128
images.

The read-out is the other side: top-1 of a linear probe that predicts the label of t (which order, which turn) from the
features of all crops side by side, learned on half of the images and scored on the other half, beside chance. A t
without labels (colorization, inpainting) is read out as "transformed or not", from the images and their transformed
copies: `readout_whether`, beside a chance of a half.

The image is the evaluation view, its centre without colours changed, at the size that the transform starts from. No
labels of the images are used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import normalize

from raysl import pretext, rng
from raysl.errors import UserError, unknown
from raysl.extraction import Heads, heads
from raysl.pretext import Geometry, Pretext, Transformed
from raysl.probes import Labelled, Row, Subject, check_features
from raysl.probes._task import device, elsewhere
from raysl.probes.linear import Config as LinearConfig
from raysl.probes.linear import Linear
from raysl.rng import ImageRng
from raysl.stream import decode

Doubles = npt.NDArray[np.float64]

HISTOGRAM = "histogram.json"
OTHERS = "others"
HEADS = "heads"
EDGES = np.linspace(0, 2, 41)
_BATCH = 128
_EQUAL = 1e-6


@dataclass(frozen=True)
class Config:
    """Protocol of the measure of invariance.

    Args:
        transforms: names of pretext transforms, with their default hyperparameters.
        max_images: that are transformed, drawn by index from the test set.
        others: images that each original is compared with beside its transformed copy, drawn by index; all others
            where there are fewer.
        readout: the classifier that predicts the label of a transform; it sees means over places.
        statistics: that BatchNorm takes: "batch", of each view by itself, or "kept", those of training, by which the
            network works where it is used.
        version: see `raysl.probes`.
    """

    transforms: tuple[str, ...] = ("jigsaw", "rotation", "colorization", "inpainting")
    max_images: int = 2000
    others: int = 64
    readout: LinearConfig = field(default_factory=lambda: LinearConfig(dims=0))
    statistics: Literal["batch", "kept"] = "batch"
    version: int = 3

    def __post_init__(self) -> None:
        if self.statistics not in ("batch", "kept"):
            raise unknown("invariance.statistics", self.statistics, ["batch", "kept"])
        if not self.transforms:
            raise UserError(
                "invariance.transforms is empty. Give names of pretext transforms, such as rotation."
            )
        if self.max_images < 4:
            raise UserError(f"invariance.max_images is {self.max_images}; it must be at least 4.")
        if self.others < 1:
            raise UserError(f"invariance.others is {self.others}; it must be at least 1.")

    def facts(self) -> dict[str, Any]:
        """What the numbers depend on: the hyperparameters of the transforms, too. Raises UserError when one does not exist."""
        parts = {part.strip() for spec in self.transforms for part in spec.split("+")}
        return {
            **asdict(self),
            "dials": {name: asdict(pretext.load(name)[0]()) for name in sorted(parts)},
        }


class Invariance:
    """Its headline, `closer`, is a mean over the transforms: 1 for an invariant layer, 0.5 where a transformed image
    is as far away as another one, 0 where it is always farther. Rows of a transform end in its name. Of heads, which
    know one transform, there is no such mean.

    The folder of the subject gets `histogram.json`: {"edges": 41 distances, "counts": {layer: {transform or "others":
    40 counts}}}.
    """

    headline = "closer"

    def __init__(self, config: Config) -> None:
        self.config = config

    def examine(self, subject: Subject) -> Iterator[Row]:
        """Runs one task of Ray, on a GPU if there are any.

        Raises:
            UserError: a transform does not exist or does not suit the size of the view, there are fewer than four
                images, or the features are not finite.
        """
        geometry = Geometry(subject.image_size, predicted=True, seed=subject.seed)
        transforms = {name: pretext.build(name, {}, geometry) for name in self.config.transforms}
        if subject.test.num_images < 4:
            raise UserError(
                f"The probe invariance compares images and the test set has {subject.test.num_images}. Give at least 4."
            )
        ((rows, counts),) = elsewhere(_look, [(subject, self.config, transforms)])
        subject.folder.write_json(HISTOGRAM, {"edges": EDGES.tolist(), "counts": counts})
        yield from rows


def _look(
    subject: Subject, config: Config, transforms: Mapping[str, Pretext]
) -> tuple[list[Row], dict[str, Any]]:
    """All rows, and the counts of the histograms."""
    sample, place, by_batch = (
        _Sample.drawn(subject, config.max_images),
        device(),
        config.statistics == "batch",
    )
    encode = subject.encoder.load(place, subject.layers, by_batch)

    def seen(transform: Pretext) -> _Seen:
        made: dict[str, list[Tensor]] = {layer: [] for layer in subject.layers}
        labels: list[Tensor] = []
        for view in sample.views(transform):
            labels += [view.target] if transform.num_labels and view.target is not None else []
            found = encode(view.crops_bpchw.flatten(0, 1).to(place))
            for layer, values in made.items():
                values.append(found[layer].float().cpu().view(*view.crops_bpchw.shape[:2], -1))
        changed_n = sample.changed(transform, whole)
        features_of = {layer: torch.cat(values) for layer, values in made.items()}
        return _Seen(features_of, torch.cat(labels) if labels else None, changed_n)

    whole = pretext.build("identity", {}, Geometry(subject.image_size))
    with torch.inference_mode():
        plain = seen(whole).features_of
        moved = {name: seen(transform) for name, transform in transforms.items()}
    rows: list[Row] = []
    counts: dict[str, Any] = {}
    for layer in subject.layers:
        check_features(plain[layer][:, 0].numpy(), "test")
        of_layer = {
            name: (view.features_of[layer], view.label_n, view.changed_n) for name, view in moved.items()
        }
        found_rows, counts[layer] = _layer(plain[layer][:, 0], of_layer, transforms, config)
        rows += [Row(row.name, row.value, layer) for row in found_rows]
    if (compared := heads(subject.encoder, place, by_batch)) is not None:
        found_rows, counts[HEADS] = _heads(compared, sample, place, config)
        rows += found_rows
    return rows, counts


@dataclass(frozen=True)
class _Seen:
    """What an encoder makes of the views of a transform.

    Args:
        features_of: float (n, p, d) for each layer.
        label_n: the labels of the transform, if it has some.
        changed_n: bool (n,): images that it does not leave as they are.
    """

    features_of: dict[str, Tensor]
    label_n: Tensor | None
    changed_n: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class _Sample:
    """The encoded images that are transformed, in a random order, and their indices."""

    images: list[bytes]
    indices_n: npt.NDArray[np.int64]
    seed: int

    @staticmethod
    def drawn(subject: Subject, most: int) -> _Sample:
        order_n = rng.generator("invariance").permutation(subject.test.num_images)[:most]
        images = subject.test.read(order_n, ("image",)).column("image").to_pylist()
        return _Sample(images, order_n, subject.seed)

    def views(self, transform: Pretext) -> Iterator[Transformed]:
        """The views of all of them, in batches that are about equal."""
        for some in np.array_split(np.arange(len(self.images)), math.ceil(len(self.images) / _BATCH)):
            images_bchw = decode.centre([self.images[i] for i in some], transform.source.size)
            image_rng = ImageRng(self.seed, np.zeros_like(some), self.indices_n[some], "invariance")
            yield transform.transform(images_bchw, image_rng)

    def changed(self, transform: Pretext, whole: Pretext) -> npt.NDArray[np.bool_]:
        """bool (n,): where the view of a transform is another one than that of the whole image; all, where none is."""
        parts = [
            (one.crops_bpchw != other.crops_bpchw).flatten(1).any(1)
            if one.crops_bpchw.shape == other.crops_bpchw.shape
            else torch.ones(len(one.crops_bpchw), dtype=torch.bool)
            for one, other in zip(self.views(transform), self.views(whole), strict=True)
        ]
        changed_n: npt.NDArray[np.bool_] = torch.cat(parts).numpy()
        return changed_n if changed_n.any() else ~changed_n


def _heads(
    compared: Heads, sample: _Sample, place: torch.device, config: Config
) -> tuple[list[Row], dict[str, list[int]]]:
    """Rows and histograms of what a method compares: its own transform alone, through its own heads."""
    pairs = zip(sample.views(compared.image), sample.views(compared.transformed), strict=True)
    with torch.inference_mode():
        found = [
            compared.embed(image.crops_bpchw.to(place), transformed.crops_bpchw.to(place))
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
    moved: Mapping[str, tuple[Tensor, Tensor | None, npt.NDArray[np.bool_]]],
    transforms: Mapping[str, Pretext],
    config: Config,
) -> tuple[list[Row], dict[str, list[int]]]:
    """Rows and histograms of one layer.

    Args:
        plain_nd: features of the images, which are in a random order.
        moved: features (n, p, d) of the transformed images, labels (n,) of the transforms, and bool (n,), which of
            them are not as they were.
    """
    others_nk = to_others(plain_nd, config.others)
    rows = [Row(f"distance/{OTHERS}", float(others_nk.mean()))]
    counts, shares = {OTHERS: histogram(others_nk)}, []
    for name, (moved_npd, label_n, changed_n) in moved.items():
        # Small patches of raw pixels have features of another length than the image.
        if moved_npd.shape[2] == plain_nd.shape[1]:
            distance_n = distances(plain_nd, moved_npd.mean(1))[changed_n]
            counts[name] = histogram(distance_n)
            found = _moved(name, distance_n, others_nk[changed_n])
            shares.append(found[-1].value)
            rows += found
        if label_n is not None:
            rows += _readout(name, moved_npd.flatten(1), label_n, transforms[name].num_labels, config.readout)
        elif moved_npd.shape[2] == plain_nd.shape[1]:
            rows += _readout_whether(name, plain_nd, moved_npd.mean(1), config.readout)
    if len(shares) == len(moved):
        rows.append(Row("closer", float(np.mean(shares))))
    return rows, counts


def _moved(name: str, distance_n: Doubles, others_nk: Doubles) -> list[Row]:
    """How far a transform moves images; `closer` comes last."""
    return [
        Row(f"distance/{name}", float(distance_n.mean())),
        Row(f"distance_std/{name}", float(distance_n.std())),
        Row(f"closer/{name}", closer(distance_n, others_nk)),
    ]


def _readout(name: str, features_nd: Tensor, label_n: Tensor, labels: int, config: LinearConfig) -> list[Row]:
    """How well the label of a transform is predicted; nothing where the images are too few to show two of them."""
    half = len(features_nd) // 2
    learned, judged = (
        Labelled(features_nd[rows].numpy(), label_n[rows].numpy())
        for rows in (slice(half), slice(half, None))
    )
    if len(np.unique(learned.labels_n)) < 2:
        return []
    return [Row(f"readout/{name}", _top1(learned, judged, config)), Row(f"chance/{name}", 1 / labels)]


def _readout_whether(name: str, plain_nd: Tensor, moved_nd: Tensor, config: LinearConfig) -> list[Row]:
    """How well it is predicted whether an image has been transformed. Both copies of an image are in the same half."""
    half = len(plain_nd) // 2
    learned, judged = (
        Labelled(torch.cat([plain_nd[rows], moved_nd[rows]]).numpy(), np.repeat([0, 1], len(plain_nd[rows])))
        for rows in (slice(half), slice(half, None))
    )
    return [
        Row(f"readout_whether/{name}", _top1(learned, judged, config)),
        Row(f"chance_whether/{name}", 0.5),
    ]


def _top1(learned: Labelled, judged: Labelled, config: LinearConfig) -> float:
    return next(row.value for row in Linear(config).run(learned, judged) if row.name == Linear.headline)


def distances(one_nd: Tensor, other_nd: Tensor) -> Doubles:
    """float64 (n,) in 0 .. 2: between the directions of rows."""
    one, other = normalize(one_nd.double(), dim=1), normalize(other_nd.double(), dim=1)
    distance_n: Doubles = (one - other).norm(dim=1).numpy()
    return distance_n


def to_others(features_nd: Tensor, most: int) -> Doubles:
    """float64 (n, k): distances of each row to k others, as many as `most` or all others.

    Args:
        features_nd: in a random order, so that the next rows are any other ones.
    """
    unit_nd = normalize(features_nd.double(), dim=1)
    shifts = range(1, min(most, len(unit_nd) - 1) + 1)
    return np.stack([(unit_nd - unit_nd.roll(-shift, 0)).norm(dim=1).numpy() for shift in shifts], axis=1)


def histogram(found: Doubles) -> list[int]:
    """How many distances lie in each of the 40 bins of `EDGES`."""
    counts: list[int] = np.histogram(found.clip(0, 2), EDGES)[0].tolist()
    return counts


def closer(distance_n: Doubles, others_nk: Doubles) -> float:
    """How often the distance of an image is smaller than one of its own distances to others; equal ones count half.

    Distances that differ by less than features in float32 can tell are equal, so that a network that maps all images
    to one point has a half.
    """
    apart_nk = others_nk - distance_n[:, None]
    return float(((apart_nk > _EQUAL) + (np.abs(apart_nk) <= _EQUAL) / 2).mean())

"""Surface normals: a linear map from the features of each place to the direction of the surface that is seen there.

Angles between predicted and true normals are judged as on NYU-v2 (Fouhey et al. 2013, "Data-driven 3D primitives for
single image understanding"; Eigen and Fergus 2015): mean and median in degrees, and the shares of pixels within 11.25,
22.5 and 30 degrees, over the valid pixels of all test images together. Goyal et al. 2019 and PIRL's successors train a
PSPNet on a frozen layer; this probe is linear, so that it measures the layer and not the head: ridge regression of the
unit normal from the map of a layer (the patch tokens of a transformer), which is bilinearly resized to the view. The
prediction is resized to the size of the true map and scaled to unit length. Penalties are chosen on a tenth of the
training images. Numbers compare with one another and not with published ones.

--normals.data is any folder with train/images, train/normals, test/images and test/normals. A map of normals has the
name of its image. It is a PNG of 8 or 16 bits with n = 2 value / largest - 1, or a NumPy file (h, w, 3) of floating
point. Without a folder, --train and --test must be clips with normals, as `clips:500` draws them. A pixel whose vector
is shorter than 0.5 or longer than 1.5, or not finite, has no normal and is not judged.

`mean_angle_without_image` is the mean angle of the mean normal of the training images: a probe that sees nothing.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from raysl.dataset import DataSet
from raysl.errors import MissingValueError, UserError, explained
from raysl.extraction import EncodeMaps
from raysl.fields import Bounds
from raysl.probes import Row, Settings, Subject, field_values
from raysl.probes._images import batches, check_finite, held_out, load_maps, sample
from raysl.probes._ridge import Moments, Readout, fit
from raysl.probes._task import TaskProbe
from raysl.ray_cluster import gpus
from raysl.storage import Folder
from raysl.stream import decode

IMAGES, NORMALS = "images", "normals"
_SPLITS = ("train", "test")
COMMAND = "raysl probe RUN --train clips:500#train --test clips:200#test --probes normals"

WITHIN = (11.25, 22.5, 30.0)
_SHORTEST, _LONGEST = 0.5, 1.5
# Angles are counted in so many bins, so that the median of any number of pixels takes constant memory.
_BINS = 18_000


@dataclass(frozen=True)
class Config(Settings):
    """Protocol of surface normals.

    Args:
        data: a folder with train/images, train/normals, test/images and test/normals; None for the clips of --train
            and --test.
        side: side in cells of the grid on which the regression is fitted; maps and normals are resized to it.
    """

    version: ClassVar[int] = 1
    data: str | None = None
    side: Annotated[int, Bounds(1, 1024)] = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data:  # Workers have another working directory.
            object.__setattr__(self, "data", str(Folder(self.data)))

    def settings(self) -> dict[str, Any]:
        """Return the settings with the fingerprint of the images in place of their folder."""
        found = fingerprint(Folder(self.data)) if self.data else None
        return {**field_values(self), "data": found}


class Normals(TaskProbe[Config]):
    """Shares of pixels within 11.25 (the primary metric), 22.5 and 30 degrees, and the mean and median angle."""

    primary_metric = "within/11.25"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.own_images = config.data is not None

    def check_data(self, train: DataSet, test: DataSet) -> None:
        """Raise UserError if there is neither a folder nor clips with normals, or one set of clips twice."""
        if self.config.data:
            return
        if not all(NORMALS in one.manifest.clips.get("columns", []) for one in (train, test)):
            raise MissingValueError(
                "The probe normals needs images with maps of surface normals, and --train or --test has none. Give "
                "--normals.data FOLDER, a folder with train/images, train/normals, test/images and test/normals, or "
                "clips that have normals, such as --train clips:500 --test clips:200#test."
            )
        if train.manifest.fingerprint == test.manifest.fingerprint:
            raise UserError(
                "The probe normals learns from the clips of --train and is scored on others. Give --test another set "
                "of clips, such as clips:200#test."
            )

    def rows(self, subject: Subject) -> list[Row]:
        """Return the rows of each layer. Raises UserError if a layer has no map, or as `pairs` and `normals_of`."""
        config, size, device = self.config, subject.image_size, gpus.device()
        if config.data:
            train, test = (pairs(Folder(config.data) / split) for split in _SPLITS)
        else:
            train, test = (_pairs_of_clips(one) for one in (subject.train, subject.test))
        chosen = [train[i] for i in sample(len(train))]
        views = (
            decode.resized_to_square([one.image() for one in chosen[some]], size)
            for some in batches(len(chosen))
        )
        encode = load_maps(subject, views)
        moments: dict[str, tuple[Moments, Moments]] = {}
        held_n = held_out("normals", len(train)).to(device)
        for some in batches(len(train)):
            truth_b3hw = torch.cat([_grid(normals_of(one), config.side) for one in train[some]]).to(device)
            for layer, map_bdhw in _maps(encode, train[some], size, config.side, device).items():
                d = map_bdhw.shape[1]
                parts = moments.setdefault(layer, (Moments(d, 3, device), Moments(d, 3, device)))
                for part, chosen_b in zip(parts, (~held_n[some], held_n[some]), strict=True):
                    part.add(*_places(map_bdhw[chosen_b], truth_b3hw[chosen_b]))
        of_one_layer = next(iter(moments.values()))
        if not sum(part.rows for part in of_one_layer):
            raise UserError("No pixel of the training images has a normal. Check train/normals.")
        readouts = {layer: fit(*parts) for layer, parts in moments.items()}
        mean_3 = torch.as_tensor(sum(part.targets_dk[-1] for part in of_one_layer)).float()
        blind, counts_of = _judged(encode, readouts, test, (size, config.side), mean_3)
        if not blind.sum():
            raise UserError("No pixel of the test images has a normal. Check test/normals.")
        rows = []
        for layer, counts in counts_of.items():
            rows += [Row(name, value, layer) for name, value in statistics(counts).items()]
            rows.append(Row("mean_angle_without_image", statistics(blind)["mean_angle"], layer))
            rows.append(Row("penalty", readouts[layer][1], layer))
        return rows


@dataclass(frozen=True)
class Pair:
    """An image and its map of normals, which are read when they are used."""

    image: Callable[[], bytes]  # returns the encoded image
    map: Callable[[], bytes]  # returns the content of the map
    map_name: str  # name of the map, for messages; its ending is its format


def pairs(folder: Folder) -> list[Pair]:
    """Return the images of a split with their maps, sorted by name. Raises UserError if there are none, or no map."""
    images, maps = (
        {name.rpartition(".")[0] or name: name for name in place.list() if not name.startswith(".")}
        for place in (folder / IMAGES, folder / NORMALS)
    )
    if not images:
        layout = ", ".join(f"{split}/{name}" for split in _SPLITS for name in (IMAGES, NORMALS))
        raise UserError(f"There are no images in {str(folder / IMAGES)!r}. Give a folder with {layout}.")
    if missing := sorted(images.keys() - maps.keys()):
        raise UserError(
            f"{len(missing)} images in {str(folder / IMAGES)!r} have no file of their name in {NORMALS!r}, the first "
            f"being {images[missing[0]]!r}. Add these files, or remove the images."
        )
    read_image, read_map = (folder / IMAGES).read, (folder / NORMALS).read
    return [
        Pair(partial(read_image, images[stem]), partial(read_map, maps[stem]), f"{NORMALS}/{maps[stem]}")
        for stem in sorted(images)
    ]


def _pairs_of_clips(data: DataSet) -> list[Pair]:
    """Return the pictures of clips with their maps of normals, in memory; the maps are PNG."""
    table = data.read(np.arange(data.num_images, dtype=np.int64), ("image", NORMALS))
    columns = (table.column(name).to_pylist() for name in ("image", NORMALS))
    return [
        Pair(partial(bytes, image), partial(bytes, normals), f"{NORMALS} of row {row}")
        for row, (image, normals) in enumerate(zip(*columns, strict=True))
    ]


@lru_cache(maxsize=8)
def fingerprint(folder: Folder) -> str:
    """Return a hash of all files of both splits, without decoding them. Raises UserError as `pairs`."""
    digest = hashlib.blake2b(digest_size=16)
    for split in _SPLITS:
        for one in pairs(folder / split):
            for part in (split.encode(), one.map_name.encode(), one.image(), one.map()):
                digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _judged(
    encode: EncodeMaps,
    readouts: Mapping[str, tuple[Readout, float]],
    test: Sequence[Pair],
    sides: tuple[int, int],
    mean_3: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the histograms of angles: of the mean normal, and of the prediction from each layer.

    Args:
        sides: side of the view in pixels and of the grid in cells.
        mean_3: the mean normal, of any length.
    """
    counts_of = {layer: torch.zeros(_BINS, dtype=torch.int64) for layer in readouts}
    blind = torch.zeros(_BINS, dtype=torch.int64)
    for some in batches(len(test)):
        truth = [normals_of(one).to(mean_3.device) for one in test[some]]
        for true_13hw in truth:
            blind += histogram(angles(mean_3[None, :, None, None].expand_as(true_13hw), true_13hw))
        for layer, map_bdhw in _maps(encode, test[some], *sides, mean_3.device).items():
            said_b3hw = readouts[layer][0](map_bdhw.movedim(1, -1)).movedim(-1, 1)
            for said_3hw, true_13hw in zip(said_b3hw, truth, strict=True):
                resized = interpolate(said_3hw[None], true_13hw.shape[2:], mode="bilinear")
                counts_of[layer] += histogram(angles(resized, true_13hw))
    return blind, counts_of


def _maps(
    encode: EncodeMaps, some: Sequence[Pair], size: int, side: int, device: torch.device
) -> dict[str, Tensor]:
    images_bchw = decode.resized_to_square([one.image() for one in some], size).to(device)
    with torch.inference_mode():
        made = encode(images_bchw)
        found = {
            layer: interpolate(one.float(), (side, side), mode="bilinear", antialias=True)
            for layer, one in made.items()
        }
    check_finite("normals", list(found.values()))
    return {layer: one.clone() for layer, one in found.items()}


def _places(map_bdhw: Tensor, truth_b3hw: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features (n, d) and the normals (n, 3) of all places that have a normal."""
    features_nd = map_bdhw.movedim(1, -1).flatten(0, 2)
    truth_n3 = truth_b3hw.movedim(1, -1).flatten(0, 2)
    there_n = truth_n3.square().sum(1) > 0
    return features_nd[there_n], truth_n3[there_n]


def normals_of(pair: Pair) -> Tensor:
    """Return the normals of an image, float (1, 3, h, w): unit vectors, or zeros where there is none.

    Raises UserError if the file is damaged or has another form.
    """
    data, name = pair.map(), pair.map_name
    what = f"The map of normals {name!r} cannot be read"
    with explained(what, "Restore the file.", OSError, ValueError, SyntaxError):
        values_hwc = np.load(io.BytesIO(data)) if name.endswith(".npy") else _png(data)
    if values_hwc.ndim != 3 or values_hwc.shape[2] != 3:
        raise UserError(
            f"The map of normals {name!r} has the shape {values_hwc.shape}. It must have three values for each pixel."
        )
    vectors_1chw = torch.from_numpy(values_hwc.astype(np.float32)).permute(2, 0, 1)[None]
    length_11hw = torch.nan_to_num(vectors_1chw, nan=0.0, posinf=0.0).norm(dim=1, keepdim=True)
    there = (length_11hw >= _SHORTEST) & (length_11hw <= _LONGEST) & vectors_1chw.isfinite().all(1, True)
    return torch.where(there, vectors_1chw / length_11hw, 0.0)


def _png(data: bytes) -> Any:
    """Return the vectors (h, w, 3) of an image of 8 or 16 bits."""
    image = Image.open(io.BytesIO(data))
    is_deep = data[:4] == b"\x89PNG" and data[24] == 16  # The bit depth of a PNG has a fixed place.
    if image.mode == "RGB" and not is_deep:
        return np.asarray(image, dtype=np.float32) / 127.5 - 1
    try:  # Pillow reads color of 16 bits as 8 bits.
        import imagecodecs
    except ImportError as error:
        raise ValueError(
            f"its mode is {image.mode}; maps of 16 bits need the package imagecodecs, of the extra `images`"
        ) from error
    values = imagecodecs.imread(data)
    return values.astype(np.float32) / (np.iinfo(values.dtype).max / 2) - 1


def _grid(normals_13hw: Tensor, side: int) -> Tensor:
    """Return the mean normal of each cell of a grid, of unit length; zeros where a cell has none."""
    means = interpolate(normals_13hw, (side, side), mode="bilinear", antialias=True)
    found: Tensor = normalize(means, dim=1) * (means.norm(dim=1, keepdim=True) > _SHORTEST)
    return found


def angles(said_13hw: Tensor, true_13hw: Tensor) -> Tensor:
    """Return the angle in degrees of predictions, of any length, at every pixel that has a normal: float (n,)."""
    there_hw = true_13hw[0].square().sum(0) > 0
    cosine_hw = (normalize(said_13hw, dim=1) * true_13hw).sum(1)[0]
    return torch.rad2deg(cosine_hw[there_hw].double().clamp(-1, 1).acos())


def histogram(angles_n: Tensor) -> Tensor:
    """Return the number of angles in each of 18,000 equal bins of 0 to 180 degrees, on the CPU."""
    bins_n = (angles_n * (_BINS / 180)).long().clamp(max=_BINS - 1)
    return torch.bincount(bins_n, minlength=_BINS).cpu()


def statistics(counts: Tensor) -> dict[str, float]:
    """Return shares within angles, and mean and median angle in degrees, of a histogram; exact to 0.01 degrees."""
    centers = (torch.arange(_BINS, dtype=torch.float64) + 0.5) * (180 / _BINS)
    total, share = counts.sum(), counts.double() / counts.sum()
    shares = {f"within/{limit:g}": float(share[: round(limit * _BINS / 180)].sum()) for limit in WITHIN}
    median = float(centers[int((counts.cumsum(0) * 2 >= total).nonzero()[0])])
    return {**shares, "mean_angle": float((share * centers).sum()), "median_angle": median}

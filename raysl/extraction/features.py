"""Write the features of any encoder on any images to a folder that other programs can read."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from raysl import console
from raysl.backbone.network import BackboneConfig
from raysl.dataset import DataSet
from raysl.errors import UserError, counted
from raysl.extraction import encoders, pca
from raysl.extraction.encoders import MAX_IMAGE_SIZE, Encoder, Trained
from raysl.extraction.feature_tasks import FeatureProtocol, compute, describe
from raysl.extraction.reestimated import Reestimated
from raysl.fields import Bounds, Seed, check
from raysl.ingestion import open_or_ingest
from raysl.storage import Folder, StorageError
from raysl.storage.feature_files import FINISHED, STARTED, FeatureForm, Part, part_file
from raysl.storage.feature_store import FeatureStore
from raysl.storage.records import as_json, read_record, write_record

_log = logging.getLogger("raysl.extraction")
_UNREDUCED = "unreduced"
_HARMLESS = re.compile(r"\..*|lost\+found|.*\.(log|out|err)|.+\.[0-9a-f]{8}\.tmp")
MAX_COMPONENTS = 1 << 16
# What the keys of the record stand for.
_SAID = {
    "fingerprint": "the images",
    "encoder": "the network",
    "protocol": "the layer or the size of the view",
    "form": "--dtype, --l2 or --pca",
    "code": "the code or packages that compute them",
}


@dataclass(frozen=True)
class FeaturesConfig:
    """Features of every image of a data set, kept as Parquet by index.

    Args:
        data: a data set, or any source of `raysl ingest`.
        out: folder of the features, a path or a URI. The same command continues an interrupted extraction.
        layer: "pooled" is the output of the backbone, conv1 and res2 to res5 are the stages of a ResNet; or the name of
            a module of the network. Feature maps are averaged over all positions; "res3:9216" instead averages them
            into a grid with at most 9216 numbers in total.
        image_size: side of the view in pixels, at most 4096; 0 means that of a run, the size that an export states, 224
            for other weights, and 32 for "random" and "pixels".
        dtype: type of the stored numbers. A file with numbers above 65504, the largest float16, is stored as float32 in
            either case.
        l2: divide every row by its norm, as ClusterFit does before k-means.
        pca: number of principal components to keep, after --l2; 0 for none.
        pca_of: a folder of features that were written with --pca. Its principal components are used instead of new
            ones, for example for validation images.
        backbone: backbone of a weights file, or of "random"; "timm/NAME" for a backbone of timm.
        seed: seed of the weights of "random".
        bn_images: images from which BatchNorm takes its statistics, as probes take those of their train images; a data
            set or a source. "" keeps the statistics of pretraining.
    """

    data: str
    out: str
    layer: str = "pooled"
    image_size: Annotated[int, Bounds(0, MAX_IMAGE_SIZE)] = 0
    dtype: Literal["float32", "float16"] = "float32"
    l2: bool = False
    pca: Annotated[int, Bounds(0, MAX_COMPONENTS)] = 0
    pca_of: str = ""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    seed: Seed = 0
    bn_images: str = ""

    def __post_init__(self) -> None:
        check(self)
        for name in ("data", "out", "layer"):
            if not getattr(self, name).strip():
                raise UserError(f"--{name} is empty. Give a value.")
        if self.pca and self.pca_of:
            raise UserError(
                "Both --pca and --pca-of are given. Use --pca N to fit a projection, or --pca-of FEATURES to apply the "
                "projection of other features."
            )


def compute_features(checkpoint: str, config: FeaturesConfig) -> FeatureStore:
    """Compute the features of a data set, resume an interrupted pass, or return finished features.

    Memory does not grow with the number of images. `_features.json` in the folder describes the origin of the features.
    Raises UserError if the checkpoint, the layer or the data cannot be used, or the folder holds other features.
    """
    check_out(config.out)
    source = encoders.encoder_by_name(checkpoint, config.backbone, config.seed)
    dataset = open_or_ingest(config.data)
    protocol = FeatureProtocol(config.image_size or encoders.view_size(source), (config.layer,))
    encoder: Encoder = source
    if config.bn_images:
        encoder = Reestimated(source, open_or_ingest(config.bn_images), protocol.image_size)
    about = describe(encoder, dataset, protocol)
    about["form"] = {"dtype": config.dtype, "l2": config.l2, "pca": config.pca, "pca_of": config.pca_of}
    projection = pca.Projection.load(config.pca_of) if config.pca_of else None
    if projection:
        about["form"]["projection"] = projection.digest()
    about = as_json(about)
    folder = Folder(config.out)
    if _is_finished(folder, about):
        _log.info("The features at %s are already there.", folder)
        return FeatureStore.open(str(folder))
    what = f"{config.layer} features of {counted(dataset.num_images, 'image')}"
    try:
        with console.working(f"Computing {what} by {checkpoint}, to {folder} ..."):
            if config.pca or config.pca_of:
                parts = _reduced(encoder, dataset, protocol, config, folder, projection)
            else:
                parts = compute(encoder, dataset, protocol, FeatureForm(config.dtype, config.l2), folder)
    except StorageError:  # The same command goes on once the storage answers.
        raise
    except UserError:
        # Otherwise the folder would refuse another network, although it holds no features.
        if not any(name.startswith("features-") for name in folder.list()):
            folder.delete(STARTED)
        raise
    origin = {
        "teacher": _teacher(checkpoint, source),
        "objective": source.run.config().method if isinstance(source, Trained) else "",
        "data": str(dataset.folder),
    }
    write_record(folder, FINISHED, {**about, **origin, "parts": parts, "layers": [config.layer]})
    return FeatureStore.open(str(folder))


def check_out(out: str) -> None:
    """Raise UserError if a folder holds files and neither finished nor interrupted features.

    Programs that read Parquet folders, such as pandas, would find the other files beside the features. Without a
    record beside them, files of features may be of any network.
    """
    folder = Folder(out)
    held = folder.list()
    if {FINISHED, STARTED}.isdisjoint(held) and not all(map(_HARMLESS.fullmatch, held)):
        raise UserError(
            f"The folder {out!r} is not empty and holds no features that raysl can continue: it has neither {STARTED} "
            f"nor {FINISHED}. Give --out a new folder, such as {out.rstrip('/') + '-features'!r}."
        )


def _is_finished(folder: Folder, about: dict[str, Any]) -> bool:
    """Return True if a folder holds the wanted features; in a new one, write which. Raises UserError for others."""
    finished = folder.exists(FINISHED)
    name = FINISHED if finished else STARTED
    if not folder.exists(name):
        write_record(folder, STARTED, about)
        return False
    found = read_record(folder, name, "Delete the folder and run the same command again.")
    # Finished features stay valid in a later version of raysl; two halves from different versions would not match.
    compared = [key for key in about if not (finished and key == "code")]
    if differ := [key for key in compared if found.get(key) != about[key]]:
        said = ", ".join(_SAID.get(key, key) for key in differ)
        raise UserError(
            f"Other features are in {str(folder)!r}; they differ in {said}. Give another --out, or delete that folder."
        )
    return finished


def _reduced(
    source: Encoder,
    dataset: DataSet,
    protocol: FeatureProtocol,
    config: FeaturesConfig,
    folder: Folder,
    projection: pca.Projection | None,
) -> list[Part]:
    """Compute whole rows into a folder, project them, and delete the folder. Without a projection, fit one."""
    layer = protocol.layers[0]
    whole_folder = folder / _UNREDUCED
    parts = compute(source, dataset, protocol, FeatureForm("float32", config.l2), whole_folder)
    write_record(whole_folder, FINISHED, {"parts": parts})
    whole = FeatureStore.open(str(whole_folder), layer)
    try:
        if projection is None:
            known = folder.exists(pca.FILE)
            projection = pca.Projection.load(str(folder)) if known else pca.fit(whole, config.pca)
        projection.save(folder)
        dim, kept = projection.components_dm.shape
        _log.info("%d of %d components keep %.1f %% of the variance.", kept, dim, 100 * projection.variance)
        pca.project(whole, projection, FeatureForm(config.dtype), folder)
    except StorageError:  # The same command goes on once the storage answers.
        raise
    except UserError:
        # Otherwise the folder would refuse the same command with a possible number of components.
        for name in (_UNREDUCED, *map(part_file, parts), pca.FILE, STARTED):
            folder.delete(name)
        raise
    folder.delete(_UNREDUCED)
    return parts


def _teacher(checkpoint: str, source: Encoder) -> str:
    if isinstance(source, Trained):
        return f"{source.run.folder} step {source.checkpoint.step} crc32 {source.checkpoint.crc32():08x}"
    identity = source.identity()
    name = identity.get("backbone", {}).get("name", "")
    return " ".join(
        str(part) for part in (checkpoint, name, identity.get("weights", identity.get("seed", ""))) if part
    )

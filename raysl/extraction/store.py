"""Any encoder and any images, to a folder of features that other programs can read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from raysl import ray_cluster
from raysl.backbone.network import BackboneConfig
from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.extraction import encoders, pca
from raysl.extraction.encoders import Encoder, Trained, Weights
from raysl.extraction.feature_tasks import compute, describe
from raysl.extraction.table import DONE, FeatureForm, FeatureProtocol, FeatureTable
from raysl.ingestion import resolve
from raysl.storage import Folder

BEGUN = "source.json"
_UNREDUCED = "unreduced"
_PLAIN_SIZE, _PUBLISHED_SIZE = 32, 224


@dataclass(frozen=True)
class FeaturesConfig:
    """Features of every image of a data set, kept as Parquet by index.

    Args:
        data: a data set, or any source of `raysl ingest`.
        out: folder of the features, a path or a URI. The same command again completes what was interrupted.
        layer: "pooled" is the output of the backbone, conv1 and res2 to res5 the stages of a ResNet; or a name inside the
            network. Maps of features are averaged over their places, "res3:9216" into a grid of at most 9,216 numbers.
        image_size: side in pixels of the view; 0 for that of the run, 224 for a file of weights, 32 otherwise.
        dtype: of the numbers. A file with numbers beyond 65,504 is float32 in either case.
        l2: divide every row by its length, as ClusterFit does before k-means.
        pca: keep so many principal components, taken after --l2; 0 for none. Rows are not divided by their length
            again.
        pca_of: a folder of features whose projection is applied instead of fitting one: for validation images.
        backbone: of a file of weights, or of "random". "timm/NAME" is one of the package timm.
        seed: of "random".
    """

    data: str
    out: str
    layer: str = "pooled"
    image_size: int = 0
    dtype: Literal["float32", "float16"] = "float32"
    l2: bool = False
    pca: int = 0
    pca_of: str = ""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "float16"):
            raise UserError(f"dtype is {self.dtype!r}; it may be float32 or float16.")
        if self.pca < 0:
            raise UserError(f"pca is {self.pca}; it must be a number of components, or 0 for no projection.")
        if self.pca and self.pca_of:
            raise UserError(
                "Both pca and pca_of are given. Use --pca N to fit a projection, or --pca-of FEATURES to apply the one "
                "of other features."
            )


def make(checkpoint: str, config: FeaturesConfig, say: Callable[[str], None] = print) -> FeatureTable:
    """Computes the features of a data set, goes on where it was interrupted, or returns what is finished.

    Memory does not grow with the number of images. `features.json` in the folder says whose features they are.

    Args:
        checkpoint: see `encoders.named`.
        config: of the features.
        say: takes one line of progress at a time.

    Raises:
        UserError: the checkpoint, the layer or the data cannot be used, or other features lie in the folder.
    """
    source = encoders.named(checkpoint, config.backbone, config.seed)
    ray_cluster.start()
    dataset = resolve(config.data)
    protocol = FeatureProtocol(config.image_size or view_size(source), (config.layer,))
    facts = describe(source, dataset, protocol)
    facts["form"] = {"dtype": config.dtype, "l2": config.l2, "pca": config.pca, "pca_of": config.pca_of}
    facts = json.loads(json.dumps(facts))
    folder = Folder(config.out)
    finished = _begin(folder, facts)
    if finished:
        say(f"The features at {folder} are already there.")
        return finished
    say(f"{config.layer} features of {dataset.num_images:,} images by {checkpoint}, to {folder}.")
    if config.pca or config.pca_of:
        table = _reduced(source, dataset, protocol, config, folder, say)
    else:
        table = compute(source, dataset, protocol, FeatureForm(config.dtype, config.l2), folder)
    about = {
        "teacher": _teacher(checkpoint, source),
        "objective": _objective(source),
        "data": str(dataset.folder),
    }
    folder.write_json(DONE, {**facts, **about, "parts": table.parts, "layers": table.layers})
    return table


def view_size(source: Encoder) -> int:
    """Side in pixels of the view that an encoder is evaluated on where nobody asks for another: that of its run, 224
    for a file of weights, 32 otherwise."""
    if isinstance(source, Trained):
        return source.run.config().view.image_size
    return _PUBLISHED_SIZE if isinstance(source, Weights) else _PLAIN_SIZE


def _begin(folder: Folder, facts: dict[str, Any]) -> FeatureTable | None:
    """Writes whose features come, or compares; the table where they are finished."""
    done = folder.read_json(DONE) if folder.exists(DONE) else None
    begun = done or (folder.read_json(BEGUN) if folder.exists(BEGUN) else None)
    if begun is None:
        folder.write_json(BEGUN, facts)
        return None
    # What is finished stays good with a later version; half of it by each would not be.
    compared = [name for name in facts if not (done and name == "code")]
    differ = [name for name in compared if begun.get(name) != facts[name]]
    if differ:
        raise UserError(
            f"Other features lie at {str(folder)!r}; these differ: {', '.join(differ)}. Give another --out, or delete "
            "that folder."
        )
    if done is None:
        return None
    return FeatureTable(folder, tuple((a, b) for a, b in done["parts"]), tuple(done["layers"]))


def _reduced(
    source: Encoder,
    dataset: DataSet,
    protocol: FeatureProtocol,
    config: FeaturesConfig,
    folder: Folder,
    say: Callable[[str], None],
) -> FeatureTable:
    """Features, then their projection, through a folder of whole rows that is deleted in the end."""
    layer = protocol.layers[0]
    whole = compute(source, dataset, protocol, FeatureForm("float32", config.l2), folder / _UNREDUCED)
    projection = (
        pca.Projection.load(config.pca_of or str(folder))
        if config.pca_of or folder.exists(pca.FILE)
        else None
    )
    try:
        projection = projection or pca.fit(whole, layer, config.pca)
        projection.save(folder)
        kept, width = projection.components_dm.shape[1], len(projection.mean_d)
        say(f"{kept} of {width} components keep {100 * projection.variance:.1f} % of the variance.")
        pca.project(whole, layer, projection, FeatureForm(config.dtype), folder)
    except UserError:
        # Begun so, the folder would refuse the same command with a number that is possible.
        for name in (_UNREDUCED, pca.FILE, BEGUN):
            folder.delete(name)
        raise
    folder.delete(_UNREDUCED)
    return FeatureTable(folder, whole.parts, whole.layers)


def _teacher(checkpoint: str, source: Encoder) -> str:
    """One line that names the network, and identifies its weights."""
    if isinstance(source, Trained):
        return f"{source.run.folder} step {source.checkpoint.step} crc32 {source.checkpoint.crc32():08x}"
    identity = source.identity()
    name = identity.get("backbone", {}).get("name", "")
    return " ".join(
        str(part) for part in (checkpoint, name, identity.get("weights", identity.get("seed", ""))) if part
    )


def _objective(source: Encoder) -> str:
    """The method that the network was trained by, where that is known."""
    return source.run.config().method if isinstance(source, Trained) else ""

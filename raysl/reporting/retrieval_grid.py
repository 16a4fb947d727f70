"""Draw retrieval grids: some test images, each with its nearest train images in the features of an encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from raysl import extraction, rng
from raysl.dataset import DataSet
from raysl.evaluation import evaluate
from raysl.evaluation.options import ProbeConfig
from raysl.extraction import Encoder, FeatureProtocol
from raysl.probes.retrieval import nearest
from raysl.reporting import pictures
from raysl.storage import Folder
from raysl.storage.escaping import file_name

# Folder of the grids, in the folder of a run.
GRIDS = "probes/retrieval"
_LAYER = "pooled"


def grids(
    encoders: Sequence[Encoder],
    train: DataSet,
    test: DataSet,
    image_size: int,
    cache: Folder,
    count: int = 6,
    k: int = 5,
) -> list[Image.Image]:
    """Return a grid for each encoder: `count` test images, and the `k` nearest train images of each.

    The choice depends only on the size of the test set. Raises UserError as `raysl.extraction.extract_all`.
    """
    protocol = FeatureProtocol(image_size, (_LAYER,))
    found = extraction.extract_all(
        [(source, images, protocol) for source in encoders for images in (train, test)], cache
    )
    chosen = rng.sample(test.num_images, count, "neighbours")
    # If both sets are the same, an image must not find itself.
    own = chosen if train.manifest.fingerprint == test.manifest.fingerprint else None
    k = min(k, train.num_images - (own is not None))
    made = []
    for train_features, test_features in zip(found[::2], found[1::2], strict=True):
        cosine_qk, index_qk = nearest(
            test_features[_LAYER].load()[chosen], train_features[_LAYER].load(), k, own
        )
        made.append(pictures.neighbors_grid(test, train, chosen, index_qk, cosine_qk))
    return made


def draw(source: Encoder, train: DataSet, test: DataSet, config: ProbeConfig) -> str:
    """Draw the grid of a probed encoder into the folder of its rows and return its path. See `grids`."""
    size, folder = config.image_size or extraction.view_size(source), evaluate.folder_of(source, config)
    drawn = evaluate.frozen_encoder(source, train, size, config.bn_statistics)
    (grid,) = grids([drawn], train, test, size, folder / "features")
    return save(grid, folder, drawn, train, test)


def save(grid: Image.Image, folder: Folder, source: Encoder, train: DataSet, test: DataSet) -> str:
    """Write a grid into the folder of an encoder's rows, where a report looks for it, and return its path."""
    step = source.identity().get("step", 0)
    file = grid_name(step, train.manifest.fingerprint, test.manifest.fingerprint)
    (folder / GRIDS).write(file, pictures.png(grid))
    return str(folder / GRIDS / file)


def grid_name(step: int, train: str, test: str) -> str:
    """Return the file name of a grid: the step and the fingerprints of the train and test sets."""
    return file_name(f"step-{step}-train-{train[:8]}-test-{test[:8]}") + ".png"


def side_by_side(named: Mapping[str, Image.Image]) -> Image.Image:
    """Return grids next to each other, each below its name."""
    head = 36
    width, height = sum(grid.width for grid in named.values()), max(s.height for s in named.values())
    joined = Image.new("RGB", (width, height + head), "white")
    draw, left = ImageDraw.Draw(joined), 0
    for name, grid in named.items():
        draw.text((left + 16, 10), name, "black", ImageFont.load_default(20))
        joined.paste(grid, (left, head))
        left += grid.width
    return joined

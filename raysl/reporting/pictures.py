"""Draw the views that a network receives, and the nearest neighbors of images."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from raysl import rng
from raysl.config import Pretraining
from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.model import DatasetInfo, Model, check_columns
from raysl.pretext import Transformed
from raysl.rng import ImageRng
from raysl.storage import Folder
from raysl.stream.decode import cut, cut_clips, decode
from raysl.stream.views import View

# Enough images for any number of negatives; the views do not depend on it.
_ENOUGH = 1 << 30
_CELL = 192
_MARGIN = 16
_TITLE = 26
_NOTE = 20
# A title, a note, and cells of a picture and a note.
Column = tuple[str, str, Sequence[tuple[Image.Image, str]]]
_PAPER, _INK, _FAINT, _MAT = (255, 255, 255), (33, 37, 41), (134, 142, 150), (233, 236, 239)


def views_of(config: Pretraining, dataset: DataSet) -> Mapping[str, View]:
    """Return the views of a run, also of too few images to train on. Raises UserError if they do not suit it."""
    info = DatasetInfo.of(dataset)
    try:
        views = Model(config, replace(info, num_images=max(info.num_images, _ENOUGH))).views()
    except UserError:
        # An objective with a label for each image needs the right number of images.
        views = Model(config, info).views()
    check_columns(views, dataset, config.method)
    return views


def views_grid(dataset: DataSet, views: Mapping[str, View], seed: int = 0, count: int = 8) -> Image.Image:
    """Draw a row for each image: the image, then each view as the network receives it.

    A view of several crops is drawn as a mosaic: a jigsaw of nine patches is 3 x 3. The pixels are equal to those of
    the stream for the same seed in epoch 0, enlarged without smoothing. The seed determines which images are drawn.
    Raises UserError if a shard of the data set is damaged.
    """
    chosen = rng.generator(seed, "views sheet").permutation(dataset.num_images)[:count]
    indices = np.sort(chosen.astype(np.int64))
    needed = {column: None for view in views.values() for column in view.columns}
    table = dataset.read(indices, ("image", *(column for column in needed if column != "image")))
    files = table.column("image").to_pylist()
    image_rng = ImageRng(seed, np.zeros_like(indices), indices)
    made = _made(table, views, image_rng)
    originals = [(_picture(decode(data)), f"index {i}") for data, i in zip(files, indices, strict=True)]
    columns = [("original", "as it is stored", originals)]
    for name, view in made.items():
        b, p, _, height, width = view.crops_bpchw.shape
        size = f"{width} x {height} pixels" if p == 1 else f"{p} crops of {width} x {height}"
        marks = [""] * b if view.target is None else [_mark(target) for target in view.target]
        cells = list(zip(map(mosaic, view.crops_bpchw), marks, strict=True))
        columns.append((f"view: {name}", size, cells))
    return grid(columns)


def _made(table: pa.Table, views: Mapping[str, View], image_rng: ImageRng) -> dict[str, Transformed]:
    """Return the views of rows of a data set, as the stream makes them."""
    finished: dict[str, Tensor] = {}
    targets: dict[str, Tensor] = {}
    sources = {name: view.source for name, view in views.items() if view.of_clips is None}
    crops = cut(table.column("image").to_pylist(), sources, image_rng)
    crops |= cut_clips(table, views, image_rng, finished, targets)
    made = {name: views[name](crop, image_rng.named(name)) for name, crop in crops.items()}
    made |= {name: Transformed(view, None) for name, view in finished.items()}
    return {name: replace(made[name], target=targets.get(name, made[name].target)) for name in views}


def neighbors_grid(
    queries: DataSet,
    gallery: DataSet,
    query_q: npt.NDArray[np.int64],
    nearest_qk: npt.NDArray[np.int64],
    cosine_qk: npt.NDArray[np.float32],
) -> Image.Image:
    """Draw a row for each query image: the image, then its nearest neighbors with their class and cosine.

    Args:
        query_q: int64 (q,), indices in `queries`.
        nearest_qk: int64 (q, k), indices in `gallery`, the nearest first; see `raysl.probes.retrieval.nearest`.
        cosine_qk: float32 (q, k).

    Raises:
        UserError: a shard of a data set is damaged.
    """
    columns = [("query", "", _shown(queries, query_q))]
    for rank in range(nearest_qk.shape[1]):
        cells = zip(_shown(gallery, nearest_qk[:, rank]), cosine_qk[:, rank], strict=True)
        marked = [(picture, f"{name}  cos {cosine:.2f}") for (picture, name), cosine in cells]
        columns.append((f"nearest {rank + 1}", "", marked))
    return grid(columns)


def _shown(dataset: DataSet, indices: npt.NDArray[np.int64]) -> list[tuple[Image.Image, str]]:
    """Return images, each with the name of its class, or its index if there are no classes."""
    rows = dataset.read(indices).to_pylist()
    classes = dataset.manifest.classes
    names = [classes[row["label"]] if classes else f"index {row['index']}" for row in rows]
    return [(_picture(decode(row["image"])), name) for row, name in zip(rows, names, strict=True)]


def save(picture: Image.Image, file: str) -> None:
    """Write a picture as PNG to a path or a URI, atomically. Raises UserError if the file cannot be written."""
    folder, _, name = file.rpartition("/")
    Folder(folder or ("/" if file.startswith("/") else ".")).write(name, png(picture))


def png(picture: Image.Image) -> bytes:
    """Return the picture as a PNG file."""
    data = io.BytesIO()
    picture.save(data, "PNG")
    return data.getvalue()


def _mark(target: Tensor) -> str:
    return f"target {' x '.join(map(str, target.shape))}" if target.ndim else f"label {int(target)}"


def mosaic(crops_pchw: Tensor) -> Image.Image:
    """Draw crops, uint8 (p, 3, h, w), or (p, 1, h, w) for spectrograms, row by row in a square grid, with gaps."""
    columns = math.ceil(math.sqrt(len(crops_pchw)))
    rows = math.ceil(len(crops_pchw) / columns)
    gap = 4 if len(crops_pchw) > 1 else 0
    room = (_CELL - gap * (columns - 1)) / columns
    fitted = [_fitted(_picture(crop), room) for crop in crops_pchw]
    width, height = fitted[0].size
    whole = columns * (width + gap) - gap, rows * (height + gap) - gap
    grid = Image.new("RGB", whole, _MAT if gap else _PAPER)
    for i, crop in enumerate(fitted):
        grid.paste(crop, (i % columns * (width + gap), i // columns * (height + gap)))
    return grid


def _picture(image_chw: Tensor) -> Image.Image:
    if len(image_chw) == 1:  # a spectrogram: gray, with the low pitches below
        image_chw = image_chw.flip(1).expand(3, -1, -1)
    return Image.fromarray(np.ascontiguousarray(image_chw.permute(1, 2, 0).cpu().numpy()))


def _fitted(image: Image.Image, side: float = _CELL) -> Image.Image:
    """Fit an image into a square: enlarge by a whole number to sharp squares, or reduce smoothly."""
    factor = side / max(image.size)
    factor = math.floor(factor) if factor >= 1 else factor
    width, height = (max(1, round(length * factor)) for length in image.size)
    method = Image.Resampling.NEAREST if width >= image.width else Image.Resampling.LANCZOS
    return image.resize((width, height), method)


def grid(columns: Sequence[Column]) -> Image.Image:
    """Draw columns of (title, note, cells of a picture and a note)."""
    title_font, note_font = ImageFont.load_default(15), ImageFont.load_default(12)
    rows = len(columns[0][2])
    head = _MARGIN + _TITLE + _NOTE
    row_height = _CELL + _NOTE + _MARGIN
    grid = Image.new("RGB", (_MARGIN + len(columns) * (_CELL + _MARGIN), head + rows * row_height), _PAPER)
    draw = ImageDraw.Draw(grid)
    for c, (title, note, cells) in enumerate(columns):
        left = _MARGIN + c * (_CELL + _MARGIN)
        draw.text((left, _MARGIN), title, _INK, title_font)
        draw.text((left, _MARGIN + _TITLE - 4), note, _FAINT, note_font)
        for r, (picture, mark) in enumerate(cells):
            top = head + r * row_height
            shown = _fitted(picture)
            place = (left + (_CELL - shown.width) // 2, top + (_CELL - shown.height) // 2)
            grid.paste(shown, place)
            draw.text((left, top + _CELL + 3), mark, _FAINT, note_font)
    return grid

"""Make two views of each image, as PIRL with Jigsaw does, through one loader, and print its price.

    python benchmarks/loaders.py torch DATA 32 20000

Prints CPU milliseconds of the whole tree of processes and wall milliseconds for each image. `speed.py` calls it for
every loader. All loaders shuffle, have one process beside the trainer, and use the kernels of raysl; but DALI has one
thread in the trainer's process, and kernels of its own.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import psutil
import torch
from torch.utils.data import DataLoader

from raysl.augment import Recipe, SourceCrop
from raysl.config import Pretraining, ViewConfig
from raysl.dataset import DataSet
from raysl.model import Model
from raysl.objectives.pirl import Config as Pirl
from raysl.pretext.jigsaw import Jigsaw
from raysl.rng import ImageRng
from raysl.stream.decode import cut
from raysl.stream.reader import Batch, Stream

_BATCH = 128
# Part of the images that pass before the measurement: processes start while the first ones do.
_WARM_UP = 0.4
# Kernels of 3 x 3: an image as it is, and smoothed as for PIL's ImageEnhance.Sharpness.
_SAME = np.pad([[1.0]], 1)
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13


@dataclass(frozen=True)
class Views:
    """The views of PIRL with Jigsaw, and the images that they are made of.

    Args:
        data: folder of a data set.
        side: side of the view in pixels.
        images: number of images that are read, so that the run of the stream is long enough.
    """

    data: str
    side: int
    images: int

    @cached_property
    def stream(self) -> Stream:
        """The stream of a run on this data."""
        dataset = DataSet.open(self.data)
        config = Pretraining(
            *(self.data, "-"),
            batch_size=_BATCH,
            epochs=1 + self.images * 2 / dataset.num_images,
            method="pirl-jigsaw",
            view=ViewConfig(image_size=self.side),
            parts={"pirl": Pirl(num_negatives=_BATCH)},
        )
        return Model.of(config, dataset).stream(dataset)

    def stored(self) -> list[bytes]:
        """Return the encoded images."""
        dataset = DataSet.open(self.data)
        encoded: list[bytes] = (
            dataset.read(np.arange(dataset.num_images), ["image"]).column("image").to_pylist()
        )
        return encoded

    def of(self, items: Sequence[tuple[int, bytes]]) -> Mapping[str, Any]:
        """Return the views of (index, encoded image) pairs; a `collate_fn`."""
        torch.set_num_threads(1)  # As DataLoader does in its processes; other loaders leave it to the user.
        sources = {name: view.source for name, view in self.stream.views.items()}
        indices, images = zip(*items, strict=True)
        numbers = ImageRng(0, np.zeros(len(images), np.int64), np.asarray(indices, np.int64))
        batch = Batch(0, self.stream.plan.rows(0), None, {}, {})
        return self.stream.finish(batch, cut(list(images), sources, numbers)).views


class _HuggingFace(torch.utils.data.Dataset[tuple[int, bytes]]):
    """Rows of Hugging Face `datasets`."""

    def __init__(self, images: list[bytes]) -> None:
        from datasets import Dataset

        self.rows = Dataset.from_dict({"image": images})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, bytes]:
        return index, self.rows[index]["image"]


def _loaded(views: Views, items: Any, kind: Any = DataLoader, **options: Any) -> Iterator[int]:
    """Yield the sizes of batches of a DataLoader, epoch after epoch."""
    if kind is DataLoader:
        options["persistent_workers"] = True
    loader = kind(items, batch_size=_BATCH, num_workers=1, collate_fn=views.of, **options)
    while True:
        yield from (len(next(iter(found.values()))) for found in loader)


def _ray(views: Views, stack: ExitStack) -> Iterator[int]:
    from raysl import ray_cluster

    ray_cluster.start()
    return (len(batch.rows) for batch in views.stream.batches())


def _local(views: Views, stack: ExitStack) -> Iterator[int]:
    from raysl.stream.processes import DataProcesses

    processes = stack.enter_context(DataProcesses(1))
    return (len(batch.rows) for batch in replace(views.stream, reader=processes.columns).batches())


def _torch(views: Views, stack: ExitStack) -> Iterator[int]:
    return _loaded(views, list(enumerate(views.stored())), shuffle=True)


def _datasets(views: Views, stack: ExitStack) -> Iterator[int]:
    return _loaded(views, _HuggingFace(views.stored()), shuffle=True)


def _webdataset(views: Views, stack: ExitStack) -> Iterator[int]:
    import webdataset

    shard = f"{views.data}.tar"
    if not os.path.exists(shard):
        with tarfile.open(shard, "w") as archive:
            for index, image in enumerate(views.stored()):
                entry = tarfile.TarInfo(f"{index}.jpg")
                entry.size = len(image)
                archive.addfile(entry, io.BytesIO(image))
    rows = webdataset.WebDataset(shard, shardshuffle=False).shuffle(1000).to_tuple("__key__", "jpg")
    return _loaded(views, rows.map(_indexed))


def _indexed(row: tuple[str, bytes]) -> tuple[int, bytes]:
    return int(row[0]), row[1]


def _litdata(views: Views, stack: ExitStack) -> Iterator[int]:
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    folder = f"{views.data}.litdata"
    if not os.path.exists(folder):
        os.mkdir(folder)
        writer = BinaryWriter(folder, chunk_bytes="64MB")
        for index, image in enumerate(views.stored()):
            writer.add_item(index, (index, image))
        writer.done()
        writer.merge()
    return _loaded(views, StreamingDataset(folder, shuffle=True), StreamingDataLoader)


def _streaming(views: Views, stack: ExitStack) -> Iterator[int]:
    from streaming import MDSWriter, StreamingDataset

    folder = f"{views.data}.mds"
    if not os.path.exists(folder):
        with MDSWriter(out=folder, columns={"index": "int", "image": "bytes"}) as writer:
            for index, image in enumerate(views.stored()):
                writer.write({"index": index, "image": image})

    class Rows(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: int) -> tuple[int, bytes]:
            row = super().__getitem__(at)
            return row["index"], row["image"]

    return _loaded(views, Rows(local=folder, shuffle=True, batch_size=_BATCH))


def _grain(views: Views, stack: ExitStack) -> Iterator[int]:
    from absl import flags
    from grain import python as grain

    flags.FLAGS(["loaders"])  # Its processes read flags of absl, which must have been parsed.
    # A class of a script cannot be pickled if it has a lock, as a `cached_property` does; a class of a module can.
    views = importlib.import_module("loaders").Views(views.data, views.side, views.images)
    rows = grain.MapDataset.source(list(enumerate(views.stored()))).shuffle(0).repeat()
    # One batch ahead, as the other loaders; by default, 16 threads prepare 500 batches, most of them unmeasured.
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    batches = rows.batch(_BATCH, batch_fn=views.of).to_iter_dataset(ahead)
    for found in batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=1)):
        yield len(next(iter(found.values())))


def _dali(views: Views, stack: ExitStack) -> Iterator[int]:
    from nvidia.dali import pipeline_def

    # Of the two batches of the queue, the trainer has one, so one is ahead.
    options = {
        "batch_size": _BATCH,
        "num_threads": 1,
        "device_id": None,
        "prefetch_queue_depth": 2,
        "seed": 0,
    }
    pipeline = pipeline_def(_dali_pipeline, enable_conditionals=True)(views, **options)
    while True:
        image, _patches = (torch.utils.dlpack.from_dlpack(made.as_tensor()) for made in pipeline.run())
        yield len(image)


def _dali_pipeline(views: Views) -> tuple[Any, Any]:
    """Make both views of an image by kernels of DALI: uint8 (p, h, w, c), one image and the patches."""
    from nvidia.dali import fn

    whole, (jigsaw, _) = views.stream.views["image"], _jigsaw_and_recipe(views)
    side, patch, count = whole.source.size, jigsaw.patch_size, jigsaw.num_crops
    inputs = fn.external_source(_dali_inputs(views), num_outputs=20, no_copy=True)
    encoded, corners, of_image, of_patches = inputs[0], inputs[1], inputs[2:11], inputs[11:]
    decoded = fn.decoders.image(encoded)
    image = _dali_crop(decoded, whole.source, of_image[0])
    image = fn.reshape(image, shape=[1, side, side, 3], layout="FHWC")
    crop = _dali_crop(decoded, jigsaw.source, of_patches[0])
    # The patches lie one below the other in one image, which is in memory the same as a sequence of them.
    patches = fn.multi_paste(
        *[crop] * count,
        in_anchors=corners,
        shapes=np.full((count, 2), patch, np.int32),
        out_anchors=np.array([(patch * slot, 0) for slot in range(count)], np.int32),
        output_size=[patch * count, patch],
    )
    patches = fn.reshape(patches, shape=[count, patch, patch, 3], layout="FHWC")
    return _dali_colors(image, *of_image[1:]), _dali_colors(patches, *of_patches[1:])


def _dali_crop(decoded: Any, source: SourceCrop, flipped: Any) -> Any:
    from nvidia.dali import fn

    crop = fn.random_resized_crop(
        decoded,
        size=[source.size, source.size],
        random_area=[source.min_scale, source.max_scale],
        random_aspect_ratio=[source.min_ratio, source.max_ratio],
    )
    return fn.flip(crop, horizontal=flipped)


def _dali_colors(images: Any, *numbers: Any) -> Any:
    """Change the colors of a sequence of images, each by numbers of its own, as recipe `pirl` does."""
    from nvidia.dali import fn, types

    chosen, brightness, contrast, saturation, hue, kernel, mask, threshold = numbers
    images = fn.color_twist(
        images,
        brightness=fn.per_frame(brightness),
        contrast=fn.per_frame(contrast),
        saturation=fn.per_frame(saturation),
        hue=fn.per_frame(hue),
    )
    if chosen:  # for all patches of an image, because DALI has no condition for one of them
        images = fn.filter(images & mask, fn.per_frame(kernel))
        full = types.Constant(255, dtype=types.UINT8)
        images = images ^ ((images >= threshold) * full)
        low = fn.reductions.min(images, axis_names="HW", keep_dims=True)
        high = fn.reductions.max(images, axis_names="HW", keep_dims=True)
        # A channel with a single value is unchanged.
        span = (high - low) + (high == low) * full
        images = fn.cast_like((images - low * (high > low)) * (255.0 / span), images)
    return images


def _dali_inputs(views: Views) -> Iterator[tuple[Any, ...]]:
    """Yield the encoded images of a batch, the corners of their patches, and the numbers of both views."""
    jigsaw, recipe = _jigsaw_and_recipe(views)
    encoded = [np.frombuffer(image, np.uint8) for image in views.stored()]
    generator = np.random.default_rng(0)
    free = jigsaw.cell_size - jigsaw.patch_size + 1
    while True:
        shuffled = generator.permutation(len(encoded))
        for start in range(0, len(encoded) - _BATCH + 1, _BATCH):
            labels_b = generator.integers(0, jigsaw.num_labels, _BATCH)
            cells_bp = jigsaw.permutations.order_kp[labels_b].astype(np.int32)
            corners_bp2 = np.stack([cells_bp // jigsaw.grid, cells_bp % jigsaw.grid], -1) * jigsaw.cell_size
            corners_bp2 += generator.integers(0, free, corners_bp2.shape, np.int32)
            yield (
                [encoded[row] for row in shuffled[start : start + _BATCH]],
                corners_bp2,
                *_dali_numbers(generator, recipe, 1),
                *_dali_numbers(generator, recipe, jigsaw.num_crops),
            )


def _jigsaw_and_recipe(views: Views) -> tuple[Jigsaw, Recipe]:
    view = views.stream.views["transformed"]
    assert isinstance(view.pretext, Jigsaw)
    assert isinstance(view.recipe, Recipe)
    return view.pretext, view.recipe


def _dali_numbers(generator: np.random.Generator, recipe: Recipe, crops: int) -> list[Any]:
    """Return the random numbers of a view: two for each image, whether to flip and the photometric block, then colors.

    Recipe `pirl` always has jitter, and neither blur nor a further solarization.
    """
    shape = (_BATCH, crops)
    changes = np.array([recipe.brightness, recipe.contrast, recipe.saturation, 360 * recipe.hue])
    jitter = generator.uniform(-1, 1, (4, *shape)) * changes[:, None, None] + [[[1]], [[1]], [[1]], [[0]]]
    jitter[2][generator.random(shape) < recipe.gray] = 0
    sharp = generator.uniform(0.1, 1.9, shape)[..., None, None]
    kernels = sharp * _SAME + (1 - sharp) * _SMOOTH
    masks = (256 - 2 ** (8 - generator.integers(4, 9, shape))).astype(np.uint8)
    thresholds = generator.integers(0, 257, shape, np.int16)
    flipped, chosen = generator.random((2, _BATCH))
    return [
        (flipped < recipe.hflip).astype(np.int32),
        chosen < recipe.photometric,
        *jitter.astype(np.float32),
        kernels.astype(np.float32),
        *(values.reshape(*shape, 1, 1, 1) for values in (masks, thresholds)),
    ]


def _limit(views: Views, stack: ExitStack) -> Iterator[int]:
    items = list(enumerate(views.stored()))
    torch.set_num_threads(1)
    while True:
        for start in range(0, len(items) - _BATCH, _BATCH):
            views.of(items[start : start + _BATCH])
            yield _BATCH


_LOADERS = {
    "ray": _ray,
    "local": _local,
    "torch": _torch,
    "datasets": _datasets,
    "webdataset": _webdataset,
    "litdata": _litdata,
    "streaming": _streaming,
    "grain": _grain,
    "dali": _dali,
    "limit": _limit,
}


def _cpu_s() -> float:
    """Return CPU seconds of this process, its descendants, and those that have ended."""
    process, total = psutil.Process(), 0.0
    for one in [process, *process.children(recursive=True)]:
        try:
            times = one.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def main(loader: str, data: str, side: int, images: int) -> None:
    """Print CPU and wall milliseconds for each image, after some that are not counted."""
    with ExitStack() as stack:
        batches = iter(_LOADERS[loader](Views(data, side, images), stack))
        done = 0
        while done < _WARM_UP * images:
            done += next(batches)
        before, began, done = _cpu_s(), time.perf_counter(), 0
        while done < images:
            done += next(batches)
        print(f"{1e3 * (_cpu_s() - before) / done} {1e3 * (time.perf_counter() - began) / done}", flush=True)
        # Nobody needs what the loader has prepared, and some processes of loaders live on without their parent.
        for process in psutil.Process().children(recursive=True):
            process.kill()
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))

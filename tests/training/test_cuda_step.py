"""A training step on a GPU that is pretended: no device is mixed with another, and the host does not wait."""

from __future__ import annotations

import contextlib
import functools
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raysl.backbone.network import BackboneConfig
from raysl.config import Pretraining, ViewConfig
from raysl.dataset import DataSet
from raysl.optim import OptimConfig
from raysl.ray_cluster.placement import Placement
from raysl.run import Run
from raysl.storage import Folder
from raysl.stream.data_tasks import MakeBatches
from raysl.stream.reader import DataShare, StreamConfig
from raysl.training.worker import Job, Meter, Worker
from tests.data import make_clips, make_dataset
from tests.pretended_cuda import CUDA, Counts, OnDevice, pretended

FEW: dict[str, Any] = {"num_negatives": 32, "dim": 16}
CASES: dict[str, dict[str, Any]] = {
    **{
        f"pirl-{transform}": {"parts": {"pirl": FEW}}
        for transform in (
            "jigsaw",
            "rotation",
            "relative_position",
            "inpainting",
            "colorization",
            "rotation+jigsaw",
        )
    },
    "pirl-jigsaw own": {"parts": {"pirl": {**FEW, "negatives": "own"}}},
    "pirl-jigsaw nce": {"parts": {"pirl": {**FEW, "loss": "nce"}}},
    "pirl-jigsaw paper_h joint": {
        "parts": {"pirl": {**FEW, "loss": "paper_h"}},
        "backbone": BackboneConfig("small", norm="joint"),
    },
    "pirl-jigsaw fp32": {"parts": {"pirl": FEW}, "precision": "fp32"},
    "pirl-jigsaw lars": {"parts": {"pirl": FEW}, "optim": OptimConfig("lars")},
    "npid adamw": {"parts": {"npid": FEW}, "optim": OptimConfig("adamw")},
    "npid mocov2": {"parts": {"npid": FEW}, "view": ViewConfig(32, recipe="mocov2")},
    **{f"predict-{t}": {} for t in ("jigsaw", "rotation", "relative_position", "inpainting", "colorization")},
    "simclr": {"view": ViewConfig(32, recipe="simclr")},
    "moco": {"parts": {"moco": {"queue": 64}}},
    "byol": {},
    "barlow_twins": {},
    "vicreg": {},
    "swav": {},
    "dino": {"parts": {"dino": {"outputs": 64, "hidden": 32, "bottleneck": 16}}},
    "supervised": {},
    "simclr-jigsaw": {},
    "vicreg-rotation": {},
    "dino-multi_crop": {"parts": {"dino": {"outputs": 64, "hidden": 32, "bottleneck": 16}}},
    "mae": {"backbone": BackboneConfig("timm/vit_tiny_patch16_224", patch_size=8)},
    "cpc-patch_grid": {"backbone": BackboneConfig("small", norm="group"), "view": ViewConfig(64)},
    "multitask-rotation,jigsaw": {},
    "triplet": {},
}
OF_CLIPS: dict[str, dict[str, Any]] = {
    "predict-frame_order": {"parts": {"predict": {"cells": 2, "hidden": 16}}},
    "pirl-near_frame": {"parts": {"pirl": FEW}},
    "triplet-tracking": {},
    "audio_visual": {"parts": {"audio_visual": {"negatives": "both"}}},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: the tensors are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return make_dataset(tmp_path_factory.mktemp("data") / "set", 64, side=32)


def step(
    dataset: DataSet, tmp_path: Path, name: str, place: Any, on_gpu: bool, lr: float = 0.01, **changes: Any
) -> tuple[float, Counts]:
    """Take two steps. Return the last loss, and what the last step, its batch included, copied and waited for."""
    config = Pretraining(
        data=str(dataset.folder),
        run=str(tmp_path),
        method=name.split()[0],
        epochs=1,
        batch_size=8,
        workers=1,
        stream=StreamConfig(place=place),
        **{
            "view": ViewConfig(32),
            "backbone": BackboneConfig("small"),
            "precision": "bf16" if on_gpu else "fp32",
            **(CASES | OF_CLIPS)[name],
            **changes,
        },
    )
    job = Job(config.to_json(), Run(Folder(str(tmp_path))), dataset, Placement(1.0, 1.0, DataShare(), 1))
    with pretended() if on_gpu else contextlib.nullcontext(Counts()) as counts:
        worker = Worker(job, CUDA if on_gpu else torch.device("cpu"))
        model, stream, meter = worker.wrapped_model(), worker._stream(), Meter(0, worker.plan)
        columns = [
            {key: values[0] for key, values in row.items()}
            for row in MakeBatches(stream, 0, 2)({"id": np.arange(-(-2 // stream.plan.steps_per_block))})
        ]
        for number, arrived in enumerate(columns[:2]):
            counts.clear()
            packed = "packed" in arrived
            batch = stream.batch(number, pickle.loads(bytes(arrived["packed"])) if packed else arrived)
            loss = worker.update(model, batch, lr)
            worker.step += 1
            meter.add(batch, loss)
        assert not on_gpu or isinstance(loss.loss, OnDevice)
        copies, waits = dict(+counts.copies), dict(+counts.waits)
        value = meter.row(2, 0.01)["loss"]
    counts.copies.clear()
    counts.waits.clear()
    counts.copies.update(copies)
    counts.waits.update(waits)
    return value, counts


@pytest.mark.parametrize("place", ["data", "trainer"])
@pytest.mark.parametrize("name", OF_CLIPS)
def test_a_step_with_clips_does_so_too(tmp_path: Path, name: str, place: str) -> None:
    clips = make_clips(tmp_path / "clips", 40)
    loss, counts = step(clips, tmp_path, name, place, on_gpu=True)
    assert math.isfinite(loss)
    assert (dict(counts.copies), dict(counts.waits)) == ({}, {})


# Views are made on the device with "trainer": the transforms and recipes count there.
ON_DEVICE = [
    name
    for name in CASES
    if name.startswith("predict") or name in ("npid mocov2", "dino-multi_crop", "simclr")
]


@pytest.mark.parametrize(
    ("name", "place"), [(name, "data") for name in CASES] + [(name, "trainer") for name in ON_DEVICE]
)
def test_a_step_copies_from_pinned_memory_and_waits_for_nothing(
    dataset: DataSet, tmp_path: Path, name: str, place: str
) -> None:
    loss, counts = step(dataset, tmp_path, name, place, on_gpu=True)
    assert math.isfinite(loss)
    assert (dict(counts.copies), dict(counts.waits)) == ({}, {})


# LARS looks at the gradients in Python, so the host has to know whether they have overflown.
IN_FP16 = {"pirl-jigsaw": 0, "pirl-jigsaw lars": 1, "npid adamw": 0, "multitask-rotation,jigsaw": 0}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in IN_FP16 else [pytest.mark.slow]) for name in (*CASES, *OF_CLIPS)],
)
def test_a_step_in_half_precision_has_about_the_loss_of_float32(
    dataset: DataSet, tmp_path: Path, name: str
) -> None:
    images = make_clips(tmp_path / "clips", 40) if name in OF_CLIPS else dataset
    # The first gradients overflow in fp16 and are not applied, so steps must be small for equal losses.
    small: dict[str, Any] = {"place": "data", "lr": 1e-7}
    expected, _ = step(images, tmp_path, name, on_gpu=False, precision="fp32", **small)
    found = {p: step(images, tmp_path, name, on_gpu=True, precision=p, **small) for p in ("bf16", "fp16")}
    for precision, (loss, counts) in found.items():
        assert loss == pytest.approx(expected, rel=0.05), precision
        assert dict(counts.copies) == {}
    assert sum(found["fp16"][1].waits.values()) == IN_FP16.get(name, 0)


# Every objective. BatchNorm over both batches is left out of the graph on purpose, which breaks it. Maps are read by a
# hook that the forward pass sets, which torch does not trace.
BREAKS = {
    "pirl-jigsaw paper_h joint": 4,
    "predict-frame_order": 5,
    "audio_visual": 6,
    **dict.fromkeys(
        "pirl-jigsaw simclr moco byol barlow_twins vicreg swav dino-multi_crop supervised".split(), 0
    ),
    **dict.fromkeys(
        "mae cpc-patch_grid multitask-rotation,jigsaw triplet predict-jigsaw pirl-near_frame".split(), 0
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BREAKS)
def test_torch_compile_traces_the_network(
    dataset: DataSet, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = make_clips(tmp_path / "clips", 40) if name in OF_CLIPS else dataset
    expected, _ = step(images, tmp_path, name, "data", on_gpu=False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    loss, _ = step(images, tmp_path, name, "data", on_gpu=False, compile=True)
    assert loss == pytest.approx(expected, rel=1e-4)
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == BREAKS[name]


@pytest.mark.parametrize("name", ["pirl-jigsaw", "npid mocov2", "predict-rotation", "simclr"])
def test_views_made_on_the_gpu_give_the_loss_of_the_cpu(dataset: DataSet, tmp_path: Path, name: str) -> None:
    expected, _ = step(dataset, tmp_path, name, "data", on_gpu=False)
    found, _ = step(dataset, tmp_path, name, "trainer", on_gpu=True, precision="fp32")
    assert found == pytest.approx(expected, abs=1e-5)

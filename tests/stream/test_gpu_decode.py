"""Decoding on the training device: the same crops as in the data tasks, and JPEG pixels that differ by little.

torchvision decodes on the CPU by the same function here, with libjpeg in the place of nvJPEG.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from raysl.augment import recipe
from raysl.config import Pretraining
from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.model import DatasetInfo, Model
from raysl.pretext import Geometry, build
from raysl.run import Run
from raysl.stream import gpu_decode
from raysl.stream.decode import DecodeError, decode, resized, resized_in_float
from raysl.stream.plan import Plan
from raysl.stream.reader import Batch, Stream, StreamConfig, load
from raysl.stream.views import View
from raysl.training.launch import pretrain
from tests.data import make_dataset
from tests.stream.test_decode import encoded, picture

CPU = torch.device("cpu")
GPU_DECODE = StreamConfig(decode="gpu")


def batches(dataset: DataSet, config: StreamConfig) -> list[Batch]:
    geometry = Geometry(image_size=32)
    views = {
        name: View(build(spec, {}, geometry), recipe("pirl"))
        for name, spec in (("transformed", "jigsaw"), ("image", "identity"))
    }
    stream = Stream(dataset, Plan.of(dataset, 8, seed=3, epochs=2), views, config)
    return [stream.batch(step, columns) for step, columns in enumerate(load(stream, [range(4)]))]


def test_views_are_those_of_the_data_tasks_where_the_decoder_is_the_same(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", 20)  # PNG, which the CPU decodes in both cases
    for ours, theirs in zip(
        batches(dataset, GPU_DECODE), batches(dataset, StreamConfig(place="trainer")), strict=True
    ):
        assert all(torch.equal(ours.views[name], theirs.views[name]) for name in theirs.views)
        assert torch.equal(ours.targets["transformed"], theirs.targets["transformed"])


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_jpeg_pixels_differ_by_little(options: dict[str, int]) -> None:
    file = encoded(picture(120, 90), "JPEG", quality=90, **options)
    (ours,) = gpu_decode.decode_on([file], CPU)
    assert ours.shape == (3, 90, 120)
    assert (ours.int() - decode(file).int()).abs().float().mean() < 2


def test_gray_files_get_three_channels() -> None:
    (ours,) = gpu_decode.decode_on([encoded(picture().convert("L"), "JPEG")], CPU)
    assert ours.shape == (3, 30, 40)


def test_files_that_need_more_than_decoding_are_those_of_the_cpu() -> None:
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    others = [
        encoded(picture(), "JPEG", exif=exif),
        encoded(picture()),
        encoded(picture().convert("CMYK"), "JPEG"),
    ]
    *found, plain = gpu_decode.decode_on([*others, encoded(picture(), "JPEG")], CPU)
    for pixels, file in zip(found, others, strict=True):
        assert torch.equal(pixels, decode(file))
    assert found[0].shape == (3, 40, 30)
    assert plain.shape == (3, 30, 40)


def test_files_arrive_as_they_were() -> None:
    files = [b"one", b"", b"three"]
    assert gpu_decode.unpack(gpu_decode.pack(files)) == files
    assert gpu_decode.unpack(gpu_decode.pack([])) == []


def test_a_damaged_file_is_named_so() -> None:
    file = encoded(picture(), "JPEG")
    with pytest.raises(DecodeError, match="damaged"):
        gpu_decode.decode_on([file, file[: len(file) // 2]], CPU)


def test_a_file_that_the_decoder_refuses_is_decoded_by_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("Unknown chroma subsampling")

    monkeypatch.setattr("torchvision.io.decode_jpeg", refuse)
    files = [encoded(picture(), "JPEG"), encoded(picture(20, 20), "JPEG")]
    for pixels, file in zip(gpu_decode.decode_on(files, CPU), files, strict=True):
        assert torch.equal(pixels, decode(file))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("CUDA error: no driver")])
def test_an_error_of_the_gpu_is_no_damaged_file(error: RuntimeError, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("torchvision.io.decode_jpeg", fail)
    with pytest.raises(RuntimeError, match=str(error)):
        gpu_decode.decode_on([encoded(picture(), "JPEG")], CPU)


def test_a_gpu_resizes_as_the_cpu_does() -> None:
    image_1chw = decode(encoded(picture(120, 90)))[None]
    for height, width in ((32, 32), (200, 150)):
        ours, theirs = resized_in_float(image_1chw, height, width), resized(image_1chw, height, width)
        assert ours.dtype == torch.uint8
        assert (ours.int() - theirs.int()).abs().max() <= 1


def test_a_run_cannot_change_where_it_decodes(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", 20)
    config = Pretraining(str(tmp_path / "set"), str(tmp_path / "run"), "predict-rotation", batch_size=4)
    Run.begin(config, dataset, {}).write_metrics([{"step": 1, "loss": 1.0}])
    Run.begin(replace(config, stream=StreamConfig(place="trainer")), dataset, {})
    with pytest.raises(UserError, match=r"differ: stream\.decode"):
        Run.begin(replace(config, stream=GPU_DECODE), dataset, {})


def test_it_is_refused_without_a_gpu_and_for_clips(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", 20)
    config = Pretraining(
        str(tmp_path / "set"), str(tmp_path / "run"), "simclr", batch_size=4, workers=1, stream=GPU_DECODE
    )
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="needs a GPU"):
            pretrain(config, local=True)
        assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="learns from clips"):
        Model(replace(config, method="predict-frame_order", parts={}), DatasetInfo(20)).check()
    Model(config, DatasetInfo(20)).check()

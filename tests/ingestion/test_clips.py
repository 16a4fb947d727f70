"""The procedural video set: deterministic, and its ground truth is true."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from raysl.dataset import DataSet
from raysl.dataset.clips import COLUMNS, DEPTH_SCALE, SOUND_HZ, TRUTH, Clips
from raysl.errors import UserError
from raysl.ingestion.clip_drawing import ACTIONS, KEYPOINTS, KINDS
from raysl.ingestion.sources import SourceLocation, UnitSize, open_source, read
from raysl.stream.decode import decode
from tests.data import make_clips


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return make_clips(tmp_path_factory.mktemp("clips") / "set", 12, "size=48&frames=10")


@pytest.fixture(scope="module")
def clips(dataset: DataSet) -> Clips:
    return Clips(dataset.read(np.arange(12), ("image", "label", *COLUMNS, *TRUTH)))


def test_a_data_set_of_clips_says_so_and_reads_as_images_too(dataset: DataSet, clips: Clips) -> None:
    assert dataset.manifest.clips["columns"] == [*COLUMNS, *TRUTH]
    assert dataset.manifest.clips["keypoints"] == list(KEYPOINTS)
    assert dataset.manifest.classes == ACTIONS
    images = dataset.read(np.array([5, 2])).column("image").to_pylist()
    assert images == [clips.frame(5, 5), clips.frame(2, 5)]


def test_columns_belong_together(clips: Clips) -> None:
    for row in range(len(clips)):
        assert clips.num_frames(row) == 10
        np.testing.assert_allclose(clips.times(row), np.arange(10) / 8)
        assert clips.thumbnails(row).shape == (10, 16, 16)
        assert clips.tracks(row).shape == (3, 10, 4)
        assert clips.keypoints(row).shape == (10, len(KEYPOINTS), 3)
        assert clips.sound(row).shape == (round(10 / 8 * SOUND_HZ),)
        assert decode(clips.frame(row, 0)).shape == (3, 48, 48)
    truth = clips.table.select(["sounding", "kind"]).to_pylist()
    assert {one["sounding"] for one in truth} == {0, 1}
    assert all(0 <= one["kind"] < len(KINDS) for one in truth)


def test_a_clip_is_a_function_of_seed_split_and_index() -> None:
    def rows(name: str, split: str = "train", images: int = 100) -> list[object]:
        opened = open_source(SourceLocation(name, split))
        return [row for unit in opened.source.units(UnitSize(images, 1)) for row in read(opened.kind, unit)]

    few = rows("clips:3?size=32&frames=4")
    apart = rows("clips:3?size=32&frames=4", images=1)
    assert [repr(row) for row in few] == [repr(row) for row in apart]
    for other in (rows("clips:3?size=32&frames=4&seed=1"), rows("clips:3?size=32&frames=4", "test")):
        assert all(a[0] != b[0] for a, b in zip(few, other, strict=True))  # type: ignore[index]


def test_boxes_and_key_points_lie_on_their_objects(clips: Clips) -> None:
    """Between two frames the picture changes where an object is, and not far from all of them."""
    for row in range(len(clips)):
        first, last = (decode(clips.frame(row, n)).float() for n in (0, 9))
        moved = (first - last).abs().sum(0) > 60
        near = np.zeros(moved.shape, bool)
        for top, left, height, width in clips.tracks(row)[:, [0, 9]].reshape(-1, 4):
            if not np.isnan(top):
                rows = slice(max(0, int(top) - 2), int(top + height) + 2)
                near[rows, max(0, int(left) - 2) : int(left + width) + 2] = True
        assert moved.sum() > 20
        assert moved.numpy()[near].sum() == moved.sum()
        points = clips.keypoints(row)
        top, left, height, width = np.moveaxis(clips.tracks(row)[2], -1, 0)[..., None]
        seen = points[..., 2] == 1
        assert seen.mean() > 0.3
        inside = (points[..., 0] > left - 1) & (points[..., 0] < left + width + 1)
        inside &= (points[..., 1] > top - 1) & (points[..., 1] < top + height + 1)
        assert inside[seen].all()


def test_depth_and_normals_agree(clips: Clips) -> None:
    for row in clips.table.select(["depth", "normals"]).to_pylist():
        depth_hw, coded_hw3 = (np.asarray(Image.open(io.BytesIO(row[name]))) for name in ("depth", "normals"))
        depth_hw, normals_hw3 = depth_hw / DEPTH_SCALE, coded_hw3 / 127.5 - 1
        assert depth_hw.shape == (48, 48)
        np.testing.assert_allclose(np.linalg.norm(normals_hw3, axis=2), 1, atol=0.01)
        slope = (depth_hw[:, 2:] - depth_hw[:, :-2]) * 24
        smooth = np.abs(slope) < 0.6
        found = (normals_hw3[..., 0] / normals_hw3[..., 2])[:, 1:-1]
        assert smooth.mean() > 0.7
        assert np.median(np.abs(found - slope)[smooth]) < 0.02


def test_the_tone_tells_the_kind_of_the_shape_that_sounds(clips: Clips) -> None:
    kinds = clips.table.column("kind").to_pylist()
    peaks = []
    for row in range(len(clips)):
        spectrum = np.abs(np.fft.rfft(clips.sound(row).astype(float)))
        hz = np.fft.rfftfreq(len(clips.sound(row)), 1 / SOUND_HZ)
        below_overtones = np.where(hz < 3000, spectrum, 0)
        peaks.append(np.log2(hz[below_overtones.argmax()] / 300) * 2.5)
    assert np.abs(np.array(peaks) - kinds).max() < 0.6


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("clips:", "number of clips"),
        ("clips:0", "number of clips"),
        ("clips:5?size=8", "from 32 to 256"),
        ("clips:5?sizes=64", "Did you mean 'size'"),
        ("clips:5#tets", "Did you mean 'test'"),
    ],
)
def test_wrong_names_are_answered(name: str, answer: str) -> None:
    with pytest.raises(UserError, match=answer):
        open_source(SourceLocation.parse(name))

"""What transforms of clips keep to, and what each of them chooses."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch

from raysl import pretext
from raysl.dataset.clips import COLUMNS, TRUTH, Clips
from raysl.errors import UserError
from raysl.ingestion.sources import SourceLocation, UnitSize, open_source, read
from raysl.pretext import Chosen, Geometry, OfClips, _sound
from raysl.rng import ImageRng
from tests.data import make_clips

NAMES = [name for name in pretext.names() if pretext.of_clips(pretext.build(name, {}, Geometry()))]
SORT = {"frame_order": pretext.load("frame_order")[0](task="sort", frames=4)}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Clips:
    dataset = make_clips(tmp_path_factory.mktemp("clips") / "set", 24, "size=32&frames=24")
    return Clips(dataset.read(np.arange(24), (*COLUMNS, *TRUTH)))


def image_rng(count: int, epoch: int = 0, seed: int = 0, first: int = 0) -> ImageRng:
    return ImageRng(seed, np.full(count, epoch), np.arange(first, first + count))


def built(name: str) -> Any:
    if name == "sound":
        return _sound.MomentSound(1.0, 2)
    return pretext.build(name.removesuffix(" sort"), SORT if name.endswith("sort") else {}, Geometry(32))


def parts(chosen: Chosen) -> list[Any]:
    found = [chosen.frames_bp, chosen.boxes_bp4, chosen.crops_bpchw, chosen.target]
    return [np.asarray(part) for part in found if part is not None]


@pytest.mark.parametrize("name", [*NAMES, "frame_order sort", "sound"])
def test_choices_are_pure_functions_of_seed_epoch_and_index(name: str, clips: Clips) -> None:
    transform = built(name)
    assert isinstance(transform, OfClips)
    assert set(transform.clip_columns) <= set(COLUMNS), "no method may learn from the truth"
    made = parts(transform.choose(clips, image_rng(24)))
    assert all(len(part) == 24 for part in made)
    again = parts(pickle.loads(pickle.dumps(transform)).choose(clips, image_rng(24)))
    some = parts(transform.choose(Clips(clips.table.slice(5, 3)), image_rng(3, first=5)))
    for whole, same, part in zip(made, again, some, strict=True):
        np.testing.assert_array_equal(whole, same)
        np.testing.assert_array_equal(whole[5:8], part)
    for other in (image_rng(24, epoch=1), image_rng(24, seed=1)):
        assert not np.array_equal(made[0], parts(transform.choose(clips, other))[0])


def tuples(transform: Any, clips: Clips, epochs: int = 40) -> tuple[Any, Any]:
    chosen = [transform.choose(clips, image_rng(len(clips), epoch)) for epoch in range(epochs)]
    return np.concatenate([c.frames_bp for c in chosen]), torch.cat([c.target for c in chosen]).numpy()


def test_a_tuple_is_right_if_its_middle_lies_between_its_ends(clips: Clips) -> None:
    frames_n3, label_n = tuples(built("frame_order"), clips, epochs=200)
    first, middle, last = np.sort(frames_n3[:, [0, 2]]).T[0], frames_n3[:, 1], frames_n3[:, [0, 2]].max(1)
    np.testing.assert_array_equal(label_n == 1, (middle > first) & (middle < last))
    assert 0.45 < label_n.mean() < 0.55
    wrong = label_n == 0
    outside = np.minimum(np.abs(middle - first), np.abs(middle - last))[wrong]
    assert outside.min() >= 4, "half a second at 8 frames a second"
    assert (last - first).max() <= 16, "two seconds"
    backward = frames_n3[:, 0] > frames_n3[:, 2]
    assert 0.45 < backward.mean() < 0.55
    # Only the middle may tell: the ends of right and wrong tuples are equally distributed.
    ends = last - first
    assert abs(ends[wrong].mean() - ends[~wrong].mean()) < 0.6
    assert abs(first[wrong].mean() - first[~wrong].mean()) < 0.6


def test_tuples_prefer_motion_and_skip_frames_that_look_alike() -> None:
    import pyarrow as pa

    gray = np.zeros((24, 16, 16), np.uint8)
    gray[12:] = np.arange(12)[:, None, None] * 20  # still at first, then ever brighter
    times = (np.arange(24) / 8).tolist()
    row = {"times": [times], "thumbnails": [gray.tobytes()]}
    still = Clips(
        pa.table({"times": pa.array(row["times"], COLUMNS["times"]), "thumbnails": row["thumbnails"]})
    )
    chosen = [built("frame_order").choose(still, image_rng(1, epoch)) for epoch in range(200)]
    frames = np.array([c.frames_bp[0] for c in chosen if c.frames_bp is not None])
    assert (frames[:, [0, 2]].max(1) > 12).all()
    label = np.array([int(c.target[0]) for c in chosen if c.target is not None])
    value = np.concatenate([np.zeros(12), np.arange(12) * 20.0])[frames]
    alike = (np.abs(value[:, 1] - value[:, 0]) < 2) | (np.abs(value[:, 1] - value[:, 2]) < 2)
    last = frames[:, [0, 2]].max(1)
    has_other = last + 4 < 24
    assert not alike[(label == 0) & has_other].any()


def test_sorting_has_a_class_for_each_permutation_and_its_reverse(clips: Clips) -> None:
    transform = built("frame_order sort")
    assert (transform.num_labels, transform.num_crops) == (12, 4)
    frames_n4, label_n = tuples(transform, clips, epochs=60)
    orders: dict[int, set[tuple[int, ...]]] = {}
    for frames, label in zip(frames_n4, label_n, strict=True):
        assert len(set(frames)) == 4
        orders.setdefault(int(label), set()).add(tuple(np.argsort(np.argsort(frames)).tolist()))
    assert len(orders) == 12
    for found in orders.values():
        assert len(found) == 2
        one, other = found
        assert one == other[::-1]


def test_a_near_frame_is_near_the_middle(clips: Clips) -> None:
    chosen = [built("near_frame").choose(clips, image_rng(24, epoch)) for epoch in range(40)]
    frames = np.concatenate([c.frames_bp for c in chosen if c.frames_bp is not None])
    assert (frames.min(), frames.max()) == (4, 20)


def test_patches_lie_on_one_track_at_two_times(clips: Clips) -> None:
    chosen = built("tracking").choose(clips, image_rng(24))
    for row in range(24):
        frames, boxes = chosen.frames_bp[row], chosen.boxes_bp4[row]
        assert abs(frames[0] - frames[1]) >= 8
        assert (boxes[:, 2] == boxes[:, 3]).all()
        centers = clips.tracks(row)[:, frames, :2] + clips.tracks(row)[:, frames, 2:] / 2
        distances = np.abs(centers - (boxes[:, :2] + boxes[:, 2:] / 2)).max(axis=(1, 2))
        assert np.nanmin(distances) < 1e-3


def test_frame_and_sound_agree_on_a_moment(clips: Clips) -> None:
    from raysl.augment import SourceCrop

    frame = _sound.MomentFrame(SourceCrop(32, 1.0), 1.0)
    starts = _sound._moments(clips, 1.0, image_rng(24).named("sound"))
    frames = frame.choose(clips, image_rng(24).named("frame")).frames_bp
    assert frames is not None
    assert np.abs(frames[:, 0] / 8 - starts[:, 0] - 0.5).max() <= 1 / 16 + 1e-9
    assert (np.abs(starts[:, 0] - starts[:, 1]) > 0.9).mean() > 0.5
    assert starts.min() >= 0
    assert starts.max() <= 23 / 8 - 1 + 1e-9


def test_a_tone_lights_its_band_and_silence_none() -> None:
    seconds = np.arange(16_000) / 16_000
    bands = []
    for hz in (200.0, 1000.0, 4000.0):
        sound = (8000 * np.sin(2 * np.pi * hz * seconds)).astype(np.int16)
        loud = _sound.spectrogram(sound, 0.0, 0.5)
        assert loud.shape == (64, 50)
        bands.append(int(loud.mean(axis=1).argmax()))
    assert bands == sorted(bands)
    assert len(set(bands)) == 3
    assert _sound.spectrogram(np.zeros(0, np.int16), 0.0, 0.5).max() == 0
    assert all(_sound._mel_bands().sum(axis=1) > 0)


def test_transforms_of_clips_stand_alone() -> None:
    with pytest.raises(UserError, match="stands alone"):
        pretext.build("rotation+frame_order", {}, Geometry())


@pytest.mark.parametrize("name", [*NAMES, "frame_order sort", "sound"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_clips_of_few_frames_work(name: str, count: int) -> None:
    import pyarrow as pa

    opened = open_source(SourceLocation("clips:2?size=32&frames=4"))
    rows = [row.clip for unit in opened.source.units(UnitSize(9, 1 << 20)) for row in read("clips", unit)]
    short = {
        "times": [row["times"][:count] for row in rows if row],
        "thumbnails": [row["thumbnails"][: 256 * count] for row in rows if row],
        "tracks": [row["tracks"].reshape(3, 4, 4)[:, :count].ravel() for row in rows if row],
        "sound": [None, b""],
    }
    table = pa.table({column: pa.array(values, COLUMNS[column]) for column, values in short.items()})
    chosen = built(name).choose(Clips(table), image_rng(2))
    if chosen.frames_bp is not None:
        assert chosen.frames_bp.min() >= 0
        assert chosen.frames_bp.max() < count

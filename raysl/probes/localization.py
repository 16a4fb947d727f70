"""Localization: does the place of a frame that fits the sound best lie on the object that sounds?

Arandjelovic and Zisserman 2018, "Objects that sound" (arXiv 1712.06651), section 4: a network that was trained for
audio-visual correspondence compares the sound with every place of a frame, and the place of the largest similarity is
where it hears the sound. They show pictures; Senocak et al. 2018 and later work score it against boxes. Here a peak is
right if it lies in the box of the sounding object, which the drawn clips know (see `raysl.dataset.clips`). A silent
shape is in every frame too, so that finding objects is not enough: `peak_in_silent_box` counts these.

The probe takes runs of `audio_visual` with `--audio-visual.form map`, and yields nothing for other encoders. `chance`
is the mean share of the frame that the box covers, and `middle_in_box` the share of boxes that hold the middle of the
frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from raysl.backbone import norm
from raysl.dataset import DataSet
from raysl.dataset.clips import Clips
from raysl.errors import MissingValueError, UserError
from raysl.extraction import Trained
from raysl.extraction.heads import trained_model
from raysl.fields import Bounds
from raysl.pretext._sound import spectrogram
from raysl.probes import REESTIMATED, Row, Settings, Subject
from raysl.probes._images import cell_offset, mixed, spaced
from raysl.probes._task import TaskProbe
from raysl.ray_cluster.gpus import device
from raysl.stream import decode

COMMAND = "raysl probe RUN --train clips:500#train --test clips:200#test --probes localization"

_PART_CLIPS = 16


@dataclass(frozen=True)
class Config(Settings):
    """Protocol of localization.

    Args:
        frames: number of frames of each clip, evenly spaced in time; those without the object are left out.
    """

    version: ClassVar[int] = 2
    frames: Annotated[int, Bounds(1, 10**6)] = 3


@dataclass(frozen=True)
class Moments:
    """Frames with the sound around them."""

    frames_bchw: Tensor  # uint8 (b, 3, s, s), the whole frame
    sounds_bchw: Tensor  # uint8 (b, 1, bands, windows)
    # float (b, 2, 4): top, left, height and width of the sounding shape and of the silent one, as shares of the frame;
    # NaN where a shape is not seen.
    boxes_b24: NDArray[np.float64]


class Localization(TaskProbe[Config]):
    """Share of frames in which the peak of the map lies in the box of the sounding object, the primary metric."""

    primary_metric = "peak_in_box"
    needs = Trained

    def check_data(self, train: DataSet, test: DataSet) -> None:
        """Raise UserError if the clips do not say what sounds."""
        for data in (train, test):
            if "sounding" not in data.manifest.clips.get("columns", []):
                raise MissingValueError(
                    f"The probe localization needs clips that say which object sounds, and {data.name!r} does "
                    "not. Give --train clips:1000#train --test clips:200#test."
                )

    def rows(self, subject: Subject) -> list[Row]:
        """Return the rows of a run. Raises UserError if it has no map of sound."""
        assert isinstance(subject.encoder, Trained)
        return measure(trained_model(subject.encoder).to(device()), subject, self.config)


def measure(model: Any, subject: Subject, config: Config) -> list[Row]:
    """Return the rows of a `raysl.model.Model` in eval mode; see `Localization.rows`."""
    if getattr(getattr(model.objective, "config", None), "form", "") != "map":
        raise UserError(
            "The probe localization needs a run that compares the sound with every place of a frame. Pretrain with "
            "--method audio_visual --audio-visual.form map."
        )
    size, window_s = subject.image_size, model.objective.config.window_s
    if subject.bn_statistics == REESTIMATED:
        count = max(1, norm.STATISTICS_IMAGES // (_PART_CLIPS * config.frames))
        seen = islice(moments(subject.train, size, config.frames, window_s), count)
        if batches := mixed(one.frames_bchw for one in seen):
            norm.reestimate(model.backbone, (images_bchw.to(device()) for images_bchw in batches))
    offset = cell_offset(model.backbone, size)
    maps, boxes = [], []
    for one in moments(subject.test, size, config.frames, window_s):
        with torch.inference_mode():
            views = (part.to(device())[:, None] for part in (one.frames_bchw, one.sounds_bchw))
            maps.append(model.objective.sound_map(model.backbone, *views).float().cpu())
        boxes.append(one.boxes_b24)
    if not maps:
        raise UserError("No frame of the test clips shows the object that sounds. Give other clips.")
    found = scores(peaks(torch.cat(maps), offset), np.concatenate(boxes))
    return [Row(name, value, "heads") for name, value in found.items()]


def moments(data: DataSet, size: int, frames: int, window_s: float) -> Iterator[Moments]:
    """Yield whole frames of `size` pixels in which the sounding object is seen, with `window_s` of the sound around."""
    for first in range(0, data.num_images, _PART_CLIPS):
        rows = np.arange(first, min(first + _PART_CLIPS, data.num_images), dtype=np.int64)
        clips = Clips(data.read(rows, ("frames", "times", "tracks", "sound", "sounding")))
        files, sounds, boxes = [], [], []
        for row, sounding in enumerate(clips.table.column("sounding").to_pylist()):
            tracks_kn4, times_n = clips.tracks(row), clips.times(row)
            for number in spaced(clips.num_frames(row), frames):
                if np.isnan(tracks_kn4[sounding, number, 0]):
                    continue
                files.append(clips.frame(row, number))
                start_s = min(max(times_n[number] - window_s / 2, 0.0), max(times_n[-1] - window_s, 0.0))
                sounds.append(spectrogram(clips.sound(row), start_s, window_s))
                sides_2 = decode.decode(files[-1]).shape[1:]
                boxes.append(tracks_kn4[[sounding, 1 - sounding], number] / np.tile(sides_2, 2))
        if files:
            spectrograms = torch.from_numpy(np.stack(sounds))[:, None]
            yield Moments(decode.resized_to_square(files, size), spectrograms, np.stack(boxes))


def peaks(map_bhw: Tensor, offset: float) -> NDArray[np.float64]:
    """Return where each map is highest: float (b, 2), y and x as shares of the frame.

    The map is resized bilinearly to eight times its side, so that a peak may lie between its cells. For `offset` see
    `raysl.probes._images.cell_offset`.
    """
    cells_2 = np.array(map_bhw.shape[1:])
    fine_bhw = interpolate(map_bhw[:, None], scale_factor=8, mode="bilinear")[:, 0]
    peak_b = fine_bhw.flatten(1).argmax(1).numpy()
    fine_b2 = np.stack(np.divmod(peak_b, fine_bhw.shape[2]), axis=1)
    return np.asarray(np.clip(((fine_b2 + 0.5) / 8 - 0.5 + offset) / cells_2, 0, 1))


def scores(peaks_b2: NDArray[np.float64], boxes_b24: NDArray[np.float64]) -> dict[str, float]:
    """Return the shares of frames whose peak lies in the box of the sounding or the silent shape, and baselines."""
    return {
        "peak_in_box": float(_inside(peaks_b2, boxes_b24[:, 0]).mean()),
        "peak_in_silent_box": float(_inside(peaks_b2, boxes_b24[:, 1]).mean()),
        "chance": float(np.prod(boxes_b24[:, 0, 2:], axis=1).mean()),
        "middle_in_box": float(_inside(np.full_like(peaks_b2, 0.5), boxes_b24[:, 0]).mean()),
    }


def _inside(points_b2: NDArray[np.float64], boxes_b4: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return whether each point, y and x, lies in its box; False for a box that is NaN."""
    offset_b2 = points_b2 - boxes_b4[:, :2]
    within: NDArray[np.bool_] = np.all((offset_b2 >= 0) & (offset_b2 <= boxes_b4[:, 2:]), axis=1)
    return within

"""From clips to source crops: choose frames, decode each once, and cut them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raysl.augment import SourceCrop
from raysl.clips import Clips
from raysl.pretext import Chosen
from raysl.rng import ImageRng
from raysl.stream.decode import decode, drawn_as, resized
from raysl.stream.views import View


def cut_clips(
    table: pa.Table,
    views: Mapping[str, View],
    image_rng: ImageRng,
    finished: dict[str, Tensor],
    targets: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Make the source crops of all views that need clips, and leave out the others.

    Args:
        table: rows of the data set with the columns of the views.
        views: views by name; a view chooses with `image_rng.named(drawn_as(name))`.
        image_rng: random numbers of the b rows.
        finished: views of the sound are added here, by name.
        targets: targets are added here, by the name of the view.

    Returns:
        uint8 (b, p, 3, s, s) by the name of the view.

    Raises:
        DecodeError: a frame is damaged.
    """
    clips = Clips(table)
    known: dict[tuple[int, int], Tensor] = {}
    crops: dict[str, Tensor] = {}
    for name, view in views.items():
        if view.of_clips is None:
            continue
        own_rng = image_rng.named(drawn_as(name))
        chosen = view.of_clips.choose(clips, own_rng)
        if chosen.target is not None:
            targets[name] = chosen.target
        if chosen.crops_bpchw is not None:
            finished[name] = chosen.crops_bpchw
        else:
            crops[name] = _cut(clips, chosen, view.source, own_rng, known)
    return crops


def _cut(
    clips: Clips,
    chosen: Chosen,
    source: SourceCrop,
    image_rng: ImageRng,
    known: dict[tuple[int, int], Tensor],
) -> Tensor:
    """Decode the chosen frames that are not known yet, and cut and resize them."""
    assert chosen.frames_bp is not None
    b, p = chosen.frames_bp.shape
    crops_bpchw = torch.empty(b, p, 3, source.size, source.size, dtype=torch.uint8)

    def frame(row: int, number: int) -> Tensor:
        if (row, number) not in known:
            known[row, number] = decode(clips.frame(row, number))
        return known[row, number]

    sizes_b2 = np.array([frame(row, int(chosen.frames_bp[row, 0])).shape[1:] for row in range(b)], np.int64)
    sizes_b2 = sizes_b2.reshape(-1, 2)
    if chosen.boxes_bp4 is None:
        boxes_b4 = source.boxes(sizes_b2[:, 0], sizes_b2[:, 1], image_rng)
        boxes_bp4 = np.broadcast_to(boxes_b4[:, None], (b, p, 4))
    else:
        boxes_bp4 = _inside(chosen.boxes_bp4, sizes_b2)
    for row in range(b):
        for crop in range(p):
            top, left, height, width = boxes_bp4[row, crop].tolist()
            image_chw = frame(row, int(chosen.frames_bp[row, crop]))
            part = image_chw[None, :, top : top + height, left : left + width]
            crops_bpchw[row, crop] = resized(part, source.size, source.size)[0]
    return crops_bpchw


def _inside(boxes_bp4: np.ndarray, sizes_b2: np.ndarray) -> np.ndarray:
    """Round boxes to pixels and move them into their frames, at least 2 x 2 pixels large."""
    sides = np.clip(np.rint(boxes_bp4[..., 2:]).astype(np.int64), 2, sizes_b2[:, None])
    corners = np.clip(np.rint(boxes_bp4[..., :2]).astype(np.int64), 0, sizes_b2[:, None] - sides)
    return np.concatenate([corners, sides], axis=-1)

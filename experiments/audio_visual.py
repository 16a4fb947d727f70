"""Learn which sound belongs to a frame, and see where it comes from: Look, Listen and Learn in small.

Command:  python experiments/audio_visual.py --data clips:2000 --out OUT
Hardware: 2 CPU cores, 24 GB, no GPU; 2 Ray Train workers.
Time:     planned: 10 minutes a seed. With --local, on 6,000 short clips: six to seven CPU minutes a seed.
Expect:   correspondence on held-out clips above 90 %, and the peak of the map in the box of the sounding shape in more
          than half of the clips.

With --loss binary, correspondence is the mean of the accuracies of right and wrong pairs (Arandjelovic and Zisserman
2017 and 2018); the wrong sounds are those of the other clips of a batch. With --loss infonce, the number is the share
of frames that pick their sound among those of a batch. The probe `localization` scores the map. The picture map.png
shows some frames with their sound and the map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw
from rich.console import Console
from torch import Tensor
from torch.nn.functional import grid_sample

from raysl.config import Pretraining, ViewConfig
from raysl.evaluation.evaluate import probe
from raysl.evaluation.results import tables
from raysl.experiment.held_out import held_out
from raysl.experiment.script import Flags, command, locally, pretrained
from raysl.extraction import Trained
from raysl.extraction.heads import trained_model
from raysl.ingestion import open_or_ingest, splits
from raysl.objectives.audio_visual import Config
from raysl.optim import OptimConfig
from raysl.probes._images import cell_offset
from raysl.probes.localization import moments, peaks
from raysl.reporting import pictures
from raysl.run import Run, jsonl
from raysl.storage import Folder

_SIDE = 192


@dataclass(frozen=True)
class SoundFlags(Flags):
    """Learn correspondence, once for each seed, and score it on other clips.

    Args:
        form: how frame and sound are compared; only "map" says where the sound comes from.
        loss: "binary" classifies pairs; "infonce" picks the sound of a frame among those of a batch.
        negatives: where wrong sounds come from.
        epochs: visits to every clip.
    """

    data: str = "clips:2000"
    out: str = "results/video/audio_visual"
    runs: str = "runs/audio_visual"
    seeds: tuple[int, ...] = (0, 1, 2)
    form: Literal["fused", "distance", "map"] = "map"
    loss: Literal["binary", "infonce"] = "binary"
    negatives: Literal["clips", "times", "both"] = "clips"
    epochs: float = 40


def main(flags: SoundFlags) -> None:
    """Print the correspondence of every seed and the table of the probe, and draw maps of the first seed."""
    # Another second of the same clip needs clips that are longer than a second.
    data, epochs = ("clips:6000?frames=9", 12) if flags.negatives == "clips" else ("clips:2000?frames=24", 36)
    flags = locally(flags, data=data, epochs=epochs, seeds=flags.seeds)
    train, test = splits(flags.data)
    rows = []
    for seed in flags.seeds:
        run = pretrained(_config(flags, seed, train), flags)
        scores = held_out(run, open_or_ingest(test))
        task = "correspondence" if flags.loss == "binary" else "choice of the sound"
        print(f"seed {seed}: {task} {scores['accuracy']:.1%} on held-out clips", flush=True)
        rows.append({"task": task, **_about(flags), "seed": seed, **scores})
        if flags.form == "map":
            rows += probe(run, train, test, probes=("localization",))
            if seed == flags.seeds[0]:
                Folder(flags.out).write("map.png", pictures.png(maps(run, test)))
        Folder(flags.out).write("rows.jsonl", jsonl(rows))
    for found in tables([row for row in rows if "probe" in row]):
        Console().print(found)


def _about(flags: SoundFlags) -> Mapping[str, object]:
    about = {name: getattr(flags, name) for name in ("data", "form", "negatives", "epochs")}
    return {**about, "objective": flags.loss}  # "loss" is its value


def _config(flags: SoundFlags, seed: int, train: str) -> Pretraining:
    return Pretraining(
        train,
        str(Folder(flags.runs) / f"{flags.form}-{flags.loss}-{flags.negatives}-{seed}"),
        "audio_visual",
        flags.epochs,
        batch_size=64,
        workers=flags.run_workers,
        seed=seed,
        # A change of colors would hide what the overtone tells.
        view=ViewConfig(image_size=64, min_scale=0.8, recipe="plain"),
        optim=OptimConfig(name="adamw", lr=0.008, warmup=0.05),
        parts={"audio_visual": Config(form=flags.form, loss=flags.loss, negatives=flags.negatives)},
    )


def maps(run: Run, test: str, count: int = 5) -> Image.Image:
    """Return a grid of the first clips: frame, spectrogram, and map with the box of what sounds and the peak."""
    model: Any = trained_model(Trained(run, run.newest()))
    size = run.config().view.image_size
    offset = cell_offset(model.backbone, size)
    one = next(moments(open_or_ingest(test), size, 1, model.objective.config.window_s))
    frames_bchw, sounds_bchw = one.frames_bchw[:count], one.sounds_bchw[:count]
    with torch.inference_mode():
        map_bhw = model.objective.sound_map(
            model.backbone, frames_bchw[:, None], sounds_bchw[:, None]
        ).float()
    fine_bhw = _over_frame(map_bhw, offset)
    cells = []
    for frame_chw, fine_hw, peak_2, box_4 in zip(
        frames_bchw, fine_bhw, peaks(map_bhw, offset), one.boxes_b24[:, 0], strict=False
    ):
        heat = (fine_hw - fine_hw.min()) / (fine_hw.max() - fine_hw.min()).clamp(min=1e-6)
        plain = pictures.mosaic(frame_chw[None])
        red = Image.new("RGB", plain.size, (255, 40, 0))
        shown = Image.composite(red, plain, Image.fromarray((170 * heat).byte().numpy()).resize(plain.size))
        top, left, height, width = np.asarray(box_4) * plain.width
        y, x = peak_2 * plain.width
        draw = ImageDraw.Draw(shown)
        draw.rectangle((left, top, left + width, top + height), outline=(255, 255, 255), width=2)
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=(255, 255, 0), outline=(0, 0, 0))
        inside = top <= y <= top + height and left <= x <= left + width
        cells.append((shown, f"cosine {float(fine_hw.max()):.2f}, {'in' if inside else 'out'}"))
    plain_cells = [(pictures.mosaic(frame_chw[None]), "") for frame_chw in frames_bchw]
    sound_cells = [(pictures.mosaic(sound_chw[None]), "low pitches below") for sound_chw in sounds_bchw]
    return pictures.grid(
        [
            ("frame", "", plain_cells),
            ("sound", "one second", sound_cells),
            ("map", "white: what sounds; dot: peak", cells),
        ]
    )


def _over_frame(map_bhw: Tensor, offset: float) -> Tensor:
    """Return the map where its places look, resized to the picture."""
    step = 2 / map_bhw.shape[1]
    # From -1 to 1 over the picture; a place is in the middle of its cell for `grid_sample`.
    at_n = (torch.arange(_SIDE) + 0.5) * 2 / _SIDE - 1 + (0.5 - offset) * step
    grid_hw2 = torch.stack(torch.meshgrid(at_n, at_n, indexing="xy"), dim=-1)
    grid_bhw2 = grid_hw2.expand(len(map_bhw), -1, -1, -1)
    return grid_sample(map_bhw[:, None], grid_bhw2, padding_mode="border", align_corners=False)[:, 0]


if __name__ == "__main__":
    command(main, SoundFlags)

"""Learn which sound belongs to a frame, and see where it comes from: Look, Listen and Learn in small.

Command:  python experiments/audio_visual.py --data clips:2000 --out OUT
Hardware: 2 CPU cores, 24 GB, no GPU; 2 Ray Train workers.
Time:     planned: 10 minutes a seed. With --local, on 200 drawn clips: about 2 minutes.
Expect:   correspondence on held-out clips above 90 %, and the peak of the map in the box of the sounding shape in more
          than half of the clips.

Correspondence is the mean of the accuracies of right and wrong pairs (Arandjelovic and Zisserman 2017 and 2018); the
wrong sounds are those of the other clips of a batch. The probe `localisation` scores the map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rich.console import Console

from raysl.backbone.network import BackboneConfig
from raysl.config import Pretraining, ViewConfig
from raysl.evaluation.evaluate import probe
from raysl.evaluation.results import tables
from raysl.experiment.held_out import held_out
from raysl.experiment.script import Flags, command, locally
from raysl.ingestion import resolve, splits
from raysl.objectives.audio_visual import Config
from raysl.optim import OptimConfig
from raysl.run import jsonl
from raysl.storage import Folder
from raysl.training.launch import pretrain


@dataclass(frozen=True)
class SoundFlags(Flags):
    """Learn correspondence, once for each seed, and score it on other clips.

    Args:
        form: how frame and sound are compared; only "map" says where the sound comes from.
        negatives: where wrong sounds come from.
        epochs: visits to every clip.
    """

    data: str = "clips:2000"
    out: str = "results/video/audio_visual"
    runs: str = "runs/audio_visual"
    seeds: tuple[int, ...] = (0, 1, 2)
    form: Literal["fused", "distance", "map"] = "map"
    negatives: Literal["clips", "times", "both"] = "clips"
    epochs: float = 40


def main(flags: SoundFlags) -> None:
    """Print the correspondence of every seed and the table of the probe."""
    flags = locally(flags, data="clips:200", epochs=4)
    train, test = splits(flags.data)
    rows = []
    for seed in flags.seeds:
        config = Pretraining(
            train,
            str(Folder(flags.runs) / f"{flags.form}-{flags.negatives}-{seed}"),
            "audio_visual",
            flags.epochs,
            batch_size=64,
            workers=flags.workers,
            seed=seed,
            # A change of colors would hide what the overtone tells.
            view=ViewConfig(image_size=64, min_scale=0.8, recipe="plain"),
            backbone=BackboneConfig(norm="group"),
            optim=OptimConfig(name="adamw", lr=0.008, warmup=0.05),
            parts={"audio_visual": Config(form=flags.form, negatives=flags.negatives)},
        )
        run = pretrain(config)
        scores = held_out(run, resolve(test))
        print(f"seed {seed}: correspondence {scores['accuracy']:.1%} on held-out clips", flush=True)
        rows.append({"task": "correspondence", "method": run.config().method, "seed": seed, **scores})
        if flags.form == "map":
            rows += probe(run, train, test, probes=("localisation",))
        Folder(flags.out).write("rows.jsonl", jsonl(rows))
    for found in tables([row for row in rows if "probe" in row]):
        Console().print(found)


if __name__ == "__main__":
    command(main, SoundFlags)

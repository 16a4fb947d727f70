"""Measure the claims of the lectures: run the other experiments, and judge each claim by its rows.

Command:  python experiments/reproduce_lectures.py --data DATA --other DATA2 --detection VOC --out OUT --runs RUNS
Hardware: 2 CPU cores, 24 GB, no GPU.
Time:     about 7 hours for each data set with 3 seeds and --workers 0, by the times of the parts. With --local: about
          half an hour, on drawn images.
Expect:   OUT/README.md, "The lectures, measured": a verdict for each claim and data set, by a 95 % interval over seeds.
          At this size most claims about a few points cannot be told; see results/lectures.

Run it from a checkout: it imports the other experiments. Finished runs, probes and trials in RUNS are not repeated, so
the same command resumes after an interruption. `--only` names experiments; rows of others are taken as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import clusterfit_label_noise
import detection
import invariance_vs_performance
import multitask
import per_layer
import saturation
import semi_supervised
import sweep_pirl
import uncurated
import which_transforms

from raysl import plugins
from raysl.checkpoint import newest_step
from raysl.evaluation.results import protocol_hash, rows_of
from raysl.experiment import lectures
from raysl.experiment.claims import CLAIMS
from raysl.experiment.comparison import ComparisonFlags, folder_of, measured, run_of
from raysl.experiment.script import command
from raysl.extraction import FeatureProtocol
from raysl.ingestion import open_or_ingest, splits
from raysl.probes import REESTIMATED
from raysl.probes.detection import Config as Detection
from raysl.probes.invariance import Config as Invariance
from raysl.probes.linear import Config as Linear
from raysl.run import Run, jsonl
from raysl.storage import Folder

COMPARED = ("predict-jigsaw", "pirl-jigsaw", "predict-rotation", "pirl-rotation", "pirl-rotation+jigsaw")
WIDTHS = ("narrow", "usual")
# Invariance to the jigsaw of 2 x 2 patches, which PIRL learns from here.
OWN_JIGSAW = Invariance(grid=2)
# Augmentations that SimCLR goes without, one at a time.
LEFT_OUT = ("crops", "jitter")
# Share of the images that a short run sees, for the claim about saturation.
SHORT = 0.1


@dataclass(frozen=True)
class LectureFlags(ComparisonFlags):
    """Run the experiments behind every claim, on one or two data sets, and write the page.

    Args:
        other: a second data set, on which the claims are measured too, and whose images are the uncurated ones.
        detection: folder with boxes in the layout of PASCAL VOC; empty to leave detection out.
        only: names of experiments to run; empty for all. See EXPERIMENTS.
    """

    data: str = "shapes:20000"
    out: str = "results/lectures"
    runs: str = "runs/lectures"
    seeds: tuple[int, ...] = (0, 1, 2)
    other: str = ""
    detection: str = ""
    only: tuple[str, ...] = ()


def _common(flags: LectureFlags, kind: type[Any], **more: Any) -> Any:
    """Return the flags of another experiment on the same runs."""
    shared = ("data", "runs", "seeds", "workers", "images", "batch_size", "image_size", "teacher", "clusters")
    own = {name: getattr(flags, name) for name in shared if hasattr(kind(), name)}
    return kind(**own, **more)


def _compare(flags: LectureFlags, out: str) -> None:
    """Measure kNN and the converged linear probe of the methods that several claims compare, and short runs."""
    short = replace(
        flags, images=max(flags.batch_size, round(SHORT * flags.images)), runs=f"{flags.runs}/short"
    )
    for one, methods in ((flags, (*COMPARED, "clusterfit")), (short, ("pirl-jigsaw",))):
        runs = [run_of(one, method, seed) for method in methods for seed in flags.seeds]
        measured(runs, one, ["knn", "linear"])


def _invariance(flags: LectureFlags, out: str) -> None:
    """Measure the invariance to the jigsaw that predict-jigsaw learned from, and to that of PIRL."""
    for config in (Invariance(), OWN_JIGSAW):
        invariance_vs_performance.main(
            _common(flags, invariance_vs_performance.ScatterFlags, out=out, invariance=config)
        )


def _transforms(flags: LectureFlags, out: str) -> None:
    given = _common(flags, which_transforms.TransformFlags, out=out)
    given = replace(given, runs=f"{flags.runs}/transforms")
    runs = [
        which_transforms.run_of(given, "simclr", left_out, seed)
        for left_out in ("", *LEFT_OUT)
        for seed in flags.seeds
    ]
    measured(runs, given, ["knn"])


def _saturation(flags: LectureFlags, out: str) -> None:
    given = _common(flags, saturation.SaturationFlags, out=out)
    few, every = _sizes(flags)
    # The smallest size limits the number of negatives of all runs.
    given = replace(given, runs=f"{flags.runs}/saturation", sizes=(few, every))
    runs = [
        saturation.run_of(given, "pirl-jigsaw", width, size, seed)
        for width, size in (("usual", every), ("usual", few), ("narrow", every))
        for seed in flags.seeds
    ]
    measured(runs, given, ["knn"])


def _sweep(figure: Any, values: tuple[float, ...]) -> Callable[[LectureFlags, str], None]:
    def run(flags: LectureFlags, out: str) -> None:
        images = min(8000, open_or_ingest(splits(flags.data)[0]).num_images)
        fitting = tuple(value for value in values if figure != "negatives" or value < images)
        given = _common(flags, sweep_pirl.SweepFlags, out=out, figure=figure, values=fitting)
        # Two runs of one thread are faster on two cores than one of two.
        given = replace(given, workers=1, max_concurrent=2, share_stream=False)
        sweep_pirl.main(
            replace(given, runs=f"{flags.runs}/sweep", images=images, epochs=flags.images / images)
        )

    return run


def _noise(flags: LectureFlags, out: str) -> None:
    given = _common(flags, clusterfit_label_noise.NoiseFlags, out=out, k=flags.clusters)
    # The networks see the images of half of the classes.
    epochs = flags.images / open_or_ingest(splits(flags.data)[0]).num_images
    clusterfit_label_noise.main(replace(given, runs=f"{flags.runs}/noise", noises=(0.0, 0.75), epochs=epochs))


def _uncurated(flags: LectureFlags, out: str) -> None:
    uncurated.main(_common(flags, uncurated.SourceFlags, out=out, source=flags.other or "shapes:20000"))


def _detection(flags: LectureFlags, out: str) -> None:
    if flags.detection:
        # The default protocol, 40 epochs of sides of 480 to 800 pixels, takes hours for each run without a GPU.
        config = Detection(data=flags.detection, epochs=12, batch_size=8, sides=(128,), width=64)
        methods = ("pirl-jigsaw",)
        detection.main(_common(flags, detection.DetectionFlags, out=out, methods=methods, detection=config))


EXPERIMENTS: dict[str, Callable[[LectureFlags, str], None]] = {
    "compare": _compare,
    "per_layer": lambda flags, out: per_layer.main(
        _common(flags, per_layer.LayerFlags, out=out, methods=COMPARED[:2])
    ),
    "invariance": _invariance,
    "few_labels": lambda flags, out: semi_supervised.main(
        _common(flags, semi_supervised.LabelFlags, out=out, methods=COMPARED[:2])
    ),
    "two_tasks": lambda flags, out: multitask.main(_common(flags, multitask.TaskFlags, out=out)),
    "uncurated": _uncurated,
    "lambda": _sweep("lambda", (0, 0.5, 1)),
    "negatives": _sweep("negatives", (64, 4096)),
    "permutations": _sweep("permutations", (1, 362_880)),
    "label_noise": _noise,
    "transforms": _transforms,
    "saturation": _saturation,
    "detection": _detection,
}


def main(flags: LectureFlags) -> None:
    """Run the experiments of every data set; write rows and the page after each of them."""
    if flags.local:
        flags = replace(
            flags, images=1280, data="shapes:2000" if flags.data == LectureFlags().data else flags.data
        )
    sets = {
        data.rstrip("/").rpartition("/")[2].replace(":", "-"): data
        for data in (flags.data, flags.other)
        if data
    }
    for name, data in sets.items():
        others = [one for one in sets.values() if one != data]
        own = replace(
            flags, data=data, other=others[0] if others else "", runs=str(Folder(flags.runs) / name)
        )
        for experiment in flags.only or EXPERIMENTS:
            print(f"{name}: {experiment}", flush=True)
            out = Folder(flags.out) / name / experiment
            EXPERIMENTS[experiment](own, str(out))
            (Folder(flags.out) / name).write("rows.jsonl", jsonl(rows(own, Folder(flags.out) / name)))
            Folder(flags.out).write("README.md", page(flags, list(sets)).encode())


def rows(flags: LectureFlags, out: Folder) -> list[dict[str, Any]]:
    """Return the rows of all runs and sweeps of a data set, with the labels that the claims use."""
    train, test = splits(flags.data)
    judged = open_or_ingest(test).manifest.fingerprint
    found: list[dict[str, Any]] = []
    for place, methods in _places(flags).items():
        for method in methods:
            for seed in flags.seeds:
                run = Run.find(folder_of(flags, method, seed, train, Folder(f"{flags.runs}/{place}")))
                group = f"{place}/" if place else ""
                for size, name in zip(_sizes(flags), ("few", "all"), strict=True):
                    group = group.replace(f"-{size}/", f"-{name}/")
                # A run that another process trains may have no checkpoint yet.
                steps = (0, newest_step(run.checkpoints)) if run else ()
                for row in rows_of(run) if run else ():
                    if row["test"] in (judged, "") and row["step"] in steps:
                        names = {"trained": method, "random": "untrained", "pixels": "raw pixels"}
                        found.append({**row, "label": group + names[row["encoder"]]})
    for name in ("lambda", "negatives", "permutations", "label_noise"):
        if (out / name).exists("rows.jsonl"):
            found += read(out / name)
    return found


def _places(flags: LectureFlags) -> dict[str, tuple[str, ...]]:
    """Return the methods of the runs in each folder of the runs."""
    few, every = _sizes(flags)
    return {
        "": (*COMPARED, "clusterfit", *multitask.TaskFlags().methods),
        "uncurated": COMPARED[:2],
        "short": ("pirl-jigsaw",),
        **{f"transforms/{name}": ("simclr",) for name in ("all", *(f"without-{one}" for one in LEFT_OUT))},
        **{f"saturation/{width}-{size}": ("pirl-jigsaw",) for width in WIDTHS for size in (few, every)},
    }


def _sizes(flags: LectureFlags) -> tuple[int, int]:
    """Return a fifth of the number of images, and all."""
    num_images = open_or_ingest(splits(flags.data)[0]).num_images
    return num_images // 5, num_images


def read(folder: Folder) -> list[dict[str, Any]]:
    """Return the rows of the file rows.jsonl in a folder."""
    return [json.loads(line) for line in folder.read("rows.jsonl").splitlines()]


def page(flags: LectureFlags, sets: list[str]) -> str:
    """Return the page of verdicts."""
    protocol = FeatureProtocol(flags.image_size)
    fast = protocol_hash("linear", Linear(schedule="fast"), protocol, REESTIMATED)
    own_jigsaw = protocol_hash("invariance", OWN_JIGSAW, protocol, REESTIMATED)
    found = {
        name: lectures.observations(read(Folder(flags.out) / name), (fast,), (own_jigsaw,))
        for name in sets
        if (Folder(flags.out) / name).exists("rows.jsonl")
    }
    return (
        "# The lectures, measured\n\n"
        f"Each run sees {flags.images:,} images of {flags.image_size} pixels; seeds "
        f"{', '.join(map(str, flags.seeds))}. The rule of the verdicts is in raysl/experiment/lectures.py.\n\n"
        f"{lectures.page(CLAIMS, found)}\n"
    )


if __name__ == "__main__":
    # Before Ray starts: its processes build the backbones of that file too.
    plugins.trust(plugins.remembered(saturation.__file__))
    command(main, LectureFlags)

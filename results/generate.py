"""Write the tables and numbers that Markdown files take from rows, and check that they agree.

    python results/generate.py          # write them
    python results/generate.py --check  # exit with 1 and name the files that differ

A part of a Markdown file between `<!-- numbers: NAME -->` and `<!-- end -->` is made by the function of that name in
TABLES or VALUES. In a table, ± is half the difference of two seeds, or the standard deviation of more.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from scipy.stats import spearmanr

from raysl.experiment.claims import CLAIMS
from raysl.experiment.lectures import Contrast, Measured, Term, observations, page

ROOT = Path(__file__).parents[1]
FILES = sorted({ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("results/**/*.md")})
_PART = re.compile(r"(<!-- numbers: ([\w-]+) -->)(.*?)(<!-- end -->)", re.DOTALL)

Row = Mapping[str, Any]
KNN = {"probe": "knn", "name": "top1/k=20,T=0.07", "layer": "pooled"}
OPTIMUM = {"probe": "linear", "name": "top1", "layer": "pooled", "protocol": "45ee934dccc5"}
FAST = {"probe": "linear", "name": "top1", "protocol": "a3561de13ca9"}
# The same schedules of the linear probe in their later versions, of results/lectures.
FAST_LATER = ("76e3dbca767a", "f182d6a9372f")
OPTIMUM_LATER = {**OPTIMUM, "protocol": "4a65eaba0798"}
# Invariance to a jigsaw of 2 x 2 patches.
OWN_JIGSAW = "8ac9b023d04b"
CLOSER = {"probe": "invariance", "layer": "pooled"}
LAYERS = ("conv1", "res2", "res3", "res4", "pooled")
LONG = "evaluation/tiny-imagenet-20-long"


@cache
def rows_of(name: str) -> tuple[Row, ...]:
    """Return the rows of a file under results/; lines that hold a checksum are left out."""
    return tuple(row for row in lines_of(name) if "value" in row or "score" in row)


def lines_of(name: str) -> list[Row]:
    """Return the lines of a JSON Lines file under results/."""
    return [json.loads(line) for line in (ROOT / "results" / name).read_text().splitlines()]


def values(file: str, **wanted: Any) -> list[float]:
    """Return the values of the rows that have these fields, one for each seed.

    Raises:
        LookupError: there is no such row, or a seed has two values.
    """
    found: dict[Any, set[float]] = {}
    for row in rows_of(file):
        if all(row.get(key) == value for key, value in wanted.items()):
            found.setdefault(row["seed"], set()).add(row["value"])
    if not found or any(len(of_seed) > 1 for of_seed in found.values()):
        raise LookupError(f"{file} has {found or 'no row'} for {wanted}")
    return [of_seed.pop() for of_seed in found.values()]


def percent(of: Sequence[float], unit: str = "", spread: bool = True) -> str:
    """Return the mean of shares in percent, and their spread if there are several."""
    around = abs(of[0] - of[1]) / 2 if len(of) == 2 else stdev(of) if len(of) > 2 else 0
    plus = f" ± {_tenths(around)}" if spread and len(of) > 1 else ""
    return f"{_tenths(mean(of))}{plus}{unit}"


def _tenths(share: float, sign: str = "") -> str:
    """Return a share in percent; 31.65 becomes 31.7, although its binary form is a little less."""
    return f"{100 * share + (1e-9 if share >= 0 else -1e-9):{sign}.1f}"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, with an empty line before and after it."""
    rule = f"|{'---|' * len(head)}"
    texts = [f"| {' | '.join(cells)} |".replace("  ", " ") for cells in (head, *lines)]
    return "\n\n" + "\n".join([texts[0], rule, *texts[1:]]) + "\n\n"


def _headline() -> str:
    names = {
        "pirl-jigsaw": "PIRL with Jigsaw (pirl-jigsaw)",
        "pirl-rotation": "PIRL with Rotation (pirl-rotation)",
        "clusterfit": "ClusterFit, with predict-jigsaw as teacher",
        "transforms/all/simclr": "SimCLR (simclr)",
        "untrained": "untrained network",
        "predict-jigsaw": "Jigsaw, predicting the permutation (predict-jigsaw)",
        "predict-rotation": "Rotation, predicting the angle (predict-rotation)",
    }
    file = "lectures/tiny-imagenet-20.jsonl"
    cells = [
        [title, *(percent(values(file, label=label, **probe), " %") for probe in (KNN, OPTIMUM_LATER))]
        for label, title in names.items()
    ]
    # Raw pixels are the same for each seed and each number of steps.
    pixels = values(f"{LONG}/rows.jsonl", label="raw pixels", **KNN)[:1]
    cells.insert(4, ["raw pixels", percent(pixels, " %"), "not measured"])
    return table(["features", "kNN top-1", "linear probe top-1"], cells)


def _layers() -> str:
    labels = ("untrained", "predict-jigsaw", "predict-rotation", "pirl-jigsaw", "clusterfit", "supervised")
    lines = [
        [
            label,
            *(percent(values(f"{LONG}/rows.jsonl", label=label, layer=layer, **FAST)) for layer in LAYERS),
        ]
        for label in labels
    ]
    return table(["method", *LAYERS], lines)


def _closer() -> str:
    labels = ("untrained", "predict-jigsaw", "predict-rotation", "pirl-jigsaw", "clusterfit", "supervised")
    kinds = ("closer/jigsaw", "closer/rotation", "closer/colorization", "closer/inpainting", "closer")
    file = f"{LONG}/rows.jsonl"
    lines = [
        [label, *(percent(values(file, label=label, name=kind, **CLOSER)) for kind in kinds)]
        for label in labels
    ]
    heads = percent(
        values(file, label="pirl-jigsaw", name="closer/jigsaw", probe="invariance", layer="heads")
    )
    lines.insert(4, ["pirl-jigsaw, its heads", heads, "", "", "", ""])
    return table(["method", "jigsaw", "rotation", "colors", "holes", "mean"], lines)


def _worth() -> str:
    names = {
        "predict-jigsaw": "predict-jigsaw",
        "clusterfit": "ClusterFit of predict-jigsaw",
        "pirl-jigsaw": "pirl-jigsaw",
        "predict-rotation": "predict-rotation",
        "untrained": "untrained",
        "supervised": "supervised",
    }
    file = f"{LONG}/rows.jsonl"
    lines = [
        [
            title,
            percent(values(file, label=label, **KNN), spread=False),
            percent(values(file, label=label, **OPTIMUM)),
            percent(values(file, label=label, name="closer", **CLOSER), spread=False),
        ]
        for label, title in names.items()
    ]
    return table(["pooled features", "kNN", "linear, converged", "invariance"], lines)


def _methods(folder: str) -> str:
    """Return the table of all methods, in the order of kNN, with the gains over the untrained backbone."""
    file = f"methods/{folder}/rows.jsonl"
    methods = dict.fromkeys(row["method"] for row in rows_of(file))
    lines, untrained = [], []
    for method in methods:
        cells, gains = [], []
        for name, metric in (("knn", "top1/k=20,T=0.07"), ("linear", "top1")):
            seen, start = (
                values(file, method=method, probe=name, name=metric, encoder=encoder)
                for encoder in ("trained", "random")
            )
            cells.append(_by_seed(seen))
            gains.append(_tenths(mean(seen) - mean(start), "+"))
            if method == "pirl-jigsaw":
                untrained.append(_by_seed(start))
        lines.append(
            (mean(values(file, method=method, **KNN, encoder="trained")), [method, *cells, ", ".join(gains)])
        )
    head = ["method", "kNN", "linear", "above its untrained backbone: kNN, linear"]
    best_first = [cells for _, cells in sorted(lines, key=lambda line: -line[0])]
    return table(head, [*best_first, ["untrained", *untrained, ""]])


def _by_seed(of: Sequence[float]) -> str:
    return f"{_tenths(mean(of))} ({', '.join(map(_tenths, of))})"


def _lectures() -> str:
    """Return the page of the lectures' claims, by data set."""
    found = {
        data: observations(
            [*rows_of(f"lectures/{folder}.jsonl"), *rows_of(f"lectures/{folder}-sweeps.jsonl")],
            (FAST["protocol"], *FAST_LATER),
            (OWN_JIGSAW,),
        )
        for data, folder in (("CIFAR-10", "cifar10"), ("Tiny ImageNet", "tiny-imagenet-20"))
    }
    return f"\n\n{page(CLAIMS, found)}\n\n"


def _maps() -> str:
    """Return the table of the probes of clips: the mean over seeds with its 95 % interval, and that of the gain."""
    lines = []
    for title, scale, wanted in (
        ("key points: PCK at 0.1, %", 100, {"probe": "keypoints", "name": "PCK@0.1"}),
        ("key points: PCK at 0.2, %", 100, {"probe": "keypoints", "name": "PCK@0.2"}),
        ("normals: within 11.25 degrees, %", 100, {"probe": "normals", "name": "within/11.25"}),
        ("normals: mean angle, degrees", 1, {"probe": "normals", "name": "mean_angle"}),
        ("normals: median angle, degrees", 1, {"probe": "normals", "name": "median_angle"}),
        ("actions: top-1, %", 100, {"probe": "video", "name": "top1"}),
        ("nearest frames: same action, %", 100, {"probe": "patches", "name": "precision/k=5"}),
        ("nearest frames: distance of poses, %", 100, {"probe": "patches", "name": "pose_distance"}),
    ):
        simclr, untrained = (
            values("probes/maps.jsonl", method=name, **wanted) for name in ("simclr", "untrained")
        )
        gain = [one - other for one, other in zip(simclr, untrained, strict=True)]
        lines.append([title, *(_interval(of, scale) for of in (untrained, simclr, gain))])
    return table(["measure", "untrained", "SimCLR", "gain of SimCLR, same seed"], lines)


def _video(task: str, gains: bool = False) -> str:
    """Return the table of a task on drawn clips: each label in percent, by seed, and its gain over "untrained"."""
    rows = [row for row in rows_of("video/rows.jsonl") if row["task"] == task]
    of = {
        label: {row["seed"]: row["value"] for row in rows if row["label"] == label}
        for label in dict.fromkeys(row["label"] for row in rows)
    }
    lines = []
    for label, by_seed in of.items():
        mean_of = _interval(list(by_seed.values()), 100) if len(by_seed) == 3 else ""
        cells = [label, ", ".join(_tenths(value) for value in by_seed.values()), mean_of]
        if gains:
            # A label may end with a layer, and is compared at the same one.
            base = of.get("untrained" + label[label.index(",") :] if "," in label else "untrained", by_seed)
            gain = [value - base[seed] for seed, value in by_seed.items()]
            cells.append(_interval(gain, 100) if base is not by_seed and len(gain) == 3 else "")
        lines.append(cells)
    head = ["features", "by seed, %", "mean and 95 % interval"]
    return table([*head, "gain over untrained"] if gains else head, lines)


def _interval(of: Sequence[float], scale: float) -> str:
    """Return the mean of three seeds and half the width of its 95 % interval by Student's t."""
    half = 4.303 * stdev(of) / math.sqrt(3)
    return f"{scale * mean(of):.1f} ± {scale * half:.1f}"


def _recipes(stage: str) -> str:
    """Return the table of a stage of the search for a recipe: the last step of every run, best first."""
    file = f"recipes/{stage}.jsonl"
    measured = stage in ("search", "compare")  # the other stages plan a CPU time, the same for each run
    lines = []
    for label in dict.fromkeys(row["label"] for row in rows_of(file)):
        runs = [row for row in rows_of(file) if row["label"] == label and row["probe"] == "knn"]
        last = {row["seed"]: row for row in sorted(runs, key=lambda row: row["step"])}
        of = [last[seed]["value"] for seed in sorted(last)]
        cpu_s, images = (mean(row[name] for row in last.values()) for name in ("cpu_s", "images"))
        spent = [f"{cpu_s:.0f}", f"{images:,.0f}"] if images else ["", ""]
        spent = spent if measured else spent[1:]
        title = label.replace("as before", "grid 3, bank momentum 0.5")
        lines.append((mean(of), [title, *spent, percent(of), ", ".join(map(_tenths, of))]))
    head = ["features", *(["CPU seconds"] if measured else []), "images seen", "kNN top-1, %", "by seed"]
    return table(head, [cells for _, cells in sorted(lines, key=lambda line: -line[0])])


# The recipe that "chosen" names, in the fields that the sweep varies.
CHOSEN = {
    "jigsaw.grid": 2,
    "bank.momentum": 0.0,
    "pirl.temperature": 0.2,
    "pirl.lam": 0.5,
    "pirl.head": "bn",
    "optim.lr": 0.12,
    "optim.warmup": 0.05,
    "view.min_scale": 0.2,
    "view.recipe": "pirl",
    "pirl.num_negatives": 1024,
}


def _swept() -> str:
    """Return the trials of the search on Ray Tune that came to their end, and the recipe to compare with."""
    of_sweep = [row for row in lines_of("recipes/sweep/rows.jsonl") if row["state"] == "finished"]
    (chosen,) = lines_of("recipes/sweep/chosen.jsonl")
    tests = lines_of("recipes/sweep/test.jsonl")
    lines = []
    for row in [*of_sweep, {**chosen, "trial": "chosen", "values": CHOSEN}]:
        name = "swept" if row is of_sweep[0] else row["trial"]
        on_test = [test["score"] for test in tests if (test["trial"], test["encoder"]) == (name, "trained")]
        fields = [
            f"{value:g}" if isinstance(value, float) else str(value) for value in row["values"].values()
        ]
        scores = [percent(list(row["seeds"].values())), percent(on_test) if on_test else ""]
        lines.append((row["score"], [str(row["trial"]), *fields, *scores]))
    for encoder, title in (("pixels", "raw pixels"), ("random", "untrained")):
        of = [test["score"] for test in tests if (test["trial"], test["encoder"]) == ("swept", encoder)]
        lines.append(
            (0.0, [title, *[""] * (len(CHOSEN) + 1), percent(of if encoder == "random" else of[:1])])
        )
    head = ["trial", *(name.rpartition(".")[2].replace("_", " ") for name in CHOSEN)]
    head += ["kNN, validation images, %", "kNN, test images, %"]
    return table(head, [cells for _, cells in sorted(lines, key=lambda line: -line[0])])


def _gain() -> str:
    """Return the gain of the chosen recipe over the one before, with the 95 % interval of pairs of a seed."""
    last = [
        row for row in rows_of("recipes/compare.jsonl") if row["probe"] == "knn" and row["step"] in (200, 270)
    ]
    by_seed: dict[int, dict[str, float]] = {}
    for row in last:
        by_seed.setdefault(row["seed"], {})[row["label"]] = row["value"]
    new, old = "pirl-jigsaw, grid 2, bank momentum 0", "pirl-jigsaw, as before"
    gains = tuple(one[new] - one[old] for one in by_seed.values() if {new, old} <= one.keys())
    low, high = Measured(Contrast("", (Term(new, "knn"),)), gains).interval() or (0.0, 0.0)
    return f"{_tenths(mean(gains), '+')} ({_tenths(low, '+')} to {_tenths(high, '+')})"


def _rank() -> str:
    """Return the rank correlation of measures that need no labels with kNN, over the trained runs of both stages."""
    runs: dict[tuple[Any, ...], dict[str, float]] = {}
    for stage in ("search", "compare"):
        for row in rows_of(f"recipes/{stage}.jsonl"):
            if row["step"]:
                key = (stage, row["label"], row["seed"], row["step"])
                runs.setdefault(key, {})["knn" if row["probe"] == "knn" else row["name"]] = row["value"]
    whole = [run for run in runs.values() if "rankme" in run]
    lines = []
    for name in ("rankme", "effective_rank", "alpha_req", "uniformity", "spread"):
        rho = spearmanr([run[name] for run in whole], [run["knn"] for run in whole])
        lines.append([name, f"{rho.statistic:+.2f}", f"{rho.pvalue:.3f}", str(len(whole))])
    return table(["measure", "Spearman's rank correlation with kNN", "p", "trained networks"], lines)


# What is compared: the arm of raysl, the other arm, and what is measured.
COMPARED = {
    "start": (
        ("raysl --local", "plain torch, one loader process", "cpu_s"),
        ("raysl, 1 worker", "TorchTrainer with an empty loop", "cpu_s"),
        ("raysl, 1 worker", "TorchTrainer with an empty loop", "wall_s"),
        ("raysl, 2 workers", "torchrun, 2 workers with a loader each", "cpu_s"),
        ("raysl, second run of a process", "raysl, 1 worker", "wall_s"),
    ),
    "stream": tuple(
        (own, other, "cpu_ms")
        for own in ("raysl on Ray Data", "raysl --local")
        for other in (
            "torch DataLoader with raysl's kernels",
            "Hugging Face datasets, DataLoader, raysl's kernels",
            "WebDataset, DataLoader, raysl's kernels",
            "LitData, its loader, raysl's kernels",
        )
    ),
    "more-loaders": (
        ("raysl on Ray Data", "MosaicML Streaming, DataLoader, raysl's kernels", "cpu_ms"),
        ("raysl --local", "MosaicML Streaming, DataLoader, raysl's kernels", "cpu_ms"),
        ("Grain, its loader, raysl's kernels", "torch DataLoader with raysl's kernels", "cpu_ms"),
        ("raysl --local", "DALI on the CPU, its own kernels", "cpu_ms"),
        ("torch DataLoader with raysl's kernels", "DALI on the CPU, its own kernels", "cpu_ms"),
    ),
}


def _ratio(rows: Sequence[Row], own: str, other: str, measure: str, side: int | None = None) -> str:
    """Return the median of the ratios of two programs in the same round, with their range."""
    rows = [row for row in rows if row.get("side") == side]
    found = {(row["arm"], row["round"]): row[measure] for row in rows if measure in row}
    ratios = [
        value / found[other, number]
        for (arm, number), value in found.items()
        if arm == own and (other, number) in found
    ]
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _start() -> str:
    """Return the ratios of the first step."""
    rows = [row for row in lines_of("bench/speed.jsonl") if row["part"] == "start"]
    names = {"cpu_s": "CPU time", "wall_s": "wall time"}
    lines = [
        [own, other, names[measure], _ratio(rows, own, other, measure)]
        for own, other, measure in COMPARED["start"]
    ]
    return table(["program", "compared with", "measure", "ratio"], lines)


def _more_loaders() -> str:
    """Return the ratios of more loaders: a row for each pair of programs, a column for each size."""
    rows = lines_of("bench/more-loaders.jsonl")
    sides = sorted({row["side"] for row in rows})
    lines = [
        [own, other, *(_ratio(rows, own, other, measure, side) for side in sides)]
        for own, other, measure in COMPARED["more-loaders"]
    ]
    return table(["program", "compared with", *(f"{side} pixels" for side in sides)], lines)


def _seconds() -> str:
    """Return how long programs take to the end of their first step, by the newest rounds on one machine."""
    rows = lines_of("bench/start-30-november-evening.jsonl")
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        of = [row for row in rows if row["arm"] == arm]
        cells = []
        for name in ("wall_s", "cpu_s", "memory_gb"):
            values_of = [row[name] for row in of if name in row]
            cells.append(
                f"{median(values_of):.1f} ({min(values_of):.1f} to {max(values_of):.1f})" if values_of else ""
            )
        lines.append([arm, *cells])
    return table(["program", "seconds", "CPU seconds", "memory, GB"], lines)


def _stream() -> str:
    """Return the ratios of the stream: a row for each way of raysl and size, a column for each loader."""
    rows = [row for row in lines_of("bench/speed.jsonl") if row["part"] == "stream"]
    owns, others = (list(dict.fromkeys(pair[at] for pair in COMPARED["stream"])) for at in (0, 1))
    lines = [
        [own, f"{side} pixels", *(_ratio(rows, own, other, "cpu_ms", side) for other in others)]
        for own in owns
        for side in sorted({row["side"] for row in rows})
    ]
    titles = (other.partition(",")[0].removesuffix(" with raysl's kernels") for other in others)
    return table(["program", "views", *titles], lines)


TABLES: dict[str, Callable[[], str]] = {
    "bench-seconds": _seconds,
    "bench-start": _start,
    "bench-stream": _stream,
    "bench-more-loaders": _more_loaders,
    "headline": _headline,
    "long-layers": _layers,
    "long-closer": _closer,
    "long-worth": _worth,
    "methods-cifar10": lambda: _methods("cifar10"),
    "lectures": _lectures,
    "maps": _maps,
    "recipes-compare": lambda: _recipes("compare"),
    "recipes-rank": _rank,
    "recipes-search": lambda: _recipes("search"),
    "recipes-search-more": lambda: _recipes("search-more"),
    "recipes-search-optimisers": lambda: _recipes("search-optimisers"),
    "recipes-search-tiny": lambda: _recipes("search-tiny"),
    "recipes-sweep": _swept,
    "recipes-ten": lambda: _recipes("ten"),
    "recipes-thirty": lambda: _recipes("thirty"),
    "video-audio": lambda: _video("audio_visual"),
    "video-infonce": lambda: _video("audio_visual_infonce"),
    "video-keypoints": lambda: _video("keypoints", gains=True),
    "video-order": lambda: _video("frame_order"),
    "video-tracking": lambda: _video("tracking", gains=True),
    "methods-tiny": lambda: _methods("tiny-imagenet-20"),
}
VALUES: dict[str, Callable[[], str]] = {
    "recipes-gain": _gain,
    "recipes-half-hour": lambda: percent(values("recipes/thirty.jsonl", **{**KNN, "step": 11671}), " %"),
    "sweep-next-trial": lambda: f"{lines_of('sweep/overhead.jsonl')[-1]['next_trial_s']} s",
    "headline-pixels": lambda: percent(values(f"{LONG}/rows.jsonl", label="raw pixels", **KNN)[:1], " %"),
}


def written(text: str) -> str:
    """Return a Markdown text with all its parts made from the rows.

    Raises:
        KeyError: a part has an unknown name.
        ValueError: a part has no end, or its marker is broken over two lines.
    """
    if text.count("<!-- numbers:") != len(_PART.findall(text)):
        raise ValueError("A marker of numbers has no end, or is not on one line.")
    makers = {**TABLES, **VALUES}
    return _PART.sub(lambda part: f"{part[1]}{makers[part[2]]()}{part[4]}", text)


def main(check: bool) -> int:
    """Write the files, or with `check` name those that differ and return 1."""
    differ = [file for file in FILES if written(file.read_text()) != file.read_text()]
    for file in differ:
        print(file.relative_to(ROOT))
        if not check:
            file.write_text(written(file.read_text()))
    return int(check and bool(differ))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))

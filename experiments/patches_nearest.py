"""Draw the nearest patches, or the nearest frames, in the features of several methods.

Command:  python experiments/patches_nearest.py --data DATA --runs RUNS --out OUT
          python experiments/patches_nearest.py --data clips:2000 --of frames --methods predict-frame_order --out OUT
Hardware: 2 CPU cores, 24 GB, no GPU; 2 Ray Train workers.
Time:     2 to 4 minutes for each missing run, a minute for a probe. With --local: two to three minutes.
Expect:   patches by color and texture for an untrained network, by part of the object for relative position; frames by
          pose for frame order.

Doersch, Gupta and Efros 2015, figure 4; Misra, Zitnick and Hebert 2016: the lectures' figures 4 and 9. The picture is
nearest.png; the numbers are those of the probe `patches`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from PIL import Image

from raysl import extraction, rng
from raysl.experiment.comparison import ComparisonFlags, measured, reported, small, trained
from raysl.experiment.script import command
from raysl.extraction import Encoder
from raysl.ingestion import open_or_ingest, splits
from raysl.probes import patches
from raysl.probes._images import features
from raysl.probes.retrieval import nearest
from raysl.reporting import pictures
from raysl.reporting.retrieval_grid import side_by_side
from raysl.storage import Folder


@dataclass(frozen=True)
class NearestFlags(ComparisonFlags):
    """Pretrain missing runs, score the nearest patches, and draw those of a few.

    Args:
        of: "patches" of images, or "frames" of clips.
        count: number of queries that are drawn.
        k: number of neighbors of each.
    """

    out: str = "results/patches_nearest"
    methods: tuple[str, ...] = ("predict-relative_position", "supervised")
    of: Literal["patches", "frames"] = "patches"
    count: int = 6
    k: int = 4


def main(flags: NearestFlags) -> None:
    """Print the table, and write the report and the picture."""
    flags = small(flags, "clips:300" if flags.of == "frames" else "shapes:5000")
    if flags.of == "frames":
        flags = replace(flags, image_size=max(flags.image_size, 64))
    config = patches.Config(of=flags.of)
    runs = trained(flags, ["patches"])
    measured(runs, flags, ["patches"], configs={"patches": config})
    first = runs[:: len(flags.seeds)]
    encoders: list[Encoder] = [
        extraction.untrained(first[0]),
        *(extraction.Trained(run, run.newest()) for run in first),
    ]
    train, test = (
        patches.pieces(open_or_ingest(part), flags.image_size, config) for part in splits(flags.data)
    )
    grids = [grid(source, train, test, flags) for source in encoders]
    named = dict(zip(["untrained", *flags.methods], grids, strict=True))
    Folder(flags.out).write("nearest.png", pictures.png(side_by_side(named)))
    reported(runs, flags, ["patches"], besides=("place_distance", "pose_distance"))


def grid(
    source: Encoder, gallery: patches.Pieces, queries: patches.Pieces, flags: NearestFlags
) -> Image.Image:
    """Return the grid of an encoder: some queries and the nearest pieces of each, with their cosine."""
    encode = extraction.reestimated.load(
        source, torch.split(gallery.views_nchw[:2048], 64), torch.device("cpu"), ["pooled"]
    )
    chosen_q = np.sort(rng.generator("patches sheet").permutation(len(queries.views_nchw))[: flags.count])
    asked_qd, known_nd = (
        features(encode, torch.split(views, 64))["pooled"]
        for views in (queries.views_nchw[chosen_q], gallery.views_nchw)
    )
    cosine_qk, index_qk = nearest(asked_qd, known_nd, flags.k)
    queried = [(pictures.mosaic(queries.views_nchw[[q]]), "") for q in chosen_q]
    columns: list[pictures.Column] = [("query", "", queried)]
    for k in range(index_qk.shape[1]):
        pieces = [pictures.mosaic(gallery.views_nchw[[i]]) for i in index_qk[:, k]]
        notes = [f"cos {value:.2f}" for value in cosine_qk[:, k]]
        columns.append((f"nearest {k + 1}", "", list(zip(pieces, notes, strict=True))))
    return pictures.grid(columns)


if __name__ == "__main__":
    command(main, NearestFlags)

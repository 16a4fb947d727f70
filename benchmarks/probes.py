"""What probes cost beside the matrix products that they contain: kNN, and the linear probe of all layers.

Command:  python benchmarks/probes.py --out rows.jsonl
          python benchmarks/probes.py --train 5000 --test 1000 --rounds 2
          python benchmarks/probes.py --run RUN --data cifar10
Hardware: two CPU cores; no GPU. Ray computes the features of a run, and is gone when the clock starts.
Time:     about ten minutes with the defaults; the second command about one.
Expect:   a ratio of at most 2 for kNN and for the linear probe of all layers together (1.0 and 1.2: results/probes).

Without a run the features are drawn: rectified mixtures of a few factors, of which some depend on the class; the layers
are as wide as those of the small backbone at 32 pixels. kNN has 512 drawn numbers of an image. The products are counted
while a probe runs, by their shapes, and are then done alone on the same features, in the same round. For the linear
probe these are the scores of all images and the gradient of the weights, for every evaluation of the loss, and the
covariance.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import ray
import torch
import tyro
from torch import Tensor

from raysl import extraction, ray_cluster
from raysl.ingestion import resolve, splits
from raysl.probes import Labelled, common_labels, knn, linear
from raysl.run import Run
from raysl.storage import Folder

# Its name and width, and what a probe learns from and is judged on.
Layer = tuple[str, Labelled, Labelled]
WIDTHS = {"conv1": 6144, "res2": 3072, "res3": 1536, "res4": 768, "pooled": 192}
KNN_WIDTH = 512
CLASSES = 10
FACTORS = 64


@dataclass(frozen=True)
class Flags:
    """Times probes and their matrix products.

    Args:
        train: drawn images to learn from.
        test: drawn images to be judged on.
        run: folder of a run, of whose newest checkpoint the linear probe has the features of all layers.
        data: whose images the run's backbone sees; see `raysl.ingestion.splits`.
        schedule: of the linear probe.
        rounds: how often each is timed.
        out: file for the rows, one JSON object a line.
    """

    train: int = 50_000
    test: int = 10_000
    run: str = ""
    data: str = "cifar10"
    schedule: str = "optimum"
    rounds: int = 3
    out: Path | None = None


def main(flags: Flags) -> None:
    """Times all, prints and writes the rows."""
    rows = [knn_row(flags)]
    layers = [linear_row(flags, *one) for one in (seen(flags) if flags.run else imagined(flags))]
    total = {name: round(sum(row[name] for row in layers), 2) for name in ("probe_s", "products_s")}
    ratio = round(total["probe_s"] / total["products_s"], 2)
    rows += [*layers, {"probe": "linear", "layer": "all", **total, "ratio": ratio}]
    print(json.dumps(rows[-1]))
    if flags.out is not None:
        flags.out.parent.mkdir(parents=True, exist_ok=True)
        flags.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


def drawn(count: int, width: int, seed: int) -> Labelled:
    """Features that tell the class in part."""
    shared, own = torch.Generator().manual_seed(width), torch.Generator().manual_seed(seed)
    means_cf = torch.randn(CLASSES, FACTORS, generator=shared) * 0.5
    mix_fd = torch.randn(FACTORS, width, generator=shared) / FACTORS**0.5
    labels_n = torch.randint(CLASSES, (count,), generator=own)
    factors_nf = means_cf[labels_n] + torch.randn(count, FACTORS, generator=own)
    features_nd = (factors_nf @ mix_fd).add_(torch.randn(count, width, generator=own)).relu_()
    return Labelled(features_nd.numpy(), labels_n.numpy(), f"drawn {seed}")


def knn_row(flags: Flags) -> dict[str, Any]:
    """kNN with its default protocol."""
    train, test = drawn(flags.train, KNN_WIDTH, 0), drawn(flags.test, KNN_WIDTH, 1)
    train_nd, test_nd = torch.from_numpy(train.features_nd), torch.from_numpy(test.features_nd)

    def products() -> float:
        return seconds(lambda: [query_qd @ train_nd.T for query_qd in torch.split(test_nd, knn._QUERY_TILE)])

    rounds = [
        (seconds(lambda: list(knn.Knn(knn.Config()).run(train, test))), products())
        for _ in range(flags.rounds)
    ]
    return row("knn", f"{KNN_WIDTH} numbers", rounds)


def imagined(flags: Flags) -> Iterator[Layer]:
    """Drawn features of layers."""
    for layer, width in WIDTHS.items():
        yield f"{layer}, {width}", drawn(flags.train, width, 0), drawn(flags.test, width, 1)


def seen(flags: Flags) -> Iterator[Layer]:
    """The features that a run's backbone has of images, kept in the folder of the run as `raysl probe` keeps them."""
    run = Run(Folder(flags.run))
    sets = [resolve(split) for split in splits(flags.data)]
    source = extraction.Trained(run, run.newest())
    taps = {
        layer: extraction.feature_spec(layer, linear.Config().dims) for layer in extraction.stages(source)
    }
    protocol = extraction.FeatureProtocol(run.config().view.image_size, tuple(taps.values()))
    ray_cluster.start()
    tables = extraction.extract_all([(source, one, protocol) for one in sets], run.folder / "features")
    ray.shutdown()
    labels = common_labels(*sets)
    for layer, tap in taps.items():
        train, test = (
            Labelled(one[tap].load(), labels_n) for one, labels_n in zip(tables, labels, strict=True)
        )
        yield f"{layer}, {train.features_nd.shape[1]}", train, test


def linear_row(flags: Flags, layer: str, train: Labelled, test: Labelled) -> dict[str, Any]:
    """The linear probe on the features of a layer."""
    probe = linear.Linear(linear.Config(flags.schedule))  # type: ignore[arg-type]
    rounds = []
    for _ in range(flags.rounds):
        with counted() as shapes:
            probe_s = seconds(lambda: list(probe.run(train, test)))
        rounds.append((probe_s, products_s(torch.from_numpy(train.features_nd), shapes)))
    return {**row("linear", layer, rounds), "evaluations": sum(shapes.values())}


@contextmanager
def counted() -> Iterator[Counter[tuple[int, bool]]]:
    """Counts, while the block runs, the products of features and weights: (images, whether with a gradient)."""
    shapes: Counter[tuple[int, bool]] = Counter()
    module: Any = linear
    plain = module.linear

    def counting(features_nd: Tensor, weights_cd: Tensor, bias_c: Tensor) -> Tensor:
        shapes[len(features_nd), weights_cd.requires_grad] += 1
        scores_nc: Tensor = plain(features_nd, weights_cd, bias_c)
        return scores_nc

    module.linear = counting
    try:
        yield shapes
    finally:
        module.linear = plain


def products_s(features_nd: Tensor, shapes: Counter[tuple[int, bool]]) -> float:
    """Seconds that the products take alone, with the one of the covariance."""
    width = features_nd.shape[1]
    weights_cd = torch.zeros(CLASSES, width)
    total_s = 0.0
    for (count, gradient), times in shapes.items():
        some_nd = features_nd[:count]
        slope_nc = torch.zeros(len(some_nd), CLASSES)
        once = median(seconds(lambda x=some_nd: x @ weights_cd.T) for _ in range(5))  # type: ignore[misc]
        if gradient:
            once += median(
                seconds(lambda x=some_nd, g=slope_nc: g.T @ x)  # type: ignore[misc]
                for _ in range(5)
            )
        total_s += times * once
    sample_nd = features_nd[:: max(1, len(features_nd) // (2 * width))]
    return total_s + seconds(lambda: sample_nd.T @ sample_nd)


def row(probe: str, layer: str, rounds: list[tuple[float, float]]) -> dict[str, Any]:
    """Medians over the rounds; the ratio is taken inside each."""
    probe_s, products_s = np.median(np.array(rounds), axis=0).tolist()
    ratios = [measured / products for measured, products in rounds]
    made = {
        "probe": probe,
        "layer": layer,
        "probe_s": round(probe_s, 2),
        "products_s": round(products_s, 2),
        "ratio": round(median(ratios), 2),
        "least": round(min(ratios), 2),
        "most": round(max(ratios), 2),
    }
    print(json.dumps(made), flush=True)
    return made


def seconds(work: Callable[[], object]) -> float:
    """Of the clock on the wall."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main(tyro.cli(Flags))

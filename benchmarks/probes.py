"""Time probes against the matrix products that they contain: kNN, and the linear probe of all layers.

Command:  python benchmarks/probes.py --out rows.jsonl
          python benchmarks/probes.py --train 5000 --test 1000 --rounds 2
          python benchmarks/probes.py --run RUN --data cifar10
Hardware: two CPU cores; no GPU. Ray computes the features of a run, and is stopped before the timing.
Time:     about ten minutes with the defaults; the second command about one.
Expect:   a ratio of at most 2 for kNN and for the linear probe of all layers together (1.0 and 1.2: results/probes).

Without a run the features are random: rectified mixtures of a few factors, some of which depend on the class. The
layers are as wide as those of the small backbone at 32 pixels, and kNN has 512 features. The products are counted by
shape while a probe runs, and are then computed alone on the same features in the same round. For the linear probe they
are the scores of all images and the gradient of the weights, for every evaluation of the loss, and the covariance.
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
from raysl.ingestion import open_or_ingest, splits
from raysl.probes import Labeled, common_labels, knn, linear
from raysl.run import Run
from raysl.storage import Folder

# Name and width of a layer, train set, test set.
Layer = tuple[str, Labeled, Labeled]
WIDTHS = {"conv1": 6144, "res2": 3072, "res3": 1536, "res4": 768, "pooled": 192}
KNN_WIDTH = 512
CLASSES = 10
FACTORS = 64


@dataclass(frozen=True)
class Flags:
    """Time probes and their matrix products.

    Args:
        train: number of random train images.
        test: number of random test images.
        run: folder of a run; the linear probe then uses the features of all layers of its newest checkpoint.
        data: images for the backbone of the run; see `raysl.ingestion.splits`.
        schedule: schedule of the linear probe.
        rounds: number of timings of each.
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
    """Time everything, and print and write the rows."""
    rows = [knn_row(flags)]
    layers = [linear_row(flags, *one) for one in (run_layers(flags) if flags.run else random_layers(flags))]
    total = {name: round(sum(row[name] for row in layers), 2) for name in ("probe_s", "products_s")}
    ratio = round(total["probe_s"] / total["products_s"], 2)
    rows += [*layers, {"probe": "linear", "layer": "all", **total, "ratio": ratio}]
    print(json.dumps(rows[-1]))
    if flags.out is not None:
        flags.out.parent.mkdir(parents=True, exist_ok=True)
        flags.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


def random_set(count: int, width: int, seed: int) -> Labeled:
    """Return features that depend on the class in part."""
    shared, own = torch.Generator().manual_seed(width), torch.Generator().manual_seed(seed)
    means_cf = torch.randn(CLASSES, FACTORS, generator=shared) * 0.5
    mix_fd = torch.randn(FACTORS, width, generator=shared) / FACTORS**0.5
    labels_n = torch.randint(CLASSES, (count,), generator=own)
    factors_nf = means_cf[labels_n] + torch.randn(count, FACTORS, generator=own)
    features_nd = (factors_nf @ mix_fd).add_(torch.randn(count, width, generator=own)).relu_()
    return Labeled(features_nd.numpy(), labels_n.numpy(), f"random {seed}")


def knn_row(flags: Flags) -> dict[str, Any]:
    """Return the row of kNN with its default protocol."""
    train, test = random_set(flags.train, KNN_WIDTH, 0), random_set(flags.test, KNN_WIDTH, 1)
    train_nd, test_nd = torch.from_numpy(train.features_nd), torch.from_numpy(test.features_nd)

    def products() -> float:
        return seconds(lambda: [query_qd @ train_nd.T for query_qd in torch.split(test_nd, knn._QUERY_TILE)])

    rounds = [
        (seconds(lambda: list(knn.Knn(knn.Config()).run(train, test))), products())
        for _ in range(flags.rounds)
    ]
    return row("knn", f"{KNN_WIDTH} features", rounds)


def random_layers(flags: Flags) -> Iterator[Layer]:
    """Yield random features of layers."""
    for layer, width in WIDTHS.items():
        yield f"{layer}, {width}", random_set(flags.train, width, 0), random_set(flags.test, width, 1)


def run_layers(flags: Flags) -> Iterator[Layer]:
    """Yield the features of the backbone of a run. They are stored in the folder of the run, as by `raysl probe`."""
    run = Run(Folder(flags.run))
    sets = [open_or_ingest(split) for split in splits(flags.data)]
    source = extraction.Trained(run, run.newest())
    specs = {
        layer: extraction.feature_spec(layer, linear.Config().dims) for layer in extraction.stages(source)
    }
    protocol = extraction.FeatureProtocol(run.config().view.image_size, tuple(specs.values()))
    ray_cluster.start()
    tables = extraction.extract_all([(source, one, protocol) for one in sets], run.folder / "features")
    ray.shutdown()
    labels = common_labels(*sets)
    for layer, spec in specs.items():
        train, test = (
            Labeled(one[spec].load(), labels_n) for one, labels_n in zip(tables, labels, strict=True)
        )
        yield f"{layer}, {train.features_nd.shape[1]}", train, test


def linear_row(flags: Flags, layer: str, train: Labeled, test: Labeled) -> dict[str, Any]:
    """Return the row of the linear probe on a layer."""
    probe = linear.Linear(linear.Config(flags.schedule))  # type: ignore[arg-type]
    rounds = []
    for _ in range(flags.rounds):
        with counted() as shapes:
            probe_s = seconds(lambda: list(probe.run(train, test)))
        rounds.append((probe_s, products_s(torch.from_numpy(train.features_nd), shapes)))
    return {**row("linear", layer, rounds), "evaluations": sum(shapes.values())}


@contextmanager
def counted() -> Iterator[Counter[tuple[int, bool]]]:
    """Count the products of features and weights while the block runs, by (images, with gradient)."""
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
    """Return the seconds of the products alone, with that of the covariance."""
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
    """Return medians over the rounds; the ratio is computed in each round."""
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
    """Return the wall time of some work in seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main(tyro.cli(Flags))

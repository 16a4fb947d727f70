"""What a larger permutation set costs: a step of pirl-jigsaw and of predict-jigsaw, for sets of every size.

Command:  python benchmarks/permutations.py --out results/permutations/cost.jsonl
Hardware: 2 CPU cores, no GPU; Ray is not used.
Time:     about 3 minutes, most of it to choose the sets.
Expect:   the step and the weights of PIRL do not depend on the set; the classifier of predict grows with it.

Sizes are interleaved in every round, and ratios are taken inside a round against the smallest set of the same
objective. Time is CPU time of this process: views from source crops, forward, backward, memory bank.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
import tyro

from raysl.config import Pretraining
from raysl.contrastive.bank import BankConfig, MemoryBank
from raysl.dataset import Rows
from raysl.model import DatasetInfo, Model
from raysl.rng import ImageRng
from raysl.stream.reader import Batch

SIZES = {"pirl": (1, 10, 100, 1000, 362_880), "predict": (10, 100, 1000, 10_000)}
NUM_IMAGES = 50_000


@dataclass(frozen=True)
class Flags:
    """Times steps for permutation sets of every size.

    Args:
        rounds: how often each size is timed.
        steps: in each of them.
        batch_size: images in a step.
        out: file for the rows, one line of JSON for each size.
    """

    rounds: int = 7
    steps: int = 3
    batch_size: int = 64
    out: Path | None = None


def main(flags: Flags) -> None:
    """Times all, prints and writes the rows."""
    # Threads that wait for a busy core would count as work.
    torch.set_num_threads(1)
    rows, stages = [], []
    for objective, sizes in SIZES.items():
        for size in sizes:
            config = Pretraining(
                data="",
                run="",
                method=f"{objective}-jigsaw",
                # The criterion is slow for large sets, and cost does not depend on which orders they hold.
                parts={"jigsaw": {"num_permutations": size, "criterion": "max_avg"}},
            )
            network = Model(config, DatasetInfo(NUM_IMAGES))
            rows.append({"objective": objective, "num_permutations": size, "weights": weights(network)})
            stages.append(step(config, network, flags.batch_size))
    taken_s = [[cpu_s(stage, flags.steps) for stage in stages] for _ in range(flags.rounds + 1)][1:]
    firsts = [
        next(j for j, other in enumerate(rows) if other["objective"] == row["objective"]) for row in rows
    ]
    for i, row in enumerate(rows):
        ratios = [round_s[i] / round_s[firsts[i]] for round_s in taken_s]
        row["cpu_ms"] = round(1e3 * median(round_s[i] for round_s in taken_s), 1)
        row["ratio"] = round(median(ratios), 3)
        row["least"], row["most"] = round(min(ratios), 3), round(max(ratios), 3)
        print(json.dumps(row), flush=True)
    if flags.out is not None:
        flags.out.parent.mkdir(parents=True, exist_ok=True)
        flags.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


def weights(network: Model) -> int:
    """Numbers in the network."""
    return sum(p.numel() for p in network.parameters())


def step(config: Pretraining, network: Model, batch_size: int) -> Callable[[], None]:
    """One step on source crops that are there already."""
    views = network.views()
    generator = torch.Generator().manual_seed(0)
    crops = {
        name: torch.randint(
            0,
            256,
            (batch_size, 3, view.source.size, view.source.size),
            dtype=torch.uint8,
            generator=generator,
        )
        for name, view in views.items()
    }
    rows = Rows(np.arange(batch_size), np.zeros(batch_size, np.int64))
    image_rng = ImageRng(0, rows.epochs_b, rows.indices_b)
    dim = network.objective.bank_dim
    bank = MemoryBank(NUM_IMAGES, dim, BankConfig(), 0) if dim else None

    def run() -> None:
        made = {name: view(crops[name], image_rng.named(name)) for name, view in views.items()}
        targets = {name: one.target for name, one in made.items() if one.target is not None}
        batch = Batch(0, rows, None, {name: one.crops_bpchw for name, one in made.items()}, targets)
        found = network.objective.loss(network(batch.views), batch, bank)
        network.zero_grad(set_to_none=True)
        found.loss.backward()  # type: ignore[no-untyped-call]
        if bank is not None and found.bank_update_bd is not None:
            bank.update(batch.indices_b, found.bank_update_bd)

    return run


def cpu_s(stage: Callable[[], None], times: int) -> float:
    """CPU seconds of one of several calls."""
    started = time.process_time()
    for _ in range(times):
        stage()
    return (time.process_time() - started) / times


if __name__ == "__main__":
    main(tyro.cli(Flags))

"""Sweep a temperature and a learning rate with a `tune.Tuner` of your own: any scheduler, searcher and callback.

Command:  python experiments/sweep_tune.py --data DATA --out OUT
Hardware: 2 CPU cores, 24 GB, no GPU; one run at a time.
Time:     with the default of 1,000 drawn images, about 5 minutes.
Expect:   the best temperature lies inside the interval; the table of results is in OUT/tune.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from ray import tune

import raysl
from raysl.config import Pretraining
from raysl.objectives.pirl import Config as Pirl


@dataclass(frozen=True)
class Flags:
    """Sweep with a plain `tune.Tuner`.

    Args:
        data: labeled images; a tenth is held out, on which the trials are compared.
        out: folder of runs and results.
        epochs: visits to every image in a full run.
        samples: number of trials.
    """

    data: str = "shapes:1000"
    out: str = "runs/sweep-tune"
    epochs: float = 3
    samples: int = 6


def main(flags: Flags) -> tune.ResultGrid:
    """Run the sweep and print its best trial."""
    pirl = Pirl(head="bn", num_negatives=256)
    base = Pretraining(flags.data, "-", epochs=flags.epochs, batch_size=64, workers=1, parts={"pirl": pirl})
    space = {"pirl.temperature": tune.loguniform(0.03, 0.5), "optim.lr": tune.choice([0.03, 0.1])}
    tuner = tune.Tuner(
        raysl.tune_trainable(base, flags.out, param_space=space, probe="knn"),
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="score",
            mode="max",
            num_samples=flags.samples,
            reuse_actors=True,
            scheduler=tune.schedulers.ASHAScheduler(
                time_attr="t", max_t=9, grace_period=1, reduction_factor=3
            ),
        ),
        run_config=tune.RunConfig(name="tune", storage_path=str(Path(flags.out).absolute()), verbose=1),
    )
    results = tuner.fit()
    best = results.get_best_result()
    print(f"best: {best.metrics['score']:.4f} with {best.config}")
    return results


if __name__ == "__main__":
    main(tyro.cli(Flags))

"""Sweep temperature, lambda, negatives and permutations of PIRL on images of the size of CIFAR-10, scored by kNN.

Command:  python experiments/sweep_pirl.py --data DATA --figure lambda --out results/sweep-pirl/lambda --runs RUNS
Hardware: 2 CPU cores, 24 GB, no GPU.
Time:     with --epochs 3 --images 3000 --seeds 0 1 2, 10 to 19 minutes for each figure beside much other work. "recipe"
          with --epochs 9 --images 5000 --samples 16 --seeds 0 1 2 --max-concurrent 2 --no-share-stream: 34 minutes.
          With --local, on 1,500 drawn images: about 2 minutes.
Expect:   the best lambda is in the middle, as in the PIRL paper (arXiv 1912.01991, section 5), though on CIFAR-10 it is
          not clearly ahead of 0. At this size, no gain from more negatives or permutations shows, unlike in the paper.
          See results/lectures and results/sweep.

With --scale full it is the sweep of a laboratory: ResNet-50 on photos of 224 pixels in bf16, by the recipe
pirl-r50-800ep with fewer epochs. It prints its cost first, and has not been run:

    ray submit cluster.yaml experiments/sweep_pirl.py -- --scale full --data s3://... --runs s3://... --out s3://...

The same command resumes the sweep in RUNS.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from raysl.config import Pretraining
from raysl.contrastive.bank import BankConfig
from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.experiment.script import Flags, command, drawn, held_out, locally, sweep_and_report
from raysl.objectives.pirl import Config as Pirl
from raysl.optim import OptimConfig
from raysl.pretext.jigsaw import Config as Jigsaw
from raysl.storage import Folder
from raysl.training import recipes
from raysl.tuning.config import SweepConfig

# The grids of the paper; numbers of negatives are limited by the number of images.
NEGATIVES = (64, 256, 1024, 4096, 8192, 16_000, 32_000)
GRIDS = {
    "lambda": "lam=0,0.25,0.5,0.75,1",
    "permutations": "num_permutations=1,100,2000,10000,362880",
    "chosen": "lam=0.5",
}
# The search for the recipe of small images, around the recipe that results/recipes chose one factor at a time.
RECIPE = (
    "jigsaw.grid=2,3",
    "bank.momentum=0,0.5",
    "temperature=0.05..0.5",
    "lam=0.1..0.9",
    "pirl.head=linear,bn",
    "optim.lr=0.03..0.5",
    "optim.warmup=0,0.05,0.2",
    "view.min_scale=0.08..0.6",
    "view.recipe=pirl,simclr,mocov2,plain",
)


@dataclass(frozen=True)
class SweepFlags(Flags):
    """Sweep PIRL and write the table and the report.

    Args:
        figure: "lambda", "negatives" or "permutations" for an ablation of the paper; "all" for its four
            hyperparameters, drawn at random and stopped by ASHA; "recipe" for ten in the same way, and "chosen" for the
            one trial to compare them with. The last two need --scale small.
        values: values of the hyperparameter of "lambda", "negatives" or "permutations"; empty for those of the paper.
        samples: number of trials of "all" and "recipe".
        images: number of images of the train split to learn from.
        epochs: visits to every image.
        retry: try the trials again that failed before.
        max_concurrent: maximum number of runs at a time; 0 for as many as possible. On two cores, two runs of one
            thread are faster than one of two; for that, give 2 and --no-share-stream.
        share_stream: make the views once for concurrent runs that need the same images.
        scale: "small" for a small backbone and 32 pixels; "full" for ResNet-50 and 224 pixels, on all images unless
            --images is given, for 30 epochs unless --epochs is.
        gpu_images_per_s: for the cost of "full": images a second on one GPU. Assumed, for an A10G: `raysl doctor --gpu`
            measures it.
        usd_per_gpu_hour: for the cost of "full": the price of one GPU, with its machine.
    """

    out: str = "results/sweep-pirl"
    runs: str = "runs/sweep-pirl"
    workers: int = 1
    figure: Literal["all", "lambda", "negatives", "permutations", "recipe", "chosen"] = "all"
    values: tuple[float, ...] = ()
    samples: int = 8
    images: int = 10_000
    epochs: float = 9
    retry: bool = False
    max_concurrent: int = 0
    share_stream: bool = True
    scale: Literal["small", "full"] = "small"
    gpu_images_per_s: float = 460
    usd_per_gpu_hour: float = 0.49


def main(flags: SweepFlags) -> None:
    """Run or complete the sweep, print its table and write its report."""
    flags = locally(flags, data="shapes:1500", samples=2, images=1500, epochs=3)
    if flags.scale == "full":
        if flags.figure in ("recipe", "chosen"):
            raise UserError(
                f"--figure {flags.figure} is for small images. Give --scale small, or another figure."
            )
        usual = SweepFlags()
        flags = replace(
            flags,
            images=10**9 if flags.images == usual.images else flags.images,
            epochs=30 if flags.epochs == usual.epochs else flags.epochs,
        )
    if flags.values and flags.figure not in ("lambda", "negatives", "permutations"):
        raise UserError(f"--values has no meaning with --figure {flags.figure}. Leave it out.")
    images = drawn(flags, flags.images)
    if flags.scale == "full":
        print(cost(flags, images.num_images), flush=True)
    base = full(flags, images) if flags.scale == "full" else small(flags, images)
    out = str(Folder(flags.runs) / flags.figure)
    config = replace(
        settings(flags, images.num_images),
        out=out,
        validation=held_out(flags, images),
        retry=flags.retry,
        max_concurrent=flags.max_concurrent,
        share_stream=flags.share_stream,
    )
    sweep_and_report(base, config, flags)


def small(flags: SweepFlags, images: DataSet) -> Pretraining:
    """Return the run that is varied at the size of CIFAR-10."""
    # Two by two patches have only 24 permutations.
    grid = 3 if flags.figure in ("all", "permutations") else 2
    return Pretraining(
        data=str(images.folder),
        run="-",
        epochs=flags.epochs,
        batch_size=128,
        workers=flags.run_workers,
        optim=OptimConfig(lr=0.12, warmup=0.05),
        # What results/recipes chose for a small backbone and a short run, but for the negatives: the usual 4096 take
        # twice as long on two cores.
        parts={
            "pirl": Pirl(temperature=0.2, head="bn", num_negatives=min(1024, images.num_images - 1)),
            "jigsaw": Jigsaw(grid=grid),
        },
        bank=BankConfig(momentum=0),
    )


def full(flags: SweepFlags, images: DataSet) -> Pretraining:
    """Return the run that is varied on photos: the published recipe, shorter, with 128 images on each GPU."""
    recipe = recipes.load("pirl-r50-800ep", str(images.folder), "-")
    batch_size = 128 * flags.run_workers
    pirl = replace(recipe.parts["pirl"], num_negatives=min(32_000, images.num_images - 1))
    return replace(
        recipe,
        epochs=flags.epochs,
        batch_size=batch_size,
        workers=flags.run_workers,
        precision="bf16",
        # The recipe's rate is for batches of 1,024.
        optim=replace(recipe.optim, lr=recipe.optim.lr * batch_size / recipe.batch_size, warmup=0.05),
        parts={"pirl": pirl},
    )


def cost(flags: SweepFlags, num_images: int) -> str:
    """Return a sentence about the most that a sweep at full scale can cost; ASHA stops most trials earlier."""
    drawn_at_random = flags.figure in ("all", "recipe")
    trials = flags.samples if drawn_at_random else GRIDS.get(flags.figure, str(NEGATIVES)).count(",") + 1
    runs = trials * len(flags.seeds)
    hours = runs * flags.epochs * num_images / flags.gpu_images_per_s / 3600
    price, speed = flags.usd_per_gpu_hour, flags.gpu_images_per_s
    return (
        f"{runs} runs of {flags.epochs:g} epochs of {num_images:,} images take at most {hours:,.0f} hours of a GPU, "
        f"about ${hours * price:,.0f} at ${price:g} an hour and {speed:g} images/s (both assumed: --usd-per-gpu-hour, "
        "--gpu-images-per-s)."
    )


def settings(flags: SweepFlags, num_images: int) -> SweepConfig:
    """Return the configuration of the sweep."""
    negatives = [count for count in NEGATIVES if count < num_images]
    if flags.figure in ("all", "recipe"):
        of_paper = (
            "temperature=0.05..0.5",
            "lam=0..1",
            f"num_negatives={negatives[0]}..{negatives[-1]}",
            "num_permutations=100..10000",
        )
        of_recipe = (*RECIPE, f"num_negatives={negatives[0]}..{min(4096, negatives[-1])}")
        return SweepConfig(
            "-",
            of_recipe if flags.figure == "recipe" else of_paper,
            seeds=flags.seeds,
            searcher="random",
            samples=flags.samples,
            scheduler="asha",
            rungs=2 if flags.local else 3,
        )
    grids = {**GRIDS, "negatives": f"num_negatives={','.join(map(str, negatives))}"}
    vary = (grids[flags.figure],)
    name, _, values = vary[0].partition("=")
    if flags.values:
        vary = (f"{name}={','.join(f'{value:.10g}' for value in flags.values)}",)
    elif flags.local and flags.figure != "chosen":
        vary = (f"{name}={','.join(values.split(',')[1:3])}",)
    return SweepConfig("-", vary, seeds=flags.seeds)


if __name__ == "__main__":
    command(main, SweepFlags)

"""Predict the speed of a run and its bottleneck from measured costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from raysl.ray_cluster.placement import Placement


@dataclass(frozen=True)
class Costs:
    """Measured costs: microseconds per image in one data task, and seconds per training step."""

    read_us: float  # reading a row group, divided by its images
    decode_us: float  # decoding the image file
    crop_us: float  # cutting and resizing the source crops
    augment_us: float  # making views from source crops
    transfer_us: float  # moving views through the object store, both sides
    step_s: float  # forward, backward, optimizer and bank, with all workers running
    all_reduce_s: float  # summing the gradients over all workers; 0 for one worker


_ADVICE = {
    "read": "Bring the data set nearer to the machines (`raysl ingest` copies it), or add CPUs for data tasks.",
    "decode": "Ingest a copy of the images that is not much larger than the views, or add CPUs for data tasks.",
    "crop": "Ingest a copy of the images that is not much larger than the views, or add CPUs for data tasks.",
    "augment": "Add CPUs for data tasks, or make the views on the trainers' GPUs with --stream.place trainer.",
    "transfer": "Use larger local batches, or send source crops in place of views with --stream.place trainer.",
    "step": "Use GPUs, or more of them, or a smaller backbone; on GPUs also --precision bf16.",
    "all-reduce": "Use larger batches, so that gradients are exchanged less often, or fewer workers.",
}


@dataclass(frozen=True)
class Prediction:
    """Predicted speed of a run."""

    data: float  # images/s of the data tasks
    training: float  # images/s of the trainers
    together: float  # images/s if both share the cores; infinite with GPUs
    limit: str  # costliest stage of the slower side
    advice: str  # the bottleneck and what to do, in one or two sentences

    @property
    def images_per_s(self) -> float:
        return min(self.data, self.training, self.together)

    def __str__(self) -> str:
        together = "" if self.together == float("inf") else f", {self.together:,.0f} on shared cores"
        return (
            f"Data tasks can make {self.data:,.0f} images/s and trainers take {self.training:,.0f}{together}: "
            f"expect about {self.images_per_s:,.0f} images/s. {self.advice}"
        )


def predict(costs: Costs, placement: Placement, workers: int, batch_size: int, cpus: float) -> Prediction:
    """Predict the speed of a run."""
    share = placement.share
    # Ray runs as many tasks as fit, and always one.
    tasks = workers * max(1, int(share.cpus / share.cpus_per_task + 1e-6))
    stages = {
        name.removesuffix("_us"): value for name, value in asdict(costs).items() if name.endswith("_us")
    }
    data_us = sum(stages.values())
    # A task is one thread, even if it reserves more or less than one CPU.
    data = 1e6 * min(tasks, cpus) / data_us
    training = batch_size / (costs.step_s + costs.all_reduce_s)
    threads = placement.threads_per_worker * workers / batch_size * 1e6
    steps = {"step": threads * costs.step_s, "all-reduce": threads * costs.all_reduce_s}
    together = float("inf")
    if not placement.gpus_per_worker:
        together = 1e6 * cpus / (data_us + sum(steps.values()))
    if together <= min(data, training):
        candidates, why = {**stages, **steps}, "Data tasks and trainers share the cores"
    elif data < training:
        candidates, why = stages, "The data tasks are slower than the trainers"
    else:
        candidates, why = steps, "The trainers are slower than the data tasks"
    limit = max(candidates, key=lambda name: candidates[name])
    portion = candidates[limit] / sum(candidates.values())
    advice = f"{why}, and {portion:.0%} of that time is {limit}. {_ADVICE[limit]}"
    return Prediction(data, training, together, limit, advice)

"""Score a run at its own task on data that it has not seen, such as the accuracy of frame order on other clips."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch

from raysl.dataset import DataSet
from raysl.extraction import Trained
from raysl.extraction.heads import trained_model
from raysl.model import Model
from raysl.run import Run
from raysl.stream.plan import Plan
from raysl.stream.processes import DataProcesses
from raysl.stream.reader import Batch, Stream

# Visits to every row, each with views of its own.
_EPOCHS = 4


def batches(model: Model, dataset: DataSet) -> Iterator[Batch]:
    """Yield batches of the views of a model on any data set, without a gradient, made by a process beside this one.

    Args:
        model: gives the views; it stays in its mode.
    """
    plan = Plan.of(dataset, min(model.config.batch_size, dataset.num_images), seed=1, epochs=_EPOCHS)
    with torch.no_grad(), DataProcesses(1) as data:
        yield from Stream(dataset, plan, model.views(), model.config.stream, reader=data.columns).batches()


def held_out(run: Run, dataset: DataSet) -> dict[str, float]:
    """Return the loss and the metrics of a run's objective on a data set, averaged over batches of the run's size.

    Args:
        run: finished, of an objective without a memory bank.
        dataset: rows of the same kind as those of the run.
    """
    model = trained_model(Trained(run, run.newest()))
    sums: dict[str, float] = defaultdict(float)
    count = 0
    for batch in batches(model, dataset):
        found = model.objective.loss(model(batch.views), batch, None)
        for name, value in {"loss": found.loss, **found.metrics}.items():
            sums[name] += float(value)
        count += 1
    return {name: total / count for name, total in sums.items()}

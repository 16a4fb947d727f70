"""Callbacks: code of the user that follows a run, in the process that started it. Loggers for W&B, MLflow, TensorBoard.

    class PrintLoss(Callback):
        def on_log(self, row):
            print(row["step"], row["loss"])

    raysl.pretrain(data="photos", run="runs/first", callbacks=[PrintLoss(), WandbLogger(project="photos")])

A callback that fails is reported once and left out from then on; the run continues.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from raysl import checkpoint
from raysl.checkpoint import Checkpoint
from raysl.errors import UserError, package
from raysl.run import Run, TensorBoard, flattened
from raysl.storage import Folder

_log = logging.getLogger("raysl.run.callbacks")


class Callback:
    """Base class: every method does nothing. They are called one at a time, some from a thread of their own."""

    def on_begin(self, run: Run) -> None:
        """Handle the start of a run, before its workers start. `run.metadata()` holds the configuration."""

    def on_step(self, step: int) -> None:
        """Handle a step. Several calls come together, with the row that reports them."""

    def on_log(self, row: Mapping[str, Any]) -> None:
        """Handle a row of metrics.jsonl: "step", "loss", "lr", "images_per_s" and so on."""

    def on_checkpoint(self, saved: Checkpoint) -> None:
        """Handle a checkpoint that is complete."""

    def on_probe(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Handle the primary metrics of the probes of a step: "step", "probe", "name", "value" and so on."""

    def on_end(self, run: Run) -> None:
        """Handle the end of a run, or its interruption."""


class Callbacks:
    """One or several callbacks of one run. Raises UserError for a member that is none."""

    def __init__(self, members: Callback | Sequence[Callback]) -> None:
        members = members if isinstance(members, Sequence) else [members]
        for member in members:
            if not isinstance(member, Callback):
                raise UserError(f"{member!r} is not a callback. Derive its class from raysl.Callback.")
        self._members = list(members)
        self._run: Run | None = None
        self._step = 0
        self._saved: set[int] = set()

    @contextmanager
    def following(self, run: Run, step: int) -> Iterator[None]:
        """Call `on_begin` before the block and `on_end` after it, for a run that begins or resumes at a step."""
        self._run, self._step = run, step
        if self._members:
            self._saved = {found.step for found in checkpoint.complete(run.checkpoints)}
        self._call("on_begin", run)
        try:
            yield
        finally:
            self.report_new_checkpoints()
            self._call("on_end", run)

    def log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Report new rows of metrics, and checkpoints that have been saved since the last call."""
        for row in rows:
            for step in range(self._step + 1, row["step"] + 1):
                self._call("on_step", step)
            self._step = row["step"]
            self._call("on_log", row)
        if rows:
            self.report_new_checkpoints()

    def report_new_checkpoints(self) -> None:
        """Report new checkpoints."""
        if not self._members or self._run is None:
            return
        for found in checkpoint.complete(self._run.checkpoints):
            if found.step not in self._saved:
                self._saved.add(found.step)
                self._call("on_checkpoint", found)

    def report_probe_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Report rows of probes."""
        self._call("on_probe", rows)

    def _call(self, name: str, *arguments: Any) -> None:
        for member in list(self._members):
            try:
                getattr(member, name)(*arguments)
            except Exception as error:
                self._members.remove(member)
                _log.warning(
                    "The callback %s failed in %s and is left out: %s: %s",
                    *(type(member).__name__, name, type(error).__name__, error),
                )


class WandbLogger(Callback):
    """Log to Weights & Biases (package wandb, extra "loggers"). WANDB_MODE=offline keeps the log on this machine.

    Args:
        options: arguments of `wandb.init`, such as project.
    """

    def __init__(self, **options: Any) -> None:
        self._wandb = package("wandb", "This logger", "loggers")
        self._options = options
        self._session: Any = None

    def on_begin(self, run: Run) -> None:
        name = str(run.folder).rstrip("/").rpartition("/")[2]
        options = {"name": name, "config": run.metadata()["config"], **self._options}
        self._session = self._wandb.init(**options)

    def on_log(self, row: Mapping[str, Any]) -> None:
        self._session.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

    def on_probe(self, rows: Sequence[Mapping[str, Any]]) -> None:
        # Steps of W&B only grow, and a probe reports a step that training has left behind.
        self._session.log({**_scores(rows), "probe/step": rows[0]["step"]})

    def on_end(self, run: Run) -> None:
        self._session.finish()


class MLflowLogger(Callback):
    """Log to MLflow (package mlflow-skinny, extra "loggers").

    Args:
        tracking_uri: of a server or a folder; by default what the environment says.
    """

    def __init__(self, experiment: str = "raysl", tracking_uri: str = "") -> None:
        self._mlflow = package("mlflow", "This logger", "loggers")
        if tracking_uri:
            self._mlflow.set_tracking_uri(tracking_uri)
        self._client = self._mlflow.MlflowClient()
        self._experiment = experiment
        self._id = ""

    def on_begin(self, run: Run) -> None:
        found = self._client.get_experiment_by_name(self._experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(self._experiment)
        self._id = self._client.create_run(experiment, run_name=str(run.folder)).info.run_id
        for name, value in flattened(run.metadata()["config"]):
            self._client.log_param(self._id, name, value)

    def on_log(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if name != "step":
                self._log(name, value, row["step"])

    def on_probe(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for name, value in _scores(rows).items():
            self._log(name, value, rows[0]["step"])

    def _log(self, name: str, value: float, step: int) -> None:
        self._client.log_metric(self._id, re.sub(r"[^\w\-. /]", "-", name), value, step=step)

    def on_end(self, run: Run) -> None:
        self._client.set_terminated(self._id)


class TensorBoardLogger(Callback):
    """Log to a local folder for TensorBoard. A run in a local folder does so by itself; this is for object stores."""

    def __init__(self, folder: str) -> None:
        self._tensorboard = TensorBoard(Folder(folder), 0)

    def on_begin(self, run: Run) -> None:
        self._tensorboard.add_hyperparameters(run.metadata()["config"])

    def on_log(self, row: Mapping[str, Any]) -> None:
        self._tensorboard.add(row)
        self._tensorboard.flush()

    def on_probe(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._tensorboard.add({"step": rows[0]["step"], **_scores(rows)})
        self._tensorboard.flush()


def _scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {f"probe/{row['probe']}/{row['name']}": float(row["value"]) for row in rows}

"""A run's folder: who it is (metadata), how it went (metrics), what it learned (checkpoints), what that is worth.

metadata.json           configuration, versions, code hash, data fingerprint, and every session that worked on it
metrics.jsonl           one row each `log_every` steps
tensorboard/            the same, for TensorBoard
checkpoints/            see `checkpoint`
driver.json             while a driver trains it; see raysl.ray_cluster.lock
features/, probes/      what the probes found
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysl import checkpoint
from raysl.checkpoint import Checkpoint
from raysl.config import FREE, Pretraining, differences
from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.ray_cluster.versions import versions
from raysl.storage import Folder, failure

METADATA = "metadata.json"
METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Run:
    """A run that has begun. Small and picklable."""

    folder: Folder

    @staticmethod
    def open(uri: str) -> Run:
        """The run at `uri`. Raises UserError when there is none, or its metadata is damaged."""
        run = Run(Folder(uri))
        if not run.folder.exists(METADATA):
            raise UserError(
                f"No run at {uri!r}: there is no {METADATA}. Make one with `raysl pretrain --data DATA --run {uri}`."
            )
        run.metadata()
        return run

    @staticmethod
    def existing(uri: str) -> Run | None:
        """Return the run at `uri`, or None when there is none yet."""
        return Run.open(uri) if Folder(uri).exists(METADATA) else None

    @staticmethod
    def begin(config: Pretraining, dataset: DataSet, facts: Mapping[str, Any]) -> Run:
        """Begins a run, or goes on with the one that lies there.

        Args:
            config: of the run.
            dataset: that it trains on.
            facts: what the parts of the method add to the metadata, such as a hash of the permutations.

        Raises:
            UserError: another run lies there: of another configuration or of other images.
        """
        run = Run(Folder(config.run))
        session = {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "workers": config.workers, **versions()}
        wanted = json.loads(json.dumps(config.to_json()))
        if run.folder.exists(METADATA):
            metadata = run.metadata()
            _same(metadata, wanted, dataset, config.run)
            metadata["sessions"].append(session)
        else:
            metadata = {
                "config": wanted,
                "facts": json.loads(json.dumps(facts)),
                "data": {
                    "uri": str(dataset.folder),
                    "fingerprint": dataset.manifest.fingerprint,
                    "num_images": dataset.num_images,
                    "num_classes": len(dataset.manifest.classes),
                },
                "sessions": [session],
            }
        run.folder.write_json(METADATA, metadata)
        return run

    @property
    def checkpoints(self) -> Folder:
        return self.folder / "checkpoints"

    def metadata(self) -> dict[str, Any]:
        """The metadata. Raises UserError when it is damaged."""
        try:
            metadata: dict[str, Any] = self.folder.read_json(METADATA)
            dict(metadata["config"]), list(metadata["sessions"])
            data = metadata["data"]
            str(data["fingerprint"]), int(data["num_images"]), int(data["num_classes"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"The metadata of the run at {str(self.folder)!r} is damaged: {error!r}. Restore {METADATA} from a "
                "copy, or give another folder to --run."
            ) from error
        return metadata

    def config(self) -> Pretraining:
        """The configuration it was begun with."""
        return Pretraining.from_json(self.metadata()["config"])

    def newest(self) -> Checkpoint:
        """The newest complete checkpoint. Raises UserError when there is none yet."""
        found = checkpoint.newest(self.checkpoints)
        if found is None:
            raise UserError(f"The run at {str(self.folder)!r} has no complete checkpoint yet.")
        return found

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; none before the first was written. Raises UserError when it is damaged."""
        if not self.folder.exists(METRICS):
            return []
        try:
            return [json.loads(line) for line in self.folder.read(METRICS).splitlines()]
        except ValueError as error:
            raise UserError(
                f"The file {METRICS} of the run at {str(self.folder)!r} is damaged: {error}. Mend or delete it; the "
                "checkpoints do not depend on it."
            ) from error


def _same(metadata: Mapping[str, Any], wanted: Mapping[str, Any], dataset: DataSet, place: str) -> None:
    fingerprint = metadata["data"]["fingerprint"]
    if fingerprint != dataset.manifest.fingerprint:
        raise UserError(
            f"The run at {place!r} was begun on images with fingerprint {fingerprint[:12]} and the data set at "
            f"{str(dataset.folder)!r} has {dataset.manifest.fingerprint[:12]}: the images or labels differ. Give the "
            "data set it was begun on, or another folder to --run."
        )
    # Read and written again, so that a field that is newer than the run stands there with its default.
    begun = json.loads(json.dumps(Pretraining.from_json(metadata["config"]).to_json()))
    changed = [n for n in differences(begun, wanted) if n.split(".")[0] not in FREE]
    if changed:
        raise UserError(
            f"The run at {place!r} was begun with another configuration; these differ: {', '.join(changed)}. Give the "
            "same values to go on with it, or another folder to --run for a new run."
        )


class MetricsLog:
    """Rows of metrics in a run's folder, and for TensorBoard where the folder is local. Rank 0 has one.

    The file is written whole each time, so it never ends in half a row, at a local path or in an object store.

    Args:
        run: whose metrics they are.
        step: the step that the run goes on from; later rows, of an interrupted session, are dropped.

    Attributes:
        reached: the last step of the rows that were there; 0 without any.
    """

    def __init__(self, run: Run, step: int) -> None:
        self._run = run
        rows = run.metrics()
        self.reached: int = max((row["step"] for row in rows), default=0)
        self._lines = [jsonl([row]) for row in rows if row["step"] <= step]
        self._written_at = time.monotonic()
        self._write_s = 0.0
        self._board = TensorBoard(run.folder / "tensorboard", step + 1) if run.folder.is_local else None

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds a row; it reaches the file within ten seconds, or later when writing takes long, or at `flush`."""
        self._lines.append(jsonl([row]))
        if self._board is not None:
            self._board.add(row)
        # A long file takes at most a fiftieth of the time.
        if time.monotonic() - self._written_at > max(10.0, 50 * self._write_s):
            self.flush()

    def flush(self) -> None:
        """Writes all rows to the file."""
        started = time.monotonic()
        self._run.folder.write(METRICS, b"".join(self._lines))
        if self._board is not None:
            self._board.flush()
        self._written_at = time.monotonic()
        self._write_s = self._written_at - started


class TensorBoard:
    """TensorBoard's file of events, written by the caller.

    Not `SummaryWriter`: its thread dies of a full disk in silence, and the trainer then waits for it for ever.

    Args:
        folder: of the events, a local one.
        step: rows of earlier sessions from this step on are hidden.
    """

    def __init__(self, folder: Folder, step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._place = str(folder)
        with self._writing():
            Path(self._place).mkdir(parents=True, exist_ok=True)
            self._events = EventsWriter(f"{self._place}/events")
            self._events.write_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, row: Mapping[str, Any]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        with self._writing():
            for name, value in row.items():
                if name != "step":
                    summary = scalar(name, value)
                    self._events.write_event(Event(wall_time=time.time(), step=row["step"], summary=summary))

    def flush(self) -> None:
        with self._writing():
            self._events.flush()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise failure(self._place, "write", error) from error


def jsonl(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Rows as lines of JSON."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()

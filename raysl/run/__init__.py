"""The folder of a run: its metadata, metrics, checkpoints and the rows of its probes.

metadata.json           configuration, versions, code hash, data fingerprint, and every session that worked on it
metrics.jsonl           one row each `log_every` steps; in an object store, newer rows are in metrics-NNNNNN.jsonl
tensorboard/            the same, for TensorBoard
checkpoints/            see `checkpoint`
driver.json             while a driver trains it; see raysl.storage.lock
features/, probes/      features and rows of the probes
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysl import checkpoint
from raysl.checkpoint import Checkpoint
from raysl.config import Pretraining, run_folder
from raysl.dataset import DataSet
from raysl.errors import UserError, explained
from raysl.ray_cluster.versions import versions
from raysl.run.unchanged import check_facts, check_same, is_replaced
from raysl.storage import Folder, failure, retry
from raysl.storage.records import as_json, signed_line, signed_lines, verified, verified_lines, write_record
from raysl.storage.similar import similar_folder
from raysl.stream.plan import num_steps

METADATA = run_folder.METADATA
METRICS = "metrics.jsonl"
_PART = re.compile(r"metrics-\d{6}\.jsonl")
_PART_ROWS = 5000  # of one part in an object store, which is written again at every flush until it is full
_BLOCK_ROWS = 50_000  # rows that are read at a time
_NOT_IN_TENSORBOARD = ("step", "epoch", "over_steps", "workers", "lost_steps", "eta_s", "wait_s")


@dataclass(frozen=True)
class Run:
    """A run that has begun. It holds only its folder and can be pickled."""

    folder: Folder

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @staticmethod
    def open(uri: str) -> Run:
        """Open the run at `uri`.

        Raises:
            UserError: there is no run, its metadata is damaged, or it was made by raysl 0.1.
        """
        run = Run(Folder(uri))
        if run.folder.exists(run_folder.OLD_METADATA):
            raise _old_format_error(uri)
        if not run.folder.exists(METADATA):
            if DataSet.exists_at(uri):
                raise UserError(f"{uri!r} is a data set and no run. Give the folder of a run.")
            if run.folder.exists(run_folder.SWEEP_JOURNAL):
                raise UserError(f"{uri!r} is a sweep. Give one of its runs: {uri}/trials/NNNN/seed-S.")
            raise UserError(
                f"No run at {uri!r}: there is no {METADATA}. {similar_folder(uri, METADATA)}Runs are made by "
                "`raysl pretrain --data DATA --run RUN`."
            )
        run.metadata()
        return run

    @staticmethod
    def find(uri: str) -> Run | None:
        """Return the run at `uri`; None where there is none yet, or one that failed before it wrote any result."""
        folder = Folder(uri)
        if not folder.exists(METADATA) and not folder.exists(run_folder.OLD_METADATA):
            return None
        run = Run.open(uri)
        return run if run._holds_results() else None

    @staticmethod
    def resumable_metadata(config: Pretraining, dataset: DataSet) -> dict[str, Any] | None:
        """Return the metadata of the run that a configuration resumes; None if its folder holds no run.

        Any configuration may replace that of a run that failed before it wrote any result.

        Raises:
            UserError: the folder holds a run with another configuration or other images, or one of raysl 0.1.
        """
        run = Run(Folder(config.run))
        if run.folder.exists(run_folder.OLD_METADATA):
            raise _old_format_error(config.run)
        if not run.folder.exists(METADATA):
            return None
        metadata = run.metadata()
        if run._holds_results():
            check_same(metadata, as_json(config.to_json()), dataset, config.run)
        return metadata

    def _holds_results(self) -> bool:
        """Return True if the run has a checkpoint, metrics, scores or an export; someone may have deleted others."""
        if checkpoint.newest_step(self.checkpoints) > 0 or self.metrics_parts():
            return True
        has_metrics = self.folder.exists(METRICS) and self.folder.read(METRICS) != b""
        return has_metrics or any((self.folder / place).list() for place in ("probes/rows", "export"))

    @staticmethod
    def begin(config: Pretraining, dataset: DataSet, facts: Mapping[str, Any]) -> Run:
        """Begin a run, or resume the one in its folder. The caller holds the lock of the run.

        Args:
            facts: what the parts of the method add to the metadata, such as a hash of the permutations.

        Raises:
            UserError: as `resumable_metadata`; or files that the run depends on, such as cluster ids or a teacher, have
                changed.
        """
        run, metadata = Run(Folder(config.run)), Run.resumable_metadata(config, dataset)
        facts = as_json(facts)
        session = {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "workers": config.workers, **versions()}
        if metadata is not None and not run._holds_results() and is_replaced(metadata, config, dataset):
            metadata = None
        if metadata is None:
            metadata = {
                "config": as_json(config.to_json()),
                "facts": facts,
                "data": {
                    "uri": str(dataset.folder),
                    "fingerprint": dataset.manifest.fingerprint,
                    "num_images": dataset.num_images,
                    "num_classes": len(dataset.manifest.classes),
                },
                "sessions": [],
            }
        elif checkpoint.newest_step(run.checkpoints) == 0:
            metadata["facts"] = facts
        else:
            check_facts(metadata.get("facts", {}), facts, config.run)
        metadata["sessions"].append(session)
        if sources := config.sources():
            kept = metadata.get("sources", {})
            # The configuration names a file that has moved by its old place.
            moved = {old: sources[new] for old in kept for new in sources if Path(old).name == Path(new).name}
            metadata["sources"] = {**kept, **moved, **sources}
        write_record(run.folder, METADATA, metadata)
        return run

    @property
    def checkpoints(self) -> Folder:
        return self.folder / "checkpoints"

    def metadata(self) -> dict[str, Any]:
        """Return the metadata. Raises UserError when it is damaged, or of raysl 0.1."""
        what = f"The metadata of the run at {str(self.folder)!r} is damaged"
        remedy = f"Restore {METADATA} from a copy, or give another folder to --run."
        with explained(what, remedy, ValueError, KeyError, TypeError, show=repr):
            metadata = verified(self.folder.read_json(METADATA))
            if "trunk" in metadata["config"]:
                raise _old_format_error(str(self.folder))
            # Each conversion fails for a value of another kind.
            dict(metadata["config"]), list(metadata["sessions"])
            data = metadata["data"]
            str(data["fingerprint"]), int(data["num_images"]), int(data["num_classes"])
            dict(metadata.get("sources", {}))
        return metadata

    def config(self) -> Pretraining:
        """Return the configuration of the run. Raises UserError if it needs a plugin that is not trusted."""
        metadata = self.metadata()
        return Pretraining.stored(metadata["config"], str(self.folder), metadata.get("sources"))

    def is_finished(self) -> bool:
        """Return True if the last step of the schedule is saved."""
        metadata = self.metadata()
        begun, images = metadata["config"], metadata["data"]["num_images"]
        last = num_steps(images, int(begun["batch_size"]), float(begun["epochs"]))
        return checkpoint.newest_step(self.checkpoints) >= last

    def newest(self) -> Checkpoint:
        """Return the newest complete checkpoint. Raises UserError when there is none yet."""
        found = checkpoint.newest_checkpoint(self.checkpoints)
        if found is None:
            raise UserError(f"The run at {str(self.folder)!r} has no complete checkpoint yet.")
        return found

    def metrics(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl and its parts; none before the first is written.

        An incomplete last line, which a crash may leave, is ignored.

        Raises:
            UserError: a file is damaged.
        """
        return list(self.metrics_rows())

    def metrics_rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of `metrics` one by one."""
        for name, lines in self._metrics_files():
            with self._reading(name):
                yield from map(json.loads, lines)

    def metrics_columns(self, names: Sequence[str]) -> dict[str, NDArray[np.float64]]:
        """Return columns of all metrics as float64 (n,), with NaN where a row has no such value.

        A million rows need 100 bytes each, while they are read; as dictionaries they would need ten times as much.

        Raises:
            UserError: a file is damaged.
        """
        import pyarrow as pa
        import pyarrow.json

        schema = pa.schema([(name, pa.float64()) for name in names])
        options = pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
        tables = [schema.empty_table()]
        for name, lines in self._metrics_files():
            with self._reading(name):
                while block := b"\n".join(itertools.islice(lines, _BLOCK_ROWS)):
                    tables.append(pyarrow.json.read_json(io.BytesIO(block), parse_options=options))
        table = pa.concat_tables(tables)
        return {name: table[name].to_numpy() for name in names}

    def _metrics_files(self) -> Iterator[tuple[str, Iterator[bytes]]]:
        """Yield the name and the complete lines of each file of metrics."""
        for name in ([METRICS] if self.folder.exists(METRICS) else []) + self.metrics_parts():
            data = self.folder.read(name)
            yield name, map(_checked_object, verified_lines(io.BytesIO(data[: data.rfind(b"\n") + 1])))

    def _reading(self, name: str) -> AbstractContextManager[None]:
        what = f"The file {name} of the run at {str(self.folder)!r} is damaged"
        return explained(what, "Repair or delete it; the checkpoints do not depend on it.", ValueError)

    def metrics_parts(self) -> list[str]:
        """Return the names of the files that continue metrics.jsonl in an object store."""
        return [] if self.folder.is_local else list(filter(_PART.fullmatch, self.folder.list()))

    def write_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replace all rows of metrics. They may come from `metrics_rows`."""
        with self.folder.writing(METRICS) as stream:
            stream.writelines(map(signed_line, rows))
        for name in self.metrics_parts():
            self.folder.delete(name)


def _checked_object(line: bytes) -> bytes:
    """Return a line of JSON. Raise ValueError if it is no object; Arrow crashes on null."""
    if not line.lstrip().startswith(b"{"):
        raise ValueError("a row is no object")
    return line


def _old_format_error(uri: str) -> UserError:
    return UserError(
        f"The run at {uri!r} was made by raysl 0.1, whose format raysl 0.2 does not read. Train it again in another "
        "folder, or use it with raysl 0.1."
    )


class MetricsLog:
    """Rows of metrics in a run's folder, and for TensorBoard if the folder is local. Rank 0 has one.

    A local file is appended to. In an object store, where files cannot grow, rows go to parts of some thousand rows,
    and the next session joins them.

    Args:
        step: the step that the run resumes from; later rows, of an interrupted session, are dropped.

    Attributes:
        reached: the last step of the rows that the folder held before; 0 if it held none.
    """

    def __init__(self, run: Run, step: int) -> None:
        self._run = run
        self.reached: int = max((row["step"] for row in run.metrics_rows()), default=0)
        run.write_metrics(row for row in run.metrics_rows() if row["step"] <= step)
        self._rows: list[Mapping[str, Any]] = []
        self._part = 1
        self._written_at = time.monotonic()
        self._tensorboard = TensorBoard(run.folder / "tensorboard", step + 1) if run.folder.is_local else None
        if self._tensorboard is not None and step == 0:
            self._tensorboard.add_hyperparameters(run.metadata()["config"])

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row; it reaches a local file within a second of work, an object store within ten, or at `flush`."""
        self._rows.append(row)
        if self._tensorboard is not None:
            self._tensorboard.add(row)
        if time.monotonic() - self._written_at > (1.0 if self._run.folder.is_local else 10.0):
            self.flush()

    def flush(self) -> None:
        """Write all rows."""
        if self._rows and self._run.folder.is_local:
            self._append(signed_lines(self._rows))
            self._rows = []
        elif self._rows:
            self._run.folder.write(f"metrics-{self._part:06d}.jsonl", signed_lines(self._rows))
            if len(self._rows) >= _PART_ROWS:
                self._part, self._rows = self._part + 1, []
        if self._tensorboard is not None:
            self._tensorboard.flush()
        self._written_at = time.monotonic()

    def _append(self, lines: bytes) -> None:
        path = Path(str(self._run.folder)) / METRICS
        size = -1

        def append() -> None:
            nonlocal size
            if size < 0:
                size = path.stat().st_size
            os.truncate(path, size)  # An earlier attempt may have written part of a line.
            try:
                with path.open("ab") as file:
                    file.write(lines)
            except OSError:
                with contextlib.suppress(OSError):
                    os.truncate(path, size)
                raise

        retry(str(path), "write", append, is_gone=lambda: self._run.folder.exists(METADATA))


class TensorBoard:
    """TensorBoard's file of events, written by the caller.

    Not `SummaryWriter`: its thread dies silently when the disk is full, and the trainer then waits for it forever.

    Args:
        folder: folder of the events, a local one.
        step: rows of earlier sessions from this step on are hidden.
    """

    def __init__(self, folder: Folder, step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._folder = str(folder)
        with self._writing():
            Path(self._folder).mkdir(parents=True, exist_ok=True)
            self._events = EventsWriter(f"{self._folder}/events")
            self._events.write_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, row: Mapping[str, Any]) -> None:
        """Add the values of a row as points of charts."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        with self._writing():
            for name, value in row.items():
                if name not in _NOT_IN_TENSORBOARD:
                    summary = scalar(name, value)
                    self._events.write_event(Event(wall_time=time.time(), step=row["step"], summary=summary))

    def add_hyperparameters(self, config: Mapping[str, Any]) -> None:
        """Show a configuration in the HParams tab."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import hparams

        values = {
            name: value for name, value in flattened(config) if isinstance(value, bool | int | float | str)
        }
        with self._writing():
            for summary in hparams(values, {"loss": 0.0}):
                self._events.write_event(Event(wall_time=time.time(), summary=summary))

    def flush(self) -> None:
        with self._writing():
            self._events.flush()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise failure(self._folder, "write", error) from error


def flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings under dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def jsonl(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Return rows as lines of JSON."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()

"""The trials of a sweep for TensorBoard's HParams tab: one run each, in `tensorboard/` of the sweep."""

from __future__ import annotations

import shutil
from pathlib import Path

from raysl.storage import Folder, failure
from raysl.tuning.standing import Standing


def write(folder: Folder, standing: Standing) -> None:
    """Writes the trials that have a score; only where the folder is local.

    Raises:
        UserError: the disk is full.
    """
    if not folder.is_local:
        return
    place = Path(str(folder / "tensorboard"))
    try:
        shutil.rmtree(place, ignore_errors=True)
        for trial in range(standing.num_trials):
            if standing.scores_of(trial):
                _write(place / f"{trial:04d}", standing, trial)
    except OSError as error:
        raise failure(str(place), "write", error) from error


def _write(place: Path, standing: Standing, trial: int) -> None:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.summary import hparams, scalar

    scores = standing.scores_of(trial)
    tag = f"{standing.config.probe}/score"
    values = {
        name: "none" if value is None else value
        for name, value in (standing.values(trial, len(scores) - 1) or {}).items()
    }
    place.mkdir(parents=True)
    events = EventsWriter(f"{place}/events")
    for summary in hparams(values, {tag: scores[-1]}):
        events.write_event(Event(summary=summary))
    for rung, score in enumerate(scores):
        events.write_event(Event(step=rung, summary=scalar(tag, score)))
    events.close()

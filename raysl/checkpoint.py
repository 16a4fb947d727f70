"""Checkpoints: what is saved, when, and which one a run goes on from.

A checkpoint is a folder `step-000000123` with the state of the network and the parts of the memory bank. Every worker
writes its own files and then a receipt with their sizes and checksums; a checkpoint counts only when the receipts of
all workers are there and match. So no worker waits for another, and whatever is killed, half a checkpoint is never
mistaken for a whole one.
"""

from __future__ import annotations

import contextlib
import io
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from raysl.errors import UserError
from raysl.storage import Folder

STATE = "state.pt"


@dataclass(frozen=True)
class SaveConfig:
    """When checkpoints are written and which are kept. The last step is always saved.

    Args:
        every_steps: save every so many steps; 0 for never by steps.
        every_minutes: save when this much time has passed, looked at every few seconds; 0 for never by time.
        keep_last: newest checkpoints to keep.
        keep_every: besides them, keep those whose step is a multiple of this; 0 for none.
    """

    every_steps: int = 0
    every_minutes: float = 5
    keep_last: int = 2
    keep_every: int = 0

    def __post_init__(self) -> None:
        for name in ("every_steps", "every_minutes", "keep_every"):
            if not getattr(self, name) >= 0:
                raise UserError(f"save.{name} is {getattr(self, name)}; it must not be negative.")
        if self.keep_last < 1:
            raise UserError(f"save.keep_last is {self.keep_last}; at least 1 checkpoint must be kept.")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Args:
        folder: its folder.
        step: steps that were done when it was taken.
        world: workers that wrote it.
    """

    folder: Folder
    step: int
    world: int

    def load(self) -> tuple[dict[str, Any], Iterator[dict[str, Any]]]:
        """The state of the network, and the parts of the memory bank (none without a bank), on the CPU.

        The parts are read as they are asked for, one at a time: no worker has to hold the whole bank.

        Raises:
            UserError: a file is missing or does not match its receipt; for the parts, when they are read.
        """
        files = self._files()
        banks = sorted(name for name in files if name != STATE)
        return self._load(STATE, files), (self._load(name, files) for name in banks)

    def state(self) -> dict[str, Any]:
        """The state of the network alone, on the CPU. Raises UserError when it does not match its receipt."""
        return self._load(STATE, self._files())

    def backbone_state(self) -> dict[str, torch.Tensor]:
        """The state of the backbone alone, under its own names. Raises UserError when it does not match its receipt."""
        network = self.state()["network"]
        return {
            name.removeprefix("backbone."): v for name, v in network.items() if name.startswith("backbone.")
        }

    def crc32(self) -> int:
        """The checksum of the state of the network, from its receipt."""
        return int(self._files()[STATE]["crc32"])

    def _files(self) -> dict[str, dict[str, int]]:
        """Sizes and checksums from the receipts of all workers, by file."""
        files: dict[str, dict[str, int]] = {}
        for rank in range(self.world):
            name = _receipt(rank, self.world)
            try:
                files.update(self.folder.read_json(name)["files"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise self._damaged(name, str(error)) from error
        if STATE not in files:
            raise self._damaged(STATE, "no receipt names it")
        return files

    def _load(self, name: str, files: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
        num_bytes, crc32 = files[name]["bytes"], files[name]["crc32"]
        try:
            data = self.folder.read(name)
        except OSError as error:
            raise self._damaged(name, str(error)) from error
        if len(data) != num_bytes or zlib.crc32(data) != crc32:
            raise self._damaged(
                name, f"it has {len(data)} bytes and was written with {num_bytes}, or its checksum differs"
            )
        loaded: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return loaded

    def _damaged(self, name: str, why: str) -> UserError:
        return UserError(
            f"The file {name!r} of the checkpoint {str(self.folder)!r} is damaged: {why}. Delete this checkpoint's "
            "folder; the same command then goes on from the one before."
        )


def complete(folder: Folder) -> list[Checkpoint]:
    """The complete checkpoints in a folder, oldest first."""
    return [found for step in _steps(folder) if (found := _complete(folder, step))]


def newest(folder: Folder) -> Checkpoint | None:
    """The newest complete checkpoint, or None."""
    return next((found for step in reversed(_steps(folder)) if (found := _complete(folder, step))), None)


def _name(step: int) -> str:
    return f"step-{step:09d}"


def _receipt(rank: int, world: int) -> str:
    return f"receipt-{rank:04d}-of-{world:04d}.json"


def _steps(folder: Folder) -> list[int]:
    """Steps of all checkpoints, complete or not, in order; other names in the folder do not matter."""
    return sorted(int(found[1]) for name in folder.list() if (found := re.fullmatch(r"step-(\d{9,})", name)))


def _complete(folder: Folder, step: int) -> Checkpoint | None:
    names = set((folder / _name(step)).list())
    # A worker that was killed may have left a temporary file beside its receipt.
    found = [re.fullmatch(r"receipt-\d{4,}-of-(\d{4,})\.json", name) for name in names]
    for world in sorted({int(match[1]) for match in found if match}):
        if all(_receipt(rank, world) in names for rank in range(world)):
            return Checkpoint(folder / _name(step), step, world)
    return None


class Saver:
    """Writes the checkpoints of one worker in a thread, one at a time, and deletes those that are past keeping.

    Args:
        folder: of the run's checkpoints.
        config: see `SaveConfig`.
        rank: this worker.
        world: number of workers.
        clock: seconds; an argument so that a test can turn it.
    """

    def __init__(
        self,
        folder: Folder,
        config: SaveConfig,
        rank: int,
        world: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = folder
        self.config = config
        self.rank = rank
        self.world = world
        self._clock = clock
        self._saved_at = clock()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def since_s(self) -> float:
        """Seconds since the last save began, or since the start."""
        return self._clock() - self._saved_at

    def due(self, step: int, since_s: float) -> bool:
        """Whether to save after `step` steps. All workers must give the same `since_s`."""
        by_steps = self.config.every_steps > 0 and step % self.config.every_steps == 0
        by_time = self.config.every_minutes > 0 and since_s >= self.config.every_minutes * 60
        return by_steps or by_time

    def save(self, step: int, state: Mapping[str, Any] | None, bank: Mapping[str, Any] | None) -> None:
        """Takes a copy of the state and writes it in the background; waits for the save before, if it still runs.

        Args:
            step: steps that are done.
            state: of the network; rank 0 gives it.
            bank: this worker's part; None when another worker has written it or there is none.

        Raises:
            UserError: the save before failed, for example because the disk is full.
        """
        self.wait()
        self._saved_at = self._clock()
        files: dict[str, Any] = {}
        if state is not None:
            files[STATE] = _copy(state)
        if bank is not None:
            files[f"bank-{self.rank:04d}-of-{self.world:04d}.pt"] = _copy(bank)
        self._thread = threading.Thread(target=self._write, args=(step, files), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns when nothing is being written. Raises what the last save raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, step: int, files: Mapping[str, Any]) -> None:
        try:
            target = self.folder / _name(step)
            # A session that was killed here may have left a receipt for files that are now written anew.
            target.delete(_receipt(self.rank, self.world))
            receipt = {}
            for name, value in files.items():
                data = _bytes(value)
                target.write(name, data)
                receipt[name] = {"bytes": len(data), "crc32": zlib.crc32(data)}
            target.write_json(_receipt(self.rank, self.world), {"files": receipt})
            self._delete_old(step)
        except BaseException as error:
            self._error = error

    def _delete_old(self, step: int) -> None:
        """Deletes what is past keeping, and half checkpoints before `step`, once `step` is complete.

        The worker that writes the last receipt does it: before that, others may still be writing. Two that finish
        together may delete the same, which does no harm.
        """
        done = [c.step for c in complete(self.folder)]
        if step not in done:
            return
        keep = set(done[-self.config.keep_last :])
        if self.config.keep_every:
            keep |= {s for s in done if s % self.config.keep_every == 0}
        for old in _steps(self.folder):
            if old < step and old not in keep:
                with contextlib.suppress(FileNotFoundError):
                    self._delete(self.folder / _name(old))

    def _delete(self, checkpoint: Folder) -> None:
        """Deletes the receipts first, so that what is left after an interruption is not taken for a checkpoint."""
        for name in checkpoint.list():
            if name.startswith("receipt-"):
                checkpoint.delete(name)
        checkpoint.delete()


def _copy(value: Any) -> Any:
    """The value with every tensor copied to the CPU, so that training may go on while it is written."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copy(item) for item in value)
    return value


def _bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()

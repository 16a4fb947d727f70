"""Checkpoints: what is saved, when, and which one a run goes on from.

A checkpoint is a folder `step-000000123` with the state of the network and the parts of the memory bank. Every worker
writes its own files and then a receipt with their sizes and checksums; a checkpoint counts only when the receipts of
all workers are there and match. So no worker waits for another, and whatever is killed, half a checkpoint is never
mistaken for a whole one.
"""

from __future__ import annotations

import io
import threading
import time
import zlib
from collections.abc import Callable, Mapping
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
        every_minutes: save when this much time has passed, looked at when metrics are logged; 0 for never by time.
        keep_last: newest checkpoints to keep.
        keep_every: besides them, keep those whose step is a multiple of this; 0 for none.
    """

    every_steps: int = 0
    every_minutes: float = 5
    keep_last: int = 2
    keep_every: int = 0

    def __post_init__(self) -> None:
        for name in ("every_steps", "every_minutes", "keep_every"):
            if getattr(self, name) < 0:
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

    def load(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The state of the network, and the parts of the memory bank (none without a bank), on the CPU.

        Raises:
            UserError: a file does not match its receipt.
        """
        receipts = [self.folder.read_json(_receipt(rank, self.world)) for rank in range(self.world)]
        banks = [name for receipt in receipts for name in sorted(receipt["files"]) if name != STATE]
        state = self._load(STATE, receipts)
        return state, [self._load(name, receipts) for name in banks]

    def _load(self, name: str, receipts: list[dict[str, Any]]) -> dict[str, Any]:
        data = self.folder.read(name)
        expected = next(r["files"][name] for r in receipts if name in r["files"])
        if len(data) != expected["bytes"] or zlib.crc32(data) != expected["crc32"]:
            raise UserError(
                f"The file {name!r} of the checkpoint {str(self.folder)!r} is damaged: it has {len(data)} bytes and "
                f"was written with {expected['bytes']}, or its checksum differs. Delete this checkpoint's folder; the "
                "same command then goes on from the one before."
            )
        loaded: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return loaded


def complete(folder: Folder) -> list[Checkpoint]:
    """The complete checkpoints in a folder, oldest first."""
    found = []
    for name in folder.list():
        if name.startswith("step-") and (checkpoint := _complete(folder / name, int(name[5:]))):
            found.append(checkpoint)
    return found


def newest(folder: Folder) -> Checkpoint | None:
    """The newest complete checkpoint, or None."""
    for name in reversed(folder.list()):
        if name.startswith("step-") and (checkpoint := _complete(folder / name, int(name[5:]))):
            return checkpoint
    return None


def _receipt(rank: int, world: int) -> str:
    return f"receipt-{rank:04d}-of-{world:04d}.json"


def _complete(folder: Folder, step: int) -> Checkpoint | None:
    names = set(folder.list())
    for world in sorted({int(name[-9:-5]) for name in names if name.startswith("receipt-")}):
        if all(_receipt(rank, world) in names for rank in range(world)):
            return Checkpoint(folder, step, world)
    return None


class Saver:
    """Writes the checkpoints of one worker in a thread, one at a time, and deletes those that are past keeping.

    Args:
        folder: of the run's checkpoints.
        config: see `SaveConfig`.
        rank: this worker; rank 0 writes the state and does the deleting.
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
            target = self.folder / f"step-{step:09d}"
            receipt = {}
            for name, value in files.items():
                data = _bytes(value)
                target.write(name, data)
                receipt[name] = {"bytes": len(data), "crc32": zlib.crc32(data)}
            target.write_json(_receipt(self.rank, self.world), {"files": receipt})
            if self.rank == 0:
                self._delete_old(step)
        except BaseException as error:
            self._error = error

    def _delete_old(self, step: int) -> None:
        """Deletes older checkpoints when enough complete ones exist; never the newest complete one."""
        done = [c.step for c in complete(self.folder)]
        keep = set(done[-self.config.keep_last :]) | {step}
        if self.config.keep_every:
            keep |= {s for s in done if s % self.config.keep_every == 0}
        for name in self.folder.list():
            old = int(name[5:]) if name.startswith("step-") else step
            if old < min(done, default=0) or (old < step and old not in keep):
                self.folder.delete(name)


def _copy(value: Any) -> Any:
    """The value with every tensor copied to the CPU, so that training may go on while it is written."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copy(item) for item in value]
    return value


def _bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()

"""Write checkpoints, and find the one that a run resumes from.

A checkpoint is a folder `step-000000123` with the state of the network and the parts of the memory bank. Every worker
writes its own files and then a manifest with their sizes and checksums. A checkpoint is complete when the manifests of
all workers exist. So no worker waits for another, and an interrupted checkpoint is never taken for a complete one.
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
from typing import Annotated, Any

import numpy as np
import torch

from raysl.errors import UserError, counted
from raysl.fields import Bounds, Checked
from raysl.storage import Folder
from raysl.storage.records import verified, write_record

STATE = "state.pt"
# Integers that a manifest holds for every file.
_REQUIRED = ("bytes", "crc32")
# Rows of a bank are written and read in chunks with a checksum each, and other threads run between them.
_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class SaveConfig(Checked):
    """When checkpoints are written and which are kept. The last step is always saved.

    Args:
        every_steps: steps between checkpoints; 0 to save by time only.
        every_minutes: minutes between checkpoints, checked every few seconds; 0 to save by steps only.
        keep_last: number of newest checkpoints to keep.
        keep_every: also keep the checkpoints whose step is a multiple of this number; 0 for none.
        keep_steps: also keep the checkpoints of these steps.
    """

    every_steps: Annotated[int, Bounds(low=0)] = 0
    every_minutes: Annotated[float, Bounds(0, 1e6)] = 5
    keep_last: Annotated[int, Bounds(low=1)] = 2
    keep_every: Annotated[int, Bounds(low=0)] = 0
    keep_steps: Annotated[tuple[int, ...], Bounds(low=0)] = ()

    def describe(self) -> str:
        """Return when checkpoints are saved, as a clause."""
        minutes = f"every {self.every_minutes:g} minutes, by --save.every-minutes"
        steps = f"every {counted(self.every_steps, 'step')}, by --save.every-steps"
        times = ([minutes] if self.every_minutes > 0 else []) + ([steps] if self.every_steps > 0 else [])
        return f"one is saved {' and '.join(times) or 'only at the end'}"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, after `step` steps, by `world` workers."""

    folder: Folder
    step: int
    world: int

    def load(
        self, first: int = 0, last: int | None = None
    ) -> tuple[dict[str, Any], Iterator[dict[str, Any]]]:
        """Load the state of the network, and the parts of the memory bank (none without a bank), on the CPU.

        The parts are read one at a time, when they are needed: no worker keeps the whole bank.

        Args:
            first: first row of the bank that is read. A part holds only those of its rows that are asked for.
            last: one past the last row; None for all.

        Raises:
            UserError: a file is missing or does not match its manifest; for a part, when it is read.
        """
        files = self._read_manifests()
        banks = sorted(name for name in files if name != STATE)
        return self._read_state(files), (self._read_rows(name, files[name], first, last) for name in banks)

    def state(self) -> dict[str, Any]:
        """Load the state of the network, on the CPU. Raise UserError when it does not match its manifest."""
        return self._read_state(self._read_manifests())

    def network(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state dict of the network in a state of this checkpoint. Raise UserError if there is none.

        Its values are tensors, and what modules add to them by `get_extra_state`.
        """
        found = state.get("network")
        if not isinstance(found, dict) or not all(
            isinstance(value, torch.Tensor) or str(name).endswith("_extra_state")
            for name, value in found.items()
        ):
            raise self._damaged(STATE, "it holds no network")
        return found

    def backbone_state(self, prefix: str = "backbone.") -> dict[str, Any]:
        """Load the state of the backbone, under its own names.

        Args:
            prefix: what the names of the backbone begin with; a moving copy in an objective has another.

        Raises:
            UserError: the state does not match its manifest, or has values that are not finite.
        """
        network = self.network(self.state())
        found = {name.removeprefix(prefix): v for name, v in network.items() if name.startswith(prefix)}
        tensors = {name: v for name, v in found.items() if isinstance(v, torch.Tensor)}
        if bad := next((name for name, v in tensors.items() if not v.isfinite().all()), None):
            raise UserError(
                f"The checkpoint {str(self.folder)!r} holds values of {bad!r} that are not finite, so its features "
                "would mean nothing. Use an earlier checkpoint, or train again with a lower --optim.lr."
            )
        return found

    def fill(self, module: torch.nn.Module, tensors: Mapping[str, Any]) -> None:
        """Load tensors of this checkpoint into a module. Raise UserError if they do not fit it."""
        try:
            module.load_state_dict(tensors)
        except (RuntimeError, KeyError, TypeError, AttributeError) as error:  # also of extra states
            why = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
            found = (
                f"its tensors do not fit the network of the run ({why}), or another version of raysl wrote it"
            )
            raise self._damaged(STATE, found) from error

    def crc32(self) -> int:
        """Return the checksum of the state of the network, from its manifest."""
        return int(self._read_manifests()[STATE]["crc32"])

    def _read_manifests(self) -> dict[str, dict[str, Any]]:
        """Read sizes and checksums from the manifests of all workers, by file."""
        files: dict[str, dict[str, Any]] = {}
        for rank in range(self.world):
            name = _manifest_name(rank, self.world)
            try:
                listed = verified(self.folder.read_json(name))["files"]
                files |= {
                    key: {**entry, **{field: int(entry[field]) for field in _REQUIRED}}
                    for key, entry in listed.items()
                }
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise self._damaged(name, str(error)) from error
        if STATE not in files:
            raise self._damaged(STATE, "no manifest names it")
        return files

    def _read_state(self, files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        num_bytes, crc32 = files[STATE]["bytes"], files[STATE]["crc32"]
        try:
            data = self.folder.read(STATE)
        except OSError as error:
            raise self._damaged(STATE, str(error)) from error
        if len(data) != num_bytes or zlib.crc32(data) != crc32:
            raise self._damaged(
                STATE, f"it has {len(data)} bytes and was written with {num_bytes}, or its checksum differs"
            )
        try:
            loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # of many kinds; a forged file may have a valid checksum
            raise self._damaged(STATE, "it holds something other than tensors and plain values") from error
        if not isinstance(loaded, dict):
            raise self._damaged(STATE, "it holds no state")
        return loaded

    def _read_rows(self, name: str, entry: Mapping[str, Any], first: int, last: int | None) -> dict[str, Any]:
        """Load a part of the bank, as `MemoryBank.state`, with those of its rows that lie in first .. last - 1."""
        try:
            start = min(max(first, entry["first"]), entry["last"])
            stop = max(start, entry["last"] if last is None else min(last, entry["last"]))
            rows_nd = torch.empty(stop - start, entry["dim"], dtype=getattr(torch, entry["dtype"]))
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise self._damaged(name, "its manifest does not describe rows of a bank") from error
        wanted = rows_nd.view(-1).view(torch.uint8).numpy()
        row_bytes = entry["dim"] * rows_nd.element_size()
        begin, end = (start - entry["first"]) * row_bytes, (stop - entry["first"]) * row_bytes
        for number in range(begin // _CHUNK_BYTES, -(-end // _CHUNK_BYTES) if begin < end else 0):
            offset = number * _CHUNK_BYTES
            try:
                (chunk,) = self.folder.read_ranges(name, [(offset, _CHUNK_BYTES)], expected=False)
            except OSError as error:
                raise self._damaged(name, str(error)) from error
            if zlib.crc32(chunk) != entry["chunks"][number]:
                raise self._damaged(name, f"the checksum of its rows from byte {offset} on differs")
            piece = chunk[max(begin - offset, 0) : end - offset]
            wanted[max(offset - begin, 0) :][: len(piece)] = np.frombuffer(piece, np.uint8)
        return {"first": start, "last": stop, "num_images": entry["num_images"], "rows_nd": rows_nd}

    def _damaged(self, name: str, why: str) -> UserError:
        return UserError(
            f"The file {name!r} of the checkpoint {str(self.folder)!r} is damaged: {why}. Delete the folder of this "
            "checkpoint; the same command then resumes from the one before, or begins again without one."
        )


def complete(folder: Folder) -> list[Checkpoint]:
    """Return the complete checkpoints in a folder, oldest first."""
    return [found for step in _steps(folder) if (found := checkpoint_of_step(folder, step))]


def newest_checkpoint(folder: Folder) -> Checkpoint | None:
    """Return the newest complete checkpoint, or None."""
    return next(
        (found for step in reversed(_steps(folder)) if (found := checkpoint_of_step(folder, step))), None
    )


def newest_step(folder: Folder) -> int:
    """Return the step of the newest complete checkpoint; 0 without one."""
    found = newest_checkpoint(folder)
    return found.step if found else 0


def delete_after(folder: Folder, step: int) -> None:
    """Delete the checkpoints after `step`. After the newest complete checkpoint, all others are incomplete.

    If they stayed, the manifest of a killed worker could make a checkpoint seem complete while it is written again.
    """
    for later in _steps(folder):
        if later > step:
            _delete(folder / _folder_name(later))


def _folder_name(step: int) -> str:
    return f"step-{step:09d}"


def _manifest_name(rank: int, world: int) -> str:
    return f"manifest-{rank:04d}-of-{world:04d}.json"


def _steps(folder: Folder) -> list[int]:
    """Return the steps of all checkpoints, complete or not, in order. Other names in the folder are ignored."""
    return sorted(int(found[1]) for name in folder.list() if (found := re.fullmatch(r"step-(\d{9,})", name)))


def checkpoint_of_step(folder: Folder, step: int) -> Checkpoint | None:
    """Return the checkpoint of a step if it is complete."""
    names = set((folder / _folder_name(step)).list())
    # A killed worker may have left a temporary file beside its manifest.
    found = [re.fullmatch(r"manifest-\d{4,}-of-(\d{4,})\.json", name) for name in names]
    for world in sorted({int(match[1]) for match in found if match}):
        if all(_manifest_name(rank, world) in names for rank in range(world)):
            return Checkpoint(folder / _folder_name(step), step, world)
    return None


class Saver:
    """Write the checkpoints of one worker in a thread, one at a time, and delete old ones.

    Args:
        clock: returns seconds; an argument for tests.
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
        """Return whether to save after `step` steps. All workers must give the same `since_s`."""
        by_steps = self.config.every_steps > 0 and step % self.config.every_steps == 0
        by_time = self.config.every_minutes > 0 and since_s >= self.config.every_minutes * 60
        return by_steps or by_time

    def save(self, step: int, state: Mapping[str, Any] | None, bank: Mapping[str, Any] | None) -> None:
        """Copy the state and write it in the background. Wait for the previous save first.

        Args:
            step: number of steps that are done.
            state: state of the network, from rank 0.
            bank: this worker's part of the bank, from `MemoryBank.state`; None when another worker writes it or there
                is none.

        Raises:
            UserError: the previous save failed, for example because the disk is full.
        """
        self.wait()
        self._saved_at = self._clock()
        files: dict[str, Any] = {}
        if state is not None:
            files[STATE] = _copy(state)
        if bank is not None:
            files[f"bank-{self.rank:04d}-of-{self.world:04d}.rows"] = _copy(bank)
        self._thread = threading.Thread(target=self._write, args=(step, files), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the last save is written. Raise its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, step: int, files: Mapping[str, Any]) -> None:
        try:
            target = self.folder / _folder_name(step)
            # A killed session may have left a manifest of the files that are now overwritten.
            target.delete(_manifest_name(self.rank, self.world))
            manifest: dict[str, dict[str, Any]] = {}
            for name, value in files.items():
                if name != STATE:
                    manifest[name] = _write_rows(target, name, value)
                    continue
                buffer = io.BytesIO()
                torch.save(value, buffer)
                data = buffer.getvalue()
                target.write(name, data)
                manifest[name] = {"bytes": len(data), "crc32": zlib.crc32(data)}
            write_record(target, _manifest_name(self.rank, self.world), {"files": manifest})
            self._delete_old(step)
        except BaseException as error:
            self._error = error

    def _delete_old(self, step: int) -> None:
        """Delete old checkpoints, and incomplete ones before `step`, once `step` is complete.

        Only the worker that writes the last manifest does it: before, others may still be writing. Two workers that
        finish together may delete the same folders, which is harmless.
        """
        done = [c.step for c in complete(self.folder)]
        if step not in done:
            return
        keep = {*done[-self.config.keep_last :], *self.config.keep_steps}
        if self.config.keep_every:
            keep |= {s for s in done if s % self.config.keep_every == 0}
        for old in _steps(self.folder):
            if old < step and old not in keep:
                with contextlib.suppress(FileNotFoundError):
                    _delete(self.folder / _folder_name(old))


def _delete(checkpoint: Folder) -> None:
    """Delete the manifests first, so that an interruption leaves no checkpoint that seems complete."""
    for name in checkpoint.list():
        if name.startswith("manifest-"):
            checkpoint.delete(name)
    checkpoint.delete()


def _copy(value: Any) -> Any:
    """Copy every tensor to the CPU, so that training continues during the save."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copy(item) for item in value)
    return value


def _write_rows(folder: Folder, name: str, bank: Mapping[str, Any]) -> dict[str, Any]:
    """Write the rows of a part of the bank, and return the entry of the file in the manifest.

    Writing and checksums of a chunk do not hold Python's lock, and no second copy of the rows is made.
    """
    rows_nd = bank["rows_nd"].contiguous().numpy()
    data = memoryview(rows_nd).cast("B") if rows_nd.size else memoryview(b"")
    chunks, crc32 = [], 0
    with folder.writing(name) as stream:
        for start in range(0, len(data), _CHUNK_BYTES):
            chunk = data[start : start + _CHUNK_BYTES]
            stream.write(chunk)
            chunks.append(zlib.crc32(chunk))
            crc32 = zlib.crc32(chunk, crc32)
    entry = {"bytes": len(data), "crc32": crc32, "chunks": chunks}
    entry |= {key: bank[key] for key in ("first", "last", "num_images")}
    return {**entry, "dim": rows_nd.shape[1], "dtype": str(rows_nd.dtype)}

"""Make the batches of a stream in child processes of this one, without Ray.

The processes are forked, so they start at once and share the memory of imported libraries, as those of torch's
DataLoader do on Linux. Each takes every n-th block of the plan and sends its batches through a pipe. A process that is
a block ahead, or has sent its share of `_PREFETCH_BYTES`, waits until its pipe is read.

The processes ignore the stop signals of a terminal, since a run needs batches until it has saved. They end when the
pipes are closed, which also happens when this process is killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import itertools
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from io import BufferedReader, BufferedWriter
from typing import Any

import numpy as np
import torch

from raysl.errors import STOP_SIGNALS, UserError
from raysl.stream.reader import Columns, Stream, load, step_blocks

_PREFETCH_BYTES = 256 << 20
# Linux's default of 64 KB would switch between the processes for every piece of that size.
_PIPE_BYTES = 1 << 20
_ENDED = (
    "A data process ended unexpectedly, perhaps because the machine has too little memory. The same command resumes "
    "from the last checkpoint."
)


class DataProcesses:
    """Data processes that serve one stream after another, for the duration of a `with` block.

    They are best started before large tensors exist: memory that this process changes after a fork is held twice. With
    0 processes, a thread of this process makes the batches.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._processes: list[_Process] = []

    def __enter__(self) -> DataProcesses:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()

    def _start(self) -> None:
        # Elsewhere a fork is not safe in a process with threads, and a thread of this process makes the batches.
        if sys.platform == "linux":
            self._processes = [_Process() for _ in range(self._count)]

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        self._processes = []

    def columns(self, stream: Stream, start: int, end: int) -> Iterator[Columns]:
        """Yield the columns of steps start .. end - 1 of a stream, as `Stream.columns` does.

        Raises:
            UserError: a shard of the data set is damaged, or a process has failed.
        """
        if not self._processes:
            self._start()
        count = len(self._processes) or 1
        if self._processes:
            sources = [
                process.run((stream, start, end, number, count))
                for number, process in enumerate(self._processes)
            ]
        else:
            sources = [_load_share(stream, start, end, 0, 1)]
        # While the batches of a process are taken, the others make their blocks.
        max_batches = stream.plan.steps_per_block if count > 1 else 0
        prefetchers = [_Prefetcher(source, max_batches, _PREFETCH_BYTES // count) for source in sources]
        try:
            for block_number, block in enumerate(step_blocks(stream.plan, start, end)):
                for _ in block:
                    yield prefetchers[block_number % count].take()
        except BaseException:  # Also when the caller takes no more.
            self._kill()
            raise
        finally:
            for prefetcher in prefetchers:
                prefetcher.close()


def _load_share(stream: Stream, start: int, end: int, number: int, count: int) -> Iterator[Columns]:
    """Yield the batches of the blocks whose number modulo `count` is `number`."""
    return load(stream, itertools.islice(step_blocks(stream.plan, start, end), number, None, count))


class _Prefetcher:
    """A thread that reads from an iterator in advance, within limits of number and size; two batches in any case."""

    def __init__(self, source: Iterator[Columns], max_batches: int, max_bytes: int) -> None:
        self._source = source
        self._max_batches = max_batches
        self._max_bytes = max_bytes
        self._queue: queue.Queue[Columns | BaseException] = queue.Queue(2)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for columns in self._source:
                self._queue.put(columns)
                size = sum(values.nbytes for values in columns.values())
                self._queue.maxsize = max(2, min(self._max_batches, self._max_bytes // max(1, size)))
        except BaseException as error:
            self._queue.put(error)

    def take(self) -> Columns:
        """Return the next batch, or raise the error of the iterator."""
        found = self._queue.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def close(self) -> None:
        """Wait until the thread ends, which needs the end of its iterator."""
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._queue.get(timeout=0.05)


class _Process:
    """A forked process that makes the batches of the steps it is sent."""

    def __init__(self) -> None:
        requests, self._requests = _pipe()
        self._batches, batches = _pipe()
        # Blocked until the child ignores them: otherwise it could run the handlers of this process.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            with warnings.catch_warnings():
                # Python warns of threads that hold locks; the child takes none that another thread may hold.
                warnings.simplefilter("ignore", DeprecationWarning)
                self._pid = os.fork()
            if self._pid == 0:
                self._requests.close()
                self._batches.close()
                _serve(requests, batches)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        requests.close()
        batches.close()

    def run(self, request: tuple[Stream, int, int, int, int]) -> Iterator[Columns]:
        """Yield the columns of `_load_share(*request)`. Raises as `DataProcesses.columns`."""
        try:
            pickle.dump(request, self._requests)
            self._requests.flush()
        except BrokenPipeError as error:
            raise UserError(_ENDED) from error
        while (columns := self._receive()) is not None:
            yield columns

    def _receive(self) -> Columns | None:
        try:
            received: Columns | UserError | str | None = pickle.load(self._batches)
        except (EOFError, pickle.UnpicklingError) as error:
            raise UserError(_ENDED) from error
        if isinstance(received, UserError):
            raise received
        if isinstance(received, str):
            raise UserError(f"A data process failed:\n\n{received}")
        return received

    def kill(self) -> None:
        """End the process."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = 0
            with contextlib.suppress(OSError):  # a request that the process has not read
                self._requests.close()


def _pipe() -> tuple[BufferedReader, BufferedWriter]:
    """Return the end to read from and the end to write to."""
    read, write = os.pipe()
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # The limit of a user may be lower.
            fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    return os.fdopen(read, "rb"), os.fdopen(write, "wb")


def _serve(requests: BufferedReader, batches: BufferedWriter) -> None:
    """Run the forked process: make the batches that are asked for. It does not return."""
    try:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        # Finalizers of objects of the parent must not run here.
        gc.freeze()
        # OpenMP's threads do not survive a fork, and one thread is what a data task of Ray has.
        torch.set_num_threads(1)
        while True:
            request = pickle.load(requests)
            try:
                for columns in _load_share(*request):
                    _send(batches, {name: np.ascontiguousarray(values) for name, values in columns.items()})
                _send(batches, None)
            except UserError as error:
                _send(batches, error)
            except BrokenPipeError:
                raise
            except Exception:
                _send(batches, traceback.format_exc())
    finally:
        os._exit(0)


def _send(batches: BufferedWriter, value: Any) -> None:
    pickle.dump(value, batches, protocol=5)  # Writes and reads arrays without a copy.
    batches.flush()

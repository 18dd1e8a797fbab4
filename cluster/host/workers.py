"""A small pool of threads for calls that block: syncs, reads that miss the page cache.

Results come back on the loop's thread. Nothing here keeps an order between calls.
"""

from __future__ import annotations

import errno
import functools
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Protocol, TypeAlias, TypeVar

from sheepdog.cluster.host.aligned import AlignedMemory
from sheepdog.cluster.host.disk import Disk

_T = TypeVar("_T")
CallSoon: TypeAlias = Callable[[Callable[[], None]], None]
"""Schedules a call on the loop's thread; may be used from any thread."""
Synced: TypeAlias = Callable[[OSError | None], None]
"""Gets the error, or None when it is on the disk."""

THREADS = 4  # syncs of four files at a time keep a disk's queue filled; more only add switching
_Job: TypeAlias = Callable[[], None]


class Workers(Protocol):
    """Runs blocking calls."""

    def sync(self, disk: Disk, fd: int, done: Synced) -> None:
        """`disk.fdatasync`: what was written before this call is on the disk when `done` gets None."""

    def write_durably(self, disk: Disk, fd: int, memory: AlignedMemory, length: int, offset: int, done: Synced) -> None:
        """The first `length` bytes of `memory` are on the disk at `offset` when `done` gets None."""

    def run(self, call: Callable[[], _T], done: Callable[[_T | OSError], None]) -> None:
        """`done` gets the result of `call`, or the `OSError` it raised, on the loop's thread."""

    def stop(self) -> None:
        """Finishes what was handed over, then ends the threads."""


class ThreadWorkers:
    """Workers made of threads, started when first needed."""

    def __init__(self, call_soon: CallSoon, threads: int = THREADS) -> None:
        self._call_soon = call_soon
        self._limit = threads
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._outstanding = 0

    def run(self, call: Callable[[], _T], done: Callable[[_T | OSError], None]) -> None:
        def job() -> None:
            result: _T | OSError
            try:
                result = call()
            except OSError as error:
                result = error
            except BaseException as error:
                self._call_soon(functools.partial(_raise, error))  # a bug: it belongs to the loop, not to a thread
                return
            self._call_soon(lambda: self._finish(done, result))

        self._outstanding += 1
        if len(self._threads) < min(self._outstanding, self._limit):
            thread = threading.Thread(target=self._work, name=f"store-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._jobs.put(job)

    def sync(self, disk: Disk, fd: int, done: Synced) -> None:
        self.run(lambda: disk.fdatasync(fd), done)

    def write_durably(self, disk: Disk, fd: int, memory: AlignedMemory, length: int, offset: int, done: Synced) -> None:
        self.run(lambda: write_and_sync(disk, fd, memory.view[:length], offset), done)

    def stop(self) -> None:
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _finish(self, done: Callable[[_T | OSError], None], result: _T | OSError) -> None:
        self._outstanding -= 1
        done(result)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


def write_and_sync(disk: Disk, fd: int, data: memoryview, offset: int) -> None:
    """All or OSError."""
    if disk.pwrite(fd, data, offset) != len(data):
        raise OSError(errno.EIO, "written in part")
    disk.fdatasync(fd)


def _raise(error: BaseException) -> None:
    raise error

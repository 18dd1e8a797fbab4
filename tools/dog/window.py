"""Several large requests under way at once, their outcomes in order: what moves the bytes of volumes runs through here.

While one request waits for the cluster, another is sent and a third prepared; copies and checksums of different
requests run on different cores, since Python's lock is not held during them.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from io import BufferedIOBase
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Generic, TypeVar, cast

from sheepdog.cluster.core.messages import Buffer

Outcome = TypeVar("Outcome")

WIDTH = 4  # requests under way: every node of a small cluster has one; 16 MiB here and in the gateway
CHUNK_BYTES = 4 << 20  # of one request: an object of the usual size
LEAVE_S = 5.0  # wait for what is under way when the command ends early: longer than any request of a healthy cluster
_COMPARED_BYTES = 64 << 10  # copied and compared at a time: stays in the processor's cache


class _Job(Generic[Outcome]):
    """One call, from its start to its outcome."""

    def __init__(self, call: Callable[[], Outcome]) -> None:
        self._call = call
        self._outcome: list[Outcome] = []
        self._error: BaseException | None = None
        self._over = Lock()
        self._over.acquire()

    def run(self) -> None:
        try:
            self._outcome.append(self._call())
        except BaseException as error:  # raised again where the outcome is wanted
            self._error = error
        self._over.release()

    def outcome(self) -> Outcome:
        self._over.acquire()
        if self._error is not None:
            raise self._error
        return self._outcome.pop()

    def wait(self, seconds: float) -> None:
        self._over.acquire(timeout=max(0.0, seconds))


def in_order(calls: Iterable[Callable[[], Outcome]], width: int = WIDTH) -> Iterator[Outcome]:
    """The outcomes of calls in their order, at most `width` of them begun and not taken.

    The calls run in threads; drawing them from the iterable and taking their outcomes is the caller's thread. Call
    number n + width is drawn when whoever took outcome n asks for the next: the two may share a buffer. The first
    error in order is raised, when nothing is under way any more; no later call is begun.
    """
    jobs: SimpleQueue[_Job[Outcome] | None] = SimpleQueue()
    flight: deque[_Job[Outcome]] = deque()
    threads = 0
    try:
        for call in calls:
            if threads < width:
                threads += 1
                Thread(target=_work, args=(jobs,), daemon=True).start()  # a hung gateway does not keep the process
            job = _Job(call)
            flight.append(job)
            jobs.put(job)
            if len(flight) == width:
                yield flight.popleft().outcome()
        while flight:
            yield flight.popleft().outcome()
    finally:
        for _ in range(threads):
            jobs.put(None)
        deadline = time.monotonic() + LEAVE_S
        for job in flight:
            job.wait(deadline - time.monotonic())


def _work(jobs: SimpleQueue[_Job[Outcome] | None]) -> None:
    while job := jobs.get():
        job.run()
        del job  # and with it what the call held


def run_all(calls: Iterable[Callable[[], object]], width: int = WIDTH) -> None:
    """`in_order` for calls whose outcomes nobody wants."""
    for _ in in_order(calls, width):
        pass


def buffers(width: int = WIDTH, size: int = CHUNK_BYTES) -> Iterator[memoryview]:
    """Buffers for the calls of `in_order`, each used again `width` calls later."""
    made: list[memoryview] = []
    while len(made) < width:
        made.append(memoryview(bytearray(size)))
        yield made[-1]
    while True:
        yield from made


def standard_input() -> BufferedIOBase:
    """The bytes of stdin; `readinto` fills a buffer unless they end."""
    return cast("BufferedIOBase", sys.stdin.buffer)


def unequal_range(first: Buffer, second: Buffer, unit: int) -> tuple[int, int]:
    """The range of whole units in which two buffers of equal length differ; (n, n) if they do not."""
    size = len(second)
    start = _equal_units(first, second, range(0, size, _COMPARED_BYTES), _COMPARED_BYTES)
    start = _equal_units(first, second, range(start, min(start + _COMPARED_BYTES, size), unit), unit)
    if start >= size:
        return size, size
    last = size - 1
    backwards = range(last // _COMPARED_BYTES * _COMPARED_BYTES, -1, -_COMPARED_BYTES)
    block = _equal_units(first, second, backwards, _COMPARED_BYTES)
    within = range((min(block + _COMPARED_BYTES, size) - 1) // unit * unit, -1, -unit)
    return start, min(_equal_units(first, second, within, unit) + unit, size)


def _equal_units(first: Buffer, second: Buffer, starts: range, unit: int) -> int:
    """The first of `starts` at which a unit differs; the end of the range if none does."""
    for start in starts:
        if bytes(first[start : start + unit]) != bytes(second[start : start + unit]):
            return start
    return starts.stop


def is_zero(data: Buffer) -> bool:
    """True if there is nothing but zeros."""
    zeros = bytes(_COMPARED_BYTES)
    for start in range(0, len(data), _COMPARED_BYTES):
        part = bytes(data[start : start + _COMPARED_BYTES])
        if part != (zeros if len(part) == _COMPARED_BYTES else bytes(len(part))):
            return False
    return True

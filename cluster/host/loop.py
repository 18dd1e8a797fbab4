"""The daemon's one event loop, and what makes CPython fast enough for it.

One thread does all work except what blocks. A turn is one pass of the asyncio loop over everything that became
ready; what many callbacks of a turn ask for once (flush a socket, append to the journal) happens at its end.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import gc
import os
import re
import resource
import selectors
from collections.abc import Callable, Mapping
from contextvars import Context
from functools import partial
from typing import TYPE_CHECKING, TypeVarTuple

from sheepdog.cluster.core.errors import UsageError
from sheepdog.cluster.core.ports import Log
from sheepdog.cluster.host.turn import BusyPoll, Poller, Turn

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

BUSY_POLL_VARIABLE = "SHEEPDOG_BUSY_POLL_US"
BUSY_POLL_S = 200e-6  # a write of depth 1 comes back to each of its nodes sooner
MAX_BUSY_POLL_US = 10_000
COLLECT_CHECK_S = 1.0  # how often the collector asks whether the node is idle
COLLECT_IDLE_TURNS = 50  # fewer turns than this in one check are idleness: heartbeats and timers
COLLECT_BUSY_CHECKS = (
    5  # collect young objects at least this often under load: a cycle that holds megabytes must not last
)
COLLECT_FULL_CHECKS = 600  # checks between two full collections
MMAP_THRESHOLD_BYTES = 32 << 20  # the most glibc accepts: memory for bodies is kept, not unmapped and faulted in again
TRIM_THRESHOLD_BYTES = 256 << 20  # free memory at the heap's end that is not given back
DESCRIPTORS = 1 << 16  # what the table of them is made for at once: half a megabyte; more of them grow it
_PR_SET_IO_FLUSHER = 57  # <linux/prctl.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LOG_ERROR, _LOG_WARNING = 3, 4
_Ts = TypeVarTuple("_Ts")


class _TurnSelector(selectors.EpollSelector):
    """Serves the loop's readers, and ends its turns, before asyncio gets to see anything."""

    poller: Poller

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return super().select(0) if self.poller.wait(timeout) else []

    def close(self) -> None:
        self.poller.close()
        super().close()


class TurnLoop(asyncio.SelectorEventLoop):
    """An asyncio loop that ends its `Turn` after all callbacks of a turn, right before it looks at the sockets.

    `call_soon` could do the same for an empty pass of the loop more: 5-10 % of the time at queue depth 1. What
    `add_reader` watches is served by the `Poller`, past asyncio's queue of handles.
    """

    def __init__(self, busy_poll_s: float = 0.0) -> None:
        """`busy_poll_s`: see `turn.BusyPoll`."""
        selector = _TurnSelector()
        self.poller = selector.poller = Poller(self, selector.fileno(), BusyPoll(busy_poll_s))
        super().__init__(selector)

    def add_reader(self, fd: FileDescriptorLike, callback: Callable[[*_Ts], object], *args: *_Ts) -> None:
        self.poller.add(descriptor(fd), partial(callback, *args) if args else callback)

    def remove_reader(self, fd: FileDescriptorLike) -> bool:
        return self.poller.remove(descriptor(fd))

    def call_soon(
        self, callback: Callable[[*_Ts], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.Handle:
        self.poller.scheduled = True
        return super().call_soon(callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[[*_Ts], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        self.poller.scheduled = True
        return super().call_at(when, callback, *args, context=context)

    def stop(self) -> None:
        self.poller.scheduled = True
        super().stop()


class Collector:
    """Garbage collection at times of our choosing: when the node is idle, and rarely under load.

    Requests leave no reference cycles behind, so nothing waits for the collector; its automatic runs would cost
    15-20 % and a jagged tail (each walks all requests in flight).
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, turn: Turn) -> None:
        self._loop = loop
        self._turn = turn
        self._turns = 0
        self._checks = 0  # since the last collection
        self._checks_full = 0  # since the last full collection
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """To be called when the daemon is put together: what lives now is never looked at again."""
        gc.collect()
        gc.freeze()
        gc.disable()
        self._timer = self._loop.call_later(COLLECT_CHECK_S, self._check)

    def stop(self) -> None:
        """Back to the interpreter's own policy."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        gc.unfreeze()
        gc.enable()

    def _check(self) -> None:
        self._timer = self._loop.call_later(COLLECT_CHECK_S, self._check)
        turns = self._turn.count - self._turns
        self._turns = self._turn.count
        self._checks += 1
        self._checks_full += 1
        idle = turns < COLLECT_IDLE_TURNS
        if idle and self._checks_full >= COLLECT_FULL_CHECKS:
            gc.collect()
            self._checks = self._checks_full = 0
        elif (idle and gc.get_count()[0] > gc.get_threshold()[0]) or self._checks >= COLLECT_BUSY_CHECKS:
            gc.collect(1)  # young objects only
            self._checks = 0


def descriptor(file: FileDescriptorLike) -> int:
    return file if isinstance(file, int) else file.fileno()


def busy_poll_s(environment: Mapping[str, str]) -> float:
    """What SHEEPDOG_BUSY_POLL_US says, in seconds. UsageError."""
    text = environment.get(BUSY_POLL_VARIABLE, "")
    if not text:
        return BUSY_POLL_S
    if not (re.fullmatch("[0-9]{1,5}", text) and int(text) <= MAX_BUSY_POLL_US):
        raise UsageError(f"{BUSY_POLL_VARIABLE}='{text}' is not a number of microseconds up to {MAX_BUSY_POLL_US}")
    return int(text) / 1e6


def new_loop(log: Log, busy_poll_s: float = 0.0) -> TurnLoop:
    """A loop for own sockets (add_reader, add_writer); errors nobody caught become one log line each."""
    loop = TurnLoop(busy_poll_s)

    def report(_: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        error = context.get("exception")
        log(_LOG_ERROR, f"internal error: {context.get('message')}: {describe(error)}")

    loop.set_exception_handler(report)
    return loop


def describe(error: object) -> str:
    """One line about an exception, with the place in our code where it happened."""
    if not isinstance(error, BaseException):
        return str(error)
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else ""
    return f"{type(error).__name__}: {error}{place}"


def prepare_process(log: Log) -> None:
    """Process-wide settings of a daemon; where the system refuses one, it runs on without."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES)
        # This host may keep a file system on a volume of ours (sheepfs): writing it back must not wait for itself.
        # Inherited by the threads, so before them; only root may.
        libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0)
    except (OSError, AttributeError):
        pass  # no glibc: only slower
    try:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # clients, peers and cached object files
        _make_room_for_descriptors(hard)
    except (OSError, ValueError) as error:
        log(_LOG_WARNING, f"the limit of open files stays as it is: {error}")


def _make_room_for_descriptors(limit: int) -> None:
    """The kernel doubles a process's table of descriptors when it is full, and with threads it waits for all processors
    then, 10 ms and more, in the midst of a request. So it gets its size now. OSError."""
    most = DESCRIPTORS if limit == resource.RLIM_INFINITY else min(limit, DESCRIPTORS)
    descriptor = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.close(fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, most - 1))
    finally:
        os.close(descriptor)

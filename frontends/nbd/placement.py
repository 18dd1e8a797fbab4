"""On which processor nbdkit's threads run: all on one, as long as that has room for them.

For a small request they hand Python's lock, and the roles of their connection (`cluster.client.exchange`), to one
another several times. On one processor that is a switch; else the kernel wakes another one each time, which in a
virtual machine costs more than the request. Where others want the processor too, the threads go to one with room, or
run where the kernel puts them: a process bound to one gets no more than its share of that one.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Set
from contextlib import suppress
from pathlib import Path
from typing import Final

PERIOD_S: Final = 1.0
USED: Final = 0.25  # below this share of a processor it does not matter where the server runs
IDLE: Final = 0.1  # a processor idle for less than this share of the time has no room
CROWDED: Final = 0.3  # others that take more than this share of ours, when it has no room
EMPTY: Final = 0.5  # idle for more than this: worth a move
_TICK_S: Final = 1 / os.sysconf("SC_CLK_TCK")
_IDLE_FIELDS: Final = slice(4, 6)  # of /proc/stat: idle, and waiting for a disk


def placed(here: int | None, used: float, idle: Mapping[int, float]) -> int | None:
    """Where a server that used so much of a processor, which is `here` or wherever the kernel put it, runs from now on.

    `idle`: for each processor that it may use, the share of the time it was idle.
    """
    if not idle:  # a container that numbers processors in its own way
        return None
    best = max(idle, key=lambda cpu: idle[cpu])
    if here is None or here not in idle:
        return best if idle[best] > IDLE else None
    if idle[here] >= IDLE or 1 - idle[here] - used <= CROWDED:
        return here
    return best if idle[best] > EMPTY else None


def idle_times(text: str) -> dict[int, float]:
    """Seconds that each processor has been idle since the start of the system; `text` is that of /proc/stat."""
    lines = (line.split() for line in text.splitlines())
    return {
        int(words[0].removeprefix("cpu")): sum(map(int, words[_IDLE_FIELDS])) * _TICK_S
        for words in lines
        if words and words[0].startswith("cpu") and words[0] != "cpu"
    }


class Placement:
    """Of this process; no longer once somebody else has changed where it may run."""

    def __init__(self) -> None:
        self._allowed = os.sched_getaffinity(0)
        self._here: int | None = None
        self._crowded = False  # the last time that we looked

    def start(self) -> None:
        """Before there are other threads: those made later go where those are that make them."""
        if len(self._allowed) > 1:
            threading.Thread(target=self.watch, daemon=True).start()

    def watch(self) -> None:
        """For as long as nobody else decides."""
        before = self._now()
        with suppress(OSError):  # a processor is gone, or /proc: the kernel knows what to do
            while os.sched_getaffinity(os.getpid()) == self._cpus():
                time.sleep(PERIOD_S)
                after = self._now()
                self._look(before, after)
                before = after

    def _now(self) -> tuple[float, float, dict[int, float]]:
        return time.monotonic(), time.process_time(), idle_times(Path("/proc/stat").read_text())

    def _look(
        self, before: tuple[float, float, dict[int, float]], after: tuple[float, float, dict[int, float]]
    ) -> None:
        elapsed, used = after[0] - before[0], after[1] - before[1]
        if used < USED * elapsed:
            return
        cpus = self._allowed & before[2].keys() & after[2].keys()  # they come and go
        idle = {cpu: (after[2][cpu] - before[2][cpu]) / elapsed for cpu in cpus}
        place = placed(self._here, used / elapsed, idle)
        if self._here is not None and place != self._here and not self._crowded:
            self._crowded = True  # once may be a start or an end of something
            return
        self._crowded = False
        if place != self._here:
            self._here = place
            move(self._cpus())

    def _cpus(self) -> set[int]:
        return self._allowed if self._here is None else {self._here}


def move(cpus: Set[int]) -> None:
    """All threads of this process, also those that others make meanwhile."""
    moved: set[str] = set()
    while left := set(os.listdir("/proc/self/task")) - moved:
        for thread in left:
            with suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread), cpus)
        moved |= left

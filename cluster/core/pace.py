"""How fast this node restores copies: as fast as it goes while nobody else wants anything, else in small steps.

Fetches of all restores together keep within a window of bytes, so that what clients ask for never waits behind more
than that. While clients are at work here, or on the node that is fetched from, there is one small slice at a time, and
after each a pause as long as the slice took some times over: then a request meets a free processor, disk and link
mostly. How long slices take tells how busy all of that is; but never less than a floor is restored, for an object that
is short of copies is in danger. What a client waits for itself is not paced at all (core.puller).
"""

from __future__ import annotations

from collections.abc import Callable

from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.limits import (
    PULL_FLOOR_BYTES_PER_S,
    PULL_QUIET_NS,
    PULL_SLICE_BYTES,
    PULL_WINDOW_BYTES,
    PULL_YIELD,
)

Taken = tuple[int, int] | None
"""Bytes, and when they were taken; None: a client waits for them, and they are not paced."""
_NS_PER_S = 1_000_000_000


class Pace:
    """Of one node."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._under_way = 0  # bytes
        self._waiting: dict[Callable[[], None], None] = {}  # who could not take any, in the order of coming
        self._pause = 0  # counts pauses; even: none now
        self._seen = 0  # work of clients, as counted when it was last looked at ...
        self._worked_ns = -PULL_QUIET_NS  # ... and when it had grown
        self._told_ns = -PULL_QUIET_NS  # when a node that is fetched from last said that it has clients

    def begin(self) -> None:
        """A new epoch: nothing is under way, and what clients did before is over."""
        self._under_way = 0
        self._waiting = {}
        self._pause += self._pause & 1
        self._seen = self._context.counters.work()

    def has_clients(self) -> bool:
        """Requests of clients were done here a moment ago."""
        now, done = self._context.clock.now_ns(), self._context.counters.work()
        if done != self._seen:
            self._seen, self._worked_ns = done, now
        return now - self._worked_ns < PULL_QUIET_NS

    def told(self) -> None:
        """The node that is fetched from has clients."""
        self._told_ns = self._context.clock.now_ns()

    def _yields(self) -> bool:
        return self.has_clients() or self._context.clock.now_ns() - self._told_ns < PULL_QUIET_NS

    def take(self, wanted: int, again: Callable[[], None]) -> int:
        """How many of the `wanted` bytes may be fetched now; 0: none, `again` is called when that changes."""
        length = wanted
        if self._yields():
            free = not self._under_way and not self._pause & 1
            length = min(wanted, PULL_SLICE_BYTES)
        else:
            free = self._under_way < PULL_WINDOW_BYTES
        if not free:
            self._waiting[again] = None
            return 0
        self._under_way += length
        return length

    def give_back(self, taken: Taken) -> None:
        """What was taken has been written, or has failed; who took it has begun what it wants to do next."""
        if taken is None:
            return
        length, begun_ns = taken
        self._under_way -= length
        if not self._yields():
            self._wake()
        elif not self._pause & 1:
            self._context.probe("pace.yields")
            took_ns = self._context.clock.now_ns() - begun_ns
            most_ns = length * _NS_PER_S // PULL_FLOOR_BYTES_PER_S - took_ns
            self._pause += 1
            pause = self._pause
            self._context.clock.after(max(0, min(PULL_YIELD * took_ns, most_ns)), lambda: self._go_on(pause))

    def _go_on(self, pause: int) -> None:
        if self._pause == pause:
            self._pause += 1
            self._wake()

    def _wake(self) -> None:
        """Who waits tries again, one after the other, until one of them waits again."""
        while self._waiting:
            again = next(iter(self._waiting))
            del self._waiting[again]
            again()
            if again in self._waiting:
                return

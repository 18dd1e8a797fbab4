"""What a daemon's loop does in every turn: the sockets that are ready, then the end of the turn; and its clock.

Apart from `loop`, so that it can be compiled.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from sheepdog.cluster.core.ports import Clock, Timer

if TYPE_CHECKING:
    import asyncio

    from sheepdog.cluster.host.loop import TurnLoop

NS_PER_S: Final = 1_000_000_000
_clock_gettime_ns: Final = time.clock_gettime_ns  # looked up once, not for each answer
_BOOTTIME: Final = time.CLOCK_BOOTTIME
ROUNDS_PER_TURN: Final = 16  # calls at the end of a turn may ask for more of them; then sockets come first

LOST_S: Final = 1e-3  # others had the processor for so long: more than a turn of another sheep takes
LEAST_REST_S: Final = 10e-3
MOST_REST_S: Final = 1.0


class HostClock(Clock):
    """The real `core.ports.Clock`: CLOCK_BOOTTIME, and timers of the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def now_ns(self) -> int:
        return _clock_gettime_ns(_BOOTTIME)

    def wall_ns(self) -> int:
        return time.time_ns()

    def after(self, delay_ns: int, call: Callable[[], None]) -> Timer:
        # The loop counts CLOCK_MONOTONIC, which stands still in suspend: a timer may come later, never earlier.
        return self._loop.call_later(max(delay_ns, 0) / NS_PER_S, call)


class Turn:
    """Things to do once at the end of the current turn of the loop, in the order they were asked for."""

    def __init__(self, loop: TurnLoop) -> None:
        self._loop = loop
        self._poller = loop.poller
        self._calls: list[Callable[[], None]] = []
        self._later: list[Callable[[], None]] = []  # of the next turn
        self.count = 0  # turns that had anything to do
        self._poller.turn = self

    def at_end(self, call: Callable[[], None]) -> None:
        """Calls once, before the loop waits again. Callers remember by themselves that they have asked."""
        self._calls.append(call)

    def after_look(self, call: Callable[[], None]) -> None:
        """The same at the end of the next turn, which begins with what the sockets have by then, without waiting."""
        self._later.append(call)
        self._poller.look_again = True

    def end(self) -> None:
        """The poller's, before it waits."""
        if self._later:
            self._calls += self._later
            self._later.clear()
        if not self._calls:
            return
        self.count += 1
        for _ in range(ROUNDS_PER_TURN):
            calls, self._calls = self._calls, []
            for call in calls:
                try:
                    call()
                except Exception as error:
                    # One broken call must not take the other connections' output with it.
                    self._loop.call_exception_handler({"message": "at the end of a turn", "exception": error})
            if not self._calls:
                return
        self._poller.scheduled = True


class BusyPoll:
    """Looks for events a little longer before the process sleeps.

    To wake a processor that has gone idle takes longer than to serve a small request (50 us, in a virtual machine), and
    one write after another waits for that at each of its hops. So, for as long as waits are short, the next events are
    looked for, with the processor offered to others between two looks. Others who have work for it keep it for a slice
    of the scheduler (3 ms), where one who slept would be let in before them: who loses it sleeps, for a time, as soon
    as there is nothing to do.
    """

    def __init__(
        self,
        window_s: float,
        now: Callable[[], float] = time.perf_counter,
        give_way: Callable[[], None] = os.sched_yield,
    ) -> None:
        """`window_s`: the longest search, and the longest wait that counts as short; 0: always sleeps."""
        self._window_s = window_s
        self._now = now
        self._give_way = give_way
        self._short = False  # the last wait
        self._rests_until = 0.0
        self._rest_s = LEAST_REST_S

    def wait(
        self, poll: Callable[[float | None, int], list[tuple[int, int]]], timeout: float | None, most: int
    ) -> list[tuple[int, int]]:
        """As `poll`, which is that of an epoll object: at most `most` events, none when `timeout` (seconds) is over."""
        began = now = self._now()
        if self._short and now >= self._rests_until:
            end = began + (self._window_s if timeout is None else min(timeout, self._window_s))
            while now < end:
                events = poll(0, most)
                if events:
                    return events
                self._give_way()
                before, now = now, self._now()
                if now - before > LOST_S:
                    self._rest(now)
                    break
            if timeout is not None:
                timeout = max(timeout - (now - began), 0)
        events = poll(timeout, most)
        self._short = self._now() - began < self._window_s
        return events

    def _rest(self, now: float) -> None:
        """Longer than the last time, if that is not long ago."""
        again = now < self._rests_until + self._rest_s
        self._rest_s = min(2 * self._rest_s, MOST_REST_S) if again else LEAST_REST_S
        self._rests_until = now + self._rest_s


class Poller:
    """The readers of a daemon: sockets whose arrival of data calls a function, turn after turn.

    asyncio makes a handle of each event, queues it and runs it in a context of its own: 10 us a turn, a tenth of what a
    small write costs. Here the function is called at once. asyncio's own descriptors (the selector that it would ask)
    and its timers stay with it: `wait` returns as soon as it has anything to do. What each turn asks for is kept here,
    not in the loop: an attribute of an object that is not compiled costs ten times as much.
    """

    def __init__(self, loop: TurnLoop, selector: int, busy: BusyPoll) -> None:
        self._loop = loop
        self._busy = busy
        self._selector = selector  # the descriptor of asyncio's own epoll
        self._epoll = select.epoll()
        self._epoll.register(selector, select.EPOLLIN)
        self._readers: dict[int, Callable[[], object]] = {}
        self.turn: Turn | None = None  # to be ended after all callbacks, right before sockets are looked at
        self.scheduled = False  # asyncio got something to run since this was last set to False
        self.look_again = False  # the next turn begins with what is ready now, without waiting

    def add(self, descriptor: int, call: Callable[[], object]) -> None:
        """Calls whenever there is something to read; replaces what was called before."""
        if descriptor not in self._readers:
            self._epoll.register(descriptor, select.EPOLLIN)
        self._readers[descriptor] = call

    def remove(self, descriptor: int) -> bool:
        """False when it was not there."""
        if self._readers.pop(descriptor, None) is None:
            return False
        with contextlib.suppress(OSError):  # closed already: then the kernel has forgotten it
            self._epoll.unregister(descriptor)
        return True

    def wait(self, timeout: float | None) -> bool:
        """Serves readers until `timeout` (seconds; None: without limit) or until asyncio has something to run.

        True when asyncio's own descriptors are to be looked at.
        """
        readers, poll, turn = self._readers, self._epoll.poll, self.turn
        deadline = time.monotonic() + timeout if timeout else 0.0
        self.scheduled = False  # what was scheduled before, `timeout` knows
        while True:
            if turn is not None:
                turn.end()
            if self.scheduled:
                timeout = 0
            looks, self.look_again = self.look_again, False
            most = len(readers) + 1
            events = poll(0, most) if looks or timeout == 0 else self._busy.wait(poll, timeout, most)
            own = False
            for descriptor, _ in events:
                if descriptor == self._selector:
                    own = True
                    continue
                call = readers.get(descriptor)
                if call is None:
                    continue  # an earlier call of this turn has removed it
                try:
                    call()
                except Exception as error:
                    self._loop.call_exception_handler({"message": "reading from a socket", "exception": error})
            if own or timeout == 0 or not (events or looks):
                return own
            if timeout is not None:
                timeout = max(deadline - time.monotonic(), 0)

    def close(self) -> None:
        self._epoll.close()

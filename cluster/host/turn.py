"""The clock of a daemon's loop, and the end of its turns: what core and the store see of the loop.

Apart from `loop`, so that it can be compiled.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from sheepdog.cluster.core.ports import Timer

if TYPE_CHECKING:
    import asyncio

    from sheepdog.cluster.host.loop import TurnLoop

NS_PER_S: Final = 1_000_000_000
ROUNDS_PER_TURN: Final = 16  # calls at the end of a turn may ask for more of them; then sockets come first


class HostClock:
    """The real `core.ports.Clock`: CLOCK_BOOTTIME, and timers of the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def now_ns(self) -> int:
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def wall_ns(self) -> int:
        return time.time_ns()

    def after(self, delay_ns: int, call: Callable[[], None]) -> Timer:
        # The loop counts CLOCK_MONOTONIC, which stands still in suspend: a timer may come later, never earlier.
        return self._loop.call_later(max(delay_ns, 0) / NS_PER_S, call)


class Turn:
    """Things to do once at the end of the current turn of the loop, in the order they were asked for."""

    def __init__(self, loop: TurnLoop) -> None:
        self._loop = loop
        self._calls: list[Callable[[], None]] = []
        self.count = 0  # turns that had anything to do
        loop.end_of_turn = self._end

    def at_end(self, call: Callable[[], None]) -> None:
        """Calls once, before the loop waits again. Callers remember by themselves that they have asked."""
        self._calls.append(call)

    def _end(self) -> None:
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
        self._loop.scheduled = True

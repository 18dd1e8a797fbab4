"""Simulated time: one heap of events, one seed, and a hash of everything that happened.

Every source of chance draws from a stream of its own, named by its purpose, so that a change in one part of a
scenario does not shift the dice of all others. A seed gives the same run bit for bit, whatever PYTHONHASHSEED is.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from random import Random

from xxhash import xxh3_64

MICROSECOND = 1_000
MILLISECOND = 1_000_000
SECOND = 1_000_000_000
WALL_START_NS = 1_700_000_000 * SECOND  # Unix time at which every simulated world begins


class Stuck(AssertionError):
    """The world ran out of events, or of time, before what it waited for came true."""


class Event:
    """A pending call; `core.ports.Timer` for the machines."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[[], None] | None) -> None:
        self.call = call

    def cancel(self) -> None:
        self.call = None


class Life:
    """Of one process: what happens to it is done now, later (it is stopped), or never (it is dead).

    When a stopped process goes on it finds everything that came meanwhile at once: in order from each source, and the
    sources mixed at random, as a loop that polls several sockets finds them.
    """

    __slots__ = ("_held", "_random", "alive")

    def __init__(self, random: Random) -> None:
        self.alive = True
        self._held: dict[object, list[Callable[[], None]]] | None = None
        self._random = random

    def do(self, source: object, call: Callable[[], None]) -> None:
        """Something reaches the process, from a link, a disk, a timer ..."""
        if self._held is not None:
            self._held.setdefault(source, []).append(call)
        elif self.alive:
            call()

    @property
    def stopped(self) -> bool:
        return self._held is not None

    def stop(self) -> None:
        """SIGSTOP."""
        if self._held is None:
            self._held = {}

    def go_on(self) -> None:
        """SIGCONT."""
        held, self._held = self._held, None
        queues = list((held or {}).values())
        while queues and self.alive:
            queue = self._random.choice(queues)
            queue.pop(0)()
            if not queue:
                queues.remove(queue)

    def end(self) -> None:
        self.alive = False
        self._held = None


class World:
    """See the module. Times are integer nanoseconds since the beginning of the world."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.now_ns = 0
        self.events = 0
        self.log: list[str] | None = None  # set to a list to keep a readable story
        self._heap: list[tuple[int, int, Event]] = []
        self._sequence = 0
        self._trace = xxh3_64()

    def stream(self, name: str) -> Random:
        """A generator of its own; equal seeds and names give equal streams (strings seed by their SHA-512)."""
        return Random(f"{self.seed}/{name}")

    def after(self, delay_ns: int, call: Callable[[], None]) -> Event:
        """Calls once, `delay_ns` from now; events of the same time run in the order in which they were made."""
        event = Event(call)
        self._sequence += 1
        heappush(self._heap, (self.now_ns + delay_ns, self._sequence, event))
        return event

    def note(self, data: bytes) -> None:
        """Makes `data` part of the trace."""
        self._trace.update(data)

    def say(self, text: str) -> None:
        """A line of the story, for people who look into a failed seed."""
        if self.log is not None:
            self.log.append(f"{self.now_ns / SECOND:12.6f} {text}")

    def trace_hash(self) -> str:
        """Of all that happened so far: equal for equal runs."""
        return self._trace.hexdigest()

    def step(self) -> bool:
        """Runs one event; False when there is none left."""
        while self._heap:
            time_ns, _, event = heappop(self._heap)
            call = event.call
            if call is None:
                continue
            self.now_ns = time_ns
            self.events += 1
            event.call = None
            call()
            return True
        return False

    def run_for(self, duration_ns: int) -> None:
        """Runs everything that happens within `duration_ns`."""
        end_ns = self.now_ns + duration_ns
        while self._heap and self._heap[0][0] <= end_ns:
            self.step()
        self.now_ns = end_ns

    def run_until(self, reached: Callable[[], bool], limit_ns: int, what: str = "") -> None:
        """Runs until `reached`; Stuck when that takes more than `limit_ns` of simulated time."""
        end_ns = self.now_ns + limit_ns
        while not reached():
            if not self._heap or self._heap[0][0] > end_ns or not self.step():
                raise Stuck(f"not within {limit_ns / SECOND:g} simulated seconds: {what or reached}")

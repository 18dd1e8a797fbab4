"""The gate: answers leave this node only while it certainly belongs to the cluster.

A node that the others have declared dead, and that does not know it yet, must not answer from what it knew
(promise P6). So while it is *suspended* (its membership engine is out of reach), or while it needs leases and has
none, answers are held. They leave when the doubt is over, and never if this incarnation turns out to be lost. It is
enough that the lease is valid at some time after the data was read or written: then the data was current.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from sheepdog.cluster.core.messages import Buffer
from sheepdog.cluster.core.ports import Clock

IoDone: TypeAlias = Callable[[int, Buffer], None]


class Gate:
    """Of one node. `renew` asks the engine for a lease."""

    def __init__(self, clock: Clock, renew: Callable[[], None]) -> None:
        self.guarded = False  # False: everything may pass without asking `is_open`, which costs time
        self.suspended = False
        self._clock = clock
        self._renew = renew
        self._leases = False  # this engine gives leases
        self._until_ns = 0
        self._renew_at_ns = 0  # half of the lease is over
        self._asked = False
        self._held: list[tuple[IoDone, int, Buffer]] = []

    def is_open(self) -> bool:
        """Whether an answer may leave now. Asks for the next lease in time."""
        if not self._leases:
            return not self.suspended
        now_ns = self._clock.now_ns()
        if now_ns >= self._renew_at_ns and not self._asked:
            self._asked = True
            self._renew()
        return now_ns < self._until_ns and not self.suspended

    def answer(self, done: IoDone, result: int, data: Buffer) -> None:
        """Answers now, or when the gate is open again, in the order of the calls."""
        if self.guarded and (self._held or not self.is_open()):
            self._held.append((done, result, data))
            if not self._asked:
                self.is_open()
        else:
            done(result, data)

    def leased(self, until_ns: int) -> None:
        """The engine has confirmed this node's membership: it may answer before `until_ns`."""
        now_ns = self._clock.now_ns()
        self._leases = self.guarded = True
        self._asked = False
        self._until_ns = until_ns
        self._renew_at_ns = now_ns + (until_ns - now_ns) // 2
        self._release()

    def suspend(self, suspended: bool) -> None:
        self.suspended = suspended
        self.guarded = suspended or self._leases
        self._release()

    def _release(self) -> None:
        while self._held and self.is_open():
            held, self._held = self._held, []
            for done, result, data in held:
                done(result, data)

    def fail(self, result: int) -> None:
        """This incarnation is over: what is held gets an error, and nothing is held any more."""
        self.guarded = self.suspended = self._leases = False
        self.drop(result)

    def drop(self, result: int) -> None:
        """What is held gets an error."""
        held, self._held = self._held, []
        for done, _, _ in held:
            done(result, b"")

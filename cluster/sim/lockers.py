"""Clients that want a volume for themselves: at most one has the lock, and a lock does not survive its owner."""

from __future__ import annotations

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import Vid
from sheepdog.cluster.core.script import Script
from sheepdog.cluster.core.vdi import VdiRecord
from sheepdog.cluster.sim.clients import Answer, Door
from sheepdog.cluster.sim.cluster import Process
from sheepdog.cluster.sim.history import Violation
from sheepdog.cluster.sim.volumes import Asking
from sheepdog.cluster.sim.world import MILLISECOND

MAX_TRIES = 100  # of a lock that nobody has: each comes RETRY_NS after the one before


class Lock:
    """What all lockers know: the process that gave the lock to the one who has it."""

    holder: Process | None = None


class Locker(Asking):
    """Takes the lock, keeps it for a while, gives it back; not if its gateway dies first."""

    def __init__(self, door: Door, name: bytes, lock: Lock) -> None:
        super().__init__(door)
        self._name = name
        self._lock = lock
        self._granted: Process | None = None
        self._vid = Vid(0)

    def _live(self) -> Script[None]:
        while not self.stopped:
            yield from self.pause(self.random.randrange(20 * MILLISECOND))
            if (yield from self._take()):
                yield from self.pause(self.random.randrange(50 * MILLISECOND))
                yield from self._give_back()

    def _take(self) -> Script[bool]:
        result, record = yield from self.ask(self._request, once=True)
        if self.lost or result == Result.VDI_LOCKED:
            return False
        if result or not isinstance(record, VdiRecord):
            raise Violation(f"{self.door.name}: locking {self._name!r}: result {result:#x}")
        holder = self._lock.holder
        if holder is not None and holder.alive:
            raise Violation(f"{self.door.name} has the lock of {self._name!r}, and somebody else has it, too")
        self._lock.holder = self._granted
        self._vid = record.vid
        return True

    def _request(self, process: Process, answer: Answer) -> None:
        self._granted = process
        process.node.operations.lock_vdi(self._name, b"", 0, False, answer)

    def _request_release(self, process: Process, answer: Answer) -> None:
        process.node.operations.release_vdi(self._vid, False, lambda result: answer(int(result), None))

    def _give_back(self) -> Script[None]:
        """Only through the gateway that gave it: if that is gone, so is the lock."""
        process, self._granted = self._granted, None
        if self._lock.holder is process:
            self._lock.holder = None
        if process is not None and process.alive and self.door.process() is process:
            yield from self.ask(self._request_release, once=True)

    def check_all(self) -> Script[None]:
        """Everybody has ended: the lock is to be had."""
        for _ in range(MAX_TRIES):
            if (yield from self._take()):
                yield from self._give_back()
                return
            yield from self.pause(20 * MILLISECOND)
        raise Violation(f"the lock of {self._name!r} has survived its owner")

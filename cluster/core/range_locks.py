"""Locks on byte ranges of objects, granted in the order in which they are asked for."""

from __future__ import annotations

from collections.abc import Callable

from sheepdog.cluster.core.ids import ObjectId


class Lock:
    """One range, held or waited for."""

    __slots__ = ("end", "granted", "held", "oid", "start")

    def __init__(self, oid: ObjectId, start: int, end: int, granted: Callable[[Lock], None]) -> None:
        self.oid = oid
        self.start = start
        self.end = end
        self.granted = granted
        self.held = False

    def meets(self, other: Lock) -> bool:
        return self.start < other.end and other.start < self.end


class RangeLocks:
    """Exclusive; overlapping ranges wait for each other, also for those that wait themselves."""

    def __init__(self) -> None:
        self._locks: dict[ObjectId, list[Lock]] = {}

    def acquire(self, oid: ObjectId, start: int, end: int, granted: Callable[[Lock], None]) -> None:
        """`granted(lock)`, perhaps at once; then `release` must come."""
        lock = Lock(oid, start, end, granted)
        locks = self._locks.get(oid)
        if locks is None:
            locks = self._locks[oid] = []
        free = True
        for other in locks:
            if lock.meets(other):
                free = False
                break
        locks.append(lock)
        if not free:
            return
        lock.held = True
        granted(lock)

    def release(self, lock: Lock) -> None:
        locks = self._locks[lock.oid]
        locks.remove(lock)
        if not locks:
            del self._locks[lock.oid]
            return
        free = [
            waiting
            for number, waiting in enumerate(locks)
            if not waiting.held and not any(waiting.meets(other) for other in locks[:number])
        ]
        for waiting in free:
            waiting.held = True
        for waiting in free:
            waiting.granted(waiting)

    def locked(self, oid: ObjectId) -> bool:
        return oid in self._locks

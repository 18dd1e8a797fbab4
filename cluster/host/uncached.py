"""Object files that leave the page cache (-D, and directio of the object cache): the memory is the guests'.

Reads and writes go through the page cache as ever, because those that it can take need no other thread; what passed
through it is dropped a moment later. A page that is not on the disk yet is only sent there by the first attempt, so
each file is dropped twice after its last use.
"""

from __future__ import annotations

from typing import Final

from sheepdog.cluster.core.ports import Clock
from sheepdog.cluster.host.copies import Copies
from sheepdog.cluster.host.object_file import Copy

EVERY_NS: Final = 1_000_000_000  # memory: twice what passes in a second; much shorter and a burst would be read twice


class Uncached:
    """Of one store; `begin` once it is open."""

    def __init__(self, copies: Copies, clock: Clock) -> None:
        self._copies = copies
        self._clock = clock
        self._before: list[Copy] = []  # used before the last sweep, and not since the one before it

    def begin(self) -> None:
        self._copies.files.note_uses()
        self._clock.after(EVERY_NS, self._sweep)

    def _sweep(self) -> None:
        used = self._copies.files.take_used()
        sweep = [copy for copy in dict.fromkeys((*used, *self._before)) if copy.fd >= 0]
        self._before = used
        if not sweep:
            self._clock.after(EVERY_NS, self._sweep)
            return
        for copy in sweep:
            copy.pins += 1
        files = [copy.fd for copy in sweep]
        disk = self._copies.disk

        def drop() -> None:
            for fd in files:
                disk.drop_cached(fd, 0, 0)

        def dropped(_: OSError | None) -> None:  # a disk that fails says so at its next read or write
            for copy in sweep:
                copy.pins -= 1
                self._copies.files.close_if_unused(copy)
            self._clock.after(EVERY_NS, self._sweep)

        self._copies.workers.run(drop, dropped)

"""Object files that leave the page cache (-D, and directio of the object cache): the memory is the guests'.

Reads and writes go through the page cache as ever, because those that it can take need no other thread; what passed
through it is dropped a moment later. A page that is not on the disk yet is only sent there by the first attempt, so
each file is dropped some more times after its last use.
"""

from __future__ import annotations

from typing import Final

from sheepdog.cluster.core.ports import Clock
from sheepdog.cluster.host.copies import Copies
from sheepdog.cluster.host.object_file import Copy

EVERY_NS: Final = 1_000_000_000  # memory: twice what passes in a second; much shorter and a burst would be read twice
DROPS: Final = 5  # after the last use: a disk needs no more seconds for what a file got in one


class Uncached:
    """Of one store; `begin` once it is open."""

    def __init__(self, copies: Copies, clock: Clock) -> None:
        self._copies = copies
        self._clock = clock
        self._left: dict[Copy, int] = {}  # how many times the file is still to be dropped

    def begin(self) -> None:
        self._copies.files.note_uses()
        self._clock.after(EVERY_NS, self._sweep)

    def _sweep(self) -> None:
        self._left |= dict.fromkeys(self._copies.files.take_used(), DROPS)
        sweep = [copy for copy in self._left if copy.fd >= 0]
        self._left = {copy: self._left[copy] - 1 for copy in sweep if self._left[copy] > 1}
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

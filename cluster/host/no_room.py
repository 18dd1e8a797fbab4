"""Changes that the journal has taken and that find no room on their disk, although it was set aside (somebody else has
filled it): the journal keeps them, reads see them, and they are tried again until there is room.

Meanwhile the disk refuses what needs room. What follows for the same copy is refused too, and, when the journal cannot
be emptied any more, all but what makes room: removals, and inodes, which name what may be removed.
"""

from __future__ import annotations

from collections.abc import Callable

from sheepdog.cluster.core.ids import is_inode, plain_oid
from sheepdog.cluster.core.limits import NO_ROOM_RETRY_NS
from sheepdog.cluster.core.ports import Clock, Log
from sheepdog.cluster.host.directory import ObjectDirectory
from sheepdog.cluster.host.journal import Journal
from sheepdog.cluster.host.object_file import Copy


class NoRoom:
    """What waits for room, on all disks of a store."""

    def __init__(self, clock: Clock, log: Log) -> None:
        self._clock = clock
        self._log = log
        self._calls: list[tuple[ObjectDirectory, Callable[[], None]]] = []
        self.waiting = False

    def wait(self, home: ObjectDirectory, error: OSError, again: Callable[[], None]) -> None:
        """Calls `again` later, until then the disk counts as full; `again` may come back here."""
        if not home.full:
            home.full = True
            text = f"no room for changes that are under way, which wait for it; new ones are refused ({error.strerror})"
            self._log(3, f"{home.path}: {text}")
        self._calls.append((home, again))
        if not self.waiting:
            self.waiting = True
            self._clock.after(NO_ROOM_RETRY_NS, self._try_again)

    def _try_again(self) -> None:
        calls, self._calls = self._calls, []
        homes = dict.fromkeys(home for home, _ in calls)
        for _, again in calls:
            again()
        full = [home for home, _ in self._calls]
        for home in homes:
            if home not in full:
                home.full = False
                self._log(5, f"{home.path}: there is room again")
        if self._calls:
            self._clock.after(NO_ROOM_RETRY_NS, self._try_again)
        else:
            self.waiting = False

    def refuses(self, copy: Copy, journal: Journal) -> bool:
        """Must a new change of the copy be answered with NO_SPACE?"""
        if copy.home.full and copy.later is not None:
            return True
        return not is_inode(plain_oid(copy.oid)) and not journal.other_is_free() and journal.is_half_full()

"""Group commit: everybody who waits for the same file or directory shares one sync.

A sync covers what was written before it began, so whoever comes while one runs waits for the next.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial

from sheepdog.cluster.core.errors import StoreError
from sheepdog.cluster.core.ids import ObjectId, Vid, vid_of
from sheepdog.cluster.core.limits import FILE_SYNCS
from sheepdog.cluster.core.ports import Done
from sheepdog.cluster.host.directory import ObjectDirectory
from sheepdog.cluster.host.disk import Disk
from sheepdog.cluster.host.object_file import Copy
from sheepdog.cluster.host.workers import Workers

Fail = Callable[[ObjectDirectory, OSError], StoreError]
"""Takes the disk out of service and says so; never called twice for one disk's first error."""


class FileSyncs:
    """Syncs of object files, and the register of those that need one."""

    def __init__(
        self,
        disk: Disk,
        workers: Workers,
        fail: Fail,
        idle: Callable[[Copy], None],
        covered: Callable[[Copy, list[int]], None],
    ) -> None:
        self._disk = disk
        self._workers = workers
        self._fail = fail
        self._idle = idle  # a sync of this copy has ended
        self.covered = covered  # these large writes are on the disk
        self._dirty: dict[Vid, dict[ObjectId, Copy]] = {}  # written or being synced
        self._under_way = 0
        self._held: deque[Copy] = deque()  # pinned; their syncs begin when others have ended

    def mark_dirty(self, copy: Copy) -> None:
        copy.dirty = True
        if not copy.gone:  # nobody flushes what was removed
            self._dirty.setdefault(vid_of(copy.oid), {})[copy.oid] = copy

    def forget(self, copy: Copy) -> None:
        """The copy is gone: no flush has to cover it."""
        of_vid = self._dirty.get(vid_of(copy.oid))
        if of_vid is not None and of_vid.get(copy.oid) is copy:
            self._remove(copy)

    def sync(self, copy: Copy, done: Done) -> None:
        """Everything written to the copy so far is on the disk at `done`."""
        if copy.home.failed:
            done(self._fail(copy.home, OSError(errno.EIO, "out of service")))
            return
        copy.waiters.append(done)
        if copy.running is None and len(copy.waiters) == 1:  # else it is held already
            self._hold(copy)
            self._go_on()

    def dirty(self, vids: frozenset[Vid] | None) -> list[Copy]:
        """Copies of these vids (None: of all) with bytes in the file that may not be on the disk."""
        wanted = self._dirty.values() if vids is None else [self._dirty[v] for v in sorted(vids) if v in self._dirty]
        return [copy for of_vid in wanted for copy in of_vid.values()]

    def cover(self, copy: Copy, done: Done) -> None:
        """Everything written to the copy so far is on the disk at `done`; joins a sync that covers it."""
        if copy.dirty or copy.running is None:
            self.sync(copy, done)
        else:  # nothing was written since the sync in flight began
            copy.running.append(done)

    def _hold(self, copy: Copy) -> None:
        copy.pins += 1
        self._held.append(copy)

    def _go_on(self) -> None:
        while self._held and self._under_way < FILE_SYNCS:
            copy = self._held.popleft()
            copy.running, copy.waiters = copy.waiters, []
            copy.dirty = False
            intents, copy.intents = copy.intents, []
            if copy.home.failed:  # since it is held
                self._end(copy, intents, OSError(errno.EIO, "out of service"))
                continue
            self._under_way += 1
            self._workers.sync(self._disk, copy.fd, partial(self._finished, copy, intents))

    def _finished(self, copy: Copy, intents: list[int], result: OSError | None) -> None:
        self._under_way -= 1
        self._end(copy, intents, result)
        self._go_on()

    def _end(self, copy: Copy, intents: list[int], result: OSError | None) -> None:
        copy.pins -= 1
        waiters, copy.running = copy.running or [], None
        error = None if result is None else self._fail(copy.home, result)
        if error is not None:
            waiters += copy.waiters
            copy.waiters = []
        elif copy.waiters:
            self._hold(copy)
        elif not copy.dirty:
            self.forget(copy)
        if intents and error is None:
            self.covered(copy, intents)
        for done in waiters:
            done(error)
        self._idle(copy)

    def _remove(self, copy: Copy) -> None:
        vid = vid_of(copy.oid)
        of_vid = self._dirty[vid]
        del of_vid[copy.oid]
        if not of_vid:
            del self._dirty[vid]


class DirectorySyncs:
    """Syncs of object directories."""

    def __init__(self, workers: Workers, fail: Fail) -> None:
        self._workers = workers
        self._fail = fail
        self._running: dict[ObjectDirectory, None] = {}
        self._waiters: dict[ObjectDirectory, list[Done]] = {}

    def sync(self, home: ObjectDirectory, done: Done) -> None:
        """Names made and removed in the directory so far are on the disk at `done`."""
        self._waiters.setdefault(home, []).append(done)
        if home not in self._running:
            self._start(home)

    def is_needed(self, home: ObjectDirectory) -> bool:
        """Are there names that are not on the disk for sure?"""
        return home.names_changed or home in self._running

    def _start(self, home: ObjectDirectory) -> None:
        batch = self._waiters.pop(home)
        self._running[home] = None
        home.names_changed = False

        def finished(result: OSError | None) -> None:
            del self._running[home]
            error: StoreError | None = None if result is None else self._fail(home, result)
            if home in self._waiters:
                self._start(home)
            for done in batch:
                done(error)

        self._workers.run(home.sync, finished)


def gather(calls: Iterable[Callable[[Done], None]], done: Done) -> None:
    """Starts all calls; `done` comes once, after the last, with the first error."""
    started = list(calls)
    left = len(started)
    failure: StoreError | None = None
    if not left:
        done(None)
        return

    def each(error: StoreError | None) -> None:
        nonlocal left, failure
        failure = failure or error
        left -= 1
        if left == 0:
            done(failure)

    for call in started:
        call(each)

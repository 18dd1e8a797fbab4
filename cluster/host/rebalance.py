"""Moves copies between the disks of a node, in the background, to where its ring puts them.

A copy is moved while nothing else is done with it: its operations queue, its bytes go to a file on the other disk that
is not in place yet, and that is synced; then it takes the name, and only when that is on the disk the old file goes. A
crash in between leaves two equal copies.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from functools import partial
from typing import Final

from sheepdog.cluster.core.ids import ObjectId, oid_name
from sheepdog.cluster.core.limits import MOVE_RETRIES, MOVE_RETRY_NS
from sheepdog.cluster.core.ports import Clock, Done
from sheepdog.cluster.host.copies import Copies
from sheepdog.cluster.host.directory import ObjectDirectory, write_all
from sheepdog.cluster.host.object_file import Copy, seal_trailer
from sheepdog.cluster.host.trailer import FIRST_ENTRY

_CHUNK_BYTES: Final = 1 << 20  # read at a time
_CHUNK_BLOCKS: Final = _CHUNK_BYTES >> 12
Flush = Callable[[Done], None]
"""Calls back when everything submitted so far is in the journal, durably, and so on its way into the files."""


class Rebalance:
    """One copy at a time. `moved` counts them since the start."""

    def __init__(self, copies: Copies, clock: Clock, flush: Flush) -> None:
        self._copies = copies
        self._disk = copies.disk
        self._clock = clock
        self._flush = flush
        self._left: list[ObjectId] = []
        self._running = False
        self._tries = 0
        self.moved = 0

    @property
    def running(self) -> bool:
        return self._running

    def begin(self) -> None:
        """Looks for copies that lie on another disk than the ring wants, and moves them."""
        copies = self._copies
        self._left = [
            oid for oid, copy in copies.by_oid.items() if not copy.home.failed and copies.home_for(oid) is not copy.home
        ]
        if self._left:
            copies.log(5, f"{len(self._left)} objects move to other disks of this node")
        if not self._running:
            self._running = True
            self._next()

    def _next(self) -> None:
        self._tries = 0
        if not self._left:
            if self._running and self.moved:
                self._copies.log(5, f"{self.moved} objects have moved since the start")
            self._running = False
            return
        self._try(self._left[-1])

    def _done(self) -> None:
        if self._left:
            self._left.pop()
        self._clock.after(0, self._next)

    def _later(self) -> None:
        """The copy is in use just now. One that always is stays where it is."""
        self._tries += 1
        if self._tries > MOVE_RETRIES:
            self._done()
        else:
            self._clock.after(MOVE_RETRY_NS, lambda: self._try(self._left[-1]) if self._left else self._next())

    def _try(self, oid: ObjectId) -> None:
        copy, target = self._copies.by_oid.get(oid), self._copies.home_for(oid)
        if copy is None or target is None or copy.home is target or copy.home.failed or copy.restoring:
            self._done()  # it needs no move any more, or is made anew where it belongs
        elif target.has_room(copy.allocated):
            self._copies.with_open(oid, lambda copy: self._begin(copy, target), lambda _: self._done())
        else:
            self._done()

    def _begin(self, copy: Copy, target: ObjectDirectory) -> None:
        """The copy is open and nobody else's turn."""
        if copy.pins or copy.pending or copy.later is not None or copy.running is not None or copy.restoring:
            self._flush(lambda _: self._later())
            return
        self._copies.close_gate(copy)
        copy.pins += 1
        fd, path = copy.fd, target.new_path(copy.oid)
        sealed = bytes(seal_trailer(copy))
        filled = [bool(entry) for entry in copy.entries[FIRST_ENTRY:]]
        self._copies.workers.run(
            partial(self._make_file, fd, path, copy.table, sealed, filled), partial(self._made, copy, target, path)
        )

    def _make_file(self, source: int, path: str, table: int, sealed: bytes, filled: list[bool]) -> int:
        """In another thread: a whole, durable file with another name; its descriptor."""
        fd = self._disk.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        for start in range(0, table, _CHUNK_BYTES):
            if any(filled[start >> 12 : (start >> 12) + _CHUNK_BLOCKS]):
                self._copy_filled(source, fd, start, filled[start >> 12 : (start >> 12) + _CHUNK_BLOCKS])
        write_all(self._disk, fd, sealed, table)
        self._disk.fdatasync(fd)
        return fd

    def _copy_filled(self, source: int, fd: int, start: int, filled: list[bool]) -> None:
        data = bytearray(len(filled) << 12)
        self._disk.preadv(source, (data,), start)
        view = memoryview(data)
        first = 0
        while first < len(filled):
            last = first + 1
            while last < len(filled) and filled[last] == filled[first]:
                last += 1
            if filled[first]:
                write_all(self._disk, fd, view[first << 12 : last << 12], start + (first << 12))
            first = last

    def _made(self, copy: Copy, target: ObjectDirectory, path: str, result: int | OSError) -> None:
        copies = self._copies
        if isinstance(result, OSError) or copy.gone or copy.home.failed or target.failed or copy.pins > 1:
            if isinstance(result, OSError):
                copies.log(4, f"{oid_name(copy.oid)} cannot move to {target.path}: {result}")
            else:
                self._disk.close(result)
            self._forget_file(path)
            self._release(copy)
            self._later()
            return
        old_home, old_path, old_fd = copy.home, copy.path, copy.fd
        try:
            self._disk.rename(path, target.file_path(copy.oid))
        except OSError as error:
            self._disk.close(result)
            copies.fail(target, error)
            self._release(copy)
            self._done()
            return
        target.names_changed = old_home.names_changed = True
        old_home.used -= copy.allocated
        target.used += copy.allocated
        copy.home, copy.path, copy.fd = target, target.file_path(copy.oid), result
        self._disk.close(old_fd)

        def swap() -> None:
            self._disk.sync_directory(target.path)
            self._disk.unlink(old_path)
            self._disk.sync_directory(old_home.path)

        copies.workers.run(swap, partial(self._swapped, copy, target, old_home))

    def _swapped(self, copy: Copy, target: ObjectDirectory, old: ObjectDirectory, result: OSError | None) -> None:
        if isinstance(result, OSError):
            self._copies.fail(old, result)
        else:
            self.moved += 1
        self._release(copy)
        self._done()

    def _release(self, copy: Copy) -> None:
        copy.pins -= 1
        self._copies.open_gate(copy)

    def _forget_file(self, path: str) -> None:
        with contextlib.suppress(OSError):  # it is dropped at the next start
            self._disk.unlink(path)

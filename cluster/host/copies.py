"""All copies of a node: which disk has which, which files are open, who waits for one, what failed.

Operations on one copy run in call order: while its file is being opened or a block comes from the disk, they queue.
"""

from __future__ import annotations

import errno
from bisect import bisect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final, TypeAlias

from sheepdog.cluster.core.errors import Corrupt, DiskError, ExhaustedResources, NoObject, NoSpace, StoreError
from sheepdog.cluster.core.ids import NO_VERSION, STRIP_SHIFT, ObjectId, Version, oid_name
from sheepdog.cluster.core.ports import Log
from sheepdog.cluster.host.directory import ObjectDirectory, is_exhausted, is_no_room
from sheepdog.cluster.host.disk import Disk
from sheepdog.cluster.host.object_file import Copy, OpenFiles, open_copy, open_copy_cached
from sheepdog.cluster.host.rot import WHOLE, Rot
from sheepdog.cluster.host.trailer import block_hash
from sheepdog.cluster.host.workers import Workers

DISK_POINTS: Final = 128  # of an average disk on the node's ring: shares within about 10 % of the weights

DiskFailed: TypeAlias = Callable[[str, str, bool], None]
"""on_disk_failure(path, text, last): this disk is out of service; `last`: the node cannot store any more."""


class Superseded(NoObject):
    """The copy was removed or replaced while the operation waited for its file."""

    def __init__(self, copy: Copy) -> None:
        super().__init__(f"the copy of {oid_name(copy.oid)} has been replaced")
        self.copy = copy


class Copies:
    """The index of copies, spread over disks by a ring weighted by their sizes."""

    def __init__(
        self, disk: Disk, workers: Workers, log: Log, on_disk_failure: DiskFailed, settle: Callable[[Copy], None]
    ) -> None:
        self.disk = disk
        self.workers = workers
        self.log = log
        self.on_disk_failure = on_disk_failure
        self.disk_out: Callable[[ObjectDirectory, list[ObjectId]], None] = lambda home, lost: None
        self.homes: list[ObjectDirectory] = []
        self.by_oid: dict[ObjectId, Copy] = {}
        self.files = OpenFiles(disk, settle)
        self.rot = Rot()
        self._points: list[tuple[int, ObjectDirectory]] = []
        self._hashes: list[int] = []

    # Disks

    def add_home(self, home: ObjectDirectory) -> None:
        """A disk and the copies on it. A copy that another disk has too is kept on the disk where the ring wants it."""
        found = home.load()  # OSError: then the disk is none of the node's
        self.homes = [other for other in self.homes if other.path != home.path] + [home]
        self._arrange()
        for listed in found:
            copy = Copy(listed.oid, listed.size, listed.version, home)
            if home.doubtful:
                copy.version = copy.applied = NO_VERSION
            copy.allocated = listed.allocated
            other = self.by_oid.get(listed.oid)
            if other is not None:
                copy, surplus = (copy, other) if self._prefer(copy, other) else (other, copy)
                self.log(4, f"{surplus.path}: {copy.path} is the newer copy, this one is dropped")
                self._drop_surplus(surplus)
            self.by_oid[listed.oid] = copy
        self._count_used()

    def _drop_surplus(self, copy: Copy) -> None:
        try:
            self.disk.unlink(copy.path)
            copy.home.sync()
        except OSError as error:
            self.log(4, f"{copy.path} cannot be removed: {error.strerror}")

    def _prefer(self, copy: Copy, other: Copy) -> bool:
        if copy.version != other.version:
            return copy.version > other.version
        return self.home_for(copy.oid) is copy.home

    def remove_home(self, home: ObjectDirectory) -> list[ObjectId]:
        """Takes a disk out of service; returns what was on it. Its files stay as they are."""
        home.failed = True
        self._arrange()
        return self._lose(home)

    def _lose(self, home: ObjectDirectory) -> list[ObjectId]:
        """The copies of a disk that is out: they have no version and are restored to another disk.

        They do not just vanish: peering takes a missing copy of a current member for a deletion.
        """
        lost = []
        for oid, copy in self.by_oid.items():
            if copy.home is home:
                copy.version = NO_VERSION
                copy.size = -1
                copy.restoring = True
                self.files.forget(copy)  # so that every later operation meets the failure
                lost.append(oid)
        return lost

    def home_for(self, oid: ObjectId) -> ObjectDirectory | None:
        """The disk where the ring puts an object; None without any disk in service."""
        if not self._points:
            return None
        index = bisect(self._hashes, block_hash(oid.to_bytes(8 if oid < 1 << STRIP_SHIFT else 9, "little")))
        return self._points[index % len(self._points)][1]

    def _arrange(self) -> None:
        homes = [home for home in self.homes if not home.failed]
        average = sum(home.weight for home in homes) / max(1, len(homes)) or 1
        self._points = sorted(
            (
                (block_hash(home.identity + point.to_bytes(4, "little")), home)
                for home in homes
                for point in range(max(1, round(DISK_POINTS * home.weight / average)))
            ),
            key=lambda entry: entry[0],
        )
        self._hashes = [point for point, _ in self._points]

    def _count_used(self) -> None:
        for home in self.homes:
            home.used = 0
        for copy in self.by_oid.values():
            copy.home.used += copy.allocated

    # Finding

    def find(self, oid: ObjectId) -> Copy:
        copy = self.by_oid.get(oid)
        if copy is None:
            raise NoObject(f"no copy of {oid:016x} here")
        return copy

    def inventory(self) -> Iterable[tuple[ObjectId, Version]]:
        return [(oid, self.by_oid[oid].version) for oid in sorted(self.by_oid)]

    def replace(self, oid: ObjectId, copy: Copy | None) -> Copy | None:
        """From now on `copy` (its file open, or unmade) is the object; None: there is none. Returns what was there."""
        old = self.by_oid.pop(oid, None)
        if old is not None:
            self.rot.replaced(oid)
            old.home.used -= old.allocated
            self.files.retire(old)
        if copy is not None:
            copy.gone = False
            copy.home.used += copy.allocated
            self.by_oid[oid] = copy
            if copy.fd >= 0:
                self.files.add(copy)
        return old

    def grow(self, copy: Copy, size_bytes: int) -> None:
        """The copy takes so much more (or less) of its disk."""
        copy.allocated += size_bytes
        if not copy.gone:
            copy.home.used += size_bytes

    # Opening and queueing

    def with_open(self, oid: ObjectId, action: Callable[[Copy], None], failed: Callable[[StoreError], object]) -> None:
        """Runs the action on the open copy, behind those that wait already."""
        copy = self.by_oid.get(oid)
        if copy is None:
            failed(NoObject(f"no copy of {oid:016x} here"))
        elif copy.fd >= 0 and not copy.busy:
            self.files.used(oid)
            action(copy)
        elif copy.unmade and not copy.busy:
            action(copy)
        else:
            self.queue(copy, action, failed)

    def queue(self, copy: Copy, action: Callable[[Copy], None], failed: Callable[[StoreError], object]) -> None:
        def turn(error: StoreError | None) -> None:
            if error is None:
                action(copy)
            else:
                failed(error)

        copy.waiting.append(turn)
        if not copy.busy:
            copy.busy = True
            self._drain(copy)

    def close_gate(self, copy: Copy) -> None:
        """Operations on the copy queue until `open_gate`."""
        copy.gated = copy.busy = True

    def open_gate(self, copy: Copy) -> None:
        copy.gated = False
        self._drain(copy)

    def _drain(self, copy: Copy) -> None:
        """Runs what waits, until something has to wait for the disk again."""
        waiting = copy.waiting
        while waiting and not copy.gated:
            if copy.fd < 0 and copy.gone:  # at its path is another object now, if any
                waiting.popleft()(Superseded(copy))
                continue
            if copy.fd < 0 and not copy.unmade and self.files.crowded():
                self.close_gate(copy)
                self.files.when_room(partial(self._room, copy), None)
                return
            if copy.fd < 0 and not copy.unmade and not self._open_cached(copy):
                self._open_slowly(copy)
                return
            waiting.popleft()(None)
        copy.busy = copy.gated
        if copy.gone:
            self.files.close_if_unused(copy)

    def _room(self, copy: Copy, error: StoreError | None) -> None:
        self.open_gate(copy)

    def _open_cached(self, copy: Copy) -> bool:
        """Opens the file at once when nothing of that waits for the disk: a thread takes ten times as long."""
        found = None if copy.home.failed else open_copy_cached(self.disk, copy)
        if found is not None:
            self._attach(copy, *found)
        return found is not None

    def _open_slowly(self, copy: Copy) -> None:
        copy.gated = True

        def opened(result: tuple[int, bytearray] | StoreError | OSError) -> None:
            copy.gated = False
            if isinstance(result, tuple):
                if copy.gone:
                    self.disk.close(result[0])
                else:
                    self._attach(copy, *result)
                self._drain(copy)
                return
            error = self._opening_failed(copy, result)
            waiting = list(copy.waiting)
            copy.waiting.clear()
            copy.busy = False
            for action in waiting:
                action(error)

        def job() -> tuple[int, bytearray] | StoreError:
            try:
                return open_copy(self.disk, copy)
            except StoreError as error:
                return error

        if copy.home.failed:
            opened(OSError(errno.EIO, "out of service"))
        else:
            self.workers.run(job, opened)

    def open_now(self, copy: Copy) -> StoreError | None:
        """Opens the file on this thread unless it is open, or not made yet."""
        if copy.fd >= 0 or copy.unmade:
            return None
        if copy.home.failed:
            return DiskError(f"{copy.home.path} is out of service")
        try:
            self._attach(copy, *open_copy(self.disk, copy))
        except (StoreError, OSError) as error:
            return self._opening_failed(copy, error)
        return None

    def _attach(self, copy: Copy, fd: int, data: bytearray) -> None:
        if copy.fd >= 0:  # somebody opened it on the loop's thread meanwhile
            self.disk.close(fd)
            return
        copy.attach(fd, data)
        if not copy.gone:  # otherwise it is closed when its queue is empty
            self.files.add(copy)

    def _opening_failed(self, copy: Copy, error: StoreError | OSError) -> StoreError:
        if copy.gone and isinstance(error, (FileNotFoundError, StoreError)):  # at its path is another, if any
            return Superseded(copy)
        if isinstance(error, FileNotFoundError):
            if not self._is_alive(copy.home):
                return self.fail(copy.home, error)
            self.log(3, f"{copy.path} has vanished")
            return self._give_up(copy)
        if isinstance(error, OSError):
            return self.fail(copy.home, error)
        self.log(3, f"{copy.path}: {error}; the copy needs a restore")
        return self._give_up(copy)

    def _is_alive(self, home: ObjectDirectory) -> bool:
        """Is the directory itself still there? Removing it under a running daemon fails the disk (cli.md 4)."""
        try:
            self.disk.space(home.path)
        except OSError:
            return False
        return True

    def _give_up(self, copy: Copy) -> StoreError:
        """The copy's file cannot be used: another copy has to restore it."""
        copy.version = copy.applied = NO_VERSION
        copy.restoring = True
        copy.size = -1
        self.rot.note(copy.oid, [WHOLE])
        return Corrupt(f"the copy of {oid_name(copy.oid)} in {copy.home.path} is unreadable", (), copy.home.path)

    def corrupt(self, copy: Copy, blocks: list[int]) -> Corrupt:
        """These blocks of the copy do not match their hashes."""
        self.rot.note(copy.oid, blocks)
        self.log(3, f"{copy.path}: blocks {blocks} do not match their hashes")
        text = f"{oid_name(copy.oid)}: blocks {blocks} in {copy.home.path} are corrupt"
        return Corrupt(text, tuple(blocks), copy.home.path)

    # Failing

    def write_failed(self, home: ObjectDirectory, error: OSError) -> StoreError:
        """What a failed write means: a full disk is an answer, all else takes the disk out."""
        if is_no_room(error):
            return NoSpace(f"{home.path} is full")
        return self.fail(home, error)

    def fail(self, home: ObjectDirectory, error: OSError, promised: bool = False) -> StoreError:
        """The disk is out of service from here on; what it holds may be wrong.

        A lack of memory or descriptors is not the disk's fault, unless what failed was `promised`: a sync, or a change
        that somebody was told of.
        """
        text = f"{home.path}: {error.strerror or error}"
        if home.failed:
            return DiskError(text)
        if is_exhausted(error) and not promised:
            self.log(3, text)
            return ExhaustedResources(text)
        home.failed = True
        self.log(2, f"{text}: the disk is out of service")
        self._arrange()
        lost = self._lose(home)
        self.on_disk_failure(home.path, text, not self._points)
        self.disk_out(home, lost)
        return DiskError(text)

    def sync_failed(self, home: ObjectDirectory, error: OSError) -> StoreError:
        """Whatever the reason: the kernel tells it once, and a second sync would say that all is well."""
        return self.fail(home, error, promised=True)

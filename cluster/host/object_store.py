"""The objects of a node on its disks: `ports.Store` over files (docs/format.md).

Called on the loop's thread. Reads and writes that the page cache can take run there at once; what may block (misses,
syncs) runs in `Workers` and ends in a callback on the loop's thread. Overlapping writes take effect in call order.
Every block read is verified. An I/O error takes the disk out of service: it is reported once, never retried.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final, TypeAlias

from sheepdog.cluster.core.errors import Corrupt, DiskError, NoObject, NoSpace, Result, StoreError
from sheepdog.cluster.core.ids import NO_VERSION, ObjectId, Version, Vid
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.ports import Buffer, Done, Log, ReadDone
from sheepdog.cluster.host import trailer
from sheepdog.cluster.host.directory import Listed, ObjectDirectory, write_all
from sheepdog.cluster.host.disk import Disk
from sheepdog.cluster.host.object_file import Copy, OpenFiles, open_copy, write_trailer
from sheepdog.cluster.host.syncs import DirectorySyncs, FileSyncs
from sheepdog.cluster.host.trailer import FIRST_ENTRY, block_hash
from sheepdog.cluster.host.workers import Workers

_BLOCK_MASK: Final = BLOCK_SIZE - 1
READ_RETRIES: Final = 8  # of a slow read that met a write of the same blocks; then it reads on the loop's thread

DiskFailed: TypeAlias = Callable[[str, str], None]
"""on_disk_failure(path, text): this disk is out of service from now on."""
Step: TypeAlias = Callable[[], None]


class OutOfRange(StoreError):
    """The range lies outside the object."""

    result = Result.INVALID_PARMS


class Superseded(NoObject):
    """The copy was removed or replaced while the operation waited for its file."""


class ExhaustedResources(StoreError):
    """The system has no descriptors or memory left; nothing is wrong with the disk."""

    result = Result.NO_MEM


class ObjectStore:
    """`ports.Store` on one directory. With `nosync` nothing waits for a sync (P2 is void)."""

    def __init__(
        self,
        directory: str,
        disk: Disk,
        workers: Workers,
        log: Log,
        on_disk_failure: DiskFailed,
        nosync: bool = False,
    ) -> None:
        self._disk = disk
        self._workers = workers
        self._log = log
        self._on_disk_failure = on_disk_failure
        self._nosync = nosync
        self._home = ObjectDirectory(disk, directory, log)
        self._copies: dict[ObjectId, Copy] = {}
        self._syncs = FileSyncs(disk, workers, self._fail, self._synced)
        self._directory = DirectorySyncs(self._home, workers, self._fail)
        self._files = OpenFiles(disk, None if nosync else lambda copy: self._syncs.sync(copy, _ignore))
        self._used = 0  # bytes allocated by objects
        self._steps: dict[ObjectId, deque[Step]] = {}  # creations and removals under way, in order, per object
        self._when_settled: list[Callable[[], None]] = []

    # Life

    def open(self) -> None:
        """Makes the directories and learns what is there; UsageError, OSError."""
        self._home.prepare()
        for listed in self._home.load():
            copy = Copy(listed.oid, listed.size, listed.version, self._home)
            copy.allocated = listed.allocated
            self._used += listed.allocated
            self._copies[listed.oid] = copy

    def close(self, done: Callable[[], None]) -> None:
        """Makes everything durable and writes the index that speeds up the next start.

        Nothing may be called after this.
        """

        def flushed(error: StoreError | None) -> None:
            if error is None and not self._home.failed:
                listed = (Listed(c.oid, c.size, c.allocated, c.version) for c in self._copies.values())
                try:
                    self._disk.sync_filesystem(self._home.path)
                    self._home.save_index(listed)
                except OSError as failure:
                    self._log(4, f"{self._home.path}: no index written: {failure}")
            self._files.close_all()
            done()

        def settled() -> None:
            self.flush(None, flushed)

        if self._steps:
            self._when_settled.append(settled)
        else:
            settled()

    # What is here

    def version(self, oid: ObjectId) -> Version | None:
        copy = self._copies.get(oid)
        return None if copy is None else copy.version

    def inventory(self) -> Iterable[tuple[ObjectId, Version]]:
        return [(oid, self._copies[oid].version) for oid in sorted(self._copies)]

    def size(self, oid: ObjectId) -> int:
        return self._find(oid).size

    def table(self, oid: ObjectId) -> bytes:
        copy = self._find(oid)
        if copy.fd < 0:
            error = self._open_now(copy)
            if error is not None:
                raise error
        return bytes(copy.trailer[trailer.HEADER_SIZE :])

    def usage(self) -> tuple[int, int]:
        return self._used, 0 if self._home.failed else self._home.free()

    def _find(self, oid: ObjectId) -> Copy:
        copy = self._copies.get(oid)
        if copy is None:
            raise NoObject(f"no copy of {oid:016x} here")
        return copy

    # Opening and queueing

    def _with(self, oid: ObjectId, action: Callable[[Copy], None], failed: Callable[[StoreError], object]) -> None:
        """Runs the action on the open copy, behind those that wait already."""
        copy = self._copies.get(oid)
        if copy is None:
            failed(NoObject(f"no copy of {oid:016x} here"))
        elif copy.fd >= 0 and not copy.busy:
            self._files.used(oid)
            action(copy)
        else:

            def turn(error: StoreError | None) -> None:
                if error is None:
                    action(copy)
                else:
                    failed(error)

            copy.waiting.append(turn)
            if not copy.busy:
                copy.busy = True
                self._drain(copy)

    def _drain(self, copy: Copy) -> None:
        """Runs what waits, until something has to wait for the disk again."""
        waiting = copy.waiting
        while waiting and not copy.gated:
            if copy.fd < 0:
                self._open_slowly(copy)
                return
            waiting.popleft()(None)
        copy.busy = copy.gated
        if copy.gone:
            self._files.close_if_unused(copy)

    def _open_slowly(self, copy: Copy) -> None:
        copy.gated = True

        def opened(result: tuple[int, bytearray] | StoreError | OSError) -> None:
            copy.gated = False
            if isinstance(result, tuple):
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
                return open_copy(self._disk, copy)
            except StoreError as error:
                return error

        if copy.home.failed:
            opened(OSError(errno.EIO, "out of service"))
        else:
            self._workers.run(job, opened)

    def _open_now(self, copy: Copy) -> StoreError | None:
        """Opens on this thread."""
        if copy.home.failed:
            return DiskError(f"{copy.home.path} is out of service")
        try:
            self._attach(copy, *open_copy(self._disk, copy))
        except (StoreError, OSError) as error:
            return self._opening_failed(copy, error)
        return None

    def _attach(self, copy: Copy, fd: int, data: bytearray) -> None:
        if copy.fd >= 0:  # somebody opened it on the loop's thread meanwhile
            self._disk.close(fd)
            return
        copy.attach(fd, data)
        if copy.gone:
            return  # closed when its queue is empty
        self._files.add(copy)

    def _opening_failed(self, copy: Copy, error: StoreError | OSError) -> StoreError:
        if isinstance(error, FileNotFoundError):
            if copy.gone:
                return Superseded(f"no copy of {copy.oid:016x} here")
            self._log(3, f"{copy.path} has vanished")
            return self._give_up(copy)
        if isinstance(error, OSError):
            return self._fail(copy.home, error)
        self._log(3, f"{copy.path}: {error}; the copy needs a restore")
        return self._give_up(copy)

    def _give_up(self, copy: Copy) -> StoreError:
        """The copy's file cannot be used: another copy has to restore it."""
        copy.version = NO_VERSION
        copy.restoring = True
        copy.size = -1
        return Corrupt(f"the copy of {copy.oid:016x} here is unreadable")

    # Reading

    def read(self, oid: ObjectId, offset: int, length: int, done: ReadDone) -> None:
        copy = self._copies.get(oid)
        if copy is not None and length == BLOCK_SIZE and copy.fd >= 0 and not copy.busy and not offset & _BLOCK_MASK:
            entry = copy.entries[FIRST_ENTRY + (offset >> 12)] if offset + length <= copy.size else 0
            if entry:
                block = bytearray(BLOCK_SIZE)
                try:
                    count = self._disk.preadv_cached(copy.fd, (block,), offset)
                except OSError:
                    count = 0  # not cached, or an error that the slow way meets again
                if count == BLOCK_SIZE and block_hash(block) == entry:
                    self._files.used(oid)
                    done(block)
                    return
        self._with(oid, lambda copy: self._read(copy, offset, length, done, 0), done)

    def _read(self, copy: Copy, offset: int, length: int, done: ReadDone, tries: int) -> None:
        if not self._in_range(copy, offset, length, done):
            return
        first = offset >> 12
        last = (offset + length - 1) >> 12
        start = first << 12
        span = (last - first + 1) << 12
        entries = copy.entries
        if not any(entries[FIRST_ENTRY + first : FIRST_ENTRY + last + 1]) and self._disk.is_hole(copy.fd, start, span):
            done(bytes(length))
            return
        data = bytearray(span)
        try:
            count = (
                self._disk.preadv_cached(copy.fd, (data,), start)
                if tries < READ_RETRIES
                else self._disk.preadv(copy.fd, (data,), start)
            )
        except BlockingIOError:
            count = 0
        except OSError as error:
            done(self._fail(copy.home, error))
            return
        if count == span or tries >= READ_RETRIES:
            self._deliver(copy, data, offset, length, done)
            return
        self._read_slowly(copy, data, offset, length, done, tries)

    def _read_slowly(self, copy: Copy, data: bytearray, offset: int, length: int, done: ReadDone, tries: int) -> None:
        changes = copy.changes
        copy.pins += 1

        def finished(result: int | OSError) -> None:
            copy.pins -= 1
            if isinstance(result, OSError):
                done(self._fail(copy.home, result))
            elif copy.changes != changes:
                self._read(copy, offset, length, done, tries + 1)
            else:
                self._deliver(copy, data, offset, length, done)
            if copy.gone:
                self._files.close_if_unused(copy)

        self._workers.run(lambda: self._disk.preadv(copy.fd, (data,), offset & ~_BLOCK_MASK), finished)

    def _deliver(self, copy: Copy, data: bytearray, offset: int, length: int, done: ReadDone) -> None:
        """Verifies whole blocks and hands out the wanted part."""
        first = offset >> 12
        bad = trailer.bad_blocks(data, copy.entries, FIRST_ENTRY + first)
        if bad:
            done(self._corrupt(copy, [first + position for position in bad]))
        elif len(data) == length:
            done(data)
        else:
            start = offset & _BLOCK_MASK
            done(memoryview(data)[start : start + length])

    def _corrupt(self, copy: Copy, blocks: list[int]) -> Corrupt:
        self._log(3, f"{copy.path}: blocks {blocks} do not match their hashes")
        return Corrupt(f"{copy.oid:016x}: blocks {blocks} are corrupt here", tuple(blocks))

    @staticmethod
    def _in_range(copy: Copy, offset: int, length: int, failed: Callable[[StoreError], object]) -> bool:
        if offset < 0 or length <= 0 or offset + length > copy.size:
            failed(OutOfRange(f"{offset}+{length} is not inside {copy.oid:016x} of {copy.size} bytes"))
            return False
        return True

    # Writing

    def write(self, oid: ObjectId, offset: int, data: Buffer, version: Version, durable: bool, done: Done) -> None:
        copy = self._copies.get(oid)
        if copy is not None and copy.fd >= 0 and not copy.busy:
            self._files.used(oid)
            self._write(copy, offset, data, version, durable, done)
        else:
            self._with(
                oid, lambda copy: self._write(copy, offset, data, version, durable, done), _unless_superseded(done)
            )

    def _write(self, copy: Copy, offset: int, data: Buffer, version: Version, durable: bool, done: Done) -> None:
        length = len(data)
        if copy.restoring:
            done(NoObject(f"the copy of {copy.oid:016x} here is being restored"))
            return
        if not self._in_range(copy, offset, length, done):
            return
        end = offset + length
        if offset & _BLOCK_MASK or (end & _BLOCK_MASK and end != copy.size):
            merged = self._merge(
                copy, offset, data, done, lambda: self._write(copy, offset, data, version, durable, done)
            )
            if merged is None:
                return
            offset, data = merged
        error = self._put(copy, offset, data)
        if error is None:
            error = self._set_version(copy, version, offset >> 12, (len(data) + _BLOCK_MASK) >> 12)
        if error is not None:
            done(error)
        elif durable:
            self._sync_unless_nosync(copy, done)
        else:
            done(None)

    def _put(self, copy: Copy, offset: int, data: Buffer) -> StoreError | None:
        """Writes whole blocks (the object's last may be short) and their hashes in memory."""
        first = offset >> 12
        count = (len(data) + _BLOCK_MASK) >> 12
        index = FIRST_ENTRY + first
        entries = copy.entries
        if not all(entries[index : index + count]) and not self._home.has_room(count * BLOCK_SIZE):
            return NoSpace(f"{copy.home.path} is full")
        copy.changes += 1
        try:
            if len(data) > BLOCK_SIZE or self._disk.pwrite(copy.fd, data, offset) != len(data):
                write_all(self._disk, copy.fd, data, offset)
        except OSError as error:
            return self._write_failed(copy, first, count, error)
        if count == 1 and entries[index] and len(data) == BLOCK_SIZE:
            entries[index] = block_hash(data) or 1
        else:
            self._grow(copy, trailer.hash_blocks(data, entries, index))
        if not copy.dirty:
            self._syncs.mark_dirty(copy)
        return None

    def _grow(self, copy: Copy, blocks: int) -> None:
        copy.allocated += blocks * BLOCK_SIZE
        if not copy.gone:
            self._used += blocks * BLOCK_SIZE

    def _set_version(self, copy: Copy, version: Version, first: int, count: int) -> StoreError | None:
        copy.version = version
        trailer.set_version(copy.trailer, version)
        try:
            write_trailer(self._disk, copy, first, count)
        except OSError as error:
            return self._write_failed(copy, 0, 0, error)
        return None

    def _write_failed(self, copy: Copy, first: int, count: int, error: OSError) -> StoreError:
        """A write ended in the middle: what was a hole is one again, the rest shows as corrupt and is healed."""
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return self._fail(copy.home, error)
        for block in range(first, first + count):
            if not copy.entries[FIRST_ENTRY + block]:
                self._disk.punch(copy.fd, block * BLOCK_SIZE, BLOCK_SIZE)
        return NoSpace(f"{copy.home.path} is full")

    def _merge(
        self, copy: Copy, offset: int, data: Buffer, failed: Done, again: Callable[[], None]
    ) -> tuple[int, Buffer] | None:
        """The write widened to whole blocks, their rest read and verified.

        None when that failed, or when a block has to come from the disk first: then `again` is called later.
        """
        end = offset + len(data)
        start = offset & ~_BLOCK_MASK
        stop = min((end + _BLOCK_MASK) & ~_BLOCK_MASK, copy.size)
        merged = bytearray(stop - start)
        edges = {start} if offset & _BLOCK_MASK else set()
        if end != stop:
            edges.add(stop - 1 & ~_BLOCK_MASK)
        for edge in sorted(edges):
            block = bytearray(BLOCK_SIZE)
            index = FIRST_ENTRY + (edge >> 12)
            try:
                count = self._disk.preadv_cached(copy.fd, (block,), edge)
            except BlockingIOError:
                count = 0
            except OSError as error:
                failed(self._fail(copy.home, error))
                return None
            if count < BLOCK_SIZE:
                self._fetch(copy, edge, failed, again)
                return None
            if trailer.bad_blocks(block, copy.entries, index):
                failed(self._corrupt(copy, [edge >> 12]))
                return None
            keep = min(BLOCK_SIZE, stop - edge)
            merged[edge - start : edge - start + keep] = memoryview(block)[:keep]
        merged[offset - start : end - start] = data
        return start, merged

    def _fetch(self, copy: Copy, offset: int, failed: Done, again: Callable[[], None]) -> None:
        """Brings a block into the page cache; operations on the copy wait meanwhile."""
        copy.gated = copy.busy = True
        copy.pins += 1

        def fetched(result: int | OSError) -> None:
            copy.pins -= 1
            copy.gated = False
            if isinstance(result, OSError):
                failed(self._fail(copy.home, result))
            else:
                again()
            self._drain(copy)

        self._workers.run(lambda: self._disk.preadv(copy.fd, (bytearray(BLOCK_SIZE),), offset), fetched)

    def punch(self, oid: ObjectId, offset: int, length: int, version: Version, durable: bool, done: Done) -> None:
        self._with(
            oid, lambda copy: self._punch(copy, offset, length, version, durable, done), _unless_superseded(done)
        )

    def _punch(self, copy: Copy, offset: int, length: int, version: Version, durable: bool, done: Done) -> None:
        if copy.restoring:
            done(NoObject(f"the copy of {copy.oid:016x} here is being restored"))
            return
        if not self._in_range(copy, offset, length, done):
            return
        end = offset + length
        first = (offset + _BLOCK_MASK) >> 12
        last = (end + _BLOCK_MASK if end == copy.size else end) >> 12
        # Parts of blocks at the edges are overwritten with zeros.
        edges = []
        if first > last:
            edges.append((offset, end))
        else:
            if offset < first << 12:
                edges.append((offset, first << 12))
            if end > last << 12:
                edges.append((last << 12, end))
        again = lambda: self._punch(copy, offset, length, version, durable, done)  # noqa: E731
        parts = []
        for start, stop in edges:
            if copy.entries[FIRST_ENTRY + (start >> 12)]:  # zeros in a hole change nothing
                merged = self._merge(copy, start, bytes(stop - start), done, again)
                if merged is None:
                    return
                parts.append(merged)
        error: StoreError | None = None
        for part in parts:
            error = error or self._put(copy, *part)
        if error is None and first < last:
            error = self._make_holes(copy, first, last - first)
        if error is None:
            error = self._set_version(copy, version, offset >> 12, ((end + _BLOCK_MASK) >> 12) - (offset >> 12))
        if error is not None:
            done(error)
        elif durable:
            self._sync_unless_nosync(copy, done)
        else:
            done(None)

    def _make_holes(self, copy: Copy, first: int, count: int) -> StoreError | None:
        copy.changes += 1
        self._clear_entries(copy, first, count)
        if not copy.dirty:
            self._syncs.mark_dirty(copy)
        try:
            self._disk.punch(copy.fd, first * BLOCK_SIZE, count * BLOCK_SIZE)
        except OSError as error:
            return self._fail(copy.home, error)
        return None

    def _clear_entries(self, copy: Copy, first: int, count: int) -> None:
        index = FIRST_ENTRY + first
        filled = sum(1 for entry in copy.entries[index : index + count] if entry)
        copy.trailer[index * 8 : (index + count) * 8] = bytes(count * 8)
        self._grow(copy, -filled)

    # Creating and removing

    def create(
        self, oid: ObjectId, size: int, offset: int, data: Buffer, version: Version, durable: bool, done: Done
    ) -> None:
        if offset < 0 or size <= 0 or offset + len(data) > size:
            done(OutOfRange(f"{offset}+{len(data)} is not inside {oid:016x} of {size} bytes"))
            return
        made = self._make_file(oid, size, version)
        if isinstance(made, StoreError):
            done(made)
            return
        copy, path = made
        error = self._fill(copy, offset, data)
        if error is not None:
            self._discard_file(copy, path)
            done(error)
            return
        self._install(copy, path, done)

    def _make_file(self, oid: ObjectId, size: int, version: Version, flags: int = 0) -> tuple[Copy, str] | StoreError:
        """A new file of holes with its trailer, not in place yet: the copy and the file's present path."""
        if self._home.failed:
            return DiskError(f"{self._home.path} is out of service")
        if not self._home.has_room(trailer.trailer_size(size)):
            return NoSpace(f"{self._home.path} is full")
        copy = Copy(oid, size, version, self._home)
        copy.gone = copy.dirty = True  # not the object's file yet, and not synced
        data = bytearray(trailer.trailer_size(size))
        trailer.Header(oid, size, version, flags=flags).pack_into(data)
        path = self._home.new_path(oid)
        try:
            copy.attach(self._disk.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL), data)
        except OSError as error:
            return self._write_failed(copy, 0, 0, error)
        try:
            write_all(self._disk, copy.fd, data, copy.table)
        except OSError as error:
            failure = self._write_failed(copy, 0, 0, error)
            self._discard_file(copy, path)
            return failure
        copy.allocated = (len(data) + _BLOCK_MASK) & ~_BLOCK_MASK
        return copy, path

    def _fill(self, copy: Copy, offset: int, data: Buffer) -> StoreError | None:
        """First contents of a new file; blocks that are all zero stay holes."""
        head = offset & _BLOCK_MASK
        tail = -(offset + len(data)) & _BLOCK_MASK
        if head or tail:
            data = bytes(head) + bytes(data) + bytes(min(tail, copy.size - offset - len(data)))
        offset -= head
        view = memoryview(data)
        for start, stop in trailer.filled_runs(view):
            error = self._put(copy, offset + start, view[start:stop])
            if error is not None:
                return error
        first, count = offset >> 12, (len(view) + _BLOCK_MASK) >> 12
        try:
            write_trailer(self._disk, copy, first, count)
        except OSError as error:
            return self._write_failed(copy, 0, 0, error)
        return None

    def _discard_file(self, copy: Copy, path: str) -> None:
        """Undoes `_make_file`."""
        self._disk.close(copy.detach())
        try:
            self._disk.unlink(path)
        except OSError as error:
            self._fail(copy.home, error)

    def _install(self, copy: Copy, path: str, done: Done) -> None:
        """Makes the new file the object's: at once for every call, durably at `done`."""
        oid = copy.oid
        self._replace(oid, copy)
        copy.pins += 1  # its path changes yet

        def finish(error: StoreError | None) -> None:
            copy.pins -= 1
            self._files.close_if_unused(copy)
            done(error)
            self._next_step(oid)

        def rename(error: StoreError | None) -> None:
            if error is None:
                try:
                    self._disk.rename(path, copy.path)
                except OSError as failure:
                    error = self._fail(copy.home, failure)
            if error is not None or self._nosync:
                finish(error)
            else:
                self._directory.sync(finish)

        self._step(oid, (lambda: rename(None)) if self._nosync else (lambda: self._syncs.sync(copy, rename)))

    def remove(self, oid: ObjectId, done: Done) -> None:
        copy = self._copies.get(oid)
        if copy is None:
            done(None)
            return
        self._replace(oid, None)

        def finish(error: StoreError | None) -> None:
            done(error)
            self._next_step(oid)

        def unlink() -> None:
            try:
                self._disk.unlink(copy.path)
            except FileNotFoundError:
                pass
            except OSError as error:
                finish(self._fail(copy.home, error))
                return
            if self._nosync:
                finish(None)
            else:
                self._directory.sync(finish)

        self._step(oid, unlink)

    def _replace(self, oid: ObjectId, copy: Copy | None) -> None:
        """From now on `copy` is the object (None: there is none)."""
        old = self._copies.pop(oid, None)
        if old is not None:
            self._used -= old.allocated
            self._syncs.forget(old)
            self._files.retire(old)
        if copy is not None:
            copy.gone = False
            self._used += copy.allocated
            self._copies[oid] = copy
            self._files.add(copy)
            self._syncs.mark_dirty(copy)

    def _step(self, oid: ObjectId, step: Step) -> None:
        """Runs a step that changes names, after the object's earlier ones."""
        steps = self._steps.get(oid)
        if steps is not None:
            steps.append(step)
            return
        self._steps[oid] = deque()
        step()

    def _next_step(self, oid: ObjectId) -> None:
        steps = self._steps[oid]
        if steps:
            steps.popleft()()
            return
        del self._steps[oid]
        if not self._steps:
            calls, self._when_settled = self._when_settled, []
            for call in calls:
                call()

    # Restoring

    def restore_begin(self, oid: ObjectId, size: int) -> None:
        copy = self._copies.get(oid)
        if copy is not None and copy.size == size:
            if not copy.restoring:
                copy.restoring = True
                copy.version = NO_VERSION
                if copy.fd < 0 and not copy.busy:
                    self._open_now(copy)  # what follows looks at the table at once
                self._with(oid, self._mark_restoring, _ignore)
            return
        made = self._make_file(oid, size, NO_VERSION, trailer.RESTORING)
        if isinstance(made, StoreError):
            self._log(4, f"{oid:016x} cannot be restored here: {made}")
        else:
            self._install(*made, _ignore)

    def _mark_restoring(self, copy: Copy) -> None:
        """The mark is durable before any byte of the copy changes."""
        trailer.set_flags(copy.trailer, trailer.RESTORING)
        try:
            write_trailer(self._disk, copy, 0, 0)
        except OSError as error:
            self._write_failed(copy, 0, 0, error)
        if not copy.dirty:
            self._syncs.mark_dirty(copy)
        if not self._nosync:
            copy.gated = copy.busy = True
            self._syncs.sync(copy, lambda error: self._open_gate(copy))

    def _open_gate(self, copy: Copy) -> None:
        copy.gated = False
        self._drain(copy)

    def restore_write(self, oid: ObjectId, offset: int, data: Buffer, done: Done) -> None:
        def action(copy: Copy) -> None:
            if self._can_restore(copy, offset, len(data), done):
                error = self._put(copy, offset, data)
                done(error or self._put_entries(copy, offset, len(data)))

        self._with(oid, action, done)

    def restore_punch(self, oid: ObjectId, offset: int, length: int) -> None:
        """The table shows the holes at once; the file gets them when the mark of the restore is durable."""
        first, count = offset >> 12, (length + _BLOCK_MASK) >> 12

        def action(copy: Copy) -> None:
            if self._can_restore(copy, offset, length, _ignore):
                self._make_holes(copy, first, count)
                self._put_entries(copy, offset, length)

        copy = self._copies.get(oid)
        if copy is not None and copy.fd >= 0 and self._can_restore(copy, offset, length, _ignore):
            self._clear_entries(copy, first, count)
        self._with(oid, action, _ignore)

    def _can_restore(self, copy: Copy, offset: int, length: int, failed: Done) -> bool:
        if not copy.restoring:
            failed(StoreError(f"no restore of {copy.oid:016x} has begun"))
            return False
        end = offset + length
        if offset & _BLOCK_MASK or (end & _BLOCK_MASK and end != copy.size):
            failed(OutOfRange("a restore takes whole blocks"))
            return False
        return self._in_range(copy, offset, length, failed)

    def _put_entries(self, copy: Copy, offset: int, length: int) -> StoreError | None:
        try:
            write_trailer(self._disk, copy, offset >> 12, (length + _BLOCK_MASK) >> 12)
        except OSError as error:
            return self._write_failed(copy, 0, 0, error)
        return None

    def restore_finish(self, oid: ObjectId, version: Version, done: Done) -> None:
        def action(copy: Copy) -> None:
            if not copy.restoring:
                done(StoreError(f"no restore of {oid:016x} has begun"))
                return

            def finish(error: StoreError | None) -> None:
                self._finish(copy, version, error, done)

            copy.gated = copy.busy = True
            # Behind the rename of a new file, which is durable then.
            self._step(
                oid, lambda: self._sync_unless_nosync(copy, lambda error: self._finish(copy, version, error, done))
            )

        self._with(oid, action, done)

    def _finish(self, copy: Copy, version: Version, error: StoreError | None, done: Done) -> None:
        """Everything but the version is durable."""

        def finished(error: StoreError | None) -> None:
            if error is None:
                copy.restoring = False
                copy.version = version
            done(error)
            self._next_step(copy.oid)
            self._open_gate(copy)

        if error is None:
            trailer.Header(copy.oid, copy.size, version).pack_into(copy.trailer)
            error = self._put_entries(copy, 0, 0)
        if error is not None:
            finished(error)
            return
        if not copy.dirty and not copy.gone:
            self._syncs.mark_dirty(copy)
        self._sync_unless_nosync(copy, finished)

    def _sync_unless_nosync(self, copy: Copy, done: Done) -> None:
        if self._nosync:
            done(None)
        else:
            self._syncs.sync(copy, done)

    # Durability and failure

    def flush(self, vids: frozenset[Vid] | None, done: Done) -> None:
        if self._nosync:
            done(None)
        else:
            self._syncs.flush(vids, done)

    def _synced(self, copy: Copy) -> None:
        self._files.close_if_unused(copy)
        self._files.shrink()

    def _fail(self, home: ObjectDirectory, error: OSError) -> StoreError:
        """The disk is out of service from here on; what it holds may be wrong."""
        text = f"{home.path}: {error.strerror or error}"
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM) and not home.failed:
            self._log(3, text)
            return ExhaustedResources(text)
        if not home.failed:
            home.failed = True
            self._log(2, f"{text}: the disk is out of service")
            self._files.close_all()  # so that every later operation meets the failure
            self._on_disk_failure(home.path, text)
        return DiskError(text)


def _unless_superseded(done: Done) -> Done:
    """A write that came before a removal or replacement has taken effect, whatever became of the file."""
    return lambda error: done(None if isinstance(error, Superseded) else error)


def _ignore(error: StoreError | None) -> None:
    """A sync that nobody waits for; its failure takes the disk out of service all the same."""

"""Brings records that may be seen by a crash into the object files, in order.

Small changes happen on the loop's thread; a large write goes to another thread, and what follows for the same copy
waits for it. `touched` are the copies whose trailer on the disk is older than the one in memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final, TypeAlias

from sheepdog.cluster.core.errors import DiskError, StoreError
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.ports import Done
from sheepdog.cluster.host.copies import Copies
from sheepdog.cluster.host.directory import is_exhausted, is_no_room, write_all
from sheepdog.cluster.host.disk import Disk
from sheepdog.cluster.host.no_room import NoRoom
from sheepdog.cluster.host.object_file import Copy, make_file, write_trailer
from sheepdog.cluster.host.records import PunchRecord, Record, RecordKind
from sheepdog.cluster.host.syncs import DirectorySyncs, FileSyncs
from sheepdog.cluster.host.trailer import FIRST_ENTRY, RESTORING, filled_runs

NoteDone: TypeAlias = Callable[[Copy, int, Done | None], None]
# Written by another thread. That hands the interpreter over and back for each 64 KiB: smaller writes are done sooner,
# with a quarter less work in all, than it gets its turns.
SLOW_WRITE_BYTES: Final = 2 << 20


def punch_file(disk: Disk, copy: Copy, record: PunchRecord) -> None:
    """Holes and edge blocks of the record, in the copy's file; OSError."""
    edges = dict(record.edges())
    first, last = record.first, record.first + record.count
    inner = [block for block in range(first, last) if block not in edges]
    if inner:  # edges are at the ends, so what is left is one run
        disk.punch(copy.fd, inner[0] << 12, len(inner) << 12)
    for block, data in edges.items():
        write_all(disk, copy.fd, data, block << 12)


class Applier:
    """Applies records, each exactly once."""

    def __init__(
        self, copies: Copies, syncs: FileSyncs, directories: DirectorySyncs, no_room: NoRoom, nosync: bool
    ) -> None:
        self._copies = copies
        self._disk = copies.disk
        self._syncs = syncs
        self._directories = directories
        self._no_room = no_room
        self._nosync = nosync
        self.note_done: NoteDone = _unset  # the pipeline's, which comes after this
        self.answer_behind: Callable[[Record], None] = _unset  # the pipeline's
        self.touched: dict[Copy, None] = {}
        self.barriers: list[tuple[int, Callable[[], None]]] = []  # (lsn, call when all before it is applied)
        self._reached = 0
        self.unnamed: dict[
            Copy, bool
        ] = {}  # new, their names are not yet on the disk; True: nor in the journal their bytes
        self.unnamed_intents: dict[Copy, list[int]] = {}  # of those: large writes whose bytes are on the disk
        self._slow: dict[Copy, int] = {}  # lsn of the write under way in another thread, or that waits for room
        self._parked: dict[Copy, None] = {}  # those that wait for room

    def apply(self, record: Record) -> None:
        copy = record.copy
        if copy.later is not None:
            if record.kind != RecordKind.REMOVE:
                copy.later.append(record)
                return
            self._unpark(copy)  # nothing of it needs room any more
            self._remove(record)  # now: its place may be another object's when the write under way has ended
            return
        kind = record.kind
        if kind == RecordKind.WRITE:
            if copy.void:
                self._release(record)
            else:
                self._write(record)
        elif copy.home.failed:
            self._end(record, DiskError(f"{copy.home.path} is out of service"))
        elif kind == RecordKind.INTENT:
            self._write_large(record)
        elif kind == RecordKind.PUNCH:
            self._punch(record)
        elif kind == RecordKind.CREATE:
            self._create(record)
        elif kind == RecordKind.CREATE_LARGE:
            self._put_in_place(record)
        elif kind == RecordKind.REMOVE:
            self._remove(record)
        else:
            self._end(record, None)

    def reached(self, lsn: int) -> None:
        """Everything before `lsn` was given to `apply`."""
        self._reached = lsn
        self._copies.files.shrink()
        self._copies.files.let_in()
        if self.barriers:
            self._check_barriers()

    def _check_barriers(self) -> None:
        done = min([self._reached, *self._slow.values()])
        ready = [call for barrier, call in self.barriers if barrier <= done]
        self.barriers = [(barrier, call) for barrier, call in self.barriers if barrier > done]
        for call in ready:
            call()

    def make_void(self, copy: Copy) -> None:
        """The journal has that it is removed or replaced; it was pinned until then."""
        copy.void = True
        copy.pins -= 1
        self._copies.files.close_if_unused(copy)

    def touch(self, copy: Copy) -> None:
        copy.touched = True
        copy.trailer_of = -1
        self.touched[copy] = None

    def _write(self, record: Record) -> None:
        """The hot one: bytes of at most a few blocks."""
        copy = record.copy
        copy.changes += 1
        try:
            self._put(record)
        except OSError as error:
            self._failed(record, error)
            return
        self._note(record)
        copy.pins -= 1

    def _put(self, record: Record) -> None:
        """The record's bytes into its file; OSError."""
        fd, data, offset = record.copy.fd, record.data, record.first << 12
        if record.count > 1 or self._disk.pwrite(fd, data, offset) != len(data):
            write_all(self._disk, fd, data, offset)

    def _note(self, record: Record) -> None:
        """The file has the record's blocks."""
        copy = record.copy
        copy.applied = record.version
        if not copy.touched:
            self.touch(copy)
        if copy.restoring:  # its table has been brought up to date when the restore began
            return
        if self._copies.rot.bad:
            self._copies.rot.written(copy.oid, record.first, record.count)
        entries, pending = copy.entries, copy.pending
        grown = 0
        for block in range(record.first, record.first + record.count):
            new = record.hash(block)
            if not entries[FIRST_ENTRY + block]:
                grown += bool(new)
            elif not new:
                grown -= 1
            entries[FIRST_ENTRY + block] = new
            if pending.get(block) is record:
                del pending[block]
        if grown:
            self._copies.grow(copy, grown * BLOCK_SIZE)

    def _write_large(self, record: Record) -> None:
        """Of whose bytes the journal has hashes; with `nosync` the hot one for plain objects."""
        copy = record.copy
        if copy.void:
            self._end_replaced(record)
            return
        if len(record.data) < SLOW_WRITE_BYTES:
            try:
                self._put(record)
            except OSError as error:
                self._failed(record, error)
                return
            self._large_written(record)
            return
        copy.later = deque()
        copy.changes += 1
        self._slow[copy] = record.lsn
        write = partial(write_all, self._disk, copy.fd, record.data, record.first << 12)
        self._copies.workers.run(write, partial(self._written_slowly, record))

    def _written_slowly(self, record: Record, result: OSError | None) -> None:
        copy = record.copy
        later, copy.later = copy.later or deque(), None
        del self._slow[copy]
        if isinstance(result, OSError):
            self._failed(record, result)
        else:
            self._large_written(record)
        self._go_on(copy, later)
        self._check_barriers()
        self._copies.files.close_if_unused(copy)

    def _go_on(self, copy: Copy, later: deque[Record]) -> None:
        """Applies what waited. Apart: mypyc takes `copy.later` for what it was just set to."""
        while later:
            if copy.later is not None:
                copy.later.extend(later)
                break
            self.apply(later.popleft())

    def _unpark(self, copy: Copy) -> None:
        """Tries again what waits for room."""
        if copy not in self._parked:
            return  # it was removed meanwhile
        del self._parked[copy], self._slow[copy]
        later, copy.later = copy.later or deque(), None
        self._go_on(copy, later)
        self._check_barriers()
        self._copies.files.close_if_unused(copy)

    def _large_written(self, record: Record) -> None:
        copy = record.copy
        copy.changes += 1
        self._note(record)
        if not self._nosync:
            copy.intents.append(record.lsn)
        if not copy.dirty:
            self._syncs.mark_dirty(copy)
        if copy in self.unnamed:
            self.unnamed[copy] = True
        if copy.gone:
            self._end_replaced(record)
            return
        if record.durable and not self._nosync:
            self._acknowledge_when_done(record)
        self._end(record, None)

    def _acknowledge_when_done(self, record: Record) -> None:
        """Bytes and name are on the disk, and so is a note of that, when the record is answered."""
        done, record.done = record.done, None
        copy = record.copy
        assert done is not None
        answer = done

        def synced(error: StoreError | None) -> None:
            if error is not None:
                answer(error)
            else:
                self.note_done(copy, record.lsn, answer)

        self.sync_with_name(copy, synced)

    def _punch(self, record: Record) -> None:
        assert isinstance(record, PunchRecord)
        copy = record.copy
        if not copy.void:
            copy.changes += 1
            try:
                punch_file(self._disk, copy, record)
            except OSError as error:
                self._failed(record, error)
                return
            self._note(record)
        self._end(record, None)

    def _create(self, record: Record) -> None:
        """The journal has all of it: the file is made in its place, and needs no other name before it is whole."""
        copy = record.copy
        if copy.void:
            self._end_replaced(record)
            return
        try:
            copy.fd = make_file(self._disk, copy)
            for start, stop in filled_runs(record.hashes, len(record.data)):
                part = record.data if stop - start == len(record.data) else memoryview(record.data)[start:stop]
                write_all(self._disk, copy.fd, part, record.offset + start)
            write_trailer(self._disk, copy, RESTORING if copy.restoring else 0)
        except OSError as error:
            if copy.fd >= 0:
                self._disk.close(copy.fd)
                copy.fd = -1
            self._failed(record, error)
            return
        copy.unmade = False
        copy.home.names_changed = True
        if not copy.gone:
            self._copies.files.add(copy)
        self.unnamed[copy] = False
        self._note(record)
        copy.trailer_of = copy.changes
        self._end(record, None)

    def _put_in_place(self, record: Record) -> None:
        copy = record.copy
        try:
            if copy.void:
                self._disk.unlink(record.path)
            else:
                self._disk.rename(record.path, copy.path)
        except OSError as error:
            self._failed(record, error)
            return
        copy.home.names_changed = True
        if copy.void:
            self._end_replaced(record)
            return
        self.touch(copy)
        self.unnamed[copy] = True
        if not self._nosync:
            copy.intents.append(record.lsn)
        self._syncs.mark_dirty(copy)
        if copy.gone:
            self._end_replaced(record)
            return
        if record.wants_data and not self._nosync:
            self._acknowledge_when_done(record)
        self._end(record, None)

    def sync_with_name(self, copy: Copy, done: Callable[[StoreError | None], None]) -> None:
        """The copy's bytes and its name are on the disk at `done`."""
        if copy.dirty or copy.running is not None:
            self._syncs.cover(copy, partial(self._bytes_synced, copy, done))
        else:
            self._bytes_synced(copy, done, None)

    def _bytes_synced(self, copy: Copy, done: Callable[[StoreError | None], None], error: StoreError | None) -> None:
        if error is not None or copy not in self.unnamed:
            done(error)
        else:
            self._directories.sync(copy.home, partial(self._named, copy, done))

    def _named(self, copy: Copy, done: Callable[[StoreError | None], None], error: StoreError | None) -> None:
        self.unnamed.pop(copy, None)
        intents = self.unnamed_intents.pop(copy, None)
        if intents and error is None:
            self._syncs.covered(copy, intents)
        done(error)

    def _remove(self, record: Record) -> None:
        copy = record.copy
        try:
            self._disk.unlink(copy.path)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._failed(record, error)
            return
        copy.home.names_changed = True
        self._end(record, None)

    def _release(self, record: Record) -> None:
        record.copy.pins -= 1
        if record.copy.gone:
            self._copies.files.close_if_unused(record.copy)

    def _end(self, record: Record, error: StoreError | None) -> None:
        done, record.done = record.done, None
        self._release(record)
        if done is not None:
            done(error)

    def _end_replaced(self, record: Record) -> None:
        """Of a copy that was replaced or removed after the record was made."""
        if record.done is not None:
            self.answer_behind(record)
        self._release(record)

    def _failed(self, record: Record, error: OSError) -> None:
        """Without room (for a new file: without a descriptor, too) the journal keeps it, and what follows for the copy;
        all else takes the disk out."""
        copy = record.copy
        waits = is_no_room(error) or (record.kind == RecordKind.CREATE and is_exhausted(error))
        if waits and not copy.home.failed:
            later = copy.later = deque() if copy.later is None else copy.later
            later.appendleft(record)
            self._slow[copy] = record.lsn
            self._parked[copy] = None
            self._no_room.wait(copy.home, error, partial(self._unpark, copy))
            return
        self._end(record, self._copies.fail(record.copy.home, error, promised=True))


def _unset(*_: object) -> None:
    raise AssertionError("the applier is not connected")

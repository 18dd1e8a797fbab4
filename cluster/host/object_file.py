"""A copy of an object as this process knows it, and the bounded set of those whose files are open."""

from __future__ import annotations

import os
import resource
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias

from sheepdog.cluster.core.errors import Corrupt, StoreError
from sheepdog.cluster.core.ids import NO_VERSION, ObjectId, Version, oid_name
from sheepdog.cluster.core.ports import Buffer, Done
from sheepdog.cluster.host import trailer
from sheepdog.cluster.host.directory import ObjectDirectory, write_all
from sheepdog.cluster.host.disk import Disk

if TYPE_CHECKING:
    from sheepdog.cluster.host.records import Record

OPEN_FILES: Final = 16_384  # descriptors kept open: a 64 GiB working set of 4 MiB objects without reopening
SHRINK_LOOK: Final = 8  # how many of the oldest are looked at when one too many is open: some may be in use
CROWD: Final = 2  # times the limit: what wants to open still more waits until files have been synced and closed
OPEN_TABLE_BYTES: Final = 128 << 20  # memory of their hash tables together: 8 KiB for 4 MiB, 4 MiB for 2 GiB

Action: TypeAlias = Callable[[StoreError | None], None]
"""Something to do with an open copy, or the reason why it could not be opened."""

Read: TypeAlias = Callable[[int, Sequence[bytearray | memoryview], int], int]
"""read(fd, buffers, offset): bytes read, as Disk.preadv and Disk.preadv_cached."""

_NO_TRAILER = bytearray(trailer.HEADER_SIZE)
_NO_ENTRIES = memoryview(_NO_TRAILER).cast("Q")


class Copy:
    """One object here. `fd` is -1 while its file is not open; trailer and entries are valid only while it is.

    `busy`: operations must queue in `waiting` (it is being opened, or one before them waits for the disk).
    `unmade`: there is no file yet, and everything is in `pending`; trailer and entries are what it will have.
    `entries` is the trailer seen as 64-bit words: block i's hash is entries[trailer.FIRST_ENTRY + i]. It says what is
    in the file; `pending` has the newer blocks whose records wait for the journal. `version` is of all of it, `applied`
    of what is in the file.
    """

    __slots__ = (
        "allocated",
        "applied",
        "busy",
        "changes",
        "dirty",
        "entries",
        "fd",
        "gated",
        "gone",
        "home",
        "intents",
        "later",
        "oid",
        "path",
        "pending",
        "pins",
        "restoring",
        "running",
        "size",
        "table",
        "touched",
        "trailer",
        "trailer_of",
        "trailer_writes",
        "trusted",
        "unmade",
        "version",
        "void",
        "waiters",
        "waiting",
    )

    def __init__(self, oid: ObjectId, size: int, version: Version, home: ObjectDirectory) -> None:
        self.oid = oid
        self.size = size  # -1: the file is no readable object
        self.version = version
        self.home = home
        self.path = home.file_path(oid)
        self.allocated = 0  # bytes
        self.unmade = False
        self.fd = -1
        self.trailer = _NO_TRAILER
        self.entries = _NO_ENTRIES
        self.table = trailer.trailer_offset(max(size, 0))  # offset of the trailer in the file
        self.pins = 0  # calls in other threads that use `fd`
        self.gone = False  # removed or replaced; the file is closed with the last pin
        self.void = False  # ... and the journal has that: what comes to its file does not matter any more
        self.restoring = version == NO_VERSION
        self.busy = False
        self.gated = False
        self.waiting: deque[Action] = deque()
        self.changes = 0  # changes of the file so far; tells a slow reader that its bytes may be old
        self.pending: dict[int, Record] = {}  # by block
        self.applied = version
        self.later: deque[Record] | None = None  # durable records that wait for a write in another thread
        self.intents: list[int] = []  # lsn of large writes in the file that no sync has covered yet; none with `nosync`
        self.trailer_writes = 0
        self.trailer_of = -1  # `changes` when the file was made, with its trailer; -1: that one may be older
        self.trusted = version != NO_VERSION  # False: a crash met a restore, the table may not tell what is there
        self.touched = False  # the trailer on the disk is older than the one here
        self.dirty = False  # the file has bytes that neither the journal nor a sync has made durable
        self.running: list[Done] | None = None  # who waits for the sync in flight
        self.waiters: list[Done] = []  # who waits for the one after it

    def current_table(self) -> bytes:
        """Hashes of all blocks, those of pending ones included; the file must be open."""
        if not self.pending:
            return bytes(self.trailer[trailer.HEADER_SIZE :])
        table = bytearray(self.trailer[trailer.HEADER_SIZE :])
        entries = memoryview(table).cast("Q")
        for block, record in self.pending.items():
            entries[block] = record.hash(block)
        return bytes(table)

    def is_hole(self, block: int) -> bool:
        record = self.pending.get(block)
        return not (self.entries[trailer.FIRST_ENTRY + block] if record is None else record.hash(block))

    def is_filled(self, first: int, count: int) -> bool:
        """So many blocks from the first one on have their places in the file."""
        entries, start = self.entries, trailer.FIRST_ENTRY + first
        return bool(entries[start]) if count == 1 else all(entries[start : start + count])

    def attach(self, fd: int, header_and_table: bytearray) -> None:
        self.fd = fd
        self.trailer = header_and_table
        self.entries = memoryview(header_and_table).cast("Q")

    def detach(self) -> int:
        """Forgets the open file; returns its descriptor."""
        fd, self.fd = self.fd, -1
        self.trailer, self.entries = _NO_TRAILER, _NO_ENTRIES
        return fd


def open_files_limit() -> int:
    """How many object files stay open; at least half of this process's descriptors are for clients and peers."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return OPEN_FILES if soft == resource.RLIM_INFINITY else min(OPEN_FILES, soft // (2 * CROWD))


class OpenFiles:
    """The copies with an open file, least recently used first; closes what exceeds the limits.

    Copies that are pinned or dirty stay open: the descriptor that wrote is the one that learns of a failed write-back.
    `settle` is asked to bring one of these towards closing. When that is slower than new ones come, these wait
    (`when_room`).
    """

    def __init__(self, disk: Disk, settle: Callable[[Copy], None], limit: int | None = None) -> None:
        self._disk = disk
        self._settle = settle
        self._limit = open_files_limit() if limit is None else limit
        self._copies: OrderedDict[ObjectId, Copy] = OrderedDict()
        self._table_bytes = 0
        self._in_order = False  # uses change the order: some file may have to be closed soon
        self._uses: dict[ObjectId, None] | None = None  # since they were taken; None: nobody asks
        self._held: deque[Done] = deque()
        self._letting_in = False

    def __len__(self) -> int:
        return len(self._copies)

    def crowded(self) -> bool:
        return len(self._copies) > CROWD * self._limit

    def when_room(self, done: Done, error: StoreError | None) -> None:
        """`done(error)`; without an error as soon as there is room for another file, in turn."""
        if error is None and self.crowded():
            self._held.append(done)
            self.shrink()
            self.let_in()
        else:
            done(error)

    def synced(self, copy: Copy) -> None:
        """A sync of the copy has ended: where files are too many, it need not be found among them."""
        self.close_if_unused(copy)
        if self._exceeds() and self._copies.get(copy.oid) is copy and not _is_needed(copy):
            self._close(copy)
        self.shrink()
        self.let_in()

    def let_in(self) -> None:
        """Goes on with what waited for room; for those who may lose an open file here that nothing holds yet."""
        if self._letting_in:  # further up
            return
        self._letting_in = True
        try:
            while self._held and not self.crowded():
                self._held.popleft()(None)
        finally:
            self._letting_in = False

    def add(self, copy: Copy) -> None:
        self._copies[copy.oid] = copy
        self._copies.move_to_end(copy.oid)
        self._table_bytes += len(copy.trailer)
        self._in_order = len(self._copies) > self._limit // 2 or self._table_bytes > OPEN_TABLE_BYTES // 2
        self.used(copy.oid)
        self.shrink()

    def used(self, oid: ObjectId) -> None:
        """The open file is the most recent now. Up to half of the limits nobody asks: the order is that of opening."""
        if self._in_order:
            self._copies.move_to_end(oid)
        if self._uses is not None:
            self._uses[oid] = None

    def note_uses(self) -> None:
        """From now on `take_used` tells whose files were used."""
        self._uses = {}

    def take_used(self) -> list[Copy]:
        """Copies whose open files were used since the last call."""
        uses = self._uses or {}
        found = [self._copies[oid] for oid in uses if oid in self._copies]
        uses.clear()
        return found

    def retire(self, copy: Copy) -> None:
        """The copy is removed or replaced: close its file as soon as nobody uses it."""
        copy.gone = True
        if self._copies.get(copy.oid) is copy:
            del self._copies[copy.oid]
            self._table_bytes -= len(copy.trailer)
        self.close_if_unused(copy)

    def close_if_unused(self, copy: Copy) -> None:
        if (
            copy.gone
            and not copy.pins
            and not copy.waiters
            and copy.later is None
            and not copy.waiting
            and copy.fd >= 0
        ):
            self._disk.close(copy.detach())

    def forget(self, copy: Copy) -> None:
        """The copy's disk has failed; a file in use by another thread is left to the process's end."""
        copy.unmade = False  # it will not be made any more
        if self._copies.pop(copy.oid, None) is not None:
            self._table_bytes -= len(copy.trailer)
            fd = copy.detach()
            if not copy.pins:
                self._disk.close(fd)

    def close_all(self) -> None:
        for copy in self._copies.values():
            self._disk.close(copy.detach())
        self._copies.clear()
        self._table_bytes = 0

    def shrink(self) -> None:
        """Looks at some of the oldest ones; a burst of dirty files may exceed the limits until they are synced.

        One that has to stay becomes the most recent, so that the next look meets others. The newest is not looked at:
        somebody has just opened it.
        """
        for _ in range(min(SHRINK_LOOK, len(self._copies) - 1)):
            if not self._exceeds():
                break
            copy = next(iter(self._copies.values()))
            if not _is_needed(copy):
                self._close(copy)
                continue
            self._copies.move_to_end(copy.oid)
            self._settle(copy)

    def _exceeds(self) -> bool:
        return len(self._copies) > self._limit or self._table_bytes > OPEN_TABLE_BYTES

    def _close(self, copy: Copy) -> None:
        del self._copies[copy.oid]
        self._table_bytes -= len(copy.trailer)
        self._disk.close(copy.detach())


def _is_needed(copy: Copy) -> bool:
    return bool(copy.pins or copy.busy or copy.touched or copy.dirty or copy.running is not None)


def open_copy(disk: Disk, copy: Copy) -> tuple[int, bytearray]:
    """Opens the file of a copy and reads its trailer; may block. Corrupt when the header does not fit, OSError."""
    fd = disk.open(copy.path, os.O_RDWR)
    try:
        return fd, _read_trailer(disk, copy, fd, disk.preadv)
    except BaseException:
        disk.close(fd)
        raise


def open_copy_cached(disk: Disk, copy: Copy) -> tuple[int, bytearray] | None:
    """The same without waiting for the disk; None when that is not possible, or when anything is wrong."""
    try:
        fd = disk.open_cached(copy.path, os.O_RDWR)
    except OSError:
        return None
    try:
        return fd, _read_trailer(disk, copy, fd, disk.preadv_cached)
    except (OSError, Corrupt):
        disk.close(fd)
        return None


def _read_trailer(disk: Disk, copy: Copy, fd: int, read: Read) -> bytearray:
    """Header and table of a copy's open file; Corrupt when they are cut off or another object's."""
    if trailer.offset_in_file(disk.info(fd).length) != copy.table:
        raise Corrupt(f"{copy.path} has not the length of an object of {copy.size} bytes")
    data = bytearray(trailer.trailer_size(max(copy.size, 0)))
    if read(fd, [data], copy.table) != len(data):
        raise Corrupt(f"{copy.path}: the table is cut off")
    header = trailer.parse_header(memoryview(data)[: trailer.HEADER_SIZE])
    if (header.oid, header.size) != (copy.oid, copy.size):
        raise Corrupt(f"{copy.path}: object {oid_name(header.oid)} of {header.size} bytes, expected {copy.size}")
    return data


def make_file(disk: Disk, copy: Copy) -> int:
    """A new file in the copy's place; its descriptor. OSError."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    try:
        return disk.open(copy.path, flags)
    except FileExistsError:  # a replaced copy's, which may still be read, or an earlier try's
        disk.unlink(copy.path)
        return disk.open(copy.path, flags)


def write_trailer(disk: Disk, copy: Copy, flags: int = 0) -> None:
    """Writes the header and the table of what is in the file."""
    write_sealed(disk, copy, seal_trailer(copy, flags))


def seal_trailer(copy: Copy, flags: int = 0) -> bytearray:
    """The trailer of what is in the file now, ready to be written."""
    trailer.Header(copy.oid, copy.size, copy.applied, flags=flags).pack_into(copy.trailer)
    return copy.trailer


def write_sealed(disk: Disk, copy: Copy, sealed: Buffer) -> None:
    copy.trailer_writes += 1
    write_all(disk, copy.fd, sealed, copy.table)

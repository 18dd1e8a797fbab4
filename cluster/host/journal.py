"""The journal: two preallocated segments that take turns (docs/format.md).

Records are queued, written with one call at the end of a turn of the loop, and made durable by one fdatasync for
everybody who waits. Where the file system can do it, writing and syncing are one, around the page cache
(`write_through`). A record is at a position (lsn) and durable when `synced` has passed its end. Records of the newer
segment are never durable before those of the older one. The journal knows nothing of objects.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from struct import Struct
from typing import Final, NamedTuple, Protocol, TypeAlias

from sheepdog.cluster.core.errors import UsageError
from sheepdog.cluster.core.ids import (
    NO_OID,
    NO_VERSION,
    ObjectId,
    Version,
)
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.ports import Buffer
from sheepdog.cluster.host.aligned import AlignedMemory
from sheepdog.cluster.host.directory import WRITE_PIECE_BYTES, write_all
from sheepdog.cluster.host.disk import Disk
from sheepdog.cluster.host.records import SEGMENT_SHIFT, RecordKind, pack, padding, record_size
from sheepdog.cluster.host.trailer import ZERO_BLOCK, block_hash
from sheepdog.cluster.host.workers import Workers

SEGMENT_HEADER: Final = 512
SEGMENT_MAGIC: Final = b"SHEEPJNL"
SEGMENT_FORMAT: Final = 2
NO_JOURNAL: Final = bytes(16)  # the id of those of format 1, which had none
MAX_SEGMENT_BYTES: Final = (1 << SEGMENT_SHIFT) - BLOCK_SIZE  # a place in a segment is the lower 32 bits of its lsn
SEGMENT_RESERVE_BYTES: Final = 64 << 10  # of a segment for the journal's own records: end, checkpoints, done
VECTORS: Final = 1000  # buffers of one gathered write: below IOV_MAX (1024)
AHEAD_BYTES: Final = 1 << 20  # zeros written at a time where records will come: 1 ms of a disk's time
AHEAD_LEAST_BYTES: Final = 256 << 10  # what is ready for the records that come while a sync runs
THROUGH_BYTES: Final = 512 << 10  # written through at once: more takes so long that the page cache costs little
THROUGH_RECORD_BYTES: Final = 16 << 10  # of one record: larger ones the kernel copies, and writes back beside us
CACHED_BYTES: Final = 64 << 20  # of a segment: a checkpoint and these pages again cost less than new pages of the cache
MOST_INTENTS: Final = 64 << 10  # of a segment; twice as many while the other is not free. A start reads what each names

_SEGMENT = Struct("<8sIIQ16s16s")  # magic, format, then as SegmentHeader
_CHECKSUM = Struct("<Q")
_PADS: Final = [bytes(count) for count in range(8)]


class SegmentHeader(NamedTuple):
    """What a segment begins with. `journal` is the id of the pair of files that it is in."""

    number: int
    size: int  # of the file, in bytes
    node: bytes
    journal: bytes


def encode_segment_header(header: SegmentHeader) -> bytes:
    head = _SEGMENT.pack(SEGMENT_MAGIC, SEGMENT_FORMAT, *header)
    head += bytes(SEGMENT_HEADER - len(head) - _CHECKSUM.size)
    return head + _CHECKSUM.pack(block_hash(head))


def decode_segment_header(data: Buffer) -> SegmentHeader | None:
    """None when these bytes are none; UsageError for another format. Format 1 has zeros where the journal's id is."""
    if len(data) < SEGMENT_HEADER:
        return None
    magic, form, *fields = _SEGMENT.unpack_from(data)
    view = memoryview(data)[: SEGMENT_HEADER - _CHECKSUM.size]
    if magic != SEGMENT_MAGIC or block_hash(view) != _CHECKSUM.unpack_from(data, len(view))[0]:
        return None
    if form not in (1, SEGMENT_FORMAT):
        raise UsageError(f"format {form}, this version reads {SEGMENT_FORMAT}")
    return SegmentHeader(*fields)


def segment_path(directory: str, index: int) -> str:
    return f"{directory}/journal_file{index}"


class WrittenBefore(Protocol):
    """What must be in another file, and be durable there, when a record is in the journal."""

    def write_out(self) -> None: ...

    def take_to_sync(self) -> int:
        """Descriptor of what was written and is not durable yet; -1: all is."""


_Step: TypeAlias = Callable[[Callable[[OSError | None], None]], None]


class _Sync:
    """One that is under way: behind it everything before `target` is durable."""

    def __init__(self, target: int, with_other: bool, steps: list[_Step], synced: Callable[[], None]) -> None:
        self.target = target
        self.with_other = with_other  # it covers the other segment
        self.steps = steps  # in the order in which things have to become durable
        self.synced = synced


class Journal:
    """The end of the journal that is written. `failed` is called once, with the error that ends it."""

    def __init__(
        self,
        directory: str,
        segment_bytes: int,
        node: bytes,
        identity: bytes,
        disk: Disk,
        workers: Workers,
        failed: Callable[[OSError], None],
        before: WrittenBefore | None = None,
        through: bool = True,
    ) -> None:
        """`identity`: the journal's id; `before`: what must not be lost when a record is there.

        `through`: durable records are written around the page cache where the file system can do that.
        """
        self._before = before
        self._through = through
        self._directory = directory
        self._segment_bytes = segment_bytes
        self._node = node
        self.identity = identity
        self._disk = disk
        self._workers = workers
        self._failed = failed
        self._fds = [-1, -1]
        self._through_fds = [-1, -1]
        self._memory: AlignedMemory | None = None  # where what is written through is put together
        self._large = False  # a queued record is: then none is written through
        self._begun: Buffer | None = None  # bytes of the block in which the queue begins; None: the cache has them
        self._laid = [0, 0]  # offsets up to which the files' blocks have been written once
        self._number = 0  # of the segment that is written
        self._cached = 0  # bytes of it that went through the page cache
        self._intents = 0  # in it
        self._offset = 0  # in it, behind the last queued record
        self._queue: list[Buffer] = []
        self._queue_start = 0  # offset of the first queued byte
        self.written = 0  # lsn behind what the operating system has
        self.synced = 0  # lsn behind what is on the disk
        self._free = True  # the other segment may be overwritten
        self._other_unsynced = False  # the other segment has records that are not durable yet
        self._syncing = False
        self.writing_through = False  # nothing else is written meanwhile
        self.dead = False

    # Life

    def start(self, number: int) -> None:
        """Begins segment `number` in its file (number modulo 2), the other is free; blocks. OSError.

        All records that are there are in place. Its header comes first, alone: with it the other segment is void, whose
        number is not the one before (`journal_scan.Found.next_number`). So a crash leaves all to be replayed, or
        nothing.
        """
        self._begin(number)
        for index in (number & 1, number + 1 & 1):
            path = segment_path(self._directory, index)
            fd = self._disk.open(path, os.O_RDWR | os.O_CREAT)
            self._fds[index] = fd
            if index == number & 1:
                write_all(self._disk, fd, self._queue[0], 0)
            if self._disk.info(fd).length != self._segment_bytes:
                self._disk.truncate(fd, self._segment_bytes)
                self._disk.allocate(fd, self._segment_bytes)
            if index == number & 1:
                self._disk.fdatasync(fd)
            self._laid[index] = self._disk.written_from_start(fd)
        self.append(RecordKind.CHECKPOINT, offset=self.position)
        self.write_out()
        self._write_ahead()
        self._disk.fdatasync(self._fds[number & 1])
        self._disk.sync_directory(self._directory)
        self.synced = self.written
        self._other_unsynced = False
        if self._through:
            self._through_fds = [self._disk.open_direct(segment_path(self._directory, index)) for index in (0, 1)]
            if min(self._through_fds) >= 0:
                self._memory = AlignedMemory(THROUGH_BYTES + AHEAD_BYTES)

    def close(self) -> None:
        for fd in self._fds + self._through_fds:
            if fd >= 0:
                self._disk.close(fd)
        self._fds = [-1, -1]
        self._through_fds = [-1, -1]
        self.dead = True

    def _begin(self, number: int) -> None:
        self._number = number
        self._cached = self._intents = 0
        self._offset = SEGMENT_HEADER
        self._queue = [encode_segment_header(SegmentHeader(number, self._segment_bytes, self._node, self.identity))]
        self._queue_start = 0
        self._begun = None

    @property
    def position(self) -> int:
        """lsn of the next record."""
        return self._number << SEGMENT_SHIFT | self._offset

    @property
    def number(self) -> int:
        """Of the segment that is written."""
        return self._number

    @property
    def segment_start(self) -> int:
        """lsn of the first record of the segment that is written."""
        return self._number << SEGMENT_SHIFT | SEGMENT_HEADER

    # Writing

    def has_room(self, size: int) -> bool:
        """In this segment, for a record of so many bytes."""
        has_space = self._offset + size + SEGMENT_RESERVE_BYTES <= self._segment_bytes
        return has_space and self._intents < 2 * MOST_INTENTS

    def has_enough(self) -> bool:
        """The segment has room, but going on in the other one, if that is free, costs less."""
        return self._cached >= CACHED_BYTES or self._intents >= MOST_INTENTS

    def is_half_full(self) -> bool:
        """Of the segment that is written."""
        return 2 * self._offset > self._segment_bytes or self._intents >= MOST_INTENTS

    def can_switch(self) -> bool:
        """Now: not while a block of the present segment is under way to the disk."""
        return self._free and not self.writing_through

    def other_is_free(self) -> bool:
        """There is a segment to go on in when this one is full."""
        return self._free

    def switch(self) -> None:
        """Goes on in the other segment, which must be free; the present one waits for a checkpoint (`release`)."""
        assert self._free
        self.append(RecordKind.END)
        self.write_out()
        self._free = False
        self._other_unsynced = True
        self._begin(self._number + 1)

    def release(self) -> None:
        """Everything of the other segment is in place: it may be overwritten."""
        self._free = True

    def append(
        self,
        kind: int,
        oid: ObjectId = NO_OID,
        size: int = 0,
        offset: int = 0,
        length: int = 0,
        version: Version = NO_VERSION,
        hashes: list[int] | None = None,
        payload: Buffer = b"",
    ) -> int:
        """Queues a record; returns the lsn behind it. The caller has asked `has_room`."""
        payload_length = len(payload)
        if hashes is None:
            hashes = []
        queue = self._queue
        self._intents += kind == RecordKind.INTENT
        queue.append(pack(kind, self.position, self.synced, oid, size, offset, length, version, hashes, payload_length))
        if payload_length:
            if payload_length > THROUGH_RECORD_BYTES:
                self._large = True
            queue.append(payload)
            pad = padding(payload_length)
            if pad:
                queue.append(_PADS[pad])
        self._offset += record_size(len(hashes), payload_length)
        return self._number << SEGMENT_SHIFT | self._offset

    def write_out(self) -> bool:
        """Hands the queued records to the operating system; False when the journal has failed."""
        queue = self._queue
        if self.dead:
            return False
        if not queue:
            return True
        self._queue = []
        self._large = False
        if self._before is not None:
            self._before.write_out()
        # The last page is written whole: the kernel would have to read the rest of it from the disk.
        end = self._offset
        tail = -end & BLOCK_SIZE - 1
        if end + tail <= self._segment_bytes:
            queue.append(ZERO_BLOCK[:tail])
            end += tail
        start = self._queue_start
        if self._begun is not None:  # the kernel would have to read this, too
            queue.insert(0, self._begun)
            start -= len(self._begun)
            self._begun = None
        try:
            if len(queue) <= VECTORS and end - start <= WRITE_PIECE_BYTES:  # nearly always
                self._write(queue, start, end - start)
            else:
                self._write_in_pieces(queue, start)
        except OSError as error:
            self._fail(error)
            return False
        self._cached += self._offset - self._queue_start
        self._queue_start = self._offset
        self.written = self.position
        return True

    def _write(self, buffers: list[Buffer], start: int, size: int) -> None:
        fd = self._fds[self._number & 1]
        count = self._disk.pwritev(fd, buffers, start)
        if count != size:
            write_all(self._disk, fd, b"".join(buffers)[count:], start + count)

    def _write_in_pieces(self, buffers: list[Buffer], start: int) -> None:
        """As many at a time as one call takes."""
        first = 0
        while first < len(buffers):
            size, last = len(buffers[first]), first + 1
            while last < len(buffers) and last - first < VECTORS and size + len(buffers[last]) <= WRITE_PIECE_BYTES:
                size += len(buffers[last])
                last += 1
            self._write(buffers[first:last], start, size)
            start += size
            first = last

    # Durability

    @property
    def syncing(self) -> bool:
        return self._syncing

    def sync(self, synced: Callable[[], None]) -> None:
        """Makes what is written durable, then calls back (not after a failure). One at a time."""
        assert not self._syncing
        self._syncing = True
        with_other = self._other_unsynced
        steps = self._steps_before()
        if with_other:
            steps.append(self._sync_of(self._fds[self._number + 1 & 1]))
        steps.append(self._sync_of(self._fds[self._number & 1]))
        run = _Sync(self.written, with_other, steps, synced)
        try:
            self._write_ahead()
        except OSError as error:
            self._sync_ended(run, error)
            return
        self._sync_next(run, None)

    def must_wait(self) -> bool:
        """Can what is queued be written through when the sync that is under way has ended, and only then?"""
        return self._syncing and self._memory is not None and not self._large

    def can_write_through(self) -> bool:
        """All that is queued, and nothing before it has still to be synced."""
        return (
            self._memory is not None
            and not self._syncing
            and not self._large
            and self.synced == self.written
            and not self._other_unsynced
            and bool(self._queue)
            and self._offset - (self._queue_start & -BLOCK_SIZE) <= THROUGH_BYTES
            and not self.dead
        )

    def write_through(self, synced: Callable[[], None]) -> None:
        """Writes the queued records and makes them durable, in one; then calls back (not after a failure).

        `can_write_through`. Blocks are written whole, the first with what it has already.
        """
        memory = self._memory
        assert memory is not None
        if self._before is not None:
            self._before.write_out()
        index, start = self._number & 1, self._queue_start & -BLOCK_SIZE
        if self._begun is None:
            self._begun = bytearray(self._queue_start - start)
            try:
                self._disk.preadv(self._fds[index], [self._begun], start)
            except OSError as error:
                self._fail(error)
                return
        write = memory.pages.write
        memory.pages.seek(0)
        write(self._begun)
        for buffer in self._queue:
            write(buffer)
        used = self._offset - start
        end = self._offset + (-self._offset & BLOCK_SIZE - 1)
        if self._laid[index] < end:  # as `_write_ahead`
            end = min(end + AHEAD_BYTES, self._segment_bytes)
            self._laid[index] = end
        length = end - start
        write(bytes(length - used))
        self._begun = bytes(memory.view[used & -BLOCK_SIZE : used])
        self._queue = []
        self._queue_start = self._offset
        self._syncing = self.writing_through = True
        steps = self._steps_before()
        steps.append(partial(self._workers.write_durably, self._disk, self._through_fds[index], memory, length, start))
        self._sync_next(_Sync(self.position, False, steps, synced), None)

    def _steps_before(self) -> list[_Step]:
        first = -1 if self._before is None else self._before.take_to_sync()
        return [self._sync_of(first)] if first >= 0 else []

    def _sync_of(self, fd: int) -> _Step:
        return partial(self._workers.sync, self._disk, fd)

    def _sync_next(self, run: _Sync, error: OSError | None) -> None:
        """One step after the other."""
        if error is not None or not run.steps:
            self._sync_ended(run, error)
            return
        run.steps.pop(0)(partial(self._sync_next, run))

    def _sync_ended(self, run: _Sync, error: OSError | None) -> None:
        self._syncing = self.writing_through = False
        if error is not None:
            self._fail(error)
            return
        self.written = max(self.written, run.target)
        self.synced = max(self.synced, run.target)
        if run.with_other:
            self._other_unsynced = False
        run.synced()

    def _write_ahead(self) -> None:
        """Zeros where records will come, on the disk with the next sync.

        The first write to a preallocated place changes the map of the file's extents, so that its sync is one of the
        file system's journal too, twice as long: better once for each MiB than for each record.
        """
        index = self._number & 1
        end = self._offset + (-self._offset & BLOCK_SIZE - 1)
        if self._laid[index] >= min(end + AHEAD_LEAST_BYTES, self._segment_bytes):
            return
        start = max(self._laid[index], end)
        length = min(AHEAD_BYTES, self._segment_bytes - start)
        write_all(self._disk, self._fds[index], bytes(length), start)
        self._laid[index] = start + length

    def _fail(self, error: OSError) -> None:
        if not self.dead:
            self.dead = True
            self._failed(error)

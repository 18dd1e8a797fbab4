"""The journal: two preallocated segments that take turns (docs/format.md).

Records are queued, written with one call at the end of a turn of the loop, and made durable by one fdatasync for
everybody who waits. A record is at a position (lsn) and durable when `synced` has passed its end. Records of the newer
segment are never durable before those of the older one. The journal knows nothing of objects.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from struct import Struct
from typing import Final

from sheepdog.cluster.core.ids import (
    NO_OID,
    NO_VERSION,
    ObjectId,
    Version,
)
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.ports import Buffer
from sheepdog.cluster.host.directory import WRITE_PIECE_BYTES, write_all
from sheepdog.cluster.host.disk import Disk
from sheepdog.cluster.host.records import SEGMENT_SHIFT, RecordKind, pack, padding, record_size
from sheepdog.cluster.host.trailer import ZERO_BLOCK, block_hash
from sheepdog.cluster.host.workers import Workers

SEGMENT_HEADER: Final = 512
SEGMENT_MAGIC: Final = b"SHEEPJNL"
SEGMENT_FORMAT: Final = 1
SEGMENT_RESERVE_BYTES: Final = 64 << 10  # of a segment for the journal's own records: end, checkpoints, done
VECTORS: Final = 1000  # buffers of one gathered write: below IOV_MAX (1024)
IN_PLACE_LIMIT_NS: Final = 2_000_000  # a sync of the loop's thread that takes longer holds up everybody else
IN_PLACE_PAUSE: Final = 256  # syncs that go to a thread after such a slow one

_SEGMENT = Struct("<8sIIQ16s")  # magic, format, number, bytes of the segment, the node's id
_CHECKSUM = Struct("<Q")
_PADS: Final = [bytes(count) for count in range(8)]


def encode_segment_header(number: int, size: int, node: bytes) -> bytes:
    head = _SEGMENT.pack(SEGMENT_MAGIC, SEGMENT_FORMAT, number, size, node)
    head += bytes(SEGMENT_HEADER - len(head) - _CHECKSUM.size)
    return head + _CHECKSUM.pack(block_hash(head))


def decode_segment_header(data: Buffer) -> tuple[int, int, bytes] | None:
    """(number, size, node id) of a segment; None when these bytes are none."""
    if len(data) < SEGMENT_HEADER:
        return None
    magic, form, number, size, node = _SEGMENT.unpack_from(data)
    view = memoryview(data)[: SEGMENT_HEADER - _CHECKSUM.size]
    if magic != SEGMENT_MAGIC or form != SEGMENT_FORMAT:
        return None
    if block_hash(view) != _CHECKSUM.unpack_from(data, len(view))[0]:
        return None
    return number, size, node


def segment_path(directory: str, index: int) -> str:
    return f"{directory}/journal_file{index}"


class Journal:
    """The end of the journal that is written. `failed` is called once, with the error that ends it."""

    def __init__(
        self,
        directory: str,
        segment_bytes: int,
        node: bytes,
        disk: Disk,
        workers: Workers,
        failed: Callable[[OSError], None],
        before_sync: Callable[[], None] | None = None,
    ) -> None:
        """`before_sync` makes durable what must not be lost when a record is there; on any thread, OSError."""
        self._before_sync = before_sync
        self._directory = directory
        self._segment_bytes = segment_bytes
        self._node = node
        self._disk = disk
        self._workers = workers
        self._failed = failed
        self._fds = [-1, -1]
        self._number = 0  # of the segment that is written
        self._offset = 0  # in it, behind the last queued record
        self._queue: list[Buffer] = []
        self._queue_start = 0  # offset of the first queued byte
        self.written = 0  # lsn behind what the operating system has
        self.synced = 0  # lsn behind what is on the disk
        self._free = True  # the other segment may be overwritten
        self._other_unsynced = False  # the other segment has records that are not durable yet
        self._syncing = False
        self._slow = 0  # syncs to leave to a thread yet
        self.dead = False

    # Life

    def start(self, number: int) -> None:
        """Begins segment `number` in its file (number modulo 2), the other is free; blocks. OSError."""
        for index in (0, 1):
            path = segment_path(self._directory, index)
            fd = self._disk.open(path, os.O_RDWR | os.O_CREAT)
            self._fds[index] = fd
            if self._disk.info(fd).length != self._segment_bytes:
                self._disk.truncate(fd, self._segment_bytes)
                self._disk.allocate(fd, self._segment_bytes)
        self._begin(number)
        self.append(RecordKind.CHECKPOINT, offset=self.position)
        self.write_out()
        self._disk.fdatasync(self._fds[number & 1])
        self._disk.sync_directory(self._directory)
        self.synced = self.written
        self._other_unsynced = False

    def close(self) -> None:
        for fd in self._fds:
            if fd >= 0:
                self._disk.close(fd)
        self._fds = [-1, -1]
        self.dead = True

    def _begin(self, number: int) -> None:
        self._number = number
        self._offset = SEGMENT_HEADER
        self._queue = [encode_segment_header(number, self._segment_bytes, self._node)]
        self._queue_start = 0

    @property
    def position(self) -> int:
        """lsn of the next record."""
        return self._number << SEGMENT_SHIFT | self._offset

    @property
    def segment_start(self) -> int:
        """lsn of the first record of the segment that is written."""
        return self._number << SEGMENT_SHIFT | SEGMENT_HEADER

    # Writing

    def has_room(self, size: int, reserve: int = SEGMENT_RESERVE_BYTES) -> bool:
        return self._offset + size + reserve <= self._segment_bytes

    def is_half_full(self) -> bool:
        """Of the segment that is written."""
        return 2 * self._offset > self._segment_bytes

    def can_switch(self) -> bool:
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
        hashes: Sequence[int] = (),
        payload: Buffer = b"",
    ) -> int:
        """Queues a record; returns the lsn behind it. The caller has asked `has_room`."""
        payload_length = len(payload)
        queue = self._queue
        queue.append(pack(kind, self.position, self.synced, oid, size, offset, length, version, hashes, payload_length))
        if payload_length:
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
        # The last page is written whole: the kernel would have to read the rest of it from the disk.
        tail = -self._offset & BLOCK_SIZE - 1
        if self._offset + tail <= self._segment_bytes:
            queue.append(ZERO_BLOCK[:tail])
        fd = self._fds[self._number & 1]
        start = self._queue_start
        try:
            first = 0
            while first < len(queue):
                size, last = len(queue[first]), first + 1
                while last < len(queue) and last - first < VECTORS and size + len(queue[last]) <= WRITE_PIECE_BYTES:
                    size += len(queue[last])
                    last += 1
                part = queue[first:last]
                count = self._disk.pwritev(fd, part, start)
                if count != size:
                    write_all(self._disk, fd, b"".join(part)[count:], start + count)
                start += size
                first = last
        except OSError as error:
            self._fail(error)
            return False
        self._queue_start = self._offset
        self.written = self.position
        return True

    # Durability

    @property
    def syncing(self) -> bool:
        return self._syncing

    def sync(self, synced: Callable[[], None], in_place: bool) -> None:
        """Makes what is written durable, then calls back (not after a failure). One at a time.

        `in_place`: on this thread, if syncs have been fast lately.
        """
        assert not self._syncing
        target = self.written
        current, other = self._fds[self._number & 1], self._fds[self._number + 1 & 1]
        with_other = self._other_unsynced
        disk = self._disk

        def work() -> int:
            began = time.monotonic_ns()
            if self._before_sync is not None:
                self._before_sync()
            if with_other:
                disk.fdatasync(other)
            disk.fdatasync(current)
            return time.monotonic_ns() - began

        def finished(result: int | OSError) -> None:
            self._syncing = False
            if isinstance(result, OSError):
                self._fail(result)
                return
            self._slow = IN_PLACE_PAUSE if result > IN_PLACE_LIMIT_NS else max(0, self._slow - 1)
            self.synced = max(self.synced, target)
            if with_other:
                self._other_unsynced = False
            synced()

        self._syncing = True
        if in_place and not self._slow:
            try:
                duration = work()
            except OSError as error:
                finished(error)
            else:
                finished(duration)
        else:
            self._workers.run(work, finished)

    def _fail(self, error: OSError) -> None:
        if not self.dead:
            self.dead = True
            self._failed(error)

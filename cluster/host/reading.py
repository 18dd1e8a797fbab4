"""Reading copies: blocks of the file, verified, under those that are not in the file yet."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from sheepdog.cluster.core.errors import DiskError, OutOfRange, StoreError
from sheepdog.cluster.core.ids import ObjectId
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.ports import Buffer, Done, ReadDone
from sheepdog.cluster.host import trailer
from sheepdog.cluster.host.copies import Copies, Superseded
from sheepdog.cluster.host.object_file import Copy
from sheepdog.cluster.host.trailer import FIRST_ENTRY, block_hash
from sheepdog.cluster.wire.streams import BufferPool

_BLOCK_MASK: Final = BLOCK_SIZE - 1
POOLED_BYTES: Final = 64 << 10  # from here on, clearing new memory and missing the cache cost more than the pool
RETAINED_BYTES: Final = 16 << 20  # of the pool: what a client with 16 reads of 1 MiB has under way
READ_RETRIES: Final = 8  # of a slow read that met a write of the same blocks; then it reads on the loop's thread


def in_range(copy: Copy, offset: int, length: int, failed: Callable[[StoreError], object]) -> bool:
    """Tells `failed` when a range is empty or not inside the object."""
    if offset < 0 or length <= 0 or offset + length > copy.size:
        failed(OutOfRange(f"{offset}+{length} is not inside {copy.oid:016x} of {copy.size} bytes"))
        return False
    return True


class Reads:
    """Reads on the loop's thread what the page cache has, the rest in another thread."""

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        self._by_oid = copies.by_oid
        self._disk = copies.disk
        self._workers = copies.workers
        self._buffers = BufferPool(RETAINED_BYTES)

    def read(self, oid: ObjectId, offset: int, length: int, done: ReadDone) -> None:
        copy = self._by_oid.get(oid)
        if (
            copy is not None
            and 0 < length <= BLOCK_SIZE - (offset & _BLOCK_MASK)
            and copy.fd >= 0
            and not copy.busy
            and offset + length <= copy.size
            and (offset >> 12) not in copy.pending
        ):
            entry = copy.entries[FIRST_ENTRY + (offset >> 12)]
            if entry:
                block = bytearray(BLOCK_SIZE)
                try:
                    count = self._disk.preadv_cached(copy.fd, (block,), offset & ~_BLOCK_MASK)
                except OSError:
                    count = 0  # not cached, or an error that the slow way meets again
                if count == BLOCK_SIZE and block_hash(block) == entry:
                    self._copies.files.used(oid)
                    start = offset & _BLOCK_MASK
                    done(block if length == BLOCK_SIZE else memoryview(block)[start : start + length])
                    return
        self._copies.with_open(
            oid,
            lambda copy: self._read(copy, offset, length, done, 0),
            partial(self._failed, oid, offset, length, done),
        )

    def _failed(self, oid: ObjectId, offset: int, length: int, done: ReadDone, error: StoreError) -> None:
        if isinstance(error, Superseded):  # while the read waited for the file: what is there now answers
            self.read(oid, offset, length, done)
        else:
            done(error)

    def _read(self, copy: Copy, offset: int, length: int, done: ReadDone, tries: int) -> None:
        if not in_range(copy, offset, length, done):
            return
        first = offset >> 12
        last = (offset + length - 1) >> 12
        start = first << 12
        span = (last - first + 1) << 12
        entries = copy.entries
        if copy.fd < 0:  # the file is not made yet: everything is in memory
            self._deliver(copy, memoryview(bytearray(span)), offset, length, done)
            return
        if (
            not copy.pending
            and not any(entries[FIRST_ENTRY + first : FIRST_ENTRY + last + 1])
            and self._disk.is_hole(copy.fd, start, span)
        ):
            done(bytes(length))
            return
        data = memoryview(bytearray(span)) if span < POOLED_BYTES else self._buffers.take(span)[:span]
        if copy.pending and all(block in copy.pending for block in range(first, last + 1)):
            self._deliver(copy, data, offset, length, done)
            return
        try:
            count = (
                self._disk.preadv_cached(copy.fd, (data,), start)
                if tries < READ_RETRIES
                else self._disk.preadv(copy.fd, (data,), start)
            )
        except BlockingIOError:
            count = 0
        except OSError as error:
            done(self._copies.fail(copy.home, error))
            return
        if count == span or tries >= READ_RETRIES:
            self._deliver(copy, data, offset, length, done)
            return
        self._read_slowly(copy, data, offset, length, done, tries)

    def _read_slowly(self, copy: Copy, data: memoryview, offset: int, length: int, done: ReadDone, tries: int) -> None:
        changes = copy.changes
        copy.pins += 1
        fd = copy.fd

        def finished(result: int | OSError) -> None:
            copy.pins -= 1
            if isinstance(result, OSError):
                done(self._copies.fail(copy.home, result))
            elif copy.fd < 0:
                done(DiskError(f"{copy.home.path} is out of service"))
            elif copy.changes != changes:
                self._read(copy, offset, length, done, tries + 1)
            else:
                self._deliver(copy, data, offset, length, done)
            if copy.gone:
                self._copies.files.close_if_unused(copy)

        self._workers.run(lambda: self._disk.preadv(fd, (data,), offset & ~_BLOCK_MASK), finished)

    def _deliver(self, copy: Copy, data: memoryview, offset: int, length: int, done: ReadDone) -> None:
        """Verifies the blocks of the file, lays pending ones over them and hands out the wanted part."""
        first = offset >> 12
        bad = trailer.bad_blocks(data, copy.entries, FIRST_ENTRY + first)
        pending = copy.pending
        if pending:
            bad = [position for position in bad if first + position not in pending]
            for position in range(len(data) >> 12):
                record = pending.get(first + position)
                if record is not None:
                    start = position << 12
                    block = record.block(first + position) if record.hash(first + position) else trailer.ZERO_BLOCK
                    data[start : start + len(block)] = block
        if bad:
            done(self._copies.corrupt(copy, [first + position for position in bad]))
        elif len(data) == length:
            done(data)
        else:
            start = offset & _BLOCK_MASK
            done(data[start : start + length])

    def block(self, copy: Copy, offset: int, failed: Done, again: Callable[[], None]) -> bytearray | None:
        """Present bytes of the block at `offset`, verified; the caller may change them.

        None when that failed, or when it has to come from the disk first: then `again` is called later, and other
        operations on the copy wait for that.
        """
        number = offset >> 12
        record = copy.pending.get(number)
        if record is not None:
            return bytearray(record.block(number) if record.hash(number) else trailer.ZERO_BLOCK)
        block = bytearray(BLOCK_SIZE)
        if copy.fd < 0:  # the file is not made yet
            return block
        try:
            count = self._disk.preadv_cached(copy.fd, (block,), offset)
        except BlockingIOError:
            count = 0
        except OSError as error:
            failed(self._copies.fail(copy.home, error))
            return None
        if count < BLOCK_SIZE:
            self._fetch(copy, offset, failed, again)
            return None
        if trailer.is_bad(block, copy.entries[FIRST_ENTRY + number]):
            failed(self._copies.corrupt(copy, [number]))
            return None
        return block

    def widened(
        self, copy: Copy, offset: int, data: Buffer, failed: Done, again: Callable[[], None]
    ) -> tuple[int, Buffer] | None:
        """A write widened to whole blocks, their rest read and verified.

        None when that failed, or when a block has to come from the disk first: then `again` is called later.
        """
        end = offset + len(data)
        start = offset & ~_BLOCK_MASK
        stop = min((end + _BLOCK_MASK) & ~_BLOCK_MASK, copy.size)
        if stop - start <= BLOCK_SIZE:
            inside = self.block(copy, start, failed, again)
            if inside is None:
                return None
            inside[offset - start : end - start] = data
            return start, inside if stop - start == BLOCK_SIZE else inside[: stop - start]
        merged = bytearray(stop - start)
        edges = [start] if offset & _BLOCK_MASK else []
        last = stop - 1 & ~_BLOCK_MASK
        if end != stop and last not in edges:
            edges.append(last)
        for edge in edges:
            block = self.block(copy, edge, failed, again)
            if block is None:
                return None
            keep = min(BLOCK_SIZE, stop - edge)
            merged[edge - start : edge - start + keep] = memoryview(block)[:keep]
        merged[offset - start : end - start] = data
        return start, merged

    def _fetch(self, copy: Copy, offset: int, failed: Done, again: Callable[[], None]) -> None:
        """Brings a block into the page cache; operations on the copy wait meanwhile."""
        self._copies.close_gate(copy)
        copy.pins += 1
        fd = copy.fd

        def fetched(result: int | OSError) -> None:
            copy.pins -= 1
            copy.gated = False
            if isinstance(result, OSError):
                failed(self._copies.fail(copy.home, result))
            elif copy.fd < 0:
                failed(DiskError(f"{copy.home.path} is out of service"))
            else:
                again()
            if not copy.gated:
                self._copies.open_gate(copy)

        self._workers.run(lambda: self._disk.preadv(fd, (bytearray(BLOCK_SIZE),), offset), fetched)

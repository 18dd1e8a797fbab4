"""What a client knows of an open volume: its map, who is changing which part of it, and how to follow a snapshot.

Pure: no sockets, no threads, no loop. `volume` (asyncio) and `blocking` (threads) drive the same machine through the
operations of `operations`. Calls must not overlap in time; a driver with threads holds one lock around each.

The map in memory is the authority while the volume is open, as QEMU and tgt hold it (protocol.md 7.3): entry i is
the vid that owns data object i, 0 for a hole. Rules kept here:

* An object that this volume does not own is created (copied on write) by one operation at a time, and its map
  entry is acknowledged before that operation ends. Until then the index is held *exclusively*.
* Writes in place hold their index *shared*, so that a discard never removes an object under a write.
* The map is written as one range from the lowest to the highest changed entry, so an operation holds the whole range.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from typing import NamedTuple

from sheepdog.cluster.core.ids import Vid
from sheepdog.cluster.core.inode import InodeHeader, objects_of


class Piece(NamedTuple):
    """The part of a byte range that lies in object `number`; `position` is where it starts in the range."""

    number: int
    offset: int
    length: int
    position: int


class Extent(NamedTuple):
    """A run of bytes that is backed by objects (`allocated`) or reads as zeros."""

    offset: int
    length: int
    allocated: bool


class Claim:
    """Objects first..last that an operation wants to hold until it has written the map.

    `replaces`: all of them exclusively; else only those the volume does not own. `wake` is called
    when it may be worth to ask again; it must not call back into the machine before it has returned.
    """

    __slots__ = ("exclusive", "first", "last", "replaces", "shared", "wake")

    def __init__(self, first: int, last: int, replaces: bool, wake: Callable[[], None]) -> None:
        self.first = first
        self.last = last
        self.replaces = replaces
        self.wake = wake
        self.shared: list[int] = []
        self.exclusive: list[int] = []


class VolumeMachine:
    """An open volume."""

    def __init__(self, header: InodeHeader, entries: array[int], read_only: bool) -> None:
        self.header = header
        self.vid = Vid(header.vdi_id)
        self.size = header.vdi_size
        self.object_size = header.object_size
        self.entries = entries
        self.read_only = read_only
        self.read_flags = 0  # of requests for data: CACHE if its gateway may keep it
        self.caching = True  # until a flush is answered "there is no cache": then nothing is volatile
        self.sharing = False  # other clients change the map, too (client.shared)
        self.reloading = False
        self.map_changed = False  # by us, since this inode became ours
        self.map_writes = 0  # acknowledged with CACHE ...
        self.map_flushed = 0  # ... and how many of them a flush has covered
        self._shared: dict[int, int] = {}
        self._exclusive: set[int] = set()
        self._queue: list[Claim] = []
        self._waiters: list[Callable[[], None]] = []

    # -- byte ranges

    def pieces(self, offset: int, length: int) -> list[Piece]:
        """The objects of a range that lies inside the volume."""
        size = self.object_size
        found = []
        position = 0
        while position < length:
            index, start = divmod(offset + position, size)
            part = min(size - start, length - position)
            found.append(Piece(index, start, part, position))
            position += part
        return found

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """What is allocated in a range (clipped to the volume), by whole objects, neighbours merged."""
        end = min(offset + length, self.size)
        size, entries = self.object_size, self.entries
        while offset < end:
            index = offset // size
            allocated = entries[index] != 0
            last = index + 1
            while last * size < end and (entries[last] != 0) == allocated:
                last += 1
            stop = min(last * size, end)
            yield Extent(offset, stop - offset, allocated)
            offset = stop

    def allocated_chunks(self, offset: int, length: int, limit: int) -> Iterator[tuple[int, int]]:
        """(offset, length) of what is allocated in a range, in pieces of at most `limit` bytes."""
        for extent in list(self.extents(offset, length)):
            if extent.allocated:
                end = extent.offset + extent.length
                for start in range(extent.offset, end, limit):
                    yield start, min(limit, end - start)

    def edges(self, offset: int, length: int) -> list[Piece]:
        """The parts of a range that are less than an object; the volume's last object ends with the volume."""
        pieces = self.pieces(offset, length)
        ends = pieces[:1] + pieces[1:][-1:]
        return [
            piece
            for piece in ends
            if piece.offset or (piece.length < self.object_size and offset + piece.position + piece.length < self.size)
        ]

    def is_ours_to_punch(self, index: int) -> bool:
        """A hole can be made in the object without sending or reading data."""
        return self.entries[index] == self.vid and not self.header.copy_policy

    # -- holds

    def hold_in_place(self, index: int) -> bool:
        """The short way of `acquire` for one object: True if it is our own and nobody changes its entry."""
        if self._queue or self.entries[index] != self.vid or index in self._exclusive:
            return False
        self._shared[index] = self._shared.get(index, 0) + 1
        return True

    def drop_in_place(self, index: int) -> None:
        left = self._shared[index] - 1
        if left:
            self._shared[index] = left
        else:
            del self._shared[index]
            if self._queue:
                self._wake_queue()

    def acquire(self, claim: Claim) -> bool:
        """Grants the claim, or queues it behind those that stand in its way and returns False."""
        if not self._grantable(claim):
            if claim not in self._queue:
                self._queue.append(claim)
            return False
        if claim in self._queue:
            self._queue.remove(claim)
        for index in claim.shared:
            self._shared[index] = self._shared.get(index, 0) + 1
        self._exclusive.update(claim.exclusive)
        return True

    def _grantable(self, claim: Claim) -> bool:
        for earlier in self._queue:  # first come, first served, or a busy object would starve a discard
            if earlier is claim:
                break
            if earlier.first <= claim.last and claim.first <= earlier.last:
                return False
        shared, exclusive = [], []
        for index in range(claim.first, claim.last + 1):
            if index in self._exclusive:
                return False
            if claim.replaces or self.entries[index] != self.vid:
                if index in self._shared:
                    return False
                exclusive.append(index)
            else:
                shared.append(index)
        claim.shared, claim.exclusive = shared, exclusive
        return True

    def release(self, claim: Claim) -> None:
        """Ends a granted claim, or takes a waiting one out of the queue."""
        if claim in self._queue:
            self._queue.remove(claim)
        for index in claim.shared:
            left = self._shared[index] - 1
            if left:
                self._shared[index] = left
            else:
                del self._shared[index]
        self._exclusive.difference_update(claim.exclusive)
        claim.shared, claim.exclusive = [], []
        self._wake_queue()
        self._wake_waiters()

    def changing(self, index: int) -> bool:
        """Some operation is about to change this entry."""
        return index in self._exclusive

    def wait(self, wake: Callable[[], None]) -> None:
        """`wake` is called once, at the next release of any claim or end of a reload."""
        self._waiters.append(wake)

    def _wake_queue(self) -> None:
        for claim in self._queue:
            claim.wake()

    def _wake_waiters(self) -> None:
        waiters, self._waiters = self._waiters, []
        for wake in waiters:
            wake()

    # -- changes

    @property
    def map_unflushed(self) -> bool:
        """A map entry may be lost by a power failure: a durable write must flush."""
        return self.map_writes != self.map_flushed

    def map_written(self, durable: bool) -> None:
        """A map write was acknowledged."""
        self.map_changed = True
        if not durable:
            self.map_writes += 1

    def install(self, header: InodeHeader) -> None:
        """The inode that has taken this one's place (protocol.md 8.4).

        The entries stay as they are: those with the old vid now belong to an ancestor.
        """
        self.header = header
        self.vid = Vid(header.vdi_id)
        self.map_changed = False
        self.grow(header.vdi_size)

    def corrections(self, theirs: array[int]) -> Iterator[tuple[int, array[int]]]:
        """(first, entries) of every run in which our heir's map differs from ours, but for what is being changed."""
        count = min(len(self.entries), len(theirs))
        ours = self.entries[:count]
        if ours == theirs[:count]:
            return
        first = -1
        for index in range(count):
            wrong = ours[index] != theirs[index] and index not in self._exclusive
            if wrong and first < 0:
                first = index
            elif not wrong and first >= 0:
                yield first, ours[first:index]
                first = -1
        if first >= 0:
            yield first, ours[first:]

    def end_reload(self) -> None:
        self.reloading = False
        self._wake_waiters()

    def grow(self, size: int) -> None:
        """The volume has this size now; it never shrinks."""
        if size > self.size:
            self.size = size
            missing = objects_of(size, self.header.block_size_shift) - len(self.entries)
            if missing > 0:
                self.entries.extend(array("I", bytes(4 * missing)))

"""Reads of volumes in the cache: from here, or from the cluster with what came kept; a sequential reader gets ahead."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from sheepdog.cluster.core.cache_entries import CacheEntries
from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.errors import Corrupt, Result, StoreError
from sheepdog.cluster.core.extents import CachedObject, Fill, IoDone, covered, runs, span, touched
from sheepdog.cluster.core.gateway import Gateway
from sheepdog.cluster.core.limits import (
    BLOCK_SIZE,
    CACHE_READ_AHEAD_MAX_BYTES,
    CACHE_READ_AHEAD_MIN_BYTES,
)
from sheepdog.cluster.core.messages import Buffer


class CacheReads:
    """Of one cache. What came from the cluster is answered first, and kept when the answer has left."""

    def __init__(self, context: Context, gateway: Gateway, entries: CacheEntries) -> None:
        self.hits = self.misses = 0
        self._answered: list[tuple[CachedObject, Fill, int, bytes]] = []  # to be kept
        self._context = context
        self._gateway = gateway
        self._entries = entries

    def read(self, entry: CachedObject, offset: int, length: int, again: Callable[[], None], done: IoDone) -> None:
        """Of an object whose volume is served; `again` begins the request anew when it had to wait."""
        want = touched(offset, length)
        if want & entry.writing:
            entry.blocked.append((again, done))
        elif not want & ~entry.present:
            self._hit(entry, offset, length, again, done)
        elif want & (entry.dirty | entry.pushing):
            no_room = partial(self._read_pushed, entry, offset, length, done)
            self.fetch(entry, want & ~entry.present, again, done, no_room)
        else:
            self._miss(entry, offset, length, done)

    def _hit(self, entry: CachedObject, offset: int, length: int, again: Callable[[], None], done: IoDone) -> None:
        self.hits += 1
        counters = self._context.counters
        counters.reads += 1
        counters.tx += length
        self._entries.use(entry)
        self._entries.space.used_now(entry)

        def found(data: Buffer | StoreError) -> None:
            self._entries.leave(entry)
            if not isinstance(data, StoreError):
                self._gateway.answer(done, Result.SUCCESS, data)
                return
            want = touched(offset, length)
            bad = want if not isinstance(data, Corrupt) else sum(1 << block for block in data.blocks) & want or want
            if entry.volume.over or bad & (entry.dirty | entry.pushing):
                self._context.log(3, f"object cache, {entry.oid:016x}: unpushed data cannot be read: {data}")
                self._gateway.answer(done, Result.EIO, b"")
            else:
                self._context.probe("cache.unreadable_clean")
                self._entries.space.lose(entry, bad)
                again()

        self._entries.store.read(entry.oid, offset, length, found)

    def _miss(self, entry: CachedObject, offset: int, length: int, done: IoDone) -> None:
        self.misses += 1
        sequential = offset == entry.read_end
        entry.read_end = offset + length
        fill = self._begin_fill(entry, covered(offset, length))

        def found(result: int, data: Buffer) -> None:
            if result:
                self._end_fill(entry, fill, offset, b"")
                done(result, b"")
                return
            kept = bytes(data) if fill.bits else b""  # the buffer is the client's when it is answered
            done(result, data)
            entry.known = True
            self._end_fill(entry, fill, offset, kept)
            if sequential:
                self._read_ahead(entry, offset + length)

        self._gateway.read(entry.oid, offset, length, found)

    def _read_ahead(self, entry: CachedObject, offset: int) -> None:
        """A reader goes on where it ended: the next window is on its way before it asks."""
        entry.read_ahead = min(max(2 * entry.read_ahead, CACHE_READ_AHEAD_MIN_BYTES), CACHE_READ_AHEAD_MAX_BYTES)
        start = -(-offset // BLOCK_SIZE) * BLOCK_SIZE
        length = min(entry.read_ahead, entry.size - start)
        bits = covered(start, length) & ~entry.present if length > 0 else 0
        for fill in entry.fills:
            if not fill.arrived:
                return
            bits &= ~fill.bits
        if not bits or entry.volume.over or entry.barred:
            return
        first, count = next(runs(bits))
        entry.read_end = (first + count) * BLOCK_SIZE
        fill = self._begin_fill(entry, span(first, count))
        if fill.bits:
            self._gateway.router.read(
                entry.oid,
                first * BLOCK_SIZE,
                count * BLOCK_SIZE,
                lambda result, data: self._end_fill(entry, fill, first * BLOCK_SIZE, b"" if result else data),
            )
        else:
            self._end_fill(entry, fill, 0, b"")

    def _begin_fill(self, entry: CachedObject, bits: int, needed: bool = False) -> Fill:
        """What comes from the cluster is kept, unless a change may overtake it, or there is no room."""
        if entry.through or not (needed or self._entries.space.has_room(bits.bit_count())):
            bits = 0
        fill = Fill(bits)
        entry.fills.append(fill)
        self._entries.use(entry)
        return fill

    def _end_fill(self, entry: CachedObject, fill: Fill, offset: int, data: Buffer) -> None:
        """The fill is over; with `data`, which begins at `offset`, once that has been kept."""
        if fill.bits and data:
            if not self._answered:
                self._entries.store.when_answered(self._keep)
            fill.arrived = True
            self._answered.append((entry, fill, offset, bytes(data)))
        else:
            entry.fills.remove(fill)
            self._entries.leave(entry)

    def _keep(self) -> None:
        answered, self._answered = self._answered, []
        for entry, fill, offset, data in answered:
            entry.fills.remove(fill)
            bits = 0 if entry.volume.over else fill.bits & ~entry.present & ~entry.writing
            if bits == touched(offset, len(data)):  # nearly always
                self._entries.keep(entry, offset, data)
            else:
                view = memoryview(data)
                for first, count in runs(bits):
                    start = first * BLOCK_SIZE - offset
                    self._entries.keep(entry, first * BLOCK_SIZE, view[start : start + count * BLOCK_SIZE])
            self._entries.leave(entry)

    def _read_pushed(self, entry: CachedObject, offset: int, length: int, done: IoDone, _: StoreError) -> None:
        """There is no room to bring together what is dirty here and what is not: the cluster gets it all first."""
        self._context.probe("cache.read_pushed")
        pushed = partial(self._pushed, entry, offset, length, done)
        self._entries.pusher.push([entry], pushed, touched(offset, length))

    def _pushed(self, entry: CachedObject, offset: int, length: int, done: IoDone, result: int) -> None:
        if result:
            self._gateway.answer(done, result, b"")
        else:
            self._gateway.read(entry.oid, offset, length, done)

    def fetch(
        self,
        entry: CachedObject,
        bits: int,
        again: Callable[[], None],
        done: IoDone,
        no_room: Callable[[StoreError], None],
    ) -> None:
        """These blocks have to be here before the request can be served; `no_room` if the store does not take them."""
        if entry.through:
            entry.blocked.append((again, done))
            return
        first, count = next(runs(bits))
        asked = span(first, count)
        fill = self._begin_fill(entry, asked, needed=True)

        def found(result: int, data: Buffer) -> None:
            if result:
                self._end_fill(entry, fill, 0, b"")
                done(result, b"")
                return
            entry.fills.remove(fill)
            wanted = fill.bits & ~entry.present & ~entry.writing
            if entry.volume.over or wanted != asked:  # somebody has changed them meanwhile
                self._entries.leave(entry)
                again()
            else:
                stored = partial(self._fetched, entry, again, no_room)
                self._entries.put(entry, first * BLOCK_SIZE, bytes(data), False, stored)

        self._gateway.router.read(entry.oid, first * BLOCK_SIZE, count * BLOCK_SIZE, found)

    def _fetched(
        self,
        entry: CachedObject,
        again: Callable[[], None],
        no_room: Callable[[StoreError], None],
        error: StoreError | None,
    ) -> None:
        self._entries.leave(entry)
        if error is None or entry.volume.over:
            again()
        else:
            no_room(error)

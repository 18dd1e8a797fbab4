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
    CACHE_FILL_BATCH,
    CACHE_FILL_DELAY_BYTES,
    CACHE_FILL_DELAY_NS,
    CACHE_READ_AHEAD_MAX_BYTES,
    CACHE_READ_AHEAD_MIN_BYTES,
)
from sheepdog.cluster.core.messages import Buffer


class CacheReads:
    """Of one cache.

    What random reads have brought waits in `_late`, since answers leave at the end of a turn: a few are kept together
    when a further miss has been sent on, so that this gateway works while the other node does, or else a little later.
    """

    def __init__(self, context: Context, gateway: Gateway, entries: CacheEntries) -> None:
        self.hits = self.misses = 0
        self._late: list[tuple[CachedObject, Fill, int, bytes]] = []
        self._soon = False  # the next turn keeps them
        self._timer_set = False
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
            self.fetch(entry, want & ~entry.present, again, done)
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
        if len(self._late) >= CACHE_FILL_BATCH and not self._soon:
            self._soon = True
            self._context.clock.after(0, self._keep_late)
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
            if kept and not sequential and len(kept) <= CACHE_FILL_DELAY_BYTES:
                self._late.append((entry, fill, offset, kept))
                if not self._timer_set:
                    self._timer_set = True
                    self._context.clock.after(CACHE_FILL_DELAY_NS, self._delay_ended)
                return
            self._end_fill(entry, fill, offset, kept)
            if sequential:
                self._read_ahead(entry, offset + length)

        self._gateway.read(entry.oid, offset, length, found)

    def _delay_ended(self) -> None:
        self._timer_set = False
        self._keep_late()

    def _keep_late(self) -> None:
        self._soon = False
        late, self._late = self._late, []
        for entry, fill, offset, data in late:
            self._end_fill(entry, fill, offset, data)

    def _read_ahead(self, entry: CachedObject, offset: int) -> None:
        """A reader goes on where it ended: the next window is on its way before it asks."""
        entry.read_ahead = min(max(2 * entry.read_ahead, CACHE_READ_AHEAD_MIN_BYTES), CACHE_READ_AHEAD_MAX_BYTES)
        start = -(-offset // BLOCK_SIZE) * BLOCK_SIZE
        length = min(entry.read_ahead, entry.size - start)
        bits = covered(start, length) & ~entry.present if length > 0 else 0
        if not bits or entry.fills or entry.volume.over or entry.barred:
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
        entry.fills.remove(fill)
        bits = fill.bits & ~entry.present & ~entry.writing if data and not entry.volume.over else 0
        view = memoryview(data)
        for first, count in runs(bits):
            start = first * BLOCK_SIZE - offset
            part = bytes(view[start : start + count * BLOCK_SIZE])
            self._entries.put(entry, first * BLOCK_SIZE, part, False, lambda _: None)
        self._entries.leave(entry)

    def fetch(self, entry: CachedObject, bits: int, again: Callable[[], None], done: IoDone) -> None:
        """These blocks have to be here before the request can be served."""
        if entry.through:
            entry.blocked.append((again, done))
            return
        first, count = next(runs(bits))
        fill = self._begin_fill(entry, span(first, count), needed=True)

        def found(result: int, data: Buffer) -> None:
            if result:
                self._end_fill(entry, fill, 0, b"")
                done(result, b"")
                return
            entry.fills.remove(fill)
            wanted = fill.bits & ~entry.present & ~entry.writing
            if entry.volume.over or wanted != span(first, count):  # somebody has changed them meanwhile
                self._entries.leave(entry)
                again()
            else:
                stored = partial(self._fetched, entry, again, done)
                self._entries.put(entry, first * BLOCK_SIZE, bytes(data), False, stored)

        self._gateway.router.read(entry.oid, first * BLOCK_SIZE, count * BLOCK_SIZE, found)

    def _fetched(self, entry: CachedObject, again: Callable[[], None], done: IoDone, error: StoreError | None) -> None:
        self._entries.leave(entry)
        if error is None or entry.volume.over:
            again()
        else:
            done(error.result, b"")

"""Brings dirty blocks to the cluster: neighbours together, several at a time, each durable when it is answered.

A block that changes while it is being pushed stays dirty. Whoever waits for a set of blocks is told when a push that
began after the call (or was under way, for what has not changed since) has ended for each, or at the first error;
blocks whose push failed stay dirty.
"""

from __future__ import annotations

from collections.abc import Callable

from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.errors import Corrupt, Result, StoreError
from sheepdog.cluster.core.extents import CachedObject, runs, span
from sheepdog.cluster.core.gateway import Gateway
from sheepdog.cluster.core.limits import BLOCK_SIZE, CACHE_PUSH_BYTES, CACHE_PUSHES
from sheepdog.cluster.core.messages import Buffer, Flag
from sheepdog.cluster.core.ports import Store

_MOST = CACHE_PUSH_BYTES // BLOCK_SIZE


class _Wait:
    """Blocks that somebody waits for: (object, blocks, the first push that counts)."""

    __slots__ = ("done", "left")

    def __init__(self, done: Callable[[int], None]) -> None:
        self.left: list[tuple[CachedObject, int, int]] = []
        self.done = done


class _Push:
    """Neighbouring blocks on their way to the cluster."""

    __slots__ = ("began_ns", "bits", "entry", "number", "offset", "pusher")

    def __init__(self, pusher: Pusher, entry: CachedObject, bits: int, offset: int, number: int, began_ns: int) -> None:
        self.pusher = pusher
        self.entry = entry
        self.bits = bits
        self.offset = offset
        self.number = number
        self.began_ns = began_ns

    def found(self, data: Buffer | StoreError) -> None:
        self.pusher.send(self, data)

    def answered(self, result: int, _: Buffer) -> None:
        self.pusher.ended(self, result)


class Pusher:
    """Of one cache. `clean` and `gone` are told of objects whose blocks have reached the cluster, or cannot."""

    def __init__(
        self,
        context: Context,
        gateway: Gateway,
        store: Store,
        moved: Callable[[CachedObject], None],
        gone: Callable[[CachedObject], None],
    ) -> None:
        self.pushes = self.push_ns = self.pushed_blocks = self.failures = 0
        self._context = context
        self._gateway = gateway
        self._store = store
        self._moved = moved
        self._gone = gone
        self._number = 0
        self._under_way = 0
        self._queue: dict[CachedObject, int] = {}  # blocks whose push has not begun, in this order
        self._beginning = False
        self._waits: dict[_Wait, None] = {}

    def push(self, objects: list[CachedObject], done: Callable[[int], None], only: int = -1) -> None:
        """Everything that is dirty in these now (of one object: `only` these blocks); `done` with the first error."""
        wait = _Wait(done)
        for entry in objects:
            dirty, pushing = entry.dirty & only, entry.pushing & ~entry.dirty & only
            if pushing:
                wait.left.append((entry, pushing, 0))
            if dirty:
                wait.left.append((entry, dirty, self._number + 1))
                self._queue[entry] = self._queue.get(entry, 0) | dirty
        if not wait.left:
            done(Result.SUCCESS)
            return
        self._waits[wait] = None
        self._go_on()

    def ready(self, entry: CachedObject) -> None:
        """Blocks of the object may have become ready for a push that somebody waits for."""
        wanted = 0
        for wait in self._waits:
            for one, blocks, _ in wait.left:
                if one is entry:
                    wanted |= blocks
        if wanted & entry.dirty:
            self._queue[entry] = self._queue.get(entry, 0) | wanted & entry.dirty
            self._go_on()

    def _go_on(self) -> None:
        if self._beginning:
            return  # the store has answered at once: the loop below sees to the rest
        self._beginning = True
        while self._queue and self._under_way < CACHE_PUSHES:
            entry, blocks = next(iter(self._queue.items()))
            ready = blocks & entry.dirty & ~entry.pushing & ~entry.writing
            if not ready or entry.volume.over:
                del self._queue[entry]
                continue
            first, count = next(runs(ready))
            count = min(count, _MOST)
            self._queue[entry] = blocks & ~span(first, count)  # each once: what fails waits for the next push
            self._push(entry, first, count)
        self._beginning = False

    def _push(self, entry: CachedObject, first: int, count: int) -> None:
        bits = span(first, count)
        entry.pushing |= bits
        entry.dirty &= ~bits
        entry.volume.dirty_blocks -= count
        self._under_way += 1
        self._number += 1
        push = _Push(self, entry, bits, first * BLOCK_SIZE, self._number, self._context.clock.now_ns())
        self._store.read(entry.oid, push.offset, count * BLOCK_SIZE, push.found)

    def send(self, push: _Push, data: Buffer | StoreError) -> None:
        """These are its bytes."""
        entry = push.entry
        if entry.volume.over:
            self.ended(push, Result.EIO)
        elif not isinstance(data, StoreError):
            self._gateway.change(entry.oid, Flag.DURABLE, push.offset, 0, data, 0, push.answered)
        else:
            self._context.log(3, f"object cache, {entry.oid:016x}: unpushed data cannot be read: {data}")
            self.ended(push, Result.EIO if isinstance(data, Corrupt) else data.result)

    def ended(self, push: _Push, result: int) -> None:
        """The cluster has its bytes, or does not take them."""
        entry, bits = push.entry, push.bits
        told, number = bits, push.number
        self.push_ns += self._context.clock.now_ns() - push.began_ns
        self._under_way -= 1
        self.pushes += 1
        entry.pushing &= ~bits
        if entry.volume.over:
            result = result or Result.EIO
        elif result == Result.NO_OBJ:
            # Its volume does not name it any more: a client freed it through the map.
            self._context.probe("cache.pushed_to_nothing")
            self._gone(entry)
            result = Result.SUCCESS
            told, number = -1, self._number + 1  # what of it waits in the queue is never pushed
        elif result:
            self.failures += 1
            entry.volume.dirty_blocks += (bits & ~entry.dirty).bit_count()
            entry.dirty |= bits
        else:
            self.pushed_blocks += bits.bit_count()
        if result or entry.dirty & bits:
            self._context.probe("cache.dirty_again" if not result else "cache.push_failed")
        self._tell(entry, told, number, result)
        self._moved(entry)
        self.ready(entry)
        self._go_on()

    def _tell(self, entry: CachedObject, bits: int, number: int, result: int) -> None:
        ready: list[_Wait] = []
        for wait in self._waits:
            left: list[tuple[CachedObject, int, int]] = []
            for one, wanted, since in wait.left:
                if one is entry and number >= since and wanted & bits:
                    if result:
                        ready.append(wait)
                        left = []
                        break
                    wanted &= ~bits
                if wanted:
                    left.append((one, wanted, since))
            wait.left = left
            if not left and wait not in ready:
                ready.append(wait)
        for wait in ready:
            del self._waits[wait]
        for wait in ready:
            wait.done(result)

    def stop(self, result: int) -> None:
        waits, self._waits = self._waits, {}
        self._queue.clear()
        for wait in waits:
            wait.done(result)

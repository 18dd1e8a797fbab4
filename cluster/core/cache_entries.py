"""Objects in the cache: who uses one, what of it lies in the cache's store, what has to be pushed."""

from __future__ import annotations

from collections.abc import Callable

from sheepdog.cluster.core.cache_push import Pusher
from sheepdog.cluster.core.cache_space import CACHED, CacheSpace
from sheepdog.cluster.core.cached_volume import CachedVolume
from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.errors import StoreError
from sheepdog.cluster.core.extents import CachedObject, groups_of, touched
from sheepdog.cluster.core.gateway import Gateway
from sheepdog.cluster.core.messages import Buffer
from sheepdog.cluster.core.ports import Done, Store


class CacheEntries:
    """Of one cache. `on_dirty` is called when there is something to push."""

    def __init__(self, context: Context, gateway: Gateway, store: Store, size_bytes: int) -> None:
        self.on_dirty: Callable[[], None] = lambda: None
        self.store = store
        self.space = CacheSpace(store, size_bytes, context.probe)
        self.pusher = Pusher(context, gateway, store, self._moved, self._gone)
        self._context = context

    # -- use -----------------------------------------------------------------------------------------------------

    def use(self, entry: CachedObject) -> None:
        """A request needs what lies here of the object, until it calls `leave`."""
        entry.users += 1

    def leave(self, entry: CachedObject) -> None:
        entry.users -= 1
        self._moved(entry)

    def _moved(self, entry: CachedObject) -> None:
        """Somebody has done with the object: others may have waited for that."""
        if entry.when_idle is not None and entry.idle:
            call, entry.when_idle = entry.when_idle, None
            call()
        self.unblock(entry)
        self.space.shrink()

    def unblock(self, entry: CachedObject) -> None:
        """Requests that waited for the object begin anew."""
        if entry.blocked and not entry.barred and not entry.volume.over:
            blocked, entry.blocked = entry.blocked, []
            for again, _ in blocked:
                again()

    def when_idle(self, entry: CachedObject, call: Callable[[], None]) -> None:
        """Calls when nobody uses the object; nobody may begin to meanwhile (it is barred)."""
        if entry.idle:
            call()
        else:
            entry.when_idle = call

    # -- bytes ----------------------------------------------------------------------------------------------------

    def put(self, entry: CachedObject, offset: int, data: Buffer, dirty: bool, then: Done) -> None:
        """Bytes into the cache's store; what they are is true when they are there."""
        want, volume = touched(offset, len(data)), entry.volume
        entry.writing |= want
        self.use(entry)
        self.space.make(entry)
        left = 1
        failure: StoreError | None = None

        def stored(error: StoreError | None) -> None:
            nonlocal left, failure
            left, failure = left - 1, failure or error
            if left:
                return
            entry.writing &= ~want
            if failure is None and not volume.over:
                self.space.gained(entry, want)
                if dirty:
                    self._dirtied(entry, want)
            then(failure)
            self.leave(entry)
            self.pusher.ready(entry)

        groups = groups_of(want) & ~entry.marked if dirty else 0
        if groups:
            left = 2
            entry.marked |= groups
            self.space.mark(entry, stored)
        self.store.write(entry.oid, offset, data, CACHED, False, stored)

    def keep(self, entry: CachedObject, offset: int, data: Buffer) -> None:
        """Whole blocks that came from the cluster into the cache's store, if it takes them."""
        self.space.make(entry)
        if self.store.keep(entry.oid, offset, data):
            self.space.gained(entry, touched(offset, len(data)))

    def _dirtied(self, entry: CachedObject, bits: int) -> None:
        volume = entry.volume
        if not volume.dirty_blocks:
            volume.dirty_since_ns = self._context.clock.now_ns()
        volume.dirty_blocks += (bits & ~entry.dirty).bit_count()
        entry.dirty |= bits
        self.on_dirty()

    def push_all(self, volume: CachedVolume, done: Callable[[int], None]) -> None:
        """Everything of the volume that is dirty now."""
        self.pusher.push([entry for entry in volume.objects.values() if entry.dirty or entry.pushing], done)

    def forget(self, entry: CachedObject, done: Done) -> None:
        """Nothing of the object is here, also after a crash, when `done` comes."""
        entry.volume.dirty_blocks -= entry.dirty.bit_count()
        self.space.drop(entry, done)

    def _gone(self, entry: CachedObject) -> None:
        """The cluster does not have the object any more."""
        entry.known = False
        self.forget(entry, lambda _: None)

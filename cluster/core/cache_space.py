"""What the cache takes on its disk, and what goes when that is too much: clean objects, least recently used first."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

from sheepdog.cluster.core.errors import StoreError
from sheepdog.cluster.core.extents import MARKS_BYTES, CachedObject, overhead
from sheepdog.cluster.core.ids import ObjectId, Version
from sheepdog.cluster.core.limits import BLOCK_SIZE, CACHE_DIRTY_PART, CACHE_HIGH_PERCENT, CACHE_LOW_PERCENT
from sheepdog.cluster.core.ports import Done, Store

CACHED = Version(1, 0, 0)  # of every file here: nobody compares them
_LOOKS = 64  # objects looked at in one pass: some are in use, and a pass must not delay a request


class CacheSpace:
    """Of one cache."""

    def __init__(self, store: Store, size_bytes: int, probe: Callable[[str], None]) -> None:
        self.size_bytes = size_bytes
        self.used_blocks = 0
        self._store = store
        self._probe = probe
        self._removing: dict[ObjectId, list[Done]] = {}
        self._by_use: dict[ObjectId, CachedObject] = {}  # least recently used first
        self._most = size_bytes // BLOCK_SIZE

    def add(self, entry: CachedObject) -> None:
        """A file that is there already."""
        self.used_blocks += entry.blocks()
        self._by_use[entry.oid] = entry

    def make(self, entry: CachedObject) -> None:
        """A file for the object, if it has none; a failure shows at the write that follows."""
        if not entry.stored:
            entry.stored = True
            self.used_blocks += overhead(entry.size)
            self._by_use[entry.oid] = entry
            self._store.create(entry.oid, entry.size + MARKS_BYTES, 0, b"", CACHED, False, lambda _: None)

    def mark(self, entry: CachedObject, done: Done) -> None:
        """Its groups that may be dirty, for the next start."""
        marks = entry.marked.to_bytes(MARKS_BYTES, "little")
        self._store.write(entry.oid, entry.size, marks, CACHED, False, done)

    def gained(self, entry: CachedObject, bits: int) -> None:
        self.used_blocks += (bits & ~entry.present).bit_count()
        entry.present |= bits

    def lose(self, entry: CachedObject, bits: int) -> None:
        """These blocks cannot be read here."""
        self.used_blocks -= (bits & entry.present).bit_count()
        entry.present &= ~bits

    def drop(self, entry: CachedObject, done: Done) -> None:
        """Nothing of the object is here any more, also after a crash, when `done` comes."""
        stored = entry.stored
        self.used_blocks -= entry.blocks()
        self._by_use.pop(entry.oid, None)
        entry.forget()
        if stored:
            self.remove(entry.oid, done)
        elif entry.oid in self._removing:
            self._removing[entry.oid].append(done)
        else:
            done(None)

    def remove(self, oid: ObjectId, done: Done) -> None:
        """Removes a file; a crash before `done` may bring it back."""
        waiting = [*self._removing.get(oid, ()), done]  # some, if it was made and removed once more meanwhile
        self._removing[oid] = waiting

        def removed(error: StoreError | None) -> None:
            if self._removing.get(oid) is waiting:
                del self._removing[oid]
                for call in waiting:
                    call(error)

        self._store.remove(oid, removed)

    @property
    def removing(self) -> bool:
        return bool(self._removing)

    def used_now(self, entry: CachedObject) -> None:
        if entry.stored:
            del self._by_use[entry.oid]
            self._by_use[entry.oid] = entry

    def has_room(self, blocks: int) -> bool:
        return self.used_blocks + blocks <= self._most

    def pressed(self, dirty_blocks: int) -> bool:
        """Writes have to wait for their push: too much is dirty, or nothing else is left that could go."""
        return dirty_blocks >= self._most // CACHE_DIRTY_PART or self.used_blocks >= self._most

    def shrink(self) -> None:
        """Makes room if there is little left."""
        if self.used_blocks * 100 < self._most * CACHE_HIGH_PERCENT:
            return
        for entry in list(islice(self._by_use.values(), _LOOKS)):
            if self.used_blocks * 100 <= self._most * CACHE_LOW_PERCENT:
                break
            if entry.idle and not (entry.dirty or entry.writing or entry.barred):
                self._probe("cache.evict")
                self.drop(entry, lambda _: None)

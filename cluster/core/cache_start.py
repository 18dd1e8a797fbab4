"""What the cache finds in its store at a start, until it is known whose it is."""

from __future__ import annotations

from collections.abc import Callable

from sheepdog.cluster.core.cached_volume import CachedVolume
from sheepdog.cluster.core.errors import StoreError
from sheepdog.cluster.core.extents import MARKS_BYTES, CachedObject, Held, IoDone, blocks_of, span
from sheepdog.cluster.core.ids import ObjectId, Vid, vid_of
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.messages import Buffer
from sheepdog.cluster.core.ports import Log, Store


class Leftovers:
    """Reads which blocks are there and which may be dirty. Until they are adopted, requests for data wait."""

    def __init__(self, store: Store, log: Log) -> None:
        self.adopted = False
        self._store = store
        self._log = log
        self._by_volume: dict[Vid, list[CachedObject]] = {}
        self._begun = False
        self._reading = 1
        self._waiting: list[Callable[[], None]] = []
        self._held: list[Held] = []

    def _read(self, oid: ObjectId) -> None:
        try:
            size = self._store.size(oid) - MARKS_BYTES
            table = self._store.table(oid)
        except StoreError as error:
            self._log(3, f"object cache, {oid:016x}: {error}")
            self._read_one()
            return
        vid = vid_of(oid)
        entry = CachedObject(CachedVolume(vid), oid, size)
        entry.known = entry.stored = True
        blocks = size // BLOCK_SIZE
        hashes = memoryview(table)[: 8 * blocks].cast("Q")
        for block, value in enumerate(hashes):
            if value:
                entry.present |= 1 << block
        self._by_volume.setdefault(vid, []).append(entry)

        def marks(data: Buffer | StoreError) -> None:
            if isinstance(data, StoreError):
                self._log(3, f"object cache, {oid:016x}: {data}; all of it counts as not pushed")
                entry.marked = span(0, blocks)
            else:
                entry.marked = int.from_bytes(data, "little")
            self._read_one()

        self._store.read(oid, size, MARKS_BYTES, marks)

    def _read_one(self) -> None:
        self._reading -= 1
        if not self._reading:
            waiting, self._waiting = self._waiting, []
            for call in waiting:
                call()

    def when_read(self, call: Callable[[], None]) -> None:
        """Looks at the store first: not before this, so that what an earlier incarnation had under way has ended."""
        if not self._begun:
            self._begun = True
            for oid, _ in list(self._store.inventory()):
                self._reading += 1
                self._read(oid)
            self._read_one()
        if self._reading:
            self._waiting.append(call)
        else:
            call()

    def dirty_vids(self) -> list[Vid]:
        """Volumes with blocks that may not have been pushed."""
        return [
            vid
            for vid, entries in self._by_volume.items()
            if any(entry.present & blocks_of(entry.marked) for entry in entries)
        ]

    def take(self) -> dict[Vid, list[CachedObject]]:
        found, self._by_volume = self._by_volume, {}
        self.adopted = True
        return found

    def hold(self, again: Callable[[], None], done: IoDone) -> None:
        self._held.append((again, done))

    def release(self) -> None:
        held, self._held = self._held, []
        for again, _ in held:
            again()

    def stop(self, result: int) -> None:
        held, self._held = self._held, []
        for _, done in held:
            done(result, b"")

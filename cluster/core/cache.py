"""The object cache of a gateway (docs/cache.md): reads that hit it and unflushed writes are local work.

It stands before the gateway machine, with the same interface. A volume comes in when a client asks for it with the
CACHE flag and this gateway may claim it (core.claims). From then on:

 read    from here if all of it is present; else from the cluster, and what came is kept
 write   to the cache's journal, then it is answered. A durable one is answered when it has been pushed as well
 flush   all that is dirty is pushed; then it is as durable as any write
 others  (create, zero, remove, block map) have the object alone: what concerns them is pushed first

The bytes lie in a store of their own, an object's file under the object's id; behind its data it has one block of
marks (which groups of blocks may be dirty). What is present is what the store has hashes for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

from sheepdog.cluster.core.cache_entries import CacheEntries
from sheepdog.cluster.core.cache_reads import CacheReads
from sheepdog.cluster.core.cache_volumes import CacheVolumes
from sheepdog.cluster.core.cached_volume import CachedVolume
from sheepdog.cluster.core.claims import Claims
from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.errors import Result, StoreError
from sheepdog.cluster.core.extents import CachedObject, covered, touched
from sheepdog.cluster.core.gateway import Gateway
from sheepdog.cluster.core.ids import (
    NO_OID,
    NO_VID,
    ObjectId,
    Vid,
    is_data,
    vid_of,
)
from sheepdog.cluster.core.messages import Buffer
from sheepdog.cluster.core.ports import Store

IoDone: TypeAlias = Callable[[int, Buffer], None]
ResultDone: TypeAlias = Callable[[int], None]
Request: TypeAlias = Callable[[IoDone], None]


class Cache:
    """Of one incarnation of a node. `size_bytes` bounds what is kept beside what is dirty."""

    def __init__(self, context: Context, gateway: Gateway, claims: Claims, store: Store, size_bytes: int) -> None:
        self.local_writes = 0
        self.entries = CacheEntries(context, gateway, store, size_bytes)
        self.reads = CacheReads(context, gateway, self.entries)
        self.volumes = CacheVolumes(context, claims, self.entries)
        self._context = context
        self._gateway = gateway

    def _entry(self, oid: ObjectId, again: Callable[[], None], done: IoDone) -> CachedObject | None:
        """The object in the cache, to be used now; None with `done` kept if the request has to wait, and an object of
        a volume that is not served if it goes past the cache."""
        vid = vid_of(oid)
        volume = self.volumes.by_vid.get(vid)
        if volume is None:
            if self.volumes.leftovers.adopted or not is_data(oid):
                return _PAST
            refusal = self._context.state.result()
            if refusal:
                done(refusal, b"")
            else:
                self.volumes.leftovers.hold(again, done)
            return None
        if not is_data(oid):
            return _PAST
        if volume.barred:
            volume.held.append((again, done))
            return None
        entry = volume.objects.get(oid)
        if entry is None:
            entry = volume.objects[oid] = CachedObject(volume, oid, self._context.size_of(oid))
        if entry.barred:
            entry.blocked.append((again, done))
            return None
        return entry

    def read(self, oid: ObjectId, offset: int, length: int, done: IoDone) -> None:
        """As the gateway's."""

        def again() -> None:
            self.read(oid, offset, length, done)

        entry = self._entry(oid, again, done)
        if entry is None:
            return
        if not entry.volume.serving:
            self._gateway.read(oid, offset, length, done)
            return
        refusal = self._context.state.result()
        if refusal:
            done(refusal, b"")
        else:
            self.reads.read(entry, offset, length, again, done)

    def write(self, oid: ObjectId, offset: int, data: Buffer, durable: bool, done: IoDone) -> None:
        """As the gateway's."""

        def again() -> None:
            self.write(oid, offset, data, durable, done)

        entry = self._entry(oid, again, done)
        if entry is None:
            return
        volume = entry.volume
        if not volume.serving or volume.frozen or not entry.known:
            self._past(entry, oid, durable, lambda ended: self._gateway.write(oid, offset, data, durable, ended), done)
            return
        refusal = self._context.state.result()
        want = touched(offset, len(data))
        edges = want & ~covered(offset, len(data)) & ~entry.present
        if refusal:
            done(refusal, b"")
        elif not volume.dirty_claim:
            self.volumes.become_dirty(volume, again, done)
        elif want & entry.writing:
            entry.blocked.append((again, done))
        elif edges:
            self.reads.fetch(
                entry, edges, again, done, lambda error: self._overflow(entry, offset, data, durable, error, done)
            )
        else:
            self._write_here(entry, offset, data, durable, done)

    def _write_here(self, entry: CachedObject, offset: int, data: Buffer, durable: bool, done: IoDone) -> None:
        self.local_writes += 1
        counters = self._context.counters
        counters.writes += 1
        counters.rx += len(data)
        volume, want = entry.volume, touched(offset, len(data))
        pressed = self.entries.space.pressed(self.volumes.dirty_blocks())
        volume.enter()
        self.entries.space.used_now(entry)
        entry.change(want)

        def stored(error: StoreError | None) -> None:
            if volume.over:
                self._written(volume, done, Result.EIO)
            elif error is not None:
                volume.leave()
                self._overflow(entry, offset, data, durable, error, done)
            elif durable or pressed:
                self.entries.pusher.push([entry], partial(self._written, volume, done), want)
            else:
                self._written(volume, done, Result.SUCCESS)

        self.entries.put(entry, offset, data, True, stored)

    def _written(self, volume: CachedVolume, done: IoDone, result: int) -> None:
        volume.leave()
        self._gateway.answer(done, result, b"")

    def _overflow(
        self, entry: CachedObject, offset: int, data: Buffer, durable: bool, error: StoreError, done: IoDone
    ) -> None:
        """The cache's disk did not take a write: it goes to the cluster, after what is dirty in that object."""
        self._context.probe("cache.overflow")
        self._context.log(4, f"object cache: {error}; a write goes to the cluster")
        self._alone(
            entry, True, lambda ended: self._gateway.write(entry.oid, offset, data, durable, ended), durable, done
        )

    def create(self, oid: ObjectId, cow_oid: ObjectId, offset: int, data: Buffer, durable: bool, done: IoDone) -> None:
        """As the gateway's. What this cache has of the object that is copied must be in the cluster first; it is a
        snapshot's, which has been pushed."""
        create = partial(self._create, oid, cow_oid, offset, data, durable, done)
        # Before the volume is in use by this: an operation on it waits until nothing uses it.
        if not self._gateway.moved_first(oid, create, partial(self.write, oid, offset, data, durable, done), done):
            create()

    def _create(self, oid: ObjectId, cow_oid: ObjectId, offset: int, data: Buffer, durable: bool, done: IoDone) -> None:
        entry = self._entry(oid, lambda: self.create(oid, cow_oid, offset, data, durable, done), done)
        if entry is not None:

            def request(ended: IoDone) -> None:
                self._gateway.create_next(oid, cow_oid, offset, data, durable, ended)

            if entry.volume.serving and not entry.volume.frozen:
                self._alone(entry, False, request, durable, done)
            else:
                self._past(entry, oid, durable, request, done)

    def zero(self, oid: ObjectId, offset: int, length: int, durable: bool, done: IoDone) -> None:
        """As the gateway's."""
        entry = self._entry(oid, lambda: self.zero(oid, offset, length, durable, done), done)
        if entry is not None:
            self._alone(
                entry, True, lambda ended: self._gateway.zero(oid, offset, length, durable, ended), durable, done
            )

    def remove(self, oid: ObjectId, done: IoDone) -> None:
        """As the gateway's."""
        entry = self._entry(oid, lambda: self.remove(oid, done), done)
        if entry is not None:
            self._alone(entry, False, lambda ended: self._gateway.remove(oid, ended), True, done)

    def block_map(self, oid: ObjectId, done: IoDone) -> None:
        """As the gateway's."""
        entry = self._entry(oid, lambda: self.block_map(oid, done), done)
        if entry is not None:
            self._alone(entry, True, lambda ended: self._gateway.block_map(oid, ended), True, done, keep=True)

    def read_invalidated(self, oid: ObjectId, offset: int, length: int, done: IoDone, follows: bool = False) -> bool:
        """As the gateway's; volumes with several gateways are not cached."""
        return self._gateway.read_invalidated(oid, offset, length, done, follows)

    def _past(self, entry: CachedObject, oid: ObjectId, durable: bool, request: Request, done: IoDone) -> None:
        """A change that goes past the cache: an object that is not known to exist, or a volume not served yet."""
        volume = self.volumes.by_vid.get(vid_of(oid)) if entry is _PAST else entry.volume
        if volume is not None and not durable:
            volume.changes += 1
        if entry is _PAST:
            request(done)
            return
        entry.through += 1
        entry.change(-1)
        entry.volume.enter()
        self.entries.use(entry)

        def ended(result: int, body: Buffer) -> None:
            entry.through -= 1
            if not result:
                entry.known = True
            self.entries.leave(entry)
            entry.volume.leave()
            done(result, body)

        request(ended)

    def _alone(
        self, entry: CachedObject, push: bool, request: Request, durable: bool, done: IoDone, keep: bool = False
    ) -> None:
        """Nobody else uses the object while the request is under way. Afterwards the cache has nothing of it."""
        if entry is _PAST or not entry.volume.serving:
            self._past(entry, entry.oid, durable, request, done)
            return
        volume = entry.volume
        entry.barred = True
        volume.enter()
        if not durable:
            volume.changes += 1

        alone = _Alone(self.entries, entry, push, request, done, keep)
        if entry.idle:
            alone.idle()
        else:
            entry.when_idle = alone.idle

    def flush(self, vid: Vid, done: IoDone) -> None:
        """As the gateway's. Pushes are durable: only if other changes went past the cache all nodes are asked."""
        volume = self.volumes.by_vid.get(vid)
        if volume is None or not volume.serving:
            self._gateway.flush(vid, done)
            return
        refusal = self._context.state.result()
        if refusal:
            done(refusal, b"")
            return
        self._context.counters.flushes += 1
        changes = volume.changes

        def pushed(result: int) -> None:
            if result or changes <= volume.flushed_changes:
                self._gateway.answer(done, result, b"")
            else:
                self._gateway.flush(vid, partial(_flushed, volume, changes, done))

        self.entries.push_all(volume, pushed)


def _flushed(volume: CachedVolume, changes: int, done: IoDone, result: int, body: Buffer) -> None:
    if not result:
        volume.flushed_changes = max(volume.flushed_changes, changes)
    done(result, body)


class _Alone:
    """A request for which nobody else uses its object."""

    __slots__ = ("_done", "_entries", "_entry", "_keep", "_push", "_request")

    def __init__(
        self, entries: CacheEntries, entry: CachedObject, push: bool, request: Request, done: IoDone, keep: bool
    ) -> None:
        self._entries = entries
        self._entry = entry
        self._push = push
        self._request = request
        self._done = done
        self._keep = keep

    def idle(self) -> None:
        """Nobody uses it any more."""
        if self._push and self._entry.dirty and not self._entry.volume.over:
            self._entries.pusher.push([self._entry], self._pushed)
        else:
            self._request(self._ended)

    def _pushed(self, result: int) -> None:
        if result:
            self._ended(result, b"")
        else:
            self._request(self._ended)

    def _ended(self, result: int, body: Buffer) -> None:
        if result or self._keep or self._entry.volume.over:
            self._answered(result, body, None)
        else:
            self._entry.known = False
            self._entries.forget(self._entry, partial(self._answered, result, body))

    def _answered(self, result: int, body: Buffer, _: StoreError | None) -> None:
        self._entry.barred = False
        self._entry.volume.leave()
        self._done(result, body)
        self._entries.unblock(self._entry)


_PAST = CachedObject(CachedVolume(NO_VID), NO_OID, 0)  # stands for whatever goes past the cache

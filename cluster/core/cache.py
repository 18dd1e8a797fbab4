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
from typing import TypeAlias

from sheepdog.cluster.core.cache_push import Pusher
from sheepdog.cluster.core.cache_space import CACHED, CacheSpace
from sheepdog.cluster.core.cache_start import Leftovers
from sheepdog.cluster.core.cached_volume import CachedVolume
from sheepdog.cluster.core.claims import Claims
from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.errors import Corrupt, Result, StoreError
from sheepdog.cluster.core.extents import CachedObject, Fill, blocks_of, covered, groups_of, runs, span, touched
from sheepdog.cluster.core.gateway import Gateway, OperationKey
from sheepdog.cluster.core.ids import ObjectId, Vid, is_data, vid_of
from sheepdog.cluster.core.limits import (
    BLOCK_SIZE,
    CACHE_PUSH_AGE_NS,
    CACHE_QUIET_NS,
    CACHE_READ_AHEAD_MAX_BYTES,
    CACHE_READ_AHEAD_MIN_BYTES,
    CACHE_TICK_NS,
)
from sheepdog.cluster.core.messages import Buffer
from sheepdog.cluster.core.ports import Store
from sheepdog.cluster.core.script import gather
from sheepdog.cluster.core.vdi import VdiRecord

IoDone: TypeAlias = Callable[[int, Buffer], None]
ResultDone: TypeAlias = Callable[[int], None]
Request: TypeAlias = Callable[[IoDone], None]


class Cache:
    """Of one incarnation of a node. `size_bytes` bounds what is kept beside what is dirty."""

    def __init__(self, context: Context, gateway: Gateway, claims: Claims, store: Store, size_bytes: int) -> None:
        self.hits = self.misses = self.local_writes = 0
        self.age_ns, self.quiet_ns = CACHE_PUSH_AGE_NS, CACHE_QUIET_NS
        self._context = context
        self._gateway = gateway
        self._claims = claims
        self._volumes: dict[Vid, CachedVolume] = {}
        self._quiet: dict[Vid, int] = {}  # other gateways wanted them: not before this time again
        self.space = CacheSpace(store, size_bytes, context.probe)
        self.pusher = Pusher(context, gateway, store, self._moved, self._gone)
        self._store = store
        self._leftovers = Leftovers(store, context.log)
        self._ticking = False
        self._retired = False
        claims.let_go = self.let_go

    # -- which volumes ---------------------------------------------------------------------------------------------

    def wanted(self, oid: ObjectId, writing: bool) -> None:
        """A client asks for this object with the CACHE flag: its volume comes into the cache if it may."""
        vid = vid_of(oid)
        if vid in self._volumes or not is_data(oid) or not self._leftovers.adopted:
            return
        if self.space.removing:  # a crash could bring back what was the truth under an earlier claim
            return
        state = self._context.state
        record = state.vdis.get(vid)
        if record is None or record.deleted or state.result() or self._context.clock.now_ns() < self._quiet.get(vid, 0):
            return
        volume = self._volumes[vid] = CachedVolume(vid)
        if record.is_snapshot:
            volume.serving = volume.frozen = True
            return

        def taken(result: int) -> None:
            if volume.over:
                return
            if result or self._claims.mine(vid) is None:
                self._context.probe("cache.claim_refused")
                self._quiet[vid] = self._context.clock.now_ns() + self.quiet_ns
                self._end(volume)
            else:
                volume.serving, volume.dirty_claim = True, writing
                self._tick_later()
                volume.unbar()

        self._claims.take(vid, writing, taken)

    def begin(self) -> None:
        """The table of VDIs is known: what is left from before this start is taken up, or given up."""
        self._leftovers.when_read(self._adopt)

    def _adopt(self) -> None:
        if self._leftovers.adopted or self._retired:
            return
        vdis = self._context.state.vdis
        for vid, entries in self._leftovers.take().items():
            record, claim = vdis.get(vid), self._claims.mine(vid)
            if claim is None or record is None:
                for entry in entries:
                    self.space.remove(entry.oid, _ignore)
                continue
            volume = self._volumes[vid] = CachedVolume(vid)
            volume.serving, volume.dirty_claim = True, claim.dirty
            for entry in entries:
                entry.volume = volume
                entry.dirty = entry.present & blocks_of(entry.marked)
                volume.dirty_blocks += entry.dirty.bit_count()
                volume.objects[entry.oid] = entry
                self.space.add(entry)
            self._context.log(5, f"object cache: vdi {vid:x} is taken up, {volume.dirty_blocks} blocks are not pushed")
        self._tick_later()
        self._leftovers.release()

    def left_dirty(self, done: Callable[[list[Vid]], None]) -> None:
        """The volumes that this cache may have unpushed data of; for a cold start."""
        self._leftovers.when_read(
            lambda: done(
                sorted({*self._leftovers.dirty_vids(), *(v.vid for v in self._volumes.values() if v.dirty_claim)})
            )
        )

    def changed(self) -> None:
        """Claims or volumes are others: what this node must not serve any more ends."""
        for volume in list(self._volumes.values()):
            record = self._context.state.vdis.get(volume.vid)
            if record is None or record.deleted:
                self._discard(volume)
            elif record.is_snapshot:
                volume.frozen = True
            elif volume.serving and self._claims.mine(volume.vid) is None:
                self._context.log(4, f"object cache: vdi {volume.vid:x} was purged")
                self._discard(volume)

    def forget_all(self) -> None:
        """The cluster was formatted."""
        for volume in list(self._volumes.values()):
            self._discard(volume)

    def stop(self, result: int) -> None:
        """This incarnation is over; the bytes stay."""
        self._retired = True
        self.pusher.stop(result)
        for volume in self._volumes.values():
            volume.end(result)
        self._volumes = {}
        self._leftovers.stop(result)

    def _discard(self, volume: CachedVolume) -> None:
        for entry in volume.objects.values():
            self.space.drop(entry, _ignore)
        self._end(volume)

    def _end(self, volume: CachedVolume) -> None:
        """Requests go past the cache from now on."""
        self._volumes.pop(volume.vid, None)
        volume.over, volume.serving = True, False
        held, volume.held = volume.held, []
        for entry in volume.objects.values():
            held += entry.blocked
            entry.blocked = []
        for again, _ in held:
            again()

    # -- requests ----------------------------------------------------------------------------------------------------

    def _entry(self, oid: ObjectId, again: Callable[[], None], done: IoDone) -> CachedObject | None:
        """The object in the cache, to be used now; None with `done` kept if the request has to wait, and an object of
        a volume that is not served if it goes past the cache."""
        vid = vid_of(oid)
        volume = self._volumes.get(vid)
        if volume is None:
            if self._leftovers.adopted or not is_data(oid):
                return _PAST
            refusal = self._context.state.result()
            if refusal:
                done(refusal, b"")
            else:
                self._leftovers.hold(again, done)
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
        entry = self._entry(oid, lambda: self.read(oid, offset, length, done), done)
        if entry is None:
            return
        if not entry.volume.serving:
            self._gateway.read(oid, offset, length, done)
            return
        refusal = self._context.state.result()
        if refusal:
            done(refusal, b"")
            return
        want = touched(offset, length)
        if want & entry.writing:
            entry.blocked.append((lambda: self.read(oid, offset, length, done), done))
        elif not want & ~entry.present:
            self._hit(entry, offset, length, done)
        elif want & (entry.dirty | entry.pushing):
            self._fetch(entry, want & ~entry.present, lambda: self.read(oid, offset, length, done), done)
        else:
            self._miss(entry, offset, length, done)

    def _hit(self, entry: CachedObject, offset: int, length: int, done: IoDone) -> None:
        self.hits += 1
        counters = self._context.counters
        counters.reads += 1
        counters.tx += length
        self._use(entry)
        self.space.used_now(entry)

        def found(data: Buffer | StoreError) -> None:
            self._leave(entry)
            if not isinstance(data, StoreError):
                self._answer(done, Result.SUCCESS, data)
                return
            want = touched(offset, length)
            bad = want if not isinstance(data, Corrupt) else sum(1 << block for block in data.blocks) & want or want
            if entry.volume.over or bad & (entry.dirty | entry.pushing):
                self._context.log(3, f"object cache, {entry.oid:016x}: unpushed data cannot be read: {data}")
                self._answer(done, Result.EIO, b"")
            else:
                self._context.probe("cache.unreadable_clean")
                self.space.lose(entry, bad)
                self.read(entry.oid, offset, length, done)

        self._store.read(entry.oid, offset, length, found)

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
        if not bits or entry.fills or entry.volume.over or entry.barred:
            return
        first, count = next(runs(bits))
        entry.read_end = (first + count) * BLOCK_SIZE
        fill = self._begin_fill(entry, span(first, count))
        if fill.bits:
            self._gateway.raw_read(
                entry.oid,
                first * BLOCK_SIZE,
                count * BLOCK_SIZE,
                lambda result, data: self._end_fill(entry, fill, first * BLOCK_SIZE, b"" if result else data),
            )
        else:
            self._end_fill(entry, fill, 0, b"")

    def _begin_fill(self, entry: CachedObject, bits: int, needed: bool = False) -> Fill:
        """What comes from the cluster is kept, unless a change may overtake it, or there is no room."""
        if entry.through or not (needed or self.space.has_room(bits.bit_count())):
            bits = 0
        fill = Fill(bits)
        entry.fills.append(fill)
        self._use(entry)
        return fill

    def _end_fill(self, entry: CachedObject, fill: Fill, offset: int, data: Buffer) -> None:
        entry.fills.remove(fill)
        bits = fill.bits & ~entry.present & ~entry.writing if data and not entry.volume.over else 0
        view = memoryview(data)
        for first, count in runs(bits):
            start = first * BLOCK_SIZE - offset
            part = bytes(view[start : start + count * BLOCK_SIZE])
            self._put(entry, first * BLOCK_SIZE, part, False, _nothing_stored)
        self._leave(entry)

    def _fetch(self, entry: CachedObject, bits: int, again: Callable[[], None], done: IoDone) -> None:
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
                self._leave(entry)
                again()
            else:
                self._put(entry, first * BLOCK_SIZE, bytes(data), False, stored)

        def stored(error: StoreError | None) -> None:
            self._leave(entry)
            if error is None or entry.volume.over:
                again()
            else:
                done(error.result, b"")

        self._gateway.raw_read(entry.oid, first * BLOCK_SIZE, count * BLOCK_SIZE, found)

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
            self._become_dirty(volume, again, done)
        elif want & entry.writing:
            entry.blocked.append((again, done))
        elif edges:
            self._fetch(entry, edges, again, done)
        else:
            self._write_here(entry, offset, data, durable, done)

    def _become_dirty(self, volume: CachedVolume, again: Callable[[], None], done: IoDone) -> None:
        """Before the first write that only this node will have, all nodes know that there may be such writes."""
        volume.held.append((again, done))
        if volume.asking:
            return
        volume.asking = True

        def asked(result: int) -> None:
            volume.asking = False
            volume.dirty_claim = not result
            volume.clean_since_ns = self._context.clock.now_ns()
            if not volume.over and not volume.barred:
                volume.unbar()

        self._claims.set_dirty(volume.vid, True, asked)

    def _write_here(self, entry: CachedObject, offset: int, data: Buffer, durable: bool, done: IoDone) -> None:
        self.local_writes += 1
        counters = self._context.counters
        counters.writes += 1
        counters.rx += len(data)
        volume, want = entry.volume, touched(offset, len(data))
        pressed = self.space.pressed(self.dirty_blocks())
        volume.enter()
        self.space.used_now(entry)
        entry.change(want)

        def answered(result: int) -> None:
            volume.leave()
            self._answer(done, result, b"")

        def stored(error: StoreError | None) -> None:
            if volume.over:
                answered(Result.EIO)
            elif error is not None:
                volume.leave()
                self._overflow(entry, offset, data, durable, error, done)
            elif durable or pressed:
                self.pusher.push([entry], answered, want)
            else:
                answered(Result.SUCCESS)

        self._put(entry, offset, data, True, stored)

    def _put(
        self, entry: CachedObject, offset: int, data: Buffer, dirty: bool, then: Callable[[StoreError | None], None]
    ) -> None:
        """Bytes into the cache's store; what they are is true when they are there."""
        want, volume = touched(offset, len(data)), entry.volume
        entry.writing |= want
        self._use(entry)
        self.space.make(entry)
        left, failure = 1, None

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
            self._leave(entry)

        groups = groups_of(want) & ~entry.marked if dirty else 0
        if groups:
            left = 2
            entry.marked |= groups
            self.space.mark(entry, stored)
        self._store.write(entry.oid, offset, data, CACHED, False, stored)

    def _dirtied(self, entry: CachedObject, bits: int) -> None:
        volume = entry.volume
        if not volume.dirty_blocks:
            volume.dirty_since_ns = self._context.clock.now_ns()
        volume.dirty_blocks += (bits & ~entry.dirty).bit_count()
        entry.dirty |= bits
        self._tick_later()

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
        entry = self._entry(oid, lambda: self.create(oid, cow_oid, offset, data, durable, done), done)
        if entry is not None:

            def request(ended: IoDone) -> None:
                self._gateway.create(oid, cow_oid, offset, data, durable, ended)

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

    def read_invalidated(self, oid: ObjectId, offset: int, length: int, done: IoDone) -> bool:
        """As the gateway's; volumes with several gateways are not cached."""
        return self._gateway.read_invalidated(oid, offset, length, done)

    def _past(self, entry: CachedObject, oid: ObjectId, durable: bool, request: Request, done: IoDone) -> None:
        """A change that goes past the cache: an object that is not known to exist, or a volume not served yet."""
        volume = self._volumes.get(vid_of(oid)) if entry is _PAST else entry.volume
        if volume is not None and not durable:
            volume.changes += 1
        if entry is _PAST:
            request(done)
            return
        entry.through += 1
        entry.change(-1)
        entry.volume.enter()
        self._use(entry)

        def ended(result: int, body: Buffer) -> None:
            entry.through -= 1
            if not result:
                entry.known = True
            self._leave(entry)
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

        def idle() -> None:
            if push and entry.dirty and not volume.over:
                self.pusher.push([entry], pushed)
            else:
                request(ended)

        def pushed(result: int) -> None:
            if result:
                ended(result, b"")
            else:
                request(ended)

        def ended(result: int, body: Buffer) -> None:
            if result or keep or volume.over:
                answered(result, body)
            else:
                entry.known = False
                self._forget(entry, lambda _: answered(result, body))

        def answered(result: int, body: Buffer) -> None:
            entry.barred = False
            volume.leave()
            done(result, body)
            self._unblock(entry)

        if entry.idle:
            idle()
        else:
            entry.when_idle = idle

    def flush(self, vid: Vid, done: IoDone) -> None:
        """As the gateway's. Pushes are durable: only if other changes went past the cache all nodes are asked."""
        volume = self._volumes.get(vid)
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
                self._answer(done, result, b"")
            else:
                self._gateway.flush(vid, flushed)

        def flushed(result: int, body: Buffer) -> None:
            if not result:
                volume.flushed_changes = max(volume.flushed_changes, changes)
            done(result, body)

        self._push_all(volume, pushed)

    def push_here(self, vid: Vid, done: ResultDone) -> None:
        """This node's part of a flush that came through any gateway."""
        volume = self._volumes.get(vid)
        if not self._leftovers.adopted and self._claims.mine(vid) is not None:
            self._leftovers.hold(lambda: self.push_here(vid, done), lambda result, _: done(result))
        elif volume is None:
            done(Result.SUCCESS)
        else:
            self._push_all(volume, done)

    # -- other machines --------------------------------------------------------------------------------------------

    def freeze(self, vid: Vid, by: OperationKey, done: ResultDone) -> None:
        """A snapshot or deletion begins: nothing of the volume is dirty, and no write begins until `thaw`."""
        volume = self._volumes.get(vid)
        if not self._leftovers.adopted and self._claims.mine(vid) is not None:
            self._leftovers.hold(lambda: self.freeze(vid, by, done), lambda result, _: done(result))
        elif volume is None or not volume.serving or volume.frozen:
            done(Result.SUCCESS)
        elif volume.freezing:  # another node runs the operation again
            volume.freezing = by
            self._push_all(volume, done)
        elif volume.barred:
            volume.held.append((lambda: self.freeze(vid, by, done), lambda result, _: done(result)))
        else:
            volume.freezing = by
            volume.bar(lambda: self._push_all(volume, done))

    def thaw(self, by: OperationKey) -> None:
        """The operation has ended."""
        for volume in list(self._volumes.values()):
            if volume.freezing == by:
                volume.freezing = None
                volume.unbar()

    def let_go(self, vid: Vid, done: ResultDone) -> None:
        """Another gateway wants the volume: what is dirty is pushed, and the claim given up."""
        volume = self._volumes.get(vid)
        if not self._leftovers.adopted:
            self._leftovers.hold(lambda: self.let_go(vid, done), lambda result, _: done(result))
            return
        if volume is None:
            self._claims.release(vid, done)
            return
        if volume.barred or not volume.serving:  # when the claim is settled
            volume.held.append((lambda: self.let_go(vid, done), lambda result, _: done(result)))
            return
        self._context.probe("cache.let_go")

        def pushed(result: int) -> None:
            if result or volume.over:
                if not volume.over:
                    volume.unbar()
                done(result)
                return
            steps = [self._dropping(entry) for entry in volume.objects.values()]
            gather(steps, len(steps) or 1)(dropped)

        def dropped(_: object) -> None:
            self._quiet[vid] = self._context.clock.now_ns() + self.quiet_ns
            self._claims.release(vid, released)

        def released(result: int) -> None:
            if not volume.over:
                self._end(volume)
            done(result)

        volume.bar(lambda: self._push_all(volume, pushed))

    def _dropping(self, entry: CachedObject) -> Callable[[Callable[..., None]], None]:
        return lambda done: self._when_idle(entry, lambda: self._forget(entry, done))

    def _when_idle(self, entry: CachedObject, call: Callable[[], None]) -> None:
        if entry.idle:
            call()
        else:
            entry.when_idle = call

    def end_orderly(self, done: Callable[[], None]) -> None:
        """The node is about to leave: other gateways shall be able to go on at once."""
        steps = [
            (lambda ended, vid=vid: self.let_go(vid, ended))
            for vid, volume in self._volumes.items()
            if volume.serving and not volume.frozen
        ]
        gather(steps, len(steps) or 1)(lambda _: done())

    def dirty_blocks(self) -> int:
        return sum(volume.dirty_blocks for volume in self._volumes.values())

    def volumes(self) -> list[tuple[VdiRecord, int, int]]:
        """(volume, bytes here, bytes dirty) of each that has any here."""
        found = []
        for vid in sorted(self._volumes):
            record = self._context.state.vdis.get(vid)
            entries = self._volumes[vid].objects.values()
            present = sum(entry.present.bit_count() for entry in entries)
            dirty = sum((entry.dirty | entry.pushing).bit_count() for entry in entries)
            if record is not None:
                found.append((record, present * BLOCK_SIZE, dirty * BLOCK_SIZE))
        return found

    # -- inside ------------------------------------------------------------------------------------------------------

    def _push_all(self, volume: CachedVolume, done: ResultDone) -> None:
        self.pusher.push([entry for entry in volume.objects.values() if entry.dirty or entry.pushing], done)

    def _answer(self, done: IoDone, result: int, data: Buffer) -> None:
        gate = self._gateway.gate
        if gate.guarded:
            gate.answer(done, result, data)
        else:
            done(result, data)

    def _use(self, entry: CachedObject) -> None:
        entry.users += 1

    def _leave(self, entry: CachedObject) -> None:
        entry.users -= 1
        self._moved(entry)

    def _moved(self, entry: CachedObject) -> None:
        """Somebody has done with the object: others may have waited for that."""
        if entry.when_idle is not None and entry.idle:
            call, entry.when_idle = entry.when_idle, None
            call()
        self._unblock(entry)
        self.space.shrink()

    def _unblock(self, entry: CachedObject) -> None:
        if entry.blocked and not entry.barred and not entry.volume.over:
            blocked, entry.blocked = entry.blocked, []
            for again, _ in blocked:
                again()

    def _forget(self, entry: CachedObject, done: Callable[[StoreError | None], None]) -> None:
        entry.volume.dirty_blocks -= entry.dirty.bit_count()
        self.space.drop(entry, done)

    def _gone(self, entry: CachedObject) -> None:
        """The cluster does not have the object any more."""
        entry.known = False
        self._forget(entry, _ignore)

    def _tick_later(self) -> None:
        if not self._ticking and not self._retired:
            self._ticking = True
            self._context.clock.after(CACHE_TICK_NS, self._tick)

    def _tick(self) -> None:
        """Old dirty data is pushed; a volume without any is not bound to this node's survival."""
        self._ticking = False
        if self._retired:
            return
        now_ns, again = self._context.clock.now_ns(), False
        for volume in self._volumes.values():
            if volume.over or volume.frozen or not volume.serving:
                continue
            busy = volume.dirty_blocks or volume.asking or volume.users
            if busy or any(entry.pushing or entry.writing for entry in volume.objects.values()):
                volume.clean_since_ns = now_ns
                if volume.dirty_blocks and now_ns - volume.dirty_since_ns >= self.age_ns:
                    volume.dirty_since_ns = now_ns
                    self._push_all(volume, _nothing)
            elif volume.dirty_claim and now_ns - volume.clean_since_ns >= self.age_ns:
                volume.dirty_claim = False
                self._claims.set_dirty(volume.vid, False, _nothing)
            again = again or volume.dirty_claim
        if again:
            self._tick_later()


def _ignore(error: StoreError | None) -> None:
    """A failure means that the store is out of service; every later use of it says so."""


_nothing_stored = _ignore


def _nothing(_: int) -> None:
    """What failed stays as it is, and is tried again."""


_PAST = CachedObject(CachedVolume(Vid(0)), ObjectId(0), 0)  # stands for whatever goes past the cache

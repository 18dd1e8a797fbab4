"""Which volumes the cache has, and as whose: claimed, taken up after a restart, frozen, let go, given up."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

from sheepdog.cluster.core.cache_entries import CacheEntries
from sheepdog.cluster.core.cache_start import Leftovers
from sheepdog.cluster.core.cached_volume import CachedVolume
from sheepdog.cluster.core.claims import Claims
from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.errors import Result, StoreError
from sheepdog.cluster.core.extents import CachedObject, IoDone, blocks_of
from sheepdog.cluster.core.gateway import OperationKey
from sheepdog.cluster.core.ids import ObjectId, Vid, is_data, vid_of
from sheepdog.cluster.core.limits import BLOCK_SIZE, CACHE_PUSH_AGE_NS, CACHE_QUIET_NS, CACHE_TICK_NS
from sheepdog.cluster.core.script import gather
from sheepdog.cluster.core.vdi import VdiRecord

ResultDone: TypeAlias = Callable[[int], None]


class CacheVolumes:
    """Of one cache."""

    def __init__(self, context: Context, claims: Claims, entries: CacheEntries) -> None:
        self.age_ns, self.quiet_ns = CACHE_PUSH_AGE_NS, CACHE_QUIET_NS
        self.leftovers = Leftovers(entries.store, context.log)
        self.by_vid: dict[Vid, CachedVolume] = {}
        self._context = context
        self._claims = claims
        self._entries = entries
        self._quiet: dict[Vid, int] = {}  # other gateways wanted them: not before this time again
        self._ticking = False
        self._retired = False
        claims.let_go = self.let_go
        entries.on_dirty = self._tick_later

    def wanted(self, oid: ObjectId, writing: bool) -> None:
        """A client asks for this object with the CACHE flag: its volume comes into the cache if it may."""
        vid = vid_of(oid)
        if vid in self.by_vid or not is_data(oid) or not self.leftovers.adopted:
            return
        if self._entries.space.removing:  # a crash could bring back what was the truth under an earlier claim
            return
        state = self._context.state
        record = state.vdis.get(vid)
        if record is None or record.deleted or state.result() or self._context.clock.now_ns() < self._quiet.get(vid, 0):
            return
        volume = self.by_vid[vid] = CachedVolume(vid)
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
        self.leftovers.when_read(self._adopt)

    def _adopt(self) -> None:
        if self.leftovers.adopted or self._retired:
            return
        vdis = self._context.state.vdis
        for vid, entries in self.leftovers.take().items():
            record, claim = vdis.get(vid), self._claims.mine(vid)
            if claim is None or record is None:
                for entry in entries:
                    self._entries.space.remove(entry.oid, _ignore)
                continue
            volume = self.by_vid[vid] = CachedVolume(vid)
            volume.serving, volume.dirty_claim = True, claim.dirty
            for entry in entries:
                entry.volume = volume
                entry.dirty = entry.present & blocks_of(entry.marked)
                volume.dirty_blocks += entry.dirty.bit_count()
                volume.objects[entry.oid] = entry
                self._entries.space.add(entry)
            self._context.log(5, f"object cache: vdi {vid:x} is taken up, {volume.dirty_blocks} blocks are not pushed")
        self._tick_later()
        self.leftovers.release()

    def left_dirty(self, done: Callable[[list[Vid]], None]) -> None:
        """The volumes that this cache may have unpushed data of; for a cold start."""
        self.leftovers.when_read(
            lambda: done(
                sorted({*self.leftovers.dirty_vids(), *(v.vid for v in self.by_vid.values() if v.dirty_claim)})
            )
        )

    def changed(self) -> None:
        """Claims or volumes are others: what this node must not serve any more ends."""
        for volume in list(self.by_vid.values()):
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
        for volume in list(self.by_vid.values()):
            self._discard(volume)

    def stop(self, result: int) -> None:
        """This incarnation is over; the bytes stay."""
        self._retired = True
        self._entries.pusher.stop(result)
        for volume in self.by_vid.values():
            volume.end(result)
        self.by_vid = {}
        self.leftovers.stop(result)

    def _discard(self, volume: CachedVolume) -> None:
        for entry in volume.objects.values():
            self._entries.space.drop(entry, _ignore)
        self._end(volume)

    def _end(self, volume: CachedVolume) -> None:
        """Requests go past the cache from now on."""
        self.by_vid.pop(volume.vid, None)
        volume.over, volume.serving = True, False
        held, volume.held = volume.held, []
        for entry in volume.objects.values():
            held += entry.blocked
            entry.blocked = []
        for again, _ in held:
            again()

    def become_dirty(self, volume: CachedVolume, again: Callable[[], None], done: IoDone) -> None:
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

    # -- what other machines want ----------------------------------------------------------------------------------

    def push_here(self, vid: Vid, done: ResultDone) -> None:
        """This node's part of a flush that came through any gateway."""
        volume = self.by_vid.get(vid)
        if not self.leftovers.adopted and self._claims.mine(vid) is not None:
            self.leftovers.hold(lambda: self.push_here(vid, done), lambda result, _: done(result))
        elif volume is None:
            done(Result.SUCCESS)
        else:
            self._entries.push_all(volume, done)

    def freeze(self, vid: Vid, by: OperationKey, done: ResultDone) -> None:
        """A snapshot or deletion begins: nothing of the volume is dirty, and no write begins until `thaw`."""
        volume = self.by_vid.get(vid)
        if not self.leftovers.adopted and self._claims.mine(vid) is not None:
            self.leftovers.hold(lambda: self.freeze(vid, by, done), lambda result, _: done(result))
        elif volume is None or not volume.serving or volume.frozen:
            done(Result.SUCCESS)
        elif volume.freezing:  # another node runs the operation again
            volume.freezing = by
            self._entries.push_all(volume, done)
        elif volume.barred:
            volume.held.append((lambda: self.freeze(vid, by, done), lambda result, _: done(result)))
        else:
            volume.freezing = by
            volume.bar(lambda: self._entries.push_all(volume, done))

    def thaw(self, by: OperationKey) -> None:
        """The operation has ended."""
        for volume in list(self.by_vid.values()):
            if volume.freezing == by:
                volume.freezing = None
                volume.unbar()

    def let_go(self, vid: Vid, done: ResultDone) -> None:
        """Another gateway wants the volume: what is dirty is pushed, and the claim given up."""
        volume = self.by_vid.get(vid)
        if not self.leftovers.adopted:
            self.leftovers.hold(lambda: self.let_go(vid, done), lambda result, _: done(result))
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

        volume.bar(lambda: self._entries.push_all(volume, pushed))

    def _dropping(self, entry: CachedObject) -> Callable[[Callable[..., None]], None]:
        return lambda done: self._entries.when_idle(entry, lambda: self._entries.forget(entry, done))

    def end_orderly(self, done: Callable[[], None]) -> None:
        """The node is about to leave: other gateways shall be able to go on at once."""
        steps = [
            partial(self.let_go, vid) for vid, volume in self.by_vid.items() if volume.serving and not volume.frozen
        ]
        gather(steps, len(steps) or 1)(lambda _: done())

    def dirty_blocks(self) -> int:
        return sum(volume.dirty_blocks for volume in self.by_vid.values())

    def held(self) -> list[tuple[VdiRecord, int, int]]:
        """(volume, bytes here, bytes dirty) of each that has any here."""
        found = []
        for vid in sorted(self.by_vid):
            record = self._context.state.vdis.get(vid)
            entries = self.by_vid[vid].objects.values()
            present = sum(entry.present.bit_count() for entry in entries)
            dirty = sum((entry.dirty | entry.pushing).bit_count() for entry in entries)
            if record is not None:
                found.append((record, present * BLOCK_SIZE, dirty * BLOCK_SIZE))
        return found

    # -- time ------------------------------------------------------------------------------------------------------

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
        for volume in self.by_vid.values():
            if volume.over or volume.frozen or not volume.serving:
                continue
            busy = volume.dirty_blocks or volume.asking or volume.users
            if busy or any(entry.pushing or entry.writing for entry in volume.objects.values()):
                volume.clean_since_ns = now_ns
                if volume.dirty_blocks and now_ns - volume.dirty_since_ns >= self.age_ns:
                    volume.dirty_since_ns = now_ns
                    self._entries.push_all(volume, _nothing)
            elif volume.dirty_claim and now_ns - volume.clean_since_ns >= self.age_ns:
                volume.dirty_claim = False
                self._claims.set_dirty(volume.vid, False, _nothing)
            again = again or volume.dirty_claim
        if again:
            self._tick_later()


def _ignore(error: StoreError | None) -> None:
    """A failure means that the store is out of service; every later use of it says so."""


def _nothing(_: int) -> None:
    """What failed stays as it is, and is tried again."""

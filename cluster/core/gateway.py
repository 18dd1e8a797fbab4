"""The gateway machine: whether a client's request may go on, waits, or is refused; core.router takes it to its object.

A flush goes to every member: the client may have written through another gateway before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, TypeAlias

from sheepdog.cluster.core.claims import Claims
from sheepdog.cluster.core.coherence import Coherence
from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.copying import copy_large
from sheepdog.cluster.core.errors import Result, StoreError
from sheepdog.cluster.core.everyone import Everyone
from sheepdog.cluster.core.gate import Gate
from sheepdog.cluster.core.ids import ObjectId, Vid, index_of, inode_oid, is_data, is_inode, is_vmstate, vid_of
from sheepdog.cluster.core.inode import HEADER_SIZE, MAP_END
from sheepdog.cluster.core.limits import COPY_CHUNK_BYTES
from sheepdog.cluster.core.messages import Flag, Kind
from sheepdog.cluster.core.moves import is_moving
from sheepdog.cluster.core.ports import Buffer
from sheepdog.cluster.core.repair_order import repair
from sheepdog.cluster.core.replica import Replica
from sheepdog.cluster.core.router import Router
from sheepdog.cluster.core.state import ClusterFlag, ClusterState

IoDone: TypeAlias = Callable[[int, Buffer], None]
ClientWrite: TypeAlias = Callable[[ObjectId, int, Buffer, bool, IoDone], None]
FLUSH_CACHES: Final = b"caches"  # body of a client's FLUSH: caches push first. A home that asks waits for a push itself
_SUCCESS: Final = Result.SUCCESS  # looked up once, not for each write
OperationKey: TypeAlias = tuple[str, int]
"""Who ordered an operation, and its number there."""


class Gateway:
    """Of one node."""

    def __init__(self, context: Context, replica: Replica, everyone: Everyone) -> None:
        self.context = context
        self.gate = Gate(context.clock, context.renew)
        self.router = Router(context, replica, self.gate)
        self._replica = replica
        self._everyone = everyone
        self.inode_write: ClientWrite | None = None  # set by the node: core.inode_writes
        self.inode_create: ClientWrite | None = None
        self.move_object: Callable[[Vid, int, Callable[[Result, Vid], None]], None] | None = None  # core.operations
        self.coherence: Coherence | None = None  # set by the node
        self.claims: Claims | None = None  # set by the node
        self.push: Callable[[Vid, Callable[[int], None]], None] | None = None  # the cache's part of a flush
        self._held: list[Callable[[], None]] = []  # while suspended, or until the VDI table is there
        self._frozen: dict[Vid, list[Callable[[], None]]] = {}  # writes held while a snapshot is taken
        self._freezers: dict[Vid, OperationKey] = {}  # the operations that froze them

    # -- what clients ask --------------------------------------------------------------------------------------

    def read(self, oid: ObjectId, offset: int, length: int, done: IoDone) -> None:
        """`length` bytes from `offset`: all of them, or an error."""
        counters = self.context.counters
        counters.reads += 1
        counters.tx += length
        state = self.context.state
        refusal = state.result()
        if refusal:
            done(refusal, b"")
        elif self.gate.suspended:
            self._held.append(lambda: self.read(oid, offset, length, done))
        elif state.vdis.claims and self._cached_elsewhere(
            oid, False, lambda: self.read(oid, offset, length, done), done
        ):
            return
        else:
            self.router.read(oid, offset, length, done)

    def _cached_elsewhere(self, oid: ObjectId, changes: bool, again: Callable[[], None], done: IoDone) -> bool:
        return self.claims is not None and self.claims.held(oid, changes, again, done)

    def write(self, oid: ObjectId, offset: int, data: Buffer, durable: bool, done: IoDone) -> None:
        """Overwrites a range of an existing object. Inodes have side effects (core.inode_writes)."""
        counters = self.context.counters
        counters.writes += 1
        counters.rx += len(data)
        if self.may_change(oid, done, lambda: self.write(oid, offset, data, durable, done)):
            if is_inode(oid) and self.inode_write is not None:
                self.inode_write(oid, offset, data, durable, done)
            else:
                self.router.change(oid, Flag.DURABLE if durable else 0, offset, 0, data, 0, done)

    def create(self, oid: ObjectId, cow_oid: ObjectId, offset: int, data: Buffer, durable: bool, done: IoDone) -> None:
        """A new object of its nominal size: zeros, or a copy of `cow_oid`, with the data laid over it."""
        create = partial(self.create_next, oid, cow_oid, offset, data, durable, done)
        if not self.moved_first(oid, create, partial(self.write, oid, offset, data, durable, done), done):
            create()

    def moved_first(self, oid: ObjectId, create: Callable[[], None], write: Callable[[], None], done: IoDone) -> bool:
        """Before a client makes a large object of a volume whose redundancy changes (core.moves). False for all others.

        The volume gets it as it was before, and a `write` follows; if its map names none, a `create`.
        """
        vid, order = vid_of(oid), self.move_object
        large = is_data(oid) and self.context.size_of(oid) > COPY_CHUNK_BYTES
        if order is None or not large or not is_moving(self.context.state.vdis, vid):
            return False

        def moved(result: Result, owner: Vid) -> None:
            if result:
                done(result, b"")
            elif owner == vid:
                write()
            else:
                create()

        self.context.probe("gateway.moved_first")
        order(vid, index_of(oid), moved)
        return True

    def create_next(
        self, oid: ObjectId, cow_oid: ObjectId, offset: int, data: Buffer, durable: bool, done: IoDone
    ) -> None:
        """`create`, of an object that nothing else makes."""
        if not self.may_change(oid, done, lambda: self.create(oid, cow_oid, offset, data, durable, done)):
            return
        counters = self.context.counters
        counters.writes += 1
        counters.rx += len(data)
        if is_inode(oid) and self.inode_create is not None:
            self.inode_create(oid, offset, data, durable, done)
            return
        size = self.context.size_of(oid)
        flags = Flag.CREATE | (Flag.DURABLE if durable else 0)
        if not cow_oid or len(data) >= size:
            if self.is_among_others(oid):
                self._create_among_others(oid, b"", offset, data, durable, done)
            else:
                self.router.change(oid, flags, offset, size, data, 0, done)
            return
        if size > COPY_CHUNK_BYTES:
            copy_large(self, oid, cow_oid, size, offset, data, flags, done)
            return

        self.router.read(cow_oid, 0, size, partial(self._copied, oid, cow_oid, offset, data, durable, done))

    def _copied(
        self,
        oid: ObjectId,
        cow_oid: ObjectId,
        offset: int,
        data: Buffer,
        durable: bool,
        done: IoDone,
        result: int,
        source: Buffer,
    ) -> None:
        """The source of a new object is here. Nested in `create` this would be a cycle that holds the object."""
        if result:
            done(result, b"")
            return
        if self.is_among_others(oid):
            self._create_among_others(oid, source, offset, data, durable, done)
            return
        whole = bytearray(source)
        whole[offset : offset + len(data)] = data
        # The source was read outside any drain: look again whether the volume may be written.
        if self.may_change(oid, done, lambda: self.create(oid, cow_oid, offset, data, durable, done)):
            flags = Flag.CREATE | (Flag.DURABLE if durable else 0)
            self.router.change(oid, flags, 0, len(whole), whole, 0, done)

    def is_among_others(self, oid: ObjectId) -> bool:
        return self.coherence is not None and self.coherence.is_shared(vid_of(oid))

    def _create_among_others(
        self, oid: ObjectId, content: Buffer, offset: int, data: Buffer, durable: bool, done: IoDone
    ) -> None:
        """A client behind another gateway may make the object, too: who comes second only writes his range.

        A snapshot that waits for the object waits for that, too; else nobody would name it.
        """
        flags = Flag.DURABLE if durable else 0
        write = partial(self.router.change, oid, flags, offset, 0, data, 0, done)

        def made(result: int, _: Buffer) -> None:
            if result:
                done(result, b"")
            elif not self.router.goes_on(vid_of(oid), write):
                self.write(oid, offset, data, durable, done)

        if self.may_change(oid, done, lambda: self._create_among_others(oid, content, offset, data, durable, done)):
            size = self.context.size_of(oid)
            self.router.change(oid, flags | Flag.CREATE | Flag.ONLY_NEW, 0, size, content, 0, made)

    def zero(self, oid: ObjectId, offset: int, length: int, durable: bool, done: IoDone) -> None:
        """Makes a range of an existing object read as zeros; whole blocks of it become holes."""
        if self.may_change(oid, done, lambda: self.zero(oid, offset, length, durable, done)):
            self.context.counters.writes += 1
            self.router.change(oid, Flag.PUNCH | (Flag.DURABLE if durable else 0), offset, length, b"", 0, done)

    def block_map(self, oid: ObjectId, done: IoDone) -> None:
        """Which blocks of an object hold data (core.blocks)."""
        refusal = self.context.state.result()
        if refusal:
            done(refusal, b"")
        elif self.gate.suspended:
            self._held.append(lambda: self.block_map(oid, done))
        elif self._cached_elsewhere(oid, False, lambda: self.block_map(oid, done), done):
            return
        else:
            self.router.read(oid, 0, self.context.size_of(oid), done, Flag.MAP)

    def remove(self, oid: ObjectId, done: IoDone) -> None:
        """Drops one object; an object that is not there is success."""
        if self.may_change(oid, done, lambda: self.remove(oid, done)):
            self.context.counters.removes += 1
            self.router.change(oid, Flag.REMOVE, 0, 0, b"", 0, done)

    def read_invalidated(self, oid: ObjectId, offset: int, length: int, done: IoDone, follows: bool = False) -> bool:
        """Before a request of a client that understands INODE_INVALIDATED: True if it was answered here.

        `length` is 0 for a change, `follows` as for core.coherence. Another gateway has changed the volume's map, and
        the client has not read the whole inode since.
        """
        coherence, vid = self.coherence, vid_of(oid)
        if coherence is None or not coherence.is_invalidated(vid, follows):
            return False
        if not is_inode(oid) or offset or length not in (HEADER_SIZE, MAP_END):
            done(Result.INODE_INVALIDATED, b"")
        elif length == HEADER_SIZE:
            # After READONLY tgt reads the header of the volume that goes on; else it asks for ever.
            return False
        else:
            coherence.refresh(
                vid,
                lambda result, current: done(result, b"") if result else self.read(inode_oid(current), 0, length, done),
            )
        return True

    def flush(self, vid: Vid, done: IoDone) -> None:
        """Everything acknowledged so far for this volume (and what it was branched off) becomes durable."""
        self.context.counters.flushes += 1
        refusal = self.context.state.result()
        if not refusal and self.claims is not None and self.claims.unreachable(vid):
            refusal = Result.VDI_LOCKED  # what is to be made durable cannot be had
        if refusal:
            done(refusal, b"")
            return
        self._everyone.ask(
            Kind.FLUSH,
            inode_oid(vid),
            FLUSH_CACHES,
            lambda answered: self.flush_here(vid, answered),
            lambda result, _: self.gate.answer(done, result, b""),
        )

    def flush_here(self, vid: Vid, answered: IoDone) -> None:
        """This node's part of a flush: what its cache has, then what its copies have."""
        if self.claims is not None and self.claims.lost(vid):
            answered(Result.VDI_LOCKED, b"")
        elif self.push is None:
            self.flush_store(vid, answered)
        else:
            self.push(vid, lambda result: answered(result, b"") if result else self.flush_store(vid, answered))

    def flush_store(self, vid: Vid, answered: IoDone) -> None:
        vids = frozenset([vid, *self.context.state.vdis.ancestors(vid)])

        def flushed(error: StoreError | None) -> None:
            answered(Result.SUCCESS if error is None else error.result, b"")

        self.context.store.flush(vids, flushed)

    def repair(self, oid: ObjectId, done: IoDone) -> None:
        """Makes this node's copy anew from the others'; NO_OBJ if none belongs here. Done when it is current."""
        repair(self.context, self.router.home, self._replica, oid, done)

    def may_change(self, oid: ObjectId, done: IoDone, retry: Callable[[], None]) -> bool:
        """False if the request was answered or is held."""
        state = self.context.state
        refusal = state.result()
        if not refusal and (self.gate.suspended or not state.loaded):
            self._held.append(retry)  # after a cold start the VDI table comes a moment later
            return False
        refusal = refusal or self._refusal(state, oid)
        if refusal:
            done(refusal, b"")
            return False
        if self._frozen and vid_of(oid) in self._frozen:
            self._frozen[vid_of(oid)].append(retry)
            return False
        return not (state.vdis.claims and self._cached_elsewhere(oid, True, retry, done))

    def _refusal(self, state: ClusterState, oid: ObjectId) -> Result:
        if is_data(oid) or is_vmstate(oid):
            record = state.vdis.get(vid_of(oid))
            if record is not None and record.snap_ctime and is_data(oid):
                return Result.READONLY  # also when that snapshot is deleted already: the client goes on with its heir
            if record is None and state.partial:
                return Result.EIO
            if record is None or record.deleted:
                return Result.NO_VDI
        placement = self.context.placement
        if state.flags & ClusterFlag.STRICT and placement.ring.zones < self.context.copies_of(oid):
            return Result.HALT
        return _SUCCESS

    # -- raw requests: no checks, for the node's own machines too --------------------------------------------------

    def answer(self, done: IoDone, result: int, data: Buffer) -> None:
        """Answers a client: at once, or when the membership engine has confirmed that this node may."""
        if self.gate.guarded:
            self.gate.answer(done, result, data)
        else:
            done(result, data)

    def raw_read(self, oid: ObjectId, offset: int, length: int, done: IoDone) -> None:
        self.router.read(oid, offset, length, done)

    def change(
        self, oid: ObjectId, flags: int, offset: int, length: int, data: Buffer, copies: int, done: IoDone
    ) -> None:
        """A change as SUBMIT describes it; `copies` 0: as the VDI table says."""
        self.router.change(oid, flags, offset, length, data, copies, done)

    # -- changes of the cluster ------------------------------------------------------------------------------------

    def stop(self, result: int) -> None:
        """This node is no member any more: everything under way ends."""
        self.gate.fail(result)
        self.start_over(result)

    def start_over(self, result: int) -> None:
        """The cluster was formatted: everything under way ends. Answers need leases as before."""
        self.router.end(result)

    def suspend(self, suspended: bool) -> None:
        """The node is in doubt about its membership: nothing is begun until it is sure again."""
        self.gate.suspend(suspended)
        if not suspended:
            self._go_on()

    def _go_on(self) -> None:
        held, self._held = self._held, []
        for call in held:
            call()

    def freeze(self, vid: Vid, by: OperationKey, drained: Callable[[], None]) -> None:
        """Holds new writes of a volume; `drained` when none is under way. Ends with `thaw` by the same operation."""
        self._frozen.setdefault(vid, [])
        self._freezers[vid] = by
        self.router.drain(vid, drained)

    def drain(self, vid: Vid, drained: Callable[[], None]) -> None:
        """`drained` when no change that was let in before this call is under way, nor waits for a freeze to end."""
        if self.gate.suspended:
            self._held.append(lambda: self.drain(vid, drained))
        elif vid in self._frozen:
            self.when_thawed(vid, lambda: self.drain(vid, drained))
        else:
            self.router.drain(vid, drained)

    def is_frozen(self, vid: Vid) -> bool:
        return vid in self._frozen

    def when_thawed(self, vid: Vid, call: Callable[[], None]) -> None:
        """`call` comes when the freeze of the volume ends."""
        self._frozen[vid].append(call)

    def thaw(self, by: OperationKey | None = None) -> None:
        """An ordered operation has ended (None: all have): writes that it held go on, and meet the new state.

        The end of an operation may come here after the freeze of the next one, since they come by different ways.
        """
        if not self.gate.suspended:
            self._go_on()
        ended = [vid for vid, freezer in self._freezers.items() if by is None or freezer == by]
        frozen = {vid: self._frozen.pop(vid) for vid in ended}
        for vid in ended:
            del self._freezers[vid]
        for calls in frozen.values():
            for call in calls:
                call()

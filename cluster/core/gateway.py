"""The gateway machine: takes a client's request to where it belongs, and again after every change of epoch.

 read    this node's copy if it may be read here, else the home's
 change  to the home, which numbers it and sees that all replicas have it
 flush   to every member: the client may have written through another gateway before

Each request is answered exactly once. What is under way when the epoch changes is sent again in its old order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from sheepdog.cluster.core.claims import Claims
from sheepdog.cluster.core.coherence import Coherence
from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.copying import copy_large
from sheepdog.cluster.core.erasure import Policy
from sheepdog.cluster.core.errors import Corrupt, DiskError, Result, StoreError
from sheepdog.cluster.core.everyone import Everyone
from sheepdog.cluster.core.gate import Gate
from sheepdog.cluster.core.home import Home
from sheepdog.cluster.core.home_writes import Submission
from sheepdog.cluster.core.ids import ObjectId, Vid, inode_oid, is_data, is_inode, is_vmstate, vid_of
from sheepdog.cluster.core.inode import HEADER_SIZE, MAP_END
from sheepdog.cluster.core.limits import COPY_CHUNK_BYTES, RETRY_DELAY_NS
from sheepdog.cluster.core.messages import Flag, Kind, Message
from sheepdog.cluster.core.moves import Moves
from sheepdog.cluster.core.ports import Buffer
from sheepdog.cluster.core.repair_order import repair
from sheepdog.cluster.core.replica import Replica
from sheepdog.cluster.core.state import ClusterFlag, ClusterState
from sheepdog.cluster.core.strip_reads import StripReads
from sheepdog.cluster.core.striping import cut

IoDone: TypeAlias = Callable[[int, Buffer], None]
ClientWrite: TypeAlias = Callable[[ObjectId, int, Buffer, bool, IoDone], None]
FLUSH_CACHES = b"caches"  # body of a client's FLUSH: caches push first. A home that asks waits for a push itself
_AGAIN = (Result.AGAIN, Result.STALE_OBJ, Result.OLD_NODE_VER, Result.NEW_NODE_VER)


class _Request:
    """One request on its way."""

    __slots__ = ("copies", "data", "done", "flags", "gateway", "length", "number", "offset", "oid", "reading")

    def __init__(
        self,
        gateway: Gateway,
        number: int,
        reading: bool,
        oid: ObjectId,
        flags: int,
        offset: int,
        length: int,
        data: Buffer,
        copies: int,
        done: IoDone,
    ) -> None:
        self.gateway = gateway
        self.number = number
        self.reading = reading
        self.oid = oid
        self.flags = flags
        self.offset = offset
        self.length = length
        self.data = data
        self.copies = copies
        self.done = done

    def finish(self, result: int, data: Buffer) -> None:
        """The answer; a second one (from an earlier epoch) is ignored."""
        pending = self.gateway.pending
        if self.number not in pending:
            return
        if result in _AGAIN:
            self.gateway.later(self)  # it keeps its place in the order
            return
        del pending[self.number]
        if result == Result.NO_OBJ and self.reading:
            self.done = self.gateway.moves.followed(self.oid, self.offset, self.length, self.done)
        gate = self.gateway.gate
        if gate.guarded:
            gate.answer(self.done, result, data)
        else:
            self.done(result, data)
        if self.gateway.drains:
            self.gateway.request_ended()

    def answered(self, message: Message) -> None:
        body = message.body
        assert isinstance(body, (bytes, bytearray, memoryview))
        self.finish(message.result, body)


OperationKey: TypeAlias = tuple[str, int]
"""Who ordered an operation, and its number there."""


class Gateway:
    """See the module. `home` is this node's home machine of the current epoch (None outside a running cluster)."""

    def __init__(self, context: Context, replica: Replica, everyone: Everyone) -> None:
        self.context = context
        self._replica = replica
        self._everyone = everyone
        self.home: Home | None = None
        self.moves = Moves(context, self)
        self.strip_reads = StripReads(context, replica, lambda: self.home)
        self.inode_write: ClientWrite | None = None  # set by the node: core.inode_writes
        self.inode_create: ClientWrite | None = None
        self.coherence: Coherence | None = None  # set by the node
        self.claims: Claims | None = None  # set by the node
        self.push: Callable[[Vid, Callable[[int], None]], None] | None = None  # the cache's part of a flush
        self.pending: dict[int, _Request] = {}  # by number, in the order they came
        self.drains: list[tuple[Vid, dict[int, None], Callable[[], None]]] = []
        context.active_requests = lambda: len(self.pending)
        self._next_number = 0
        self.gate = Gate(context.clock, context.renew)
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
            self.raw_read(oid, offset, length, done)

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
                self.change(oid, Flag.DURABLE if durable else 0, offset, 0, data, 0, done)

    def create(self, oid: ObjectId, cow_oid: ObjectId, offset: int, data: Buffer, durable: bool, done: IoDone) -> None:
        """A new object of its nominal size: zeros, or a copy of `cow_oid`, with the data laid over it."""
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
            self.change(oid, flags, offset, size, data, 0, done)
            return
        if size > COPY_CHUNK_BYTES:
            copy_large(self, oid, cow_oid, size, offset, data, flags, done)
            return

        def copied(result: int, source: Buffer) -> None:
            if result:
                done(result, b"")
                return
            whole = bytearray(source)
            whole[offset : offset + len(data)] = data
            # The source was read outside any drain: look again whether the volume may be written.
            if self.may_change(oid, done, lambda: self.create(oid, cow_oid, offset, data, durable, done)):
                self.change(oid, flags, 0, size, whole, 0, done)

        self.raw_read(cow_oid, 0, size, copied)

    def zero(self, oid: ObjectId, offset: int, length: int, durable: bool, done: IoDone) -> None:
        """Makes a range of an existing object read as zeros; whole blocks of it become holes."""
        if self.may_change(oid, done, lambda: self.zero(oid, offset, length, durable, done)):
            self.context.counters.writes += 1
            self.change(oid, Flag.PUNCH | (Flag.DURABLE if durable else 0), offset, length, b"", 0, done)

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
            self._next_number = number = self._next_number + 1
            request = _Request(self, number, True, oid, Flag.MAP, 0, self.context.size_of(oid), b"", 0, done)
            self.pending[number] = request
            self._route(request)

    def remove(self, oid: ObjectId, done: IoDone) -> None:
        """Drops one object; an object that is not there is success."""
        if self.may_change(oid, done, lambda: self.remove(oid, done)):
            self.context.counters.removes += 1
            self.change(oid, Flag.REMOVE, 0, 0, b"", 0, done)

    def read_invalidated(self, oid: ObjectId, offset: int, length: int, done: IoDone) -> bool:
        """Before a request of a client that understands INODE_INVALIDATED: True if it was answered here.

        `length` is 0 for a change. Another gateway has changed the volume's map, and the client has not read the whole
        inode since.
        """
        coherence, vid = self.coherence, vid_of(oid)
        if coherence is None or not coherence.is_invalidated(vid):
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
        repair(self, self._replica, oid, done)

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
            if record is None or record.deleted:
                return Result.NO_VDI
        placement = self.context.placement
        if state.flags & ClusterFlag.STRICT and placement.ring.zones < self.context.copies_of(oid):
            return Result.HALT
        return Result.SUCCESS

    # -- raw requests: no checks, for the node's own machines too --------------------------------------------------

    def raw_read(self, oid: ObjectId, offset: int, length: int, done: IoDone) -> None:
        self._next_number = number = self._next_number + 1
        request = _Request(self, number, True, oid, 0, offset, length, b"", 0, done)
        self.pending[number] = request
        self._route(request)

    def change(
        self, oid: ObjectId, flags: int, offset: int, length: int, data: Buffer, copies: int, done: IoDone
    ) -> None:
        """A change as SUBMIT describes it; `copies` 0: as the VDI table says."""
        policy = self.context.policy_of(oid)
        if policy is not None and not flags & (Flag.CREATE | Flag.REMOVE):
            self._change_coded(policy, oid, flags, offset, bytes(length) if flags & Flag.PUNCH else data, done)
        else:
            self._change(oid, flags, offset, length, data, copies, done)

    def _change_coded(self, policy: Policy, oid: ObjectId, flags: int, offset: int, data: Buffer, done: IoDone) -> None:
        """A write in parts that can be coded at once, each a request of its own; the last answer ends it."""
        flags &= ~Flag.PUNCH
        parts = cut(policy, offset, len(data))
        if len(parts) == 1:
            self._change(oid, flags, offset, 0, data, 0, done)
            return
        view, left, result = memoryview(data), len(parts), 0

        def ended(one: int, _: Buffer) -> None:
            nonlocal left, result
            left, result = left - 1, result or one
            if not left:
                done(result, b"")

        for start, length in parts:
            self._change(oid, flags, start, 0, view[start - offset : start - offset + length], 0, ended)

    def _change(
        self, oid: ObjectId, flags: int, offset: int, length: int, data: Buffer, copies: int, done: IoDone
    ) -> None:
        self._next_number = number = self._next_number + 1
        request = _Request(self, number, False, oid, flags, offset, length, data, copies, done)
        self.pending[number] = request
        self._route(request)

    def _route(self, request: _Request) -> None:
        context, home = self.context, self.home
        oid = request.oid
        replicas = context.placement.replicas(oid)
        if home is None or not replicas:
            context.probe("gateway.nobody_stores")
            request.finish(Result.EIO, b"")
            return
        first, me = replicas[0], context.placement.me
        if request.reading:
            policy = context.policy_of(oid)
            if policy is not None and request.flags & Flag.MAP:
                self.strip_reads.block_map(oid, policy, request.length, self._found(request))
            elif policy is not None:
                self.strip_reads.read(oid, policy, request.offset, request.length, self._found(request))
            elif first == me:
                home.reads.read(oid, request.offset, request.length, request.finish, request.flags)
            elif request.flags & Flag.MAP:
                self._read_at_home(request, Flag.MAP)
            elif me in replicas and self._replica.readable(oid, first, request.offset, request.length):
                context.store.read(oid, request.offset, request.length, self._read_here(request))
            else:
                self._read_at_home(request, 0)
        elif first == me:
            home.submit(
                Submission(
                    oid,
                    request.flags,
                    request.offset,
                    request.length,
                    request.data,
                    request.copies or context.copies_told(oid),
                    request.finish,
                    me,
                    request.number,
                    next(iter(self.pending)),
                )
            )
        else:
            node = context.placement.nodes[first]
            message = Message(
                Kind.SUBMIT,
                context.fence,
                0,
                oid,
                request.offset,
                request.length,
                request.flags,
                watermark=context.peers.oldest(node),
                copies=request.copies or context.copies_told(oid),
                body=request.data,
                origin=request.number,
                floor=next(iter(self.pending)),
            )
            context.peers.request(node, message, request.answered)

    def _found(self, request: _Request) -> Callable[[Buffer | None], None]:
        fence = self.context.fence

        def found(data: Buffer | None) -> None:
            if data is not None:
                request.finish(Result.SUCCESS, data)
            elif self.context.fence == fence and request.number in self.pending:
                self._read_at_home(request, request.flags)

        return found

    def _read_at_home(self, request: _Request, flags: int) -> None:
        context = self.context
        home = context.placement.home(request.oid)
        assert home is not None
        if home == context.placement.me and self.home is not None:
            self.home.reads.read(request.oid, request.offset, request.length, request.finish, flags)
            return
        message = Message(Kind.READ, context.fence, 0, request.oid, request.offset, request.length, flags)
        context.peers.request(context.placement.nodes[home], message, request.answered)

    def _read_here(self, request: _Request) -> Callable[[Buffer | StoreError], None]:
        fence = self.context.fence

        def read(data: Buffer | StoreError) -> None:
            context, oid = self.context, request.oid
            if context.fence != fence or request.number not in self.pending:
                return  # fenced: it was routed again
            if not isinstance(data, StoreError):
                home = context.placement.home(oid)
                if home is not None and self._replica.readable(oid, home, request.offset, request.length):
                    request.finish(Result.SUCCESS, data)
                else:  # a write came while the store was reading: its bytes may be among the data already
                    context.probe("gateway.written_while_read")
                    self._read_at_home(request, 0)
            elif isinstance(data, (Corrupt, DiskError)):
                context.probe("gateway.corrupt_here")
                context.log(3, f"object {oid:016x}: {data}; another copy answers")
                self._replica.missing[oid] = None
                self._read_at_home(request, Flag.REPAIR)
            else:  # no copy: the home knows what that means
                self._read_at_home(request, 0)

        return read

    def later(self, request: _Request) -> None:
        """A node was not ready for the request: route it again in a moment."""

        def again() -> None:
            if request.number in self.pending:
                self._route(request)

        self.context.clock.after(RETRY_DELAY_NS, again)

    # -- changes of the cluster ------------------------------------------------------------------------------------

    def begin(self, home: Home) -> None:
        """A new epoch: everything under way starts again, in order."""
        self.home = home
        for request in list(self.pending.values()):
            self._route(request)

    def stop(self, result: int) -> None:
        """This node is no member any more: everything under way ends."""
        self.gate.fail(result)
        self.start_over(result)

    def start_over(self, result: int) -> None:
        """The cluster was formatted: everything under way ends. Answers need leases as before."""
        self.home = None
        self.gate.drop(result)
        for request in list(self.pending.values()):
            request.finish(result, b"")

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
        self._drain(vid, drained)

    def drain(self, vid: Vid, drained: Callable[[], None]) -> None:
        """`drained` when no change that was let in before this call is under way, nor waits for a freeze to end."""
        if self.gate.suspended:
            self._held.append(lambda: self.drain(vid, drained))
        elif vid in self._frozen:
            self.when_thawed(vid, lambda: self.drain(vid, drained))
        else:
            self._drain(vid, drained)

    def _drain(self, vid: Vid, drained: Callable[[], None]) -> None:
        left = {
            number: None
            for number, request in self.pending.items()
            if not request.reading and vid_of(request.oid) == vid
        }
        if left:
            self.drains.append((vid, left, drained))
        else:
            drained()

    def is_frozen(self, vid: Vid) -> bool:
        return vid in self._frozen

    def when_thawed(self, vid: Vid, call: Callable[[], None]) -> None:
        """`call` comes when the freeze of the volume ends."""
        self._frozen[vid].append(call)

    def request_ended(self) -> None:
        """Some freeze is waiting: see whether all it waits for has ended."""
        for entry in list(self.drains):
            _, left, drained = entry
            # `drained` may end further requests, and so come here again
            if entry in self.drains and not any(number in self.pending for number in left):
                self.drains.remove(entry)
                drained()

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

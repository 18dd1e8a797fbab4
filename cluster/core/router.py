"""Where a request goes: this node's copy, or its home; and again after every change of epoch.

 read    this node's copy if it may be read here, else the home's
 change  to the home, which numbers it and sees that all replicas have it. A small overwrite or creation of an
         object that belongs here, too, has also ended when all replicas have said so themselves (Flag.DIRECT, APPLIED)

Each request is answered exactly once. What is under way when the epoch changes is sent again in its old order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.erasure import Policy
from sheepdog.cluster.core.errors import Corrupt, DiskError, Result, StoreError
from sheepdog.cluster.core.gate import Gate
from sheepdog.cluster.core.home import Home
from sheepdog.cluster.core.home_writes import IoDone, Submission
from sheepdog.cluster.core.ids import ObjectId, Vid, vid_of
from sheepdog.cluster.core.limits import DIRECT_BYTES, RETRY_DELAY_NS
from sheepdog.cluster.core.messages import Flag, Kind, Message
from sheepdog.cluster.core.moves import Moves
from sheepdog.cluster.core.peers import first_number
from sheepdog.cluster.core.ports import Buffer
from sheepdog.cluster.core.replica import Replica
from sheepdog.cluster.core.strip_reads import StripReads
from sheepdog.cluster.core.striping import cut

_SUCCESS: Final = int(Result.SUCCESS)  # looked up once, not for each write
_NEVER_DIRECT: Final = Flag.REMOVE | Flag.PUNCH | Flag.ONLY_NEW
_AGAIN: Final = (Result.AGAIN, Result.STALE_OBJ, Result.OLD_NODE_VER, Result.NEW_NODE_VER)


class Request:
    """One request on its way."""

    __slots__ = (
        "applied",
        "copies",
        "data",
        "direct",
        "done",
        "flags",
        "having",
        "length",
        "number",
        "offset",
        "oid",
        "reading",
        "replicas",
        "router",
        "sequence",
    )

    def __init__(
        self,
        router: Router,
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
        self.router = router
        self.number = number
        self.reading = reading
        self.oid = oid
        self.flags = flags
        self.offset = offset
        self.length = length
        self.data = data
        self.copies = copies
        self.done = done
        self.direct = False  # replicas may tell this node that they have it
        self.sequence = 0  # which its home gave it, as far as is known here
        self.applied = 0  # the members that have it, a bit each ...
        self.having = 0  # ... and their number
        self.replicas = 0  # so many have to; 0: not known yet

    def has(self, member: int, sequence: int, replicas: int) -> None:
        """A member has the write; the one that is this node also knows how many have to.

        What was told of an earlier attempt does not count.
        """
        if sequence != self.sequence:
            if sequence < self.sequence:
                return
            self.sequence = sequence
            self.applied = self.having = self.replicas = 0
        bit = 1 << member
        if not self.applied & bit:
            self.applied |= bit
            self.having += 1
        if replicas:
            self.replicas = replicas
        if self.having == self.replicas:
            self.router.written(self)

    def finish(self, result: int, data: Buffer) -> None:
        """The answer; a second one (from an earlier epoch) is ignored."""
        pending = self.router.pending
        if self.number not in pending:
            return
        if result and result in _AGAIN:
            self.router.later(self)  # it keeps its place in the order
            return
        del pending[self.number]
        if result and self.reading and result == Result.NO_OBJ:
            self.done = self.router.moves.followed(self.oid, self.offset, self.length, self.done)
        gate = self.router.gate
        if gate.guarded:
            gate.answer(self.done, result, data)
        else:
            self.done(result, data)
        if self.router.drains:
            self.router.request_ended()

    def answered(self, message: Message) -> None:
        body = message.body  # as Message.payload, without the call
        assert not isinstance(body, list)
        self.finish(message.result, body)


class Router:
    """Of one node. `home` is this node's home machine of the current epoch (None outside a running cluster)."""

    def __init__(self, context: Context, replica: Replica, gate: Gate) -> None:
        self.context = context
        self.gate = gate
        self.home: Home | None = None
        self.moves = Moves(context, self)
        self.strip_reads = StripReads(context, replica, lambda: self.home)
        self.pending: dict[int, Request] = {}  # by number, in the order they came
        self.drains: list[tuple[Vid, dict[int, None], Callable[[], None]]] = []
        context.active_requests = lambda: len(self.pending)
        context.submitted = self.submitted
        context.applied = self._applied_here
        self._replica = replica
        self._next_number = 0

    def submitted(self, number: int) -> Buffer:
        """The bytes of a change under way; none if it has been answered."""
        request = self.pending.get(number)
        return b"" if request is None else request.data

    def applied(self, member: int, number: int, sequence: int, replicas: int = 0) -> None:
        """The copy of a member has a write that was submitted here; `replicas` as in `Request.has`."""
        request = self.pending.get(number)
        if request is not None:
            request.has(member, sequence, replicas)

    def _applied_here(self, number: int, sequence: int, replicas: int) -> None:
        self.applied(self.context.placement.me, number, sequence, replicas)

    def written(self, request: Request) -> None:
        """All replicas have the write; its home hears of that later."""
        self._replica.stabilized(request.oid, request.sequence)
        request.finish(_SUCCESS, b"")

    def read(self, oid: ObjectId, offset: int, length: int, done: IoDone, flags: int = 0) -> None:
        """`length` bytes from `offset`; with MAP in `flags`: which of the blocks hold data."""
        self._next_number = number = self._next_number + 1
        request = Request(self, number, True, oid, flags, offset, length, b"", 0, done)
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
            # An inode's home may be told of other replicas than this node knows of (`copies`).
            direct = not flags & _NEVER_DIRECT and len(data) <= DIRECT_BYTES and policy is None and not copies
            self._change(oid, flags, offset, length, data, copies, done, direct)

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
        self,
        oid: ObjectId,
        flags: int,
        offset: int,
        length: int,
        data: Buffer,
        copies: int,
        done: IoDone,
        direct: bool = False,
    ) -> None:
        self._next_number = number = self._next_number + 1
        request = Request(self, number, False, oid, flags, offset, length, data, copies, done)
        request.direct = direct
        self.pending[number] = request
        self._route(request)

    def _route(self, request: Request) -> None:
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
                    first_number(self.pending, request.number),
                )
            )
        else:
            node = context.placement.nodes[first]
            request.sequence = request.applied = request.having = request.replicas = 0
            message = Message(
                Kind.SUBMIT,
                context.fence,
                0,
                oid,
                request.offset,
                request.length,
                request.flags | Flag.DIRECT if request.direct and me in replicas else request.flags,
                watermark=context.peers.oldest(node),
                copies=request.copies or context.copies_told(oid),
                body=request.data,
                origin=request.number,
                floor=first_number(self.pending, request.number),
            )
            context.peers.request(node, message, request.answered)

    def _found(self, request: Request) -> Callable[[Buffer | None], None]:
        fence = self.context.fence

        def found(data: Buffer | None) -> None:
            if data is not None:
                request.finish(Result.SUCCESS, data)
            elif self.context.fence == fence and request.number in self.pending:
                self._read_at_home(request, request.flags)

        return found

    def _read_at_home(self, request: Request, flags: int) -> None:
        context = self.context
        home = context.placement.home(request.oid)
        assert home is not None
        if home == context.placement.me and self.home is not None:
            self.home.reads.read(request.oid, request.offset, request.length, request.finish, flags)
            return
        message = Message(Kind.READ, context.fence, 0, request.oid, request.offset, request.length, flags)
        context.peers.request(context.placement.nodes[home], message, request.answered)

    def _read_here(self, request: Request) -> Callable[[Buffer | StoreError], None]:
        fence, doubts = self.context.fence, self.context.doubts.get(request.oid)

        def read(data: Buffer | StoreError) -> None:
            context, oid = self.context, request.oid
            if context.fence != fence or request.number not in self.pending:
                return  # fenced: it was routed again
            if not isinstance(data, StoreError):
                home = context.placement.home(oid)
                good = doubts == context.doubts.get(oid)
                if good and home is not None and self._replica.readable(oid, home, request.offset, request.length):
                    request.finish(Result.SUCCESS, data)
                else:  # a write came while the store was reading, or another copy: its bytes may be in the data
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

    def later(self, request: Request) -> None:
        """A node was not ready for the request: route it again in a moment."""

        fence = self.context.fence

        def again() -> None:
            if request.number in self.pending and self.context.fence == fence:  # in a new epoch it was sent by `begin`
                self._route(request)

        self.context.clock.after(RETRY_DELAY_NS, again)

    # -- changes of the cluster ------------------------------------------------------------------------------------

    def begin(self, home: Home) -> None:
        """A new epoch: everything under way starts again, in order."""
        self.home = home
        for request in list(self.pending.values()):
            self._route(request)

    def end(self, result: int) -> None:
        """This node serves no more: everything under way ends."""
        self.home = None
        self.gate.drop(result)
        for request in list(self.pending.values()):
            request.finish(result, b"")

    def drain(self, vid: Vid, drained: Callable[[], None]) -> None:
        """`drained` when none of the volume's changes that are under way now is left."""
        left = {
            number: None
            for number, request in self.pending.items()
            if not request.reading and vid_of(request.oid) == vid
        }
        if left:
            self.drains.append((vid, left, drained))
        else:
            drained()

    def goes_on(self, vid: Vid, change: Callable[[], None]) -> bool:
        """From the answer to a change, which has a second part: who waits for the first waits for that, too.

        False, and nothing is done, if nobody waits.
        """
        waiting = [left for one, left, _ in self.drains if one == vid]
        if waiting:
            before = dict.fromkeys(self.pending)
            change()
            for left in waiting:
                left.update((number, None) for number in self.pending if number not in before)
        return bool(waiting)

    def request_ended(self) -> None:
        """Somebody waits for requests to end: see whether all it waits for has ended."""
        for entry in list(self.drains):
            _, left, drained = entry
            # `drained` may end further requests, and so come here again
            if entry in self.drains and not any(number in self.pending for number in left):
                self.drains.remove(entry)
                drained()

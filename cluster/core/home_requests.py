"""What other gateways ask of a home: each change is executed once, also when it comes again over a new link."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.home_writes import IoDone, Submission
from sheepdog.cluster.core.ids import NodeId, ObjectId, inode_oid, vid_of
from sheepdog.cluster.core.messages import Flag, Kind, Message
from sheepdog.cluster.core.peers import Peers, first_number
from sheepdog.cluster.core.ports import Buffer

if TYPE_CHECKING:
    from sheepdog.cluster.core.home import Home


class _Answering:
    """A gateway's change under way, whose end it takes (`home_writes.IoDone`).

    One object, where a nested function is two.
    """

    __slots__ = ("message", "peers", "seen", "sender")

    def __init__(self, peers: Peers, seen: dict[int, int | None], sender: NodeId, message: Message) -> None:
        self.peers = peers
        self.seen = seen
        self.sender = sender
        self.message = message

    def __call__(self, result: int, _: Buffer) -> None:
        message = self.message
        self.seen[message.rid] = result
        if message.flags & Flag.DIRECT and not result:
            self.peers.answer_late(self.sender, message)
        else:
            self.peers.answer(self.sender, message, result)


class HomeRequests:
    """Of one home machine."""

    def __init__(self, context: Context, home: Home) -> None:
        self._context = context
        self._home = home
        self._seen: dict[NodeId, dict[int, int | None]] = {}  # by gateway: result of a change, None while it runs

    def on_submit(self, sender: NodeId, message: Message) -> None:
        """A gateway's change."""
        seen = self._seen.setdefault(sender, {})
        rid = message.rid
        if rid in seen:
            self._context.probe("home.submit_repeated")
            result = seen[rid]
            if result is not None:
                self._context.peers.answer(sender, message, result)
            return
        while (oldest := first_number(seen, message.watermark)) < message.watermark:
            del seen[oldest]  # the gateway has that answer
        seen[rid] = None
        body = message.body  # as Message.payload, without the call
        assert not isinstance(body, list)
        self._home.submit(
            Submission(
                message.oid,
                message.flags,
                message.offset,
                message.length,
                body,
                message.copies,
                _Answering(self._context.peers, seen, sender, message),
                self._context.placement.index_of[sender],
                message.origin,
                message.floor,
            )
        )

    def done_before(self, submission: Submission) -> None:
        """A write that was executed in an earlier epoch, but its gateway did not hear of it."""
        home, context, oid = self._home, self._context, submission.oid
        context.probe("home.write_contained")
        if not submission.flags & Flag.DURABLE:
            submission.done(Result.SUCCESS, b"")
            return
        replicas = home.replicas_of(submission)
        left, result = len(replicas), int(Result.SUCCESS)

        def flushed(one: int) -> None:
            nonlocal left, result
            left, result = left - 1, result or one
            if not left and home.is_present():
                submission.done(result, b"")

        for replica in replicas:
            if replica == home.me:
                vids = frozenset([vid_of(oid)])
                context.store.flush(vids, lambda error: flushed(Result.SUCCESS if error is None else error.result))
            else:
                message = Message(Kind.FLUSH, home.fence, oid=inode_oid(vid_of(oid)))
                nodes = context.placement.nodes
                context.peers.request(nodes[replica], message, lambda answer: flushed(answer.result))

    def on_read(self, sender: NodeId, message: Message) -> None:
        """A gateway's read; with REPAIR, of a block that is rotten in its own copy. Of no bytes: just the repair."""
        home, oid = self._home, message.oid
        if message.flags & Flag.REPAIR:
            member = self._context.placement.index_of[sender]
            if self._context.policy_of(oid) is not None:
                self.repair_strip(oid, member, self._answering(sender, message))
                return
            if not message.length:
                self.repair_copy(oid, member, self._answering(sender, message))
                return
            if home.active and home.has_been(oid):
                home.recovery.suspect(oid, member)
        home.reads.read(oid, message.offset, message.length, self._answering(sender, message), message.flags)

    def _answering(self, sender: NodeId, message: Message) -> IoDone:
        def done(result: int, data: Buffer) -> None:
            self._context.peers.answer(sender, message, result, data)

        return done

    def repair_copy(self, oid: ObjectId, member: int, done: IoDone) -> None:
        """The copy of `member` is made anew from the others; done when it is right, or cannot be."""
        home = self._home
        if not home.active:
            home.hold(lambda: self.repair_copy(oid, member, done))
        elif not home.has_been(oid):
            done(home.absent(oid), b"")
        else:
            home.recovery.suspect(oid, member)
            home.recovery.when_restored(oid, lambda result: done(result, b""))

    def repair_strip(self, oid: ObjectId, member: int, done: IoDone) -> None:
        """The strip of `member` is made anew from the others; done when the object is clean."""
        home = self._home
        if not home.active:
            home.hold(lambda: self.repair_strip(oid, member, done))
            return
        policy = self._context.policy_of(oid)
        if policy is None or home.is_lost(oid) or not home.strips.exists(oid, policy):
            done(Result.NO_OBJ, b"")
            return
        home.recovery.suspect(oid, member)
        if not home.recovery.holds(oid, False, lambda: done(Result.SUCCESS, b"")):
            done(Result.SUCCESS, b"")

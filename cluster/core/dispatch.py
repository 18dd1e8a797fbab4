"""Messages of peers: fenced by their epoch, and handed to the machine that they are for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.copies import Copies
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.gateway import Gateway
from sheepdog.cluster.core.ids import NO_VERSION, STRIP_SHIFT, NodeId
from sheepdog.cluster.core.limits import MAX_EARLY_MESSAGES
from sheepdog.cluster.core.messages import Flag, Kind, Message
from sheepdog.cluster.core.part import Part
from sheepdog.cluster.core.peering import Verdict, decode_oids

_ANSWER: Final = int(Kind.ANSWER)
_APPLY: Final = int(Kind.APPLY)


class Dispatch:
    """Of one node. Another epoch's message is not obeyed: an older one is dropped (its sender will notice and ask
    again), a newer one waits until this node gets there."""

    def __init__(self, context: Context, gateway: Gateway, copies: Copies, part: Part) -> None:
        self._context = context
        self._gateway = gateway
        self._copies = copies
        self._replica = copies.replica
        self._early: list[tuple[NodeId, Message]] = []
        self._handlers: dict[int, Callable[[NodeId, Message], None]] = {
            Kind.APPLIED: self._on_applied,
            Kind.STABLE: copies.replica.on_stable,
            Kind.LEVEL: copies.replica.on_level,
            Kind.TABLE: copies.puller.on_table,
            Kind.FETCH: self._on_fetch,
            Kind.SUBMIT: self._on_submit,
            Kind.READ: self._on_read,
            Kind.INVENTORY: self._on_inventory,
            Kind.SETTLE: self._on_settle,
            Kind.PULL: self._on_pull,
            Kind.DROP: self._on_drop,
            Kind.ROLLBACK: self._on_roll_back,
            Kind.BAD: self._on_bad,
            Kind.LOST: self._on_lost_copies,
            Kind.COMPLETE: self._on_complete,
            Kind.FLUSH: part.on_flush,
            Kind.DRAIN: part.on_drain,
            Kind.QUERY: part.on_query,
            Kind.PING: self._on_ping,
        }

    def begin(self) -> None:
        """A new epoch: what came too early for the one before."""
        early, self._early = self._early, []
        for sender, message in early:
            self.on_message(sender, message)

    def on_message(self, sender: NodeId, message: Message) -> None:
        """One message of a peer."""
        context = self._context
        if message.fence != context.fence:
            if message.fence > context.fence and len(self._early) < MAX_EARLY_MESSAGES:
                context.probe("node.early_message")
                self._early.append((sender, message))
            else:
                context.probe("node.stale_message")
            return
        if sender not in context.placement.index_of:
            return
        kind = message.kind
        if kind == _ANSWER:  # most are one of these two
            context.peers.on_answer(sender, message)
        elif kind == _APPLY:
            self._replica.on_apply(sender, message)
        else:
            self._handlers[kind](sender, message)

    def on_successes(self, sender: NodeId, fence: int, rids: list[int]) -> None:
        """ANSWERs that say no more than success. None is early: this node has asked in that epoch."""
        context = self._context
        if fence != context.fence:
            context.probe("node.stale_message")
        else:
            context.peers.on_successes(sender, rids)

    def on_applied(self, sender: NodeId, fence: int, writes: list[int]) -> None:
        """Several APPLIED: number and sequence, in turns."""
        context = self._context
        member, router = context.placement.index_of.get(sender), self._gateway.router
        if fence != context.fence or member is None:
            context.probe("node.stale_message")
            return
        for place in range(0, len(writes), 2):
            router.applied(member, writes[place], writes[place + 1])

    def _on_applied(self, sender: NodeId, message: Message) -> None:
        self._gateway.router.applied(self._context.placement.index_of[sender], message.origin, message.sequence)

    # -- for the home of this node ---------------------------------------------------------------------------------

    def _on_submit(self, sender: NodeId, message: Message) -> None:
        self._context.counters.peer_requests += 1
        self._copies.at_home().requests.on_submit(sender, message)

    def _on_read(self, sender: NodeId, message: Message) -> None:
        self._context.counters.peer_requests += 1
        if message.oid >> STRIP_SHIFT:
            self._gateway.router.strip_reads.on_read(sender, message)
        else:
            self._copies.at_home().requests.on_read(sender, message)

    def _on_inventory(self, sender: NodeId, message: Message) -> None:
        self._acknowledge(sender, message)
        self._copies.at_home().on_inventory(sender, message)

    def _on_lost_copies(self, sender: NodeId, message: Message) -> None:
        self._acknowledge(sender, message)
        self._copies.home_undone(self._context.me)
        self._copies.at_home().on_lost(self._context.placement.index_of[sender], decode_oids(message.payload()))

    # -- for the copies here ---------------------------------------------------------------------------------------

    def _on_settle(self, sender: NodeId, message: Message) -> None:
        home, verdict = self._context.placement.index_of[sender], Verdict.decode(message)
        self._copies.settled(home, verdict, lambda: self._acknowledge(sender, message))

    def _on_pull(self, sender: NodeId, message: Message) -> None:
        fence = self._context.fence
        if message.flags & Flag.HURRY:
            self._acknowledge(sender, message)

        def pulled(result: int) -> None:
            if self._context.fence == fence:
                if not result:
                    self._copies.replica.restored(message.oid)
                self._context.peers.answer(sender, message, result)

        self._copies.pull(message, pulled)

    def _on_drop(self, sender: NodeId, message: Message) -> None:
        self._acknowledge(sender, message)
        self._copies.drop(message.oid, message.flags)

    def _on_roll_back(self, sender: NodeId, message: Message) -> None:
        self._copies.agree(message, lambda result: self._context.peers.answer(sender, message, result))

    def _on_bad(self, sender: NodeId, message: Message) -> None:
        self._copies.note_bad(message.oid, lambda: self._acknowledge(sender, message))

    def _on_fetch(self, sender: NodeId, message: Message) -> None:
        if message.oid >> STRIP_SHIFT and message.version == NO_VERSION:
            self._copies.replica.strips.on_fetch(sender, message)
        else:
            self._copies.puller.on_fetch(sender, message)

    def _on_complete(self, sender: NodeId, message: Message) -> None:
        self._acknowledge(sender, message)
        self._copies.replica.recovered(self._context.placement.index_of[sender])
        self._copies.home_done(sender)

    def _on_ping(self, sender: NodeId, message: Message) -> None:
        self._acknowledge(sender, message)

    def _acknowledge(self, sender: NodeId, message: Message) -> None:
        self._context.peers.answer(sender, message, Result.SUCCESS)

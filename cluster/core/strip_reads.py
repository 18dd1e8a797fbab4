"""Reads of erasure-coded objects, straight from the nodes that hold the data strips.

A range is one contiguous range on each strip that it touches, so a small read asks one node. Where a strip is not
where the placement puts it, is not current, or has a write on the blocks that may not be everywhere, the home is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.erasure import Policy
from sheepdog.cluster.core.errors import Result, StoreError
from sheepdog.cluster.core.ids import NodeId, ObjectId, oid_name, plain_oid, strip_of
from sheepdog.cluster.core.messages import Buffer, Kind, Message
from sheepdog.cluster.core.replica import Replica
from sheepdog.cluster.core.striping import gather, pieces, spans

if TYPE_CHECKING:
    from sheepdog.cluster.core.home import Home

Found = Callable[[Buffer | None], None]
"""found(bytes), or None: ask the home."""


class StripReads:
    """Of one node. `home` gives its home machine of the present epoch."""

    def __init__(self, context: Context, replica: Replica, home: Callable[[], Home | None]) -> None:
        self._context = context
        self._replica = replica
        self._home = home

    def read(self, oid: ObjectId, policy: Policy, offset: int, length: int, found: Found) -> None:
        """`length` bytes at `offset` of the object."""
        placement = self._context.placement
        replicas = placement.replicas(oid)
        parts = pieces(policy, offset, length)
        wanted = spans(parts)
        if not wanted or max(wanted) >= len(replicas):
            found(None)
            return
        if len(wanted) == 1:
            ((strip, (at, size)),) = wanted.items()
            self._read_one(strip_of(oid, strip), replicas[strip], at, size, found)
            return
        have: dict[int, tuple[int, Buffer]] = {}
        left = len(wanted)

        def arrived(strip: int, at: int) -> Found:
            def got(data: Buffer | None) -> None:
                nonlocal left
                left -= 1
                if data is not None:
                    have[strip] = at, data
                if not left:
                    found(gather(parts, have, length) if len(have) == len(wanted) else None)

            return got

        for strip, (at, size) in wanted.items():
            self._read_one(strip_of(oid, strip), replicas[strip], at, size, arrived(strip, at))

    def _read_one(self, strip: ObjectId, member: int, offset: int, length: int, found: Found) -> None:
        context = self._context
        if member == context.placement.me:
            self._read_here(strip, offset, length, found)
            return

        def answered(answer: Message) -> None:
            assert isinstance(answer.body, (bytes, bytearray, memoryview))
            found(answer.body if answer.result == Result.SUCCESS else None)

        message = Message(Kind.READ, context.fence, oid=strip, offset=offset, length=length)
        context.peers.request(context.placement.nodes[member], message, answered)

    def on_read(self, sender: NodeId, message: Message) -> None:
        """Another gateway wants part of a strip that should be here."""
        context = self._context

        def found(data: Buffer | None) -> None:
            if data is None:
                context.peers.answer(sender, message, Result.AGAIN)
            else:
                context.counters.peer_reads += 1
                context.counters.peer_tx += len(data)
                context.peers.answer(sender, message, Result.SUCCESS, data)

        self._read_here(message.oid, message.offset, message.length, found)

    def _read_here(self, strip: ObjectId, offset: int, length: int, found: Found) -> None:
        if not self._readable(strip, offset, length):
            self._context.probe("strips.not_readable_here")
            found(None)
            return
        fence = self._context.fence

        def read(data: Buffer | StoreError) -> None:
            if self._context.fence != fence:
                return  # the gateway asks again in the new epoch
            if isinstance(data, StoreError):
                self._context.log(4, f"strip {oid_name(strip)} cannot be read here: {data}")
                found(None)
            else:  # a write that came meanwhile may be among the bytes
                found(data if self._readable(strip, offset, length) else None)

        self._replica.strips.read(strip, offset, length, read)

    def _readable(self, strip: ObjectId, offset: int, length: int) -> bool:
        context, oid = self._context, plain_oid(strip)
        home = context.placement.home(oid)
        if home is None or strip in self._replica.missing:
            return False
        if home == context.placement.me:
            machine, policy = self._home(), context.policy_of(oid)
            return (
                machine is not None
                and policy is not None
                and machine.strips.readable(strip, oid, policy, offset, length)
            )
        return self._replica.readable(strip, home, offset, length)

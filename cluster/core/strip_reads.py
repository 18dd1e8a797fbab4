"""Reads of erasure-coded objects, straight from the nodes that hold the data strips.

A range is one contiguous range on each strip that it touches, so a small read asks one node. Where a strip is not
where the placement puts it, is not current, or has a write on the blocks that may not be everywhere, the home is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from sheepdog.cluster.core.blocks import block_map
from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.erasure import Policy
from sheepdog.cluster.core.errors import Result, StoreError
from sheepdog.cluster.core.ids import NodeId, ObjectId, oid_name, plain_oid, strip_of
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.messages import Buffer, Flag, Kind, Message
from sheepdog.cluster.core.replica import Replica
from sheepdog.cluster.core.striping import UNIT, gather, pieces, spans

if TYPE_CHECKING:
    from sheepdog.cluster.core.home import Home

_UNIT_BYTES = UNIT // BLOCK_SIZE // 8  # of the map of a strip
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
            assert not isinstance(answer.body, list)
            found(answer.body if answer.result == Result.SUCCESS else None)

        message = Message(Kind.READ, context.fence, oid=strip, offset=offset, length=length)
        context.peers.request(context.placement.nodes[member], message, answered)

    def block_map(self, oid: ObjectId, policy: Policy, size: int, found: Found) -> None:
        """Which blocks of the object hold data (core.blocks); what a strip does not tell may be data."""
        context, placement = self._context, self._context.placement
        replicas = placement.replicas(oid)[: policy.data]
        maps: dict[int, Buffer] = {}
        left = policy.data

        def arrived(strip: int) -> Found:
            def got(data: Buffer | None) -> None:
                nonlocal left
                left -= 1
                if data is not None:
                    maps[strip] = data
                if not left:
                    found(_interleaved(policy, size, maps) if maps else None)

            return got

        def asked(got: Found) -> Callable[[Message], None]:
            def answered(answer: Message) -> None:
                assert not isinstance(answer.body, list)
                got(answer.body if answer.result == Result.SUCCESS else None)

            return answered

        for strip in range(policy.data):
            if strip >= len(replicas):
                arrived(strip)(None)
            elif replicas[strip] == placement.me:
                arrived(strip)(self._map_here(strip_of(oid, strip)))
            else:
                message = Message(Kind.READ, context.fence, oid=strip_of(oid, strip), flags=Flag.MAP)
                context.peers.request(placement.nodes[replicas[strip]], message, asked(arrived(strip)))

    def _map_here(self, strip: ObjectId) -> Buffer | None:
        """None if the strip here is not current."""
        if not self._replica.is_current(strip):
            return None
        try:
            return block_map(self._context.store.table(strip))
        except StoreError:
            return None

    def on_read(self, sender: NodeId, message: Message) -> None:
        """Another gateway wants part of a strip that should be here, or with MAP which of its blocks hold data."""
        context = self._context
        if message.flags & Flag.MAP:
            here = self._map_here(message.oid)
            context.peers.answer(sender, message, Result.AGAIN if here is None else Result.SUCCESS, here or b"")
            return

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


def _interleaved(policy: Policy, size: int, maps: Mapping[int, Buffer]) -> bytes:
    """The map of an object from those of its data strips; one that is missing counts as full."""
    full = b"\xff" * (size // policy.data // BLOCK_SIZE // 8)
    ordered = [memoryview(maps.get(strip, full)) for strip in range(policy.data)]
    starts = range(0, len(full), _UNIT_BYTES)
    return b"".join([one[start : start + _UNIT_BYTES] for start in starts for one in ordered])

"""Reads of erasure-coded objects, straight from the nodes that hold the data strips.

A range is one contiguous range on each strip that it touches, so a small read asks one node. Where a strip is not
where the placement puts it, is not current, or has a write on the blocks that may not be everywhere, the home is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from sheepdog.cluster.core.blocks import block_map
from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.erasure import Policy
from sheepdog.cluster.core.errors import Result, StoreError
from sheepdog.cluster.core.ids import NodeId, ObjectId, oid_name, plain_oid, strip_of
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.messages import Buffer, Flag, Kind, Message
from sheepdog.cluster.core.replica import Replica
from sheepdog.cluster.core.striping import UNIT, Piece, gather, pieces, spans

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
        spread = _Spread(parts, len(wanted), length, found)
        for strip, (at, size) in wanted.items():
            self._read_one(strip_of(oid, strip), replicas[strip], at, size, partial(spread.arrived, strip, at))

    def _read_one(self, strip: ObjectId, member: int, offset: int, length: int, found: Found) -> None:
        context = self._context
        if member == context.placement.me:
            self._read_here(strip, offset, length, found)
            return

        message = Message(Kind.READ, context.fence, oid=strip, offset=offset, length=length)
        context.peers.request(context.placement.nodes[member], message, partial(_answered, found))

    def block_map(self, oid: ObjectId, policy: Policy, size: int, found: Found) -> None:
        """Which blocks of the object hold data (core.blocks); what a strip does not tell may be data."""
        context, placement = self._context, self._context.placement
        replicas = placement.replicas(oid)[: policy.data]
        maps = _Maps(policy, size, found)
        for strip in range(policy.data):
            if strip >= len(replicas):
                maps.arrived(strip, None)
            elif replicas[strip] == placement.me:
                maps.arrived(strip, self._map_here(strip_of(oid, strip)))
            else:
                message = Message(Kind.READ, context.fence, oid=strip_of(oid, strip), flags=Flag.MAP)
                answered = partial(_answered, partial(maps.arrived, strip))
                context.peers.request(placement.nodes[replicas[strip]], message, answered)

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

        self._read_here(message.oid, message.offset, message.length, partial(self._read_for, sender, message))

    def _read_for(self, sender: NodeId, message: Message, data: Buffer | None) -> None:
        context = self._context
        if data is None:
            context.peers.answer(sender, message, Result.AGAIN)
        else:
            context.counters.peer_reads += 1
            context.counters.peer_tx += len(data)
            context.peers.answer(sender, message, Result.SUCCESS, data)

    def _read_here(self, strip: ObjectId, offset: int, length: int, found: Found) -> None:
        if not self._readable(strip, offset, length):
            self._context.probe("strips.not_readable_here")
            found(None)
            return
        read = partial(self._read_done, strip, offset, length, found, self._context.fence)
        self._replica.strips.read(strip, offset, length, read)

    def _read_done(
        self, strip: ObjectId, offset: int, length: int, found: Found, fence: int, data: Buffer | StoreError
    ) -> None:
        if self._context.fence != fence:
            return  # the gateway asks again in the new epoch
        if isinstance(data, StoreError):
            self._context.log(4, f"strip {oid_name(strip)} cannot be read here: {data}")
            found(None)
        else:  # a write that came meanwhile may be among the bytes
            found(data if self._readable(strip, offset, length) else None)

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


class _Spread:
    """The parts of a range that is on several strips, as they come; nothing is found when one cannot be read."""

    __slots__ = ("_found", "_have", "_left", "_length", "_parts")

    def __init__(self, parts: Sequence[Piece], strips: int, length: int, found: Found) -> None:
        self._parts = parts
        self._left = strips
        self._length = length
        self._found = found
        self._have: dict[int, tuple[int, Buffer]] | None = {}

    def arrived(self, strip: int, at: int, data: Buffer | None) -> None:
        """`data` of the strip, from `at` on."""
        self._left -= 1
        if data is None:
            self._have = None
        elif self._have is not None:
            self._have[strip] = at, data
        if not self._left:
            self._found(None if self._have is None else gather(self._parts, self._have, self._length))


class _Maps:
    """The maps of an object's data strips as they come; nothing is found when none can be told."""

    __slots__ = ("_found", "_left", "_maps", "_policy", "_size")

    def __init__(self, policy: Policy, size: int, found: Found) -> None:
        self._policy = policy
        self._size = size
        self._found = found
        self._left = policy.data
        self._maps: dict[int, Buffer] = {}

    def arrived(self, strip: int, data: Buffer | None) -> None:
        self._left -= 1
        if data is not None:
            self._maps[strip] = data
        if not self._left:
            self._found(_interleaved(self._policy, self._size, self._maps) if self._maps else None)


def _answered(found: Found, answer: Message) -> None:
    found(answer.payload() if answer.result == Result.SUCCESS else None)


def _interleaved(policy: Policy, size: int, maps: Mapping[int, Buffer]) -> bytes:
    """The map of an object from those of its data strips; one that is missing counts as full."""
    full = b"\xff" * (size // policy.data // BLOCK_SIZE // 8)
    ordered = [memoryview(maps.get(strip, full)) for strip in range(policy.data)]
    starts = range(0, len(full), _UNIT_BYTES)
    return b"".join([one[start : start + _UNIT_BYTES] for start in starts for one in ordered])

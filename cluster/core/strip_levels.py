"""Brings the strips of coded objects level: a write gives its version only to the strips that it touches.

Some time after a write the strips that it left alone get its version too, many objects in one message. Then all strips
are equal again, and what they remember of their writes is dropped (core.strip_undo). An object that is written all the
time would not be level for long: it waits for a pause, or until its strips have many writes to remember. Peering does
the same for objects that are not level when an epoch ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from struct import Struct
from typing import TYPE_CHECKING

from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.errors import PeerError
from sheepdog.cluster.core.ids import NO_VERSION, STRIP_SHIFT, ObjectId, Version, plain_oid, strip_of
from sheepdog.cluster.core.limits import LEVEL_BATCH, LEVEL_TICK_NS, LEVEL_WRITES
from sheepdog.cluster.core.messages import Buffer, Flag, Kind, Message

if TYPE_CHECKING:
    from sheepdog.cluster.core.home import Home

_ENTRY = Struct("<QB3xIIQ")
Leveled = tuple[ObjectId, Version]
"""A strip, and the version up to which all strips of its object are level."""


def encode_levels(levels: Iterable[Leveled]) -> bytes:
    """28 bytes each: oid, strip + 1, version."""
    mask = (1 << STRIP_SHIFT) - 1
    return b"".join([_ENTRY.pack(strip & mask, strip >> STRIP_SHIFT, *version) for strip, version in levels])


def decode_levels(body: Buffer) -> list[Leveled]:
    if len(body) % _ENTRY.size:
        raise PeerError("list of levels of odd length")
    return [
        (ObjectId(oid | strip << STRIP_SHIFT), Version(*version)) for oid, strip, *version in _ENTRY.iter_unpack(body)
    ]


class _Batch:
    """Objects that are brought level in one go, until all members have answered."""

    __slots__ = ("by_member", "failed", "left", "sequence", "versions")

    def __init__(self, sequence: int, by_member: dict[int, list[Leveled]], versions: dict[ObjectId, Version]) -> None:
        self.sequence = sequence
        self.by_member = by_member
        self.versions = versions
        self.left = len(by_member)
        self.failed: dict[ObjectId, None] = {}  # objects of which some strip could not be


class _Uneven:
    """An object of which not all strips have the last write."""

    __slots__ = ("rests", "strips", "version", "writes")

    def __init__(self) -> None:
        self.version = NO_VERSION  # of the last write
        self.strips: Sequence[tuple[int, int]] = ()  # (strip, member) of all that the object has
        self.writes = 0  # since its strips were level
        self.rests = False  # none since the last tick

    def is_due(self) -> bool:
        return self.rests or self.writes >= LEVEL_WRITES


class StripLevels:
    """Of one home, in one epoch."""

    def __init__(self, context: Context, home: Home) -> None:
        self._context = context
        self._home = home
        self._uneven: dict[ObjectId, _Uneven] = {}
        self._under_way: dict[ObjectId, None] = {}
        self._timer_set = False

    def wrote(self, oid: ObjectId, version: Version, strips: Sequence[tuple[int, int]], all_of_them: bool) -> None:
        """A write was sent to some of the strips (strip, member) that the object has, or to all."""
        if all_of_them:
            self._uneven.pop(oid, None)
            return
        uneven = self._uneven.get(oid)
        if uneven is None:
            uneven = self._uneven[oid] = _Uneven()
        uneven.version, uneven.strips = version, strips
        uneven.writes += 1
        uneven.rests = False
        self._tick_later()

    def _tick_later(self) -> None:
        if not self._timer_set:
            self._timer_set = True
            self._context.clock.after(LEVEL_TICK_NS, self._tick)

    def withdraw(self, oid: ObjectId) -> bool:
        """The version that the strips were to get is not to come to any more of them. False: they are just getting it;
        Recovery.quiet is called then."""
        if oid in self._under_way:
            return False
        self._uneven.pop(oid, None)
        return True

    def void(self, oid: ObjectId, strips: Sequence[tuple[int, int]]) -> None:
        """The last writes have been taken back: the strips (strip, member) get a version that is no write's."""
        version = self._home.next_version()
        self.wrote(oid, version, strips, False)
        self._home.strips.note_version(oid, version)

    def version(self, oid: ObjectId) -> Version | None:
        """Of the last write, if the strips are not level."""
        found = self._uneven.get(oid)
        return None if found is None else found.version

    def bring(self, oid: ObjectId) -> bool:
        """True if the object is not level: it is made so, and Recovery.quiet is called then."""
        if oid in self._under_way:
            return True
        if oid not in self._uneven:
            return False
        self._send([oid])
        return True

    @property
    def idle(self) -> bool:
        return not (self._uneven or self._under_way)

    def _tick(self) -> None:
        self._timer_set = False
        if not self._home.is_present():
            return
        behind = self._home.strips.sends.behind  # with a later version a strip would not take the write
        is_void = self._home.strips.refusals.is_void  # the parity would get the version of what it does not have
        due: list[ObjectId] = []
        for oid, uneven in self._uneven.items():
            if uneven.is_due() and oid not in self._under_way and not (behind(oid) or is_void(oid)):
                due.append(oid)
            uneven.rests = True
        for start in range(0, len(due), LEVEL_BATCH):
            self._send(due[start : start + LEVEL_BATCH])
        if self._uneven:
            self._tick_later()

    def _send(self, oids: Sequence[ObjectId]) -> None:
        """All strips of these objects learn the version of the last write, behind all writes sent so far."""
        home, context = self._home, self._context
        versions: dict[ObjectId, Version] = {}
        by_member: dict[int, list[Leveled]] = {}
        for oid in oids:
            uneven = self._uneven[oid]
            uneven.writes = 0
            versions[oid] = uneven.version
            self._under_way[oid] = None
            for strip, member in uneven.strips:
                by_member.setdefault(member, []).append((strip_of(oid, strip), uneven.version))
        batch = _Batch(home.open_number(), by_member, versions)
        watermark = home.watermark()
        for member, levels in by_member.items():
            if member == home.me:
                home.strips.sends.level_here(batch.sequence, levels, partial(self._answered, batch, member))
            else:
                message = Message(
                    Kind.LEVEL, context.fence, sequence=batch.sequence, watermark=watermark, body=encode_levels(levels)
                )
                home.untold[member] = None
                leveled = partial(self._leveled, batch, member)
                context.peers.request(context.placement.nodes[member], message, leveled)

    def _leveled(self, batch: _Batch, member: int, answer: Message) -> None:
        """The answer names the strips that could not be brought level."""
        self._answered(batch, member, [strip for strip, _ in decode_levels(answer.payload())])

    def _answered(self, batch: _Batch, member: int, failed: Iterable[ObjectId]) -> None:
        if not self._home.is_present():
            return  # the store of this node may be late
        for strip in failed:
            batch.failed[plain_oid(strip)] = None
            self._home.strip_failed(plain_oid(strip), member, batch.versions[plain_oid(strip)])
        batch.left -= 1
        if batch.left:
            return
        if batch.failed:
            self._tell_uneven(batch)
        else:
            self._home.close_number(batch.sequence)
        self._ended(batch.versions)

    def _tell_uneven(self, batch: _Batch) -> None:
        """Where a strip stays behind, the others do not forget how they came to their version."""
        home, context = self._home, self._context
        context.probe("levels.uneven")
        batch.left = len(batch.by_member)
        for member, levels in batch.by_member.items():
            still = [level for level in levels if plain_oid(level[0]) in batch.failed]
            if member == home.me:
                home.strips.sends.uneven_here(batch.sequence, still)
                self._told(batch, None)
            else:
                body = encode_levels(still)
                message = Message(Kind.LEVEL, context.fence, offset=batch.sequence, flags=Flag.UNEVEN, body=body)
                context.peers.request(context.placement.nodes[member], message, partial(self._told, batch))

    def _told(self, batch: _Batch, _: Message | None) -> None:
        batch.left -= 1
        if not batch.left and self._home.is_present():
            self._home.close_number(batch.sequence)

    def _ended(self, versions: dict[ObjectId, Version]) -> None:
        for oid, version in versions.items():
            self._under_way.pop(oid, None)
            uneven = self._uneven.get(oid)
            if uneven is not None and uneven.version == version:
                del self._uneven[oid]
            if not self._home.is_writing(oid):
                self._home.recovery.quiet(oid)

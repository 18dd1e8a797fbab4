"""Brings the strips of coded objects level: a write gives its version only to the strips that it touches.

Some time after a write the strips that it left alone get its version too, many objects in one message. Then all strips
are equal again, and what they remember of their writes is dropped (core.strip_undo). Peering does the same for objects
that are not level when an epoch ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from struct import Struct
from typing import TYPE_CHECKING

from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.errors import PeerError
from sheepdog.cluster.core.ids import STRIP_SHIFT, ObjectId, Version, plain_oid, strip_of
from sheepdog.cluster.core.limits import LEVEL_BATCH, LEVEL_DELAY_NS
from sheepdog.cluster.core.messages import Buffer, Kind, Message

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


class StripLevels:
    """Of one home, in one epoch."""

    def __init__(self, context: Context, home: Home) -> None:
        self._context = context
        self._home = home
        self._uneven: dict[ObjectId, tuple[Version, Sequence[tuple[int, int]]]] = {}  # last write, (strip, member)
        self._under_way: dict[ObjectId, None] = {}
        self._timer_set = False

    def wrote(self, oid: ObjectId, version: Version, strips: Sequence[tuple[int, int]], all_of_them: bool) -> None:
        """A write was sent to some of the strips (strip, member) that the object has, or to all."""
        if all_of_them:
            self._uneven.pop(oid, None)
            return
        self._uneven[oid] = version, strips
        if not self._timer_set:
            self._timer_set = True
            self._context.clock.after(LEVEL_DELAY_NS, self._tick)

    def void(self, oid: ObjectId) -> None:
        """Its last write may be one that no strip counts as having: the strips get a version that is no write's."""
        found = self._uneven.get(oid)
        if found is not None:
            version = self._home.next_version()
            self._uneven[oid] = version, found[1]
            self._home.strips.note_version(oid, version)

    def version(self, oid: ObjectId) -> Version | None:
        """Of the last write, if the strips are not level."""
        found = self._uneven.get(oid)
        return None if found is None else found[0]

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
        waiting = [oid for oid in self._uneven if oid not in self._under_way and not behind(oid)]
        for start in range(0, len(waiting), LEVEL_BATCH):
            self._send(waiting[start : start + LEVEL_BATCH])
        if self._uneven and not self._timer_set:
            self._timer_set = True
            self._context.clock.after(LEVEL_DELAY_NS, self._tick)

    def _send(self, oids: Sequence[ObjectId]) -> None:
        """All strips of these objects learn the version of the last write, behind all writes sent so far."""
        home, context = self._home, self._context
        versions: dict[ObjectId, Version] = {}
        by_member: dict[int, list[Leveled]] = {}
        for oid in oids:
            version, strips = self._uneven[oid]
            versions[oid] = version
            self._under_way[oid] = None
            for strip, member in strips:
                by_member.setdefault(member, []).append((strip_of(oid, strip), version))
        sequence, watermark = home.open_number(), home.watermark()
        left = len(by_member)

        def ended(member: int) -> Callable[[Iterable[ObjectId]], None]:
            def answered(failed: Iterable[ObjectId]) -> None:
                nonlocal left
                for strip in failed:
                    home.strip_failed(plain_oid(strip), member, versions[plain_oid(strip)])
                left -= 1
                if not left:
                    home.close_number(sequence)
                    self._ended(versions)

            return answered

        for member, levels in by_member.items():
            if member == home.me:
                home.strips.sends.level_here(sequence, levels, ended(member))
            else:
                message = Message(
                    Kind.LEVEL, context.fence, sequence=sequence, watermark=watermark, body=encode_levels(levels)
                )
                home.untold[member] = None
                context.peers.request(context.placement.nodes[member], message, partial(_leveled, ended(member)))

    def _ended(self, versions: dict[ObjectId, Version]) -> None:
        for oid, version in versions.items():
            self._under_way.pop(oid, None)
            uneven = self._uneven.get(oid)
            if uneven is not None and uneven[0] == version:
                del self._uneven[oid]
            if not self._home.is_writing(oid):
                self._home.recovery.quiet(oid)


def _leveled(answered: Callable[[list[ObjectId]], None], answer: Message) -> None:
    """The answer names the strips that could not be brought level."""
    answered([strip for strip, _ in decode_levels(answer.payload())])

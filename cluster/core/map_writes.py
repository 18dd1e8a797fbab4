"""Writes into one part of a map, which go together while one before them is under way.

A client that fills a new volume writes an entry for each object that it makes. Each such write is one of all copies: as
dear as that of the object; and where objects may become free, it reads what it replaces, behind those that come before
it. So what comes while one is under way in the same part of the map waits for it, and what has no gaps between it
becomes one write. (Bytes that nobody has written are never written: they may be those of another gateway.) What lies
elsewhere is begun at once. All are under way together for their clients, so they may take effect in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

from sheepdog.cluster.core.ids import ObjectId
from sheepdog.cluster.core.limits import MAP_WRITE_BYTES
from sheepdog.cluster.core.ports import Buffer

Ended: TypeAlias = Callable[[int], None]
"""ended(result): what became of a write."""
Begin: TypeAlias = Callable[[ObjectId, int, Buffer, bool, Ended], None]
"""begin(inode, offset, data, durable, ended)"""


class _Stretch:
    """Bytes without gaps of one inode, from one write or from several."""

    def __init__(self, offset: int, data: Buffer, durable: bool, ended: Ended) -> None:
        self.start = offset
        self.end = offset + len(data)
        self.durable = durable
        self.parts = [(offset, data)]  # the later ones count
        self.ended = [ended]

    def is_near(self, other: _Stretch) -> bool:
        """Do they share a part of the map? What comes between them may make them one."""
        return (
            self.start // MAP_WRITE_BYTES <= other.end // MAP_WRITE_BYTES
            and other.start // MAP_WRITE_BYTES <= self.end // MAP_WRITE_BYTES
        )

    def takes(self, other: _Stretch) -> bool:
        """Can both be one write?"""
        touches = self.start <= other.end and other.start <= self.end
        return touches and max(self.end, other.end) - min(self.start, other.start) <= MAP_WRITE_BYTES

    def join(self, other: _Stretch) -> None:
        self.start, self.end = min(self.start, other.start), max(self.end, other.end)
        self.durable = self.durable or other.durable
        self.parts += other.parts
        self.ended += other.ended

    def data(self) -> Buffer:
        if len(self.parts) == 1:
            return self.parts[0][1]
        joined = bytearray(self.end - self.start)
        for offset, part in self.parts:
            joined[offset - self.start : offset - self.start + len(part)] = part
        return bytes(joined)


class MapWrites:
    """Of one gateway. `begin` does a write, and tells its end."""

    def __init__(self, begin: Begin) -> None:
        self._begin = begin
        self._under_way: dict[ObjectId, list[_Stretch]] = {}
        self._waiting: dict[ObjectId, list[_Stretch]] = {}

    def write(self, oid: ObjectId, offset: int, data: Buffer, durable: bool, ended: Ended) -> None:
        new = _Stretch(offset, data, durable, ended)
        if self._may_begin(oid, new):
            self._start(oid, new)
            return
        apart = []
        for stretch in self._waiting.get(oid, ()):
            if stretch.takes(new):
                stretch.join(new)
                new = stretch
            else:
                apart.append(stretch)
        self._waiting[oid] = [*apart, new]

    def _may_begin(self, oid: ObjectId, new: _Stretch) -> bool:
        return not any(stretch.is_near(new) for stretch in self._under_way.get(oid, ()))

    def _start(self, oid: ObjectId, stretch: _Stretch) -> None:
        self._under_way.setdefault(oid, []).append(stretch)
        self._begin(oid, stretch.start, stretch.data(), stretch.durable, partial(self._end, oid, stretch))

    def _end(self, oid: ObjectId, stretch: _Stretch, result: int) -> None:
        under_way = self._under_way[oid]
        under_way.remove(stretch)
        if not under_way:
            del self._under_way[oid]
        if oid in self._waiting:
            self._begin_waiting(oid)
        for ended in stretch.ended:
            ended(result)

    def _begin_waiting(self, oid: ObjectId) -> None:
        """Those that wait for none that is under way now, together."""
        ready: list[_Stretch] = []
        held: list[_Stretch] = []
        for stretch in self._waiting.pop(oid):
            (ready if self._may_begin(oid, stretch) else held).append(stretch)
        if held:
            self._waiting[oid] = held
        for stretch in ready:
            self._start(oid, stretch)

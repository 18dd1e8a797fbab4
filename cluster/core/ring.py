"""Where objects live: consistent hashing of nodes with weights and zones (protocol.md 10.2, 10.4).

The original dog computes the same ring from the node list, so the order of every replica is part of the contract.
A ring never changes; each epoch has its own.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from struct import Struct
from typing import Final

from sheepdog.cluster.core.hashing import next_hash, node_hash, object_hash
from sheepdog.cluster.core.ids import Member, ObjectId
from sheepdog.cluster.core.limits import DEFAULT_VNODES, MAX_VNODES, PLACEMENT_CACHE_ENTRIES

_SINGLE: Final = Struct("<f")


class Ring:
    """The points of all storing members, sorted."""

    def __init__(self, members: Sequence[Member]) -> None:
        """Members in ascending order of id; those without vnodes (gateways) store nothing."""
        points: list[tuple[int, int]] = []
        for index, member in enumerate(members):
            point = node_hash(member.id)
            for _ in range(member.vnodes):
                point = next_hash(point)
                points.append((point, index))
        points.sort()
        self._points = [point for point, _ in points]
        self._owners = [index for _, index in points]
        self._zones = [member.zone for member in members]
        self.zones = len({member.zone for member in members if member.vnodes})
        self._cache: dict[tuple[ObjectId, int], tuple[int, ...]] = {}

    def home(self, oid: ObjectId) -> int | None:
        """Index of the member with the first replica, whatever the number of copies; None when nobody stores."""
        replicas = self.replicas(oid, 1)
        return replicas[0] if replicas else None

    def replicas(self, oid: ObjectId, copies: int) -> tuple[int, ...]:
        """Indices of the members that hold the object, each of another zone; fewer than `copies` with too few zones.

        Strip i of an erasure-coded object lives on the i-th of them.
        """
        key = (oid, copies)
        cached = self._cache.get(key)
        if cached is not None:
            return cached
        if len(self._cache) >= PLACEMENT_CACHE_ENTRIES:
            self._cache.clear()  # filling it again is cheaper than keeping an order of use on every hit
        placed = self._cache[key] = self._place(object_hash(oid), min(copies, self.zones))
        return placed

    def walk(self, oid: ObjectId, copies: int) -> Iterator[tuple[int, int, bool]]:
        """Why these nodes: (point, member at it, takes a copy) from the object's own point on, until all are taken."""
        left, start = list(self.replicas(oid, copies)), bisect_left(self._points, object_hash(oid))
        for step in range(len(self._points)):
            if not left:
                return
            position = (start + step) % len(self._points)
            owner = self._owners[position]
            yield self._points[position], owner, owner == left[0]
            if owner == left[0]:
                left.pop(0)

    def _place(self, point: int, copies: int) -> tuple[int, ...]:
        owners = self._owners
        position = bisect_left(self._points, point)
        placed: list[int] = []
        zones: list[int] = []
        while len(placed) < copies:
            if position == len(owners):
                position = 0
            owner = owners[position]
            if self._zones[owner] not in zones:
                zones.append(self._zones[owner])
                placed.append(owner)
            position += 1
        return tuple(placed)


def auto_vnodes(spaces: Sequence[int]) -> list[int]:
    """Points of each storing node in proportion to its space in bytes: DEFAULT_VNODES for the average.

    Nodes without space get none and do not count in the average. Computed in single precision, half away from
    zero, so that all nodes and the original agree.
    """
    total = sum(spaces)
    storing = sum(1 for space in spaces if space)
    if not total:
        return [0] * len(spaces)
    average = _single(total // storing)
    weights = [_single(_single(space) / average) for space in spaces]
    return [min(int(_single(weight * DEFAULT_VNODES) + 0.5), MAX_VNODES) for weight in weights]


def _single(value: float) -> float:
    """The nearest number of single precision."""
    (rounded,) = _SINGLE.unpack(_SINGLE.pack(value))
    return float(rounded)

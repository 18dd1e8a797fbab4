"""Which writes of living gateways the copies of this node contain.

A gateway that has no answer when the epoch changes submits its write again. It may have been executed already, and
others may have read it and written over it since: executed a second time it would undo what they wrote. So a write
carries its *origin*, the gateway and a number of its own that never changes; replicas remember the origins that are
not answered yet (each write tells the gateway's *floor*: below it all are), tell them with their inventory, and
hand them on with a restored copy. A home does not execute again what the copies contain.

Origins live in memory: they are lost with the process, as the gateway's own requests are with its.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from struct import Struct
from typing import NamedTuple

from mypy_extensions import mypyc_attr

from sheepdog.cluster.core.errors import PeerError
from sheepdog.cluster.core.ids import NO_VERSION, Member, NodeId, ObjectId, Version
from sheepdog.cluster.core.limits import ORIGINS_SWEEP_AT
from sheepdog.cluster.core.messages import Buffer

_ENTRY = Struct("<QQH6xIIQ")
ENTRY_SIZE = _ENTRY.size


class Origin(NamedTuple):
    """One write of one object; `gateway` is the index of its member in the present epoch."""

    oid: ObjectId
    number: int
    gateway: int
    version: Version  # that it gave


@mypyc_attr(acyclic=True)  # the collector need not look at it
class _Write:
    """As Origin, of one gateway: plain numbers, where a tuple has an object of each."""

    __slots__ = ("number", "oid", "version")

    def __init__(self, number: int, oid: ObjectId, version: Version) -> None:
        self.number = number
        self.oid = oid
        self.version = version


class _Gateway:
    """What is remembered of one: its writes as they came. Those below `floor` are answered, and swept out at times."""

    __slots__ = ("floor", "sweep_at", "writes")

    def __init__(self) -> None:
        self.writes: list[_Write] = []
        self.floor = 0
        self.sweep_at = ORIGINS_SWEEP_AT

    def sweep(self) -> None:
        floor = self.floor
        self.writes = [write for write in self.writes if write.number >= floor]
        self.sweep_at = max(ORIGINS_SWEEP_AT, 2 * len(self.writes))

    def current(self) -> list[_Write]:
        """Of each write that is not answered what came last: one that was executed again has another version."""
        self.sweep()
        self.writes = list({write.number: write for write in self.writes}.values())
        return self.writes


class Origins:
    """Of one node; `begin` tells the members of a new epoch."""

    def __init__(self) -> None:
        self._processes: list[tuple[NodeId, int]] = []  # by member: node and incarnation
        self._gateways: list[_Gateway] = []  # by member

    def begin(self, members: Sequence[Member]) -> None:
        """A gateway that is gone, or came back as another process, asks for nothing any more."""
        known = dict(zip(self._processes, self._gateways, strict=True))
        self._processes = [(member.id, member.incarnation) for member in members]
        self._gateways = [known.get(process) or _Gateway() for process in self._processes]

    def add(self, gateway: int, number: int, floor: int, oid: ObjectId, version: Version) -> None:
        """A write was applied here; all writes of the gateway below `floor` are answered."""
        known = self._gateways[gateway]
        known.writes.append(_Write(number, oid, version))
        known.floor = floor  # one that another home was told earlier may come later: then a few are kept longer
        if len(known.writes) >= known.sweep_at:
            known.sweep()

    def merge(self, origins: Iterable[Origin]) -> None:
        """What the source of a restored copy knows of it."""
        for origin in origins:
            if origin.gateway < len(self._gateways):
                self._gateways[origin.gateway].writes.append(_Write(origin.number, origin.oid, origin.version))

    def forget(self, oid: ObjectId) -> None:
        """The copy here is replaced by another one, or gone."""
        self.undo(oid, NO_VERSION)

    def undo(self, oid: ObjectId, cut: Version) -> None:
        """The write `cut` of the object is taken back, and all behind it."""
        for known in self._gateways:
            known.writes = [write for write in known.current() if write.oid != oid or write.version < cut]

    def clear(self) -> None:
        self._processes, self._gateways = [], []

    def __iter__(self) -> Iterator[Origin]:
        for gateway, known in enumerate(self._gateways):
            for write in known.current():
                yield Origin(write.oid, write.number, gateway, write.version)

    def of(self, oid: ObjectId) -> list[Origin]:
        return [origin for origin in self if origin.oid == oid]


def encode_origins(origins: Iterable[Origin]) -> bytes:
    """40 bytes each: oid, number, gateway, version."""
    return b"".join([_ENTRY.pack(*origin[:3], *origin.version) for origin in origins])


def decode_origins(body: Buffer) -> list[Origin]:
    if len(body) % ENTRY_SIZE:
        raise PeerError("list of origins of odd length")
    return [
        Origin(ObjectId(oid), number, gateway, Version(*version))
        for oid, number, gateway, *version in _ENTRY.iter_unpack(body)
    ]

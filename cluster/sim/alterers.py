"""Simulated administrators who change the redundancy of a volume (core.moves), while its owner uses it or in between.

They do what `dog vdi alter-copy` does: a snapshot under a known tag, moves until the volume owns all its objects, and
the snapshot goes. What was begun is finished, whichever gateways die over it.
"""

from __future__ import annotations

from typing import NamedTuple

from sheepdog.cluster.core.erasure import policy_of
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import Vid
from sheepdog.cluster.core.moves import MOVED_TAG
from sheepdog.cluster.core.script import Script
from sheepdog.cluster.core.vdi import VdiRecord
from sheepdog.cluster.sim.clients import Door
from sheepdog.cluster.sim.history import Violation
from sheepdog.cluster.sim.volumes import BASE_TROUBLE, RETRIED, Asking
from sheepdog.cluster.sim.world import MILLISECOND, SECOND

LATE_WRITES_NS = SECOND  # as dog: clients name in the old map what they made before the snapshot
_CODES = (0x11, 0x12, 0x22)  # 2:1, 2:2, 4:2
_PAUSE_NS = 300 * MILLISECOND


class Redundancy(NamedTuple):
    """Copies or strips of each object, and the byte of a code."""

    copies: int
    policy: int


def redundancies(machines: int, copies: int, policy: int) -> list[Redundancy]:
    """What so many machines can store, and what stands as many losses as this one does; of two kinds, or none."""
    present = policy_of(policy)
    tolerance = copies - 1 if present is None else present.parity
    coded = [
        Redundancy(code.strips, byte)
        for byte in _CODES
        if (code := policy_of(byte)) is not None and code.parity >= tolerance and code.strips <= machines
    ]
    copied = [Redundancy(number, 0) for number in range(tolerance + 1, machines + 1)][:1]
    found = copied + coded
    return found if len(found) > 1 else []


def alter(who: Asking, name: bytes, objects: int, kinds: list[Redundancy]) -> Script[None]:
    """Gives the volume of this name another one of at least two kinds. Nobody else takes snapshots of it meanwhile."""
    present = yield from _working(who, name)
    kind = who.random.choice([kind for kind in kinds if kind.policy != present.policy])
    result, _ = yield from who.ask(
        lambda process, done: process.node.operations.snapshot_vdi(name, MOVED_TAG, *kind, done),
        (*RETRIED, *BASE_TROUBLE),
    )
    if result and not (result == Result.VDI_EXIST and who.lost):
        raise Violation(f"{who.door.name}: snapshot of {name!r}: result {result:#x}")
    yield from who.pause(LATE_WRITES_NS)
    while (vid := (yield from _unfinished(who, name, objects))) is not None:
        yield from _move(who, vid)
    result, _ = yield from who.ask(lambda process, done: process.node.operations.delete_vdi(name, MOVED_TAG, 0, done))
    if result and not (result in (Result.NO_VDI, Result.NO_TAG) and who.lost):
        raise Violation(f"{who.door.name}: deleting the snapshot of {name!r}: result {result:#x}")
    working = yield from _working(who, name)
    if working.policy != kind.policy:
        raise Violation(f"{name!r} has the policy {working.policy:#x} instead of {kind.policy:#x}")


def _working(who: Asking, name: bytes) -> Script[VdiRecord]:
    record = yield from who.find(name)
    if record is None:
        raise Violation(f"{name!r} is gone while its redundancy changes")
    return record


def _unfinished(who: Asking, name: bytes, objects: int) -> Script[Vid | None]:
    """The volume, unless it owns all its objects."""
    vid = (yield from _working(who, name)).vid
    entries = yield from who.read_map(vid, objects)
    return None if all(owner in (0, vid) for owner in entries) else vid


def _move(who: Asking, vid: Vid) -> Script[None]:
    result, _ = yield from who.ask(
        lambda process, done: process.node.operations.move_objects(vid, lambda one: done(int(one), None))
    )
    if result:
        raise Violation(f"{who.door.name}: moves of {vid:x}: result {result:#x}")


class Alterer(Asking):
    """Beside the owner of a volume. `kinds`: what it may become, at least two."""

    def __init__(self, door: Door, name: bytes, objects: int, kinds: list[Redundancy]) -> None:
        super().__init__(door)
        self._name = name
        self._objects = objects
        self._kinds = kinds

    def _live(self) -> Script[None]:
        while (yield from self.find(self._name)) is None:
            yield from self.pause(_PAUSE_NS)
        while not self.stopped:
            yield from self.pause(self.random.randrange(_PAUSE_NS))
            yield from alter(self, self._name, self._objects, self._kinds)

    def check_all(self) -> Script[None]:
        """What was begun is finished."""
        if (yield from _unfinished(self, self._name, self._objects)) is not None:
            raise Violation(f"{self._name!r} shares objects with a snapshot that is gone")

"""Peering of erasure-coded objects: which state of the object all strips can be brought to, and which strip goes where.

current     strips that were proven current in the newest epoch known to any of them; and where that is the epoch of the
            last write itself, all strips of that epoch's replicas
version     the lowest that a current strip has: every answered write is on all of them. Strips above it go back
            (core.strip_undo), the others are rebuilt from any D.
adopted     after an end of all processes there is nothing to go back by, and strips may be at any version. If all data
            strips are there, each is right as it is (a block is on one strip only): they get a new common version, and
            the parity is made anew.
unfinished  a creation that did not get to all strips, and cannot be decoded, never was answered: what is there goes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from sheepdog.cluster.core.erasure import Policy
from sheepdog.cluster.core.ids import NO_VERSION, ObjectId, Version, strip_of

NOBODY = -1


class Held(NamedTuple):
    """One strip in an inventory. `earlier`: versions to which it can go back, newest first."""

    member: int
    strip: int
    version: Version
    as_of: int
    earlier: tuple[Version, ...]

    def reaches(self, version: Version) -> bool:
        return self.version == version or version in self.earlier


class StripDecision(NamedTuple):
    """What a home decided for one coded object that is not simply equal everywhere and in place."""

    oid: ObjectId
    policy: Policy
    version: Version  # NO_VERSION: deleted, lost, or (adopt) still to be given
    layout: tuple[int, ...] = ()  # member by strip, after recovery
    holders: tuple[tuple[int, int], ...] = ()  # (strip, member) that have the version
    agree: tuple[tuple[int, int], ...] = ()  # (strip, member) that go back to it, or are adopted
    missing: tuple[int, ...] = ()  # members of the layout whose strip is to be rebuilt
    surplus: tuple[tuple[int, ObjectId], ...] = ()  # (member, strip's id) that go at the end
    stale: tuple[int, ...] = ()  # members that hold an older state as if it were good
    adopt: bool = False
    lost: tuple[tuple[int, ObjectId], ...] = ()  # (member, strip's id): not enough is here to decode

    def lacking(self) -> list[tuple[int, ObjectId]]:
        """(member, strip's id) that must not be read until recovery says so."""
        strips = [(member, strip_of(self.oid, self.layout.index(member))) for member in self.missing]
        if not self.adopt:  # adopted ones are right, whatever their version
            strips += [(member, strip_of(self.oid, strip)) for strip, member in self.agree]
        return [*strips, *self.surplus, *self.lost]

    def unequal(self) -> list[tuple[int, ObjectId]]:
        """(member, strip's id) that are current, but must be asked for through the home for now."""
        if not (self.stale or self.agree):
            return []
        strips = self.holders + (self.agree if self.adopt else ())
        return [(member, strip_of(self.oid, strip)) for strip, member in strips]

    def surplus_copies(self) -> list[tuple[int, ObjectId]]:
        return list(self.surplus)

    @property
    def is_lost(self) -> bool:
        return bool(self.lost)

    @property
    def needs_recovery(self) -> bool:
        return bool(self.agree or self.missing)


class Facts(Protocol):
    """What the home knows of the past of an object."""

    def deleted(self, oid: ObjectId, as_of: int, holders: set[int]) -> bool: ...

    def superseded(self, oid: ObjectId, as_of: int) -> bool: ...

    def was_replica(self, oid: ObjectId, member: int, epoch: int) -> bool:
        """The member belonged to the object's replicas in an earlier epoch."""

    def never_stored(self, oid: ObjectId, epoch: int, holders: set[int]) -> bool:
        """Some replica of every epoch since `epoch`, whose memory is whole, holds none of the object."""


def decide(
    oid: ObjectId, policy: Policy, held: Sequence[Held], replicas: tuple[int, ...], facts: Facts
) -> StripDecision | None:
    """None: every strip is where it belongs, at one version."""
    enough = len(replicas) >= policy.data
    if enough and _in_place(held, replicas) and not facts.superseded(oid, max(entry.as_of for entry in held)):
        return None
    holders = {entry.member for entry in held}
    everything = tuple((entry.member, strip_of(oid, entry.strip)) for entry in held)
    real = [entry for entry in held if entry.version != NO_VERSION]
    best_as_of, best = max(((entry.as_of, entry.version) for entry in real), default=(0, NO_VERSION))
    known = max(entry.as_of for entry in held)  # a member may lack it that knows that it was there
    if facts.deleted(oid, known, holders):
        return StripDecision(oid, policy, NO_VERSION, surplus=everything)
    lost = everything + tuple(
        (member, strip_of(oid, place)) for place, member in enumerate(replicas) if member not in holders
    )
    if not real or not enough or facts.superseded(oid, best_as_of):
        return StripDecision(oid, policy, NO_VERSION, lost=lost)
    current = [
        entry
        for entry in real
        if entry.as_of == best_as_of or (best_as_of == best.epoch and facts.was_replica(oid, entry.member, best.epoch))
    ]
    for version in sorted({entry.version for entry in current}):
        good = [entry for entry in real if entry.reaches(version)]
        if len({entry.strip for entry in good}) >= policy.data:
            return _arrange(oid, policy, version, good, held, replicas, adopt=False)
    data = [entry for entry in current if entry.strip < policy.data]
    if len({entry.strip for entry in data}) == policy.data:
        return _arrange(oid, policy, NO_VERSION, _newest(data), held, replicas, adopt=True)
    if facts.never_stored(oid, best.epoch, holders):
        return StripDecision(oid, policy, NO_VERSION, surplus=everything)
    return StripDecision(oid, policy, NO_VERSION, lost=lost)


def _in_place(held: Sequence[Held], replicas: tuple[int, ...]) -> bool:
    version = held[0].version
    return (
        version != NO_VERSION
        and len(held) == len(replicas)
        and all(entry.version == version for entry in held)
        and all(entry.strip < len(replicas) and replicas[entry.strip] == entry.member for entry in held)
    )


def _newest(data: Sequence[Held]) -> list[Held]:
    """Of each strip the one that was current last."""
    best: dict[int, Held] = {}
    for entry in sorted(data, key=lambda entry: (entry.as_of, entry.version)):
        best[entry.strip] = entry
    return [best[strip] for strip in sorted(best)]


def _arrange(
    oid: ObjectId,
    policy: Policy,
    version: Version,
    good: Sequence[Held],
    held: Sequence[Held],
    replicas: tuple[int, ...],
    adopt: bool,
) -> StripDecision:
    """Good strips stay on replicas that hold them; the other replicas get what is missing."""
    layout, kept = _keep(policy, good, replicas)
    extra: dict[int, Held] = {}  # on members that will not keep it, but it can be read there meanwhile
    for entry in good:
        if entry.strip not in kept:
            extra.setdefault(entry.strip, entry)
    used = [*kept.values(), *extra.values()]
    missing = []
    for place, member in enumerate(replicas):
        if member in layout:
            continue
        strip = place if place < policy.strips and layout[place] == NOBODY else layout.index(NOBODY)
        layout[strip] = member
        missing.append(member)
    surplus = tuple((entry.member, strip_of(oid, entry.strip)) for entry in held if layout[entry.strip] != entry.member)
    fine = {(entry.member, entry.strip) for entry in good}
    old = [entry for entry in held if entry.version != NO_VERSION and (entry.member, entry.strip) not in fine]
    return StripDecision(
        oid,
        policy,
        version,
        tuple(layout),
        holders=tuple((entry.strip, entry.member) for entry in used if not adopt and entry.version == version),
        agree=tuple((entry.strip, entry.member) for entry in used if adopt or entry.version != version),
        missing=tuple(missing),
        surplus=surplus,
        stale=tuple(dict.fromkeys(entry.member for entry in old)),
        adopt=adopt,
    )


def _keep(policy: Policy, good: Sequence[Held], replicas: tuple[int, ...]) -> tuple[list[int], dict[int, Held]]:
    """Each replica keeps one good strip: the one that belongs there if it can, and no strip is kept twice."""
    layout = [NOBODY] * policy.strips
    kept: dict[int, Held] = {}
    place_of = {member: place for place, member in enumerate(replicas)}
    order: Callable[[Held], tuple[bool, int, int]] = lambda entry: (  # noqa: E731
        place_of[entry.member] != entry.strip,
        place_of[entry.member],
        entry.strip,
    )
    for entry in sorted((entry for entry in good if entry.member in place_of), key=order):
        if entry.strip not in kept and entry.member not in layout:
            kept[entry.strip] = entry
            layout[entry.strip] = entry.member
    return layout, kept

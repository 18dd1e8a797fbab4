"""Peering of erasure-coded objects: which state of the object all strips can be brought to, and which strip goes where.

current     strips that were proven current in the newest epoch known to any of them; and where that is the epoch of the
            last write itself, also the strips of that epoch's replicas: they were made current before it was written;
            but not those of which a member knows that it was to make them anew, for an agreement gives a version, too;
            nor those that could not take a write
restarted   a member that is another process than then may have lost unflushed writes with its power. Where the others
            make up the object they tell its state, as if it had come later; what it has may still fit
unfinished  a write that some strip has and another proven one lacks which it touches: it was not answered, nor was
            any later one of the object, so it is undone with all that came after. The *cut* is the first such write
state       what a strip was before the cut: it goes back to that (core.strip_undo)
fitting     every write touches the parity, so the steps of a parity strip tell all writes of the object since its
            strips were equal: for each strip the last one that touched it. A strip fits that has that write, at a
            version that the object really had. Any D strips that fit are the object; the others are rebuilt from them
made anew   such a strip knows no writes. It may alone have a version later than all parity, to which no known write
            leads: the others have lost that with their power. No durable write was behind what the parity tells, for
            it would have that; so the object is what it tells, unless D strips have the later version
adopted     after an end of all processes there may be nothing to go by, and strips may be at any version. If all data
            strips are there, each is right as it is (a block is on one strip only): the parity is made anew. A write
            that some of them lack is *half done*: it is nobody's answer, and done again if it is asked for again
interrupted where an agreement came to too few strips, and enough replicas of its epoch are here to know that nothing
            was written then, it does not count: what members were to make anew is left out, the others are as before.
            But not if a write were undone then that it contained, for that may have been read
never done  a creation that did not get to all strips, and cannot be decoded, never was answered: what is there goes

Strips that fit get a common new version before anything is decoded, unless they are equal already.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import NamedTuple, Protocol

from sheepdog.cluster.core.erasure import Policy
from sheepdog.cluster.core.ids import NO_VERSION, ObjectId, Version, strip_of
from sheepdog.cluster.core.strip_undo import ALL_STRIPS, NO_STRIPS, Step

NOBODY = -1
NEVER = -1  # as_of of what somebody began to copy: it is not known that it existed since


class Held(NamedTuple):
    """One strip in an inventory. `steps`: how it came to its version, the last step first."""

    member: int
    strip: int
    version: Version
    as_of: int
    steps: list[Step]

    def writes(self) -> Iterator[tuple[Version, int]]:
        """(version, strips touched) of the steps, the last first."""
        version = self.version
        for step in self.steps:
            yield version, step.touched
            version = step.before

    def before(self, cut: Version | None) -> Version | None:
        """The version that the strip had before the write `cut`; None if it cannot go back there."""
        version = self.version
        if cut is None or version < cut:
            return version
        for step in self.steps:
            if not step.back:
                break
            version = step.before
            if version < cut:
                return version
        return None

    def trimmed(self, cut: Version) -> Held | None:
        """The strip as it was before the write `cut`; None if it cannot go back there."""
        state = self.before(cut)
        if state is None:
            return None
        known = sum(version > state for version, _ in self.writes())
        return self._replace(version=state, steps=self.steps[known:])


class StripDecision(NamedTuple):
    """What a home decided for one coded object that is not simply equal everywhere and in place."""

    oid: ObjectId
    policy: Policy
    version: Version  # NO_VERSION: deleted, lost, or still to be given (see `agree`)
    layout: tuple[int, ...] = ()  # member by strip, after recovery
    holders: tuple[tuple[int, int], ...] = ()  # (strip, member) that have the version
    agree: tuple[tuple[int, int, Version], ...] = ()  # (strip, member, state): go back to that, then get a new version
    missing: tuple[int, ...] = ()  # members of the layout whose strip is to be rebuilt
    surplus: tuple[tuple[int, ObjectId], ...] = ()  # (member, strip's id) that go at the end
    stale: tuple[int, ...] = ()  # members that hold an older state as if it were good
    cut: Version | None = None  # the first write that is undone
    half_done: tuple[Version, ...] = ()  # writes before that which the state, or some of its data strips, lacks
    lost: tuple[tuple[int, ObjectId], ...] = ()  # (member, strip's id): not enough is here to decode
    held: tuple[tuple[int, ObjectId], ...] = ()  # those of `lost` that have bytes, which still count
    known: int = 0  # of a lost object: the newest epoch in which it is known to have existed
    unsettled: bool = False  # what is here may be more than nodes that are away, and can decode the object, know of

    def lacking(self) -> list[tuple[int, ObjectId]]:
        """(member, strip's id) that must not be read until recovery says so."""
        strips = [(member, strip_of(self.oid, self.layout.index(member))) for member in self.missing]
        return [*strips, *self.surplus, *self.lost]

    def known_of(self, member: int, strip: ObjectId) -> int:
        """What a member is told of a lost strip: in which epoch the object existed; 0 where it has the strip.

        Bytes that are as of an older epoch could else seem to be superseded by that word.
        """
        return 0 if (member, strip) in self.held else self.known

    def is_of(self, member: int) -> bool:
        """A strip of the member's comes to the agreed state."""
        return any(member == one[1] for one in (*self.agree, *self.holders))

    def contains(self, version: Version) -> bool:
        """The agreed state has all of this write, which a strip that comes to it has."""
        return (self.cut is None or version < self.cut) and version not in self.half_done

    def unequal(self) -> list[tuple[int, ObjectId]]:
        """(member, strip's id) that are current, but must be asked for through the home for now."""
        if self.agree or not (self.stale or self.unsettled):
            return []
        return [(member, strip_of(self.oid, strip)) for strip, member in self.holders]

    def undecided(self) -> list[tuple[int, ObjectId]]:
        """(member, strip's id) that are of the state that all strips have yet to be brought to; or that are not to stay
        where they are, but the others are made from them."""
        strips = [entry[:2] for entry in self.agree] or [one for one in self.holders if self.layout[one[0]] != one[1]]
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

    def known(self, oid: ObjectId, held: Sequence[Held]) -> int:
        """The newest epoch in which some member knows for sure that the object existed; 0: nobody does."""

    def superseded(self, oid: ObjectId, as_of: int, least: int) -> bool:
        """It may have been written later, in an epoch of whose replicas fewer than `least` are here."""

    def was_replica(self, oid: ObjectId, member: int, epoch: int) -> bool:
        """The member belonged to the object's replicas in an earlier epoch."""

    def restarted(self, member: int, epoch: int) -> bool:
        """The member is another process than in that epoch: unflushed writes may be gone, if its power failed."""

    def never_stored(self, oid: ObjectId, epoch: int, holders: set[int]) -> bool:
        """Some replica of every epoch since `epoch`, whose memory is whole, holds none of the object."""


def decide(
    oid: ObjectId,
    policy: Policy,
    held: Sequence[Held],
    replicas: tuple[int, ...],
    facts: Facts,
    unfit: Container[tuple[int, int]] | None = None,
) -> StripDecision | None:
    """None: every strip is where it belongs, at one version.

    `unfit`: an agreement that was interrupted is undone; these (member, strip) must not be used.
    """
    enough, least = len(replicas) >= policy.data, policy.data
    if enough and _in_place(held, replicas) and not facts.superseded(oid, max(entry.as_of for entry in held), least):
        return None
    holders = {entry.member for entry in held}
    everything = tuple((entry.member, strip_of(oid, entry.strip)) for entry in held)
    real = [entry for entry in held if entry.version != NO_VERSION and (entry.member, entry.strip) not in (unfit or ())]
    best_as_of, best = max(((entry.as_of, entry.version) for entry in real), default=(0, NO_VERSION))
    known = max(entry.as_of for entry in held)  # a member may lack it that knows that it was there
    if unfit is None and (known == NEVER or facts.deleted(oid, known, holders)):
        return StripDecision(oid, policy, NO_VERSION, surplus=everything)
    lost = everything + tuple(
        (member, strip_of(oid, place)) for place, member in enumerate(replicas) if member not in holders
    )
    bytes_here = tuple((entry.member, strip_of(oid, entry.strip)) for entry in held if entry.version != NO_VERSION)
    is_lost = StripDecision(oid, policy, NO_VERSION, lost=lost, held=bytes_here, known=facts.known(oid, held))
    if not real or not enough or facts.superseded(oid, best_as_of, least):
        return is_lost
    lacking = {
        (entry.member, entry.strip) for entry in held if entry.version == NO_VERSION and entry.as_of >= best_as_of
    }
    current = [
        entry
        for entry in real
        if entry.as_of == best_as_of
        or (
            best_as_of == best.epoch
            and (entry.member, entry.strip) not in lacking
            and facts.was_replica(oid, entry.member, best.epoch)
        )
    ]
    # Equal versions of these are one state. Others may lack a write that did not touch those which it equals.
    sure = [entry for entry in real if entry in current or not facts.superseded(oid, entry.as_of, least)]
    # What may have lost a write counts only where the others do not make up the object. What is known to lack one does
    # not even then: what they have may have been read.
    restarted = {(entry.member, entry.strip) for entry in real if facts.restarted(entry.member, best_as_of)}
    able, told_by, equals = _without(lacking, real), _without(lacking, current), _without(lacking, sure)
    for doubted in (restarted, ()):
        state = _one_state(policy, able, _without(doubted, told_by), equals, best_as_of)
        if state.strips:
            return _arrange(oid, policy, state, held, replicas)
    if facts.never_stored(oid, best.epoch, holders):
        return StripDecision(oid, policy, NO_VERSION, surplus=everything)
    if unfit is None and _is_agreement(real, best) and not facts.superseded(oid, best.epoch - 1, least):
        before = decide(oid, policy, _before_agreement(held, best, lacking), replicas, facts, lacking)
        if before is None or not (before.is_lost or _takes_back(before, real, best)):
            return before  # if it is lost then, too: that the object was there, stays true
    return is_lost


def _without(bad: Container[tuple[int, int]], held: Sequence[Held]) -> list[Held]:
    return [entry for entry in held if (entry.member, entry.strip) not in bad]


class _State(NamedTuple):
    """Strips that make up the object, each with its version there; none if there are not enough."""

    strips: Sequence[tuple[Held, Version]]
    cut: Version | None
    half_done: tuple[Version, ...] = ()


def _one_state(
    policy: Policy, real: Sequence[Held], current: Sequence[Held], sure: Sequence[Held], best_as_of: int
) -> _State:
    proven = [entry for entry in current if entry.as_of == best_as_of]
    # Where it is not proven that a strip should have a write, as little as possible is undone.
    cuts: list[Version | None] = [*_hidden(policy, proven), None, *reversed(_unfinished(policy, current))]
    for cut in cuts:
        good = _fitting(policy, real, current, sure, proven, cut)
        if len({entry.strip for entry, _ in good}) >= policy.data:
            return _State(good, cut, _passed_over(policy, good, real, cut))
    for cut in cuts:
        data = [(entry, state) for entry in current if entry.strip < policy.data and (state := entry.before(cut))]
        if len({entry.strip for entry, _ in data}) == policy.data:
            adopted = _newest(data)
            unfinished = _unfinished(policy, [entry for entry, _ in adopted])
            return _State(adopted, cut, tuple(version for version in unfinished if cut is None or version < cut))
    return _State([], None)


def _is_agreement(real: Sequence[Held], version: Version) -> bool:
    """The strips that have this version got it from an agreement."""
    return all(entry.steps and entry.steps[0].touched == ALL_STRIPS for entry in real if entry.version == version)


def _takes_back(before: StripDecision, real: Sequence[Held], agreement: Version) -> bool:
    """Without the agreement writes would be undone that it contained: they may have been read since."""
    agreed = {(entry.strip, entry.member): entry.steps[0].before for entry in real if entry.version == agreement}
    return any(state < agreed.get((strip, member), NO_VERSION) for strip, member, state in before.agree)


def _before_agreement(held: Sequence[Held], version: Version, unfit: Container[tuple[int, int]]) -> list[Held]:
    """With strips that got this version from an agreement being no newer than others that were to be used with them.

    It is undone like a write that did not get everywhere, which it has in common with one.
    """
    others = (
        one.as_of for one in held if one.version not in (version, NO_VERSION) and (one.member, one.strip) not in unfit
    )
    known = max(others, default=0)
    return [entry._replace(as_of=min(known, entry.as_of)) if entry.version == version else entry for entry in held]


def _in_place(held: Sequence[Held], replicas: tuple[int, ...]) -> bool:
    version = held[0].version
    return (
        version != NO_VERSION
        and len(held) == len(replicas)
        and all(entry.version == version for entry in held)
        and all(entry.strip < len(replicas) and replicas[entry.strip] == entry.member for entry in held)
    )


def _unfinished(policy: Policy, current: Sequence[Held]) -> list[Version]:
    """Writes that some strip has and another one lacks that they touch, ascending.

    All touch the parity. So does the one that a strip knows only because it was brought level with it; what it touched
    besides another strip tells.
    """
    parity = (1 << policy.strips) - (1 << policy.data)
    newest: dict[int, Version] = {}
    writes: dict[Version, int] = {}
    for entry in current:
        newest[entry.strip] = max(entry.version, newest.get(entry.strip, entry.version))
        for version, touched in entry.writes():
            writes[version] = writes.get(version, NO_STRIPS) | touched
    return sorted(
        version
        for version, touched in writes.items()
        if any((touched | parity) >> strip & 1 and has < version for strip, has in newest.items())
    )


def _hidden(policy: Policy, current: Sequence[Held]) -> list[Version]:
    """As `_unfinished`, and what shows when the first of these is undone: an agreement that did not get everywhere
    hides a write that it had undone where it got."""
    found = _unfinished(policy, current)
    deeper = found
    while deeper:
        current = [before for entry in current if (before := entry.trimmed(deeper[0])) is not None]
        deeper = _unfinished(policy, current)
        found = deeper + found
    return found


def _fitting(
    policy: Policy,
    real: Sequence[Held],
    current: Sequence[Held],
    sure: Sequence[Held],
    proven: Sequence[Held],
    cut: Version | None,
) -> list[tuple[Held, Version]]:
    """The strips that make up one state of the object, before the write `cut`, each with its version there."""
    parity = [(state, entry) for entry in current if entry.strip >= policy.data and (state := entry.before(cut))]
    newest = max((state for state, _ in parity), default=NO_VERSION)
    least = max((state for entry in proven if (state := entry.before(cut))), default=NO_VERSION)
    if not parity or newest < least:  # without one that tells all writes, only equal versions are surely one state
        version = max((entry.version for entry in current), default=NO_VERSION)
        equal = [(entry, version) for entry in sure if entry.version == version and cut is None]
        if not parity or len({entry.strip for entry, _ in equal}) >= policy.data or _knows_write(current, newest, cut):
            return equal
    teller = max((entry for state, entry in parity if state == newest), key=lambda entry: len(entry.steps))
    base, had, last = newest, {newest}, dict[int, Version]()
    for version, touched in teller.writes():
        if version > newest:
            continue
        had.add(version)
        for strip in range(policy.strips):
            if touched >> strip & 1:
                last.setdefault(strip, version)
    if teller.steps and teller.steps[-1].before < newest:
        base = teller.steps[-1].before
        had.add(base)
    found = []
    for entry in real:
        state = entry.before(cut)
        if state is not None and state in had and state >= last.get(entry.strip, base):
            found.append((entry, state))
    return found


def _knows_write(current: Sequence[Held], since: Version, cut: Version | None) -> bool:
    """Some strip knows of a write behind `since`, before the cut, or of an agreement."""
    return any(
        touched != NO_STRIPS and version > since and (cut is None or version < cut)
        for entry in current
        for version, touched in entry.writes()
    )


def _passed_over(
    policy: Policy, good: Sequence[tuple[Held, Version]], real: Sequence[Held], cut: Version | None
) -> tuple[Version, ...]:
    """Writes before the cut that some strip has and the parity of the state never had: an agreement undid them where it
    got, and is undone itself."""
    parity = [(state, len(entry.steps), entry) for entry, state in good if entry.strip >= policy.data]
    if not parity:
        return ()
    newest, _, teller = max(parity, key=lambda one: one[:2])
    had = {version for version, _ in teller.writes()}
    base = teller.steps[-1].before if teller.steps else newest
    found = {version for entry in real for version, touched in entry.writes() if touched not in (NO_STRIPS, ALL_STRIPS)}
    return tuple(sorted(one for one in found - had if one > base and (cut is None or one < cut)))


def _newest(data: Sequence[tuple[Held, Version]]) -> list[tuple[Held, Version]]:
    """Of each strip the one that was current last."""
    best: dict[int, tuple[Held, Version]] = {}
    for entry, state in sorted(data, key=lambda pair: (pair[0].as_of, pair[1])):
        best[entry.strip] = entry, state
    return [best[strip] for strip in sorted(best)]


def _arrange(
    oid: ObjectId,
    policy: Policy,
    state: _State,
    held: Sequence[Held],
    replicas: tuple[int, ...],
) -> StripDecision:
    """Good strips stay on replicas that hold them; the other replicas get what is missing."""
    good = [entry for entry, _ in state.strips]
    state_of = {(entry.member, entry.strip): version for entry, version in state.strips}
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
    old = [entry for entry in held if entry.version != NO_VERSION and (entry.member, entry.strip) not in state_of]
    wanted = {state_of[entry.member, entry.strip] for entry in used}
    equal = len(wanted) == 1 and all(entry.version in wanted for entry in used)
    return StripDecision(
        oid,
        policy,
        wanted.pop() if equal else NO_VERSION,
        tuple(layout),
        holders=tuple((entry.strip, entry.member) for entry in used) if equal else (),
        agree=()
        if equal
        else tuple((entry.strip, entry.member, state_of[entry.member, entry.strip]) for entry in used),
        missing=tuple(missing),
        surplus=surplus,
        stale=tuple(dict.fromkeys(entry.member for entry in old)),
        cut=state.cut,
        half_done=state.half_done,
    )


def _keep(policy: Policy, good: Sequence[Held], replicas: tuple[int, ...]) -> tuple[list[int], dict[int, Held]]:
    """Each replica keeps one good strip: the one that belongs there if it can, and no strip is kept twice."""
    layout = [NOBODY] * policy.strips
    kept: dict[int, Held] = {}
    place_of = {member: place for place, member in enumerate(replicas)}

    def order(entry: Held) -> tuple[bool, int, int]:
        place = place_of[entry.member]
        return place != entry.strip, place, entry.strip

    for entry in sorted((entry for entry in good if entry.member in place_of), key=order):
        if entry.strip not in kept and entry.member not in layout:
            kept[entry.strip] = entry
            layout[entry.strip] = entry.member
    return layout, kept

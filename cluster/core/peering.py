"""Peering: after an epoch change each home learns what everybody holds, and decides which copies are current.

Every member tells every home the copies it holds of that home's objects, with the newest epoch in which each was
known to be current (`as_of`), and the epoch up to which its holdings are complete (`complete`): an object that it
should have held then and does not list was deleted.

 as_of of a copy     continuing member, copy settled in the epoch before: that epoch
                     otherwise: the epoch of its last settling, or of the copy's last write if that is later
                     (a write is only ever applied to a current copy)
 best copy           the highest (as_of, version): its version is what all replicas must have
 lacking             a member that was told that it has no current copy says so, as of that epoch, without a version
 blind               a member whose current copy went bad (full or lost disk) knows nothing of it up to that epoch
 deleted             some member, complete beyond all those epochs, was a replica then and has no copy
 superseded          in an epoch after the best copy's as_of all of the object's replicas were nodes that are away now:
                     they may have written it, so nothing here can be trusted until one of them is back (core.past)
 unsettled           a copy may have a write that was under way when the epoch ended. Copies of nodes that are away may
                     lack it, so nobody reads it before all replicas have it: those that are given the object only now
                     would witness, once the others are gone, that nothing happened to it
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from struct import Struct
from typing import NamedTuple

from sheepdog.cluster.core.erasure import Policy
from sheepdog.cluster.core.errors import PeerError
from sheepdog.cluster.core.ids import NO_VERSION, STRIP_SHIFT, ObjectId, Version, plain_oid, strip_index, strip_of
from sheepdog.cluster.core.limits import INVENTORY_PART_ENTRIES
from sheepdog.cluster.core.messages import Buffer, Flag, Kind, Message
from sheepdog.cluster.core.origins import Origin, decode_origins
from sheepdog.cluster.core.past import Former, Past
from sheepdog.cluster.core.placement import Placement
from sheepdog.cluster.core.strip_peering import NEVER, Held, StripDecision
from sheepdog.cluster.core.strip_peering import decide as decide_strips
from sheepdog.cluster.core.strip_undo import Step

PolicyOf = Callable[[ObjectId], Policy | None]
_ENTRY = Struct("<QIIQIBB2x")
_OIDS = Struct("<QB")
_OID_MASK = (1 << STRIP_SHIFT) - 1
_MEMBERS = Struct("<H")
_KNOWN = Struct("<I")
FIRM, UNDOABLE, BLIND, UNSURE, UNSETTLED = 1, 2, 3, 4, 5
_NOBODY_BLIND: Mapping[int, int] = {}
NO_MEMBER = 0xFFFF  # in a list of members by strip: nobody has it


class Holding(NamedTuple):
    """One copy in an inventory; or, with `earlier`, a step by which the strip listed before it came to its version.

    Of a step `version` is where it began, `as_of` the strips that it touched, a bit each. BLIND is neither: the
    member's copy was current and went bad, so that it does not know what was written up to the epoch `as_of`. UNSURE:
    the copy was being made when the member ended, by then the epoch was `as_of`; the object may be gone since long.
    UNSETTLED: the member's copy may have a write that was not on all replicas; all were proven equal in `as_of`.
    """

    oid: ObjectId
    version: Version
    as_of: int
    earlier: int = 0  # 0: a copy; FIRM: a step that cannot be gone back; UNDOABLE: one that can; BLIND and so on


class Decision(NamedTuple):
    """What a home decided for one object that is not simply equal everywhere."""

    oid: ObjectId
    version: Version  # NO_VERSION: deleted, or lost
    sources: tuple[int, ...]  # members with that version
    missing: tuple[int, ...]  # replicas without it
    surplus: tuple[int, ...]  # holders that are no replicas, or of a deleted object
    stale: tuple[int, ...] = ()  # those of `missing` that hold another version
    known: int = 0  # of a lost object: the newest epoch in which it is known to have existed
    unsettled: bool = False  # what the sources have may be more than nodes that are away know of

    def known_of(self, member: int, oid: ObjectId) -> int:
        """What a member is told of a lost copy: in which epoch the object existed."""
        return self.known

    def lacking(self) -> list[tuple[int, ObjectId]]:
        """(member, id) of the copies that must not be read until recovery says so."""
        return [(member, self.oid) for member in self.missing]

    def unequal(self) -> list[tuple[int, ObjectId]]:
        """(member, id) of current copies that must be asked for through the home, which lets reads wait."""
        return [(member, self.oid) for member in self.sources] if self.stale or self.unsettled else []

    def surplus_copies(self) -> list[tuple[int, ObjectId]]:
        return [(member, self.oid) for member in self.surplus]

    def undecided(self) -> list[tuple[int, ObjectId]]:
        """(member, id) of strips that have yet to become one version with others, or that others are made from."""
        return []

    @property
    def is_lost(self) -> bool:
        return self.version == NO_VERSION and bool(self.missing)

    @property
    def needs_recovery(self) -> bool:
        return self.version != NO_VERSION and bool(self.missing)


class Verdict(NamedTuple):
    """What a home tells a member at the end of peering."""

    missing: list[ObjectId]  # it has no current copy of these; another member has
    lost: list[tuple[ObjectId, int]]  # nobody here has; known to have existed in that epoch, 0: in none
    unequal: list[ObjectId]  # its copy is current, but another replica has an older one yet
    undecided: list[ObjectId]  # StripDecision.undecided
    complete: bool  # the home knows of all its objects that exist

    def encode(self, fence: int) -> Message:
        return Message(
            Kind.SETTLE,
            fence,
            offset=len(self.missing),
            length=len(self.lost),
            sequence=len(self.unequal),
            flags=Flag.COMPLETE if self.complete else 0,
            body=encode_oids([*self.missing, *(oid for oid, _ in self.lost), *self.unequal, *self.undecided])
            + b"".join([_KNOWN.pack(known) for _, known in self.lost]),
        )

    @classmethod
    def decode(cls, message: Message) -> Verdict:
        assert not isinstance(message.body, list)
        body, end = memoryview(message.body), len(message.body) - _KNOWN.size * message.length
        if end < 0:
            raise PeerError("verdict of odd length")
        oids, known = decode_oids(body[:end]), [one for (one,) in _KNOWN.iter_unpack(body[end:])]
        missing, lost = message.offset, message.offset + message.length
        unequal = lost + message.sequence
        if len(oids) < unequal:
            raise PeerError("verdict of odd length")
        return cls(
            oids[:missing],
            list(zip(oids[missing:lost], known, strict=True)),
            oids[lost:unequal],
            oids[unequal:],
            bool(message.flags & Flag.COMPLETE),
        )


def add_verdicts(verdicts: Sequence[Verdict], decision: Decision | StripDecision) -> None:
    """What the members, in their order, are told of a decision."""
    for member, oid in decision.lacking():
        if decision.is_lost:
            verdicts[member].lost.append((oid, decision.known_of(member, oid)))
        else:
            verdicts[member].missing.append(oid)
    for member, oid in decision.unequal():
        verdicts[member].unequal.append(oid)
    for member, oid in decision.undecided():
        verdicts[member].undecided.append(oid)


def encode_holdings(holdings: Sequence[Holding]) -> bytes:
    """Bytes of one part: 32 a copy (oid, version, as_of, strip + 1, earlier)."""
    pack = _ENTRY.pack
    return b"".join(
        [
            pack(oid & _OID_MASK, *version, as_of, oid >> STRIP_SHIFT, earlier)
            for oid, version, as_of, earlier in holdings
        ]
    )


def decode_holdings(body: Buffer) -> list[Holding]:
    if len(body) % _ENTRY.size:
        raise PeerError("inventory of odd length")
    return [
        Holding(ObjectId(oid | strip << STRIP_SHIFT), Version(epoch, term, counter), as_of, earlier)
        for oid, epoch, term, counter, as_of, strip, earlier in _ENTRY.iter_unpack(body)
    ]


def encode_oids(oids: Iterable[ObjectId]) -> bytes:
    return b"".join([_OIDS.pack(oid & _OID_MASK, oid >> STRIP_SHIFT) for oid in oids])


def decode_oids(body: Buffer) -> list[ObjectId]:
    if len(body) % _OIDS.size:
        raise PeerError("list of objects of odd length")
    return [ObjectId(oid | strip << STRIP_SHIFT) for oid, strip in _OIDS.iter_unpack(body)]


def encode_members(members: Iterable[int]) -> bytes:
    return b"".join([_MEMBERS.pack(member) for member in members])


def decode_members(body: Buffer, count: int) -> list[int]:
    """Indexes of members of an epoch with `count` of them; NO_MEMBER stays as it is."""
    if len(body) % _MEMBERS.size:
        raise PeerError("list of members of odd length")
    members = [member for (member,) in _MEMBERS.iter_unpack(body)]
    if any(member >= count and member != NO_MEMBER for member in members):
        raise PeerError("unknown member")
    return members


def parts(holdings: Sequence[Holding]) -> list[bytes]:
    """The bodies of the messages that carry an inventory; at least one."""
    step = INVENTORY_PART_ENTRIES
    return [encode_holdings(holdings[start : start + step]) for start in range(0, max(len(holdings), 1), step)]


class Inventories:
    """What the members told this home, until all have."""

    def __init__(self, members: int) -> None:
        self._holdings: list[list[Holding]] = [[] for _ in range(members)]
        self.complete = [0] * members
        self._ended = [False] * members
        self._parts: list[int] = [0] * members
        self._origins: list[list[Origin]] = [[] for _ in range(members)]
        self._unsettled: dict[tuple[ObjectId, int], None] = {}  # copies or strips, and their members
        self._unsure: dict[tuple[ObjectId, int], int] = {}  # as_of of what may never have been, by object and member
        self._blind: dict[ObjectId, dict[int, int]] = {}  # by object and member: up to which epoch

    def add(self, member: int, index: int, body: Buffer, complete: int, flags: int) -> None:
        """One part; parts come in order, and again after a broken link."""
        if index < self._parts[member]:
            return
        self._parts[member] = index + 1
        if flags & Flag.ORIGINS:
            self._origins[member].extend(decode_origins(body))
        else:
            self._holdings[member].extend(decode_holdings(body))
        last = bool(flags & Flag.LAST)
        self.complete[member] = complete
        self._ended[member] = self._ended[member] or last

    def all_here(self) -> bool:
        return all(self._ended)

    def missing_members(self) -> list[int]:
        return [member for member, ended in enumerate(self._ended) if not ended]

    def decide(
        self, placement: Placement, former: Former, past: Past, policy_of: PolicyOf
    ) -> list[Decision | StripDecision]:
        """Decisions for all objects whose copies are not equal and exactly where they belong."""
        knows_all = past.knows_all(self.complete)
        copies: dict[ObjectId, list[tuple[int, Version, int]]] = {}
        strips: dict[ObjectId, list[Held]] = {}
        for member, holdings in enumerate(self._holdings):
            for oid, version, as_of, earlier in holdings:
                if earlier == BLIND:
                    blind = self._blind.setdefault(plain_oid(oid), {})
                    blind[member] = max(as_of, blind.get(member, 0))
                    continue
                if earlier == UNSETTLED:
                    self._unsettled[oid, member] = None
                    continue
                if earlier == UNSURE:
                    earlier = 0
                    if knows_all:  # then it exists only if somebody here has it
                        as_of = NEVER
                    self._unsure[oid, member] = as_of
                if not oid >> STRIP_SHIFT:
                    copies.setdefault(oid, []).append((member, version, as_of))
                elif earlier:
                    last = strips[plain_oid(oid)]
                    last[-1].steps.append(Step(version, as_of, earlier == UNDOABLE))
                else:
                    strips.setdefault(plain_oid(oid), []).append(Held(member, strip_index(oid), version, as_of, []))
        decisions: list[Decision | StripDecision] = []
        facts = _Facts(self, placement, former, past, strips)
        for oid in sorted(strips):
            policy = policy_of(oid)
            if policy is not None:
                decision = decide_strips(oid, policy, strips[oid], placement.replicas(oid), facts)
                if decision is not None:
                    decisions.append(decision._replace(unsettled=self._is_unsettled(decision, strips[oid])))
        for oid in sorted(copies):
            held = copies[oid]
            replicas = placement.replicas(oid)
            version = held[0][1]
            if (
                len(held) == len(replicas)
                and version != NO_VERSION
                and all(entry[1] == version for entry in held)
                and all(entry[0] in replicas for entry in held)
                and not past.superseded(
                    oid, max(entry[2] for entry in held), blind=self.blind(oid), holders=[entry[0] for entry in held]
                )
            ):
                continue
            decisions.append(self._decide_one(oid, held, replicas, placement, former, past))
        return decisions

    def _is_unsettled(self, decision: StripDecision, held: Sequence[Held]) -> bool:
        """As of a copy, where those that are away may be enough to decode."""
        if not decision.missing or decision.policy.parity < decision.policy.data:
            return False
        return any((strip_of(decision.oid, one.strip), one.member) in self._unsettled for one in held)

    def blind(self, oid: ObjectId) -> Mapping[int, int]:
        """By member: up to which epoch it cannot tell what happened to the object (once `decide` has begun)."""
        return self._blind.get(oid, _NOBODY_BLIND)

    def known(self, said: Iterable[tuple[ObjectId, int, int]]) -> int:
        """The newest epoch of what was said for sure: (copy or strip, member, as of which epoch)."""
        return max((as_of for oid, member, as_of in said if self._unsure.get((oid, member)) != as_of), default=0)

    def origins_of(self, decision: StripDecision) -> list[Origin]:
        """The writes that the agreed state of the object contains."""
        return list(
            dict.fromkeys(
                origin
                for member, origins in enumerate(self._origins)
                if decision.is_of(member)
                for origin in origins
                if origin.oid == decision.oid and decision.contains(origin.version)
            )
        )

    def contained(self, decisions: Sequence[Decision | StripDecision]) -> dict[tuple[int, int], None]:
        """(gateway, number) of the writes that the objects contain, as decided: they must not be done again.

        The origins that a member tells are those of its own copy, so they count if that is the current one. Of strips
        that come to one state, those count that it contains, but not what a strip tells that is left out: it may be the
        only one that had it. Of an object that is gone, those of members that know it is: what the others still hold
        may be of a creation that never was done.
        """
        asked = dict.fromkeys(origin.oid for origins in self._origins for origin in origins)
        if not asked:
            return {}
        decided = {decision.oid: decision.version for decision in decisions if decision.oid in asked}
        agreed = {one.oid: one for one in decisions if isinstance(one, StripDecision) and one.agree}
        lost = {decision.oid for decision in decisions if decision.is_lost}  # nobody knows what comes back
        held: list[dict[ObjectId, list[Version]]] = [{} for _ in self._holdings]
        for member, holdings in enumerate(self._holdings):
            for oid, version, _, earlier in holdings:
                if plain_oid(oid) in asked and not earlier and version != NO_VERSION:
                    held[member].setdefault(plain_oid(oid), []).append(version)
        found: dict[tuple[int, int], None] = {}
        for member, origins in enumerate(self._origins):
            for oid, number, gateway, version in origins:
                if oid in lost:
                    continue
                if oid in agreed:
                    if agreed[oid].is_of(member) and agreed[oid].contains(version):
                        found[gateway, number] = None
                    continue
                current = decided.get(oid)
                if current is None:  # equal wherever it is, or nowhere at all
                    current = next((versions[oid][0] for versions in held if oid in versions), None)
                holding = held[member].get(oid, ())
                if current in holding or (current == NO_VERSION and not holding):
                    found[gateway, number] = None
        return found

    def _decide_one(
        self,
        oid: ObjectId,
        held: list[tuple[int, Version, int]],
        replicas: tuple[int, ...],
        placement: Placement,
        former: Former,
        past: Past,
    ) -> Decision:
        real = [(as_of, version) for _, version, as_of in held if version != NO_VERSION]
        best_as_of, best = max(real, default=(0, NO_VERSION))
        holders = {member for member, _, _ in held}
        known = max(as_of for _, _, as_of in held)
        if known == NEVER or self.deleted(oid, known, holders, placement, former):
            return Decision(oid, NO_VERSION, (), (), tuple(sorted(holders)))
        have = [member for member, version, _ in held if version != NO_VERSION]
        if best == NO_VERSION or past.superseded(oid, best_as_of, blind=self.blind(oid), holders=have):
            known = self.known((oid, member, as_of) for member, _, as_of in held)
            return Decision(oid, NO_VERSION, (), replicas, (), known=known)
        sources = tuple(member for member, version, _ in held if version == best)
        missing = tuple(member for member in replicas if member not in sources)
        surplus = tuple(sorted(member for member in holders if member not in replicas))
        stale = tuple(member for member, version, _ in held if version not in (best, NO_VERSION) and member in replicas)
        unsettled = bool(missing) and any((oid, member) in self._unsettled for member in sources)
        return Decision(oid, best, sources, missing, surplus, stale, unsettled=unsettled)

    def deleted(self, oid: ObjectId, known: int, holders: set[int], placement: Placement, former: Former) -> bool:
        """Some member that would have the object, had it lived on after epoch `known`, has none."""
        for member, complete in enumerate(self.complete):
            if member in holders or complete <= known:
                continue
            then = former(complete)
            if then is None:
                continue
            index = then.index_of.get(placement.nodes[member])
            if index is not None and index in then.replicas(oid):
                return True
        return False


class _Facts:
    """`strip_peering.Facts` of one home."""

    def __init__(
        self,
        inventories: Inventories,
        placement: Placement,
        former: Former,
        past: Past,
        strips: Mapping[ObjectId, Sequence[Held]],
    ) -> None:
        self._inventories = inventories
        self._placement = placement
        self._former = former
        self._past = past
        self._strips = strips

    def deleted(self, oid: ObjectId, as_of: int, holders: set[int]) -> bool:
        return self._inventories.deleted(oid, as_of, holders, self._placement, self._former)

    def known(self, oid: ObjectId, held: Sequence[Held]) -> int:
        return self._inventories.known((strip_of(oid, one.strip), one.member, one.as_of) for one in held)

    def superseded(self, oid: ObjectId, as_of: int, least: int) -> bool:
        holders = [entry.member for entry in self._strips[oid] if entry.version != NO_VERSION]
        return self._past.superseded(oid, as_of, least, self._inventories.blind(oid), holders=holders)

    def was_replica(self, oid: ObjectId, member: int, epoch: int) -> bool:
        then = self._former(epoch)
        if then is None:
            return False
        index = then.index_of.get(self._placement.nodes[member])
        return index is not None and index in then.replicas(oid)

    def restarted(self, member: int, epoch: int) -> bool:
        then = self._former(epoch)
        now = self._placement.members[member]
        index = None if then is None else then.index_of.get(now.id)
        return then is not None and index is not None and then.members[index].incarnation != now.incarnation

    def never_stored(self, oid: ObjectId, epoch: int, holders: set[int]) -> bool:
        return any(
            member not in holders
            and self._remembers(member, epoch)
            and all(self.was_replica(oid, member, then) for then in range(epoch, self._placement.epoch))
            for member in range(len(self._placement.nodes))
        )

    def _remembers(self, member: int, epoch: int) -> bool:
        """The member's disks are those that it had in `epoch`, all of them."""
        if not self._past.remembers(self._placement.nodes[member], epoch):
            return False
        if self._inventories.complete[member]:
            return True
        then = self._former(epoch)
        now = self._placement.members[member]
        index = then.index_of.get(now.id) if then is not None else None
        return then is not None and index is not None and then.members[index].incarnation == now.incarnation

"""What recovery knows of one object that is not clean: whole copies, or strips."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.erasure import Policy
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import NO_VERSION, ObjectId, Version, strip_of
from sheepdog.cluster.core.messages import Buffer, Flag, Kind, Message
from sheepdog.cluster.core.peering import NO_MEMBER, Decision, encode_members
from sheepdog.cluster.core.ports import Timer
from sheepdog.cluster.core.strip_peering import NOBODY, StripDecision

if TYPE_CHECKING:
    from sheepdog.cluster.core.strip_home import StripHome


class Job:
    """An object kept as whole copies."""

    __slots__ = (
        "again",
        "agree",
        "as_is",
        "ended",
        "failures",
        "gone",
        "noted",
        "oid",
        "refusal",
        "repair",
        "running",
        "skipped",
        "sources",
        "stale",
        "surplus",
        "targets",
        "urgent",
        "version",
        "waiting",
        "when_noted",
        "witnesses",
    )

    def __init__(self, oid: ObjectId, version: Version = NO_VERSION) -> None:
        self.oid = oid
        self.version = version
        self.sources: list[int] = []
        self.targets: dict[int, bool] = {}  # member -> a pull is under way
        self.surplus: list[tuple[int, ObjectId]] = []
        self.stale: dict[int, None] = {}  # targets that still have an older copy as if it were good
        self.repair: dict[int, None] = {}  # targets whose bytes are not to be trusted
        self.gone: dict[int, None] = {}  # targets whose disk takes nothing: what is left there is not the object
        self.agree: dict[tuple[int, int], bool] = {}  # (strip, member) that must become this version first: under way
        self.waiting: list[Callable[[], None]] = []
        self.ended: list[tuple[Callable[[int], None], Version]] = []  # told once: restored everywhere, or why not
        self.running = False
        self.again: Timer | None = None  # it failed, and is tried again then
        self.failures = 0
        self.refusal = 0  # what changes are answered while a target takes nothing: NO_SPACE, EIO; 0: they wait
        self.skipped = False  # a node shall not be filled by recovery: waits, until a client needs the object
        self.urgent = False  # a client did when the pulls under way were sent
        self.as_is = False  # what can be read is one state, though parts of it lack its version (core.refusals)
        # Targets that would vouch, were the sources gone, that nothing happened to the object: then a write that nodes
        # which are away lack would be taken back.
        self.witnesses: dict[int, None] = {}
        self.noted = False  # what lacks a write is known as that (core.bad_strips); then `when_noted` is called
        self.when_noted: list[Callable[[], None]] = []

    @classmethod
    def of(cls, decision: Decision) -> Job:
        job = cls(decision.oid, decision.version)
        job.sources = list(decision.sources)
        job.targets = dict.fromkeys(decision.missing, False)
        job.surplus = decision.surplus_copies()
        job.stale = dict.fromkeys(decision.stale)
        job.witnesses = dict.fromkeys(decision.missing if decision.unsettled else ())
        return job

    @property
    def full(self) -> bool:
        """It could not be restored for want of space."""
        return self.refusal == Result.NO_SPACE

    @property
    def rank(self) -> int:
        """How many may be lost before the object is: the smallest is restored first."""
        return len(self.sources)

    @property
    def may_wait(self) -> bool:
        """One copy is missing altogether, the others are current."""
        return len(self.targets) == 1 and not self.stale and not self.repair

    def essential(self, replicas: Sequence[int]) -> list[int]:
        """Members without which nothing current would be left."""
        holders = [member for member in self.sources or replicas if member not in self.targets]
        return holders if len(holders) == 1 else []

    def holds_read(self, me: int) -> bool:
        """A read must wait: for the home's own copy, and until no replica has an older one (see Recovery.holds)."""
        return me in self.targets or bool(self.stale or self.witnesses)

    def mark_noted(self) -> None:
        """What lacks a write of the object counts no more, whatever comes; or there is nothing that can be done."""
        self.noted = True
        calls, self.when_noted = self.when_noted, []
        for call in calls:
            call()

    def copy_on(self, member: int) -> ObjectId:
        return self.oid

    def suspect(self, member: int) -> None:
        """The copy there is not right any more."""
        self.targets.setdefault(member, False)
        self.repair[member] = None
        self.stale.pop(member, None)
        self.sources = [source for source in self.sources if source != member]

    def finished(self) -> None:
        """All is equal again."""

    def find_sources(self, context: Context) -> bool:
        """A suspected copy can be restored, no write is on its way; False if nothing is left to restore from.

        The version stays open (NO_VERSION) where the home itself has no copy: `questions` find it out.
        """
        self.sources = [member for member in context.placement.replicas(self.oid) if member not in self.targets]
        suspected = context.placement.me in self.targets
        self.version = NO_VERSION if suspected else context.store.version(self.oid) or NO_VERSION
        return bool(self.sources)

    @property
    def hopeless(self) -> bool:
        """Nothing is left to restore from."""
        return not self.sources

    def questions(self) -> list[tuple[int, ObjectId]]:
        """(member, id) of the copies whose versions tell what the object is."""
        return [(member, self.oid) for member in self.sources]

    def learn(self, found: dict[int, Version]) -> bool:
        """Versions by member: the newest counts, no write is on its way. False if nobody has any."""
        self.version = max(found.values(), default=NO_VERSION)
        for member in list(self.sources):
            if found.get(member, NO_VERSION) != self.version:
                self.suspect(member)
        return self.version != NO_VERSION

    def cut(self) -> Version | None:
        """The first write that has to be taken back before anything can be restored."""
        return None

    def order(self, me: int) -> list[int]:
        """Whom to restore now: the home's own copy first, it serves the others' requests."""
        return [me] if me in self.targets else list(self.targets)

    def pull(self, target: int, fence: int) -> Message:
        witness = Flag.WITNESS if target in self.witnesses else 0
        return self._pull(target, fence, encode_members(self.sources), witness)

    def _pull(self, target: int, fence: int, sources: bytes, flags: int = 0) -> Message:
        self.urgent = bool(self.waiting)
        flags |= (Flag.REPAIR if target in self.repair else 0) | (Flag.URGENT if self.urgent else 0)
        return Message(Kind.PULL, fence, oid=self.copy_on(target), version=self.version, flags=flags, body=sources)

    def no_space(self, target: int) -> None:
        """It could not be restored for want of space. A full disk shall keep nobody from reading."""
        self.stale.pop(target, None)  # the attempt has spoilt it
        self.witnesses.pop(target, None)  # nor does it vouch for anything (Flag.WITNESS)

    def restored(self, target: int) -> None:
        del self.targets[target]
        self.repair.pop(target, None)
        self.witnesses.pop(target, None)
        self.stale.pop(target, None)
        self.sources.append(target)


class StripJob(Job):
    """An erasure-coded object. `holders`: member by strip, of those that can be read."""

    __slots__ = ("_layout", "_origins", "_policy", "_states", "_strips", "holders")

    def __init__(self, oid: ObjectId, policy: Policy, strips: StripHome) -> None:
        super().__init__(oid)
        self._policy = policy
        self._strips = strips
        self._layout: Sequence[int] = strips.layout(oid, policy)
        self._states: dict[int, Version] = {}  # by strip: what it goes back to before it gets the new version
        self._origins: Buffer = b""  # of the writes that the agreed state contains
        self.holders: dict[int, int] = {strip: member for strip, member in enumerate(self._layout) if member != NOBODY}

    @classmethod
    def decided(cls, decision: StripDecision, strips: StripHome, version: Version, origins: Buffer) -> StripJob:
        """`version` is new where strips agree; `origins`: the writes that the agreed state contains."""
        job = cls(decision.oid, decision.policy, strips)
        job.version = version
        job.noted = True  # those that lack something have heard it with the verdict
        job._origins = origins
        job._layout = decision.layout
        job.holders = dict(decision.holders)
        job.targets = dict.fromkeys(decision.missing, False)
        job.agree = dict.fromkeys([entry[:2] for entry in decision.agree], False)
        job._states = {strip: state for strip, _, state in decision.agree}
        job.surplus = decision.surplus_copies()
        job.stale = dict.fromkeys(decision.stale)
        job.witnesses = dict.fromkeys(decision.missing if decision.unsettled else ())
        return job

    @property
    def rank(self) -> int:
        return self._usable - self._policy.data

    @property
    def may_wait(self) -> bool:
        return len(self.holders) >= self._policy.strips - 1 and not (self.agree or self.stale or self.repair)

    def essential(self, replicas: Sequence[int]) -> list[int]:
        if self.rank > 0:
            return []
        return list(dict.fromkeys([*self.holders.values(), *(member for _, member in self.agree)]))

    def holds_read(self, me: int) -> bool:
        if bool(self.agree or self.stale or self.witnesses) and not (self.as_is or self._is_firm()):
            return True
        undecided = self.version == NO_VERSION or not self.noted  # what was read must not be taken back
        return undecided or len(self.holders) < self._policy.data

    def _is_firm(self) -> bool:
        """Some strips have no space for the object's version; of those that have it one stays, whatever is lost."""
        agreed = self.holders.keys() - {strip for strip, _ in self.agree}
        return self.full and not self.stale and len(agreed) > self._policy.parity

    def copy_on(self, member: int) -> ObjectId:
        return strip_of(self.oid, self._layout.index(member))

    def suspect(self, member: int) -> None:
        super().suspect(member)
        self.holders = {strip: holder for strip, holder in self.holders.items() if holder != member}

    def find_sources(self, context: Context) -> bool:
        self.version = self._strips.last_version(self.oid, self._policy) or NO_VERSION
        self._take_as_is()
        return len(self.holders) >= self._policy.data

    def _take_as_is(self) -> None:
        """Strips that lack nothing but a version are one state with the others, and then all get a common one."""
        for strip in self._strips.refusals.known(self.oid):
            if self._layout[strip] != NOBODY:
                self.suspect(self._layout[strip])
        uneven = self._strips.refusals.uneven(self.oid)
        self.as_is = bool(uneven) and len(self.holders) + len(uneven) >= self._policy.data
        if self.as_is:
            self.version = NO_VERSION
            self._are_right(uneven)

    def _are_right(self, strips: Sequence[int]) -> None:
        """Nothing of these has to be made anew."""
        for strip in strips:
            member = self.holders[strip] = self._layout[strip]
            self.targets.pop(member, None)
            self.repair.pop(member, None)

    def strips(self) -> list[tuple[int, int]]:
        """(strip, member) of all that there should be here."""
        return [(strip, member) for strip, member in enumerate(self._layout) if member != NOBODY]

    def able_to_go_back(self, cut: Version) -> list[tuple[int, int]]:
        """(strip, member) of those that then have all that is before the write `cut`: the others lack some of that, and
        stay bad. `cut` counts on one at least."""
        refusals = self._strips.refusals
        return [(strip, member) for strip, member in self.strips() if not refusals.lacks_before(self.oid, strip, cut)]

    def cut(self) -> Version | None:
        refusals = self._strips.refusals
        known = refusals.known(self.oid)
        counted = [strip for strip, member in self.strips() if strip in known or member not in self.repair]
        return refusals.cut(self.oid, self._policy.data, counted)

    def taken_back(self, cut: Version, failed: Sequence[int]) -> list[Callable[[int], None]]:
        """The write `cut` is, and all behind it, but on the strips `failed`; returns who waits for one of those."""
        for strip in failed:
            self.suspect(self._layout[strip])
        self._are_right(self._strips.refusals.taken_back(self.oid, cut, failed))
        over = [ended for ended, version in self.ended if version >= cut]
        self.ended = [entry for entry in self.ended if entry[1] < cut]
        self.running = False
        self.refusal = 0
        self._strips.levels.void(self.oid, self.strips())
        return over

    def choose(self) -> None:
        """What the holders are is read from now on."""
        self._strips.refusals.stay(self.oid)

    def finished(self) -> None:
        self._strips.refusals.forget(self.oid)

    @property
    def hopeless(self) -> bool:
        return self._usable < self._policy.data

    @property
    def _usable(self) -> int:
        """Strips that can be read, or could be before they are brought to one state."""
        return len({*self.holders, *(strip for strip, _ in self.agree)})

    def questions(self) -> list[tuple[int, ObjectId]]:
        return [(member, strip_of(self.oid, strip)) for strip, member in self.holders.items()]

    def learn(self, found: dict[int, Version]) -> bool:
        """The newest version that enough strips have; a new one for strips that are taken as they are."""
        if self.as_is:
            return self._learn_as_is(found)
        versions = [found.get(member, NO_VERSION) for member in self.holders.values()]
        enough = [one for one in versions if one != NO_VERSION and versions.count(one) >= self._policy.data]
        self.version = max(enough, default=NO_VERSION)
        for member in list(self.holders.values()):
            if found.get(member, NO_VERSION) != self.version:
                self.suspect(member)
        return self.version != NO_VERSION

    def _learn_as_is(self, found: dict[int, Version]) -> bool:
        gone = [strip for strip, member in self.holders.items() if found.get(member, NO_VERSION) == NO_VERSION]
        if gone:
            for strip in gone:
                self._strips.refusals.useless(self.oid, strip)
            self._take_as_is()
        if not self.as_is or any(member not in found for member in self.holders.values()):
            return False
        self.version = self._strips.next_version()
        self._states = {strip: found[member] for strip, member in self.holders.items()}
        self.agree = dict.fromkeys(self.holders.items(), False)
        return True

    def order(self, me: int) -> list[int]:
        return list(self.targets)

    def pull(self, target: int, fence: int) -> Message:
        sources = [self.holders.get(strip, NO_MEMBER) for strip in range(self._policy.strips)]
        return self._pull(target, fence, encode_members(sources))

    def agreement(self, strip: int, fence: int) -> Message:
        """ROLLBACK of one strip; AS_IS: it goes back behind nothing, and contains what it did."""
        epoch, term, counter = self._states[strip]
        return Message(
            Kind.ROLLBACK,
            fence,
            oid=strip_of(self.oid, strip),
            offset=epoch,
            length=term,
            sequence=counter,
            version=self.version,
            flags=Flag.AS_IS if self.as_is else 0,
            body=self._origins,
        )

    def agreed(self, strip: int, member: int, success: bool) -> None:
        """One that could not is rebuilt if the strip belongs there."""
        del self.agree[strip, member]
        if success:
            self.holders[strip] = member
            return
        self.holders.pop(strip, None)
        if self._layout[strip] == member:
            self.targets[member] = False
            self.repair[member] = None

    def no_space(self, target: int) -> None:
        self.stale.pop(target, None)  # what else there is to it: `_is_firm`

    def restored(self, target: int) -> None:
        del self.targets[target]
        self.repair.pop(target, None)
        self.witnesses.pop(target, None)
        strip = self._layout.index(target)
        self.holders[strip] = target
        self._strips.refusals.restored(self.oid, strip)
        if not self.targets:
            self.stale.clear()

"""The home machine: numbers the writes of the objects it is home of, and sees that all replicas have them.

One instance per epoch. Until every member's inventory is here it holds all requests (`peering`); then it is `active`:

 object clean       write: number it, hand it to all replicas, answer when all have; read: from the own copy,
                    but not while a write to the same blocks is on its way
 object recovering  requests wait for just that object, which is recovered first
 object lost        no copy that could be trusted is left among the members: EIO until one returns

Writes of one object take effect in the order of their numbers on every replica: links are in order, and a replica
applies at once. The *watermark* tells the replicas below which number all writes are everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.erasure import Policy
from sheepdog.cluster.core.errors import Result, StoreError
from sheepdog.cluster.core.home_reads import HomeReads
from sheepdog.cluster.core.home_requests import HomeRequests
from sheepdog.cluster.core.home_writes import HomeHooks, Submission, Write
from sheepdog.cluster.core.ids import NO_VERSION, NodeId, ObjectId, Version, plain_oid, strip_of, version_of, vid_of
from sheepdog.cluster.core.limits import STABLE_DELAY_NS
from sheepdog.cluster.core.messages import Flag, Kind, Message
from sheepdog.cluster.core.origins import encode_origins
from sheepdog.cluster.core.past import Former, Past
from sheepdog.cluster.core.peering import Decision, Inventories, Verdict, add_verdicts
from sheepdog.cluster.core.ports import Timer
from sheepdog.cluster.core.recovery import Recovery
from sheepdog.cluster.core.recovery_jobs import Job, StripJob
from sheepdog.cluster.core.replica import note_origin, perform
from sheepdog.cluster.core.strip_home import StripHome
from sheepdog.cluster.core.strip_peering import StripDecision
from sheepdog.cluster.core.strip_replica import StripReplica


class Home:
    """See the module. `former` gives placements of earlier epochs."""

    def __init__(self, context: Context, strips: StripReplica, former: Former, past: Past, hooks: HomeHooks) -> None:
        self.context = context
        self.hooks = hooks
        self.active = False
        self.me = context.placement.me
        self._placement = context.placement
        self._epoch = context.epoch
        self.fence = context.fence
        self._term = context.state.term
        self._former = former
        self.past = past
        self._complete: list[int] = []  # by member: up to which epoch it knows what it should have
        self._knows_all = False  # what no inventory names does not exist
        self._inventories = Inventories(len(self._placement.members))
        self._held: list[Callable[[], None]] = []
        self.sequence = 0
        self._flying: dict[int, Write | None] = {}  # by sequence, ascending
        self.writing: dict[ObjectId, list[Write]] = {}
        self._lost: dict[ObjectId, list[tuple[int, ObjectId]]] = {}  # with the copies or strips that may be somewhere
        self._contained: dict[tuple[int, int], None] = {}  # writes of earlier epochs (core.origins)
        self._untold_verdicts = 0  # members that have not confirmed theirs
        self._wait_for_verdicts: list[Callable[[], None]] = []
        self._told = 0  # watermark that every replica knows
        self.untold: dict[int, None] = {}  # members that got something numbered since
        self._stable_timer: Timer | None = None
        self.recovery = Recovery(context, self)
        self.strips = StripHome(context, self, strips)
        self.reads = HomeReads(self)
        self.requests = HomeRequests(context, self)

    # -- peering -----------------------------------------------------------------------------------------------

    def on_inventory(self, sender: NodeId, message: Message) -> None:
        """Part of a member's inventory: `offset` is the part's number, `length` the epoch it is complete for."""
        if self.active:
            return
        member = self._placement.index_of[sender]
        self.past.forgot(sender, message.watermark)
        self._inventories.add(member, message.offset, message.payload(), message.length, message.flags)
        if self._inventories.all_here():
            self._settle()

    def waiting_for(self) -> list[NodeId]:
        """Members whose inventory has not come yet."""
        return [] if self.active else [self._placement.nodes[i] for i in self._inventories.missing_members()]

    def told(self) -> list[int]:
        """By member: up to which epoch it knows what it should have; 0 as long as it has not told."""
        return self._complete if self.active else self._inventories.complete

    @property
    def lost(self) -> int:
        """Objects of which no member has a current copy."""
        return len(self._lost)

    @property
    def knows_all(self) -> bool:
        """False: there may be objects of which nobody here has heard; requests for unknown ones fail."""
        return self._knows_all or not self.active

    def state_of(self, oid: ObjectId) -> str:
        """What a request for the object meets here: clean, recovering, lost, peering."""
        if not self.active:
            return "peering"
        return "lost" if oid in self._lost else "recovering" if self.recovery.knows(oid) else "clean"

    def _settle(self) -> None:
        """All inventories are here: tell everybody which of its copies are not current, and begin."""
        complete = self._complete = self._inventories.complete
        self._knows_all = self.past.knows_all(complete)
        verdicts = [Verdict([], [], [], [], self._knows_all) for _ in self._placement.members]
        decisions = self._inventories.decide(self._placement, self._former, self.past, self.context.policy_of)
        self._contained = self._inventories.contained(decisions)
        surplus: list[tuple[int, ObjectId]] = []
        deleted: list[tuple[int, ObjectId]] = []
        for decision in decisions:
            add_verdicts(verdicts, decision)
            if isinstance(decision, StripDecision) and decision.layout:
                self.strips.assign(decision.oid, decision.layout)
            if decision.needs_recovery:
                self.recovery.add(self._job(decision))
            elif decision.is_lost:
                self._lost[decision.oid] = decision.lacking()
                self.context.probe("home.object_lost")
                self.context.log(3, f"object {decision.oid:016x}: no current copy is left")
            elif decision.version == NO_VERSION:
                deleted += decision.surplus_copies()
            else:
                surplus += decision.surplus_copies()
        self._inventories = Inventories(0)
        self.active = True
        self._untold_verdicts = len(verdicts)
        for member, node in enumerate(self._placement.nodes):
            if member == self.me:
                self.hooks.settled_locally(verdicts[member], self._verdict_known)
            else:
                message = verdicts[member].encode(self.fence)
                self.context.peers.request(node, message, lambda _: self._verdict_known())
        self.recovery.drop(deleted)
        self.recovery.drop(surplus, Flag.SURPLUS)
        held, self._held = self._held, []
        for call in held:
            call()
        self.recovery.begin()

    def _verdict_known(self) -> None:
        self._untold_verdicts -= 1
        if not self._untold_verdicts:
            waiting, self._wait_for_verdicts = self._wait_for_verdicts, []
            for call in waiting:
                call()

    def when_all_know(self, call: Callable[[], None]) -> None:
        """Calls once every member knows which of its copies are not current."""
        if self._untold_verdicts:
            self._wait_for_verdicts.append(call)
        else:
            call()

    def _job(self, decision: Decision | StripDecision) -> Job:
        if isinstance(decision, Decision):
            return Job.of(decision)
        version, origins = decision.version, b""
        if decision.agree:
            self.context.probe("home.strips_agree")
            version = self.next_version()
            origins = encode_origins(self._inventories.origins_of(decision))
        return StripJob.decided(decision, self.strips, version, origins)

    def new_job(self, oid: ObjectId) -> Job:
        """For an object that was clean."""
        policy = self.context.policy_of(oid)
        return Job(oid) if policy is None else StripJob(oid, policy, self.strips)

    # -- writes ------------------------------------------------------------------------------------------------

    def submit(self, submission: Submission) -> None:
        """Takes a change; see the module for when it is answered."""
        if not self.active:
            self._held.append(lambda: self.submit(submission))
            return
        oid, flags = submission.oid, submission.flags
        if refusal := self.recovery.refusal(oid):
            submission.done(refusal, b"")
            return
        if self.recovery.holds(oid, False, lambda: self.submit(submission)):
            return
        if oid in self.writing and self.writing[oid][-1].fresh:  # what was done to it would go with it if that fails
            self.wait_for_creation(submission)
            return
        if self._contained and (submission.gateway, submission.number) in self._contained:
            self.requests.done_before(submission)
            return
        policy = self.context.policy_of(oid)
        if flags & Flag.CREATE and not self.context.knows(oid):
            submission.done(Result.AGAIN, b"")  # the gateway has heard of the VDI before this node; how many copies?
            return
        if not flags & Flag.CREATE:
            if self._lost and oid in self._lost:
                # The rest would be kept for ever, and all wait for more.
                over = self._knows_all and bool(flags & Flag.REMOVE)
                if over:
                    self.context.probe("home.lost_removed")
                    self._make_way(oid, policy, False)
                submission.done(Result.SUCCESS if over else Result.EIO, b"")
                return
            if not self.exists(oid, policy):
                missing = self.absent(oid)
                submission.done(Result.SUCCESS if flags & Flag.REMOVE and missing == Result.NO_OBJ else missing, b"")
                return
        elif oid in self._lost:
            self._make_way(oid, policy, True)
        if flags & Flag.CREATE and flags & Flag.ONLY_NEW:
            if self.exists(oid, policy):
                submission.done(Result.SUCCESS, b"")
                return
            if policy is None:
                submission.flags = flags & ~Flag.ONLY_NEW
        if policy is None:
            self._number(submission, self.replicas_of(submission))
        else:
            self.strips.submit(submission, policy)

    def wait_for_creation(self, submission: Submission) -> None:
        """Takes the change once the object is made, or unmade."""
        self.context.probe("home.waits_for_creation")
        self.writing[submission.oid][-1].hurry(lambda: self.submit(submission))

    def _make_way(self, oid: ObjectId, policy: Policy | None, anew: bool) -> None:
        """No current copy of the object is left, and a client creates it `anew`, or nobody wants it: what there is of
        it counts no more."""
        wanted = {(member, oid) for member in self._placement.replicas(oid)}
        if policy is not None:
            self.strips.forget(oid)
            wanted = {(member, strip_of(oid, strip)) for strip, member in enumerate(self.strips.layout(oid, policy))}
        lost = self._lost.pop(oid)
        for member, copy in lost:
            if member == self.me:
                self.hooks.restored_locally(copy)
        self.recovery.drop(copy for copy in lost if not anew or copy not in wanted)

    def exists(self, oid: ObjectId, policy: Policy | None) -> bool:
        """There is a copy here, or strips of it somewhere."""
        return self.context.store.version(oid) is not None if policy is None else self.strips.exists(oid, policy)

    def absent(self, oid: ObjectId) -> Result:
        """What a request for an object is told that nobody here has, or as far as this node knows how it is kept."""
        unknown = bool(self.context.state.partial) and self.context.state.vdis.get(vid_of(oid)) is None
        may_exist = not self._knows_all and (unknown or self.past.may_exist(oid, self._complete))
        if may_exist or (unknown and not self.context.knows(oid)):
            self.context.probe("home.object_unknown")
            return Result.EIO
        return Result.NO_OBJ

    def replicas_of(self, submission: Submission) -> tuple[int, ...]:
        """Who has to apply a change, of an object of whole copies."""
        if submission.copies:  # an inode: the VDI table here may not know it yet
            return self._placement.ring.replicas(submission.oid, submission.copies)
        return self._placement.replicas(submission.oid)

    def version_of(self, sequence: int) -> Version:
        """The version that a write of this number gives to its object."""
        return version_of(self._epoch, self._term, sequence)

    def next_version(self) -> Version:
        """For copies that become equal without a write."""
        self.sequence += 1
        return self.version_of(self.sequence)

    def open_write(self, submission: Submission, pending: int, fresh: bool) -> Write:
        """Gives the change its number; `pending` answers are to come."""
        oid = submission.oid
        self.sequence = sequence = self.sequence + 1
        write = Write(self, submission, sequence, pending, fresh)
        self._flying[sequence] = write
        writing = self.writing.get(oid)
        if writing is None:
            self.writing[oid] = [write]
        else:
            writing.append(write)
        return write

    def open_number(self) -> int:
        """A number for something else that all replicas have to do in the order of writes; `close_number` ends it."""
        self.sequence = sequence = self.sequence + 1
        self._flying[sequence] = None
        return sequence

    def close_number(self, sequence: int) -> None:
        del self._flying[sequence]
        self._number_ended()

    def is_present(self) -> bool:
        """The epoch of this home is not over."""
        return self.context.fence == self.fence

    def watermark(self) -> int:
        """All writes up to this number are on all replicas."""
        for oldest in self._flying:
            return oldest - 1
        return self.sequence

    def _number(self, submission: Submission, replicas: tuple[int, ...]) -> None:
        context, placement = self.context, self._placement
        oid, flags = submission.oid, submission.flags
        fresh = bool(flags & Flag.CREATE) and context.store.version(oid) is None
        write = self.open_write(submission, len(replicas), fresh)
        version, sequence, watermark = write.version, write.sequence, self.watermark()
        if submission.copies and flags & Flag.CREATE and not fresh:
            self._drop_others(write, replicas)
        if flags & Flag.REMOVE:
            self.hooks.restored_locally(oid)  # if it went with its disk: there is nothing to be restored any more
        for replica in replicas[1:]:
            own = replica == submission.gateway and bool(submission.data)  # it has the bytes until it is answered
            message = Message(
                Kind.APPLY,
                self.fence,
                0,
                oid,
                submission.offset,
                submission.length,
                flags | Flag.OWN if own else flags,
                version,
                sequence,
                watermark,
                len(replicas),
                0,
                b"" if own else submission.data,
                submission.number,
                submission.floor,
                submission.gateway,
            )
            late = own and bool(flags & Flag.DIRECT)  # it needs to hear of the copy here, too
            context.peers.request(placement.nodes[replica], message, write.remote(replica), late)
        data = submission.data
        if perform(context.store, flags, oid, submission.offset, submission.length, data, version, write.local):
            note_origin(context, flags, oid, submission.gateway, submission.number, submission.floor, version)

    def _drop_others(self, write: Write, replicas: tuple[int, ...]) -> None:
        """Of an inode that was begun in an earlier epoch. While the VDI table does not name it, recovery gives it as
        many copies as others have by default: those that it shall not have would stay as they are."""
        oid = write.submission.oid
        surplus = [(member, oid) for member in self._placement.replicas(oid) if member not in replicas]
        if surplus:
            self.context.probe("home.inode_made_again")
            write.when_over(lambda: None if write.result else self.recovery.drop(surplus, Flag.SURPLUS))

    def failed_here(self, write: Write, error: StoreError) -> None:
        """The copy of this node could not take a write: it takes no more until it is restored. The only one there is
        stays what the object is: no other has what it lacks."""
        if self.context.fence != self.fence:
            return
        oid = write.submission.oid
        policy = self.context.policy_of(oid)
        if policy is None:
            if self.replicas_of(write.submission) != (self.me,):
                self.hooks.spoilt_locally(oid)
            return
        strip = self.strips.own_strip(oid, policy)
        if strip is not None:
            self.context.spoilt.setdefault(strip, error)
            self.hooks.spoilt_locally(strip, write.version)

    def replica_failed(self, write: Write, member: int, result: int) -> None:
        """A replica could not apply a write: its copy differs now, and must be made equal again."""
        self.context.probe("home.replica_failed")
        oid = write.submission.oid
        if write.tolerance and result == Result.EIO and not write.fresh:
            write.tolerance -= 1  # the others have it, and this strip is made anew from them
        else:
            write.result = result
        node = self._placement.nodes[member]
        self.context.log(3, f"object {oid:016x}: {node} could not apply a write (result {result:#x})")
        if write.ordered:
            self.strips.note_version(oid, self.writing[oid][-1].version)
            self.strips.refusals.failed(write, member, result)
        if not write.fresh:
            self.recovery.suspect(oid, member)

    def strip_failed(self, oid: ObjectId, member: int, version: Version) -> None:
        """A strip could not be brought to this version."""
        self.strips.note_version(oid, version)
        self.strips.refusals.stayed_behind(oid, member)
        self.recovery.suspect(oid, member)

    def completed(self, write: Write) -> None:
        """All replicas have answered."""
        if self.context.fence != self.fence:
            return  # fenced: the gateways submit again in the new epoch
        if not write.ordered:
            self._complete_one(write)
            return
        # Peering undoes a write that some strip lacks, and all that came behind it: so answers keep the order.
        while (writing := self.writing.get(write.submission.oid)) and not writing[0].pending:
            self._complete_one(writing[0])

    def _complete_one(self, write: Write) -> None:
        oid = write.submission.oid
        noted = write.failed is None or write.fresh
        if noted:
            del self._flying[write.sequence]
        writing = self.writing[oid]
        writing.remove(write)
        if write.ordered:
            self.strips.refusals.ended(write)
        if waits := self._waits_for_repair(write):  # asks before `quiet`, which may give up at once
            self.recovery.when_restored(oid, lambda result: write.submission.done(result, b""), write.version)
        if not writing:
            del self.writing[oid]
            if not self.strips.busy(oid):
                self.recovery.quiet(oid)
        if write.result and write.fresh:
            self._undo(write)
        elif not waits:
            write.submission.done(write.result, b"")
        if write.waiting is not None:
            for call in write.waiting:
                call()
        if noted:
            self._number_ended()
        else:  # a strip that lacks the write could have it taken back until then (core.bad_strips)
            self.recovery.when_noted(oid, lambda: self.close_number(write.sequence))

    def _waits_for_repair(self, write: Write) -> bool:
        """It is answered when what lacks it, or an earlier one, has been made anew.

        Peering takes back a write that some strip lacks, and all behind it, if nobody remembers that the strip is bad.
        """
        if write.ordered:
            over = write.result or write.fresh or write.submission.flags & Flag.REMOVE
            return not over and self.recovery.knows(write.submission.oid)
        failed = bool(write.result)  # asked first: nearly always False, and looking up EIO costs more than all of this
        return failed and write.result == Result.EIO and not write.fresh

    def _number_ended(self) -> None:
        self.strips.sends.stable(self.watermark())
        if not self._flying and self._stable_timer is None:
            self._stable_timer = self.context.clock.after(STABLE_DELAY_NS, self._push_watermark)

    def _undo(self, write: Write) -> None:
        """An object could not be created on every replica: remove it where it was.

        After an error of a disk, which is out of service now, the gateway asks for it again.
        """
        submission = write.submission
        result = Result.AGAIN if write.result == Result.EIO else write.result
        copies, removed = submission.copies, lambda _result, _body: submission.done(result, b"")
        removal = Submission(submission.oid, Flag.REMOVE, 0, 0, b"", copies, removed, 0, 0, 0)
        policy = self.context.policy_of(removal.oid)
        if policy is None:
            self._number(removal, self.replicas_of(removal))
        else:
            self.strips.remove(removal, policy)

    def is_writing(self, oid: ObjectId) -> bool:
        return oid in self.writing or self.strips.busy(oid)

    def is_writing_range(self, oid: ObjectId, start: int, end: int) -> bool:
        return any(write.start < end and start < write.end for write in self.writing.get(oid, ()))

    def _push_watermark(self) -> None:
        """An idle home tells its replicas that all writes are everywhere, so that they may be read there."""
        self._stable_timer = None
        if self._flying or self.context.fence != self.fence or self._told == self.sequence:
            return  # the next write carries it
        self._told = self.sequence
        for member in self.untold:
            message = Message(Kind.STABLE, self.fence, watermark=self.sequence)
            self.context.network.send(self._placement.nodes[member], message)
        self.untold.clear()

    def hold(self, call: Callable[[], None]) -> None:
        """Calls when peering is over."""
        self._held.append(call)

    def is_lost(self, oid: ObjectId) -> bool:
        """No member has a copy that can be trusted."""
        return oid in self._lost

    def given_up(self, oid: ObjectId) -> None:
        """Nothing is left to restore the object from."""
        if self.context.policy_of(oid) is None and self.context.store.version(oid) == NO_VERSION:
            self._lost[oid] = [(self.me, oid)]

    def on_lost(self, member: int, oids: Sequence[ObjectId]) -> None:
        """A disk of `member` went, and these copies or strips with it."""
        if not self.active:
            self._held.append(lambda: self.on_lost(member, oids))
        else:
            self.recovery.lose([oid for oid in map(plain_oid, oids) if self.has_been(oid)], member)

    def has_been(self, oid: ObjectId) -> bool:
        """The object exists, and a copy of it can be trusted."""
        known = self.recovery.knows(oid)  # then the copy here may be yet to be made
        return oid not in self._lost and (known or self.exists(oid, self.context.policy_of(oid)))

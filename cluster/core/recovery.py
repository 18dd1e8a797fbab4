"""Recovery of the objects of one home in one epoch: which copies are restored, in which order, and who waits.

What client requests wait for comes first, then the objects with the fewest current copies. An object is restored
to all its replicas before it is clean; surplus copies are dropped only then.

Where the cluster gives nodes time to come back (format --recovery-delay), an object that is short of one copy only, on
a node that has none yet, waits until then. It is read meanwhile; a write has it restored at once, so that whatever is
acknowledged is on all its replicas.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from sheepdog.cluster.core.bad_strips import BadStrips
from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import NO_VERSION, ObjectId, Version
from sheepdog.cluster.core.limits import HEALTH_JOBS, RECOVERY_PULLS, RECOVERY_RETRY_NS, RECOVERY_SKIP_NS, REPAIR_TRIES
from sheepdog.cluster.core.messages import Flag, Kind, Message
from sheepdog.cluster.core.recovery_jobs import Job, StripJob
from sheepdog.cluster.core.state import ClusterFlag
from sheepdog.cluster.core.take_back import TakeBack

if TYPE_CHECKING:
    from sheepdog.cluster.core.home import Home


class Recovery:
    """See the module. `finished` and `total` count objects, for `dog node recovery`."""

    def __init__(self, context: Context, home: Home) -> None:
        self._context = context
        self._home = home
        self._placement = context.placement
        self._fence = context.fence
        self._bad = BadStrips(context, home)
        self._back = TakeBack(context, home, self)
        self._jobs: dict[ObjectId, Job] = {}
        self._queue: deque[ObjectId] = deque()
        self._delayed: list[ObjectId] = []  # begun when the nodes that are away have had their time
        self._delayed_until_ns = 0
        self._running = 0
        self._begun = False
        self._is_durable = False  # what this node told of its copies
        self._pausing = False
        self._reported = False
        self._starts: deque[int] = deque()  # times of the latest starts, for the throttle
        self.finished = 0
        self.total = 0

    @property
    def unfinished(self) -> int:
        return len(self._jobs)

    def add(self, job: Job) -> None:
        """From peering: an object that is not equal and exactly where it belongs."""
        self._jobs[job.oid] = job

    def begin(self) -> None:
        """Peering is over; starts restoring, the objects with the fewest current copies first."""
        self._begun = True
        self.total = len(self._jobs)
        self._jobs = dict(sorted(self._jobs.items(), key=lambda item: (item[1].rank, item[0])))
        wait_ns = self._context.state.recovery_wait_ns(self._context.clock.wall_ns())
        if wait_ns:
            self._delayed = [oid for oid, job in self._jobs.items() if job.may_wait]
            self._delayed_until_ns = self._context.clock.now_ns() + wait_ns
            self._context.clock.after(wait_ns, self._end_delay)
        late = frozenset(self._delayed)
        self._queue.extend(oid for oid in self._jobs if oid not in late)
        self.run()
        self._home.hooks.when_durable(self._durable)

    def _durable(self) -> None:
        self._is_durable = True
        self._report()

    def _end_delay(self) -> None:
        if self._context.fence == self._fence:
            self._context.probe("recovery.delay_ended")
            self._queue.extend(self._delayed)
            self._delayed = []
            self.run()

    def waits_ns(self) -> int:
        """So long some objects still wait for nodes that are away."""
        waiting = any(oid in self._jobs for oid in self._delayed)
        return max(0, self._delayed_until_ns - self._context.clock.now_ns()) if waiting else 0

    def sole(self) -> dict[str, int]:
        """By node: how many objects would have no current copy left without it. Of very many, the neediest count."""
        counts: dict[str, int] = {}
        for job in islice(self._jobs.values(), HEALTH_JOBS):
            for member in job.essential(self._placement.replicas(job.oid)):
                node = str(self._placement.nodes[member])
                counts[node] = counts.get(node, 0) + 1
        return counts

    def skipped(self) -> int:
        """Objects that wait because some node has little space left (format -F)."""
        return sum(job.skipped for job in islice(self._jobs.values(), HEALTH_JOBS))

    def full(self) -> int:
        """Objects that cannot be restored, and are refused writes, because some node has no space."""
        return sum(job.full for job in islice(self._jobs.values(), HEALTH_JOBS))

    def knows(self, oid: ObjectId) -> bool:
        """The object is not clean."""
        return oid in self._jobs

    def refusal(self, oid: ObjectId) -> int:
        """What writes are answered while a replica of the object cannot be restored; 0: they are taken, or wait."""
        job = self._jobs.get(oid) if self._jobs else None  # nearly always there are none
        return 0 if job is None else job.refusal

    def holds(self, oid: ObjectId, reading: bool, retry: Callable[[], None]) -> bool:
        """True if the request must wait: `retry` is called when it need not, and the object is restored at once.

        A read waits for the home's own copy, and until no replica has an older one: what was read must not be
        taken back when, after further deaths, the older copy is all that is left.
        """
        job = self._jobs.get(oid) if self._jobs else None
        if job is None or (reading and not job.holds_read(self._home.me)):
            return False
        self._context.probe("recovery.request_waits")
        job.waiting.append(retry)
        if not job.running:
            self._start(job)
        elif not job.urgent:
            self._hurry(job)
        return True

    def _hurry(self, job: Job) -> None:
        """A client waits for what is being restored already; who asked for that hears how it ended."""
        job.urgent = True
        for target in [target for target, under_way in job.targets.items() if under_way]:
            message = Message(Kind.PULL, self._fence, oid=job.copy_on(target), flags=Flag.HURRY)
            if target == self._home.me:
                self._home.hooks.pull(message, lambda _: None)
            else:
                self._request(target, message, lambda _: None)

    def strip_holders(self, oid: ObjectId) -> Mapping[int, int] | None:
        """Of a coded object that is not clean: member by strip, of those that can be read."""
        job = self._jobs.get(oid)
        return job.holders if isinstance(job, StripJob) else None

    def suspect(self, oid: ObjectId, member: int) -> None:
        """The copy of `member` is not right any more: restore it from the others once no write is on its way."""
        self._doubt(oid, member)
        self.quiet(oid)

    def lose(self, oids: Iterable[ObjectId], member: int) -> None:
        """A disk of `member` went: as `suspect`, but in turn, for there may be very many."""
        for oid in oids:
            self._home.strips.refusals.lost(oid, member)
            self._doubt(oid, member)
            self._queue.append(oid)
        self._reported = False  # that member waits to hear that all is well again
        if self._begun:
            self.run()

    def _doubt(self, oid: ObjectId, member: int) -> None:
        job = self._jobs.get(oid)
        if job is None:
            self._jobs[oid] = job = self._home.new_job(oid)
            self.total += 1
            self._reported = False
        job.suspect(member)

    def quiet(self, oid: ObjectId) -> None:
        """No write of the object is on its way any more: a suspected copy can be restored."""
        job = self._jobs.get(oid)
        if job is not None and not job.running and job.version == NO_VERSION:
            self._start(job)

    def when_restored(self, oid: ObjectId, ended: Callable[[int], None], version: Version = NO_VERSION) -> None:
        """`ended(result)` comes when all replicas have what the current ones have now, or cannot get it; AGAIN if the
        write that gave `version` was taken back."""
        job = self._jobs.get(oid)
        if job is None:
            ended(Result.SUCCESS)
        else:
            job.ended.append((ended, version))

    def when_noted(self, oid: ObjectId, noted: Callable[[], None]) -> None:
        """Calls when a write of the object that some strip lacks may be seen, for it is not taken back any more."""
        job = self._jobs.get(oid)
        if job is None or job.noted:
            noted()
        else:
            job.when_noted.append(noted)

    def elsewhere(self, oid: ObjectId) -> tuple[Version, list[int]] | None:
        """Where reads are answered while the home's own copy is bad or gone, and is being repaired, or cannot be."""
        job = self._jobs.get(oid)
        if job is None or job.stale or job.witnesses or not job.sources or job.version == NO_VERSION:
            return None
        if self._home.me not in (job.targets if job.refusal else job.repair):
            return None
        if not job.running and not job.refusal:
            self._start(job)
        return job.version, list(job.sources)

    def _give_up(self, job: Job) -> None:
        """Nothing can be done for a suspected copy: requests see the error of the copy itself, or find another one."""
        self._context.log(3, f"object {job.oid:016x}: a bad copy cannot be made anew")
        del self._jobs[job.oid]
        self._home.given_up(job.oid)
        job.mark_noted()
        self._end(job, Result.EIO)
        self._release(job)
        self._report()

    def _end(self, job: Job, result: int) -> None:
        ended, job.ended = job.ended, []
        for call, _ in ended:
            call(result)

    def run(self) -> None:
        """Starts as many objects as may be restored at a time."""
        while self._queue and self._running < RECOVERY_PULLS and not self._context.state.disable_recovery:
            if not self._may_start():
                break
            job = self._jobs.get(self._queue.popleft())
            if job is not None and not job.running:
                self._start(job)
        self._report()

    def _may_start(self) -> bool:
        """Keeps to the throttle (cli.md 4): at most N objects begin in any interval; then `run` comes again."""
        most, interval_ns = self._context.throttle
        if not most or not interval_ns:
            return True
        now, starts = self._context.clock.now_ns(), self._starts
        while starts and now - starts[0] >= interval_ns:
            starts.popleft()
        if len(starts) < most:
            starts.append(now)
            return True
        if not self._pausing:
            self._pausing = True
            self._context.clock.after(starts[0] + interval_ns - now, self._resume)
        return False

    def _resume(self) -> None:
        self._pausing = False
        if self._context.fence == self._fence:
            self.run()

    def _start(self, job: Job) -> None:
        if job.version == NO_VERSION:
            if self._home.is_writing(job.oid):
                return  # suspected; `quiet` starts it
            if self._back.begin(job):
                return  # `taken_back` goes on
            if self._home.strips.levels.bring(job.oid):
                return  # `quiet` comes when its strips are equal
            if not job.find_sources(self._context):
                self._give_up(job)
                return
        elif job.hopeless:
            self._give_up(job)
            return
        if job.again is not None:
            job.again.cancel()
            job.again = None
        job.running = True
        job.skipped = False
        self._running += 1
        if job.version == NO_VERSION:
            self._learn(job)
        else:
            self._restore(job)

    def _restore(self, job: Job) -> None:
        if isinstance(job, StripJob):
            # What the others are is read from now on, or gets a version that counts for more: who has an old strip, or
            # one that lacks a write, must have noted that by then.
            self._home.when_all_know(lambda: self._bad.note(job, lambda: self._agree(job)))
        else:
            self._pull(job)

    def _learn(self, job: Job) -> None:
        """The home has no copy to know the version by: asks those that have."""
        questions = job.questions()
        found: dict[int, Version] = {}
        left = len(questions)

        def told(member: int, version: Version) -> None:
            nonlocal left
            if self._context.fence != self._fence:
                return
            found[member] = version
            left -= 1
            if left:
                return
            if job.learn(found):
                self._release(job)  # reads can be answered by others from now on
                self._restore(job)
            else:
                self._running -= 1
                self._give_up(job)
                self.run()

        def answered(member: int) -> Callable[[Message], None]:
            return lambda answer: told(member, answer.version)

        for member, oid in questions:
            if member == self._home.me:
                told(member, self._context.store.version(oid) or NO_VERSION)
            else:
                message = Message(Kind.TABLE, self._fence, oid=oid)
                self._context.peers.request(self._placement.nodes[member], message, answered(member))

    def _agree(self, job: StripJob) -> None:
        """Strips become one state of the object before anything is decoded; those that are one already can be read."""
        job.stale.clear()
        if not job.agree:
            self._release(job)
            self._pull(job)
            return
        job.agree = dict.fromkeys(job.agree, True)
        for strip, member in list(job.agree):
            message = job.agreement(strip, self._fence)
            agreed = self._agreed(job, strip, member)
            if member == self._home.me:
                self._home.hooks.agree(message, agreed)
            else:
                self._request(member, message, agreed)

    def _agreed(self, job: StripJob, strip: int, member: int) -> Callable[[int], None]:
        def agreed(result: int) -> None:
            if self._context.fence != self._fence:
                return
            if result == Result.NO_SPACE:
                job.agree[strip, member] = False
            else:
                job.agreed(strip, member, not result)
            if any(job.agree.values()):
                return
            if job.agree:
                self.refuse(job, Result.NO_SPACE)
                self._later(job)
                return
            job.as_is, job.refusal = False, 0
            self._release(job)
            if job.targets:
                self._pull(job)
            else:
                self._done(job)

        return agreed

    def _request(self, member: int, message: Message, ended: Callable[[int], None]) -> None:
        self._context.peers.request(self._placement.nodes[member], message, lambda answer: ended(answer.result))

    def _pull(self, job: Job) -> None:
        for target in job.order(self._home.me):
            if job.targets.get(target, True):
                continue
            job.targets[target] = True
            message, pulled = job.pull(target, self._fence), self._pulled(job, target)
            if target == self._home.me:
                self._home.hooks.pull(message, pulled)
            else:
                self._request(target, message, pulled)

    def _pulled(self, job: Job, target: int) -> Callable[[int], None]:
        def pulled(result: int) -> None:
            if self._context.fence != self._fence:
                return
            if result != Result.SUCCESS:
                self._failed(job, target, result)
                return
            job.restored(target)
            if target == self._home.me:
                self._home.hooks.restored_locally(job.copy_on(target))
            job.refusal = 0
            if not job.targets:
                self._done(job)
            elif not any(job.targets.values()):
                self._pull(job)  # the others, now that the home has it; or one that failed before

        return pulled

    def _failed(self, job: Job, target: int, result: int) -> None:
        """Tries again a little later, for as long as the epoch lasts; for a copy that is only suspected, some times."""
        if result == Result.NO_SPACE and self._skip(job, target):
            return
        job.failures += 1
        if result == Result.NO_OBJ:
            job.gone[target] = None
        if result == Result.NO_SPACE:
            job.no_space(target)
            self.refuse(job, result)
        if job.failures & (job.failures - 1) == 0:  # the 1st, 2nd, 4th, 8th ... time
            why = "has no space for it" if result == Result.NO_SPACE else f"could not restore it (result {result:#x})"
            self._context.log(4, f"object {job.oid:016x}: {self._placement.nodes[target]} {why}, again soon")
        job.targets[target] = False
        if any(job.targets.values()):
            return  # another target is still being restored; its end decides
        is_over = job.failures >= REPAIR_TRIES and all(one in job.repair for one in job.targets)
        if is_over and any(one in job.gone for one in job.targets):
            self.refuse(job, Result.EIO)  # neither read there nor written, and tried for as long as the epoch lasts
        elif is_over and result != Result.NO_SPACE:
            job.running = False
            self._running -= 1
            self._give_up(job)  # the other copies cannot be read either
            self.run()
            return
        self._later(job)

    def taken_back(self, job: StripJob, cut: Version, failed: Sequence[int]) -> None:
        """The strips are what they were before the write `cut`, but for those that could not."""
        again = job.taken_back(cut, failed)
        if job.targets:
            self.quiet(job.oid)
        else:
            self._running += 1
            self._done(job)
        for call in again:
            call(Result.AGAIN)

    def refuse(self, job: Job, result: int) -> None:
        """Changes are refused until it is restored; who waits for that is told. Reads look if they must wait on."""
        job.refusal = result
        self._end(job, result)
        self._release(job)

    def _later(self, job: Job) -> None:
        self._pause(job, RECOVERY_RETRY_NS)
        self.run()

    def _pause(self, job: Job, pause_ns: int) -> None:
        """It is tried again then; a client that needs it has it tried before."""
        job.running = False
        self._running -= 1
        job.again = self._context.clock.after(pause_ns, lambda: self._again(job))

    def _skip(self, job: Job, target: int) -> bool:
        """With format -F: the node is nearly full, and nobody waited when it was asked. Tried again much later."""
        if job.urgent or target in job.repair or not self._context.state.flags & ClusterFlag.AVOID_DISKFULL:
            return False
        self._context.probe("recovery.skipped")
        job.targets[target] = False
        if any(job.targets.values()):
            return True
        self._pause(job, RECOVERY_SKIP_NS)
        if job.waiting:  # for it by now
            self._start(job)
            return True
        job.skipped = True
        self.run()
        return True

    def _again(self, job: Job) -> None:
        if self._context.fence == self._fence and self._jobs.get(job.oid) is job and not job.running:
            self._start(job)

    def _done(self, job: Job) -> None:
        del self._jobs[job.oid]
        self._running -= 1
        self.finished += 1
        job.finished()
        job.mark_noted()
        self.drop(job.surplus, Flag.SURPLUS)
        self._end(job, Result.SUCCESS)
        self._release(job)
        self.run()

    def _release(self, job: Job) -> None:
        waiting, job.waiting = job.waiting, []
        for retry in waiting:
            retry()

    def drop(self, copies: Iterable[tuple[int, ObjectId]], flags: int = 0) -> None:
        """Copies (member, id) go: every replica has the object (SURPLUS), or it was deleted."""
        for member, oid in copies:
            if member == self._home.me:
                self._home.hooks.drop(oid, flags)
            else:
                message = Message(Kind.DROP, self._fence, oid=oid, flags=flags)
                self._context.peers.request(self._placement.nodes[member], message, lambda _: None)

    def _report(self) -> None:
        """Tells everybody, once, that nothing is left to do here."""
        if self._jobs or self._reported or not self._is_durable:
            return
        self._reported = True
        for node in self._placement.nodes:
            if node != self._context.me:
                self._context.peers.request(node, Message(Kind.COMPLETE, self._fence), lambda _: None)
        self._home.hooks.completed_locally()

"""Recovery of the objects of one home in one epoch: which copies are restored, in which order, and who waits.

What client requests wait for comes first, then the objects with the fewest current copies. An object is restored
to all its replicas before it is clean; surplus copies are dropped only then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import NO_VERSION, ObjectId, Version
from sheepdog.cluster.core.limits import RECOVERY_PULLS, RECOVERY_RETRY_NS
from sheepdog.cluster.core.messages import Flag, Kind, Message
from sheepdog.cluster.core.peering import Decision, encode_members
from sheepdog.cluster.core.puller import Puller

if TYPE_CHECKING:
    from sheepdog.cluster.core.home import Home


class _Job:
    """One object that is not clean."""

    __slots__ = (
        "failures",
        "full",
        "oid",
        "repair",
        "running",
        "sources",
        "stale",
        "surplus",
        "targets",
        "version",
        "waiting",
    )

    def __init__(self, oid: ObjectId, version: Version) -> None:
        self.oid = oid
        self.version = version
        self.sources: list[int] = []
        self.targets: dict[int, bool] = {}  # member -> a pull is under way
        self.surplus: tuple[int, ...] = ()
        self.stale: dict[int, None] = {}  # targets that still have an older copy as if it were good
        self.repair: dict[int, None] = {}  # targets whose bytes are not to be trusted
        self.waiting: list[Callable[[], None]] = []
        self.running = False
        self.failures = 0
        self.full = False


class Recovery:
    """See the module. `finished` and `total` count objects, for `dog node recovery`."""

    def __init__(self, context: Context, home: Home, puller: Puller) -> None:
        self._context = context
        self._home = home
        self._puller = puller
        self._placement = context.placement
        self._fence = context.fence
        self._jobs: dict[ObjectId, _Job] = {}
        self._queue: deque[ObjectId] = deque()
        self._running = 0
        self._begun = False
        self._pausing = False
        self._reported = False
        self._starts: deque[int] = deque()  # times of the latest starts, for the throttle
        self.finished = 0
        self.total = 0

    @property
    def unfinished(self) -> int:
        return len(self._jobs)

    def add(self, decision: Decision) -> None:
        """From peering: an object that is not equal and exactly where it belongs."""
        if not decision.missing:
            self.drop(decision.oid, decision.surplus)
            return
        job = _Job(decision.oid, decision.version)
        job.sources = list(decision.sources)
        job.targets = dict.fromkeys(decision.missing, False)
        job.surplus = decision.surplus
        job.stale = dict.fromkeys(decision.stale)
        self._jobs[decision.oid] = job

    def begin(self) -> None:
        """Peering is over; starts restoring, the objects with the fewest current copies first."""
        self._begun = True
        self.total = len(self._jobs)
        self._queue.extend(sorted(self._jobs, key=lambda oid: (len(self._jobs[oid].sources), oid)))
        self.run()

    def is_full(self, oid: ObjectId) -> bool:
        """A replica of the object could not be restored for want of space: writes are refused meanwhile."""
        job = self._jobs.get(oid)
        return job is not None and job.full

    def holds(self, oid: ObjectId, reading: bool, retry: Callable[[], None]) -> bool:
        """True if the request must wait: `retry` is called when it need not, and the object is restored at once.

        A read waits for the home's own copy, and until no replica has an older one: what was read must not be
        taken back when, after further deaths, the older copy is all that is left.
        """
        job = self._jobs.get(oid)
        if job is None or (reading and self._home.me not in job.targets and not job.stale):
            return False
        self._context.probe("recovery.request_waits")
        job.waiting.append(retry)
        if not job.running:
            self._start(job)
        return True

    def suspect(self, oid: ObjectId, member: int) -> None:
        """The copy of `member` is not right any more: restore it from the others once no write is on its way."""
        job = self._jobs.get(oid)
        if job is None:
            self._jobs[oid] = job = _Job(oid, NO_VERSION)
            self.total += 1
            self._reported = False
        job.targets.setdefault(member, False)
        job.repair[member] = None
        if not self._home.is_writing(oid):
            self.quiet(oid)

    def quiet(self, oid: ObjectId) -> None:
        """No write of the object is on its way any more: a suspected copy can be restored."""
        job = self._jobs.get(oid)
        if job is None or job.running or job.version != NO_VERSION:
            return
        replicas = self._placement.replicas(oid)
        job.sources = [member for member in replicas if member not in job.targets]
        job.version = self._context.store.version(oid) or NO_VERSION  # kept even where the bytes are rotten
        if not job.sources or job.version == NO_VERSION:
            self._give_up(job)
            return
        self._start(job)

    def _give_up(self, job: _Job) -> None:
        """No copy is left to restore from: requests see the error of the copy itself."""
        self._context.log(3, f"object {job.oid:016x}: no good copy is left to restore from")
        del self._jobs[job.oid]
        self._release(job)

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

    def _start(self, job: _Job) -> None:
        if job.version == NO_VERSION:
            return  # suspected; `quiet` starts it
        job.running = True
        self._running += 1
        self._pull(job)

    def _pull(self, job: _Job) -> None:
        """The home's own copy first: it serves the others' requests."""
        me = self._home.me
        targets = [me] if me in job.targets else list(job.targets)
        for target in targets:
            if job.targets[target]:
                continue
            job.targets[target] = True
            repair = target in job.repair
            if target == me:
                sources = [self._placement.nodes[member] for member in job.sources]
                self._puller.pull(job.oid, job.version, sources, repair, self._pulled(job, target))
                continue
            message = Message(
                Kind.PULL,
                self._fence,
                oid=job.oid,
                version=job.version,
                flags=Flag.REPAIR if repair else 0,
                body=encode_members(job.sources),
            )
            pulled = self._pulled(job, target)
            self._context.peers.request(
                self._placement.nodes[target],
                message,
                lambda answer, pulled=pulled: pulled(answer.result),  # type: ignore[misc]
            )

    def _pulled(self, job: _Job, target: int) -> Callable[[int], None]:
        def pulled(result: int) -> None:
            if self._context.fence != self._fence:
                return
            if result != Result.SUCCESS:
                self._failed(job, target, result)
                return
            del job.targets[target]
            if target == self._home.me:
                self._home.hooks.restored_locally(job.oid)
            job.full = False
            job.repair.pop(target, None)
            job.stale.pop(target, None)
            job.sources.append(target)
            if not job.targets:
                self._done(job)
            elif not any(job.targets.values()):
                self._pull(job)  # the others, now that the home has it; or one that failed before

        return pulled

    def _failed(self, job: _Job, target: int, result: int) -> None:
        """Tries again a little later, for as long as the epoch lasts."""
        job.failures += 1
        if result == Result.NO_SPACE and not job.full:
            job.full = True
            job.stale.pop(target, None)  # the attempt has spoilt it
            self._release(job)
        if job.failures & (job.failures - 1) == 0:  # the 1st, 2nd, 4th, 8th ... time
            node = self._placement.nodes[target]
            self._context.log(4, f"object {job.oid:016x}: {node} could not restore it (result {result:#x}), again soon")

        job.targets[target] = False
        if any(job.targets.values()):
            return  # another target is still being restored; its end decides
        job.running = False
        self._running -= 1

        def again() -> None:
            if self._context.fence == self._fence and job.oid in self._jobs and not job.running:
                self._start(job)

        self._context.clock.after(RECOVERY_RETRY_NS, again)
        self.run()

    def _done(self, job: _Job) -> None:
        del self._jobs[job.oid]
        self._running -= 1
        self.finished += 1
        self.drop(job.oid, job.surplus)
        self._release(job)
        self.run()

    def _release(self, job: _Job) -> None:
        waiting, job.waiting = job.waiting, []
        for retry in waiting:
            retry()

    def drop(self, oid: ObjectId, holders: tuple[int, ...]) -> None:
        """Surplus copies go: every replica has the object, or it was deleted."""
        for member in holders:
            if member == self._home.me:
                self._context.origins.forget(oid)
                self._context.store.remove(oid, lambda _: None)
            else:
                message = Message(Kind.DROP, self._fence, oid=oid)
                self._context.peers.request(self._placement.nodes[member], message, lambda _: None)

    def _report(self) -> None:
        """Tells everybody, once, that nothing is left to do here."""
        if self._jobs or self._reported or not self._begun:
            return
        self._reported = True
        for node in self._placement.nodes:
            if node != self._context.me:
                self._context.peers.request(node, Message(Kind.COMPLETE, self._fence), lambda _: None)
        self._home.hooks.completed_locally()

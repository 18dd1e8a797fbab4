"""Takes back writes of a coded object that too few strips have to decode them.

Peering does so at the end of an epoch. But a write that has ended must not stay above the watermark for as long as the
epoch lasts: everything behind it would be kept, too. And once the watermark passes it, nobody can take it back: then
the object has neither an old nor a new state that is whole. So its home does it at once. Nobody was told that it is
done, nor has read it, for reads wait as long as a strip lacks a write (core.bad_strips); and it stays above the
watermark meanwhile, so that peering goes on with that if the epoch ends in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import Version, strip_of
from sheepdog.cluster.core.limits import RECOVERY_RETRY_NS
from sheepdog.cluster.core.messages import Kind, Message
from sheepdog.cluster.core.recovery_jobs import Job, StripJob

if TYPE_CHECKING:
    from sheepdog.cluster.core.home import Home
    from sheepdog.cluster.core.recovery import Recovery


class _Round:
    """Strips that are asked; `full` can do so when there is space, `failed` cannot."""

    __slots__ = ("cut", "failed", "full", "job", "left")

    def __init__(self, job: StripJob, cut: Version) -> None:
        self.job = job
        self.cut = cut
        self.left = 0
        self.failed: list[int] = []
        self.full: list[tuple[int, int]] = []


class TakeBack:
    """Of the objects of one home, in one epoch."""

    def __init__(self, context: Context, home: Home, recovery: Recovery) -> None:
        self._context = context
        self._home = home
        self._recovery = recovery

    def begin(self, job: Job) -> bool:
        """Of an object of which no write is on its way. True if something is to be taken back: Recovery.taken_back is
        called then, or Recovery.quiet first, when its strips are not being brought level any more."""
        cut = job.cut()
        if cut is None or not isinstance(job, StripJob):
            return False
        if self._home.strips.levels.withdraw(job.oid):
            self._context.probe("take_back.begun")
            job.running = True
            self._ask(_Round(job, cut), job.able_to_go_back(cut))
        return True

    def _ask(self, asked: _Round, strips: Sequence[tuple[int, int]]) -> None:
        asked.left = len(strips)
        asked.full = []
        nodes = self._context.placement.nodes
        epoch, term, counter = asked.cut
        for strip, member in strips:
            oid = strip_of(asked.job.oid, strip)
            message = Message(Kind.ROLLBACK, self._home.fence, oid=oid, offset=epoch, length=term, sequence=counter)
            answered = partial(self._answered, asked, strip, member)
            if member == self._home.me:
                self._home.hooks.agree(message, answered)
            else:
                self._context.peers.request(nodes[member], message, partial(_answer, answered))

    def _answered(self, asked: _Round, strip: int, member: int, result: int) -> None:
        if not self._home.is_present():
            return
        if result == Result.NO_SPACE:
            asked.full.append((strip, member))
        elif result:
            asked.failed.append(strip)
        asked.left -= 1
        if asked.left:
            return
        if asked.full:
            self._context.probe("take_back.no_space")
            self._recovery.refuse(asked.job, Result.NO_SPACE)
            self._context.clock.after(RECOVERY_RETRY_NS, partial(self._again, asked))
        else:
            self._recovery.taken_back(asked.job, asked.cut, asked.failed)

    def _again(self, asked: _Round) -> None:
        if self._home.is_present():
            self._ask(asked, asked.full)


def _answer(answered: partial[None], answer: Message) -> None:
    answered(answer.result)

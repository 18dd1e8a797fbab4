"""Strips that lack a write, and when that is known well enough for the write to be seen.

A strip that could not take a write looks like one that the write has not come to yet. If power failed everywhere now,
peering would take the write back, and all behind it (core.strip_peering). So before anybody reads what it wrote, the
node of the strip notes durably that the strip does not count (core.stale_strips); until then the write stays above the
watermark, and its home has reads of the object wait.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.messages import Kind, Message

if TYPE_CHECKING:
    from sheepdog.cluster.core.home import Home
    from sheepdog.cluster.core.recovery_jobs import StripJob


class BadStrips:
    """Of the objects of one home, in one epoch."""

    def __init__(self, context: Context, home: Home) -> None:
        self._context = context
        self._home = home

    def note(self, job: StripJob, noted: Callable[[], None]) -> None:
        """Has all nodes note whose strips of the object are to be made anew; none of its writes is on its way."""
        if job.noted or not job.repair:
            self._noted(job, noted)
            return
        self._context.probe("bad_strips.noted")
        left = len(job.repair)

        def answered(_: Message | None) -> None:
            nonlocal left
            left -= 1
            if not left and self._home.is_present():
                self._noted(job, noted)

        for member in list(job.repair):
            strip = job.copy_on(member)
            if member == self._home.me:
                self._home.hooks.note_bad(strip, partial(answered, None))
            else:
                message = Message(Kind.BAD, self._home.fence, oid=strip)
                self._context.peers.request(self._context.placement.nodes[member], message, answered)

    def _noted(self, job: StripJob, noted: Callable[[], None]) -> None:
        job.choose()
        job.mark_noted()
        noted()

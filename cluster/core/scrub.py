"""The scrub: reads every block that this node holds from its disks, and has repaired what does not match its hash.

 idle      no pass: none was asked for, or the schedule's time has not come
 running   copies in ascending order of their ids, one chunk at a time, at a bounded rate, slower while clients work
 stopped   a pass that somebody stopped; `start` goes on from there

An object whose home is this node and that is coded has its strips compared then (core.strip_check).

The position survives a restart. A bad copy or strip is repaired by its home from others; what is still bad then is lost
and named. Each node scrubs what it holds itself; nothing here is known to other nodes.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable
from typing import Any, Final

from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.errors import Corrupt, StoreError
from sheepdog.cluster.core.ids import NO_VERSION, STRIP_SHIFT, ObjectId, oid_name, plain_oid
from sheepdog.cluster.core.limits import (
    BLOCK_SIZE,
    SCRUB_BYTES_PER_S,
    SCRUB_BYTES_PER_S_MAX,
    SCRUB_CHUNK_BYTES,
    SCRUB_INTERVAL_HOURS,
    SCRUB_LOST_MAX,
    SCRUB_REPAIR_TRIES,
    SCRUB_REPAIR_WAIT_NS,
    SCRUB_SAVE_NS,
    SCRUB_TICK_NS,
    SCRUB_YIELD,
    STRIP_CHECK_LIMIT_NS,
)
from sheepdog.cluster.core.messages import Buffer
from sheepdog.cluster.core.ports import NodeState, Timer
from sheepdog.cluster.core.strip_check import Checked, StripCheck

Repair = Callable[[ObjectId, Callable[[int, Buffer], None]], None]
"""repair(oid, done): this node's copy or strip of the object is made right; done(result, b"")."""

_SECOND_NS: Final = 1_000_000_000
_HOUR_S: Final = 3600
_KEPT: Final = (
    "state", "position", "began", "ended", "objects", "blocks", "found", "repaired", "misfits", "lost", "passes",
    "hours", "rate",
)  # fmt: skip


class Scrub:
    """Of one node. Times are Unix seconds, `rate` is bytes per second."""

    def __init__(self, context: Context, disk: NodeState, repair: Repair, strips: StripCheck) -> None:
        self._context = context
        self._disk = disk
        self._repair = repair
        self._strips = strips
        self.state = "idle"
        self.position = -1  # the last object that is done
        self.began = 0
        self.ended = 0
        self.objects = self.blocks = 0  # looked at in this pass
        self.found = self.repaired = 0  # bad blocks of this pass
        self.misfits = 0  # strips of this pass that did not fit the others of their object, and were made anew
        self.lost: list[list[Any]] = []  # [object's name, blocks, directory of the disk]: no copy had them
        self.passes = 0
        self.hours = SCRUB_INTERVAL_HOURS  # from pass to pass; 0: never by itself
        self.rate = SCRUB_BYTES_PER_S
        self._oids: list[ObjectId] = []
        self._bad: dict[tuple[int, int], int] = {}  # chunks (offset, length) of the present object: how many blocks
        self._returns = 0  # to the present object, which could not be judged
        self._place = ""  # directory of the disk where they are
        self._timer: Timer | None = None
        self._turn = 0  # an answer of an earlier turn does not count
        self._saved_ns = 0

    # -- asked for ---------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """What was going on when the node ended goes on."""
        try:
            kept = json.loads(self._disk.load_scrub() or b"{}")
            for name in _KEPT:
                setattr(self, name, type(getattr(self, name))(kept.get(name, getattr(self, name))))
        except (ValueError, TypeError, AttributeError):
            self._context.log(4, "what is known of the last scrub cannot be read; the next pass begins anew")
        if self.state == "running":
            self._oids = []
            self._later(SCRUB_TICK_NS)
        else:
            self._watch_schedule()

    def start(self) -> None:
        """Begins a pass, or goes on with one that was stopped."""
        if self.state == "running":
            return
        if self.state == "idle":
            self.position = -1
            self.began, self.ended = self._now_s(), 0
            self.objects = self.blocks = self.found = self.repaired = self.misfits = 0
            self.lost = []
        self.state = "running"
        self._context.log(5, "scrub: every block of this node is verified")
        self._oids = []
        self._save()
        self._later(0)

    def stop(self) -> None:
        if self.state == "running":
            self.state = "stopped"
            self._turn += 1
            self._save()

    def schedule(self, hours: int, rate: int) -> bool:
        """Hours from pass to pass (0: only when asked for), and most bytes a second; False if senseless."""
        if hours < 0 or not BLOCK_SIZE <= rate <= SCRUB_BYTES_PER_S_MAX:
            return False
        self.hours, self.rate = hours, rate
        self._save()
        if self.state == "idle":
            self._watch_schedule()
        return True

    def status(self) -> dict[str, Any]:
        """For `dog node scrub status`; `total` and `left` count objects."""
        total = [oid for oid, _ in self._context.store.inventory()]
        left = len(total) - bisect_right(total, self.position) if self.state != "idle" else 0
        return {name: getattr(self, name) for name in _KEPT if name != "position"} | {"total": len(total), "left": left}

    def retire(self) -> None:
        """This incarnation of the node is over; the next one goes on."""
        self._turn += 1
        self._cancel()

    # -- the pass ----------------------------------------------------------------------------------------------------

    def _now_s(self) -> int:
        return self._context.clock.wall_ns() // _SECOND_NS

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _later(self, delay_ns: int) -> None:
        self._cancel()
        self._turn += 1
        turn = self._turn
        self._timer = self._context.clock.after(delay_ns, lambda: self._next() if turn == self._turn else None)

    def _watch_schedule(self) -> None:
        """While idle: looks now and then whether it is time."""
        self._cancel()
        if not self.hours:
            return
        if not self.ended:  # a new node begins its first pass one interval from now
            self.ended = self._now_s()
            self._save()
        turn = self._turn

        def look() -> None:
            if self.state != "idle" or turn != self._turn:
                return
            if self._now_s() - self.ended >= self.hours * _HOUR_S:
                self.start()
            else:
                self._watch_schedule()

        self._timer = self._context.clock.after(SCRUB_TICK_NS, look)

    def _next(self) -> None:
        """The next object behind the position."""
        if self.state != "running":
            return
        if self._context.epoch == 0 or not self._context.state.loaded:
            self._later(SCRUB_TICK_NS)  # who could repair is not known yet
            return
        if not self._oids:
            self._oids = [oid for oid, _ in self._context.store.inventory() if oid > self.position]
            self._oids.reverse()
        while self._oids:
            oid = self._oids.pop()
            version = self._context.store.version(oid)
            if version is not None and version != NO_VERSION:  # others are being restored, and verified by that
                self.objects += 1
                self._bad = {}
                self._returns = 0
                self._verify(oid, 0)
                return
            self.position = oid
        self._end_pass()

    def _end_pass(self) -> None:
        self.state, self.ended, self.position = "idle", self._now_s(), -1
        self.passes += 1
        self._save()
        self._context.log(
            5,
            f"scrub: {self.objects} objects with {self.blocks} blocks verified, {self.found} were bad, "
            f"{self.repaired} are repaired, {sum(len(one[1]) for one in self.lost)} are lost"
            + (f"; {self.misfits} strips did not fit the others" if self.misfits else ""),
        )
        self._turn += 1
        self._watch_schedule()

    def _verify(self, oid: ObjectId, offset: int) -> None:
        """One chunk; the next one when its share of time is over."""
        store = self._context.store
        try:
            size = store.size(oid)
        except StoreError:
            size = 0
        if offset >= size:
            if self._bad:
                self._repair_object(oid, 1)
            else:
                self._check_strips(oid, 0, size)
            return
        length = min(SCRUB_CHUNK_BYTES, size - offset)
        turn, began_ns = self._turn, self._context.clock.now_ns()

        def done(error: StoreError | None) -> None:
            if turn != self._turn:
                return
            self.blocks += -(-length // BLOCK_SIZE)
            if isinstance(error, Corrupt) and error.mended:
                self.found += 1
                self.repaired += 1
            elif isinstance(error, Corrupt):
                self._note_bad(oid, offset, length, error)
            if error is not None and not isinstance(error, Corrupt):
                self.found -= sum(self._bad.values())
                self._bad = {}
                if not self._later_again(oid, lambda: self._verify(oid, 0)):
                    self._finished(oid)
            else:
                self._go_on(oid, offset + length, self._pause_ns(length, began_ns))

        store.verify(oid, offset, length, done)

    def _check_strips(self, oid: ObjectId, offset: int, size: int) -> None:
        """Range after range of all strips of the object, if it is this node's to compare them."""
        if not oid >> STRIP_SHIFT or offset >= size:
            self._finished(oid)
            return
        turn, began_ns = self._turn, self._context.clock.now_ns()

        def checked(found: Checked) -> None:
            if turn != self._turn:
                return
            self._cancel()
            self.misfits += len(found.wrong)
            if found.wrong or not found.length:
                self._finished(oid)
                return
            self._timer = self._context.clock.after(
                self._pause_ns(found.length * found.strips, began_ns),
                lambda: self._check_strips(oid, offset + found.length, size) if turn == self._turn else None,
            )

        self._cancel()
        self._timer = self._context.clock.after(
            STRIP_CHECK_LIMIT_NS, lambda: self._finished(oid) if turn == self._turn else None
        )
        self._strips.check(plain_oid(oid), offset, size, checked)

    def _later_again(self, oid: ObjectId, look: Callable[[], None]) -> bool:
        """The copy is being made anew: looks again a little later, some times. False: it is gone, or its disk is."""
        self._returns += 1
        if self._context.store.version(oid) is None or self._returns > SCRUB_REPAIR_TRIES:
            return False
        self._cancel()
        turn = self._turn
        self._timer = self._context.clock.after(SCRUB_REPAIR_WAIT_NS, lambda: look() if turn == self._turn else None)
        return True

    def _pause_ns(self, length: int, began_ns: int) -> int:
        """What is left of the chunk's share of time: a fraction of the rate while clients have requests under way."""
        rate = max(BLOCK_SIZE, self.rate // SCRUB_YIELD) if self._context.active_requests() else self.rate
        return max(0, length * _SECOND_NS // rate - (self._context.clock.now_ns() - began_ns))

    def _go_on(self, oid: ObjectId, offset: int, pause_ns: int) -> None:
        self._cancel()
        turn = self._turn
        self._timer = self._context.clock.after(
            pause_ns, lambda: self._verify(oid, offset) if turn == self._turn else None
        )

    def _finished(self, oid: ObjectId) -> None:
        self.position = oid
        if self._context.clock.now_ns() - self._saved_ns >= SCRUB_SAVE_NS:
            self._save()
        self._later(0)

    # -- what is bad -------------------------------------------------------------------------------------------------

    def _note_bad(self, oid: ObjectId, offset: int, length: int, error: Corrupt) -> None:
        """The rest of the object is looked at before it is repaired: so all that is bad is counted."""
        blocks = len(error.blocks) or 1  # none are named where the whole file cannot be read
        self.found += blocks
        self._bad[offset, length] = blocks
        self._place = error.place
        self._context.probe("scrub.found")
        self._context.log(3, f"scrub: {oid_name(oid)}: {error}")

    def _repair_object(self, oid: ObjectId, tries: int) -> None:
        """Has the copy repaired, then looks again: what is bad still is lost.

        Some tries, for while several nodes find the object bad at once they are no sources for each other.
        """
        turn = self._turn

        def repaired(result: int, _: Buffer) -> None:
            if turn == self._turn:
                self._judge(oid, tries, list(self._bad), [])

        self._repair(plain_oid(oid), repaired)

    def _judge(self, oid: ObjectId, tries: int, chunks: list[tuple[int, int]], left: list[int]) -> None:
        """Verifies the chunks that were bad, one after another."""
        if not chunks:
            self._judged(oid, tries, left)
            return
        turn, chunk = self._turn, chunks[0]

        def verified(error: StoreError | None) -> None:
            if turn != self._turn:
                return
            known = error is None or isinstance(error, Corrupt)
            if not known and self._later_again(oid, lambda: self._judge(oid, tries, chunks, left)):
                return
            still = list(error.blocks) if isinstance(error, Corrupt) else []
            self._judge(oid, tries, chunks[1:], left + still)

        self._context.store.verify(oid, *chunk, verified)

    def _own_turn(self, oid: ObjectId) -> int:
        """1 for the object's first node, 2 for the second: those that found it bad together ask one after another."""
        placement = self._context.placement
        replicas = placement.replicas(plain_oid(oid))
        return 1 + replicas.index(placement.me) if placement.me in replicas else 1

    def _judged(self, oid: ObjectId, tries: int, left: list[int]) -> None:
        if left and tries < SCRUB_REPAIR_TRIES:
            turn = self._turn
            self._timer = self._context.clock.after(
                tries * self._own_turn(oid) * SCRUB_REPAIR_WAIT_NS,
                lambda: self._repair_object(oid, tries + 1) if turn == self._turn else None,
            )
            return
        self.repaired += sum(self._bad.values()) - len(left)
        self._bad = {}
        if left:
            self._context.log(2, f"scrub: {oid_name(oid)} in {self._place}: blocks {left} are lost: no copy has them")
            if len(self.lost) < SCRUB_LOST_MAX:
                self.lost.append([oid_name(oid), left, self._place])
        self._saved_ns = 0
        self._finished(oid)

    def _save(self) -> None:
        self._saved_ns = self._context.clock.now_ns()
        data = json.dumps({name: getattr(self, name) for name in _KEPT}).encode()
        self._disk.save_scrub(data, lambda error: None)

"""Numbered changes of coded objects on their way to the strips: each strip gets them in the order of their numbers.

Data strips get their part as soon as a change has its number. What the parity strips get may not be known then: a small
write goes to its data strip first, whose node answers with the bytes that were there, and the difference is theirs.
Meanwhile nothing else of the object goes to its parity strips: whatever is numbered later waits here. The lock of a
change is held until it has been sent to all its strips, so who has locked a range finds no strip ahead of another one.

What goes to parity strips late has a sequence of its own, so that each link sees sequences ascend; the version is that
of the write. The watermark stays below the write until all have answered, and so below that sequence.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.erasure import Policy
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.home_writes import Write
from sheepdog.cluster.core.ids import ObjectId, strip_of
from sheepdog.cluster.core.messages import Flag, Kind, Message
from sheepdog.cluster.core.range_locks import Lock
from sheepdog.cluster.core.replica import note_origin, spoilt
from sheepdog.cluster.core.strip_levels import Leveled
from sheepdog.cluster.core.strip_replica import StripReplica
from sheepdog.cluster.core.striping import Change, Piece, encode_part

if TYPE_CHECKING:
    from sheepdog.cluster.core.home import Home


class Sending:
    """A numbered change. `members`: (strip, member) that get a part of it; `size`: `length` of their APPLY."""

    __slots__ = ("changes", "flags", "lock", "members", "policy", "size", "write")

    def __init__(
        self,
        write: Write,
        policy: Policy,
        members: Sequence[tuple[int, int]],
        flags: int,
        size: int,
        lock: Lock,
    ) -> None:
        self.write = write
        self.policy = policy
        self.members = members
        self.flags = flags
        self.size = size
        self.lock = lock
        self.changes: Sequence[Change] | None = None  # by strip; None: not known yet

    def data(self) -> list[tuple[int, int]]:
        return [entry for entry in self.members if entry[0] < self.policy.data]

    def parity(self) -> list[tuple[int, int]]:
        return [entry for entry in self.members if entry[0] >= self.policy.data]


class StripSends:
    """Of one home, in one epoch. `release` gives the lock of a change back."""

    def __init__(self, context: Context, home: Home, strips: StripReplica, release: Callable[[Lock], None]) -> None:
        self._context = context
        self._home = home
        self._strips = strips
        self._release = release
        self._placement = context.placement
        self._me = context.placement.me
        self._waiting: dict[ObjectId, deque[Sending]] = {}  # whose parity strips have not been sent theirs
        self._order: deque[tuple[int, ObjectId]] = deque()  # writes of strips here that may not be everywhere
        self._own_levels: deque[tuple[int, Sequence[Leveled]]] = deque()  # of strips here, perhaps not yet everywhere

    def behind(self, oid: ObjectId) -> bool:
        """Some of its strips have not been sent all numbered changes."""
        return oid in self._waiting

    def send(self, sending: Sending, changes: Sequence[Change]) -> None:
        """What each strip gets is known."""
        sending.changes = changes
        waiting = self._waiting.get(sending.write.submission.oid)
        if waiting is None:
            self._hand_out(sending, sending.members, changes, sending.write.sequence)
            self._release(sending.lock)
        else:
            self._context.probe("strips.parity_waits")
            waiting.append(sending)
            self._hand_out(sending, sending.data(), changes, sending.write.sequence)

    def replace(self, sending: Sending, part: Piece) -> None:
        """A write of one piece and no other data strip, on another node, whose answer has the bytes that were there."""
        write, context = sending.write, self._context
        submission, member = write.submission, sending.data()[0][1]
        self._waiting.setdefault(submission.oid, deque()).append(sending)
        write.strips |= 1 << part.strip
        message = self._message(sending, part.strip, part.offset, sending.flags | Flag.OLD, write.sequence)
        message.body = submission.data
        self._home.untold[member] = None
        answered = partial(self._replaced, sending, part, member)
        context.peers.request(self._placement.nodes[member], message, answered)

    def _replaced(self, sending: Sending, part: Piece, member: int, answer: Message) -> None:
        """A strip that could not take the write leaves nothing to send: then no strip has it, and it comes again.

        But the strip may say so late, and have taken what came behind it. No parity strip gets any of that: all of it
        is taken back (core.take_back).
        """
        write, submission = sending.write, sending.write.submission
        if sending.changes is not None:  # given up meanwhile
            if answer.result:
                self._home.replica_failed(write, member, answer.result)
                write.result = Result.AGAIN
        elif answer.result:
            self._context.probe("strips.replaced_nothing")
            self._give_up(submission.oid, sending)
            self._home.replica_failed(write, member, answer.result)
            if answer.result != Result.NO_SPACE:
                write.result = Result.AGAIN
        else:
            old = [answer.payload()]
            sending.changes = encode_part(self._context.coder, sending.policy, [part], submission.data, old)
        self._go_on(submission.oid)
        write.pending -= 1
        if not write.pending:
            self._home.completed(write)

    def _give_up(self, oid: ObjectId, first: Sending) -> None:
        """Nothing that waits from this change on goes to parity strips."""
        self._home.strips.refusals.void(oid, first.write.version)
        waiting = self._waiting[oid]
        for index in range(waiting.index(first), len(waiting)):
            sending, write = waiting[index], waiting[index].write
            write.pending -= len(sending.parity())
            write.tolerance = 0
            write.failed = {}
            write.result = Result.AGAIN
            sending.members = ()
            sending.changes = ()

    def _go_on(self, oid: ObjectId) -> None:
        """The parity strips get what is known for them, in the order of numbers."""
        waiting = self._waiting.get(oid)
        while waiting and (changes := waiting[0].changes) is not None:
            sending = waiting.popleft()
            if not waiting:
                del self._waiting[oid]
            self._home.sequence += 1
            self._hand_out(sending, sending.parity(), changes, self._home.sequence)
            self._release(sending.lock)

    def _message(self, sending: Sending, strip: int, offset: int, flags: int, sequence: int) -> Message:
        """APPLY without its bytes."""
        write = sending.write
        submission = write.submission
        return Message(
            Kind.APPLY,
            self._context.fence,
            0,
            strip_of(submission.oid, strip),
            offset,
            sending.size,
            flags,
            write.version,
            sequence,
            self._home.watermark(),
            0,
            0,
            b"",
            submission.number,
            submission.floor,
            submission.gateway,
        )

    def _hand_out(
        self, sending: Sending, members: Sequence[tuple[int, int]], changes: Sequence[Change], sequence: int
    ) -> None:
        """These strips get their part; the one of this node last."""
        write, flags, nodes, peers = sending.write, sending.flags, self._placement.nodes, self._context.peers
        mine: tuple[int, Change, int] | None = None
        for strip, member in members:
            change = changes[strip]
            write.strips |= 1 << strip
            own_flags = flags | Flag.XOR if change.delta and not flags & Flag.CREATE else flags
            if member == self._me:
                mine = strip, change, own_flags
                continue
            message = self._message(sending, strip, change.offset, own_flags, sequence)
            message.body = change.data
            peers.request(nodes[member], message, write.remote(member))
        if mine is not None:
            self._perform(write, *mine, sending.size, sequence)

    def _perform(self, write: Write, strip: int, change: Change, flags: int, size: int, sequence: int) -> None:
        """The part of this node's strip."""
        context, submission = self._context, write.submission
        oid, oid_here = submission.oid, strip_of(submission.oid, strip)
        if flags & Flag.REMOVE:
            self._home.hooks.restored_locally(oid_here)
        self._order.append((sequence, oid_here))
        data = change.data[0] if len(change.data) == 1 else b"".join(change.data)
        taken = partial(
            note_origin, context, flags, oid, submission.gateway, submission.number, submission.floor, write.version
        )
        if not (context.spoilt and spoilt(context, flags, oid_here, write.local)):
            self._strips.perform(flags, oid_here, change.offset, size, data, write.version, taken, write.local)

    def level_here(self, sequence: int, levels: Sequence[Leveled], done: Callable[[list[ObjectId]], None]) -> None:
        """The part of this node in bringing strips level; `done` gets those that could not be."""
        self._own_levels.append((sequence, levels))
        self._strips.bring_level(levels, done)

    def uneven_here(self, sequence: int, still: Sequence[Leveled]) -> None:
        """Of the strips brought level with this number these are not level with the others."""
        strips = dict(still)
        for index, (number, levels) in enumerate(self._own_levels):
            if number == sequence:
                self._own_levels[index] = number, [level for level in levels if level[0] not in strips]

    def stable(self, watermark: int) -> None:
        """All strips have every write up to `watermark`."""
        order = self._order
        undo = self._strips.undo
        while order and order[0][0] <= watermark:
            sequence, strip = order.popleft()
            undo.settle(strip, self._home.version_of(sequence))
        while self._own_levels and self._own_levels[0][0] <= watermark:
            for strip, version in self._own_levels.popleft()[1]:
                undo.level(strip, version)

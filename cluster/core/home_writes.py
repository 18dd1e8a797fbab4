"""Changes at their home: what a gateway wants, and the numbered write that comes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

from sheepdog.cluster.core.errors import Result, StoreError
from sheepdog.cluster.core.ids import NO_VERSION, ObjectId, Version
from sheepdog.cluster.core.messages import Flag, Kind, Message
from sheepdog.cluster.core.peering import Verdict
from sheepdog.cluster.core.ports import Buffer
from sheepdog.cluster.core.replica import touched

if TYPE_CHECKING:
    from sheepdog.cluster.core.home import Home

IoDone: TypeAlias = Callable[[int, Buffer], None]
_SUCCESS: Final = int(Result.SUCCESS)  # looked up once, not for each write


class HomeHooks(Protocol):
    """What a home tells the replica side of its own node."""

    def settled_locally(self, verdict: Verdict, known: Callable[[], None]) -> None:
        """Peering is over; `known` when this node will not forget what it must not, as for other members."""

    def restored_locally(self, oid: ObjectId) -> None:
        """This node's copy is current again."""

    def spoilt_locally(self, oid: ObjectId, version: Version = NO_VERSION) -> None:
        """This node's copy lacks a write; a strip that of this version."""

    def note_bad(self, strip: ObjectId, noted: Callable[[], None]) -> None:
        """BAD to this node."""

    def when_durable(self, call: Callable[[], None]) -> None:
        """Calls, in this epoch, when what this node has told of its copies is on its disk."""

    def completed_locally(self) -> None:
        """Everything this home is home of is recovered."""

    def pull(self, message: Message, pulled: Callable[[int], None]) -> None:
        """PULL to this node."""

    def agree(self, message: Message, agreed: Callable[[int], None]) -> None:
        """ROLLBACK to this node."""

    def drop(self, oid: ObjectId, flags: int) -> None:
        """DROP to this node."""


class Submission:
    """A change that a gateway wants: fields as of a SUBMIT message. `done(result, b"")` comes once, or never
    if the epoch changes first (the gateway submits again)."""

    __slots__ = ("copies", "data", "done", "flags", "floor", "gateway", "length", "number", "offset", "oid")

    def __init__(
        self,
        oid: ObjectId,
        flags: int,
        offset: int,
        length: int,
        data: Buffer,
        copies: int,
        done: IoDone,
        gateway: int,
        number: int,
        floor: int,
    ) -> None:
        self.oid = oid
        self.flags = flags
        self.offset = offset
        self.length = length
        self.data = data
        self.copies = copies
        self.done = done
        self.gateway = gateway  # whose write it is: member, its own number, and below which it has all answers
        self.number = number
        self.floor = floor


class Write:
    """A numbered write on its way to the replicas."""

    __slots__ = (
        "end",
        "failed",
        "fresh",
        "home",
        "ordered",
        "pending",
        "result",
        "sequence",
        "start",
        "strips",
        "submission",
        "tolerance",
        "version",
        "waiting",
    )

    def __init__(self, home: Home, submission: Submission, sequence: int, pending: int, fresh: bool) -> None:
        self.version = home.version_of(sequence)
        self.tolerance = 0  # so many may fail (their bytes are rotten), and the write is still where it must be
        self.ordered = False  # answered behind all earlier writes of the object
        self.strips = 0  # that it was sent to, a bit each; whole copies: 0
        self.failed: dict[int, int] | None = None  # strips that did not take it, and why
        self.fresh = fresh  # creates an object that was not there: if it fails anywhere, it is undone everywhere
        self.home = home
        self.submission = submission
        self.sequence = sequence
        self.pending = pending
        self.result = _SUCCESS
        self.start, self.end = touched(
            submission.flags,
            submission.offset,
            submission.length if submission.flags & Flag.PUNCH else len(submission.data),
        )
        self.waiting: list[Callable[[], None]] | None = None

    def when_over(self, call: Callable[[], None]) -> None:
        """Calls when all have answered, and it is undone if it must be."""
        if self.waiting is None:
            self.waiting = []
        self.waiting.append(call)

    def hurry(self, call: Callable[[], None]) -> None:
        """As `when_over`, for somebody who waits: replicas that have a direct write tell its home with their next
        message, an answer to this one."""
        self.when_over(call)
        if self.submission.flags & Flag.DIRECT:
            home = self.home
            nodes = home.context.placement.nodes
            for replica in home.replicas_of(self.submission):
                if replica != home.me:
                    home.context.peers.request(nodes[replica], Message(Kind.PING, home.fence), _ignore)

    def local(self, error: StoreError | None) -> None:
        if error is not None:
            self.home.failed_here(self, error)
            self.home.replica_failed(self, self.home.me, error.result)
        elif self.submission.flags & Flag.DIRECT and self.home.is_present():
            self._tell_gateway()
        self.pending -= 1
        if not self.pending:
            self.home.completed(self)

    def _tell_gateway(self) -> None:
        """As the other replicas do: with all of them it answers its client, before this home knows of all."""
        context, submission = self.home.context, self.submission
        gateway = context.placement.nodes[submission.gateway]
        context.network.applied(gateway, self.home.fence, submission.number, self.sequence)

    def remote(self, node: int) -> RemoteCopy:
        """What takes the answer of another member, which is asked now."""
        self.home.untold[node] = None
        return RemoteCopy(self, node)


class RemoteCopy:
    """A write on its way to another member, whose answer it takes (`core.peers.Answered`).

    One object, where a nested function is two.
    """

    __slots__ = ("node", "write")

    def __init__(self, write: Write, node: int) -> None:
        self.write = write
        self.node = node

    def __call__(self, answer: Message) -> None:
        write = self.write
        home = write.home
        if answer.result:
            home.replica_failed(write, self.node, answer.result)
        write.pending -= 1
        if not write.pending:
            home.completed(write)


def _ignore(_: Message) -> None:
    """What an answer says does not matter."""

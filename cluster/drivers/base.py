"""What a membership engine promises. One driver object is one attachment of one process.

Guarantees of every driver:

* G1 one total order of View and Delivery, the same on all attached members;
* G2 own messages come back in that order, exactly once;
* G3 a sender that is not in the current View is never delivered;
* G4 no View is delivered in a minority: it becomes Suspended, then Lost;
* G5 a pair (id, incarnation) never returns after its leave;
* G6 the leave of a dead member is delivered once the engine has given it up: how soon, is how the engine is
  configured (docs/operations.md, "How soon a node is given up");
* G7 a process that left without proof of its end has no lease once `View.grace_ns` has passed since its leave.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol, TypeAlias

from sheepdog.cluster.core.ports import Event, Peer, Votes

OnEvent: TypeAlias = Callable[[Event], None]

MAX_MESSAGE_BYTES = (
    1_000_000  # the smallest limit of the engines: a znode and a CPG message hold 1 MiB, header included
)
MAX_QUEUED_BYTES = 64_000_000  # own messages that wait for the engine; more means that it has been stuck for long


class Driver(Protocol):
    """One attachment to a membership engine. All calls and events belong to the event loop's thread."""

    name: ClassVar[str]
    max_message: int
    """Largest message or payload in bytes; larger ones are refused with UsageError."""

    def reach(self) -> None:
        """Waits for the engine, a few seconds at most; UsageError when it cannot be reached. Blocks: before `open`."""

    async def open(self, me: Peer, on_event: OnEvent) -> None:
        """Connects and becomes visible; the incarnation of `me` is replaced by a new one.

        The first event is a View that joins this process, oldest member first; it may come before `open` returns.
        UsageError: the engine cannot be reached as configured, or the id is attached already.
        """

    def local_address(self) -> str | None:
        """The address under which the other members reach this host; None: the loopback will do. Before `open`.

        It is part of the node's identity, so it is not guessed: UsageError when it cannot be told now.
        """

    def renew(self) -> None:
        """Asks for a `Leased` event, if this engine gives leases."""

    def votes(self) -> Votes | None:
        """How the engine counts; None where this host has no part in it, and before that is known."""

    def broadcast(self, data: bytes) -> None:
        """Queues a message to all members, this one included; retried inside until it is ordered."""

    async def leave(self) -> None:
        """Sends what is queued, then leaves: the others see it at once, this process gets no event afterwards."""

    async def close(self) -> None:
        """Frees everything, at any time and repeatedly; without `leave` the others see a death."""

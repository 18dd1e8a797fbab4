"""The vigil: finds members that the engine counts as alive but that do not answer, and has them expelled.

A stopped process, a hung disk or a dead link leaves a member attached to the engine while everybody waits for it.
While requests to a member stay open this machine asks it for a sign of life; one that stays silent for
SILENT_TICKS ticks is proposed for expulsion by an ordered command, which every member applies at the same place
(core.membership). So is the coordinator also without a request, while it owes the others a newcomer or a death. Two
that suspect each other: the first command wins, since it ends the epoch that the second names.

Not expelled: anybody who may hold what nobody else has, as far as this node knows from the others; better that
requests wait than that they fail. While the cluster recovers a member may be busy with all that it holds: then it has
UNSETTLED_TICKS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.ids import Member, NodeId
from sheepdog.cluster.core.limits import SILENT_TICKS, VIGIL_TICK_NS
from sheepdog.cluster.core.messages import Kind, Message
from sheepdog.cluster.core.state import node_key

_SIGNS = (Kind.APPLY, Kind.PING)  # what a healthy member answers by itself, whatever the others do


class Vigil:
    """Of one node. `may_expel` tells whether the cluster can do without a member now that has been silent for so many
    ticks, `awaited` who is to act although nobody has a request open there."""

    def __init__(
        self,
        context: Context,
        propose: Callable[[dict[str, Any]], None],
        may_expel: Callable[[NodeId, int], bool],
        awaited: Callable[[], Member | None],
    ) -> None:
        self._context = context
        self._propose = propose
        self._may_expel = may_expel
        self._awaited = awaited
        self._silent: dict[NodeId, tuple[int, int]] = {}  # id of the oldest open sign, ticks for which it was that one
        self._told: dict[NodeId, None] = {}  # complained about in this epoch
        self._proposed: dict[NodeId, None] = {}  # for expulsion, in this epoch
        context.peers.on_busy = self._watch

    def begin(self) -> None:
        """A new epoch: everybody begins anew."""
        self._silent = {}
        self._told = {}
        self._proposed = {}

    def look(self) -> None:
        """Somebody is awaited, or will not be any more before the next tick."""
        peers = self._context.peers
        if not peers.watched:
            peers.watched = True
            self._watch()

    def _watch(self) -> None:
        """A request is open: look after it, tick by tick, until none is."""
        self._context.clock.after(VIGIL_TICK_NS, self._tick)

    def _tick(self) -> None:
        context = self._context
        peers = context.peers
        busy = peers.busy()
        awaited = self._awaited()
        if awaited is not None and awaited.id not in busy:
            busy.append(awaited.id)
        if not busy or context.fence <= 0:
            peers.watched = False
            return
        for node in busy:
            oldest = peers.oldest_of(node, _SIGNS)
            if oldest is None:
                context.peers.request(node, Message(Kind.PING, context.fence), _heard)
                continue
            before, ticks = self._silent.get(node, (0, 0))
            ticks = ticks + 1 if before == oldest else 1
            self._silent[node] = oldest, ticks
            if ticks > SILENT_TICKS:
                self._suspect(node, ticks)
        self._watch()

    def _suspect(self, node: NodeId, ticks: int) -> None:
        context = self._context
        if node in self._proposed:
            return
        member = next((member for member in context.state.members if member.id == node), None)
        if member is None:
            return
        seconds = (ticks - 1) * VIGIL_TICK_NS // 1_000_000_000
        if not self._may_expel(node, ticks):
            if node in self._told:
                return
            self._told[node] = None
            context.probe("vigil.not_expelled")
            context.log(3, f"{node} has not answered for {seconds} s; it stays, as it may hold what nobody else has")
            return
        self._proposed[node] = None
        context.probe("vigil.expel")
        context.log(3, f"{node} has not answered for {seconds} s: expelling it")
        self._propose(
            {
                "t": "expel",
                "who": [node_key(node), member.incarnation],
                "epoch": context.epoch,
                "time": context.clock.wall_ns() // 1_000_000_000,
            }
        )


def _heard(_: Message) -> None:
    """A sign of life needs no more than its arrival."""

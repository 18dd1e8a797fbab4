"""Whether a ring of corosync may go on: the quorum's verdicts, and what votes say of those that stayed together."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from sheepdog.cluster.drivers.cpg import Verdict


class Ring(NamedTuple):
    """A new ring; what comes after it in the stream belongs to it, and the change right before it."""

    sequence: int
    nodes: tuple[int, ...]


class Right(Enum):
    """To go on with the order in a ring."""

    YES = "quorate"
    NO = "not quorate"
    OPEN = "not known yet"
    LOST = "another order may have gone on"


class Quorum:
    """As one process knows it."""

    def __init__(self) -> None:
        self.tie_breaker = False  # two nodes that are quorate alone: only the one with the lower number goes on
        self.votes: dict[int, int] = {}  # of nodes
        self.needed = 0  # how many votes it takes; 0: not known
        self._said: dict[int, Verdict] = {}  # by sequence of a ring
        self._whole: frozenset[int] = frozenset()  # nodes of the ring before, where our order went on

    def tell(self, verdict: Verdict) -> None:
        """It may change while the ring lasts."""
        self._said[verdict.sequence] = verdict

    def begin(self, ring: Ring) -> None:
        """Earlier rings are over."""
        self._said = {number: verdict for number, verdict in self._said.items() if number >= ring.sequence}

    def gone_on(self, ring: Ring) -> None:
        self._whole = frozenset(ring.nodes)

    def of(self, ring: Ring, broken: bool = False) -> Right:
        """For somebody who is in no order yet, and the first condition for all others (`right_of`).

        `broken`: members went with their nodes, so that the others may take themselves for the ones to go on.
        """
        verdict = self._said.get(ring.sequence)
        if verdict is None:
            return Right.OPEN
        if verdict.quorate and self.tie_breaker and broken and min(self._whole, default=0) not in ring.nodes:
            return Right.NO
        return Right.YES if verdict.quorate else Right.NO

    def right_of(self, ring: Ring, broken: bool) -> Right:
        """For a member of an order that went on in the ring before.

        A daemon that stood still may have missed rings. Where nodes have come that it does not know from the ring
        before, they may have been quorate meanwhile with those that left it, and have another order: unless nobody
        left, or those that stayed together are a majority by themselves.
        """
        verdict = self._said.get(ring.sequence)
        if verdict is None:
            over = any(number > ring.sequence for number in self._said)  # verdicts come in the order of the rings
            return Right.LOST if over else Right.OPEN
        stayed = self._whole.intersection(ring.nodes).difference(verdict.left)
        if stayed in (self._whole, frozenset(ring.nodes)) or self._is_majority(stayed):
            return self.of(ring, broken)
        return Right.LOST

    def _is_majority(self, nodes: frozenset[int]) -> bool:
        if self.tie_breaker and min(self._whole) not in nodes:
            return False
        return 0 < self.needed <= sum(self.votes.get(node, 0) for node in nodes)

"""Whether a ring of corosync may go on: the quorum's verdicts, and what votes say where there is none."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Ring(NamedTuple):
    """A new ring; what comes after it in the stream belongs to it, and the change right before it."""

    sequence: int
    nodes: tuple[int, ...]


class Verdict(Enum):
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
        self._said: dict[int, bool] = {}  # by sequence of a ring
        self._whole: tuple[int, ...] = ()  # nodes of the latest ring that was gone on in

    def tell(self, sequence: int, quorate: bool) -> None:
        """The verdict about a ring; it may change while the ring lasts."""
        self._said[sequence] = quorate

    def begin(self, ring: Ring) -> None:
        """Earlier rings are over."""
        self._said = {number: quorate for number, quorate in self._said.items() if number >= ring.sequence}

    def gone_on(self, ring: Ring) -> None:
        self._whole = ring.nodes

    def of(self, ring: Ring, broken: bool) -> Verdict:
        """`broken`: members went with their nodes, so that the others may take themselves for the ones to go on."""
        quorate = self._said.get(ring.sequence)
        if quorate is None:
            return Verdict.OPEN
        if quorate and self.tie_breaker and broken and min(self._whole, default=0) not in ring.nodes:
            return Verdict.NO
        return Verdict.YES if quorate else Verdict.NO

    def has_votes(self, ring: Ring) -> bool:
        """The ring's nodes are enough, whatever was said of it."""
        return 0 < self.needed <= sum(self.votes.get(node, 0) for node in ring.nodes)

"""Requests between nodes: matched by id, sent again when a link comes back, forgotten when the epoch changes.

A machine that must have its answer across epochs asks again in the new one (`core.router`, `core.operations`).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import Final, TypeVar

from sheepdog.cluster.core.ids import NO_VERSION, NodeId, Version
from sheepdog.cluster.core.messages import Buffer, Kind, Message
from sheepdog.cluster.core.ports import Network

_T = TypeVar("_T")
Answered = Callable[[Message], None]
_SUCCEEDED: Final = Message(Kind.ANSWER, 0)  # what is said of each request in a list of those that succeeded


def first_number(numbered: dict[int, _T], default: int) -> int:
    """The number that was put in first; `default` without any. As `next(iter())`, which costs compiled code thrice."""
    for number in numbered:
        return number
    return default


class Peers:
    """Outstanding requests by peer, in the order they were made."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.on_busy: Callable[[], None] | None = None  # called at the first open request
        self.watched = False  # `on_busy` was called, and whoever took it has not let go
        self._next_rid = 0
        self._outstanding: dict[NodeId, dict[int, tuple[Message, Answered]]] = {}

    def request(self, node: NodeId, message: Message, answered: Answered, late: bool = False) -> None:
        """Sends; `answered` gets the ANSWER, or nothing if the epoch changes first. `late`: as `Network.send_late`."""
        self._next_rid += 1
        message.rid = self._next_rid
        outstanding = self._outstanding.get(node)
        if outstanding is None:
            outstanding = self._outstanding[node] = {}
        outstanding[message.rid] = (message, answered)
        if not self.watched and self.on_busy is not None:
            self.watched = True
            self.on_busy()
        if late:
            self.network.send_late(node, message)
        else:
            self.network.send(node, message)

    def answer(
        self,
        node: NodeId,
        request: Message,
        result: int,
        body: Buffer = b"",
        version: Version = NO_VERSION,
        length: int = 0,
        flags: int = 0,
    ) -> None:
        if not (result or length or flags or body) and version is NO_VERSION:
            self.network.confirm(node, request.fence, request.rid)
            return
        answer = Message(
            Kind.ANSWER,
            request.fence,
            request.rid,
            flags=flags,
            version=version,
            length=length,
            result=result,
            body=body,
        )
        self.network.send(node, answer)

    def answer_late(self, node: NodeId, request: Message) -> None:
        """Success, which nobody waits for."""
        self.network.confirm_later(node, request.fence, request.rid)

    def oldest(self, node: NodeId) -> int:
        """Id of the oldest request that `node` has not answered: it may forget all before."""
        outstanding = self._outstanding.get(node)
        return self._next_rid + 1 if outstanding is None else first_number(outstanding, self._next_rid + 1)

    def busy(self) -> list[NodeId]:
        """Nodes that owe answers."""
        return [node for node, outstanding in self._outstanding.items() if outstanding]

    def oldest_of(self, node: NodeId, kinds: Container[int]) -> int | None:
        """Id of the oldest open request of these kinds."""
        for rid, (message, _) in self._outstanding.get(node, {}).items():
            if message.kind in kinds:
                return rid
        return None

    def on_answer(self, node: NodeId, message: Message) -> None:
        """Completes a request; a second answer (the request was sent again) is ignored."""
        outstanding = self._outstanding.get(node)
        entry = outstanding.pop(message.rid, None) if outstanding else None
        if entry is not None:
            entry[1](message)

    def on_successes(self, node: NodeId, rids: Iterable[int]) -> None:
        """Completes several requests. A bug in what one of them does then is raised when all have been told."""
        outstanding = self._outstanding.get(node)
        if outstanding is None:
            return
        bug: Exception | None = None
        for rid in rids:
            entry = outstanding.pop(rid, None)
            if entry is not None:
                try:
                    entry[1](_SUCCEEDED)
                except Exception as error:
                    bug = bug or error
        if bug is not None:
            raise bug

    def on_link(self, node: NodeId, up: bool) -> None:
        """A new link: whatever was not answered may be lost, and is sent again in order."""
        if up:
            for message, _ in list(self._outstanding.get(node, {}).values()):
                self.network.send(node, message)

    def forget_all(self) -> None:
        """A new epoch: no answer of the old one counts, also not the rest of a list of them."""
        for outstanding in self._outstanding.values():
            outstanding.clear()
        self._outstanding.clear()

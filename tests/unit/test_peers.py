"""Requests between nodes and their answers (core.peers), on a network that only writes down."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from sheepdog.cluster.core.ids import NodeId, Version
from sheepdog.cluster.core.messages import Kind, Message
from sheepdog.cluster.core.peers import Peers
from sheepdog.cluster.core.ports import Network

NODE, OTHER = NodeId(bytes(16), 1), NodeId(bytes(16), 2)


class Written(Network):
    """`ports.Network`."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.confirmed: list[tuple[NodeId, int, int]] = []

    def send(self, node: NodeId, message: Message) -> None:
        self.sent.append(message)

    def confirm(self, node: NodeId, fence: int, rid: int) -> None:
        self.confirmed.append((node, fence, rid))

    def connect(self, nodes: Iterable[NodeId]) -> None: ...


@pytest.fixture
def network() -> Written:
    return Written()


def ask(peers: Peers, answered: list[int], rid: int, node: NodeId = NODE) -> None:
    peers.request(node, Message(Kind.APPLY, 1), lambda answer: answered.append(rid))


def test_each_success_of_a_list_completes_its_request_once(network: Written) -> None:
    peers, answered = Peers(network), list[int]()
    for rid in range(1, 5):
        ask(peers, answered, rid, OTHER if rid == 3 else NODE)
    peers.on_successes(NODE, [4, 1, 1, 3, 99])
    assert answered == [4, 1]
    assert peers.oldest(NODE) == 2
    assert peers.oldest(OTHER) == 3
    peers.on_successes(NodeId(bytes(16), 3), [2])
    assert answered == [4, 1]


def test_a_bug_in_one_handler_is_raised_behind_the_others(network: Written) -> None:
    peers, answered = Peers(network), list[int]()

    def broken(_: Message) -> None:
        raise IndexError

    ask(peers, answered, 1)
    peers.request(NODE, Message(Kind.APPLY, 1), broken)
    ask(peers, answered, 3)
    with pytest.raises(IndexError):
        peers.on_successes(NODE, [1, 2, 3])
    assert answered == [1, 3]


def test_a_new_epoch_in_the_middle_of_a_list_ends_it(network: Written) -> None:
    peers, answered = Peers(network), list[int]()
    peers.request(NODE, Message(Kind.APPLY, 1), lambda answer: peers.forget_all())
    ask(peers, answered, 2)
    peers.on_successes(NODE, [1, 2])
    assert not answered
    assert not peers.busy()


def test_only_an_answer_that_says_no_more_than_success_is_a_confirmation(network: Written) -> None:
    peers, request = Peers(network), Message(Kind.APPLY, 7, 8)
    peers.answer(NODE, request, 0)
    assert network.confirmed == [(NODE, 7, 8)]
    peers.answer(NODE, request, 1)
    peers.answer(NODE, request, 0, b"body")
    peers.answer(NODE, request, 0, version=Version(1, 2, 3))
    peers.answer(NODE, request, 0, length=1)
    peers.answer(NODE, request, 0, flags=1)
    assert len(network.confirmed) == 1
    assert [(message.kind, message.fence, message.rid) for message in network.sent] == [(Kind.ANSWER, 7, 8)] * 5
    said = [(m.result, m.body, m.version.counter, m.length, m.flags) for m in network.sent]
    assert said == [(1, b"", 0, 0, 0), (0, b"body", 0, 0, 0), (0, b"", 3, 0, 0), (0, b"", 0, 1, 0), (0, b"", 0, 0, 1)]

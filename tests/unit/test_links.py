"""Links over real sockets: both directions, order, large bodies, breaks, strangers, liars."""

from __future__ import annotations

import asyncio
import select
import socket
import time
from collections.abc import Callable, Iterator

import pytest
from tests.support.ports import PortBlock

from sheepdog.cluster.core.ids import NodeId, ObjectId, format_address
from sheepdog.cluster.core.messages import Kind, Message
from sheepdog.cluster.host import link as link_module
from sheepdog.cluster.host import links as links_module
from sheepdog.cluster.host.link import State
from sheepdog.cluster.host.links import Links
from sheepdog.cluster.host.loop import new_loop
from sheepdog.cluster.host.server import Server
from sheepdog.cluster.host.turn import Turn
from sheepdog.cluster.wire.peer import HEADER_SIZE, Hello, encode_hello, encoded
from sheepdog.cluster.wire.same_host import local_name
from sheepdog.cluster.wire.streams import Arena, BufferPool

LOCALHOST = bytes(12) + bytes((127, 0, 0, 1))


class World:
    """One loop with any number of nodes in it."""

    def __init__(self) -> None:
        self.logged: list[str] = []
        self.loop = new_loop(self.log)
        self.turn = Turn(self.loop)
        self.ports = PortBlock()
        self.nodes: list[Node] = []

    def log(self, level: int, text: str) -> None:
        self.logged.append(text)

    def node(self, index: int, io: NodeId | None = None) -> Node:
        node = Node(self, NodeId(LOCALHOST, self.ports[index]), io)
        self.nodes.append(node)
        return node

    def until(self, condition: Callable[[], object], seconds: float = 10.0) -> None:
        async def wait() -> None:
            end = time.monotonic() + seconds
            while not condition():
                assert time.monotonic() < end, self.logged
                await asyncio.sleep(0.005)

        self.loop.run_until_complete(wait())

    def run(self, seconds: float) -> None:
        self.loop.run_until_complete(asyncio.sleep(seconds))

    def close(self) -> None:
        for node in self.nodes:
            node.close()
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.close()
        self.ports.close()
        assert not [text for text in self.logged if "internal error" in text]


class Node:
    """Links with a listening server; everything that happens is written down."""

    def __init__(self, world: World, me: NodeId, io: NodeId | None = None) -> None:
        self.world = world
        self.me = me
        self.io = io
        self.arrived: list[tuple[NodeId, Message]] = []
        self.events: list[tuple[NodeId, bool]] = []
        self.links = Links(me, world.loop, world.turn, Arena(BufferPool()), world.log, io)
        self.successes: list[tuple[int, list[int]]] = []  # fence, requests
        self.links.on_message = lambda node, message: self.arrived.append((node, message))
        self.links.on_successes = lambda node, fence, rids: self.successes.append((fence, rids))
        self.applied: list[tuple[int, list[int]]] = []  # fence, number and sequence of each write
        self.links.on_applied = lambda node, fence, writes: self.applied.append((fence, writes))
        self.links.on_link = lambda node, up: self.events.append((node, up))
        self.server = Server(world.loop, self.links.adopt, lambda sock: sock.close(), world.log)
        self.server.admit_clients()
        self.server.listen_tcp("127.0.0.1", me.port)
        self.io_server = Server(world.loop, self.links.adopt, lambda sock: sock.close(), world.log)

    def listen_io(self) -> None:
        """Its I/O address answers from now on."""
        assert self.io is not None
        self.io_server = Server(self.world.loop, self.links.adopt, lambda sock: sock.close(), self.world.log)
        self.io_server.listen_tcp(format_address(self.io.address), self.io.port)

    def close(self) -> None:
        self.server.stop_listening()
        self.io_server.stop_listening()
        self.links.close()

    def raw(self) -> socket.socket:
        """A connection to this node by hand."""
        sock = socket.create_connection(("127.0.0.1", self.me.port))
        sock.setblocking(False)
        return sock


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    try:
        yield world
    finally:
        world.close()


@pytest.fixture(params=[socket.AF_UNIX, socket.AF_INET])
def pair(world: World, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Node, Node]:
    if request.param == socket.AF_INET:
        monkeypatch.setattr(links_module, "connect_by_name", lambda port: None)  # as if on two hosts
    small, large = world.node(0), world.node(1)
    small.links.connect([small.me, large.me])
    large.links.connect([small.me, large.me])
    world.until(lambda: small.events and large.events)
    assert small.events == [(large.me, True)]
    assert large.events == [(small.me, True)]
    assert {family(small, large), family(large, small)} == {request.param}
    return small, large


def family(node: Node, peer: Node) -> socket.AddressFamily:
    """What the link of `node` to `peer` goes by."""
    link = node.links._peers[peer.me].link
    assert link is not None
    return socket.AddressFamily(link.socket.family)


def message(rid: int, body: bytes = b"") -> Message:
    return Message(Kind.APPLY, 3, rid, ObjectId(0xABC), 8192, len(body), body=body)


def closed_by_peer(sock: socket.socket) -> bool:
    try:
        while sock.recv(4096):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        pass
    return True


def test_a_peer_that_goes_and_comes_back_is_sent_to_again(world: World, pair: tuple[Node, Node]) -> None:
    small, large = pair
    small.links.send(large.me, message(1))
    world.until(lambda: len(large.arrived) == 1)
    small.links.connect([small.me])
    world.until(lambda: large.events[-1] == (small.me, False))
    small.links.connect([small.me, large.me])
    world.until(lambda: small.events[1:] == [(large.me, True)] and large.events[-1] == (small.me, True))
    small.links.send(large.me, message(2))
    world.until(lambda: len(large.arrived) == 2)


def test_messages_arrive_in_order_both_ways(world: World, pair: tuple[Node, Node]) -> None:
    small, large = pair
    bodies = [b"", b"x" * 100, b"y" * 4096, b"z" * 70_000, b"w" * 3_000_000]
    for rid in range(500):
        small.links.send(large.me, message(rid, bodies[rid % 5 if rid % 50 < 5 else 2]))
        large.links.send(small.me, message(rid))
    world.until(lambda: len(large.arrived) == len(small.arrived) == 500)
    for rid, (sender, arrived) in enumerate(large.arrived):
        assert sender == small.me
        assert (arrived.rid, arrived.kind, arrived.fence, arrived.oid) == (rid, Kind.APPLY, 3, 0xABC)
        assert arrived.body == bodies[rid % 5 if rid % 50 < 5 else 2]
    assert [arrived.rid for _, arrived in small.arrived] == list(range(500))


def test_answers_of_success_share_a_frame_and_keep_their_places(world: World, pair: tuple[Node, Node]) -> None:
    """Those of one fence, up to the next message."""
    small, large = pair
    for rid in (1, 2, 3):
        small.links.confirm(large.me, 3, rid)
    small.links.confirm(large.me, 4, 4)
    small.links.send(large.me, message(5))
    for rid in (6, 1 << 62):
        small.links.confirm(large.me, 4, rid)
    world.until(lambda: len(large.successes) == 3)
    assert large.successes == [(3, [1, 2, 3]), (4, [4]), (4, [6, 1 << 62])]
    assert [arrived.rid for _, arrived in large.arrived] == [5]
    assert large.links.received[Kind.ANSWERS] == 3


def test_a_late_answer_goes_with_the_next_message(world: World, pair: tuple[Node, Node]) -> None:
    small, large = pair
    small.links.confirm_later(large.me, 3, 1)
    small.links.confirm_later(large.me, 3, 2)
    world.turn.at_end(lambda: small.links.send(large.me, message(5)))
    world.until(lambda: bool(large.arrived))
    assert large.successes == [(3, [1, 2])]


def test_a_late_answer_goes_alone_after_a_while(world: World, pair: tuple[Node, Node]) -> None:
    small, large = pair
    large.links.confirm(small.me, 3, 9)
    small.links.confirm_later(large.me, 3, 1)
    world.until(lambda: bool(small.successes))
    assert not large.successes
    world.until(lambda: bool(large.successes))
    assert large.successes == [(3, [1])]


def test_writes_that_are_applied_share_a_frame(world: World, pair: tuple[Node, Node]) -> None:
    """Those of one fence; a message that may be late brings them along."""
    small, large = pair
    small.links.send_late(large.me, message(5))
    world.turn.at_end(lambda: small.links.applied(large.me, 3, 7, 70))
    small.links.applied(large.me, 3, 6, 60)
    small.links.applied(large.me, 4, 8, 80)
    world.until(lambda: len(large.applied) == 3)
    assert large.applied == [(3, [6, 60]), (4, [8, 80]), (3, [7, 70])]
    assert [arrived.rid for _, arrived in large.arrived] == [5]
    assert not small.links.received[Kind.APPLIED]


def test_a_success_of_a_node_that_is_away_is_dropped(world: World, pair: tuple[Node, Node]) -> None:
    small, large = pair
    large.close()
    world.until(lambda: not small.links.is_up(large.me))
    small.links.confirm(large.me, 3, 1)
    small.links.confirm(NodeId(LOCALHOST, 1), 3, 1)
    small.links.confirm_later(large.me, 3, 1)
    small.links.applied(large.me, 3, 1, 1)
    small.links.send_late(large.me, message(1))


def test_a_broken_list_of_answers_ends_the_link(world: World, pair: tuple[Node, Node]) -> None:
    small, large = pair
    small.links.send(large.me, Message(Kind.ANSWERS, 3, body=b"short"))
    world.until(lambda: large.events[-1] == (small.me, False))
    assert not large.arrived


def test_the_dialled_side_may_come_later(world: World) -> None:
    small, large = world.node(0), world.node(1)
    large.links.connect([small.me])
    small.links.connect([large.me])
    world.until(lambda: small.links.is_up(large.me) and large.links.is_up(small.me))


def test_a_stranger_waits_until_it_becomes_a_member(world: World) -> None:
    small, large = world.node(0), world.node(1)
    small.links.connect([large.me])
    world.run(0.2)
    assert not small.events
    large.links.connect([small.me])
    world.until(lambda: small.links.is_up(large.me) and large.links.is_up(small.me), 1.0)
    assert small.events == [(large.me, True)]  # the waiting connection was taken, no second one made
    assert large.events == [(small.me, True)]


def test_a_stranger_does_not_wait_for_ever(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links_module, "WAITING_TIMEOUT_S", 0.1)
    node = world.node(5)
    stranger = node.raw()
    stranger.send(encode_hello(Hello(NodeId(LOCALHOST, 1))))
    world.until(lambda: closed_by_peer(stranger))


def test_strangers_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links_module, "MAX_WAITING", 3)
    node = world.node(5)
    strangers = []
    for port in range(1, 6):
        stranger = node.raw()
        stranger.send(encode_hello(Hello(NodeId(LOCALHOST, port))))
        strangers.append(stranger)
    world.until(lambda: sum(map(closed_by_peer, strangers)) == 2)
    world.run(0.1)
    assert sum(map(closed_by_peer, strangers)) == 2


def test_a_broken_link_comes_back(world: World, pair: tuple[Node, Node]) -> None:
    small, large = pair
    large.close()
    world.until(lambda: small.events[-1] == (large.me, False))
    small.links.send(large.me, message(1))  # dropped
    again = Node(world, large.me)
    world.nodes.append(again)
    again.links.connect([small.me])
    world.until(lambda: small.events[-1] == (large.me, True))
    small.links.send(large.me, message(2))
    world.until(lambda: again.arrived)
    assert [arrived.rid for _, arrived in again.arrived] == [2]


def way(node: Node, peer: Node) -> str:
    """The address of `peer` that the link of `node` leads to; `here` if it needs none."""
    link = node.links._peers[peer.me].link
    if link is None or link.state is not State.UP:
        return ""
    return "here" if link.by_name else str(link.socket.getpeername()[0])


def test_traffic_takes_the_io_address_falls_back_and_returns(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links_module, "IO_RETRY_S", 0.1)
    small = world.node(0)
    large = world.node(1, NodeId(bytes(12) + bytes((127, 0, 0, 2)), world.ports[2]))
    large.listen_io()
    for node in (small, large):
        node.links.connect([small.me, large.me])
    world.until(lambda: way(small, large) == "127.0.0.2" and large.links.is_up(small.me))
    states = [up for _, up in small.events]
    assert states == [True, False, True], "core sees the change as a link that broke and came back"

    def exchange(rid: int) -> None:
        small.links.send(large.me, message(rid))
        large.links.send(small.me, message(rid))
        world.until(lambda: [node.arrived[-1:] and node.arrived[-1][1].rid for node in (small, large)] == [rid, rid])

    exchange(1)
    large.io_server.stop_listening()
    link = small.links._peers[large.me].link
    assert link is not None
    link.socket.shutdown(socket.SHUT_RDWR)  # the I/O network is gone
    world.until(lambda: way(small, large) == "here" and large.links.is_up(small.me))
    exchange(2)
    assert sum("fallback" in text for text in world.logged) == 1
    world.run(0.3)  # tried in vain, without touching the link that works
    assert way(small, large) == "here"
    exchange(3)
    large.listen_io()
    world.until(lambda: way(small, large) == "127.0.0.2" and large.links.is_up(small.me))
    exchange(4)


def test_an_io_address_that_never_answers_harms_nobody(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links_module, "IO_RETRY_S", 0.05)
    small = world.node(0)
    large = world.node(1, NodeId(bytes(12) + bytes((127, 0, 0, 2)), world.ports[2]))
    for node in (small, large):
        node.links.connect([small.me, large.me])
    world.until(lambda: any("fallback" in text for text in world.logged))
    world.run(0.3)
    assert small.events == [(large.me, True)]
    assert sum("fallback" in text for text in world.logged) == 1


def test_somebody_else_at_the_io_address_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links_module, "IO_RETRY_S", 0.05)
    small, other = world.node(0), world.node(2)
    large = world.node(1, other.me)  # a mistake in its configuration
    for node in (small, large, other):
        node.links.connect([small.me, large.me, other.me])
    world.until(lambda: any("answers there" in text for text in world.logged))
    small.links.send(large.me, message(1))
    world.until(lambda: large.arrived)
    assert way(small, large) == "here"


def test_a_name_that_another_sheep_has_is_passed_over(world: World) -> None:
    small, large, other = world.node(0), world.node(1), world.node(2)
    large.server.stop_listening()
    large.server = Server(world.loop, large.links.adopt, lambda sock: sock.close(), world.log)
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(local_name(large.me.port))
        taken.listen()
        large.server.listen_tcp("127.0.0.1", large.me.port)
        for node in (small, large, other):
            node.links.connect([small.me, large.me])
        world.until(lambda: taken in select.select([taken], [], [], 0)[0])
        wrong, _ = taken.accept()
        with wrong:
            wrong.sendall(encode_hello(Hello(other.me)))
            world.until(lambda: small.links.is_up(large.me) and large.links.is_up(small.me))
        assert any("answers there" in text for text in world.logged)
        assert family(small, large) == socket.AF_INET


def test_a_node_that_left_is_closed_without_an_event(world: World, pair: tuple[Node, Node]) -> None:
    small, large = pair
    small.links.connect([])
    assert not small.links.is_up(large.me)
    world.until(lambda: large.events[-1] == (small.me, False))
    assert small.events == [(large.me, True)]


def test_a_sender_is_named_by_the_object_that_core_has_for_it(world: World, pair: tuple[Node, Node]) -> None:
    """Of the present epoch; the link is that of the epochs before. So dictionaries find it without comparing bytes."""
    small, large = pair
    again = NodeId(bytes(bytearray(large.me.address)), large.me.port)
    small.links.connect([again])
    large.links.send(small.me, message(1))
    world.until(lambda: small.arrived)
    assert small.arrived[0][0] is again
    assert small.events == [(large.me, True)], "the link stayed"


def test_a_newer_connection_replaces_a_dead_one(world: World, pair: tuple[Node, Node]) -> None:
    small, large = pair
    again = large.raw()
    again.send(encode_hello(Hello(small.me)) + encoded(message(77)))
    world.until(lambda: large.arrived)
    assert large.events[:3] == [(small.me, True), (small.me, False), (small.me, True)]
    again.close()
    world.until(lambda: large.events[-1] == (small.me, True) and small.events[-1] == (large.me, True))


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x63" + bytes(HEADER_SIZE - 1),  # unknown kind
        b"\x05" + bytes(75) + b"\xff\xff\xff\xff" + bytes(16),  # a body of 4 GiB
        bytes(range(256)),
    ],
)
def test_garbage_costs_the_connection_and_nothing_else(world: World, pair: tuple[Node, Node], garbage: bytes) -> None:
    small, large = pair
    liar = large.raw()
    liar.send(encode_hello(Hello(small.me)) + garbage)
    world.until(lambda: closed_by_peer(liar))
    world.until(lambda: small.links.is_up(large.me) and large.links.is_up(small.me))
    small.links.send(large.me, message(5))
    world.until(lambda: large.arrived)


@pytest.mark.parametrize(
    "hello",
    [
        b"\xf5XXX" + bytes(20),
        b"\xf5SHP\x63\x00" + bytes(18),  # version 99
        encode_hello(Hello(NodeId(LOCALHOST, 65_535))),  # larger than the node it dials
    ],
)
def test_bad_hellos(world: World, hello: bytes) -> None:
    node = world.node(0)
    liar = node.raw()
    liar.send(hello)
    world.until(lambda: closed_by_peer(liar))


def test_half_a_hello_is_given_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links_module, "HELLO_TIMEOUT_S", 0.1)
    node = world.node(0)
    slow = node.raw()
    slow.send(encode_hello(Hello(NodeId(LOCALHOST, 1)))[:10])
    world.until(lambda: closed_by_peer(slow))


def test_a_message_that_breaks_core_does_not_stop_the_next(world: World, pair: tuple[Node, Node]) -> None:
    small, large = pair
    seen: list[int] = []

    def picky(sender: NodeId, arrived: Message) -> None:
        seen.append(arrived.rid)
        if arrived.rid == 1:
            raise ValueError("a bug")

    def pickier(sender: NodeId, fence: int, rids: list[int]) -> None:
        seen.extend(rids)
        raise ValueError("another bug")

    large.links.on_message = picky
    large.links.on_successes = pickier
    small.links.confirm(large.me, 1, 7)
    for rid in range(3):
        small.links.send(large.me, message(rid))
    world.until(lambda: len(seen) == 4)
    assert seen == [7, 0, 1, 2]
    assert [text for text in world.logged if "another bug" in text]
    assert large.links.is_up(small.me)
    assert [text for text in world.logged if ": a bug" in text]
    world.logged.clear()


def test_a_peer_that_does_not_read_congests_and_then_loses_its_link(
    world: World, pair: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = pair
    monkeypatch.setattr(links_module, "CONGESTED_BYTES", 8 << 20)
    monkeypatch.setattr(link_module, "MAX_QUEUE_BYTES", 16 << 20)
    deaf = large.raw()
    deaf.send(encode_hello(Hello(small.me)))
    world.until(lambda: large.events[-1] == (small.me, True) and len(large.events) == 3)
    small.links.connect([])  # dials no more
    body = bytes(1 << 20)
    sent = 0
    while not large.links.congested(small.me):
        large.links.send(small.me, message(sent, body))
        sent += 1
        assert sent < 30
        world.run(0)
    for _ in range(20):
        large.links.send(small.me, message(0, body))
    world.until(lambda: large.events[-1] == (small.me, False))
    assert not large.links.congested(small.me)
    deaf.close()

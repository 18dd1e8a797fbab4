"""The machine of the corosync driver in a simulated corosync: rings break and meet, verdicts come late or never.

The simulation does what extended virtual synchrony allows: a node delivers its own message before others have it;
nodes that go from one ring to the next together have the same messages, others may lack the last ones; a ring may be
over before the quorum's verdict; a daemon that stands still misses rings of the others; a process handles what its
daemon has for it at any later time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from operator import methodcaller
from random import Random
from typing import TypeAlias

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sheepdog.cluster.core.errors import PeerError
from sheepdog.cluster.core.ports import Delivery, Event, Leased, Lost, Peer, Resumed, Suspended, View
from sheepdog.cluster.drivers.corosync_messages import parse
from sheepdog.cluster.drivers.corosync_order import ROUNDS_NS, Order
from sheepdog.cluster.drivers.corosync_quorum import Quorum
from sheepdog.cluster.drivers.cpg import Change, Process, Reason, Verdict

NODES = 3
MILLISECOND = 1_000_000
LEASE_NS = 1000 * MILLISECOND
TOKEN_NS = 150 * MILLISECOND  # a daemon that has not got a message for so long leaves the ring
Item = Callable[[Order], None]


class Attachment:
    """One incarnation of the process on a node, and what it was told."""

    def __init__(self, world: World, node: int) -> None:
        world.incarnations += 1
        self.world = world
        self.process = Process(node, 100 + world.incarnations)
        self.alive = True
        self.stopped = False  # SIGSTOP: its daemon goes on
        self.stream: deque[Item] = deque()  # from the daemon, not handled yet
        self.verdicts: deque[Item] = deque()  # the other way
        self.events: list[tuple[int, Event]] = []  # with times
        self.outgoing: deque[bytes] = deque()
        self.order = Order(
            Peer(b"node%d" % node, 1000 * world.incarnations, b""),
            self.process,
            LEASE_NS,
            self.outgoing.append,
            lambda event: self.events.append((world.now_ns, event)),
            lambda: world.now_ns,
        )
        self.order.quorum.votes = dict.fromkeys(range(1, NODES + 1), 1)
        self.order.quorum.needed = NODES // 2 + 1

    @property
    def lost(self) -> bool:
        return any(isinstance(event, Lost) for _, event in self.events)

    def members(self) -> list[int]:
        views = [event for _, event in self.events if isinstance(event, View)]
        return [peer.incarnation for peer in views[-1].members] if views else []

    def ordered(self) -> dict[int, Event]:
        return {event.sequence: event for _, event in self.events if isinstance(event, (View, Delivery))}


class Ring:
    """One configuration: its messages in their order."""

    def __init__(self, sequence: int, nodes: tuple[int, ...]) -> None:
        self.sequence = sequence
        self.nodes = nodes
        self.log: list[tuple[Process, bytes] | tuple[Process, Reason]] = []  # messages; joins and ends of processes
        self.times: list[int] = []  # of the entries

    def add(self, process: Process, content: bytes | Reason, now_ns: int) -> None:
        self.log.append((process, content))  # type: ignore[arg-type]
        self.times.append(now_ns)


class World:
    def __init__(self, random: Random) -> None:
        self.random = random
        self.now_ns = MILLISECOND
        self.incarnations = 0
        self.all: list[Attachment] = []
        self.at: list[Attachment | None] = [None] * NODES
        first = Ring(1, tuple(range(1, NODES + 1)))
        self.ring = dict.fromkeys(first.nodes, first)
        self.left: dict[int, tuple[int, ...]] = dict.fromkeys(first.nodes, ())  # by its ring's coming, as a node knows
        self.still: set[int] = set()  # daemons that do nothing: the others have left their ring
        self.last_sequence = 1
        self.received = dict.fromkeys(first.nodes, 0)  # how much of its ring's log a node has
        self.groups: dict[int, list[Process]] = {node: [] for node in first.nodes}  # as each daemon knows the group
        self.sent = 0

    # what daemons do

    def attached(self, node: int) -> Attachment | None:
        return self.at[node - 1]

    def tell(self, node: int, item: Item) -> None:
        """To the process, once it is in the group."""
        attachment = self.attached(node)
        if attachment is not None and attachment.process in self.groups[node]:
            attachment.stream.append(item)

    def announce_ring(self, node: int) -> None:
        """Also to a process that is not in the group yet; it hears of the same ring again when it is."""
        ring, attachment = self.ring[node], self.attached(node)
        if attachment is not None:
            attachment.stream.append(lambda order: order.on_ring(ring.sequence, ring.nodes))

    def announce_verdict(self, node: int) -> None:
        ring, attachment = self.ring[node], self.attached(node)
        if attachment is not None:
            verdict = Verdict(2 * len(ring.nodes) > NODES, ring.sequence, ring.nodes, self.left[node])
            attachment.verdicts.append(lambda order: order.on_quorum(verdict))

    def receive(self, node: int) -> bool:
        """The daemon gets the next message of its ring."""
        ring, position = self.ring[node], self.received[node]
        if position == len(ring.log):
            return False
        self.received[node] = position + 1
        process, content = ring.log[position]
        group = self.groups[node]
        if isinstance(content, bytes):
            if process in group:
                self.tell(node, lambda order: order.on_message(process, content))
            return True
        if content == Reason.JOIN:
            group.append(process)
            members = tuple(group)
            self.tell(node, lambda order: order.on_change(Change(members, (), ((process, content),))))
            attachment = self.attached(node)
            if attachment is not None and attachment.process == process:
                self.announce_ring(node)
        elif process in group:
            group.remove(process)
            members = tuple(group)
            self.tell(node, lambda order: order.on_change(Change(members, ((process, content),), ())))
        return True

    def reform(self, *parts: tuple[int, ...]) -> None:
        """New rings. Nodes that come from one ring together have the same messages. All others stand still."""
        old_rings = dict(self.ring)
        self.still = set(self.ring) - {node for part in parts for node in part}
        for part in parts:
            for node in part:
                together = [other for other in part if old_rings[other] is old_rings[node]]
                most = max(self.received[other] for other in together)
                while self.received[node] < most:
                    self.receive(node)
                self.left[node] = tuple(other for other in old_rings[node].nodes if other not in together)
        for part in parts:
            self.last_sequence += self.random.randint(1, 4)
            ring = Ring(self.last_sequence, part)
            processes = [one.process for one in map(self.attached, part) if one is not None]
            for node in part:  # daemons tell each other which processes they have
                stay, away = [process for process in self.groups[node] if process in processes], self.left[node]
                left = tuple(
                    (process, Reason.PROCDOWN if process.node in part and process.node not in away else Reason.NODEDOWN)
                    for process in self.groups[node]
                    if process not in stay
                )
                joined = tuple((process, Reason.NODEUP) for process in processes if process not in stay)
                self.groups[node] = [*stay, *(process for process, _ in joined)]
                self.ring[node], self.received[node] = ring, 0
                if left or joined:
                    change = Change(tuple(self.groups[node]), left, joined)
                    self.tell(node, methodcaller("on_change", change))
                self.announce_ring(node)

    # what processes do

    def start(self, node: int) -> None:
        attachment = Attachment(self, node)
        self.at[node - 1] = attachment
        self.all.append(attachment)
        if node not in self.still:
            self.ring[node].add(attachment.process, Reason.JOIN, self.now_ns)
        self.announce_verdict(node)

    def end(self, node: int, reason: Reason) -> None:
        attachment = self.attached(node)
        assert attachment is not None
        attachment.alive = False
        self.at[node - 1] = None
        if node not in self.still:
            self.ring[node].add(attachment.process, reason, self.now_ns)

    def send(self, node: int) -> bool:
        """The daemon takes one message over and puts it into the order of its ring; it has it at once itself."""
        attachment = self.attached(node)
        if attachment is None or attachment.stopped or node in self.still or not attachment.outgoing:
            return False
        while self.receive(node):  # who sends has the token, and with it all messages
            pass
        self.ring[node].add(attachment.process, attachment.outgoing.popleft(), self.now_ns)
        self.receive(node)
        return True

    def handle(self, node: int, verdicts: bool) -> bool:
        attachment = self.attached(node)
        if attachment is None or attachment.stopped or attachment.order.lost:
            return False
        source = attachment.verdicts if verdicts else attachment.stream
        if not source:
            return False
        source.popleft()(attachment.order)
        attachment.order.advance()
        return True

    def broadcast(self, node: int) -> None:
        attachment = self.attached(node)
        if attachment is not None and attachment.order.established and not attachment.order.lost:
            self.sent += 1
            attachment.order.broadcast(b"%d" % self.sent)

    # the whole

    def step(self) -> None:
        random = self.random
        self.now_ns += random.choice((0, 1, 1, 20, 300)) * MILLISECOND
        for node, ring in self.ring.items():  # the token goes round
            while self.received[node] < len(ring.log) and ring.times[self.received[node]] + TOKEN_NS < self.now_ns:
                self.receive(node)
        node = random.randint(1, NODES)
        action = random.choices(
            ("send", "receive", "handle", "verdict", "broadcast", "beat", "tick", "reform", "process", "stop"),
            (60, 60, 60, 8, 8, 4, 4, 1, 1, 0.3),
        )[0]
        attachment = self.attached(node)
        if attachment is not None and (action == "stop" or random.random() < 0.05):
            attachment.stopped = action == "stop"
        elif attachment is not None and attachment.stopped and action in ("broadcast", "beat", "tick"):
            return
        if action == "send":
            self.send(node)
        elif action == "receive":
            self.receive(node)
        elif action in ("handle", "verdict"):
            self.handle(node, action == "verdict")
        elif action == "broadcast":
            self.broadcast(node)
        elif action == "beat" and attachment is not None and not attachment.order.lost:
            attachment.order.beat()
        elif action == "tick":
            self.tick(node)
        elif action == "reform":
            self.reform(*random.choice(SOME_STAND_STILL if random.random() < 0.2 else PARTITIONS))
            for one in set(self.ring) - self.still:
                if random.random() < 0.8:  # else the ring is over before the quorum has a verdict
                    self.announce_verdict(one)
        elif action == "process":
            if attachment is None:
                self.start(node)
            elif attachment.lost or random.random() < 0.3:
                self.end(node, random.choice((Reason.LEAVE, Reason.PROCDOWN)))

    def move(self, nodes: tuple[int, ...]) -> bool:
        """Whether anything was on its way."""
        moved = False
        for node in nodes:
            for action in (self.send, self.receive):
                moved |= action(node)
            for verdicts in (True, False):
                moved |= self.handle(node, verdicts)
        return moved

    def there(self, node: int) -> Attachment:
        attachment = self.attached(node)
        assert attachment is not None
        return attachment

    def run(self, nodes: tuple[int, ...]) -> None:
        """As `settle`, but who is stopped stays so, and nobody attaches."""
        for _ in range(50):
            while self.move(nodes):
                self.now_ns += MILLISECOND
            self.now_ns += ROUNDS_NS
            for node in nodes:
                self.tick(node)

    def tick(self, node: int) -> None:
        attachment = self.attached(node)
        if attachment is not None and not attachment.stopped and not attachment.order.lost:
            attachment.order.tick()

    def settle(self) -> None:
        """Everything works again: all that is on its way arrives, lost processes attach again."""
        whole = tuple(range(1, NODES + 1))
        for attachment in self.at:
            if attachment is not None:
                attachment.stopped = False
        self.reform(whole)
        for node in whole:
            self.announce_verdict(node)
        for _ in range(50):
            for node in whole:
                attachment = self.attached(node)
                if attachment is not None and attachment.lost:
                    self.end(node, Reason.LEAVE)
                if self.attached(node) is None:
                    self.start(node)
            while self.move(whole):
                self.now_ns += MILLISECOND
            self.now_ns += ROUNDS_NS
            for node in whole:
                self.tick(node)


Parts: TypeAlias = tuple[tuple[int, ...], ...]
PARTITIONS: list[Parts] = [((1, 2, 3),), ((1,), (2, 3)), ((1, 2), (3,)), ((1, 3), (2,)), ((1,), (2,), (3,))]
SOME_STAND_STILL: list[Parts] = [((2, 3),), ((1, 3),), ((1, 2),), ((1,),), ((2,),), ((3,),)]


def check(world: World) -> None:
    one_order(world)
    leases_end_in_time(world)
    leases_come_first(world)
    for attachment in world.all:
        told = [event for _, event in attachment.events if isinstance(event, Delivery)]
        data = [event.data for event in told]
        assert len(data) == len(set(data)), "a message came twice"
        present: tuple[Peer, ...] = ()
        for _, event in attachment.events:
            if isinstance(event, View):
                present = event.members
            elif isinstance(event, Delivery):
                assert event.sender in present


def one_order(world: World) -> None:
    """Whoever is in an order has the same event at the same place of it."""
    orders: dict[int, dict[int, Event]] = {}
    for attachment in world.all:
        order = orders.setdefault(attachment.order.origin, {})
        for sequence, event in list(attachment.ordered().items())[1:]:
            assert order.setdefault(sequence, event) == event
    for attachment in world.all:
        order = orders[attachment.order.origin]
        for sequence, first in list(attachment.ordered().items())[:1]:  # what a newcomer was told: the view of then
            earlier = [number for number, event in order.items() if number <= sequence and isinstance(event, View)]
            if earlier:
                view = order[max(earlier)]
                assert isinstance(first, View) and isinstance(view, View)
                assert view.members == first.members


def leases_end_in_time(world: World) -> None:
    until: dict[tuple[int, int], int] = {}  # by order and incarnation
    for attachment in world.all:
        leases = [event.until_ns for _, event in attachment.events if isinstance(event, Leased)]
        until[attachment.order.origin, attachment.order.me.incarnation] = max(leases, default=0)
    for attachment in world.all:
        origin = attachment.order.origin
        for when, event in attachment.events:
            if isinstance(event, View) and event.grace_ns:
                end_ns = when + event.grace_ns
                assert all(until.get((origin, peer.incarnation), 0) <= end_ns for peer in event.left)


def leases_come_first(world: World) -> None:
    """Who has had none may answer without one: the first is there before the first view."""
    for attachment in world.all:
        kinds = [type(event) for _, event in attachment.events if isinstance(event, Leased | View)]
        assert not kinds or kinds[0] is Leased


def play(random: Random, steps: int) -> World:
    world = World(random)
    for node in range(1, NODES + 1):
        world.start(node)
    for _ in range(steps):
        world.step()
    return world


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 1 << 40))
def test_there_is_one_order_whatever_happens(seed: int) -> None:
    world = play(Random(seed), 1500)
    check(world)
    world.settle()
    check(world)
    present = [attachment for attachment in world.at if attachment is not None]
    assert len({attachment.order.origin for attachment in present}) == 1
    members = present[0].members()
    assert sorted(members) == sorted(attachment.order.me.incarnation for attachment in present)
    assert all(attachment.members() == members for attachment in present)
    for node in range(1, NODES + 1):
        world.broadcast(node)
    world.settle()
    last = {event.data for event in list(present[0].ordered().values())[-NODES:] if isinstance(event, Delivery)}
    assert len(last) == NODES, "and it goes on"


def test_the_same_ring_is_told_twice_to_one_that_joins() -> None:
    """As corosync does when a ring forms between the connection and the joining: it is one incarnation all the same."""
    world = World(Random(1))
    world.reform((1, 2, 3))
    world.start(1)
    attachment = world.attached(1)
    assert attachment is not None
    world.announce_ring(1)
    while world.handle(1, True) or world.handle(1, False):  # knows the ring, and that it is quorate
        pass
    me = attachment.order.me.incarnation
    while world.receive(1) or world.handle(1, False) or world.send(1):
        pass
    assert attachment.order.established
    assert attachment.order.me.incarnation == me
    assert attachment.members() == [me]
    world.start(2)
    for _ in range(20):
        for node in (1, 2, 3):
            while world.receive(node) or world.handle(node, True) or world.handle(node, False) or world.send(node):
                pass
    newcomer = world.attached(2)
    assert newcomer is not None and newcomer.members() == attachment.members()
    assert len(newcomer.members()) == 2


@pytest.mark.parametrize("stopped", [(1,), (1, 2)])
def test_a_newcomer_is_let_in_while_the_oldest_member_is_stopped(stopped: tuple[int, ...]) -> None:
    """Who is asked and does not answer is passed over; its late answer changes nothing."""
    world = World(Random(1))
    everybody = tuple(range(1, NODES + 1))
    world.reform(everybody)
    for node in (1, 2):
        world.start(node)
        world.run(everybody)
    for node in stopped:
        world.there(node).stopped = True
    world.start(3)
    world.run(everybody)
    assert world.there(3).order.established == (2 not in stopped)
    world.there(2).stopped = False
    world.run(everybody)
    assert world.there(3).order.established
    assert world.there(3).members() == world.there(2).members()
    check(world)
    world.settle()
    check(world)
    assert len({tuple(world.there(node).members()) for node in everybody}) == 1
    assert not any(attachment.lost for attachment in world.all)


def test_the_first_lease_counts_from_the_announcement_that_came_back() -> None:
    """A process that hears late of the ring that it is founded in has asked again when the others had replaced it."""
    world = World(Random(1))
    for node in (1, 3):
        world.start(node)
    for step in (world.receive, partial(world.handle, verdicts=True), partial(world.handle, verdicts=False)):
        for node in (1, 3):
            while step(node):
                pass
    for step in (world.send, world.receive):  # both daemons have what both processes announce, and have not told it
        for node in (1, 3):
            while step(node):
                pass
    world.reform((1, 2), (3,))
    world.announce_verdict(1)
    world.run((1, 2))
    replaced = [event for _, event in world.there(1).events if isinstance(event, View) and event.grace_ns]
    assert [len(view.left) for view in replaced] == [1]
    late = world.there(3)
    assert not late.events
    world.tick(3)
    world.run((3,))
    assert any(isinstance(event, Leased) for _, event in late.events)
    check(world)


@pytest.mark.parametrize("apart", [((1, 3),), ((1, 3), (2,))])
def test_a_daemon_that_stood_still_has_missed_another_order(apart: Parts) -> None:
    """Its ring is quorate again, and nobody is back whom its member knows: the others began anew without it."""
    world = World(Random(1))
    everybody = tuple(range(1, NODES + 1))
    world.reform(everybody)
    for node in everybody:
        world.start(node)
    world.run(everybody)
    world.reform(*apart)
    for node in {node for part in apart for node in part}:
        world.announce_verdict(node)
    for node in (1, 3):
        world.end(node, Reason.PROCDOWN)
        world.start(node)
    world.run((1, 3))
    assert world.there(1).order.established and not world.there(2).lost
    world.reform(everybody)
    for node in everybody:
        world.announce_verdict(node)
    world.broadcast(2)
    world.run(everybody)
    assert [world.there(node).lost for node in everybody] == [False, True, False]
    assert not any(isinstance(event, Delivery) for attachment in world.all for _, event in attachment.events)


def test_a_newcomer_tells_what_it_waits_for() -> None:
    world = World(Random(1))
    world.reform((1, 2, 3))
    world.start(1)
    world.run((1, 2, 3))
    world.there(1).stopped = True
    world.start(2)
    world.run((1, 2, 3))
    reasons = [event.reason for _, event in world.there(2).events if isinstance(event, Suspended)]
    assert reasons == ["no member has answered yet; asking on"]
    world.settle()
    assert isinstance(world.there(2).events[-1][1], Resumed) or world.there(2).members() == world.there(1).members()
    assert any(isinstance(event, Resumed) for _, event in world.there(2).events)


def test_the_simulation_is_rough_enough() -> None:
    """Everything that the machine is made for happens in a few hundred runs."""
    seen = dict.fromkeys(("lost", "suspended", "unproven", "messages", "later orders", "asked again"), 0)
    for seed in range(60):
        world = play(Random(seed), 1500)
        events = [event for attachment in world.all for _, event in attachment.events]
        seen["lost"] += any(isinstance(event, Lost) for event in events)
        seen["suspended"] += any(isinstance(event, Suspended) for event in events)
        seen["unproven"] += any(isinstance(event, View) and event.grace_ns > 0 for event in events)
        seen["messages"] += sum(isinstance(event, Delivery) for event in events) > 10
        seen["asked again"] += any(attachment.order._turn for attachment in world.all)
        seen["later orders"] += len({attachment.order.origin for attachment in world.all} - {0}) > 1
    assert min(seen.values()) > 15, seen


def deliver_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted bug: messages are not held until other nodes have them."""
    monkeypatch.setattr(Order, "_needed", lambda _: iter(()))


def trust_every_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted bug: nobody asks for quorum."""
    monkeypatch.setattr(Order, "on_quorum", lambda self, verdict: self.quorum.tell(verdict._replace(quorate=True)))


def overlook_missed_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted bug: a ring is quorate, so its members go on, wherever they come from."""
    monkeypatch.setattr(Quorum, "right_of", Quorum.of)


@pytest.mark.parametrize("plant", [deliver_at_once, trust_every_ring, overlook_missed_rings])
def test_planted_bugs_are_found(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        for seed in range(400):
            world = play(Random(seed), 1500)
            check(world)
            world.settle()
            check(world)
            present = [attachment for attachment in world.at if attachment is not None]
            assert all(sorted(one.members()) == sorted(present[0].members()) for one in present)


@pytest.mark.parametrize("data", [b"\x02", b"\x02" + bytes(25), b"\x01\x09" + bytes(24)])
def test_messages_of_a_later_version(data: bytes) -> None:
    """Nobody goes on without what a member has said; who asks for a seat in a later way stops no cluster."""
    with pytest.raises(PeerError, match="this version"):
        parse(data)
    world = World(Random(1))
    world.settle()
    a, b = world.there(1), world.there(2)
    assert len(a.members()) == NODES
    for sender, lost in ((Process(9, 9), False), (b.process, True)):
        a.order.on_message(sender, data)
        a.order.advance()
        assert a.lost is lost
    reason = a.events[-1][1]
    assert isinstance(reason, Lost) and "this version" in reason.reason


@pytest.mark.parametrize("data", [b"", b"\x01", b"somebody else's text, which is long enough"])
def test_messages_of_others(data: bytes) -> None:
    assert parse(data) is None

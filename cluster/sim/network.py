"""Simulated links between nodes: in order, at most once, lost only when a link breaks (the real ones are TCP).

A link is up when both ends want it. What is under way when it breaks is lost from a random point on; both ends are
told, each after a while, and the link comes up again. Every message passes through its bytes.

A direction can be *held*: what is sent that way waits, as TCP sends again what a partition swallows, and arrives when
it is over. A direction can be slow. `trap` sees every message before it leaves: so that faults can be aimed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from sheepdog.cluster.core.ids import NodeId
from sheepdog.cluster.core.limits import LATE_NS
from sheepdog.cluster.core.messages import Kind, Message
from sheepdog.cluster.core.ports import Network
from sheepdog.cluster.sim.world import MICROSECOND, MILLISECOND, Life, World
from sheepdog.cluster.wire.peer import HEADER_SIZE, decode, encoded

OnMessage = Callable[[NodeId, Message], None]
OnLink = Callable[[NodeId, bool], None]
Trap = Callable[[NodeId, NodeId, int], None]  # sender, receiver, kind of the message
Way = tuple[NodeId, NodeId]  # one direction: from, to


class SimNetwork(Network):
    """`ports.Network` of one process."""

    def __init__(self, fabric: Fabric, me: NodeId, on_message: OnMessage, on_link: OnLink, life: Life) -> None:
        self.me = me
        self.life = life
        self.wanted: dict[NodeId, None] = {}
        self.links: dict[NodeId, _Link] = {}  # up on this side
        self.on_message = on_message
        self.on_link = on_link
        self._fabric = fabric
        self._late: dict[NodeId, list[Message]] = {}  # answers that wait for the next message

    def send(self, node: NodeId, message: Message) -> None:
        self._send_late_answers(node)
        self._send(node, message)

    def _send(self, node: NodeId, message: Message) -> None:
        link = self.links.get(node)
        if link is not None:
            if self._fabric.trap is not None:
                self._fabric.trap(self.me, node, message.kind)
            link.send(self, encoded(message))

    def confirm(self, node: NodeId, fence: int, rid: int) -> None:
        self.send(node, Message(Kind.ANSWER, fence, rid))

    def confirm_later(self, node: NodeId, fence: int, rid: int) -> None:
        late = self._late.setdefault(node, [])
        late.append(Message(Kind.ANSWER, fence, rid))
        if len(late) == 1:
            self._fabric.world.after(LATE_NS, lambda: self.life.do(self, lambda: self._send_late_answers(node)))

    def _send_late_answers(self, node: NodeId) -> None:
        for answer in self._late.pop(node, ()):
            self._send(node, answer)

    def send_late(self, node: NodeId, message: Message) -> None:
        self.send(node, message)

    def applied(self, node: NodeId, fence: int, number: int, sequence: int) -> None:
        self.send(node, Message(Kind.APPLIED, fence, origin=number, sequence=sequence))

    def connect(self, nodes: Iterable[NodeId]) -> None:
        self.wanted = dict.fromkeys(node for node in nodes if node != self.me)
        for node in [node for node in self.links if node not in self.wanted]:
            link = self.links.pop(node)
            link.cut(tell=link.other(self))
        for node in self.wanted:
            if node not in self.links:
                self._fabric.dial(self.me, node)

    def die(self) -> None:
        """The process is gone; what the kernel had taken of its messages may still arrive."""
        self.links = {}
        for link in self._fabric.links_of(self):  # also those that are not up on this side yet
            link.cut(tell=link.other(self))


class _Link:
    """One connection. `cut_ns` is set when it broke: nothing that would arrive later does."""

    def __init__(self, fabric: Fabric, ends: tuple[SimNetwork, SimNetwork]) -> None:
        self.fabric = fabric
        self.ends = ends
        self.cut_ns: int | None = None
        self.began_ns = fabric.world.now_ns
        self._arrival = [0, 0]  # of the last message, by receiving end

    def other(self, end: SimNetwork) -> SimNetwork:
        return self.ends[1] if end is self.ends[0] else self.ends[0]

    def send(self, sender: SimNetwork, data: bytes) -> None:
        if self.cut_ns is not None:
            return
        self._convey(0 if sender is self.ends[1] else 1, lambda end: self._deliver(end, sender.me, data))

    def bring_up(self) -> None:
        """The dialled end is up at once, the dialler when the other's hello has come."""
        _, dialled = self.ends
        self._convey(0, self._up)
        dialled.life.do(self, lambda: self._up(dialled))

    def _convey(self, receiving: int, call: Callable[[SimNetwork], None]) -> None:
        """Calls after the way over the link, in order."""
        fabric, world = self.fabric, self.fabric.world
        end = self.ends[receiving]
        delay_ns = fabric.latency_ns()
        if fabric.troubled:
            delay_ns = fabric.delayed_ns((self.ends[1 - receiving].me, end.me), delay_ns)
        arrival = max(self._arrival[receiving], world.now_ns + delay_ns)
        self._arrival[receiving] = arrival

        def arrived() -> None:
            if self.cut_ns is None or world.now_ns <= self.cut_ns:
                end.life.do(self, lambda: call(end))

        world.after(arrival - world.now_ns, arrived)

    def _up(self, end: SimNetwork) -> None:
        other = self.other(end).me
        if other in end.wanted:
            old = end.links.get(other)
            if old is not None:  # a stopped process finds its end and its successor at once
                if old.began_ns > self.began_ns:
                    return  # and accepts them in order
                old.noticed(end)
            end.links[other] = self
            end.on_link(other, True)
        else:  # it has changed its mind since it dialled
            self.cut(tell=self.other(end))

    def _deliver(self, end: SimNetwork, sender: NodeId, data: bytes) -> None:
        if end.links.get(sender) is self:
            world = self.fabric.world
            world.note(world.now_ns.to_bytes(8, "little") + data[:HEADER_SIZE])
            self.fabric.messages += 1
            end.on_message(sender, decode(data[:HEADER_SIZE], memoryview(data)[HEADER_SIZE:]))

    def cut(self, tell: SimNetwork | None = None) -> None:
        """The connection ends; `tell` (default: both ends) hears of it a little later."""
        if self.cut_ns is not None:
            return
        fabric, world = self.fabric, self.fabric.world
        self.cut_ns = world.now_ns + fabric.random.randrange(fabric.max_latency_ns)
        for end in self.ends if tell is None else (tell,):
            delay_ns = self.cut_ns - world.now_ns + fabric.random.randrange(fabric.max_notice_ns)
            self._notice_later(end, delay_ns)
        fabric.forget(self)

    def _notice_later(self, end: SimNetwork, delay_ns: int) -> None:
        self.fabric.world.after(delay_ns, lambda: end.life.do(self, lambda: self.noticed(end)))

    def noticed(self, end: SimNetwork) -> None:
        """One end learns that the link is gone."""
        other = self.other(end).me
        if end.links.get(other) is self:
            del end.links[other]
            end.on_link(other, False)


class Fabric:
    """The network between all processes of a world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.random = world.stream("network")
        self.messages = 0
        self.max_latency_ns = 400 * MICROSECOND
        self.max_notice_ns = 20 * MILLISECOND
        self.max_dial_ns = 40 * MILLISECOND
        self._ends: dict[NodeId, SimNetwork] = {}
        self._links: dict[tuple[NodeId, NodeId], _Link] = {}
        self._blocked: dict[tuple[NodeId, NodeId], None] = {}
        self._dialling: dict[tuple[NodeId, NodeId], None] = {}
        self.trap: Trap | None = None
        self._held: dict[Way, int] = {}  # until when
        self._slow: dict[Way, tuple[int, int]] = {}  # until when, how many times slower

    @property
    def troubled(self) -> bool:
        return bool(self._held or self._slow)

    def attach(self, me: NodeId, on_message: OnMessage, on_link: OnLink, life: Life) -> SimNetwork:
        """The network port of a new process of `me`."""
        self._ends[me] = end = SimNetwork(self, me, on_message, on_link, life)
        return end

    def hold(self, way: Way, outage_ns: int) -> None:
        """Nothing gets through in this direction for a while; then all of it does."""
        self._held[way] = max(self._held.get(way, 0), self.world.now_ns + outage_ns)

    def slow_down(self, way: Way, duration_ns: int, factor: int) -> None:
        """Everything takes `factor` times as long in this direction for a while."""
        self._slow[way] = self.world.now_ns + duration_ns, factor

    def delayed_ns(self, way: Way, delay_ns: int) -> int:
        """How long a message takes that would take `delay_ns` on a sound way."""
        now_ns = self.world.now_ns
        until_ns, factor = self._slow.get(way, (0, 1))
        if until_ns > now_ns:
            delay_ns *= factor
        elif until_ns:
            del self._slow[way]
        until_ns = self._held.get(way, 0)
        if until_ns > now_ns:
            return until_ns - now_ns + delay_ns
        if until_ns:
            del self._held[way]
        return delay_ns

    def latency_ns(self) -> int:
        """Mostly short, sometimes a burst of retransmissions."""
        chance = self.random.random()
        if chance < 0.01:
            return self.random.randrange(self.max_latency_ns * 25)
        return 20 * MICROSECOND + int(chance * chance * self.max_latency_ns)

    def dial(self, one: NodeId, other: NodeId) -> None:
        """Tries to bring a link up soon; again when only one end wants it yet."""
        pair = (min(one, other), max(one, other))
        if pair not in self._dialling:
            self._dialling[pair] = None
            self.world.after(self.random.randrange(MILLISECOND, self.max_dial_ns), lambda: self._dialled(pair))

    def _dialled(self, pair: tuple[NodeId, NodeId]) -> None:
        del self._dialling[pair]
        ends = self._ends.get(pair[0]), self._ends.get(pair[1])
        dialler, dialled = ends
        if dialler is None or dialled is None or not (dialler.life.alive and dialled.life.alive):
            return
        if pair in self._links or dialled.me not in dialler.wanted or dialler.me not in dialled.wanted:
            return
        if pair in self._blocked:
            self.dial(*pair)
            return
        for end, other in ((dialler, dialled), (dialled, dialler)):
            old = end.links.get(other.me)
            if old is not None:
                end.life.do(old, partial(old.noticed, end))
        if pair in self._links:
            return
        self._links[pair] = link = _Link(self, (dialler, dialled))
        link.bring_up()

    def forget(self, link: _Link) -> None:
        """A link was cut: dialled again if both ends live and still want it."""
        pair = (link.ends[0].me, link.ends[1].me)
        if self._links.get(pair) is link:
            del self._links[pair]
        if link.ends[0].life.alive and link.ends[1].life.alive:
            self.dial(*pair)

    def links_of(self, end: SimNetwork) -> list[_Link]:
        return [link for link in self._links.values() if end in link.ends]

    def links(self) -> list[tuple[NodeId, NodeId]]:
        """The pairs whose link is up."""
        return sorted(self._links)

    def break_link(self, pair: tuple[NodeId, NodeId], outage_ns: int = 0) -> None:
        """Cuts a link; it cannot come up again before `outage_ns` has passed."""
        if outage_ns:
            self._blocked[pair] = None
            self.world.after(outage_ns, lambda: self._blocked.pop(pair, None))
        link = self._links.get(pair)
        if link is not None:
            link.cut()

"""A simulated membership engine: one order of views and messages for all attached processes (ports.Event).

Each process sees the order with delays of its own. A killed process is noticed after a random while; what it sent
before its death is either in the order before its leave, or nowhere.
"""

from __future__ import annotations

from collections.abc import Callable

from sheepdog.cluster.core.ports import Delivery, Event, Peer, View
from sheepdog.cluster.sim.world import MICROSECOND, MILLISECOND, World

OnEvent = Callable[[Event], None]


class SimAttachment:
    """`ports.Engine` of one process."""

    def __init__(self, engine: SimEngine, peer: Peer, on_event: OnEvent) -> None:
        self.peer = peer
        self.alive = True
        self._engine = engine
        self._on_event = on_event
        self._arrival_ns = 0  # of the last event at this process
        self._sent_ns = 0  # at which the last message gets into the order
        self._cut_ns: int | None = None  # killed: what would be ordered later never is

    def broadcast(self, data: bytes) -> None:
        engine, world = self._engine, self._engine.world
        self._sent_ns = max(self._sent_ns, world.now_ns + engine.delay_ns())
        at_ns = self._sent_ns

        def arrived() -> None:
            if self._cut_ns is None or at_ns <= self._cut_ns:
                engine.order(self, data)

        world.after(at_ns - world.now_ns, arrived)

    def leave(self) -> None:
        if self.alive:
            self.alive = False
            self._engine.strike(self)

    def die(self) -> None:
        """Killed: the others learn of it a while later."""
        if self.alive:
            self.alive = False
            engine = self._engine
            self._cut_ns = engine.world.now_ns + engine.random.randrange(engine.max_delay_ns)
            engine.world.after(engine.random.randrange(engine.max_detection_ns), lambda: engine.strike(self))

    def deliver(self, event: Event) -> None:
        engine, world = self._engine, self._engine.world
        self._arrival_ns = max(self._arrival_ns, world.now_ns + engine.delay_ns())

        def arrived() -> None:
            if self.alive:
                self._on_event(event)

        world.after(self._arrival_ns - world.now_ns, arrived)


class SimEngine:
    """See the module."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.random = world.stream("engine")
        self.max_delay_ns = 2 * MILLISECOND
        self.max_detection_ns = 120 * MILLISECOND
        self._attached: list[SimAttachment] = []  # oldest first; the dead until they are noticed
        self._sequence = 0
        self._incarnation = 0

    def delay_ns(self) -> int:
        return 50 * MICROSECOND + self.random.randrange(self.max_delay_ns)

    def attach(self, node: bytes, payload: bytes, on_event: OnEvent) -> SimAttachment:
        """A new incarnation of `node` becomes visible; an old one that nobody has noticed dying yet leaves first."""
        for old in [old for old in self._attached if old.peer.id == node]:
            self.strike(old)
        self._incarnation += 1
        attachment = SimAttachment(self, Peer(node, self._incarnation, payload), on_event)
        self._attached.append(attachment)
        self._view(joined=(attachment.peer,), left=())
        return attachment

    def strike(self, attachment: SimAttachment) -> None:
        """The leave of a process gets into the order."""
        if attachment in self._attached:
            self._attached.remove(attachment)
            self._view(joined=(), left=(attachment.peer,))

    def order(self, sender: SimAttachment, data: bytes) -> None:
        """A message gets into the order, unless its sender has left before."""
        if sender not in self._attached:
            return
        self._sequence += 1
        self.world.note(data)
        self._deliver(Delivery(self._sequence, sender.peer, data))

    def _view(self, joined: tuple[Peer, ...], left: tuple[Peer, ...]) -> None:
        self._sequence += 1
        self._deliver(View(self._sequence, tuple(one.peer for one in self._attached), joined, left))

    def _deliver(self, event: Event) -> None:
        for attachment in self._attached:
            attachment.deliver(event)

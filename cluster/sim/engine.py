"""A simulated membership engine: one order of views and messages for all attached processes (ports.Event).

Each process sees the order with delays of its own. A killed process is noticed after a random while; what it sent
before its death is either in the order before its leave, or nowhere. Every process holds a lease and asks for the next
one, as with the real engines. A process that is stopped, or cut off from the engine, is struck out after `session_ns`
without proof of its death, as ZooKeeper does; with 0 it stays attached, as with the local driver, and only the others
can expel it.
"""

from __future__ import annotations

from collections.abc import Callable

from sheepdog.cluster.core.limits import LEASE_NS
from sheepdog.cluster.core.ports import Delivery, Event, Leased, Lost, Peer, Resumed, Suspended, View
from sheepdog.cluster.sim.world import MICROSECOND, MILLISECOND, Life, World

OnEvent = Callable[[Event], None]
NOTICED = 3  # a process knows that the engine is out of reach when a third of the session is over


class SimAttachment:
    """`ports.Engine` of one process."""

    def __init__(self, engine: SimEngine, peer: Peer, on_event: OnEvent, life: Life) -> None:
        self.peer = peer
        self.life = life
        self._engine = engine
        self._on_event = on_event
        self._arrival_ns = 0  # of the last event at this process
        self._sent_ns = 0  # at which the last message gets into the order
        self._died_ns: int | None = None  # killed: what would be ordered later never is
        self._cut_until_ns = 0  # cut off from the engine
        self._suspended = False
        self._leaving = False

    @property
    def behind(self) -> bool:
        """There are events that this process has not seen yet."""
        return self._arrival_ns > self._engine.world.now_ns

    def broadcast(self, data: bytes) -> None:
        self._send(lambda: self._engine.order(self, data))

    def renew(self) -> None:
        """A lease of LEASE_NS from the time of asking, if this process is still attached when the engine sees it."""
        until_ns = self._engine.world.now_ns + LEASE_NS

        def confirmed() -> None:
            if self._engine.has(self):
                self.deliver(Leased(until_ns))

        self._send(confirmed)

    def _send(self, call: Callable[[], None]) -> None:
        """Does it at the engine, in the order of sending."""
        engine, world = self._engine, self._engine.world
        at_ns = max(self._sent_ns, max(self._cut_until_ns, world.now_ns) + engine.delay_ns())
        self._sent_ns = at_ns

        def arrived() -> None:
            if self._died_ns is None or at_ns <= self._died_ns:
                call()

        world.after(at_ns - world.now_ns, arrived)

    def leave(self) -> None:
        """Orderly: the others see it at once. Somebody who is cut off cannot tell."""
        if self._leaving or not self.life.alive:
            return
        self._leaving = True
        if self._cut_until_ns > self._engine.world.now_ns:
            self.die()
        else:
            self._engine.strike(self)

    def die(self) -> None:
        """Killed: the others learn of it a while later."""
        engine = self._engine
        if self._died_ns is None:
            self._died_ns = engine.world.now_ns + engine.random.randrange(engine.max_delay_ns)
            engine.world.after(engine.random.randrange(engine.max_detection_ns), lambda: engine.strike(self))

    def cut_off(self, outage_ns: int) -> None:
        """The engine is out of reach for a while."""
        engine, world = self._engine, self._engine.world
        self._cut_until_ns = max(self._cut_until_ns, world.now_ns + outage_ns)
        self._arrival_ns = max(self._arrival_ns, self._cut_until_ns)
        self.fall_silent(outage_ns)
        if engine.session_ns and outage_ns > engine.session_ns // NOTICED:
            world.after(engine.session_ns // NOTICED, lambda: self.life.do(self, self._suspend))

    def fall_silent(self, silence_ns: int) -> None:
        """No heartbeat for a while: the session may end."""
        engine = self._engine
        if engine.session_ns and silence_ns > engine.session_ns:
            engine.world.after(engine.session_ns, lambda: engine.expire(self))

    def fall_behind(self, delay_ns: int) -> None:
        """What is ordered from now on comes here so late, and nothing else goes wrong."""
        self._arrival_ns = max(self._arrival_ns, self._engine.world.now_ns + delay_ns)

    def _suspend(self) -> None:
        left_ns = self._cut_until_ns - self._engine.world.now_ns
        if left_ns <= 0 or self._suspended or self._leaving:
            return
        self._suspended = True
        self._on_event(Suspended("simulated"))
        self._engine.world.after(left_ns, lambda: self.life.do(self, self._resume))

    def _resume(self) -> None:
        left_ns = self._cut_until_ns - self._engine.world.now_ns
        if left_ns > 0:
            self._engine.world.after(left_ns, lambda: self.life.do(self, self._resume))
        elif self._suspended and self._engine.has(self):
            self._suspended = False
            self._on_event(Resumed())

    def deliver(self, event: Event) -> None:
        engine, world = self._engine, self._engine.world
        self._arrival_ns = max(self._arrival_ns, world.now_ns + engine.delay_ns())

        def arrived() -> None:
            if not self._leaving:
                self._on_event(event)

        world.after(self._arrival_ns - world.now_ns, lambda: self.life.do(self, arrived))


class SimEngine:
    """See the module."""

    def __init__(self, world: World, session_ns: int = 0) -> None:
        self.world = world
        self.random = world.stream("engine")
        self.session_ns = session_ns
        self.max_delay_ns = 2 * MILLISECOND
        self.max_detection_ns = 120 * MILLISECOND
        self._attached: list[SimAttachment] = []  # oldest first; the dead until they are noticed
        self._sequence = 0
        self._incarnation = 0

    def delay_ns(self) -> int:
        return 50 * MICROSECOND + self.random.randrange(self.max_delay_ns)

    def has(self, attachment: SimAttachment) -> bool:
        return attachment in self._attached

    def attach(self, node: bytes, payload: bytes, on_event: OnEvent, life: Life) -> SimAttachment:
        """A new incarnation of `node` becomes visible; an old one that nobody has noticed dying yet leaves first."""
        for old in [old for old in self._attached if old.peer.id == node]:
            self.strike(old)
        self._incarnation += 1
        attachment = SimAttachment(self, Peer(node, self._incarnation, payload), on_event, life)
        self._attached.append(attachment)
        self._view(joined=(attachment.peer,), left=())
        attachment.deliver(Leased(self.world.now_ns + LEASE_NS))
        return attachment

    def strike(self, attachment: SimAttachment) -> None:
        """The leave of a process gets into the order; its end is proven."""
        if attachment in self._attached:
            self._attached.remove(attachment)
            self._view(joined=(), left=(attachment.peer,))

    def expire(self, attachment: SimAttachment) -> None:
        """A session is over: nobody knows whether the process still answers from what it knew."""
        if attachment in self._attached:
            self._attached.remove(attachment)
            self._view(joined=(), left=(attachment.peer,), grace_ns=LEASE_NS)
            attachment.deliver(Lost("the session expired"))

    def order(self, sender: SimAttachment, data: bytes) -> None:
        """A message gets into the order, unless its sender has left before."""
        if sender not in self._attached:
            return
        self._sequence += 1
        self.world.note(data)
        self._deliver(Delivery(self._sequence, sender.peer, data))

    def _view(self, joined: tuple[Peer, ...], left: tuple[Peer, ...], grace_ns: int = 0) -> None:
        self._sequence += 1
        self._deliver(View(self._sequence, tuple(one.peer for one in self._attached), joined, left, grace_ns))

    def _deliver(self, event: Event) -> None:
        for attachment in self._attached:
            attachment.deliver(event)

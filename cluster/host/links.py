"""Links to the other nodes: the real `core.ports.Network`, over TCP, or by a unix socket between sheep of one host.

One connection per pair of nodes carries everything in both directions; the node with the smaller id dials and dials
again when it breaks. Messages are in order and at most once; those of a broken link are lost, and `on_link` tells core,
which sends again what still matters. What a turn of the loop produced for a peer leaves in one sendmsg.

A node that was given an I/O address (`sheep -i`) says so in its hello. The dialler then opens a second connection there
and puts it in the place of the first, as one link that broke and came back; where that is out of reach it falls back to
the node's own address, and tries the other one again every few seconds.

The side that was dialled sends its hello when it counts the dialler among its peers, so both ends call a link up only
when both want it. Until then the dialler waits: it may have learnt of a new epoch first.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable
from typing import Final

from sheepdog.cluster.core.errors import PeerError
from sheepdog.cluster.core.ids import NodeId, format_address
from sheepdog.cluster.core.limits import LATE_NS
from sheepdog.cluster.core.messages import Message
from sheepdog.cluster.core.ports import Log, Network
from sheepdog.cluster.host.link import (
    HELLO_TIMEOUT_S,
    USER_TIMEOUT_MS,
    WAITING_TIMEOUT_S,
    Link,
    State,
    tune,
)
from sheepdog.cluster.host.same_host import connect_by_name
from sheepdog.cluster.host.turn import Turn
from sheepdog.cluster.wire.peer import Hello
from sheepdog.cluster.wire.streams import Arena

MAX_WAITING: Final = 256  # strangers and greeting connections kept at a time: more than nodes start in ten seconds
REDIAL_FIRST_S: Final = 0.02  # a sheep that restarts is back within tens of milliseconds
REDIAL_MAX_S: Final = 1.0  # as QEMU and tgt reconnect
STABLE_S: Final = 2.0  # a link that lived so long was sound: the next one may be dialled at once again
CONGESTED_BYTES: Final = 64 << 20  # waiting to be sent to one peer: half a second of 1 Gbit/s; producers should pause
IO_RETRY_S: Final = 5.0  # between attempts to return to a peer's I/O address
IO_USER_TIMEOUT_MS: Final = 4_000  # there is another way: long before a silent member is expelled (limits.SILENT_TICKS)
_LATE_S: Final = LATE_NS / 1e9
_UP: Final = State.UP  # looked up once, not for each message
_WARNING, _INFO = 4, 6


class _Peer:
    """A node that this one wants to talk to."""

    __slots__ = (
        "avoid_io",
        "avoid_name",
        "better",
        "complained",
        "delay_s",
        "fallen_back",
        "io",
        "link",
        "node",
        "timer",
    )

    def __init__(self, node: NodeId) -> None:
        self.node = node
        self.link: Link | None = None
        self.io: NodeId | None = None  # its I/O address, once it has told
        self.better: Link | None = None  # to that address, to take the place of `link`
        self.avoid_io = False  # it was out of reach just now
        self.avoid_name = False  # who answered by the name of its port was somebody else, or did not want us
        self.fallen_back = False  # said once per outage
        self.timer: asyncio.TimerHandle | None = None  # of the next attempt to dial
        self.delay_s = REDIAL_FIRST_S
        self.complained = False  # one line of log per outage

    def stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def rename(self, node: NodeId) -> None:
        """Calls it by the object that core has for it now: dictionaries find that one without comparing it."""
        self.node = node
        for link in (self.link, self.better):
            if link is not None:
                link.node = node

    def close(self) -> None:
        self.stop_timer()
        for link in (self.link, self.better):
            if link is not None:
                link.close()


class Links(Network):
    """All links of this node. `on_message`, `on_successes` (fence, ids of requests), `on_applied` (fence, number and
    sequence of each write) and `on_link` are never called from within a call to here."""

    def __init__(
        self,
        me: NodeId,
        loop: asyncio.AbstractEventLoop,
        turn: Turn,
        arena: Arena,
        log: Log,
        io: NodeId | None = None,
    ) -> None:
        """`io` is where others shall reach this node besides `me`."""
        self.me = me
        self.hello = Hello(me, io)
        self.loop = loop
        self.turn = turn
        self.arena = arena
        self.log = log
        self.on_message: Callable[[NodeId, Message], None] = lambda node, message: None
        self.on_successes: Callable[[NodeId, int, list[int]], None] = lambda node, fence, rids: None
        self.on_applied: Callable[[NodeId, int, list[int]], None] = lambda node, fence, writes: None
        self.on_link: Callable[[NodeId, bool], None] = lambda node, up: None
        self.received = [0] * 256  # messages, by kind
        self.rx_bytes = 0
        self.tx_bytes = 0
        self._peers: dict[NodeId, _Peer] = {}
        self._last: _Peer | None = None  # the one asked for last: mostly the next one, too
        self._waiting: dict[Link, None] = {}  # incoming, not (yet) of a peer; oldest first
        self._late: asyncio.TimerHandle | None = None  # until it calls, answers may wait for something to go with
        self._closed = False

    def _up(self, node: NodeId) -> Link | None:
        """The link to a peer, if it is up."""
        peer = self._last
        if peer is None or peer.node is not node:
            peer = self._last = self._peers.get(node)
            if peer is None:
                return None
        link = peer.link
        return link if link is not None and link.state is _UP else None

    def send(self, node: NodeId, message: Message) -> None:
        """Queues a message for a peer whose link is up; dropped otherwise."""
        link = self._up(node)
        if link is not None:
            link.send(message)

    def confirm(self, node: NodeId, fence: int, rid: int) -> None:
        """As `send` of an ANSWER of success; all of one turn for a peer go in one frame."""
        link = self._up(node)
        if link is not None:
            link.confirm(fence, rid)

    def confirm_later(self, node: NodeId, fence: int, rid: int) -> None:
        link = self._up(node)
        if link is not None:
            link.confirm_later(fence, rid)

    def flush_in_time(self) -> None:
        """An answer waits for the next message to its node."""
        if self._late is None:
            self._late = self.loop.call_later(_LATE_S, self._flush_late)

    def _flush_late(self) -> None:
        self._late = None
        for peer in self._peers.values():
            if peer.link is not None:
                peer.link.flush_answers()

    def send_late(self, node: NodeId, message: Message) -> None:
        link = self._up(node)
        if link is not None:
            link.send_late(message)

    def applied(self, node: NodeId, fence: int, number: int, sequence: int) -> None:
        link = self._up(node)
        if link is not None:
            link.applied(fence, number, sequence)

    def connect(self, nodes: Iterable[NodeId]) -> None:
        """The peers from now on, this node left out. Links to others are closed without an `on_link`."""
        wanted = dict.fromkeys(node for node in nodes if node != self.me)
        for node in [node for node in self._peers if node not in wanted]:
            self._peers.pop(node).close()
        known, self._peers = self._peers, {}
        self._last = None
        for node in wanted:
            peer = known.get(node)
            if peer is not None:
                self._peers[node] = peer
                peer.rename(node)
            elif not self._closed:
                self._peers[node] = peer = _Peer(node)
                if self.me < node:
                    # Not at once: core is in the middle of an event, and on_link must not come from within.
                    peer.timer = self.loop.call_later(0, self._dial, peer)
        if self._waiting:
            self.loop.call_soon(self._admit_waiting)

    def is_up(self, node: NodeId) -> bool:
        """True while messages to this node are not dropped."""
        peer = self._peers.get(node)
        return peer is not None and peer.link is not None and peer.link.state is State.UP

    def congested(self, node: NodeId) -> bool:
        """True while so much waits for this node that whoever produces more should pause."""
        peer = self._peers.get(node)
        return peer is not None and peer.link is not None and peer.link.outbox.size > CONGESTED_BYTES

    def adopt(self, sock: socket.socket) -> None:
        """Takes over an accepted connection whose first byte is that of a hello (not read yet)."""
        if len(self._waiting) >= MAX_WAITING or self._closed:
            self.log(_WARNING, f"{len(self._waiting)} incoming links wait already, another one is refused")
            sock.close()
            return
        tune(sock)
        link = Link(self, sock, None, State.GREETING)
        self._waiting[link] = None
        link.listen(HELLO_TIMEOUT_S)

    def close(self) -> None:
        """Closes everything; nothing is called back any more."""
        self._closed = True
        if self._late is not None:
            self._late.cancel()
        for peer in self._peers.values():
            peer.close()
        for link in self._waiting:
            link.close()
        self._peers.clear()
        self._waiting.clear()

    # What links tell

    def greeted(self, link: Link, hello: Hello) -> None:
        """The other side has said who it is."""
        node = hello.node
        if link.node is not None:  # dialled by us: the hello is the consent
            if node != link.node:
                raise PeerError(f"{node} answers there")
            peer = self._peers[node]
            peer.io = hello.io
            if link is not peer.better or self._make_way(peer):
                self._came_up(peer, link)
                self._seek_io(peer)
            else:
                link.close()
            return
        if node >= self.me:
            raise PeerError(f"{node} has no business to dial {self.me}")
        link.node = node
        if node in self._peers:
            self._admit(link)
        else:
            link.deadline(WAITING_TIMEOUT_S, "still not a member")

    def failed(self, link: Link, was_up: bool, why: str) -> None:
        """A link closed itself."""
        if link in self._waiting:
            del self._waiting[link]
            self.log(_INFO, f"{link} closed: {why}")
            return
        assert link.node is not None
        peer = self._peers.get(link.node)
        if peer is None or link not in (peer.link, peer.better):
            return
        if link is peer.better:
            peer.better = None
        else:
            peer.link = None
        if self.me < peer.node:
            peer.avoid_io = link.by_io  # if the other way fails too, it is not for the I/O network
            peer.avoid_name = link.by_name and not was_up
            if was_up and self.loop.time() - link.since >= STABLE_S:
                peer.delay_s = REDIAL_FIRST_S
            self._dial_later(peer)
        if was_up or not peer.complained:
            peer.complained = True
            self.log(_INFO, f"{link} {'lost' if was_up else 'not established'}: {why}")
        if was_up:
            self.on_link(peer.node, False)

    def _make_way(self, peer: _Peer) -> bool:
        """The link by the I/O address takes the other's place; False if core does not want the peer any more."""
        link, peer.better = peer.link, None
        peer.avoid_io = peer.fallen_back = False
        if link is not None:
            peer.link = None
            link.close()
            self.on_link(peer.node, False)
        return self._peers.get(peer.node) is peer

    def _came_up(self, peer: _Peer, link: Link) -> None:
        link.up()
        peer.link = link
        peer.complained = False
        self.log(_INFO, f"{link} is up")
        self.on_link(peer.node, True)

    def _admit(self, link: Link) -> None:
        """An incoming link of a peer; the peer knows best, so a link that exists already is dead."""
        assert link.node is not None
        del self._waiting[link]
        peer = self._peers[link.node]
        link.node = peer.node
        old = peer.link
        if old is not None:
            old.fail("replaced by a new one")
            if self._peers.get(link.node) is not peer or peer.link is not None:
                link.close()  # core changed its mind meanwhile
                return
        link.send_hello()
        if link.state is not State.CLOSED:
            self._came_up(peer, link)

    def _admit_waiting(self) -> None:
        for link in list(self._waiting):
            if link in self._waiting and link.node is not None and link.node in self._peers:
                self._admit(link)

    # Dialling

    def _dial_later(self, peer: _Peer) -> None:
        """What the dialler does next, unless it is under way."""
        if peer.link is not None or peer.better is not None:
            self._seek_io(peer)
            return
        peer.stop_timer()
        peer.timer = self.loop.call_later(peer.delay_s, self._dial, peer)
        peer.delay_s = min(2 * peer.delay_s, REDIAL_MAX_S)

    def _seek_io(self, peer: _Peer) -> None:
        """A link by the node's own address is to be replaced by one to its I/O address."""
        link = peer.link
        if link is not None and link.state is State.UP and peer.io and not link.by_io and peer.better is None:
            if peer.avoid_io and not peer.fallen_back:
                peer.fallen_back = True
                self.log(_WARNING, f"{peer.io} is out of reach, fallback to {peer.node}")
            peer.stop_timer()
            peer.timer = self.loop.call_later(IO_RETRY_S if peer.avoid_io else 0, self._dial_better, peer)

    def _dial(self, peer: _Peer) -> None:
        peer.timer = None
        target = peer.io if peer.io and not peer.avoid_io else peer.node
        peer.link = self._dialled(peer, target)
        if peer.link is None:
            self._dial_later(peer)
        else:
            self._begin(peer.link)

    def _dial_better(self, peer: _Peer) -> None:
        peer.timer = None
        assert peer.io is not None
        peer.better = self._dialled(peer, peer.io)
        if peer.better is None:
            self._seek_io(peer)
        else:
            self._begin(peer.better)

    def _dialled(self, peer: _Peer, target: NodeId) -> Link | None:
        """A link to be begun; None without a socket for it."""
        try:
            here = target.address == self.me.address and not peer.avoid_name
            sock = connect_by_name(target.port) if here else None
            if sock is None:
                family = socket.AF_INET6 if ":" in format_address(target.address) else socket.AF_INET
                sock = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:  # out of files: later, perhaps
            self.log(_WARNING, f"cannot dial {peer.node}: {error.strerror}")
            return None
        sock.setblocking(False)
        link = Link(self, sock, peer.node, State.DIALLING, target)
        tune(sock, IO_USER_TIMEOUT_MS if link.by_io else USER_TIMEOUT_MS)
        return link

    def _begin(self, link: Link) -> None:
        try:
            link.dial()
        except OSError as error:
            link.fail(error.strerror or str(error))

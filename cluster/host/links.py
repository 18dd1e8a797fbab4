"""Links to the other nodes: the real `core.ports.Network`, over TCP.

One connection per pair of nodes carries everything in both directions; the node with the smaller id dials and dials
again when it breaks. Messages are in order and at most once; those of a broken link are lost, and `on_link` tells core,
which sends again what still matters. What a turn of the loop produced for a peer leaves in one sendmsg.

A link: dialling (the dialler only) -> greeting (hellos are exchanged) -> up -> closed. The side that was dialled sends
its hello when it counts the dialler among its peers, so both ends call a link up only when both want it. Until then the
dialler waits: it may have learnt of a new epoch first.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterable
from enum import IntEnum

from sheepdog.cluster.core.errors import PeerError
from sheepdog.cluster.core.ids import NodeId, format_address
from sheepdog.cluster.core.messages import Message
from sheepdog.cluster.core.ports import Log
from sheepdog.cluster.host.loop import Turn, describe
from sheepdog.cluster.wire.peer import HEADER_SIZE, HELLO, body_length, decode, decode_hello, encode, encode_hello
from sheepdog.cluster.wire.streams import Arena, Intake, Outbox

DIAL_TIMEOUT_S = 3.0  # of a TCP connect: longer than one lost SYN (1 s), short beside any eviction limit
HELLO_TIMEOUT_S = 5.0  # of an incoming connection to say who it is
WAITING_TIMEOUT_S = 10.0  # a greeted stranger is kept so long: epochs spread within seconds
MAX_WAITING = 256  # strangers and greeting connections kept at a time: more than nodes start in ten seconds
GREETING_TIMEOUT_S = WAITING_TIMEOUT_S + HELLO_TIMEOUT_S  # of a dialler: the other side may know us only later
REDIAL_FIRST_S = 0.02  # a sheep that restarts is back within tens of milliseconds
REDIAL_MAX_S = 1.0  # as QEMU and tgt reconnect
STABLE_S = 2.0  # a link that lived so long was sound: the next one may be dialled at once again
CONGESTED_BYTES = 64 << 20  # waiting to be sent to one peer: half a second of 1 Gbit/s; producers should pause
MAX_QUEUE_BYTES = 1 << 30  # beyond it the peer does not read any more: the link is broken, core starts again
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 5, 2, 3  # a peer without power is noticed in 11 s ...
USER_TIMEOUT_MS = 11_000  # ... also while bytes to it are under way
_ERROR, _WARNING, _INFO = 3, 4, 6


class _State(IntEnum):
    DIALLING = 1
    GREETING = 2
    UP = 3
    CLOSED = 4


class _Link:
    """One TCP connection to a peer, or to somebody who says so."""

    __slots__ = (
        "_flush_asked",
        "_links",
        "_timer",
        "_writing",
        "greeting",
        "intake",
        "node",
        "outbox",
        "since",
        "socket",
        "state",
    )

    def __init__(self, links: Links, sock: socket.socket, node: NodeId | None, state: _State) -> None:
        self._links = links
        self.socket = sock
        self.node = node  # of an incoming link only known from its hello
        self.state = state
        self.greeting = b""  # bytes of the other side's hello
        self.intake = Intake(links.arena, HEADER_SIZE, body_length)
        self.outbox = Outbox()
        self.since = 0.0  # time of the loop at which the link came up
        self._flush_asked = False
        self._writing = False  # the socket is full, the loop tells when it is not
        self._timer: asyncio.TimerHandle | None = None

    def deadline(self, seconds: float, why: str) -> None:
        """Closes the link unless the next state is reached in time."""
        self._stop_timer()
        self._timer = self._links.loop.call_later(seconds, self.fail, why)

    def dial(self, address: tuple[str, int]) -> None:
        """Starts the TCP connect; OSError when it fails at once."""
        code = self.socket.connect_ex(address)
        if code not in {0, errno.EINPROGRESS}:
            raise OSError(code, os.strerror(code))
        self._links.loop.add_writer(self.socket, self._dialled)
        self.deadline(DIAL_TIMEOUT_S, "no answer")

    def _dialled(self) -> None:
        self._links.loop.remove_writer(self.socket)
        code = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self.fail(os.strerror(code))
            return
        self.state = _State.GREETING
        self.send_hello()
        if self.state is _State.GREETING:  # the hello could be sent
            self.listen(GREETING_TIMEOUT_S)

    def listen(self, greeting_timeout_s: float) -> None:
        """Waits for the other side's hello."""
        self.deadline(greeting_timeout_s, "no hello")
        self._links.loop.add_reader(self.socket, self._readable)

    def send_hello(self) -> None:
        self.outbox.add([encode_hello(self._links.me)])
        self.flush()

    def up(self) -> None:
        """Both sides have said and accepted who they are."""
        self._stop_timer()
        self.state = _State.UP
        self.since = self._links.loop.time()

    def send(self, message: Message) -> None:
        self.outbox.add(encode(message))
        if not self._flush_asked:
            self._flush_asked = True
            self._links.turn.at_end(self.flush)

    def flush(self) -> None:
        """Sends what waits; what the socket does not take now follows when it can."""
        self._flush_asked = False
        if self._writing or self.state is _State.CLOSED:
            if self.outbox.size > MAX_QUEUE_BYTES:
                self.fail(f"{self.outbox.size >> 20} MiB wait to be read")
            return
        self._send()

    def _send(self) -> None:
        before = self.outbox.size
        try:
            empty = self.outbox.send(self.socket.sendmsg)
        except OSError as error:
            self.fail(error.strerror or str(error))
            return
        self._links.tx_bytes += before - self.outbox.size
        if empty == self._writing:
            self._writing = not empty
            if empty:
                self._links.loop.remove_writer(self.socket)
            else:
                self._links.loop.add_writer(self.socket, self._send)

    def _readable(self) -> None:
        try:
            if self.state is _State.UP:
                self._receive()
            else:
                self._receive_hello()
        except (BlockingIOError, InterruptedError):
            pass
        except PeerError as error:
            self._links.log(_WARNING, f"{self}: {error}")
            self.fail("protocol broken")
        except OSError as error:
            self.fail(error.strerror or str(error))

    def _receive(self) -> None:
        intake = self.intake
        count = self.socket.recv_into(intake.space())
        if not count:
            self.fail("closed by the other side")
            return
        intake.fill(count)
        links = self._links
        links.rx_bytes += count
        received, on_message = links.received, links.on_message
        node = self.node
        assert node is not None
        while self.state is _State.UP:
            frame = intake.next()
            if frame is None:
                return
            message = decode(*frame)
            received[message.kind] += 1
            try:
                on_message(node, message)
            except Exception as error:
                # Ours, not the peer's: the bug is reported, the other messages are handled.
                self._links.log(_ERROR, f"internal error: {message!r} from {node}: {describe(error)}")

    def _receive_hello(self) -> None:
        missing = HELLO.size - len(self.greeting)
        if not missing:  # waits to become a peer; it must not speak before it has our hello
            if self.socket.recv(1, socket.MSG_PEEK):
                raise PeerError("speaks before it was greeted")
            self.fail("closed by the other side")
            return
        data = self.socket.recv(missing)
        if not data:
            self.fail("closed by the other side")
            return
        self.greeting += data
        if len(data) == missing:
            self._links.greeted(self, decode_hello(self.greeting))

    def fail(self, why: str) -> None:
        """The connection is over; the peer is told to core as down, and dialled again if that is our part."""
        if self.state is not _State.CLOSED:
            was_up = self.state is _State.UP
            self.close()
            self._links.failed(self, was_up, why)

    def close(self) -> None:
        """Closes without telling anybody."""
        if self.state is _State.CLOSED:
            return
        self.state = _State.CLOSED
        self._stop_timer()
        self._links.loop.remove_reader(self.socket)
        self._links.loop.remove_writer(self.socket)
        self.socket.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def __str__(self) -> str:
        return f"link with {self.node}" if self.node is not None else "incoming link"


class _Peer:
    """A node that this one wants to talk to."""

    __slots__ = ("complained", "delay_s", "link", "node", "redial")

    def __init__(self, node: NodeId) -> None:
        self.node = node
        self.link: _Link | None = None
        self.redial: asyncio.TimerHandle | None = None
        self.delay_s = REDIAL_FIRST_S
        self.complained = False  # one line of log per outage

    def close(self) -> None:
        if self.redial is not None:
            self.redial.cancel()
        if self.link is not None:
            self.link.close()


class Links:
    """All links of this node. `on_message` and `on_link` are never called from within a call to here."""

    def __init__(self, me: NodeId, loop: asyncio.AbstractEventLoop, turn: Turn, arena: Arena, log: Log) -> None:
        self.me = me
        self.loop = loop
        self.turn = turn
        self.arena = arena
        self.log = log
        self.on_message: Callable[[NodeId, Message], None] = lambda node, message: None
        self.on_link: Callable[[NodeId, bool], None] = lambda node, up: None
        self.received = [0] * 256  # messages, by kind
        self.rx_bytes = 0
        self.tx_bytes = 0
        self._peers: dict[NodeId, _Peer] = {}
        self._waiting: dict[_Link, None] = {}  # incoming, not (yet) of a peer; oldest first
        self._closed = False

    def send(self, node: NodeId, message: Message) -> None:
        """Queues a message for a peer whose link is up; dropped otherwise."""
        peer = self._peers.get(node)
        if peer is not None:
            link = peer.link
            if link is not None and link.state is _State.UP:
                link.send(message)

    def connect(self, nodes: Iterable[NodeId]) -> None:
        """The peers from now on, this node left out. Links to others are closed without an `on_link`."""
        wanted = dict.fromkeys(node for node in nodes if node != self.me)
        for node in [node for node in self._peers if node not in wanted]:
            self._peers.pop(node).close()
        for node in wanted:
            if node not in self._peers and not self._closed:
                self._peers[node] = peer = _Peer(node)
                if self.me < node:
                    # Not at once: core is in the middle of an event, and on_link must not come from within.
                    peer.redial = self.loop.call_later(0, self._dial, peer)
        if self._waiting:
            self.loop.call_soon(self._admit_waiting)

    def is_up(self, node: NodeId) -> bool:
        """True while messages to this node are not dropped."""
        peer = self._peers.get(node)
        return peer is not None and peer.link is not None and peer.link.state is _State.UP

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
        _tune(sock)
        link = _Link(self, sock, None, _State.GREETING)
        self._waiting[link] = None
        link.listen(HELLO_TIMEOUT_S)

    def close(self) -> None:
        """Closes everything; nothing is called back any more."""
        self._closed = True
        for peer in self._peers.values():
            peer.close()
        for link in self._waiting:
            link.close()
        self._peers.clear()
        self._waiting.clear()

    # What links tell

    def greeted(self, link: _Link, node: NodeId) -> None:
        """The other side has said who it is."""
        if link.node is not None:  # dialled by us: the hello is the consent
            if node != link.node:
                raise PeerError(f"{node} answers there")
            self._came_up(self._peers[node], link)
            return
        if node >= self.me:
            raise PeerError(f"{node} has no business to dial {self.me}")
        link.node = node
        if node in self._peers:
            self._admit(link)
        else:
            link.deadline(WAITING_TIMEOUT_S, "still not a member")

    def failed(self, link: _Link, was_up: bool, why: str) -> None:
        """A link closed itself."""
        if link in self._waiting:
            del self._waiting[link]
            self.log(_INFO, f"{link} closed: {why}")
            return
        assert link.node is not None
        peer = self._peers.get(link.node)
        if peer is None or peer.link is not link:
            return
        peer.link = None
        if self.me < peer.node:
            if was_up and self.loop.time() - link.since >= STABLE_S:
                peer.delay_s = REDIAL_FIRST_S
            self._redial_later(peer)
        if was_up or not peer.complained:
            peer.complained = True
            self.log(_INFO, f"{link} {'lost' if was_up else 'not established'}: {why}")
        if was_up:
            self.on_link(peer.node, False)

    def _came_up(self, peer: _Peer, link: _Link) -> None:
        link.up()
        peer.link = link
        peer.complained = False
        self.log(_INFO, f"{link} is up")
        self.on_link(peer.node, True)

    def _admit(self, link: _Link) -> None:
        """An incoming link of a peer; the peer knows best, so a link that exists already is dead."""
        assert link.node is not None
        del self._waiting[link]
        peer = self._peers[link.node]
        old = peer.link
        if old is not None:
            old.fail("replaced by a new one")
            if self._peers.get(link.node) is not peer or peer.link is not None:
                link.close()  # core changed its mind meanwhile
                return
        link.send_hello()
        if link.state is not _State.CLOSED:
            self._came_up(peer, link)

    def _admit_waiting(self) -> None:
        for link in list(self._waiting):
            if link in self._waiting and link.node is not None and link.node in self._peers:
                self._admit(link)

    # Dialling

    def _redial_later(self, peer: _Peer) -> None:
        peer.redial = self.loop.call_later(peer.delay_s, self._dial, peer)
        peer.delay_s = min(2 * peer.delay_s, REDIAL_MAX_S)

    def _dial(self, peer: _Peer) -> None:
        peer.redial = None
        host = format_address(peer.node.address)
        try:
            sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        except OSError as error:  # out of files: later, perhaps
            self.log(_WARNING, f"cannot dial {peer.node}: {error.strerror}")
            self._redial_later(peer)
            return
        sock.setblocking(False)
        _tune(sock)
        peer.link = link = _Link(self, sock, peer.node, _State.DIALLING)
        try:
            link.dial((host, peer.node.port))
        except OSError as error:
            link.fail(error.strerror or str(error))


def _tune(sock: socket.socket) -> None:
    """Small messages leave at once, a dead peer is noticed."""
    for level, option, value in (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS),
    ):
        with contextlib.suppress(OSError):  # a UNIX socket, or a kernel without the option: works all the same
            sock.setsockopt(level, option, value)

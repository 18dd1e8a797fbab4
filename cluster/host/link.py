"""One connection between two nodes, from its dialling to its end; `links` keeps them all.

A link: dialling (the dialler only) -> greeting (hellos are exchanged) -> up -> closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from sheepdog.cluster.core.errors import PeerError
from sheepdog.cluster.core.ids import NodeId, format_address
from sheepdog.cluster.core.messages import Kind, Message
from sheepdog.cluster.host.loop import describe
from sheepdog.cluster.wire.peer import (
    HELLO,
    PeerIntake,
    decode,
    decode_answers,
    decode_applied,
    decode_hello,
    encode,
    encode_answers,
    encode_applied,
    encode_hello,
    fence_of,
)
from sheepdog.cluster.wire.streams import Outbox

if TYPE_CHECKING:
    from sheepdog.cluster.host.links import Links

DIAL_TIMEOUT_S: Final = 3.0  # of a TCP connect: longer than one lost SYN (1 s), short beside any eviction limit
HELLO_TIMEOUT_S: Final = 5.0  # of an incoming connection to say who it is
WAITING_TIMEOUT_S: Final = 10.0  # a greeted stranger is kept so long: epochs spread within seconds
GREETING_TIMEOUT_S: Final = WAITING_TIMEOUT_S + HELLO_TIMEOUT_S  # of a dialler: the other side may know us only later
MAX_QUEUE_BYTES: Final = 1 << 30  # beyond it the peer does not read any more: the link is broken, core starts again
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 5, 2, 3  # a peer without power is noticed in 11 s ...
USER_TIMEOUT_MS: Final = 11_000  # ... also while bytes to it are under way
_ERROR: Final = 3
_WARNING: Final = 4
_ANSWERS: Final = int(Kind.ANSWERS)
_APPLIED: Final = int(Kind.APPLIED)


class State(IntEnum):
    DIALLING = 1
    GREETING = 2
    UP = 3
    CLOSED = 4


class Link:
    """One connection to a peer, or to somebody who says so."""

    __slots__ = (
        "_answered",
        "_answers_fence",
        "_applied",
        "_applied_fence",
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
        "target",
    )

    def __init__(
        self, links: Links, sock: socket.socket, node: NodeId | None, state: State, target: NodeId | None = None
    ) -> None:
        self._links = links
        self.socket = sock
        self.node = node  # of an incoming link only known from its hello
        self.state = state
        self.target = target  # the address dialled: the node's own, or its I/O address
        self.greeting = b""  # bytes of the other side's hello
        self.intake = PeerIntake(links.arena)
        self.outbox = Outbox()
        self.since = 0.0  # time of the loop at which the link came up
        self._answered: list[int] = []  # requests of the peer that have succeeded, to be told in one frame
        self._answers_fence = 0  # of all of them
        self._applied: list[int] = []  # writes of the peer's clients: number and sequence of each
        self._applied_fence = 0
        self._flush_asked = False
        self._writing = False  # the socket is full, the loop tells when it is not
        self._timer: asyncio.TimerHandle | None = None

    def deadline(self, seconds: float, why: str) -> None:
        """Closes the link unless the next state is reached in time."""
        self._stop_timer()
        self._timer = self._links.loop.call_later(seconds, self.fail, why)

    @property
    def by_io(self) -> bool:
        """Dialled at the peer's I/O address."""
        return self.target is not None and self.target != self.node

    @property
    def by_name(self) -> bool:
        """Between two sheep of one host, without TCP."""
        return self.socket.family == socket.AF_UNIX

    def dial(self) -> None:
        """Starts the TCP connect to `target`, unless the socket is connected; OSError when it fails at once."""
        assert self.target is not None
        code = 0 if self.by_name else self.socket.connect_ex((format_address(self.target.address), self.target.port))
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
        self.state = State.GREETING
        self.send_hello()
        if self.state is State.GREETING:  # the hello could be sent
            self.listen(GREETING_TIMEOUT_S)

    def listen(self, greeting_timeout_s: float) -> None:
        """Waits for the other side's hello."""
        self.deadline(greeting_timeout_s, "no hello")
        self._links.loop.add_reader(self.socket, self._readable)

    def send_hello(self) -> None:
        self.outbox.put(encode_hello(self._links.hello))
        self.flush()

    def up(self) -> None:
        """Both sides have said and accepted who they are."""
        self._stop_timer()
        self.state = State.UP
        self.since = self._links.loop.time()

    def send(self, message: Message) -> None:
        """Queues a message. Messages are received in the order in which they were queued."""
        if self._answered:
            self._queue_answers()
        encode(message, self.outbox)
        self._flush_later()

    def send_late(self, message: Message) -> None:
        """As `send`, and what the end of this turn still brings goes with it."""
        if self._answered:
            self._queue_answers()
        encode(message, self.outbox)
        if not self._flush_asked:
            self._flush_asked = True
            self._links.turn.at_end(self._flush_next)

    def _flush_next(self) -> None:
        self._links.turn.at_end(self.flush)

    def confirm(self, fence: int, rid: int) -> None:
        """Queues an answer of success, to go with the next ones."""
        self._add_answer(fence, rid)
        self._flush_later()

    def confirm_later(self, fence: int, rid: int) -> None:
        """Queues an answer of success, to go with whatever is sent next."""
        self._add_answer(fence, rid)
        self._links.flush_in_time()

    def _add_answer(self, fence: int, rid: int) -> None:
        if self._answered and fence != self._answers_fence:
            self._queue_answers()
        self._answers_fence = fence
        self._answered.append(rid)

    def flush_answers(self) -> None:
        """Sends those that wait for something to go with."""
        if self._answered:
            self._flush_later()

    def applied(self, fence: int, number: int, sequence: int) -> None:
        """Queues that a write is in the copy here, to go with the next ones."""
        if self._applied and fence != self._applied_fence:
            self._queue_applied()
        self._applied_fence = fence
        self._applied.append(number)
        self._applied.append(sequence)
        self._flush_later()

    def _queue_applied(self) -> None:
        self.outbox.put(encode_applied(self._applied_fence, self._applied))
        self._applied = []

    def _flush_later(self) -> None:
        if not self._flush_asked:
            self._flush_asked = True
            self._links.turn.at_end(self.flush)

    def _queue_answers(self) -> None:
        self.outbox.put(encode_answers(self._answers_fence, self._answered))
        self._answered = []

    def flush(self) -> None:
        """Sends what waits; what the socket does not take now follows when it can."""
        self._flush_asked = False
        if self._answered:
            self._queue_answers()
        if self._applied:
            self._queue_applied()
        if self._writing or self.state is State.CLOSED:
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
            if self.state is State.UP:
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
        received = links.received
        node = self.node
        assert node is not None
        while self.state is State.UP:
            frame = intake.next()
            if frame is None:
                return
            header, body = frame
            kind = header[0]
            received[kind] = received[kind] + 1  # as `+=`, which is a call here
            if kind == _ANSWERS:
                self._deliver_list(links.on_successes, node, fence_of(header), decode_answers(body))
            elif kind == _APPLIED:
                self._deliver_list(links.on_applied, node, fence_of(header), decode_applied(body))
            else:
                self._deliver(node, decode(header, body))

    def _deliver(self, node: NodeId, message: Message) -> None:
        try:
            self._links.on_message(node, message)
        except Exception as error:
            # Ours, not the peer's: the bug is reported, the other messages are handled.
            self._links.log(_ERROR, f"internal error: {message!r} from {node}: {describe(error)}")

    def _deliver_list(
        self, call: Callable[[NodeId, int, list[int]], None], node: NodeId, fence: int, numbers: list[int]
    ) -> None:
        try:
            call(node, fence, numbers)
        except Exception as error:
            self._links.log(_ERROR, f"internal error: success of {numbers} from {node}: {describe(error)}")

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
        if self.state is not State.CLOSED:
            was_up = self.state is State.UP
            self.close()
            self._links.failed(self, was_up, why)

    def close(self) -> None:
        """Closes without telling anybody."""
        if self.state is State.CLOSED:
            return
        self.state = State.CLOSED
        self._stop_timer()
        self._links.loop.remove_reader(self.socket)
        self._links.loop.remove_writer(self.socket)
        self.socket.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def __str__(self) -> str:
        if self.node is None:
            return "incoming link"
        return f"link with {self.node}" + (f" by {self.target}" if self.by_io else "")


def tune(sock: socket.socket, user_timeout_ms: int = USER_TIMEOUT_MS) -> None:
    """Small messages leave at once, a dead peer is noticed."""
    for level, option, value in (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, user_timeout_ms),
    ):
        with contextlib.suppress(OSError):  # a UNIX socket, or a kernel without the option: works all the same
            sock.setsockopt(level, option, value)

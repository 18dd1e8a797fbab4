"""The requests of one connection: what is sent together, who receives, whose answer is whose. For `channel`.

A thread sends its request and waits; what others ask for meanwhile is queued, and it sends that too. One of those that
wait receives, for all: it hands out the answers of every receive, and when its own is among them it passes the post on.
So a single thread has no hop to another one on its way, and many of them cost the gateway no more than one connection
and few receives. Those whose answers came together wake one another, each when it leaves: woken all at once they would
only wait again, for the lock that Python threads share.

What to do when nothing comes, or when the connection breaks, the channel decides. `native` is the same compiled,
without that lock.
"""

from __future__ import annotations

import errno
import itertools
import socket
import threading
import time
from collections import deque
from contextlib import suppress
from struct import Struct
from typing import Protocol

from sheepdog.cluster.client.connection import Broken, receive, send
from sheepdog.cluster.core.messages import Buffer
from sheepdog.cluster.wire.header import HEADER_SIZE

RECEIVE_BYTES = 256 << 10  # one receive: the answers to a full queue of small reads
LARGE_BYTES = 64 << 10  # from here on one receive more, for the header alone, costs less than copying the data
UNASKED = "gave an answer that nobody asked for"

_ANSWER = Struct("<8xIII28x")  # id, data_length, result
_ID = Struct("<I")
_ID_OFFSET = 8


class Policy(Protocol):
    """What an exchange asks of its channel, in the thread that has come upon it."""

    def connection(self) -> socket.socket:
        """For requests that find none: a new one, or OSError. The caller holds `sending`."""

    def look_for_stalls(self) -> None:
        """`check_at` has come. OSError if the connection is no good. The caller holds the post."""

    def look_for_life(self) -> None:
        """Nothing has come for long. OSError if the connection is no good. The caller holds the post."""

    def broken(self, error: OSError) -> None:
        """The connection is no good. Afterwards there is another, or nothing in flight. The caller holds the post."""


class Waiter:
    """A request until its answer."""

    __slots__ = ("error", "gate", "header", "into", "length", "next", "over", "payload", "result", "since", "waits")

    def __init__(self, header: bytearray, payload: Buffer, into: memoryview | None) -> None:
        self.header = header
        self.payload = payload
        self.into = into
        self.length = 0
        self.result = 0
        self.error: OSError | None = None
        self.over = False
        self.next: Waiter | None = None  # whom it wakes when it leaves
        self.waits = False  # its thread: it sends nothing any more
        self.since = time.monotonic()
        self.gate = threading.Lock()  # opened to say: it is over, or the post is free
        self.gate.acquire()

    @property
    def is_large(self) -> bool:
        return self.into is not None and len(self.into) >= LARGE_BYTES

    def finish(self) -> None:
        self.over = True
        self.open()

    def open(self) -> None:
        with suppress(RuntimeError):  # open already
            self.gate.release()


class Exchange:
    """See the module. Any thread may ask."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._socket: socket.socket | None = None
        self._ids = itertools.count()
        self._flight: dict[int, Waiter] = {}  # in order of sending
        self._queue: deque[Waiter] = deque()  # not sent yet
        self.sending = threading.Lock()  # who gives it back calls `send_queued`
        self.receiving = threading.Lock()  # the post: whoever holds it receives for all
        self.answered = False  # by the present connection
        self.check_at = 0.0  # monotonic seconds: when the channel wants to look for stalls
        self._buffer = memoryview(bytearray(RECEIVE_BYTES))
        self._end = 0  # bytes of an incomplete header that begin the buffer

    def use(self, sock: socket.socket | None) -> None:
        """From now on by this connection; None: by none, until the channel gives one."""
        self._socket = sock
        self._end = 0
        self.answered = False

    def ask(self, header: bytearray, payload: Buffer = b"", into: memoryview | None = None) -> tuple[int, int]:
        """Sends a request and waits for its answer: (result, bytes of data, which are at the start of `into`)."""
        waiter = Waiter(header, payload, into)
        self._queue.append(waiter)
        self.send_queued()
        waiter.waits = True
        self._wait(waiter)
        if waiter.error is not None:
            raise waiter.error
        return waiter.result, waiter.length

    # -- for the channel

    def parts(self) -> list[Buffer]:
        """What is to be sent again of everything in flight."""
        return _parts(list(self._flight.values()))

    def oldest(self) -> float | None:
        """When the first request in flight was made (monotonic seconds)."""
        for waiter in list(self._flight.values()):
            return waiter.since
        return None

    def fail(self, error: OSError, made_before: float | None = None) -> None:
        """Ends what is in flight, or only what was made until then."""
        for number, waiter in list(self._flight.items()):
            if made_before is None or waiter.since <= made_before:
                del self._flight[number]
                _fail([waiter], error)

    def send_queued(self) -> None:
        """Unless somebody else is sending, who looks into the queue again afterwards."""
        queue, sending = self._queue, self.sending
        while queue and sending.acquire(False):
            try:
                self._send([queue.popleft() for _ in range(len(queue))])
            finally:
                sending.release()

    # -- waiting

    def _wait(self, waiter: Waiter) -> None:
        """Until its answer, or its failure, has come."""
        gate, post = waiter.gate, self.receiving
        try:
            while not waiter.over:
                if self._socket is not None and post.acquire(False):
                    try:
                        while not waiter.over:
                            self._receive(waiter)
                    finally:
                        post.release()
                else:
                    gate.acquire()
        finally:
            if waiter.next is not None:
                waiter.next.open()
            elif not post.locked():
                self._pass_on()

    def _pass_on(self) -> None:
        """The post is free: wakes one that waits for it. Those that send look for themselves."""
        while self._flight:
            try:
                waiter = next((waiter for waiter in self._flight.values() if waiter.waits), None)
            except RuntimeError:
                continue  # others change the table meanwhile
            if waiter is not None:
                waiter.open()
            return

    # -- sending

    def _send(self, waiters: list[Waiter]) -> None:
        """They are in flight afterwards, or over. The caller holds `sending`."""
        sock = self._socket
        alone = sock is None  # those who wait have left the post alone
        try:
            sock = sock or self._policy.connection()
        except OSError as error:
            _fail(waiters, error)
            return
        for waiter in waiters:
            number = next(self._ids) & 0xFFFFFFFF
            _ID.pack_into(waiter.header, _ID_OFFSET, number)
            self._flight[number] = waiter
        if alone:
            self._pass_on()
        try:
            send(sock, _parts(waiters))
        except OSError:
            shut(sock)  # whoever receives sees it, connects again and sends everything

    # -- receiving: the post's holder only

    def _receive(self, own: Waiter) -> None:
        """Once; `own` is the request of the thread that does it."""
        sock = self._socket
        try:
            if sock is None:
                raise Broken(errno.ECONNRESET, "Connection reset by peer")
            try:
                got = sock.recv_into(self._buffer[self._end : HEADER_SIZE if own.is_large else RECEIVE_BYTES])
            except BlockingIOError:
                self._policy.look_for_life()
                return
            if not got:
                raise Broken(errno.ECONNRESET, "Connection reset by peer")
            self._take(sock, self._end + got, own)
            if time.monotonic() >= self.check_at:
                self._policy.look_for_stalls()
        except OSError as error:
            self._policy.broken(error)

    def _take(self, sock: socket.socket, end: int, own: Waiter) -> None:
        """Hands out what is in the buffer."""
        buffer, flight = self._buffer, self._flight
        start = 0
        answered: list[Waiter] = []
        try:
            while end - start >= HEADER_SIZE:
                number, length, result = _ANSWER.unpack_from(buffer, start)
                waiter = flight.get(number)
                if waiter is None or length > (len(waiter.into) if waiter.into is not None else 0):
                    raise Broken(errno.EPROTO, UNASKED)
                start += HEADER_SIZE
                if length:
                    assert waiter.into is not None
                    have = min(end - start, length)
                    waiter.into[:have] = buffer[start : start + have]
                    start += have
                    if have < length:
                        _finish(answered, own)
                        answered = []
                        receive(sock, waiter.into[have:length])
                waiter.result, waiter.length = result, length
                del flight[number]
                self.answered = True
                answered.append(waiter)
        finally:
            _finish(answered, own)
        self._end = end - start
        if start and self._end:
            buffer[: self._end] = bytes(buffer[start:end])


def shut(sock: socket.socket) -> None:
    """Ends whatever waits in a call of the connection."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _parts(waiters: list[Waiter]) -> list[Buffer]:
    """What is to be sent of them."""
    parts: list[Buffer] = []
    for waiter in waiters:
        parts.append(waiter.header)
        if waiter.payload:
            parts.append(waiter.payload)
    return parts


def _fail(waiters: list[Waiter], error: OSError) -> None:
    for waiter in waiters:
        waiter.error = error
        waiter.finish()


def _finish(answered: list[Waiter], own: Waiter) -> None:
    """Each wakes the next one; `own` is awake and the first, unless it goes on receiving."""
    if own in answered:
        answered.remove(own)
        answered.insert(0, own)
    follower = None
    for waiter in reversed(answered):  # whoever sees that it is over has its follower, who is over too
        waiter.next = follower
        waiter.over = True
        follower = waiter
    if follower is not None and follower is not own:
        follower.open()

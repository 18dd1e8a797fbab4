"""One pipelined connection to a gateway for many threads, without an event loop.

A thread sends its request and waits; what others ask for meanwhile is queued, and it sends that too. One of those that
wait receives, for all: it hands out the answers of every receive, and when its own is among them it passes the post on.
So a single thread has no hop to another one on its way, and many of them cost the gateway no more than one connection
and few receives. Those whose answers came together wake one another, each when it leaves: woken all at once they would
only wait again, for the lock that Python threads share.

A broken connection is opened again and everything in flight is sent again with its old id: all operations of this
protocol may be repeated. After `patience_s` without a gateway what waits fails with EIO, and so does what follows,
but for one attempt a second. A gateway that holds the connection but leaves a request unanswered for `STALL_LIMIT_S` is
asked for a sign of life. Without one it is connected to anew, and everything in flight sent again. With one it is slow,
and requests sent again would only queue up behind themselves, on a busy host until none is answered in time: they are
after `SLOW_LIMIT_S`, once. A request unanswered for `ANSWER_LIMIT_S` fails with EIO.
"""

from __future__ import annotations

import errno
import itertools
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable
from contextlib import closing, suppress
from struct import Struct

from sheepdog.cluster.client import admin
from sheepdog.cluster.client.address import Address, describe
from sheepdog.cluster.client.connection import (
    ANSWER_LIMIT_S,
    PATIENCE_S,
    RETRY_FIRST_S,
    RETRY_LAST_S,
    SLOW_LIMIT_S,
    STALL_LIMIT_S,
    Broken,
    Connection,
    Dial,
    bound_waits,
    connect,
    receive,
    send,
)
from sheepdog.cluster.client.errors import SheepError, ShutOutError
from sheepdog.cluster.core.errors import PeerError
from sheepdog.cluster.core.messages import Buffer
from sheepdog.cluster.wire.header import HEADER_SIZE

RECEIVE_BYTES = 256 << 10  # one receive: the answers to a full queue of small reads
LARGE_BYTES = 64 << 10  # from here on one receive more, for the header alone, costs less than copying the data
ATTEMPT_EVERY_S = 1.0  # once patience has ended
STALL_CHECK_S = 2.0  # while other requests are answered; silence is noticed by the kernel
SIGN_LIMIT_S = 5.0  # for a sign of life, which takes a gateway no work: its own host may be busy

_ANSWER = Struct("<8xIII28x")  # id, data_length, result
_ID = Struct("<I")
_ID_OFFSET = 8


class _Waiter:
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
        self.next: _Waiter | None = None  # whom it wakes when it leaves
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


class Channel:
    """See the module. Any thread may call."""

    def __init__(self, address: Address, patience_s: float = PATIENCE_S, dial: Dial | None = None) -> None:
        """Connects; OSError if nobody listens."""
        self.address = address
        self._dial = dial or connect
        self._patience_s = patience_s
        self._ids = itertools.count()
        self._flight: dict[int, _Waiter] = {}  # in order of sending
        self._queue: deque[_Waiter] = deque()  # not sent yet
        self._sending = threading.Lock()  # who gives it back calls `_send_queued`
        self._receiving = threading.Lock()  # the post: whoever holds it receives for all
        self._buffer = memoryview(bytearray(RECEIVE_BYTES))
        self._end = 0  # bytes of an incomplete header that begin the buffer
        self._socket: socket.socket | None = self._connected()
        self._check_at = 0.0
        self._left_at = 0.0  # when an unanswered request was the reason to connect anew
        self._next_attempt = 0.0
        self._deadline: float | None = None  # set from a break to the next answer: several connections may break in it
        self._delay = RETRY_FIRST_S
        self._closed = False

    def ask(self, header: bytearray, payload: Buffer = b"", into: memoryview | None = None) -> tuple[int, int]:
        """Sends a request and waits for its answer: (result, bytes of data, which are at the start of `into`)."""
        waiter = _Waiter(header, payload, into)
        self._queue.append(waiter)
        self._send_queued()
        waiter.waits = True
        self._wait(waiter)
        if waiter.error is not None:
            raise waiter.error
        return waiter.result, waiter.length

    def _wait(self, waiter: _Waiter) -> None:
        """Until its answer, or its failure, has come."""
        gate, post = waiter.gate, self._receiving
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

    def close(self) -> None:
        """Ends the connection; what still waits fails."""
        with self._sending:
            self._closed = True
            if self._socket is not None:
                _shut(self._socket)
        with self._receiving, self._sending:
            self._give_up(OSError(errno.EIO, "the connection was closed"))
        self._send_queued()

    # -- sending

    def _send_queued(self) -> None:
        """Unless somebody else is sending, who looks into the queue again afterwards."""
        queue, sending = self._queue, self._sending
        while queue and sending.acquire(False):
            try:
                self._send([queue.popleft() for _ in range(len(queue))])
            finally:
                sending.release()

    def _send(self, waiters: list[_Waiter]) -> None:
        """They are in flight afterwards, or over. The caller holds `_sending`."""
        sock = self._socket if not self._closed else None
        alone = sock is None  # those who wait have left the post alone
        try:
            sock = sock or self._attempt()
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
            _shut(sock)  # whoever receives sees it, connects again and sends everything

    # -- receiving: the post's holder only

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

    def _receive(self, own: _Waiter) -> None:
        """Once; `own` is the request of the thread that does it."""
        sock = self._socket
        try:
            if sock is None:
                raise Broken(errno.ECONNRESET, "Connection reset by peer")
            try:
                got = sock.recv_into(self._buffer[self._end : HEADER_SIZE if own.is_large else RECEIVE_BYTES])
            except BlockingIOError:
                self._look_for_life()
                return
            if not got:
                raise Broken(errno.ECONNRESET, "Connection reset by peer")
            self._take(sock, self._end + got, own)
            self._look_for_stalls()
        except OSError as error:
            self._end = 0
            if isinstance(error, BlockingIOError):
                self._leave_unanswered()
            self._reconnect(error)

    def _look_for_stalls(self) -> None:
        """As after silence, if a request has waited for `STALL_LIMIT_S` while others were answered."""
        now = time.monotonic()
        if now < self._check_at:
            return
        self._check_at = now + STALL_CHECK_S
        oldest = next(iter(list(self._flight.values())), None)
        if oldest is not None and now >= max(oldest.since, self._left_at) + STALL_LIMIT_S:
            self._look_for_life()
            self._check_at = time.monotonic() + STALL_LIMIT_S

    def _look_for_life(self) -> None:
        """A request is not answered: BlockingIOError if everything is to be sent again, or has waited for too long."""
        now = time.monotonic()
        oldest = next(iter(list(self._flight.values())), None)
        if oldest is not None and (
            now >= max(oldest.since, self._left_at) + SLOW_LIMIT_S
            or now >= oldest.since + ANSWER_LIMIT_S
            or not self._is_alive()
        ):
            raise BlockingIOError(errno.EAGAIN, "a request is not answered")

    def _is_alive(self) -> bool:
        try:
            with closing(Connection(self.address, 0.0, answer_limit_s=SIGN_LIMIT_S)) as connection:
                admin.node_list(connection)
        except SheepError:
            return True  # it says no
        except (OSError, PeerError):
            return False
        return True

    def _leave_unanswered(self) -> None:
        """The gateway takes connections, so the wait for it is no matter of patience: each request has a limit."""
        self._left_at = now = time.monotonic()
        self._deadline = None
        for number, waiter in list(self._flight.items()):
            if now >= waiter.since + ANSWER_LIMIT_S:
                del self._flight[number]
                waiter.error = OSError(errno.EIO, f"no answer from {describe(self.address)}")
                waiter.finish()

    def _take(self, sock: socket.socket, end: int, own: _Waiter) -> None:
        """Hands out what is in the buffer."""
        buffer, flight = self._buffer, self._flight
        start = 0
        answered: list[_Waiter] = []
        try:
            while end - start >= HEADER_SIZE:
                number, length, result = _ANSWER.unpack_from(buffer, start)
                waiter = flight.get(number)
                if waiter is None or length > (len(waiter.into) if waiter.into is not None else 0):
                    raise Broken(errno.EPROTO, f"{describe(self.address)} gave an answer that nobody asked for")
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
                self._deadline = None
                answered.append(waiter)
        finally:
            _finish(answered, own)
        self._end = end - start
        if start and self._end:
            buffer[: self._end] = bytes(buffer[start:end])

    # -- the connection

    def _reconnect(self, failure: OSError) -> None:
        """Until everything in flight, and in the queue, has been sent to a gateway, or patience ends."""
        fruitless = self._deadline is not None  # a gateway that hangs up on clients is no better than none
        if self._deadline is None:
            self._deadline = time.monotonic() + self._patience_s
            self._delay = RETRY_FIRST_S
        if self._socket is not None:
            _shut(self._socket)  # ends a sending that waits for room
        with self._sending:
            self._connect_anew(failure, fruitless)
        self._send_queued()

    def _connect_anew(self, failure: OSError, fruitless: bool) -> None:
        assert self._deadline is not None
        while True:
            if self._socket is not None:
                self._socket.close()
                self._socket = None
            if self._closed:
                break
            if fruitless:
                if time.monotonic() + self._delay > self._deadline:
                    break
                time.sleep(self._delay)
                self._delay = min(2 * self._delay, RETRY_LAST_S)
            try:
                self._socket = self._connected()
                send(self._socket, _parts(self._flight.values()))
                return
            except ShutOutError as error:
                self._closed = True
                failure = error
                break
            except OSError as error:
                failure = error
            fruitless = True
        self._deadline = None
        self._next_attempt = time.monotonic() + ATTEMPT_EVERY_S
        if not isinstance(failure, ShutOutError):
            failure = OSError(errno.EIO, f"no gateway at {describe(self.address)}: {failure.strerror}")
        self._give_up(failure)

    def _give_up(self, error: OSError) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        waiters = list(self._flight.values())
        self._flight.clear()
        _fail(waiters, error)

    def _attempt(self) -> socket.socket:
        """A connection after patience had ended."""
        now = time.monotonic()
        if self._closed or now < self._next_attempt:
            raise OSError(errno.EIO, f"no gateway at {describe(self.address)}")
        try:
            self._socket = self._connected()
        finally:
            self._next_attempt = time.monotonic() + ATTEMPT_EVERY_S  # an attempt may take long: not one after another
        return self._socket

    def _connected(self) -> socket.socket:
        sock = self._dial(self.address)
        bound_waits(sock, STALL_LIMIT_S)
        return sock


def _parts(waiters: Iterable[_Waiter]) -> list[Buffer]:
    """What is to be sent of them."""
    parts: list[Buffer] = []
    for waiter in waiters:
        parts.append(waiter.header)
        if waiter.payload:
            parts.append(waiter.payload)
    return parts


def _fail(waiters: list[_Waiter], error: OSError) -> None:
    for waiter in waiters:
        waiter.error = error
        waiter.finish()


def _finish(answered: list[_Waiter], own: _Waiter) -> None:
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


def _shut(sock: socket.socket) -> None:
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)

"""One pipelined connection to a gateway for many threads, without an event loop.

How requests are sent and answers handed out is `exchange`'s matter, here it is what happens when that fails.

A broken connection is opened again and everything in flight is sent again with its old id: all operations of this
protocol may be repeated. After `patience_s` without a gateway what waits fails with EIO, and so does what follows,
but for one attempt a second. A gateway that holds the connection but leaves a request unanswered for `STALL_LIMIT_S` is
asked for a sign of life. Without one it is connected to anew, and everything in flight sent again. With one it is slow,
and requests sent again would only queue up behind themselves, on a busy host until none is answered in time: they are
after `SLOW_LIMIT_S`, once. A request unanswered for `ANSWER_LIMIT_S` fails with EIO.
"""

from __future__ import annotations

import errno
import os
import socket
import time
import weakref
from contextlib import closing
from importlib.machinery import EXTENSION_SUFFIXES

from sheepdog.cluster.client import admin
from sheepdog.cluster.client.address import Address, describe
from sheepdog.cluster.client.connection import (
    ANSWER_LIMIT_S,
    PATIENCE_S,
    RETRY_FIRST_S,
    RETRY_LAST_S,
    SLOW_LIMIT_S,
    STALL_LIMIT_S,
    Connection,
    Dial,
    bound_waits,
    connect,
    send,
)
from sheepdog.cluster.client.errors import SheepError, ShutOutError
from sheepdog.cluster.client.exchange import Exchange, shut
from sheepdog.cluster.core.errors import PeerError
from sheepdog.cluster.core.messages import Buffer

ATTEMPT_EVERY_S = 1.0  # once patience has ended
STALL_CHECK_S = 2.0  # while other requests are answered; silence is noticed by the kernel
SIGN_LIMIT_S = 5.0  # for a sign of life, which takes a gateway no work: its own host may be busy

_NATIVE = os.path.join(os.path.dirname(__file__), "native")
_SOURCES = (".py", ".pxd")

_exchange: type[Exchange] = Exchange


def native_is_current() -> bool:
    """`native` has been compiled for this Python, from its present sources."""
    try:
        made = os.stat(_NATIVE + EXTENSION_SUFFIXES[0]).st_mtime_ns
        return all(os.stat(_NATIVE + suffix).st_mtime_ns <= made for suffix in _SOURCES)
    except OSError:
        return False


def use_native() -> bool:
    """Channels made from here on use `native`; False (and nothing done) when it is not there or not wanted.

    For processes whose threads take no signals: nothing interrupts what waits in it.
    """
    global _exchange
    if os.environ.get("SHEEPDOG_COMPILED") == "0" or not native_is_current():
        return False
    from sheepdog.cluster.client import native

    _exchange = native.Exchange
    return True


class Channel:
    """See the module. Any thread may call."""

    def __init__(self, address: Address, patience_s: float = PATIENCE_S, dial: Dial | None = None) -> None:
        """Connects; OSError if nobody listens."""
        self.address = address
        self._dial = dial or connect
        self._patience_s = patience_s
        self._left_at = 0.0  # when an unanswered request was the reason to connect anew
        self._next_attempt = 0.0
        self._deadline: float | None = None  # set from a break to the next answer: several connections may break in it
        self._delay = RETRY_FIRST_S
        self._closed = False
        self._socket: socket.socket | None = self._connected()
        self._exchange = _exchange(weakref.proxy(self))  # no cycle: its buffer goes with the last use of the channel
        self._exchange.use(self._socket)

    def ask(self, header: bytearray, payload: Buffer = b"", into: memoryview | None = None) -> tuple[int, int]:
        """Sends a request and waits for its answer: (result, bytes of data, which are at the start of `into`)."""
        return self._exchange.ask(header, payload, into)

    def close(self) -> None:
        """Ends the connection; what still waits fails."""
        exchange = self._exchange
        with exchange.sending:
            self._closed = True
            if self._socket is not None:
                shut(self._socket)
        with exchange.receiving, exchange.sending:
            self._give_up(OSError(errno.EIO, "the connection was closed"))
        exchange.send_queued()

    # -- what the exchange asks (`exchange.Policy`)

    def connection(self) -> socket.socket:
        """After patience had ended, or when closed."""
        now = time.monotonic()
        if self._closed or now < self._next_attempt:
            raise OSError(errno.EIO, f"no gateway at {describe(self.address)}")
        try:
            sock = self._connected()
        finally:
            self._next_attempt = time.monotonic() + ATTEMPT_EVERY_S  # an attempt may take long: not one after another
        self._use(sock)
        return sock

    def look_for_stalls(self) -> None:
        """As after silence, if a request has waited for `STALL_LIMIT_S` while others were answered."""
        now = time.monotonic()
        self._exchange.check_at = now + STALL_CHECK_S
        oldest = self._exchange.oldest()
        if oldest is not None and now >= max(oldest, self._left_at) + STALL_LIMIT_S:
            self.look_for_life()
            self._exchange.check_at = time.monotonic() + STALL_LIMIT_S

    def look_for_life(self) -> None:
        """A request is not answered: BlockingIOError if everything is to be sent again, or has waited for too long."""
        now = time.monotonic()
        oldest = self._exchange.oldest()
        if oldest is not None and (
            now >= max(oldest, self._left_at) + SLOW_LIMIT_S or now >= oldest + ANSWER_LIMIT_S or not self._is_alive()
        ):
            raise BlockingIOError(errno.EAGAIN, "a request is not answered")

    def broken(self, error: OSError) -> None:
        """Connects anew and sends everything in flight, and what is queued, until patience ends."""
        if self._exchange.answered:
            self._deadline = None
        if isinstance(error, BlockingIOError):
            self._leave_unanswered()
        self._reconnect(error)

    # -- the connection

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
        self._exchange.fail(OSError(errno.EIO, f"no answer from {describe(self.address)}"), now - ANSWER_LIMIT_S)

    def _reconnect(self, failure: OSError) -> None:
        """Until everything in flight, and in the queue, has been sent to a gateway, or patience ends."""
        fruitless = self._deadline is not None  # a gateway that hangs up on clients is no better than none
        if self._deadline is None:
            self._deadline = time.monotonic() + self._patience_s
            self._delay = RETRY_FIRST_S
        if self._socket is not None:
            shut(self._socket)  # ends a sending that waits for room
        with self._exchange.sending:
            self._connect_anew(failure, fruitless)
        self._exchange.send_queued()

    def _connect_anew(self, failure: OSError, fruitless: bool) -> None:
        assert self._deadline is not None
        while True:
            if self._socket is not None:
                self._socket.close()
                self._use(None)
            if self._closed:
                break
            if fruitless:
                if time.monotonic() + self._delay > self._deadline:
                    break
                time.sleep(self._delay)
                self._delay = min(2 * self._delay, RETRY_LAST_S)
            try:
                sock = self._connected()
                self._use(sock)
                send(sock, self._exchange.parts())
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
            self._use(None)
        self._exchange.fail(error)

    def _use(self, sock: socket.socket | None) -> None:
        self._socket = sock
        self._exchange.use(sock)

    def _connected(self) -> socket.socket:
        sock = self._dial(self.address)
        bound_waits(sock, STALL_LIMIT_S)
        return sock

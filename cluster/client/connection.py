"""One connection to a gateway for one thread: a plain blocking socket, no event loop and no import of one.

`dog` uses it as it is; `blocking` puts volumes on top.
"""

from __future__ import annotations

import errno
import itertools
import select
import socket
import time
from collections.abc import Callable
from struct import Struct
from typing import Final, NamedTuple, TypeAlias, TypeVar

from sheepdog.cluster.client.address import Address, candidates, check, describe, prepare
from sheepdog.cluster.client.errors import SheepError, ShutOutError
from sheepdog.cluster.client.requests import Request
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.messages import Buffer
from sheepdog.cluster.wire.header import HEADER_SIZE

PATIENCE_S = 30.0  # as in session
CONNECT_LIMIT_S = 5.0
RETRY_FIRST_S = 0.05
RETRY_LAST_S = 1.0
STALL_LIMIT_S = 20.0  # a request unanswered for so long is sent anew: longer than expelling a hung node takes
ANSWER_LIMIT_S = 120.0  # and for so long: EIO. Disks of a living cluster may take a minute to flush
SLOW_LIMIT_S = 60.0  # by a gateway that lives: half of that, if it was lost there is as long for another try
SILENCE_S = 10.0  # nothing at all from a gateway: longer than any first answer takes
GATHER_LIMIT = 1024  # IOV_MAX of Linux

_ANSWER = Struct("<8xIII28x")  # id, data_length, result
_TIMEVAL = Struct("@ll")  # seconds, microseconds
_ID = Struct("<I")
_ID_OFFSET = 8

Outcome = TypeVar("Outcome")
Dial: TypeAlias = Callable[[Address], socket.socket]
"""Gives a connected blocking socket; OSError if there is no gateway, ShutOutError if there will be none."""
Answer: TypeAlias = Callable[[Request, int, Buffer, bytes], list[Request]]


class Reply(NamedTuple):
    """An answer of any result."""

    result: int
    header: bytes
    data: Buffer


_NO_ANSWER: Final = "an answer that nobody asked for; is that a sheep?"


class Broken(ConnectionError):
    """The stream ended or made no sense; requests without an answer may be sent again."""


class Connection:
    """One connection of one thread. A broken one is opened again within `patience_s`; 0 means never."""

    def __init__(
        self,
        address: Address,
        patience_s: float = PATIENCE_S,
        on_silence: Callable[[], None] | None = None,
        dial: Dial | None = None,
        answer_limit_s: float | None = None,
    ) -> None:
        """Connects; OSError if nobody listens. `on_silence` is told when the first answer does not come.

        A gateway that holds its connection and says nothing for `answer_limit_s` fails the request with EIO; without
        that an answer may take for ever, as orders to the whole cluster may.
        """
        self.address = address
        self._dial = dial or connect
        self._answer_limit_s = answer_limit_s
        self._patience_s = patience_s
        self._on_silence = on_silence
        self._ids = itertools.count()
        self._head = bytearray(HEADER_SIZE)
        self._socket: socket.socket | None = None
        self._open()

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def ask(self, header: bytearray, payload: Buffer = b"", limit: int = 0, into: memoryview | None = None) -> Reply:
        """One request and its answer, whatever its result; the data goes into the first bytes of `into` if given.

        OSError (EIO, or that of the connection when it has no patience) if there is no gateway.
        """
        if into is not None:
            limit = len(into)
        request = Request(header, payload, limit)
        return self._patiently(lambda: self._ask(request, into))

    def call(self, header: bytearray, payload: Buffer = b"", limit: int = 0, into: memoryview | None = None) -> Reply:
        """`ask`, with a SheepError for every result but SUCCESS."""
        reply = self.ask(header, payload, limit, into)
        if reply.result:
            raise SheepError(reply.result)
        return reply

    def exchange(self, requests: list[Request], answer: Answer) -> OSError | None:
        """Sends requests together, hands each answer to `answer` and goes on with the requests that it returns.

        Ends when nothing is outstanding. Without a gateway the rest is answered with EIO and an empty header; why there
        was none is returned.
        """
        nobody: OSError | None = None
        flight: dict[int, Request] = {}
        waiting = list(requests)

        def attempt() -> None:
            self._exchange(flight, waiting, answer)

        while waiting or flight:
            try:
                self._patiently(attempt)
            except OSError as error:
                nobody = error
                lost = [*flight.values(), *waiting]
                flight.clear()
                waiting.clear()
                for request in lost:
                    waiting += answer(request, Result.EIO, b"", b"")
        return nobody

    # -- one attempt

    def _ask(self, request: Request, into: memoryview | None) -> Reply:
        number = self._number(request)
        sock = self._send([request])
        space = into if into is not None else memoryview(bytearray(request.limit))
        head = self._head
        self._expect_life(sock)
        got = sock.recvmsg_into([head, space] if request.limit else [head])[0]
        if got < HEADER_SIZE:
            receive(sock, memoryview(head)[got:])
            got = HEADER_SIZE
        answered, length, result = _ANSWER.unpack_from(head)
        if answered != number or length > request.limit:
            raise Broken(errno.EPROTO, _NO_ANSWER)
        receive(sock, space[got - HEADER_SIZE : length])
        return Reply(result, bytes(head), space[:length])

    def _exchange(self, flight: dict[int, Request], requests: list[Request], answer: Answer) -> None:
        again = list(flight.values())
        if again:
            self._send(again)
        while requests or flight:
            if requests:
                # From here on they are in flight: a connection that breaks takes them into the next attempt.
                fresh = requests.copy()
                requests.clear()
                for request in fresh:
                    flight[self._number(request)] = request
                self._send(fresh)
            sock = self._open()
            head = self._head
            self._expect_life(sock)
            receive(sock, memoryview(head))
            number, length, result = _ANSWER.unpack_from(head)
            if number not in flight or length > flight[number].limit:
                raise Broken(errno.EPROTO, _NO_ANSWER)
            data = memoryview(bytearray(length))
            receive(sock, data)
            requests += answer(flight.pop(number), result, data, bytes(head))

    def _expect_life(self, sock: socket.socket) -> None:
        """Once: something else may listen there, or a stopped process."""
        tell, self._on_silence = self._on_silence, None
        if tell is None:
            return
        poll = select.poll()  # select(2) knows only the first 1,024 descriptors
        poll.register(sock, select.POLLIN)
        if not poll.poll(1000 * SILENCE_S):
            tell()

    def _number(self, request: Request) -> int:
        number = next(self._ids) & 0xFFFFFFFF
        _ID.pack_into(request.header, _ID_OFFSET, number)
        return number

    def _send(self, requests: list[Request]) -> socket.socket:
        sock = self._open()
        parts: list[Buffer] = []
        for request in requests:
            parts.append(request.header)
            if request.payload:
                parts.append(request.payload)
        send(sock, parts)
        return sock

    # -- patience

    def _open(self) -> socket.socket:
        if self._socket is None:
            sock = self._dial(self.address)
            if self._answer_limit_s is not None:
                bound_waits(sock, self._answer_limit_s)
            self._socket = sock
        return self._socket

    def _patiently(self, attempt: Callable[[], Outcome]) -> Outcome:
        """Makes attempts until one ends without a broken connection or patience does."""
        deadline = 0.0
        delay = RETRY_FIRST_S
        while True:
            try:
                return attempt()
            except ShutOutError:
                self.close()
                raise
            except BlockingIOError as error:  # `bound_waits`: the gateway is there, so patience is not what it takes
                self.close()
                raise OSError(errno.EIO, f"no answer from {describe(self.address)}") from error
            except OSError as error:
                self.close()
                now = time.monotonic()
                deadline = deadline or now + self._patience_s
                if now + delay > deadline:
                    if self._patience_s:
                        raise OSError(errno.EIO, f"no gateway at {describe(self.address)}: {error.strerror}") from error
                    raise Broken(error.errno, f"{describe(self.address)}: {error.strerror}") from error
                time.sleep(delay)
                delay = min(2 * delay, RETRY_LAST_S)


def connect(address: Address, without_tcp: bool = False) -> socket.socket:
    """A connected blocking socket; OSError with the system's words if nobody listens.

    By TCP also on one host, unless told.
    """
    failure = OSError(errno.EIO, f"{describe(address)} has no address")
    for family, target in candidates(address, without_tcp):
        sock = prepare(family)
        sock.settimeout(CONNECT_LIMIT_S)
        try:
            sock.connect(target)
            check(sock, target)
        except (TimeoutError, BlockingIOError):  # the latter: a unix socket where too many wait to be let in
            failure = OSError(errno.ETIMEDOUT, "Connection timed out")
        except OSError as error:
            failure = error
        else:
            sock.settimeout(None)
            return sock
        sock.close()
    raise failure


def connect_near(address: Address) -> socket.socket:
    """`connect`, but without TCP to a sheep of the same user on this host: for what moves many bytes."""
    return connect(address, without_tcp=True)


def bound_waits(sock: socket.socket, seconds: float) -> None:
    """From now on a blocking receive or send that gets nowhere for so long ends with BlockingIOError.

    By the kernel's clock: `settimeout` would cost a system call more for each receive.
    """
    limit = _TIMEVAL.pack(int(seconds), int(seconds % 1 * 1e6))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        sock.setsockopt(socket.SOL_SOCKET, option, limit)


def send(sock: socket.socket, parts: list[Buffer]) -> None:
    """All of it, with as few calls as can be; `parts` is empty afterwards."""
    while parts:
        sent = sock.sendmsg(parts[:GATHER_LIMIT])
        done = 0
        while done < len(parts) and sent >= len(parts[done]):
            sent -= len(parts[done])
            done += 1
        del parts[:done]
        if sent:
            parts[0] = memoryview(parts[0])[sent:]


def receive(sock: socket.socket, space: memoryview) -> None:
    """Fills `space`; Broken if the stream ends before."""
    while space:
        got = sock.recv_into(space, 0, socket.MSG_WAITALL)
        if not got:
            raise Broken(errno.ECONNRESET, "Connection reset by peer")
        space = space[got:]

"""One pipelined connection to a gateway, for asyncio.

Answers are matched by id and may come in any order; the requests of one turn of the loop leave in one
`sendmsg`. There is no coroutine, task or future per request in `submit`: the caller's callback is run
from the socket's reader. Payloads are views of the buffers they were received into (wire.streams).

A broken connection is opened again and every request in flight is sent again with its old id: all
operations of this protocol may be repeated. After `PATIENCE_S` without a gateway the requests fail with EIO, and
those that follow fail at once, but for one attempt a second. A session that may `roam` goes to other gateways of
the cluster too, and also waits for a cluster that is starting.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import socket
from collections.abc import Awaitable, Callable, Sequence
from struct import Struct
from typing import NamedTuple, Self, TypeAlias

from sheepdog.cluster.client.address import Address, candidates, check, describe, prepare
from sheepdog.cluster.client.connection import ANSWER_LIMIT_S, SLOW_LIMIT_S, STALL_LIMIT_S
from sheepdog.cluster.client.errors import SheepError, ShutOutError
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.messages import Buffer
from sheepdog.cluster.wire.header import HEADER_SIZE
from sheepdog.cluster.wire.streams import Arena, BufferPool, Intake, Outbox

PATIENCE_S = 30.0  # longer than a node's expulsion and a daemon's restart; shorter than a person's patience
CONNECT_LIMIT_S = 5.0  # one attempt
RETRY_FIRST_S = 0.05
RETRY_LAST_S = 1.0
STALL_CHECK_S = 2.0
RECEIVES_PER_TURN = 16  # then other sockets of the loop get their turn

_NOT_NOW = frozenset({Result.STARTUP, Result.SHUTDOWN, Result.WAIT_FOR_JOIN, Result.KILLED})  # of the cluster

_ANSWER = Struct("<8xI4xI28x")  # id, result
_LENGTH = Struct("<12xI32x")
_ID = Struct("<I")
_ID_OFFSET = 8
_EMPTY = b""

Done: TypeAlias = Callable[[int, Buffer, bytes], None]
"""done(result code, payload, answer header); the header is empty when no gateway could be reached (code EIO)."""


Admission: TypeAlias = Callable[[Address], Awaitable[None]]


class Reply(NamedTuple):
    """A successful answer."""

    header: bytes
    data: Buffer


class _Request:
    """A request from `submit` until its answer."""

    __slots__ = ("done", "header", "limit", "payload", "since")

    def __init__(self, header: bytearray, payload: Buffer, done: Done, limit: int, since: float) -> None:
        self.header = header
        self.payload = payload
        self.done = done
        self.limit = limit
        self.since = since


def _answer_length(header: bytes) -> int:
    return int(_LENGTH.unpack(header)[0])


class Session:
    """One connection. All methods belong to the loop's thread."""

    def __init__(self, address: Address, patience_s: float = PATIENCE_S, lasting: bool = True) -> None:
        """`lasting`: a broken connection is opened again. Otherwise the session ends with it."""
        self.address = address
        self.admission: Admission | None = None
        """What must succeed at a gateway before requests go there again; an OSError keeps them for the next one, and a
        ShutOutError ends the session."""
        self._lasting = lasting
        self._patience_s = patience_s
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = None
        self.gateway: Address | None = None
        """The one that is connected just now."""
        self._flight: dict[int, _Request] = {}  # in order of submission
        self._ids = itertools.count()
        self._queue: list[Buffer] = []  # submitted in this turn of the loop
        self._flushing = False
        self._writing = False  # the writer is registered: the kernel's buffer is full
        self._arena = Arena(BufferPool())
        self._intake = Intake(self._arena, HEADER_SIZE, _answer_length)
        self._outbox = Outbox()
        self._connecting: asyncio.Task[None] | None = None
        self._closed = False
        self._others: Sequence[Address] | None = None
        self._turn = 0  # where among the gateways the next round of attempts starts
        self._lost_at: float | None = None  # since when requests wait without an answer
        self._tried_at = 0.0  # end of the last round in which no gateway was found
        self._delay = 0.0  # before the next round
        self._left_at = 0.0  # when a gateway that hangs was left last
        self._heard_at = 0.0  # when one has answered last
        self._watching: asyncio.TimerHandle | None = None

    @classmethod
    async def open(cls, address: Address, patience_s: float = PATIENCE_S, lasting: bool = True) -> Self:
        """Connects once; OSError if nobody listens there."""
        session = cls(address, patience_s, lasting)
        session._attach(await dial(session._loop, address), address)
        return session

    @property
    def is_over(self) -> bool:
        """Every request fails from now on."""
        return self._closed

    # -- requests

    def submit(self, header: bytearray, payload: Buffer, done: Done, limit: int = 0) -> None:
        """Sends a request; `done` comes exactly once, and never before this returns.

        The id in `header` is filled in here. `payload` is borrowed and must not change until `done`. An answer of
        more than `limit` bytes breaks the protocol. The answer's data is a view that its receiver may keep.
        """
        if self._closed:
            self._loop.call_soon(done, Result.EIO, _EMPTY, _EMPTY)
            return
        flight = self._flight
        number = next(self._ids) & 0xFFFFFFFF
        while number in flight:
            number = next(self._ids) & 0xFFFFFFFF
        _ID.pack_into(header, _ID_OFFSET, number)
        flight[number] = _Request(header, payload, done, limit, self._loop.time())
        if self._socket is None:
            if self._hopeless():
                self._loop.call_soon(self._fail, number)
            else:
                self._reconnect()  # sends everything in flight when it succeeds
            return
        self._queue.append(header)
        if payload:
            self._queue.append(payload)
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    async def call(self, header: bytearray, payload: Buffer = _EMPTY, limit: int = 0) -> Reply:
        """One request and its answer; SheepError for a result other than SUCCESS."""
        future: asyncio.Future[Reply] = self._loop.create_future()

        def done(result: int, data: Buffer, answer: bytes) -> None:
            if future.done():
                return  # the caller was cancelled
            if result:
                future.set_exception(SheepError(result))
            else:
                future.set_result(Reply(answer, data))

        self.submit(header, payload, done, limit)
        return await future

    def move(self, address: Address) -> None:
        """Goes on with another gateway of the cluster; requests in flight are sent again there."""
        self.address = address
        self._turn = 0
        self._detach()
        self._go_on()

    def roam(self, others: Sequence[Address]) -> None:
        """From now on these gateways of the same cluster will do as well when the first is away or hangs.

        Answers that say that the cluster is starting or stopping no longer reach the callers: the request waits.
        """
        self._others = [other for other in others if other != self.address]
        if self._watching is None:
            self._watching = self._loop.call_later(STALL_CHECK_S, self._watch)

    async def close(self) -> None:
        """Ends the connection; what is still in flight fails with EIO."""
        self._closed = True
        if self._watching is not None:
            self._watching.cancel()
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.gather(self._connecting, return_exceptions=True)
        self._detach()
        self._fail_all()

    # -- sending

    def _flush(self) -> None:
        self._flushing = False
        sock = self._socket
        if sock is None:
            return
        if self._queue:
            self._outbox.add(self._queue)
            self._queue.clear()
        if self._writing:
            return
        try:
            if self._outbox.send(sock.sendmsg):
                return
        except OSError:
            self._broken()
            return
        self._writing = True
        self._loop.add_writer(sock.fileno(), self._writable)

    def _writable(self) -> None:
        if self._socket is not None:
            self._loop.remove_writer(self._socket.fileno())
        self._writing = False
        self._flush()

    # -- receiving

    def _readable(self) -> None:
        sock = self._socket
        intake, flight = self._intake, self._flight
        for _ in range(RECEIVES_PER_TURN):
            if sock is None:
                return
            space = intake.space()
            try:
                got = sock.recv_into(space)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                got = 0
            if not got:
                self._broken()
                return
            self._heard_at = self._loop.time()
            intake.fill(got)
            while frame := intake.next():
                header, data = frame
                number, result = _ANSWER.unpack(header)
                request = flight.get(number)
                if request is None or len(data) > request.limit:
                    self._broken()  # not what we asked for: the stream cannot be trusted any more
                    return
                if result and result in _NOT_NOW and self._others is not None:
                    self._refused()
                    return
                self._lost_at = None
                self._delay = 0.0
                self._finish(number, result, data, header)
                if self._socket is not sock:
                    return  # the callback closed the session
            if got < len(space):
                return  # a short receive emptied the socket

    def _finish(self, number: int, result: int, data: Buffer, answer: bytes) -> None:
        request = self._flight.pop(number)
        try:
            request.done(result, data, answer)
        except Exception as error:  # a bug in the caller must not desynchronise everybody else's answers
            self._loop.call_exception_handler({"message": "callback of a request failed", "exception": error})

    # -- connection

    async def _enter(self, address: Address) -> socket.socket:
        """`dial`, with the admission passed."""
        sock = await dial(self._loop, address)
        try:
            if self.admission is not None:
                await self.admission(address)
        except BaseException:
            sock.close()
            raise
        return sock

    def _attach(self, sock: socket.socket, address: Address) -> None:
        self._socket = sock
        self.gateway = address
        self._intake = Intake(self._arena, HEADER_SIZE, _answer_length)
        self._outbox = Outbox()
        self._loop.add_reader(sock.fileno(), self._readable)
        for request in self._flight.values():
            self._queue.append(request.header)
            if request.payload:
                self._queue.append(request.payload)
        self._flush()

    def _detach(self) -> None:
        sock, self._socket = self._socket, None
        self.gateway = None
        self._queue.clear()
        if sock is not None:
            self._loop.remove_reader(sock.fileno())
            if self._writing:
                self._loop.remove_writer(sock.fileno())
            sock.close()
        self._writing = False

    def _broken(self) -> None:
        if self._lost_at is not None:  # this connection has brought no answer either
            self._refused()
            return
        self._detach()
        self._go_on()

    def _go_on(self) -> None:
        if not self._lasting:
            self._closed = True
            self._fail_all()
        elif (self._flight or self.admission) and not self._closed:
            self._reconnect()  # an idle session waits for its next request, unless it has something to lose

    def _refused(self) -> None:
        """The gateway is up, its cluster is not, or hangs up on clients: ask again later, and another one first."""
        self._detach()
        self._turn += 1
        self._delay = min(max(2 * self._delay, RETRY_FIRST_S), RETRY_LAST_S)
        if self._impatient():
            self._tried_at = self._loop.time()
            self._fail_all()
        else:
            self._go_on()

    def _watch(self) -> None:
        """Leaves a gateway that holds its connection but does not answer: a stopped process, a hung disk.

        One that answers others is slow: what is sent again, through whichever node, makes the cluster slower.
        """
        now = self._loop.time()
        oldest = next(iter(self._flight.values()), None)
        since = max(oldest.since, self._left_at) if oldest else now
        if oldest and self._socket and now >= min(max(since, self._heard_at) + STALL_LIMIT_S, since + SLOW_LIMIT_S):
            self._left_at = now
            self._turn += 1
            self._detach()  # also frees the payloads of those that fail now
            for number, request in list(self._flight.items()):
                if now < request.since + ANSWER_LIMIT_S:
                    break
                self._fail(number)
            if self._flight:
                self._reconnect()
        self._watching = self._loop.call_later(STALL_CHECK_S, self._watch)

    def _impatient(self) -> bool:
        """Requests have waited as long as they may."""
        return self._lost_at is not None and self._loop.time() >= self._lost_at + self._patience_s

    def _hopeless(self) -> bool:
        """Moreover the last attempt was only just now: a stream of requests fails as one."""
        return self._connecting is None and self._impatient() and self._loop.time() < self._tried_at + RETRY_LAST_S

    def _reconnect(self) -> None:
        if self._connecting is None and not self._closed:
            if self._lost_at is None:
                self._lost_at = self._loop.time()
            self._connecting = self._loop.create_task(self._keep_dialling(self._lost_at + self._patience_s))

    async def _keep_dialling(self, deadline: float) -> None:
        """Rounds over the gateways until one takes the connection; requests submitted meanwhile share the deadline."""
        try:
            while True:
                if self._delay:
                    await asyncio.sleep(min(self._delay, deadline - self._loop.time()))
                gateways = [self.address, *(self._others or ())]
                first = self._turn % len(gateways)
                for address in gateways[first:] + gateways[:first]:
                    try:
                        sock = await self._enter(address)
                    except ShutOutError:
                        self._closed = True
                        self._fail_all()
                        return
                    except OSError:
                        if self._loop.time() >= deadline:
                            break
                        continue
                    self._connecting = None  # before attaching: the new socket may break at once
                    self._attach(sock, address)
                    return
                self._tried_at = self._loop.time()
                if self._tried_at >= deadline:
                    self._fail_all()
                    return
                self._delay = min(max(2 * self._delay, RETRY_FIRST_S), RETRY_LAST_S)
        finally:
            if self._connecting is asyncio.current_task():
                self._connecting = None

    def _fail_all(self) -> None:
        for number in list(self._flight):
            self._fail(number)

    def _fail(self, number: int) -> None:
        if number in self._flight:
            self._finish(number, Result.EIO, _EMPTY, _EMPTY)


async def dial(loop: asyncio.AbstractEventLoop, address: Address) -> socket.socket:
    """A connected, non-blocking socket; OSError."""
    if isinstance(address, str):
        found = candidates(address)
    else:
        found = await loop.run_in_executor(None, candidates, address, True)
    failure: OSError = OSError(errno.EIO, f"{describe(address)} has no address")
    for family, target in found:
        sock = prepare(family)
        sock.setblocking(False)
        try:
            await asyncio.wait_for(loop.sock_connect(sock, target), CONNECT_LIMIT_S)
            check(sock, target)
        except (OSError, TimeoutError) as error:
            text = error.strerror or "no answer"
            failure = OSError(error.errno or errno.ETIMEDOUT, f"{describe(address)}: {text}")
            sock.close()
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise failure

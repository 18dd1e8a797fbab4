"""Sessions and volumes for threads: plain blocking sockets, no event loop and no import of one.

`Connection` belongs to one thread. `BlockingVolume` may be used by many: each thread gets a connection of
its own, all share the volume's map. What a request means is decided by the same machine as in `volume`.
"""

from __future__ import annotations

import errno
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from struct import Struct
from typing import NamedTuple, TypeAlias, TypeVar

from sheepdog.cluster.client.address import Address, candidates, describe, prepare
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.client.machine import Extent, VolumeMachine
from sheepdog.cluster.client.operations import ZERO_CHUNK_BYTES, Discard, Flush, Open, Operation, Read, Resize, Write
from sheepdog.cluster.client.requests import Request, read_header
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import Vid, data_oid
from sheepdog.cluster.core.inode import InodeHeader
from sheepdog.cluster.core.messages import Buffer
from sheepdog.cluster.wire.header import HEADER_SIZE

PATIENCE_S = 30.0  # as in session
CONNECT_LIMIT_S = 5.0
RETRY_FIRST_S = 0.05
RETRY_LAST_S = 1.0
GATHER_LIMIT = 1024  # IOV_MAX of Linux

_ANSWER = Struct("<8xIII28x")  # id, data_length, result
_ID = Struct("<I")
_ID_OFFSET = 8

Outcome = TypeVar("Outcome")
Answer: TypeAlias = Callable[[Request, int, Buffer, bytes], list[Request]]


class Reply(NamedTuple):
    """An answer of any result."""

    result: int
    header: bytes
    data: Buffer


class Broken(ConnectionError):
    """The stream ended or made no sense; requests without an answer may be sent again."""


class Connection:
    """One connection of one thread. A broken one is opened again within `patience_s`; 0 means never."""

    def __init__(self, address: Address, patience_s: float = PATIENCE_S) -> None:
        """Connects; OSError if nobody listens."""
        self.address = address
        self._patience_s = patience_s
        self._ids = itertools.count()
        self._head = bytearray(HEADER_SIZE)
        self._socket: socket.socket | None = connect(address)

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

    def exchange(self, requests: list[Request], answer: Answer) -> None:
        """Sends requests together, hands each answer to `answer` and goes on with the requests that it returns.

        Ends when nothing is outstanding. Without a gateway the rest is answered with EIO and an empty header.
        """
        flight: dict[int, Request] = {}
        waiting = list(requests)

        def attempt() -> None:
            self._exchange(flight, waiting, answer)

        while waiting or flight:
            try:
                self._patiently(attempt)
            except OSError:
                lost = [*flight.values(), *waiting]
                flight.clear()
                waiting.clear()
                for request in lost:
                    waiting += answer(request, Result.EIO, b"", b"")

    # -- one attempt

    def _ask(self, request: Request, into: memoryview | None) -> Reply:
        number = self._number(request)
        sock = self._send([request])
        space = into if into is not None else memoryview(bytearray(request.limit))
        head = self._head
        got = sock.recvmsg_into([head, space] if request.limit else [head])[0]
        if got < HEADER_SIZE:
            receive(sock, memoryview(head)[got:])
            got = HEADER_SIZE
        answered, length, result = _ANSWER.unpack_from(head)
        if answered != number or length > request.limit:
            raise Broken(errno.EPROTO, f"{describe(self.address)} gave an answer that nobody asked for")
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
            receive(sock, memoryview(head))
            number, length, result = _ANSWER.unpack_from(head)
            if number not in flight or length > flight[number].limit:
                raise Broken(errno.EPROTO, f"{describe(self.address)} gave an answer that nobody asked for")
            data = memoryview(bytearray(length))
            receive(sock, data)
            requests += answer(flight.pop(number), result, data, bytes(head))

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
        while parts:
            sent = sock.sendmsg(parts[:GATHER_LIMIT])
            done = 0
            while done < len(parts) and sent >= len(parts[done]):
                sent -= len(parts[done])
                done += 1
            del parts[:done]
            if sent:
                parts[0] = memoryview(parts[0])[sent:]
        return sock

    # -- patience

    def _open(self) -> socket.socket:
        if self._socket is None:
            self._socket = connect(self.address)
        return self._socket

    def _patiently(self, attempt: Callable[[], Outcome]) -> Outcome:
        """Makes attempts until one ends without a broken connection or patience does."""
        deadline = 0.0
        delay = RETRY_FIRST_S
        while True:
            try:
                return attempt()
            except OSError as error:
                self.close()
                now = time.monotonic()
                deadline = deadline or now + self._patience_s
                if now + delay > deadline:
                    if self._patience_s:
                        raise OSError(errno.EIO, f"no gateway at {describe(self.address)}: {error.strerror}") from error
                    raise
                time.sleep(delay)
                delay = min(2 * delay, RETRY_LAST_S)


class BlockingVolume:
    """An open volume for any number of threads; made by `open`. Semantics as `volume.Volume`."""

    def __init__(self, address: Address, machine: VolumeMachine, connection: Connection, patience_s: float) -> None:
        self._address = address
        self._machine = machine
        self._patience_s = patience_s
        self._lock = threading.Lock()  # around every call into the machine; never held during I/O
        self._local = threading.local()
        self._connections = [connection]
        self._local.connection = connection

    @classmethod
    def open(
        cls,
        address: Address,
        name: str | bytes,
        tag: bytes = b"",
        snap_id: int = 0,
        read_only: bool = False,
        patience_s: float = PATIENCE_S,
    ) -> BlockingVolume:
        """Opens the working volume `name`, or the snapshot with this tag or id (read-only).

        SheepError with NO_VDI or NO_TAG (errno ENOENT) if there is none.
        """
        connection = Connection(address, patience_s)
        opening = Open(name.encode() if isinstance(name, str) else name, tag, snap_id, read_only)
        try:
            connection.exchange(opening.resume(), opening.answer)
            if opening.error:
                raise opening.error
        except BaseException:
            connection.close()
            raise
        assert opening.machine is not None
        return cls(address, opening.machine, connection, patience_s)

    @property
    def size(self) -> int:
        """Bytes."""
        return self._machine.size

    @property
    def object_size(self) -> int:
        """Bytes of one object: the unit of allocation and of discard."""
        return self._machine.object_size

    @property
    def read_only(self) -> bool:
        return self._machine.read_only

    @property
    def inode(self) -> InodeHeader:
        """As it was when the volume was opened or last followed a snapshot."""
        return self._machine.header

    def read(self, offset: int, length: int) -> Buffer:
        """The bytes of a range, clipped to the volume's end."""
        data = bytearray(max(0, min(length, self._machine.size - offset)))
        self.read_into(offset, memoryview(data))
        return data

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fills `buffer` from `offset` on; returns how many bytes there were before the volume's end."""
        machine = self._machine
        length = max(0, min(len(buffer), machine.size - offset))
        number, start = divmod(offset, machine.object_size)
        if 0 < length <= machine.object_size - start:
            with self._lock:
                owner = machine.entries[number]
            if not owner:
                buffer[:length] = bytes(length)
                return length
            header = read_header(data_oid(Vid(owner), number), start, length)
            reply = self._connection().ask(header, b"", 0, buffer[:length])
            if reply.result == Result.SUCCESS and len(reply.data) == length:
                return length
            if reply.result != Result.NO_OBJ:
                raise SheepError(reply.result or Result.EIO)
        operation = Read(machine, offset, length)
        self._drive(operation)
        buffer[:length] = operation.data
        return length

    def write(self, offset: int, data: Buffer, durable: bool = False) -> None:
        """Writes a range; ENOSPC (and nothing written) if it ends beyond the volume, EROFS if that is read-only.

        With `durable` it survives the loss of power once this returns, otherwise once a later `flush` has returned.
        """
        self._drive(Write(self._machine, offset, data, durable))

    def flush(self) -> None:
        """Everything written and returned before, by any thread, is durable when this returns."""
        self._drive(Flush(self._machine))

    def discard(self, offset: int, length: int) -> None:
        """Gives back the objects that lie wholly in the range; they read as zeros. The rest of the range is kept."""
        self._drive(Discard(self._machine, offset, length))

    def zero(self, offset: int, length: int, durable: bool = False) -> None:
        """The range reads as zeros afterwards: whole objects are given back, allocated parts of others overwritten."""
        self.discard(offset, length)
        with self._lock:
            chunks = list(self._machine.allocated_chunks(offset, length, ZERO_CHUNK_BYTES))
        for start, size in chunks:
            self.write(start, bytes(size))
        if durable:
            self.flush()

    def resize(self, size: int) -> None:
        """Grows the volume; EINVAL for less than its size, EFBIG for more than its map can hold."""
        self._drive(Resize(self._machine, size))

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """What is allocated in a range, by whole objects."""
        with self._lock:
            return iter(list(self._machine.extents(offset, length)))

    def close(self) -> None:
        """Flushes and closes the connections of all threads; none of them may use the volume any more."""
        try:
            self.flush()
        finally:
            with self._lock:
                connections, self._connections = self._connections, []
            for connection in connections:
                with suppress(OSError):
                    connection.close()

    def _connection(self) -> Connection:
        connection: Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = Connection(self._address, self._patience_s)
            with self._lock:
                self._connections.append(connection)
            self._local.connection = connection
        return connection

    def _drive(self, operation: Operation) -> None:
        """Carries an operation to its end on this thread's connection; raises its error."""
        event = threading.Event()
        operation.wake = event.set

        def answer(request: Request, result: int, data: Buffer, header: bytes) -> list[Request]:
            with self._lock:
                return operation.answer(request, result, data, header)

        while not operation.finished:
            event.clear()
            with self._lock:
                requests = operation.resume()
            if requests:
                self._connection().exchange(requests, answer)
            elif not operation.finished:
                event.wait()
        if operation.error:
            raise operation.error


def connect(address: Address) -> socket.socket:
    """A connected blocking socket; OSError with the system's words if nobody listens."""
    failure = OSError(errno.EIO, f"{describe(address)} has no address")
    for family, target in candidates(address):
        sock = prepare(family)
        sock.settimeout(CONNECT_LIMIT_S)
        try:
            sock.connect(target)
        except TimeoutError:
            failure = OSError(errno.ETIMEDOUT, "Connection timed out")
        except OSError as error:
            failure = error
        else:
            sock.settimeout(None)
            return sock
        sock.close()
    raise failure


def receive(sock: socket.socket, space: memoryview) -> None:
    """Fills `space`; Broken if the stream ends before."""
    while space:
        got = sock.recv_into(space)
        if not got:
            raise Broken(errno.ECONNRESET, "Connection reset by peer")
        space = space[got:]

"""Measured load on a cluster: pipelined object I/O from prepared bytes, the time of every answer.

The generator does as little as it can per request, so that what it measures are the servers. A *cell* is one kind of
load; `Workload` owns a volume of whole objects and the connections, `run` drives one cell for a while.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import selectors
import socket
import time
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from struct import Struct
from typing import Final

from sheepdog.cluster.client import admin
from sheepdog.cluster.client.address import Address
from sheepdog.cluster.client.connection import Connection, connect
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.core.errors import UsageError
from sheepdog.cluster.core.ids import data_oid, inode_oid
from sheepdog.cluster.wire.header import HEADER_SIZE
from sheepdog.cluster.wire.opcodes import Flags, Opcode

OBJECT_BYTES: Final = 4 << 20
PREPARED: Final = 4096  # different requests made before the clock runs, of all clients together
PREPARED_BYTES: Final = 64 << 20  # ... which hold so much data at most
ANSWER_TIMEOUT_S: Final = 30.0
OPERATIONS: Final = ("read", "write", "first", "mixed")
READ_SHARE: Final = 0.7  # of a mixed load: what database benchmarks assume
VOLATILE, DURABLE = 0, 1  # values of `Cell.flush_every`; larger ones: a flush after so many writes
_FLUSH_ID: Final = 0xFFFFFFFF
_RECEIVE_BYTES: Final = 1 << 20
FRESH_OBJECTS: Final = 1 << 16  # a "first" cell of a volume ends after so many objects
_ANSWER: Final = Struct("<8xIII28x")  # id, length of the data, result
_ID: Final = Struct("<I")
_ID_OFFSET: Final = 8


@dataclass(frozen=True, slots=True)
class Cell:
    """One kind of load: each of `clients` keeps `depth` requests of `size` bytes under way."""

    operation: str  # of OPERATIONS; first: the first write of an object
    size: int
    depth: int
    flush_every: int = DURABLE  # of writes: VOLATILE, DURABLE (each when it is answered), or a flush after so many
    sequential: bool = False
    clients: int = 1

    @property
    def writes(self) -> bool:
        return self.operation != "read"

    def __str__(self) -> str:
        size = f"{self.size >> 20}M" if self.size >= 1 << 20 else f"{self.size >> 10}k"
        words = [f"{size} {self.operation}", f"depth {self.depth}"]
        if self.writes:
            names = {VOLATILE: "volatile", DURABLE: "durable"}
            words.append(names.get(self.flush_every, f"flush every {self.flush_every}"))
        if self.sequential:
            words.append("sequential")
        if self.clients > 1:
            words.append(f"{self.clients} clients")
        return ", ".join(words)


def parse_cell(word: str) -> Cell:
    """OPERATION:SIZE:DEPTH[:volatile|durable|flushN][:seq][:xCLIENTS], SIZE as 4k or 1M; UsageError."""
    operation, *rest = word.split(":")
    try:
        size, depth, *options = rest
        number = int(size[:-1]) << {"k": 10, "M": 20}[size[-1]]
        flush_every, sequential, clients = DURABLE, False, 1
        for option in options:
            if option in ("volatile", "durable"):
                flush_every = DURABLE if option == "durable" else VOLATILE
            elif option == "seq":
                sequential = True
            elif option.startswith("flush"):
                flush_every = int(option.removeprefix("flush"))
            elif option.startswith("x"):
                clients = int(option[1:])
            else:
                raise ValueError(option)
        cell = Cell(operation, number, int(depth), flush_every, sequential, clients)
    except (ValueError, KeyError, IndexError):
        raise UsageError(f"not a load: {word} (an example: write:4k:16:durable)") from None
    if operation not in OPERATIONS or not 512 <= cell.size <= OBJECT_BYTES or OBJECT_BYTES % cell.size:
        raise UsageError(f"not a load: {word} (an example: write:4k:16:durable)")
    if not (0 < cell.depth <= 1024 and 0 < cell.clients <= 1024 and cell.flush_every >= 0):
        raise UsageError(f"not a load: {word}: a depth and clients of 1 to 1024")
    return cell


@dataclass(frozen=True, slots=True)
class Measured:
    """What one run of a cell gave. Latencies in seconds, ascending."""

    operations: int
    seconds: float
    latencies: array[float]

    @property
    def rate(self) -> float:
        """Operations per second."""
        return self.operations / self.seconds

    def percentile(self, part: float) -> float:
        """Seconds in which this part (0 to 1) of the requests was answered."""
        return self.latencies[min(int(part * len(self.latencies)), len(self.latencies) - 1)]


class _Client:
    """One connection and what it has under way."""

    def __init__(self, sock: socket.socket, cell: Cell, source: Iterator[bytes], flush: bytes) -> None:
        self.sock = sock
        self.done = 0
        self.under_way = 0
        self.latencies = array("d")
        self._cell = cell
        self._source = source  # requests; ends when there are no more
        self._flush = flush
        self._buffer = bytearray(max(_RECEIVE_BYTES, 2 * (cell.size + HEADER_SIZE)))
        self._have = 0
        self._begun: dict[int, float] = {}  # by id
        self._unflushed = 0  # writes since the last flush

    def fill(self, count: int) -> None:
        """Sends so many requests more, and the flushes that belong among them."""
        parts: list[bytes] = []
        now = time.perf_counter()
        for request in itertools.islice(self._source, count):
            parts.append(request)
            self._begun[_ID.unpack_from(request, _ID_OFFSET)[0]] = now
            self.under_way += 1
            if self._cell.flush_every > DURABLE and request[1] != Opcode.READ_OBJ:
                self._unflushed += 1
                if self._unflushed == self._cell.flush_every:
                    self._unflushed = 0
                    parts.append(self._flush)
                    self.under_way += 1
        if parts:
            self.sock.sendall(b"".join(parts))

    def receive(self) -> int:
        """Takes the answers that have come; how many were of requests, not of flushes. SheepError, ConnectionError."""
        buffer = self._buffer
        count = self.sock.recv_into(memoryview(buffer)[self._have :])
        if not count:
            raise ConnectionError("the sheep closed the connection")
        end = self._have + count
        now, start, answered = time.perf_counter(), 0, 0
        while end - start >= HEADER_SIZE:
            number, length, result = _ANSWER.unpack_from(buffer, start)
            if result:
                raise SheepError(result)
            if end - start < HEADER_SIZE + length:
                break
            start += HEADER_SIZE + length
            self.under_way -= 1
            if number != _FLUSH_ID:
                self.latencies.append(now - self._begun.pop(number))
                answered += 1
        buffer[: end - start] = buffer[start:end]
        self._have = end - start
        self.done += answered
        return answered


class Workload:
    """A volume of `objects` whole objects, made for the cells to run on, at one sheep."""

    def __init__(self, address: Address, objects: int, copies: int = 0, policy: int = 0) -> None:
        """Makes and fills the volume; copies 0: as the cluster's default. SheepError, OSError.

        Nothing is left of it if that fails, or is interrupted.
        """
        self.address = address
        self.objects = objects
        self.name = f"benchmark-{os.getpid()}-{time.monotonic_ns()}".encode()
        self._first = 0  # index of the next object that does not exist
        self._connection = Connection(address)
        size = (objects + FRESH_OBJECTS) * OBJECT_BYTES
        try:
            self.vid = admin.new_volume(self._connection, self.name, size, copies=copies, policy=policy).vid
            self._fill()
        except BaseException:
            self._connection.close()  # an answer may be under way there
            with contextlib.suppress(SheepError, OSError):
                self._connection = Connection(address)
                self.close()
            raise

    def _fill(self) -> None:
        while self._first < self.objects:
            data, oid = random.Random(self._first).randbytes(OBJECT_BYTES), data_oid(self.vid, self._first)
            self._first += 1
            admin.create_object(self._connection, oid, 0, data, flags=Flags.CACHE)
        self._connection.call(admin.object_request(Opcode.FLUSH_VDI, inode_oid(self.vid)))

    def close(self) -> None:
        """Removes the volume and everything that the cells wrote: its map names none of it."""
        try:
            for index in range(self._first):
                self._connection.call(admin.object_request(Opcode.DISCARD_OBJ, data_oid(self.vid, index)))
            admin.delete_volume(self._connection, self.name)
        finally:
            self._connection.close()

    def run(self, cell: Cell, seconds: float) -> Measured:
        """Drives the cell; SheepError for the first request that fails, OSError."""
        with ExitStack() as stack:
            clients = []
            selector = stack.enter_context(selectors.DefaultSelector())
            for number in range(cell.clients):
                sock = stack.enter_context(connect(self.address))
                sock.settimeout(ANSWER_TIMEOUT_S)
                client = _Client(sock, cell, self._requests(cell, number), self._request(Opcode.FLUSH_VDI, 0, 0, 0))
                clients.append(client)
                selector.register(sock, selectors.EVENT_READ, client)
            begin = time.perf_counter()
            for client in clients:
                client.fill(cell.depth)
            while any(client.under_way for client in clients):
                events = selector.select(ANSWER_TIMEOUT_S)
                if not events:
                    raise TimeoutError(f"no answer within {ANSWER_TIMEOUT_S:.0f} s")
                more = time.perf_counter() - begin < seconds
                for key, _ in events:
                    answered = key.data.receive()
                    if more:
                        key.data.fill(answered)
            elapsed = time.perf_counter() - begin
        latencies = array("d", sorted(itertools.chain.from_iterable(client.latencies for client in clients)))
        return Measured(len(latencies), elapsed, latencies)

    def _requests(self, cell: Cell, client: int) -> Iterator[bytes]:
        """An endless stream of different requests (of a "first" cell: until there is no object left)."""
        numbers = random.Random(cell.size + client)
        payload = numbers.randbytes(cell.size)
        if cell.operation == "first":
            return self._first_writes(cell, payload)
        held = cell.size if cell.writes else HEADER_SIZE
        count = max(min(PREPARED, PREPARED_BYTES // held) // cell.clients, 2 * cell.depth)
        slots = OBJECT_BYTES // cell.size
        prepared = []
        for number in range(count):
            place = client * count + number if cell.sequential else numbers.randrange(self.objects * slots)
            index, slot = divmod(place % (self.objects * slots), slots)
            reads = cell.operation == "read" or (cell.operation == "mixed" and numbers.random() < READ_SHARE)
            opcode = Opcode.READ_OBJ if reads else Opcode.WRITE_OBJ
            request = self._request(opcode, index, slot * cell.size, cell.size, number, cell.flush_every)
            prepared.append(request if reads else request + payload)
        return itertools.cycle(prepared)

    def _first_writes(self, cell: Cell, payload: bytes) -> Iterator[bytes]:
        for number in itertools.count():
            if self._first == self.objects + FRESH_OBJECTS:
                return
            index = self._first
            self._first += 1
            opcode = Opcode.CREATE_AND_WRITE_OBJ
            yield self._request(opcode, index, 0, cell.size, number % PREPARED, cell.flush_every) + payload

    def _request(
        self, opcode: Opcode, index: int, offset: int, length: int, number: int = _FLUSH_ID, flush_every: int = DURABLE
    ) -> bytes:
        flags = 0
        if opcode in (Opcode.WRITE_OBJ, Opcode.CREATE_AND_WRITE_OBJ):
            flags = Flags.WRITE | (Flags.DIRECT if flush_every == DURABLE else Flags.CACHE)
        oid = inode_oid(self.vid) if opcode == Opcode.FLUSH_VDI else data_oid(self.vid, index)
        header = admin.object_request(opcode, oid, offset, length, flags)
        _ID.pack_into(header, _ID_OFFSET, number)
        return bytes(header)

"""Client connections of the native protocol: bytes in, calls out, answers back.

A connection is read as long as what it has under way is bounded; then it waits until answers have left. Requests are
handled in the order of their arrival and answered in the order of their completion. The answers of a turn of the loop
leave in one sendmsg, large ones at once. A connection may be silent for ever, also in the middle of a frame.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Final, Protocol, TypeAlias

from sheepdog.cluster.core.errors import PeerError, Result, UsageError
from sheepdog.cluster.core.messages import Buffer, Kind
from sheepdog.cluster.core.ports import Log
from sheepdog.cluster.core.words import read_u32
from sheepdog.cluster.wire.frames import RequestParser
from sheepdog.cluster.wire.opcodes import ADMINISTRATION, GATEWAY_VERSION, Opcode
from sheepdog.cluster.wire.response import response
from sheepdog.cluster.wire.results import FIRST_INTERNAL
from sheepdog.cluster.wire.streams import Arena, Outbox
from sheepdog.cluster.wire.structures import Statistics

CONNECTION_REQUESTS: Final = 4096  # under way on one connection; guests queue some hundreds, QEMU itself knows no limit
CONNECTION_BYTES: Final = 64 << 20  # under way on one connection: 16 whole objects, more than a disk keeps busy
TOTAL_BYTES: Final = 512 << 20  # under way on all connections together: what a node can spend beside its page cache
CALL_BYTES: Final = 512  # what a call costs beside its data
SEND_AT_ONCE_BYTES: Final = 256 << 10  # answers that wait: more is still in the processor's cache, and no call is saved
CALLS_PER_TURN: Final = 256  # of one connection, 2-5 ms of work; then others get their turn
_WARNING: Final = 4


class AtEnd(Protocol):
    """The end of the loop's turn (cluster.host.loop.Turn)."""

    def at_end(self, call: Callable[[], None]) -> None: ...


class Call:
    """One request and the duty to answer it exactly once, by `done`, `fail` or `reply`."""

    __slots__ = ("_connection", "cost", "flags", "header", "id", "length", "opcode", "payload", "version")

    def __init__(self, connection: Connection, header: bytes, payload: Buffer) -> None:
        self.header = header
        self.payload = payload
        self.version = header[0]  # as wire.header.Request, which `struct` would take ten times as long for
        self.opcode = header[1]
        self.flags = header[2] | header[3] << 8
        self.id = read_u32(header, 8)
        self.length = read_u32(header, 12)
        self._connection: Connection | None = connection
        self.cost = self.length + CALL_BYTES  # what it may keep busy: its payload, or the room for its answer

    def done(self, result: int, data: Buffer = b"") -> None:
        """The answer to object I/O, and every error: no fields of its own, no data but on success."""
        if result:
            self.fail(result)
        else:
            connection = self._taken()
            header = response(self.opcode, self.id, connection.epoch(), 0, len(data))
            connection.answer(header, data, self.cost)

    def read(self, result: int, data: Buffer) -> None:
        """As `done`, for reads: clients do not fill up a shorter answer, so it is none."""
        self.done(result or (Result.EIO if len(data) != self.length else 0), data)

    def written(self, result: int, _: Buffer = b"") -> None:
        """As `done`, for calls whose answers never carry data."""
        self.done(result)

    def fail(self, result: int) -> None:
        """An error. Codes that QEMU and tgt do not know become EIO for them; dog (version 2) knows all."""
        if result >= FIRST_INTERNAL and self.opcode < ADMINISTRATION and self.version < GATEWAY_VERSION:
            result = Result.EIO
        connection = self._taken()
        connection.answer(response(self.opcode, self.id, connection.epoch(), result), b"", self.cost)

    def reply(self, header: bytes, data: Buffer = b"") -> None:
        """An answer with a header of its own, whose data_length must be that of `data`."""
        self._taken().answer(header, data, self.cost)

    def statistics(self) -> Statistics:
        """What this sheep has done for its clients and peers."""
        return self._connection.statistics() if self._connection is not None else Statistics(*[0] * 15)

    @property
    def clients(self) -> int:
        """Connections that this sheep has now, this one among them."""
        return self._connection.clients() if self._connection is not None else 0

    @property
    def pending(self) -> bool:
        """Not answered yet."""
        return self._connection is not None

    @property
    def epoch(self) -> int:
        """The epoch that an answer given now must carry."""
        return self._connection.epoch() if self._connection is not None else 0

    def _taken(self) -> Connection:
        connection = self._connection
        if connection is None:
            raise UsageError(f"call {self.opcode:#04x} is answered twice")
        self._connection = None
        return connection


class PeerTraffic(Protocol):
    """What has been received from and sent to other nodes; messages counted by kind."""

    received: list[int]
    rx_bytes: int
    tx_bytes: int


Dispatch: TypeAlias = Callable[[Call], None]


class Clients:
    """All client connections of a sheep. `adopt` takes an accepted, non-blocking socket."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        turn: AtEnd,
        arena: Arena,
        dispatch: Dispatch,
        epoch: Callable[[], int],
        log: Log,
    ) -> None:
        self.loop = loop
        self.turn = turn
        self.arena = arena
        self.dispatch = dispatch
        self.epoch = epoch
        self.log = log
        self.peers: PeerTraffic | None = None
        self.requests = [0] * 256  # received, by opcode
        self.rx_bytes = 0
        self.tx_bytes = 0
        self.busy_calls = 0  # under way on all connections
        self.busy_bytes = 0  # ... and what they cost
        self.waiting: dict[Connection, None] = {}  # paused because all together have too much under way
        self.connections: dict[Connection, None] = {}

    def adopt(self, sock: socket.socket) -> None:
        connection = Connection(self, sock)
        self.connections[connection] = None
        connection.start()

    def relieve(self) -> None:
        """Reads those again that waited for the others."""
        waiting, self.waiting = self.waiting, {}
        for connection in waiting:
            connection.resume()

    def close(self) -> None:
        """Closes all connections; of the answers, those leave that their sockets take at once."""
        for connection in list(self.connections):
            connection.close_politely()

    def hang_up(self) -> None:
        """Closes all connections without the answers that wait: nobody knows whether they are still true."""
        for connection in list(self.connections):
            connection.close()

    def statistics(self) -> Statistics:
        """STAT (protocol.md 14.6)."""
        requests = self.requests
        reads = requests[Opcode.READ_OBJ]
        writes = requests[Opcode.WRITE_OBJ] + requests[Opcode.CREATE_AND_WRITE_OBJ]
        removes = requests[Opcode.DISCARD_OBJ]
        flushes = requests[Opcode.FLUSH_VDI]
        received = self.peers.received if self.peers is not None else [0] * 256
        peer_reads = received[Kind.READ] + received[Kind.FETCH] + received[Kind.TABLE]
        peer_writes = received[Kind.SUBMIT] + received[Kind.APPLY]
        return Statistics(
            gateway_active=self.busy_calls - 1,  # without the request for these numbers
            peer_active=0,  # a peer's request is counted when it has been handled
            gateway_total=reads + writes + removes + flushes,
            peer_total=peer_reads + peer_writes + received[Kind.DROP] + received[Kind.FLUSH],
            gateway_rx_bytes=self.rx_bytes,
            gateway_tx_bytes=self.tx_bytes,
            peer_rx_bytes=self.peers.rx_bytes if self.peers is not None else 0,
            peer_tx_bytes=self.peers.tx_bytes if self.peers is not None else 0,
            gateway_remove=removes,
            gateway_read=reads,
            gateway_write=writes,
            gateway_flush=flushes,
            peer_remove=received[Kind.DROP],
            peer_read=peer_reads,
            peer_write=peer_writes,
        )


class Connection:
    """One client."""

    __slots__ = (
        "_busy_bytes",
        "_busy_calls",
        "_clients",
        "_closed",
        "_flush_asked",
        "_intake",
        "_more",
        "_outbox",
        "_reading",
        "_socket",
        "_stopped",
        "_writing",
        "epoch",
    )

    def __init__(self, clients: Clients, sock: socket.socket) -> None:
        self._clients = clients
        self._socket = sock
        self._intake = RequestParser(clients.arena)
        self._outbox = Outbox()
        self._busy_calls = 0  # not answered yet
        self._busy_bytes = 0  # ... and what they cost
        self._reading = False  # the loop tells when something arrives
        self._writing = False  # the socket is full, the loop tells when it is not
        self._flush_asked = False
        self._more = False  # frames were left for the next turn
        self._stopped = False  # the client sends no more; it may still read
        self._closed = False
        self.epoch = clients.epoch

    def start(self) -> None:
        """Begins to read; most clients have sent something already."""
        self._reading = True
        self._clients.loop.add_reader(self._socket, self._readable)
        self._readable()

    def answer(self, header: bytes, data: Buffer, cost: int) -> None:
        """A call's answer, to be sent at the end of the turn or before; dropped when the client is gone."""
        clients = self._clients
        self._busy_calls -= 1
        self._busy_bytes -= cost
        clients.busy_calls -= 1
        clients.busy_bytes -= cost
        if self._closed:
            self._relieve_others()
            return
        outbox = self._outbox
        outbox.put(header)
        if data:
            outbox.put(data)
        clients.busy_bytes += len(header) + len(data)
        if not self._flush_asked:
            self._flush_asked = True
            clients.turn.at_end(self._flush)
        if outbox.size >= SEND_AT_ONCE_BYTES and not self._writing:
            self._push()

    def resume(self) -> None:
        """Goes on reading if it was paused and need not be any more."""
        if not (self._reading or self._more or self._stopped or self._closed or self._overloaded()):
            self._take_calls()

    def statistics(self) -> Statistics:
        return self._clients.statistics()

    def clients(self) -> int:
        return len(self._clients.connections)

    def close_politely(self) -> None:
        """At the end of the daemon: the answers that wait leave first, as far as the socket takes them."""
        self._flush()
        self.close()

    def close(self) -> None:
        """Closes the socket. Calls under way run to their end, their answers are dropped."""
        if self._closed:
            return
        self._closed = True
        clients = self._clients
        clients.loop.remove_reader(self._socket)
        clients.loop.remove_writer(self._socket)
        self._socket.close()
        clients.busy_bytes -= self._outbox.size
        self._outbox = Outbox()
        clients.connections.pop(self, None)
        clients.waiting.pop(self, None)
        self._relieve_others()

    # Reading

    def _readable(self) -> None:
        if self._more:
            return  # first what came before
        intake = self._intake
        try:
            count = self._socket.recv_into(intake.space())
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close()
            return
        if not count:
            self._end_of_requests()
            return
        self._clients.rx_bytes += count
        intake.fill(count)
        self._take_calls()

    def _take_calls(self) -> None:
        """Handles the complete frames that were received, as many as may be under way and fit into a turn."""
        clients = self._clients
        dispatch, requests = clients.dispatch, clients.requests
        intake = self._intake
        self._more = False
        try:
            for _ in range(CALLS_PER_TURN):
                frame = intake.next()
                if frame is None:
                    self._read(True)
                    return
                call = Call(self, frame[0], frame[1])
                cost = call.cost
                self._busy_calls += 1
                self._busy_bytes += cost
                clients.busy_calls += 1
                clients.busy_bytes += cost
                requests[call.opcode] = requests[call.opcode] + 1  # as `+=`, which is a call here
                try:
                    dispatch(call)
                except Exception as error:
                    self._report(call, error)
                if self._closed:
                    return
                if self._overloaded():
                    self._read(False)
                    return
        except PeerError as error:
            clients.log(_WARNING, f"client {self}: {error}: connection closed")
            self.close()
            return
        self._more = True
        clients.loop.call_soon(self._next_calls)

    def _next_calls(self) -> None:
        if not self._closed:
            self._take_calls()

    def _overloaded(self) -> bool:
        """True when no more may be under way. One call always may, whatever its size."""
        if not self._busy_calls and not self._outbox.size:
            return False
        if self._busy_calls >= CONNECTION_REQUESTS:
            return True
        mine = self._busy_bytes + self._outbox.size
        if mine >= CONNECTION_BYTES:
            return True
        if self._clients.busy_bytes >= TOTAL_BYTES:
            self._clients.waiting[self] = None
            return True
        return False

    def _read(self, wanted: bool) -> None:
        if self._reading != wanted and not self._closed:
            self._reading = wanted
            if wanted:
                self._clients.loop.add_reader(self._socket, self._readable)
            else:
                self._clients.loop.remove_reader(self._socket)

    def _end_of_requests(self) -> None:
        """The client has closed its side: what it asked for before is still answered."""
        self._stopped = True
        self._read(False)
        self._close_when_answered()

    def _close_when_answered(self) -> None:
        if self._stopped and not self._busy_calls and not self._outbox.size:
            self.close()

    def _report(self, call: Call, error: Exception) -> None:
        """A bug of ours: this request fails, the connection and the daemon go on."""
        self._clients.loop.call_exception_handler({"message": f"request {call.opcode:#04x}", "exception": error})
        if call.pending:
            call.fail(Result.SYSTEM_ERROR)

    # Writing

    def _flush(self) -> None:
        self._flush_asked = False
        if not self._writing and not self._closed:
            self._send()

    def _send(self) -> None:
        """Sends; then reads on what had to wait for that."""
        self._push()
        if self._closed:
            return
        if not self._reading:
            if self._stopped:
                self._close_when_answered()
            else:
                self.resume()
        self._relieve_others()

    def _push(self) -> None:
        """Sends what the socket takes, and no more: a call that is being handled may have asked for it."""
        before = self._outbox.size
        try:
            empty = self._outbox.send(self._socket.sendmsg)
        except OSError:
            self.close()
            return
        clients = self._clients
        sent = before - self._outbox.size
        clients.busy_bytes -= sent
        clients.tx_bytes += sent
        if empty == self._writing:
            self._writing = not empty
            if empty:
                clients.loop.remove_writer(self._socket)
            else:
                clients.loop.add_writer(self._socket, self._send)

    def _relieve_others(self) -> None:
        clients = self._clients
        if clients.waiting and clients.busy_bytes < TOTAL_BYTES:
            clients.turn.at_end(clients.relieve)

    def __str__(self) -> str:
        try:
            name = self._socket.getpeername()
        except OSError:
            return "(gone)"
        return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else "on the UNIX socket"

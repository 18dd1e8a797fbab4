"""An open volume for threads: blocking calls, no event loop and no import of one.

A `BlockingVolume` may be used by many threads. They share the volume's map, and one pipelined connection for reads and
writes inside one object; any other operation has a connection from a pool. What a request means is decided by the
same machine as in `volume`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress

from sheepdog.cluster.client.address import Address
from sheepdog.cluster.client.channel import Channel
from sheepdog.cluster.client.connection import ANSWER_LIMIT_S, PATIENCE_S, Answer, Connection, Dial
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.client.follow import Operation
from sheepdog.cluster.client.lifecycle import Open, Refresh, Resize, Settle
from sheepdog.cluster.client.machine import Extent, Piece, VolumeMachine
from sheepdog.cluster.client.operations import ZERO_CHUNK_BYTES, Discard, Flush, Read, Write, Zero
from sheepdog.cluster.client.requests import Request, map_header, read_header, write_header
from sheepdog.cluster.core.blocks import map_size, runs
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import Vid, data_oid
from sheepdog.cluster.core.inode import InodeHeader
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.messages import Buffer
from sheepdog.cluster.wire.opcodes import Flags

EXTENT_OBJECTS = 64  # whose blocks are looked at in one call: some milliseconds of the gateway's time


class BlockingVolume:
    """An open volume for any number of threads; made by `open`. Semantics as `volume.Volume`."""

    def __init__(
        self,
        address: Address,
        machine: VolumeMachine,
        connection: Connection,
        patience_s: float,
        dial: Dial | None = None,
    ) -> None:
        self._address = address
        self._machine = machine
        self._patience_s = patience_s
        self._dial = dial
        self._lock = threading.Lock()  # around every call into the machine; never held during I/O
        self._channel = Channel(address, patience_s, dial)  # for reads and writes inside one object
        # For everything else; the last used on top. Not one per thread: threads that Python has not made lose what is
        # theirs with every call.
        self._idle = [connection]

    @classmethod
    def open(
        cls,
        address: Address,
        name: str | bytes,
        tag: bytes = b"",
        snap_id: int = 0,
        read_only: bool = False,
        patience_s: float = PATIENCE_S,
        object_cache: bool = False,
        dial: Dial | None = None,
    ) -> BlockingVolume:
        """As `volume.Volume.open`: the working volume `name`, or the snapshot with this tag or id (read-only).

        SheepError with NO_VDI or NO_TAG (errno ENOENT) if there is none.
        """
        connection = Connection(address, patience_s, dial=dial, answer_limit_s=ANSWER_LIMIT_S)
        opening = Open(name.encode() if isinstance(name, str) else name, tag, snap_id, read_only)
        try:
            nobody = connection.exchange(opening.resume(), opening.answer)
            if opening.error:
                raise _cause(opening.error, nobody)
        except BaseException:
            connection.close()
            raise
        assert opening.machine is not None
        opening.machine.read_flags = Flags.CACHE if object_cache else 0
        return cls(address, opening.machine, connection, patience_s, dial)

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
            header = read_header(data_oid(Vid(owner), number), start, length, machine.read_flags)
            result, got = self._channel.ask(header, b"", buffer[:length])
            if result == Result.SUCCESS and got == length:
                return length
            if result != Result.NO_OBJ:
                raise SheepError(result or Result.EIO)
        operation = Read(machine, offset, length)
        self._drive(operation)
        buffer[:length] = operation.data
        return length

    def write(self, offset: int, data: Buffer, durable: bool = False) -> None:
        """Writes a range; ENOSPC (and nothing written) if it ends beyond the volume, EROFS if that is read-only.

        With `durable` it survives the loss of power once this returns, otherwise once a later `flush` has returned.
        """
        machine = self._machine
        number, start = divmod(offset, machine.object_size)
        length = data.nbytes if isinstance(data, memoryview) else len(data)
        if (
            0 < length <= machine.object_size - start
            and 0 <= offset <= machine.size - length
            and not machine.read_only
            and not (durable and machine.map_unflushed)
            and self._write_in_place(number, start, data, length, durable)
        ):
            return
        self._drive(Write(machine, offset, data, durable))

    def _write_in_place(self, number: int, start: int, data: Buffer, length: int, durable: bool) -> bool:
        """The short way of `Write` into one object of our own; False if it must go the long way."""
        machine = self._machine
        with self._lock:
            if not machine.hold_in_place(number):
                return False
            header = write_header(data_oid(machine.vid, number), start, length, durable or not machine.caching)
        try:
            result, _ = self._channel.ask(header, data)
        finally:
            with self._lock:
                machine.drop_in_place(number)
        if result not in (Result.SUCCESS, Result.READONLY):
            raise SheepError(result)
        return result == Result.SUCCESS

    def flush(self) -> None:
        """Everything written and returned before, by any thread, is durable when this returns."""
        self._drive(Flush(self._machine))

    def discard(self, offset: int, length: int) -> None:
        """Gives back the objects that lie wholly in the range; they read as zeros. The rest of the range is kept."""
        self._drive(Discard(self._machine, offset, length))

    def zero(self, offset: int, length: int, durable: bool = False) -> None:
        """The range reads as zeros afterwards: whole objects are given back, parts of others become holes."""
        machine = self._machine
        self.discard(offset, length)
        with self._lock:
            chunks = list(machine.allocated_chunks(offset, length, ZERO_CHUNK_BYTES))
        for start, size in chunks:
            self._drive(Zero(machine, start, size, False))
        if durable:
            self.flush()

    def zero_is_fast(self, offset: int, length: int) -> bool:
        """`zero` of the range would neither send nor copy data."""
        machine = self._machine
        with self._lock:
            return all(
                machine.is_ours_to_punch(edge.number) or not machine.entries[edge.number]
                for edge in machine.edges(offset, length)
            )

    def trim(self, offset: int, length: int) -> None:
        """`discard`, and what is only part of an object becomes a hole in it where that is cheap."""
        machine = self._machine
        self.discard(offset, length)
        with self._lock:
            edges = [edge for edge in machine.edges(offset, length) if machine.is_ours_to_punch(edge.number)]
        for edge in edges:
            begin = -(-edge.offset // BLOCK_SIZE) * BLOCK_SIZE
            end = (edge.offset + edge.length) // BLOCK_SIZE * BLOCK_SIZE
            if begin < end:
                self._drive(Zero(machine, edge.number * machine.object_size + begin, end - begin, False))

    def resize(self, size: int) -> None:
        """Grows the volume; EINVAL for less than its size, EFBIG for more than its map can hold."""
        self._drive(Resize(self._machine, size))

    def refresh(self) -> None:
        """Learns what others have done since the volume was opened: its size, and if it is read-only all of its map."""
        self._drive(Refresh(self._machine))

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """What is allocated in a range, by whole objects."""
        with self._lock:
            return iter(list(self._machine.extents(offset, length)))

    def block_extents(self, offset: int, length: int, objects: int = EXTENT_OBJECTS) -> list[Extent]:
        """What holds data in a range, by blocks; only the range's beginning, if more than `objects` exist in it."""
        machine = self._machine
        with self._lock:
            pieces = machine.pieces(offset, max(0, min(length, machine.size - offset)))
            owners = [machine.entries[piece.number] for piece in pieces]
        size = map_size(machine.object_size)
        maps: dict[int, Buffer] = {}
        requests: list[Request] = []
        for place, (piece, owner) in enumerate(zip(pieces, owners, strict=True)):
            if owner and len(requests) == objects:
                del pieces[place:]
                break
            if owner:
                requests.append(Request(map_header(data_oid(Vid(owner), piece.number), size), b"", size, piece.number))

        def answer(request: Request, result: int, data: Buffer, header: bytes) -> list[Request]:
            if not result and len(data) == size:
                maps[request.step] = data
            return []  # otherwise all of the object counts as data, as that of an erasure-coded volume does

        if requests:
            self._exchange(requests, answer)
        return _merged(offset, pieces, owners, maps)

    def close(self) -> None:
        """As `Volume.close`; no thread may use the volume any more."""
        try:
            self._drive(Settle(self._machine))
            self.flush()
        finally:
            self._channel.close()
            idle, self._idle = self._idle, []
            for connection in idle:
                with suppress(OSError):
                    connection.close()

    def _borrow(self) -> Connection:
        try:
            return self._idle.pop()
        except IndexError:
            return Connection(self._address, self._patience_s, dial=self._dial, answer_limit_s=ANSWER_LIMIT_S)

    def _exchange(self, requests: list[Request], answer: Answer) -> OSError | None:
        connection = self._borrow()
        try:
            return connection.exchange(requests, answer)
        finally:
            self._idle.append(connection)

    def _drive(self, operation: Operation) -> None:
        """Carries an operation to its end; raises its error."""
        event = threading.Event()
        operation.wake = event.set
        nobody: OSError | None = None

        def answer(request: Request, result: int, data: Buffer, header: bytes) -> list[Request]:
            with self._lock:
                return operation.answer(request, result, data, header)

        while not operation.finished:
            event.clear()
            with self._lock:
                requests = operation.resume()
            if requests:
                nobody = self._exchange(requests, answer) or nobody
            elif not operation.finished:
                event.wait()
        if operation.error:
            raise _cause(operation.error, nobody)


def _cause(error: OSError, nobody: OSError | None) -> OSError:
    """Of an operation's end: that there was no gateway says more than the answer that stands for none."""
    return nobody if nobody is not None and nobody.errno == error.errno else error


def _merged(offset: int, pieces: list[Piece], owners: list[int], maps: dict[int, Buffer]) -> list[Extent]:
    """Extents of consecutive pieces that begin at `offset`; an object without a map is all data."""
    found: list[Extent] = []

    def add(start: int, length: int, data: bool) -> None:
        if found and found[-1].allocated == data:
            found[-1] = found[-1]._replace(length=found[-1].length + length)
        else:
            found.append(Extent(start, length, data))

    for piece, owner in zip(pieces, owners, strict=False):
        start, end = piece.offset, piece.offset + piece.length
        base = offset + piece.position - start
        blocks = maps.get(piece.number)
        if not owner or blocks is None:
            add(base + start, piece.length, bool(owner))
            continue
        for first, count, data in runs(blocks, -(-end // BLOCK_SIZE)):
            low, high = max(first * BLOCK_SIZE, start), min((first + count) * BLOCK_SIZE, end)
            if low < high:
                add(base + low, high - low, data)
    return found

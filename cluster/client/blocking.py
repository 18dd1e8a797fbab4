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
from sheepdog.cluster.client.connection import PATIENCE_S, Connection
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.client.follow import Operation
from sheepdog.cluster.client.lifecycle import Open, Refresh, Resize, Settle
from sheepdog.cluster.client.machine import Extent, VolumeMachine
from sheepdog.cluster.client.operations import ZERO_CHUNK_BYTES, Discard, Flush, Read, Write
from sheepdog.cluster.client.requests import Request, read_header, write_header
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import Vid, data_oid
from sheepdog.cluster.core.inode import InodeHeader
from sheepdog.cluster.core.messages import Buffer


class BlockingVolume:
    """An open volume for any number of threads; made by `open`. Semantics as `volume.Volume`."""

    def __init__(self, address: Address, machine: VolumeMachine, connection: Connection, patience_s: float) -> None:
        self._address = address
        self._machine = machine
        self._patience_s = patience_s
        self._lock = threading.Lock()  # around every call into the machine; never held during I/O
        self._channel = Channel(address, patience_s)  # for reads and writes inside one object
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

    def refresh(self) -> None:
        """Learns what others have done since the volume was opened: its size, and if it is read-only all of its map."""
        self._drive(Refresh(self._machine))

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """What is allocated in a range, by whole objects."""
        with self._lock:
            return iter(list(self._machine.extents(offset, length)))

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
            return Connection(self._address, self._patience_s)

    def _drive(self, operation: Operation) -> None:
        """Carries an operation to its end; raises its error."""
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
                connection = self._borrow()
                try:
                    connection.exchange(requests, answer)
                finally:
                    self._idle.append(connection)
            elif not operation.finished:
                event.wait()
        if operation.error:
            raise operation.error

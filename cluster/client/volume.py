"""An open volume by byte range, for asyncio.

Thin (holes read as zeros without a request), copied on write where a snapshot or clone shares an object, and it
follows snapshots that others take meanwhile. Many requests may be under way at once; those that overlap in
time have no order between them.

`read`, `write` and the rest are coroutines. `submit_read` and `submit_write` are the same without a coroutine,
for callers with thousands of requests a second; a range inside one object of our own costs one request and no machine.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeAlias

from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.client.follow import Operation, os_error
from sheepdog.cluster.client.lifecycle import Open, Refresh, Resize, Settle
from sheepdog.cluster.client.machine import Extent, VolumeMachine
from sheepdog.cluster.client.operations import ZERO_CHUNK_BYTES, Discard, Flush, Read, Write, Zero
from sheepdog.cluster.client.requests import Request, read_header, write_header
from sheepdog.cluster.client.session import Session
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import Vid, data_oid
from sheepdog.cluster.core.inode import InodeHeader
from sheepdog.cluster.core.messages import Buffer
from sheepdog.cluster.wire.opcodes import Flags

ReadDone: TypeAlias = Callable[[OSError | None, Buffer], None]
WriteDone: TypeAlias = Callable[[OSError | None], None]


class Volume:
    """An open volume; made by `open`."""

    def __init__(self, session: Session, machine: VolumeMachine) -> None:
        self._session = session
        self._machine = machine
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def open(
        cls,
        session: Session,
        name: str | bytes,
        tag: bytes = b"",
        snap_id: int = 0,
        read_only: bool = False,
        object_cache: bool = False,
    ) -> Volume:
        """Opens the working volume `name`, or the snapshot with this tag or id (read-only).

        With `object_cache` the gateway's object cache, if it has one, may keep what is read too (docs/cache.md).

        SheepError with NO_VDI or NO_TAG (errno ENOENT) if there is none. The session may be shared with other volumes.
        """
        opening = Open(name.encode() if isinstance(name, str) else name, tag, snap_id, read_only)
        await _run(session, opening)
        assert opening.machine is not None
        opening.machine.read_flags = Flags.CACHE if object_cache else 0
        return cls(session, opening.machine)

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

    # -- coroutines

    async def read(self, offset: int, length: int) -> Buffer:
        """The bytes of a range, clipped to the volume's end."""
        future: asyncio.Future[Buffer] = self._loop.create_future()
        self.submit_read(offset, length, partial(_set_data, future))
        return await future

    async def write(self, offset: int, data: Buffer, durable: bool = False) -> None:
        """Writes a range; ENOSPC (and nothing written) if it ends beyond the volume, EROFS if that is read-only.

        With `durable` it survives the loss of power once this returns, otherwise once a later `flush` has returned.
        """
        future: asyncio.Future[None] = self._loop.create_future()
        self.submit_write(offset, data, durable, partial(_set_done, future))
        await future

    async def flush(self) -> None:
        """Everything written and returned before is durable when this returns."""
        await _run(self._session, Flush(self._machine))

    async def discard(self, offset: int, length: int) -> None:
        """Gives back the objects that lie wholly in the range; they read as zeros. The rest of the range is kept."""
        await _run(self._session, Discard(self._machine, offset, length))

    async def zero(self, offset: int, length: int, durable: bool = False) -> None:
        """The range reads as zeros afterwards: whole objects are given back, parts of others become holes."""
        await self.discard(offset, length)
        for start, size in self._machine.allocated_chunks(offset, length, ZERO_CHUNK_BYTES):
            await _run(self._session, Zero(self._machine, start, size, False))
        if durable:
            await self.flush()

    async def resize(self, size: int) -> None:
        """Grows the volume; EINVAL for less than its size, EFBIG for more than its map can hold."""
        await _run(self._session, Resize(self._machine, size))

    async def refresh(self) -> None:
        """Learns what others have done since the volume was opened: its size, and if it is read-only all of its map."""
        await _run(self._session, Refresh(self._machine))

    async def close(self) -> None:
        """Ends in order: what was written is durable and in the volume. The session stays open."""
        await _run(self._session, Settle(self._machine))
        await self.flush()

    def allocated_bytes(self) -> int:
        """How much of the volume is backed by objects, its own or an ancestor's."""
        entries = self._machine.entries
        return (len(entries) - entries.count(0)) * self._machine.object_size

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """What is allocated in a range, by whole objects."""
        return self._machine.extents(offset, length)

    # -- callbacks

    def submit_read(self, offset: int, length: int, done: ReadDone) -> None:
        """`read` with a callback, which comes exactly once, perhaps (for a hole) before this returns."""
        machine = self._machine
        size = machine.object_size
        index, start = divmod(offset, size)
        if 0 < length <= size - start and 0 <= offset <= machine.size - length:
            owner = machine.entries[index]
            if not owner:
                done(None, bytes(length))
                return
            header = read_header(data_oid(Vid(owner), index), start, length, machine.read_flags)
            self._session.submit(header, b"", _QuickRead(self, offset, length, done), length)
            return
        if offset < 0 or length < 0:
            done(os_error(errno.EINVAL), b"")
            return
        self._read_slowly(offset, length, done)

    def plain_read(self, offset: int, length: int) -> bytearray | None:
        """The one request that reads a range, for another connection; None for a hole, or what one object has not."""
        machine = self._machine
        index, start = divmod(offset, machine.object_size)
        if not (0 < length <= machine.object_size - start and 0 <= offset <= machine.size - length):
            return None
        owner = machine.entries[index]
        return read_header(data_oid(Vid(owner), index), start, length, machine.read_flags) if owner else None

    def submit_write(self, offset: int, data: Buffer, durable: bool, done: WriteDone) -> None:
        """`write` with a callback, which comes exactly once. `data` must not change until then."""
        machine = self._machine
        size = machine.object_size
        index, start = divmod(offset, size)
        length = len(data) if not isinstance(data, memoryview) else data.nbytes
        if (
            0 < length <= size - start
            and 0 <= offset <= machine.size - length
            and not machine.read_only
            and not (durable and machine.map_unflushed)
            and machine.hold_in_place(index)
        ):
            header = write_header(data_oid(machine.vid, index), start, length, durable or not machine.caching)
            self._session.submit(header, data, _QuickWrite(self, index, offset, data, durable, done))
            return
        self._write_slowly(offset, data, durable, done)

    def _read_slowly(self, offset: int, length: int, done: ReadDone) -> None:
        operation = Read(self._machine, offset, length)
        _drive(self._session, operation, lambda: done(operation.error, b"" if operation.error else operation.data))

    def _write_slowly(self, offset: int, data: Buffer, durable: bool, done: WriteDone) -> None:
        operation = Write(self._machine, offset, data, durable)
        _drive(self._session, operation, lambda: done(operation.error))


class _QuickRead:
    """Waits for a read from one object. The machine knows whether a missing one was moved."""

    __slots__ = ("_done", "_length", "_offset", "_volume")

    def __init__(self, volume: Volume, offset: int, length: int, done: ReadDone) -> None:
        self._volume = volume
        self._offset = offset
        self._length = length
        self._done = done

    def __call__(self, result: int, data: Buffer, header: bytes) -> None:
        if result == 0 and len(data) == self._length:
            self._done(None, data)
        elif result != Result.NO_OBJ:
            self._done(SheepError(result or Result.EIO), b"")
        else:
            self._volume._read_slowly(self._offset, self._length, self._done)


class _QuickWrite:
    """Waits for a write in place; a frozen object is followed by the machine."""

    __slots__ = ("_data", "_done", "_durable", "_index", "_offset", "_volume")

    def __init__(self, volume: Volume, index: int, offset: int, data: Buffer, durable: bool, done: WriteDone) -> None:
        self._volume = volume
        self._index = index
        self._offset = offset
        self._data = data
        self._durable = durable
        self._done = done

    def __call__(self, result: int, data: Buffer, header: bytes) -> None:
        self._volume._machine.drop_in_place(self._index)
        if result == 0:
            self._done(None)
        elif result != Result.READONLY:
            self._done(SheepError(result))
        else:
            self._volume._write_slowly(self._offset, self._data, self._durable, self._done)


def _drive(session: Session, operation: Operation, ended: Callable[[], None]) -> None:
    """Carries an operation's requests to the session and the answers back; `ended` comes exactly once."""
    loop = asyncio.get_running_loop()
    over = False

    def send(requests: list[Request]) -> None:
        nonlocal over
        for request in requests:
            session.submit(request.header, request.payload, partial(answered, request), request.limit)
        if operation.finished and not over:
            over = True
            ended()

    def answered(request: Request, result: int, data: Buffer, header: bytes) -> None:
        send(operation.answer(request, result, data, header))

    def resume() -> None:
        if not operation.finished:
            send(operation.resume())

    def wake() -> None:
        loop.call_soon(resume)

    operation.wake = wake
    if operation.finished:
        send([])
    else:
        resume()


async def _run(session: Session, operation: Operation) -> None:
    """Drives an operation to its end; raises its error."""
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    _drive(session, operation, lambda: _set_done(future, operation.error))
    await future


def _set_done(future: asyncio.Future[None], error: OSError | None) -> None:
    if future.done():
        return  # the caller was cancelled
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


def _set_data(future: asyncio.Future[Buffer], error: OSError | None, data: Buffer) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(data)
    else:
        future.set_exception(error)

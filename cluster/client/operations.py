"""Reads, writes, discards, flushes and the rest of a volume's life as exchanges of requests, without I/O.

A driver calls `resume`, sends the requests it gets, hands each answer to `answer`, sends what that returns, and so on
until `finished`. An operation that must wait returns nothing and calls `wake` later: then `resume` again (once
too often does no harm). Answers may come in any order.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.client.machine import Claim, Piece, VolumeMachine
from sheepdog.cluster.client.requests import (
    Request,
    create_header,
    flush_header,
    lookup,
    read_header,
    write_header,
)
from sheepdog.cluster.core.errors import PeerError, Result
from sheepdog.cluster.core.ids import Vid, data_oid, inode_oid
from sheepdog.cluster.core.inode import HEADER_SIZE, InodeHeader, map_offset, pack_map, unpack_map
from sheepdog.cluster.core.limits import MAX_MAP_ENTRIES
from sheepdog.cluster.core.messages import Buffer
from sheepdog.cluster.wire.header import VDI_RESPONSE

MAX_ROUNDS: Final = 64  # snapshots (or other clients' changes) that may overtake one request before it fails
DISCARD_BATCH: Final = 4096  # objects whose entries one request clears: 16 KiB of map, held exclusively meanwhile
ZERO_CHUNK_BYTES: Final = 1 << 20  # zeros written in one request where an object is kept

_QUEUED, _ACTIVE, _RELOADING, _MAPPING, _FLUSHING, _WAITING = range(6)
_LOOKUP, _HEADER, _MAP, _FLUSH, _RESIZE = "lookup", "header", "map", "flush", "resize"
_SUCCESS: Final = int(Result.SUCCESS)
_READONLY: Final = int(Result.READONLY)
_NO_OBJ: Final = int(Result.NO_OBJ)


def _never() -> None:
    """The wake of an operation whose driver has not set one."""


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class Operation:
    """Base: what a driver sees."""

    __slots__ = ("error", "finished", "wake")

    def __init__(self) -> None:
        self.finished = False
        self.error: OSError | None = None  # valid once finished
        self.wake: Callable[[], None] = _never

    def resume(self) -> list[Request]:
        """Requests to send now; none while it has to wait."""
        raise NotImplementedError

    def answer(self, request: Request, result: int, data: Buffer, header: bytes) -> list[Request]:
        """Takes one answer; returns the requests that follow from it."""
        raise NotImplementedError

    def _finish(self, error: OSError | None = None) -> list[Request]:
        self.error = self.error or error
        self.finished = True
        return []


class _Follower(Operation):
    """An operation that can follow the volume to the vid it goes on under after a snapshot (protocol.md 8.4)."""

    __slots__ = ("_machine", "_vid")

    def __init__(self, machine: VolumeMachine) -> None:
        super().__init__()
        self._machine = machine
        self._vid = machine.vid  # the vid our last requests named

    def _reload(self) -> list[Request]:
        """Learns the current vid, unless somebody else just did or does so; then `_reloaded`."""
        machine = self._machine
        if machine.vid != self._vid:
            return self._reloaded()
        if machine.reloading:
            machine.wait(self._wake)
            return []
        machine.reloading = True
        return [lookup(machine.header.name, step=_LOOKUP)]

    def _reload_answer(self, request: Request, result: int, data: Buffer, header: bytes) -> list[Request]:
        machine = self._machine
        if result == _SUCCESS and request.step == _LOOKUP:
            vid = Vid(VDI_RESPONSE.unpack(header).vdi_id)
            if vid != machine.vid:
                return [Request(read_header(inode_oid(vid), 0, HEADER_SIZE), b"", HEADER_SIZE, _HEADER)]
            result = _READONLY  # frozen, and nothing has taken its place
        inode = inode_of(result, data)
        if isinstance(inode, InodeHeader):
            machine.install(inode)
        else:
            self.error = inode
        machine.end_reload()
        return self._reloaded()

    def _reloaded(self) -> list[Request]:
        raise NotImplementedError

    def _wake(self) -> None:
        self.wake()


class Read(Operation):
    """`data` holds the bytes of offset .. offset + length, clipped to the volume's end."""

    __slots__ = ("_again", "_buffer", "_machine", "_outstanding", "_pending", "_rounds", "_state", "_whole", "data")

    def __init__(self, machine: VolumeMachine, offset: int, length: int) -> None:
        super().__init__()
        self._machine = machine
        length = max(0, min(length, machine.size - offset))
        self._pending = machine.pieces(offset, length)
        self._whole = len(self._pending) == 1
        self.data: Buffer = b""
        self._buffer = bytearray(0 if self._whole else length)
        self._again: list[Piece] = []
        self._outstanding = 0
        self._rounds = 0
        self._state = _QUEUED

    def resume(self) -> list[Request]:
        if self._state not in (_QUEUED, _WAITING):
            return []
        self._state = _ACTIVE
        requests = []
        entries = self._machine.entries
        for piece in self._pending:
            owner = entries[piece.number]
            if owner:
                header = read_header(data_oid(Vid(owner), piece.number), piece.offset, piece.length)
                requests.append(Request(header, b"", piece.length, (piece, owner)))
            elif self._whole:
                self.data = bytes(piece.length)
            else:
                self._buffer[piece.position : piece.position + piece.length] = bytes(piece.length)
        self._outstanding = len(requests)
        if not requests:
            return self._end()
        return requests

    def answer(self, request: Request, result: int, data: Buffer, header: bytes) -> list[Request]:
        piece, owner = request.step
        self._outstanding -= 1
        if result == _SUCCESS and len(data) == piece.length:
            if self._whole:
                self.data = data
            else:
                self._buffer[piece.position : piece.position + piece.length] = data
        elif result == _NO_OBJ and self._moved(piece.number, owner):
            self._again.append(piece)
        else:
            self.error = self.error or SheepError(result or Result.EIO)
        return [] if self._outstanding else self._end()

    def _moved(self, index: int, owner: int) -> bool:
        """The object may have been replaced or discarded, and then reclaimed, between our request and its answer."""
        machine = self._machine
        return machine.entries[index] != owner or machine.changing(index)

    def _end(self) -> list[Request]:
        if self._again and not self.error:
            self._rounds += 1
            if self._rounds > MAX_ROUNDS:
                return self._finish(os_error(errno.EIO))
            self._pending, self._again = self._again, []
            self._state = _WAITING
            if any(self._machine.changing(piece.number) for piece in self._pending):
                self._machine.wait(self.wake)
                return []
            return self.resume()
        if not self._whole:
            self.data = self._buffer
        return self._finish()


class Write(_Follower):
    """Writes `data` at `offset`; with `durable` it survives a power failure once finished, else after a `Flush`.

    ENOSPC beyond the end, EROFS on a read-only volume. `data` is borrowed until finished.
    """

    __slots__ = (
        "_claim",
        "_created",
        "_data",
        "_durable",
        "_outstanding",
        "_pending",
        "_retry",
        "_rounds",
        "_state",
    )

    def __init__(self, machine: VolumeMachine, offset: int, data: Buffer, durable: bool) -> None:
        super().__init__(machine)
        self._data = memoryview(data).cast("B")
        self._durable = durable or not machine.caching
        self._pending: list[Piece] = []
        if machine.read_only:
            self._finish(os_error(errno.EROFS))
        elif offset < 0 or offset + len(self._data) > machine.size:
            self._finish(os_error(errno.ENOSPC))
        else:
            self._pending = machine.pieces(offset, len(self._data))
            self.finished = not self._pending
        self._retry: list[Piece] = []
        self._created: list[int] = []
        self._claim = Claim(0, 0, False, self._wake)
        self._outstanding = 0
        self._rounds = 0
        self._state = _QUEUED

    def resume(self) -> list[Request]:
        if self.finished:
            return []
        if self._state == _QUEUED:
            self._claim.first, self._claim.last = self._pending[0].number, self._pending[-1].number
            return self._send() if self._machine.acquire(self._claim) else []
        return self._reload() if self._state == _RELOADING else []

    def _send(self) -> list[Request]:
        machine, data, durable = self._machine, self._data, self._durable
        self._state = _ACTIVE
        self._vid = vid = machine.vid
        requests = []
        for piece in self._pending:
            number, offset, length, position = piece
            owner = machine.entries[number]
            oid = data_oid(vid, number)
            if owner == vid:
                header = write_header(oid, offset, length, durable)
            else:
                # Nothing of the ancestor's object shows through a whole one.
                source = data_oid(Vid(owner), number) if owner and length < machine.object_size else 0
                header = create_header(oid, source, offset, length, durable)
            requests.append(Request(header, data[position : position + length], 0, piece))
        self._outstanding = len(requests)
        return requests

    def answer(self, request: Request, result: int, data: Buffer, header: bytes) -> list[Request]:
        if self._state == _ACTIVE:
            return self._piece_answer(request.step, result)
        if self._state == _RELOADING:
            return self._reload_answer(request, result, data, header)
        if self._state == _MAPPING:
            return self._map_answer(result)
        return self._flush_answer(request, result)

    def _piece_answer(self, piece: Piece, result: int) -> list[Request]:
        if result == _SUCCESS:
            if self._machine.entries[piece.number] != self._vid:
                self._created.append(piece.number)
        elif result == _READONLY:
            self._retry.append(piece)
        else:
            self.error = self.error or SheepError(result)
        self._outstanding -= 1
        if self._outstanding:
            return []
        if self._retry and not self.error:
            self._state = _RELOADING
            return self._reload()
        return self._record()

    def _reloaded(self) -> list[Request]:
        return self._record()

    def _record(self) -> list[Request]:
        """Names the created objects in the map: one range, in the inode that is current now."""
        if not self._created:
            return self._next()
        machine = self._machine
        self._state = _MAPPING
        return [map_write(machine, dict.fromkeys(self._created, int(self._vid)), self._durable)]

    def _map_answer(self, result: int) -> list[Request]:
        machine = self._machine
        if result == _SUCCESS:
            for index in self._created:
                machine.entries[index] = self._vid
            machine.map_writes += not self._durable
        else:
            self.error = self.error or SheepError(result)
        self._created.clear()
        return self._next()

    def _next(self) -> list[Request]:
        machine = self._machine
        machine.release(self._claim)
        self._rounds += 1
        if self.error or self._rounds > MAX_ROUNDS:
            return self._finish(os_error(errno.EIO))
        if self._retry:
            self._pending, self._retry = sorted(self._retry), []
            self._state = _QUEUED
            return self.resume()
        if self._durable and machine.map_unflushed:
            self._state = _FLUSHING
            return [Request(flush_header(machine.vid), b"", 0, machine.map_writes)]
        return self._finish()

    def _flush_answer(self, request: Request, result: int) -> list[Request]:
        error = flushed(self._machine, result, request.step)
        return self._finish(error)


class Flush(Operation):
    """Everything acknowledged before is durable once finished."""

    __slots__ = ("_machine",)

    def __init__(self, machine: VolumeMachine) -> None:
        super().__init__()
        self._machine = machine
        self.finished = machine.read_only or not machine.caching

    def resume(self) -> list[Request]:
        if self.finished:
            return []
        return [Request(flush_header(self._machine.vid), b"", 0, self._machine.map_writes)]

    def answer(self, request: Request, result: int, data: Buffer, header: bytes) -> list[Request]:
        return self._finish(flushed(self._machine, result, request.step))


class Discard(Operation):
    """Gives back the objects that lie wholly in a range: they read as zeros afterwards (protocol.md 7.4).

    The parts of objects at its ends keep their bytes, as with QEMU. The volume's last object counts as whole.
    """

    __slots__ = ("_claim", "_end", "_machine", "_next", "_state")

    def __init__(self, machine: VolumeMachine, offset: int, length: int) -> None:
        super().__init__()
        self._machine = machine
        size = machine.object_size
        end = min(offset + length, machine.size)
        self._next = -(-offset // size)
        self._end = -(-end // size) if end == machine.size else end // size
        self._claim = Claim(0, 0, True, self._wake)
        self._state = _QUEUED
        if machine.read_only:
            self._finish(os_error(errno.EROFS))
        elif offset < 0 or offset + length > machine.size:
            self._finish(os_error(errno.ENOSPC))

    def _wake(self) -> None:
        self.wake()

    def resume(self) -> list[Request]:
        machine, claim = self._machine, self._claim
        while not self.finished and self._state == _QUEUED:
            if self._next >= self._end:
                return self._finish()
            claim.first, claim.last = self._next, min(self._next + DISCARD_BATCH, self._end) - 1
            if not machine.acquire(claim):
                return []
            used = [index for index in range(claim.first, claim.last + 1) if machine.entries[index]]
            if used:
                self._state = _MAPPING
                return [map_write(machine, dict.fromkeys(used, 0), False)]
            machine.release(claim)
            self._next = claim.last + 1
        return []

    def answer(self, request: Request, result: int, data: Buffer, header: bytes) -> list[Request]:
        machine, claim = self._machine, self._claim
        if result == _SUCCESS:
            machine.map_writes += machine.caching
            for index in range(claim.first, claim.last + 1):
                machine.entries[index] = 0
        machine.release(claim)
        if result:
            return self._finish(SheepError(result))
        self._next = claim.last + 1
        self._state = _QUEUED
        return self.resume()


class Resize(_Follower):
    """Grows the volume to `size` bytes; EINVAL for a smaller one, EFBIG beyond what its map can name."""

    __slots__ = ("_rounds", "_size", "_state")

    def __init__(self, machine: VolumeMachine, size: int) -> None:
        super().__init__(machine)
        self._size = size
        self._rounds = 0
        self._state = _ACTIVE
        if machine.read_only:
            self._finish(os_error(errno.EROFS))
        elif size < machine.size:
            self._finish(os_error(errno.EINVAL))
        elif size > MAX_MAP_ENTRIES * machine.object_size:
            self._finish(os_error(errno.EFBIG))

    def resume(self) -> list[Request]:
        if self.finished:
            return []
        if self._state == _RELOADING:
            return self._reload()
        # The header is written back as a whole, so it must be the newest (protocol.md 7.4).
        self._vid = self._machine.vid
        return [Request(read_header(inode_oid(self._vid), 0, HEADER_SIZE), b"", HEADER_SIZE, _HEADER)]

    def answer(self, request: Request, result: int, data: Buffer, header: bytes) -> list[Request]:
        if self._state == _RELOADING:
            return self._reload_answer(request, result, data, header)
        if request.step == _RESIZE:
            if result:
                return self._finish(SheepError(result))
            self._machine.grow(self._size)
            return self._finish()
        inode = inode_of(result, data)
        if not isinstance(inode, InodeHeader):
            return self._finish(inode)
        if inode.is_snapshot:
            self._rounds += 1
            if self._rounds > MAX_ROUNDS:
                return self._finish(os_error(errno.EIO))
            self._state = _RELOADING
            return self._reload()
        payload = replace(inode, vdi_size=max(self._size, inode.vdi_size)).pack()
        return [Request(write_header(inode_oid(self._vid), 0, HEADER_SIZE, True), payload, 0, _RESIZE)]

    def _reloaded(self) -> list[Request]:
        if self.error:
            return self._finish()
        self._state = _ACTIVE
        return self.resume()


class Open(Operation):
    """Looks a volume up and reads its inode; `machine` is the open volume once finished without error.

    `tag` or `snap_id` name a snapshot, which is read-only.
    """

    __slots__ = ("_inode", "_lookup", "_read_only", "_rounds", "machine")

    def __init__(self, name: bytes, tag: bytes = b"", snap_id: int = 0, read_only: bool = False) -> None:
        super().__init__()
        self._lookup = (name, tag, snap_id)
        self._read_only = read_only or bool(tag or snap_id)
        self._inode: InodeHeader | None = None
        self._rounds = 0
        self.machine: VolumeMachine | None = None

    def resume(self) -> list[Request]:
        name, tag, snap_id = self._lookup
        return [lookup(name, tag, snap_id, _LOOKUP)]

    def answer(self, request: Request, result: int, data: Buffer, header: bytes) -> list[Request]:
        if result or len(data) != request.limit:
            return self._finish(SheepError(result or Result.EIO))
        if request.step == _LOOKUP:
            vid = Vid(VDI_RESPONSE.unpack(header).vdi_id)
            return [Request(read_header(inode_oid(vid), 0, HEADER_SIZE), b"", HEADER_SIZE, _HEADER)]
        if request.step == _HEADER:
            inode = inode_of(result, data)
            return self._read_map(inode) if isinstance(inode, InodeHeader) else self._finish(inode)
        assert self._inode is not None
        self.machine = VolumeMachine(self._inode, unpack_map(data), self._read_only)
        return self._finish()

    def _read_map(self, inode: InodeHeader) -> list[Request]:
        if inode.is_snapshot and not self._read_only:
            # A snapshot was taken between the lookup and this read.
            self._rounds += 1
            return self.resume() if self._rounds < MAX_ROUNDS else self._finish(os_error(errno.EIO))
        if inode.store_policy:
            return self._finish(OSError(errno.EOPNOTSUPP, "a hyper volume cannot be opened"))
        self._inode = inode
        length = 4 * inode.object_count
        return [Request(read_header(inode_oid(Vid(inode.vdi_id)), HEADER_SIZE, length), b"", length, _MAP)]


def map_write(machine: VolumeMachine, changes: dict[int, int], durable: bool) -> Request:
    """One write of the map from the lowest to the highest changed entry; the others keep their value."""
    first, last = min(changes), max(changes)
    chunk = machine.entries[first : last + 1]
    for index, vid in changes.items():
        chunk[index - first] = vid
    durable = durable or not machine.caching
    payload = pack_map(chunk)
    header = write_header(inode_oid(machine.vid), map_offset(first), len(payload), durable)
    return Request(header, payload, 0, _MAP)


def inode_of(result: int, data: Buffer) -> InodeHeader | SheepError:
    """The header that a read of 4664 bytes has brought."""
    if result:
        return SheepError(result)
    try:
        inode = InodeHeader.unpack(data)
    except PeerError as error:
        return SheepError(Result.EIO, str(error))
    return SheepError(Result.NO_VDI, "the volume was deleted") if inode.is_deleted else inode


def flushed(machine: VolumeMachine, result: int, covered: int) -> OSError | None:
    """Takes the answer of a FLUSH_VDI that was sent when `covered` map writes had been acknowledged.

    INVALID_PARMS means that nothing is ever volatile (protocol.md 3.3.4).
    """
    if result == Result.INVALID_PARMS:
        machine.caching = False
        machine.map_flushed = machine.map_writes
        return None
    if result:
        return SheepError(result)
    machine.map_flushed = max(machine.map_flushed, covered)
    return None

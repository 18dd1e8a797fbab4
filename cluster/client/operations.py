"""Reads, writes, discards and flushes as exchanges of requests without I/O (how they are driven: `follow`)."""

from __future__ import annotations

import errno
from typing import Final

from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.client.follow import HEADER, MAP, MAX_ROUNDS, Follower, Operation, inode_of, os_error
from sheepdog.cluster.client.machine import Claim, Piece, VolumeMachine
from sheepdog.cluster.client.requests import (
    Request,
    create_header,
    flush_header,
    read_header,
    write_header,
    zero_header,
)
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import Vid, data_oid, inode_oid
from sheepdog.cluster.core.inode import HEADER_SIZE, InodeHeader, map_offset, pack_map
from sheepdog.cluster.core.messages import Buffer

DISCARD_BATCH: Final = 4096  # objects whose entries one request clears: 16 KiB of map, held exclusively meanwhile
ZERO_CHUNK_BYTES: Final = 4 << 20  # zeroed at a time where objects are kept: where one is shared, so much is sent

_QUEUED, _ACTIVE, _RELOADING, _MAPPING, _REMAPPING, _FLUSHING, _WAITING, _LOOKING = range(8)
_SUCCESS: Final = int(Result.SUCCESS)
_READONLY: Final = int(Result.READONLY)
_NO_OBJ: Final = int(Result.NO_OBJ)


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
        entries, flags = self._machine.entries, self._machine.read_flags
        for piece in self._pending:
            owner = entries[piece.number]
            if owner:
                header = read_header(data_oid(Vid(owner), piece.number), piece.offset, piece.length, flags)
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


class Write(Follower):
    """Writes `data` at `offset`; with `durable` it survives a power failure once finished, else after a `Flush`.

    ENOSPC beyond the end, EROFS on a read-only volume. `data` is borrowed until finished.
    """

    __slots__ = (
        "_claim",
        "_created",
        "_data",
        "_durable",
        "_map_vid",
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
        self._map_vid = machine.vid
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
        if self._state == _RELOADING:
            return self._reload()
        return self._record() if self._state == _REMAPPING else []

    def _send(self) -> list[Request]:
        machine = self._machine
        self._state = _ACTIVE
        self._vid = vid = machine.vid
        requests = []
        for piece in self._pending:
            owner = machine.entries[piece.number]
            request = self._write(piece, vid) if owner == vid else self._create(piece, vid, owner)
            if request is not None:
                requests.append(request)
        self._outstanding = len(requests)
        return requests or self._record()

    def _write(self, piece: Piece, vid: Vid) -> Request:
        number, offset, length, position = piece
        header = write_header(data_oid(vid, number), offset, length, self._durable)
        return Request(header, self._data[position : position + length], 0, piece)

    def _create(self, piece: Piece, vid: Vid, owner: int) -> Request | None:
        number, offset, length, position = piece
        # Nothing of the ancestor's object shows through a whole one.
        source = data_oid(Vid(owner), number) if owner and length < self._machine.object_size else 0
        header = create_header(data_oid(vid, number), source, offset, length, self._durable)
        return Request(header, self._data[position : position + length], 0, piece)

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
        if machine.reloading:
            self._state = _REMAPPING
            machine.wait(self._wake)
            return []
        self._state = _MAPPING
        self._map_vid = machine.vid
        return [map_write(machine, dict.fromkeys(self._created, int(self._vid)), self._durable)]

    def _map_answer(self, result: int) -> list[Request]:
        machine = self._machine
        if result == _SUCCESS and self._unsettled(self._map_vid):
            return self._record()
        if result == _SUCCESS:
            for index in self._created:
                machine.entries[index] = self._vid
            machine.map_written(self._durable)
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


class Zero(Write):
    """Makes a range read as zeros by holes in objects of our own; objects that do not exist stay away."""

    __slots__ = ()

    def __init__(self, machine: VolumeMachine, offset: int, length: int, durable: bool) -> None:
        super().__init__(machine, offset, bytes(length), durable)  # sent only where an object is shared

    def _write(self, piece: Piece, vid: Vid) -> Request:
        return Request(zero_header(data_oid(vid, piece.number), piece.offset, piece.length, self._durable), step=piece)

    def _create(self, piece: Piece, vid: Vid, owner: int) -> Request | None:
        return super()._create(piece, vid, owner) if owner else None


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


class Discard(Follower):
    """Gives back the objects that lie wholly in a range: they read as zeros afterwards (protocol.md 7.4).

    The parts of objects at its ends keep their bytes, as with QEMU. The volume's last object counts as whole.

    Zeros in the map of a volume that was frozen meanwhile would take the objects from the snapshot, and the gateway
    cannot tell them from the snapshot's deletion; so the inode is looked at before.
    """

    __slots__ = ("_claim", "_end", "_next", "_rounds", "_state")

    def __init__(self, machine: VolumeMachine, offset: int, length: int) -> None:
        super().__init__(machine)
        size = machine.object_size
        end = min(offset + length, machine.size)
        self._next = -(-offset // size)
        self._end = -(-end // size) if end == machine.size else end // size
        self._claim = Claim(0, 0, True, self._wake)
        self._rounds = 0
        self._state = _QUEUED
        if machine.read_only:
            self._finish(os_error(errno.EROFS))
        elif offset < 0 or offset + length > machine.size:
            self._finish(os_error(errno.ENOSPC))

    def resume(self) -> list[Request]:
        machine, claim = self._machine, self._claim
        if self._state == _REMAPPING:
            return self._clear()
        if self._state == _RELOADING:
            return self._reload()
        while not self.finished and self._state == _QUEUED:
            if self._next >= self._end:
                return self._finish()
            claim.first, claim.last = self._next, min(self._next + DISCARD_BATCH, self._end) - 1
            if not machine.acquire(claim):
                return []
            if any(machine.entries[claim.first : claim.last + 1]):
                return self._look()
            machine.release(claim)
            self._next = claim.last + 1
        return []

    def _look(self) -> list[Request]:
        self._state = _LOOKING
        self._vid = self._machine.vid
        return [Request(read_header(inode_oid(self._vid), 0, HEADER_SIZE), b"", HEADER_SIZE, HEADER)]

    def _looked(self, result: int, data: Buffer) -> list[Request]:
        inode = inode_of(result, data)
        if not isinstance(inode, InodeHeader):
            return self._give_up(inode)
        if not inode.is_snapshot:
            return self._clear()
        self._rounds += 1
        if self._rounds > MAX_ROUNDS:
            return self._give_up(os_error(errno.EIO))
        self._state = _RELOADING
        return self._reload()

    def _reloaded(self) -> list[Request]:
        return self._give_up(self.error) if self.error else self._look()

    def _give_up(self, error: OSError) -> list[Request]:
        self._machine.release(self._claim)
        return self._finish(error)

    def _clear(self) -> list[Request]:
        """Zeroes the entries of the claim in the inode that is current."""
        machine, claim = self._machine, self._claim
        if machine.reloading:
            self._state = _REMAPPING
            machine.wait(self._wake)
            return []
        self._state = _MAPPING
        self._vid = machine.vid
        used = [index for index in range(claim.first, claim.last + 1) if machine.entries[index]]
        return [map_write(machine, dict.fromkeys(used, 0), False)]

    def answer(self, request: Request, result: int, data: Buffer, header: bytes) -> list[Request]:
        machine, claim = self._machine, self._claim
        if self._state == _LOOKING:
            return self._looked(result, data)
        if self._state == _RELOADING:
            return self._reload_answer(request, result, data, header)
        if result == _SUCCESS and self._unsettled(self._vid):
            return self._clear()
        if result == _SUCCESS:
            machine.map_written(not machine.caching)
            for index in range(claim.first, claim.last + 1):
                machine.entries[index] = 0
        machine.release(claim)
        if result:
            return self._finish(SheepError(result))
        self._next = claim.last + 1
        self._state = _QUEUED
        return self.resume()


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


def map_write(machine: VolumeMachine, changes: dict[int, int], durable: bool) -> Request:
    """One write of the map from the lowest to the highest changed entry; the others keep their value."""
    first, last = min(changes), max(changes)
    chunk = machine.entries[first : last + 1]
    for index, vid in changes.items():
        chunk[index - first] = vid
    durable = durable or not machine.caching
    payload = pack_map(chunk)
    header = write_header(inode_oid(machine.vid), map_offset(first), len(payload), durable)
    return Request(header, payload, 0, MAP)

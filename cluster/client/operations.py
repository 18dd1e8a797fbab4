"""Reads, writes, discards and flushes as exchanges of requests without I/O (how they are driven: `follow`)."""

from __future__ import annotations

import errno
from typing import Final

from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.client.follow import MAP, MAX_ROUNDS, Follower, Operation, os_error
from sheepdog.cluster.client.machine import Claim, Piece, VolumeMachine
from sheepdog.cluster.client.requests import Request, create_header, flush_header, read_header, write_header
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import Vid, data_oid, inode_oid
from sheepdog.cluster.core.inode import map_offset, pack_map
from sheepdog.cluster.core.messages import Buffer

DISCARD_BATCH: Final = 4096  # objects whose entries one request clears: 16 KiB of map, held exclusively meanwhile
ZERO_CHUNK_BYTES: Final = 1 << 20  # zeros written in one request where an object is kept

_QUEUED, _ACTIVE, _RELOADING, _MAPPING, _REMAPPING, _FLUSHING, _WAITING = range(7)
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
    """

    __slots__ = ("_claim", "_end", "_next", "_state")

    def __init__(self, machine: VolumeMachine, offset: int, length: int) -> None:
        super().__init__(machine)
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

    def resume(self) -> list[Request]:
        machine, claim = self._machine, self._claim
        if self._state == _REMAPPING:
            return self._clear()
        while not self.finished and self._state == _QUEUED:
            if self._next >= self._end:
                return self._finish()
            claim.first, claim.last = self._next, min(self._next + DISCARD_BATCH, self._end) - 1
            if not machine.acquire(claim):
                return []
            if any(machine.entries[claim.first : claim.last + 1]):
                return self._clear()
            machine.release(claim)
            self._next = claim.last + 1
        return []

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

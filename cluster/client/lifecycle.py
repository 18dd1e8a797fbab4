"""Opening, growing and leaving a volume, as exchanges of requests without I/O."""

from __future__ import annotations

import errno
from dataclasses import replace

from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.client.follow import (
    HEADER,
    LOOKUP,
    MAP,
    MAX_ROUNDS,
    RESIZE,
    Follower,
    Operation,
    inode_of,
    os_error,
)
from sheepdog.cluster.client.machine import VolumeMachine
from sheepdog.cluster.client.requests import Request, lookup, read_header, write_header
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import Vid, inode_oid
from sheepdog.cluster.core.inode import HEADER_SIZE, InodeHeader, unpack_map
from sheepdog.cluster.core.limits import MAX_MAP_ENTRIES
from sheepdog.cluster.core.messages import Buffer
from sheepdog.cluster.wire.header import VDI_RESPONSE

_ASKING, _RELOADING = range(2)


class Settle(Follower):
    """The last step of a volume that has changed its map: if it was frozen unnoticed, its heir gets our map."""

    __slots__ = ("_over",)

    def __init__(self, machine: VolumeMachine) -> None:
        super().__init__(machine)
        self._over = False
        self.finished = machine.read_only or not machine.map_changed

    def resume(self) -> list[Request]:
        return [] if self.finished or self._over else self._reload()

    def answer(self, request: Request, result: int, data: Buffer, header: bytes) -> list[Request]:
        if request.step == LOOKUP and result == Result.NO_VDI:
            self._machine.end_reload()
            return self._finish()  # deleted meanwhile
        return self._reload_answer(request, result, data, header)

    def _unchanged(self) -> OSError | None:
        return None

    def _reloaded(self) -> list[Request]:
        self._over = True
        return self._finish()


class Resize(Follower):
    """Grows the volume to `size` bytes; EINVAL for a smaller one, EFBIG beyond what its map can name."""

    __slots__ = ("_rounds", "_size", "_state")

    def __init__(self, machine: VolumeMachine, size: int) -> None:
        super().__init__(machine)
        self._size = size
        self._rounds = 0
        self._state = _ASKING
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
        return [Request(read_header(inode_oid(self._vid), 0, HEADER_SIZE), b"", HEADER_SIZE, HEADER)]

    def answer(self, request: Request, result: int, data: Buffer, header: bytes) -> list[Request]:
        if self._state == _RELOADING:
            return self._reload_answer(request, result, data, header)
        if request.step == RESIZE and result != Result.READONLY:  # else it was frozen since its header was read
            if result:
                return self._finish(SheepError(result))
            self._machine.grow(self._size)
            return self._finish()
        inode = None if request.step == RESIZE else inode_of(result, data)
        if inode is not None and not isinstance(inode, InodeHeader):
            return self._finish(inode)
        if inode is None or inode.is_snapshot:
            self._rounds += 1
            if self._rounds > MAX_ROUNDS:
                return self._finish(os_error(errno.EIO))
            self._state = _RELOADING
            return self._reload()
        payload = replace(inode, vdi_size=max(self._size, inode.vdi_size)).pack()
        return [Request(write_header(inode_oid(self._vid), 0, HEADER_SIZE, True), payload, 0, RESIZE)]

    def _reloaded(self) -> list[Request]:
        if self.error:
            return self._finish()
        self._state = _ASKING
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
        return [lookup(name, tag, snap_id, LOOKUP)]

    def answer(self, request: Request, result: int, data: Buffer, header: bytes) -> list[Request]:
        if result or len(data) != request.limit:
            return self._finish(SheepError(result or Result.EIO))
        if request.step == LOOKUP:
            vid = Vid(VDI_RESPONSE.unpack(header).vdi_id)
            return [Request(read_header(inode_oid(vid), 0, HEADER_SIZE), b"", HEADER_SIZE, HEADER)]
        if request.step == HEADER:
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
        return [Request(read_header(inode_oid(Vid(inode.vdi_id)), HEADER_SIZE, length), b"", length, MAP)]


class Refresh(Open):
    """Opens a volume anew and takes over what others may have changed: its size, and the map of a read-only one.

    The map of a volume open for writing is its own authority, and a frozen one is followed by the next write.
    """

    __slots__ = ("_target",)

    def __init__(self, machine: VolumeMachine) -> None:
        super().__init__(machine.header.name, read_only=machine.read_only)
        self._target = machine
        self.finished = machine.header.is_snapshot  # nobody changes it

    def resume(self) -> list[Request]:
        return [] if self.finished else super().resume()

    def answer(self, request: Request, result: int, data: Buffer, header: bytes) -> list[Request]:
        requests = super().answer(request, result, data, header)
        target, fresh = self._target, self.machine
        if fresh is not None:
            if target.read_only:
                target.entries = fresh.entries
                target.install(fresh.header)
            elif fresh.vid == target.vid:
                target.header = fresh.header
            target.grow(fresh.size)
        return requests

"""What all operations on a volume share, and how one follows the volume to another vid when a snapshot is taken.

A driver calls `resume`, sends the requests it gets, hands each answer to `answer`, sends what that returns, and so on
until `finished`. An operation that must wait returns nothing and calls `wake` later: then `resume` again (once
too often does no harm). Answers may come in any order.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.client.machine import VolumeMachine
from sheepdog.cluster.client.requests import Request, lookup, read_header, write_header
from sheepdog.cluster.core.errors import PeerError, Result
from sheepdog.cluster.core.ids import Vid, inode_oid
from sheepdog.cluster.core.inode import HEADER_SIZE, InodeHeader, map_offset, pack_map, unpack_map
from sheepdog.cluster.core.messages import Buffer
from sheepdog.cluster.wire.header import VDI_RESPONSE

MAX_ROUNDS: Final = 64  # snapshots (or other clients' changes) that may overtake one request before it fails

LOOKUP, HEADER, MAP, CORRECTION, RESIZE = "lookup", "header", "map", "correction", "resize"
"""Steps of operations that are no pieces of data."""


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


class Follower(Operation):
    """An operation that can follow the volume to the vid it goes on under after a snapshot (protocol.md 8.4).

    A map write may reach the frozen inode after the new one was copied from it, and the gateway cannot tell a late
    discard from the deletion of a snapshot. So the new map is compared with ours, which is the authority, and put
    right; writes of the map that are under way meanwhile are repeated afterwards (`_unsettled`).
    """

    __slots__ = ("_corrections", "_heir", "_machine", "_vid")

    def __init__(self, machine: VolumeMachine) -> None:
        super().__init__()
        self._machine = machine
        self._vid = machine.vid  # the vid our last requests named
        self._heir: InodeHeader | None = None
        self._corrections = 0  # outstanding

    def _reload(self) -> list[Request]:
        """Learns the current vid, unless somebody else just did or does so; then `_reloaded`."""
        machine = self._machine
        if machine.sharing:  # others have maps, too: ours must not replace what they have written
            self.error = SheepError(Result.READONLY)
            return self._reloaded()
        if machine.vid != self._vid:
            return self._reloaded()
        if machine.reloading:
            machine.wait(self._wake)
            return []
        machine.reloading = True
        return [lookup(machine.header.name, step=LOOKUP)]

    def _reload_answer(self, request: Request, result: int, data: Buffer, header: bytes) -> list[Request]:
        step = request.step
        if step == LOOKUP and result == Result.SUCCESS:
            vid = Vid(VDI_RESPONSE.unpack(header).vdi_id)
            if vid == self._machine.vid:
                return self._end_reload(self._unchanged())
            return [Request(read_header(inode_oid(vid), 0, HEADER_SIZE), b"", HEADER_SIZE, HEADER)]
        if step == HEADER:
            inode = inode_of(result, data)
            if not isinstance(inode, InodeHeader):
                return self._end_reload(inode)
            self._heir = inode
            length = 4 * inode.object_count
            return [Request(read_header(inode_oid(Vid(inode.vdi_id)), HEADER_SIZE, length), b"", length, MAP)]
        if step == MAP and result == Result.SUCCESS and len(data) == request.limit:
            corrections = self._correct(data)
            self._corrections = len(corrections)
            return corrections or self._end_reload(None)
        if step == CORRECTION:
            self._corrections -= 1
            if result:
                self.error = self.error or SheepError(result)
            return [] if self._corrections else self._end_reload(None)
        return self._end_reload(SheepError(result or Result.EIO))

    def _correct(self, data: Buffer) -> list[Request]:
        """Writes for the entries of the new map that are not ours."""
        assert self._heir is not None
        oid = inode_oid(Vid(self._heir.vdi_id))
        requests = []
        for first, entries in self._machine.corrections(unpack_map(data)):
            payload = pack_map(entries)
            header = write_header(oid, map_offset(first), len(payload), True)
            requests.append(Request(header, payload, 0, CORRECTION))
        return requests

    def _end_reload(self, error: OSError | None) -> list[Request]:
        self.error = self.error or error
        if self._heir is not None and not self.error:
            self._machine.install(self._heir)
        self._heir = None
        self._machine.end_reload()
        return self._reloaded()

    def _unchanged(self) -> OSError | None:
        """The volume is frozen and nothing has taken its place."""
        return SheepError(Result.READONLY)

    def _reloaded(self) -> list[Request]:
        raise NotImplementedError

    def _unsettled(self, vid: int) -> bool:
        """A map write to this vid, just acknowledged, may have come too late to count."""
        return self._machine.reloading or self._machine.vid != vid

    def _wake(self) -> None:
        self.wake()


def inode_of(result: int, data: Buffer) -> InodeHeader | SheepError:
    """The header that a read of 4664 bytes has brought."""
    if result:
        return SheepError(result)
    try:
        inode = InodeHeader.unpack(data)
    except PeerError as error:
        return SheepError(Result.EIO, str(error))
    return SheepError(Result.NO_VDI, "the volume was deleted") if inode.is_deleted else inode

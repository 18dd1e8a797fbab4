"""The exclusive lock of a volume, for a client that outlives its gateways. Blocking.

A cluster that enforces locks (`dog cluster format -l`) knows the node through which a lock was taken, no client, and
ends the lock when that node leaves. So a client that goes on through another node, or whose process was
replaced, finds either no lock or one that may be its own: `Held` tells which.
"""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Callable
from contextlib import closing
from typing import NamedTuple, TypeVar

from sheepdog.cluster.client import admin
from sheepdog.cluster.client.address import Address
from sheepdog.cluster.client.connection import ANSWER_LIMIT_S, STALL_LIMIT_S, Connection, connect_near
from sheepdog.cluster.client.errors import SheepError, ShutOutError
from sheepdog.cluster.client.requests import lock
from sheepdog.cluster.core.errors import PeerError, Result
from sheepdog.cluster.core.ids import NodeId, Vid
from sheepdog.cluster.core.vdi import LockState
from sheepdog.cluster.wire.header import VDI_RESPONSE

Answer = TypeVar("Answer")

LOG_SLOTS = 64  # nodes that a record of the epoch log has room for at first


class Held(NamedTuple):
    """A lock: the node that it is of, and an epoch in which that node had it or was about to get it.

    It stands as long as the node has been a member ever since, unless somebody released it.
    """

    node: NodeId
    epoch: int


class VolumeLock:
    """The lock of one client, renewed with every connection that it makes. Any thread may call."""

    def __init__(self, address: Address, name: bytes, patience_s: float = 0.0) -> None:
        """`address` is that of the first gateway, `patience_s` for `take` and `release`."""
        self._address = address
        self._name = name
        self._patience_s = patience_s
        self._held: Held | None = None
        self._lost: ShutOutError | None = None
        self._changing = threading.Lock()

    @property
    def is_lost(self) -> bool:
        """Somebody else has it: `renew` fails from now on."""
        return self._lost is not None

    def take(self) -> None:
        """SheepError VDI_LOCKED (EBUSY) if somebody else has it, another OSError if the cluster cannot be asked."""
        with self._changing:
            self._take(self._patience_s, ANSWER_LIMIT_S)

    def renew(self, address: Address) -> None:
        """`take` at another gateway, or at one that was away.

        ShutOutError, from then on always, if somebody else has the lock: what he has written must neither be missed
        nor destroyed.
        """
        with self._changing:
            if self._lost is not None:
                raise self._lost
            try:
                with closing(Connection(address, 0.0, answer_limit_s=STALL_LIMIT_S)) as connection:
                    if address == self._address and self._stands(connection):
                        return
                self._address = address
                self._take(0.0, STALL_LIMIT_S)
            except SheepError as error:
                if error.result != Result.VDI_LOCKED:
                    raise
                name = self._name.decode(errors="replace")
                self._lost = ShutOutError(errno.EIO, f"{name}: somebody else has locked it, so it is closed to us")
                raise self._lost from error

    def dial(self, address: Address) -> socket.socket:
        """A connected blocking socket of one who has the lock; for `Connection`."""
        sock = connect_near(address)
        try:
            self.renew(address)
        except BaseException:
            sock.close()
            raise
        return sock

    def release(self) -> None:
        """OSError if the cluster cannot be asked; nothing happens to a lock that is somebody else's by now."""
        with self._changing:
            held, self._held = self._held, None
            if held is not None:
                with closing(Connection(self._address, self._patience_s, answer_limit_s=ANSWER_LIMIT_S)) as connection:
                    _sensibly(lambda: release(connection, self._name, held))

    def _stands(self, connection: Connection) -> bool:
        held = self._held
        return held is not None and _sensibly(lambda: _standing(connection, self._name, held)) is not None

    def _take(self, patience_s: float, limit_s: float) -> None:
        with closing(Connection(self._address, patience_s, answer_limit_s=limit_s)) as connection:
            self._held = _sensibly(lambda: take(connection, self._name, self._held))


def _sensibly(question: Callable[[], Answer]) -> Answer:
    """An answer that makes no sense is an OSError."""
    try:
        return question()
    except PeerError as error:
        raise OSError(errno.EIO, str(error)) from error


def take(connection: Connection, name: bytes, before: Held | None = None) -> Held | None:
    """Locks the working volume `name`; None in a cluster that enforces no locks.

    SheepError VDI_LOCKED if somebody else has it. The client's own lock of `before`, if it still stands, is replaced:
    the new one is of the node that is asked.
    """
    epoch = _epoch(connection)
    try:
        vid = _lock(connection, name)
    except SheepError as error:
        if error.result != Result.VDI_LOCKED or before is None or not release(connection, name, before):
            raise
        vid = _lock(connection, name)
    return _held(connection, vid, epoch)


def held(connection: Connection, name: bytes) -> Held | None:
    """Who has the volume for himself just now."""
    epoch = _epoch(connection)
    return _held(connection, admin.find(connection, name).vid, epoch)


def release(connection: Connection, name: bytes, lock: Held) -> bool:
    """Ends this lock, if it still stands; else nothing happens, and the answer is False."""
    vid = _standing(connection, name, lock)
    if vid is None:
        return False
    admin.release_lock(connection, vid, shared=False)
    return True


def _standing(connection: Connection, name: bytes, lock: Held) -> Vid | None:
    """The volume that the lock, if it still stands, is of: a snapshot has perhaps moved it along with the name."""
    vid = admin.find(connection, name).vid
    return vid if _held(connection, vid, lock.epoch) == lock and _was_member(connection, lock) else None


def _lock(connection: Connection, name: bytes) -> Vid:
    request = lock(name, shared=False)
    return Vid(VDI_RESPONSE.unpack(connection.call(request.header, request.payload).header).vdi_id)


def _held(connection: Connection, vid: Vid, epoch: int) -> Held | None:
    state = admin.vdi_states(connection).get(vid)
    if state is None or state.lock_state != LockState.LOCKED or state.owner is None:
        return None
    return Held(state.owner, epoch)


def _epoch(connection: Connection) -> int:
    return admin.epoch_log(connection, 0).epoch


def _was_member(connection: Connection, lock: Held) -> bool:
    """In every epoch from the lock's on."""
    epochs = _epoch(connection) - lock.epoch + 1
    log = admin.epoch_log(connection, LOG_SLOTS, epochs).records if epochs > 0 else []
    since = [members for header, members in log if header.epoch >= lock.epoch]
    return len(since) >= epochs > 0 and all(any(member.id == lock.node for member in members) for members in since)

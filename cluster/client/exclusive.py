"""The exclusive lock of a volume, for a client that outlives its gateways. Blocking, one connection.

A cluster that enforces locks (`dog cluster format -l`) knows the node through which a lock was taken, no client, and
ends the lock when that node leaves. So a client that goes on through another node, or whose process was
replaced, finds either no lock or one that may be its own: `Held` tells which.
"""

from __future__ import annotations

from typing import NamedTuple

from sheepdog.cluster.client import admin
from sheepdog.cluster.client.connection import Connection
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.client.requests import lock
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import NodeId, Vid
from sheepdog.cluster.core.vdi import LockState
from sheepdog.cluster.wire.header import VDI_RESPONSE

LOG_SLOTS = 64  # nodes that a record of the epoch log has room for at first


class Held(NamedTuple):
    """A lock: the node that it is of, and an epoch in which that node had it or was about to get it.

    It stands as long as the node has been a member ever since, unless somebody released it.
    """

    node: NodeId
    epoch: int


def take(connection: Connection, name: bytes, before: Held | None = None) -> Held | None:
    """Locks the working volume `name`; None in a cluster that enforces no locks.

    SheepError VDI_LOCKED if somebody else has it. The client's own lock of `before`, if it still stands, is replaced.
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
    vid = admin.find(connection, name).vid
    now = _held(connection, vid, lock.epoch)
    if now != lock or not _was_member(connection, lock):
        return False
    admin.release_lock(connection, vid, shared=False)
    return True


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

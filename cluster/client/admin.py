"""What an administrator asks a gateway: nodes, epochs, volumes, objects. Blocking, one connection.

Functions raise SheepError for a refused request and OSError when the gateway cannot be reached; PeerError for
an answer that makes no sense.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

from sheepdog.cluster.client.connection import Connection
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.client.requests import lookup, release
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import (
    NO_VID,
    Member,
    NodeId,
    ObjectId,
    Vid,
)
from sheepdog.cluster.core.inode import (
    InodeHeader,
)
from sheepdog.cluster.core.messages import Buffer
from sheepdog.cluster.wire import header as wire
from sheepdog.cluster.wire.opcodes import GATEWAY_VERSION, Flags, Opcode, protocol_version
from sheepdog.cluster.wire.structures import (
    CLUSTER_INFO_SIZE,
    EPOCH_HEADER,
    NODE_LIST_SIZE,
    NODE_SIZE,
    VDI_STATE_SIZE,
    VDI_STATES_MAX,
    ClusterInfo,
    EpochHeader,
    VdiState,
    pack_names,
    unpack_cluster_info,
    unpack_epochs,
    unpack_nodes,
    unpack_vdi_states,
)


class Found(NamedTuple):
    """A volume as GET_VDI_INFO and NEW_VDI name it."""

    vid: Vid
    copies: int
    shift: int


class EpochLog(NamedTuple):
    """STAT_CLUSTER: the state of the cluster, its epoch, and the epochs it knows, newest first."""

    result: int
    epoch: int
    records: list[tuple[EpochHeader, list[Member]]]


class Disk(NamedTuple):
    """Capacity of a node, in bytes."""

    size: int
    free: int


# -- requests of no fields of their own


CACHE_INFO_SIZE = 4 << 20  # some ten thousand volumes
DETAILS_SIZE = 1 << 18  # of what a node says of itself or of an object: names of thousands of nodes


def plain(connection: Connection, opcode: Opcode, payload: bytes = b"", limit: int = 0, flags: int = 0) -> Buffer:
    """Any request that is only an opcode and perhaps a payload; its answer's data."""
    if payload:
        flags |= Flags.WRITE
    fields = wire.Request(protocol_version(opcode), opcode, flags, data_length=len(payload) or limit)
    return connection.call(bytearray(wire.REQUEST.pack(fields)), payload, limit).data


# -- cluster and nodes


def node_list(connection: Connection) -> list[Member]:
    """The nodes, in ascending order of address and port."""
    return unpack_nodes(plain(connection, Opcode.GET_NODE_LIST, limit=NODE_LIST_SIZE))


def epoch_log(connection: Connection, slots: int, epoch: int = 0) -> EpochLog:
    """The newest `epoch` records with room for `slots` nodes each (doubled while that is too few).

    Without `slots` only the header of the newest epoch. A cluster that is not running has no result of
    SUCCESS, but it may have a log.
    """
    while True:
        size = max(epoch, 1) * (EPOCH_HEADER.size + slots * NODE_SIZE)
        fields = wire.ClusterRequest(
            protocol_version(Opcode.STAT_CLUSTER), Opcode.STAT_CLUSTER, data_length=size, nodes_nr=slots
        )
        reply = connection.ask(bytearray(wire.CLUSTER_REQUEST.pack(fields)), b"", size)
        if reply.result != Result.BUFFER_SMALL or not slots:
            header = wire.RESPONSE.unpack(reply.header)
            return EpochLog(reply.result, header.epoch, unpack_epochs(reply.data, slots))
        slots *= 2


def cluster_info(connection: Connection) -> tuple[ClusterInfo, list[Member]]:
    return unpack_cluster_info(plain(connection, Opcode.CLUSTER_INFO, limit=CLUSTER_INFO_SIZE))


def disk_usage(connection: Connection) -> Disk:
    """STAT_SHEEP of the node that the connection leads to."""
    fields = wire.Request(protocol_version(Opcode.STAT_SHEEP), Opcode.STAT_SHEEP)
    reply = connection.call(bytearray(wire.REQUEST.pack(fields)))
    answer = wire.NODE_RESPONSE.unpack(reply.header)
    return Disk(answer.store_size, answer.store_free)


def node_details(connection: Connection) -> dict[str, Any]:
    """What the node says of itself; empty for a daemon that does not know the question (the original's)."""
    import json

    try:
        found = json.loads(bytes(plain(connection, Opcode.NODE_DETAILS, limit=DETAILS_SIZE)))
    except SheepError:
        return {}
    return found if isinstance(found, dict) else {}


def object_details(connection: Connection, oid: ObjectId, epoch: int) -> dict[str, Any]:
    """What the node holds of an object (core.health.object_report)."""
    import json

    header = object_request(Opcode.OBJECT_DETAILS, oid, length=DETAILS_SIZE, epoch=epoch)
    found: dict[str, Any] = json.loads(bytes(connection.call(header, limit=DETAILS_SIZE).data))
    return found


def format_cluster(connection: Connection, fields: wire.ClusterRequest, store: str, recovery_delay_s: int = 0) -> None:
    """MAKE_FS with the fields given; version, opcode and payload are filled in here."""
    payload = store.encode() + b"\0" + (recovery_delay_s.to_bytes(4, "little") if recovery_delay_s else b"")
    fields = fields._replace(
        version=protocol_version(Opcode.MAKE_FS), opcode=Opcode.MAKE_FS, flags=Flags.WRITE, data_length=len(payload)
    )
    connection.call(bytearray(wire.CLUSTER_REQUEST.pack(fields)), payload)


def alter_cluster_copies(connection: Connection, copies: int, policy: int) -> None:
    opcode = Opcode.ALTER_CLUSTER_COPY
    fields = wire.ClusterRequest(protocol_version(opcode), opcode, copies=copies, copy_policy=policy)
    connection.call(bytearray(wire.CLUSTER_REQUEST.pack(fields)))


# -- volumes


def find(connection: Connection, name: bytes, tag: bytes = b"", snap_id: int = 0) -> Found:
    """The working volume, or the snapshot with this tag or id."""
    request = lookup(name, tag, snap_id)
    return _found(connection.call(request.header, request.payload).header)


def new_volume(
    connection: Connection,
    name: bytes,
    size: int,
    base: Vid = NO_VID,
    snapshot: bool = False,
    copies: int = 0,
    policy: int = 0,
    store_policy: int = 0,
    shift: int = 0,
) -> Found:
    """NEW_VDI in all its meanings (protocol.md 8.3); the volume that now works under this name."""
    fields = wire.VdiRequest(
        version=GATEWAY_VERSION,
        opcode=Opcode.NEW_VDI,
        flags=Flags.WRITE,
        data_length=256,
        vdi_size=size,
        base_vdi_id=base,
        copies=copies,
        copy_policy=policy,
        store_policy=store_policy,
        block_size_shift=shift,
        snap_id=int(snapshot),
    )
    return _found(connection.call(bytearray(wire.VDI_REQUEST.pack(fields)), pack_names(name)).header)


def snapshot_volume(connection: Connection, name: bytes, tag: bytes, copies: int = 0, policy: int = 0) -> Found:
    """Freezes the volume as it is when its turn has come; the one that goes on, with its size and redundancy unless
    `copies` are given. Our own form of NEW_VDI: no base, and the tag behind the name. VDI_EXIST: the tag is taken."""
    payload = pack_names(name, tag)
    fields = wire.VdiRequest(
        version=GATEWAY_VERSION,
        opcode=Opcode.NEW_VDI,
        flags=Flags.WRITE,
        data_length=len(payload),
        copies=copies,
        copy_policy=policy,
        snap_id=1,
    )
    return _found(connection.call(bytearray(wire.VDI_REQUEST.pack(fields)), payload).header)


def delete_volume(connection: Connection, name: bytes, tag: bytes = b"", snap_id: int = 0) -> Vid:
    payload = pack_names(name, tag)
    fields = wire.VdiRequest(GATEWAY_VERSION, Opcode.DEL_VDI, Flags.WRITE, data_length=len(payload), snap_id=snap_id)
    return _found(connection.call(bytearray(wire.VDI_REQUEST.pack(fields)), payload).header).vid


def release_lock(connection: Connection, vid: Vid, shared: bool) -> None:
    connection.call(release(vid, shared).header)


def vdi_states(connection: Connection) -> dict[int, VdiState]:
    """Locks by vid; of a gateway with more volumes than it can tell, the locked ones come first."""
    data = plain(connection, Opcode.GET_VDI_COPIES, limit=VDI_STATES_MAX * VDI_STATE_SIZE)
    return {state.vid: state for state in unpack_vdi_states(data)}


def alter_volume_copies(connection: Connection, vid: Vid, copies: int, shift: int) -> None:
    opcode = Opcode.ALTER_VDI_COPY
    fields = wire.VdiStateRequest(protocol_version(opcode), opcode, new_vid=vid, copies=copies, block_size_shift=shift)
    connection.call(bytearray(wire.VDI_STATE_REQUEST.pack(fields)))


def move_objects(connection: Connection, vid: Vid) -> None:
    """Gives a volume some objects of its own, of its redundancy, in place of those that snapshots share with it."""
    opcode = Opcode.ALTER_VDI_COPY
    fields = wire.VdiStateRequest(protocol_version(opcode), opcode, new_vid=vid, set_bitmap=1)
    connection.call(bytearray(wire.VDI_STATE_REQUEST.pack(fields)))


def register_volume(connection: Connection, inode: InodeHeader) -> None:
    """NOTIFY_VDI_ADD: the vid is in use from now on, its objects and then its inode may be created."""
    opcode = Opcode.NOTIFY_VDI_ADD
    fields = wire.VdiStateRequest(
        protocol_version(opcode),
        opcode,
        new_vid=inode.vdi_id,
        copies=inode.nr_copies,
        set_bitmap=1,
        copy_policy=inode.copy_policy,
        block_size_shift=inode.block_size_shift,
    )
    connection.call(bytearray(wire.VDI_STATE_REQUEST.pack(fields)))


def attribute_id(connection: Connection, payload: bytes, snap_id: int, flags: int) -> ObjectId:
    """GET_VDI_ATTR with these flags besides WRITE; the object that holds the attribute."""
    opcode = Opcode.GET_VDI_ATTR
    fields = wire.VdiRequest(
        protocol_version(opcode), opcode, Flags.WRITE | flags, data_length=len(payload), snap_id=snap_id
    )
    answer = wire.VDI_RESPONSE.unpack(connection.call(bytearray(wire.VDI_REQUEST.pack(fields)), payload).header)
    return ObjectId(1 << 61 | answer.vdi_id << 32 | answer.attr_id)


def _found(header: bytes) -> Found:
    answer = wire.VDI_RESPONSE.unpack(header)
    return Found(Vid(answer.vdi_id), answer.copies, answer.block_size_shift)


def cache_info(connection: Connection) -> dict[str, Any]:
    """What the node's object cache holds (frontends.qemu.caches); NO_CACHE if it has none."""
    import json

    found: dict[str, Any] = json.loads(bytes(plain(connection, Opcode.CACHE_INFO, limit=CACHE_INFO_SIZE)))
    return found


# -- objects


def object_request(
    opcode: Opcode, oid: ObjectId, offset: int = 0, length: int = 0, flags: int = 0, cow_oid: int = 0, epoch: int = 0
) -> bytearray:
    """Header of an object request; `epoch` goes into both epoch fields (protocol.md 2.3)."""
    fields = wire.ObjectRequest(
        version=protocol_version(opcode),
        opcode=opcode,
        flags=flags,
        epoch=epoch,
        data_length=length,
        oid=oid,
        cow_oid=cow_oid,
        tgt_epoch=epoch,
        offset=offset,
    )
    return bytearray(wire.OBJECT_REQUEST.pack(fields))


def read_object(connection: Connection, oid: ObjectId, offset: int, length: int) -> Buffer:
    """Exactly `length` bytes."""
    header = object_request(Opcode.READ_OBJ, oid, offset, length, Flags.DIRECT)
    data = connection.call(header, b"", length).data
    if len(data) != length:
        raise SheepError(Result.EIO)
    return data


def write_object(connection: Connection, oid: ObjectId, offset: int, data: Buffer, flags: int = Flags.DIRECT) -> None:
    connection.call(object_request(Opcode.WRITE_OBJ, oid, offset, len(data), Flags.WRITE | flags), data)


def create_object(
    connection: Connection, oid: ObjectId, offset: int, data: Buffer, cow_oid: int = 0, flags: int = Flags.DIRECT
) -> None:
    """Creates or replaces an object: a copy of `cow_oid` (0: zeros) with `data` laid over it."""
    flags |= Flags.WRITE | (Flags.COW if cow_oid else 0)
    connection.call(object_request(Opcode.CREATE_AND_WRITE_OBJ, oid, offset, len(data), flags, cow_oid), data)


def object_exists(connection: Connection, oid: ObjectId, epoch: int) -> bool:
    """Whether the node that the connection leads to holds the object."""
    reply = connection.ask(object_request(Opcode.EXIST, oid, epoch=epoch))
    if reply.result not in (Result.SUCCESS, Result.NO_OBJ):
        raise SheepError(reply.result)
    return reply.result == Result.SUCCESS


def object_digest(connection: Connection, oid: ObjectId, epoch: int) -> bytes | None:
    """SHA-1 of the copy on the node that the connection leads to; None without one."""
    reply = connection.ask(object_request(Opcode.GET_HASH, oid, epoch=epoch))
    if reply.result == Result.NO_OBJ:
        return None
    if reply.result:
        raise SheepError(reply.result)
    return wire.HASH_RESPONSE.unpack(reply.header).digest


def missing_objects(connection: Connection, oids: list[ObjectId]) -> list[ObjectId]:
    """Those of the objects that the node does not hold, in one request."""
    payload = struct.pack(f"<{len(oids)}Q", *oids)
    opcode = Opcode.OIDS_EXIST
    fields = wire.Request(protocol_version(opcode), opcode, Flags.WRITE | Flags.PIGGYBACK, data_length=len(payload))
    reply = connection.ask(bytearray(wire.REQUEST.pack(fields)), payload, len(payload))
    if reply.result == Result.NO_OBJ:
        return [ObjectId(oid) for (oid,) in struct.iter_unpack("<Q", reply.data)]
    if reply.result:
        raise SheepError(reply.result)
    return []


def read_strip(connection: Connection, oid: ObjectId, index: int, length: int, epoch: int) -> Buffer | None:
    """A strip of a coded object, in the original's layout, from the node that the connection leads to; None without."""
    reply = connection.ask(_strip_request(Opcode.READ_PEER, oid, index, length, 0, epoch), b"", length)
    if reply.result == Result.NO_OBJ:
        return None
    if reply.result:
        raise SheepError(reply.result)
    return reply.data


def write_strip(connection: Connection, oid: ObjectId, index: int, strip: Buffer, epoch: int) -> None:
    """The node that the connection leads to gets its strip back."""
    header = _strip_request(Opcode.CREATE_AND_WRITE_PEER, oid, index, len(strip), Flags.WRITE, epoch)
    connection.call(header, strip)


def _strip_request(opcode: Opcode, oid: ObjectId, index: int, length: int, flags: int, epoch: int) -> bytearray:
    fields = wire.ObjectRequest(
        version=protocol_version(opcode),
        opcode=opcode,
        flags=flags,
        epoch=epoch,
        data_length=length,
        oid=oid,
        ec_index=index,
        tgt_epoch=epoch,
    )
    return bytearray(wire.OBJECT_REQUEST.pack(fields))


def repair_object(connection: Connection, oid: ObjectId, source: NodeId) -> None:
    """The node that the connection leads to fetches a good copy from `source`."""
    opcode = Opcode.REPAIR_REPLICA
    fields = wire.RepairRequest(protocol_version(opcode), opcode, oid=oid, address=source.address, port=source.port)
    connection.call(bytearray(wire.REPAIR_REQUEST.pack(fields)))

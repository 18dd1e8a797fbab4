"""Requests of the client protocol, ready to be sent: a 48-byte header and a payload."""

from __future__ import annotations

from typing import Any

from sheepdog.cluster.core.ids import ObjectId, Vid, inode_oid
from sheepdog.cluster.core.inode import MAP_END
from sheepdog.cluster.core.messages import Buffer
from sheepdog.cluster.wire.header import OBJECT_REQUEST, VDI_REQUEST, VdiRequest
from sheepdog.cluster.wire.opcodes import GATEWAY_VERSION, Flags, Opcode
from sheepdog.cluster.wire.structures import pack_names

_pack_object = OBJECT_REQUEST.struct.pack
_READ, _WRITE = int(Opcode.READ_OBJ), int(Opcode.WRITE_OBJ)
_CREATE, _FLUSH = int(Opcode.CREATE_AND_WRITE_OBJ), int(Opcode.FLUSH_VDI)
_ZERO, _MAP = int(Opcode.ZERO_OBJ), int(Opcode.MAP_OBJ)
_COHERENT = frozenset((_READ, _WRITE, _CREATE, _ZERO))
_OPCODE, _FLAGS = 1, 2  # bytes of the header
SHARED = 1  # lock_type


class Request:
    """One request. `limit` is the most data its answer may carry; `step` tells its sender what it was for."""

    __slots__ = ("header", "limit", "payload", "step")

    def __init__(self, header: bytearray, payload: Buffer = b"", limit: int = 0, step: Any = None) -> None:
        self.header = header
        self.payload = payload
        self.limit = limit
        self.step = step


# The next ones run once per client I/O and pack straight into the wire's layout. Copy counts and policy stay 0:
# the server goes by its own record (protocol.md 2.3).


def read_header(oid: ObjectId, offset: int, length: int, flags: int = 0) -> bytearray:
    """With CACHE in `flags` the gateway's object cache may keep what is read."""
    return bytearray(_pack_object(GATEWAY_VERSION, _READ, flags, 0, 0, length, oid, 0, 0, 0, 0, 0, offset))


def write_header(oid: ObjectId, offset: int, length: int, durable: bool) -> bytearray:
    flags = Flags.WRITE if durable else Flags.WRITE | Flags.CACHE
    return bytearray(_pack_object(GATEWAY_VERSION, _WRITE, flags, 0, 0, length, oid, 0, 0, 0, 0, 0, offset))


def create_header(oid: ObjectId, cow_oid: int, offset: int, length: int, durable: bool) -> bytearray:
    """`cow_oid` 0: the rest of the object is zero."""
    flags = Flags.WRITE if durable else Flags.WRITE | Flags.CACHE
    if cow_oid:
        flags |= Flags.COW
    return bytearray(_pack_object(GATEWAY_VERSION, _CREATE, flags, 0, 0, length, oid, cow_oid, 0, 0, 0, 0, offset))


def zero_header(oid: ObjectId, offset: int, length: int, durable: bool) -> bytearray:
    flags = 0 if durable else Flags.CACHE
    return bytearray(_pack_object(GATEWAY_VERSION, _ZERO, flags, 0, 0, length, oid, 0, 0, 0, 0, 0, offset))


def map_header(oid: ObjectId, length: int) -> bytearray:
    """`length` must be `core.blocks.map_size` of the object."""
    return bytearray(_pack_object(GATEWAY_VERSION, _MAP, 0, 0, 0, length, oid, 0, 0, 0, 0, 0, 0))


def flush_header(vid: Vid) -> bytearray:
    return bytearray(_pack_object(GATEWAY_VERSION, _FLUSH, 0, 0, 0, 0, inode_oid(vid), 0, 0, 0, 0, 0, 0))


def lookup(name: bytes, tag: bytes = b"", snap_id: int = 0, step: Any = None) -> Request:
    """GET_VDI_INFO; answered by a VDI response."""
    payload = pack_names(name, tag)
    fields = VdiRequest(GATEWAY_VERSION, Opcode.GET_VDI_INFO, Flags.WRITE, data_length=len(payload), snap_id=snap_id)
    return Request(bytearray(VDI_REQUEST.pack(fields)), payload, 0, step)


def whole_inode(vid: Vid) -> Request:
    """The read by which a participant of a shared volume learns the newest map (protocol.md 8.6)."""
    return Request(read_header(inode_oid(vid), 0, MAP_END), b"", MAP_END)


def lock(name: bytes, shared: bool) -> Request:
    """LOCK_VDI of the working volume, for one or for several at a time; answered by a VDI response."""
    payload = pack_names(name)
    fields = VdiRequest(
        GATEWAY_VERSION, Opcode.LOCK_VDI, Flags.WRITE, data_length=len(payload), lock_type=SHARED if shared else 0
    )
    return Request(bytearray(VDI_REQUEST.pack(fields)), payload)


def release(vid: Vid, shared: bool) -> Request:
    fields = VdiRequest(GATEWAY_VERSION, Opcode.RELEASE_VDI, base_vdi_id=vid, lock_type=SHARED if shared else 0)
    return Request(bytearray(VDI_REQUEST.pack(fields)))


def understanding_coherence(header: bytearray) -> bytearray:
    """The same request, which may be answered INODE_INVALIDATED where that means something."""
    if header[_OPCODE] in _COHERENT:
        header[_FLAGS] |= Flags.TGT
        header[_FLAGS + 1] |= Flags.FOLLOWS >> 8
    return header

"""Operations and flags of the client protocol, and which requests are let in (protocol.md 2.8, 3.1, 5.1, 12.2)."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from sheepdog.cluster.core.errors import Result

GATEWAY_VERSION: Final = 0x02  # what dog sends below ADMINISTRATION; QEMU and tgt send 0 and 1
ADMIN_VERSION: Final = 0x0A
ADMINISTRATION: Final = 0x80  # opcodes from here on are dog's and carry ADMIN_VERSION


class Opcode(IntEnum):
    """Every assigned operation (protocol.md 3.1); no client may send those in INTERNAL."""

    CREATE_AND_WRITE_OBJ = 0x01
    READ_OBJ = 0x02
    WRITE_OBJ = 0x03
    REMOVE_OBJ = 0x04
    DISCARD_OBJ = 0x05
    ZERO_OBJ = 0x06  # this and the next are ours: no other client knows them
    MAP_OBJ = 0x07
    NEW_VDI = 0x11
    LOCK_VDI = 0x12
    RELEASE_VDI = 0x13
    GET_VDI_INFO = 0x14
    READ_VDIS = 0x15
    FLUSH_VDI = 0x16
    DEL_VDI = 0x17
    GET_CLUSTER_DEFAULT = 0x18
    GET_NODE_LIST = 0x82
    MAKE_FS = 0x84
    SHUTDOWN = 0x85
    STAT_SHEEP = 0x86
    STAT_CLUSTER = 0x87
    GET_VDI_ATTR = 0x89
    FORCE_RECOVER = 0x8A
    GET_STORE_LIST = 0x90
    CLEANUP = 0x94
    TRACE_STATUS = 0x95
    TRACE_READ_BUF = 0x96
    STAT_RECOVERY = 0x97
    FLUSH_DEL_CACHE = 0x98
    NOTIFY_VDI_DEL = 0x99
    KILL_NODE = 0x9A
    TRACE_ENABLE = 0x9B
    TRACE_DISABLE = 0x9C
    GET_OBJ_LIST = 0xA1
    GET_EPOCH = 0xA2
    CREATE_AND_WRITE_PEER = 0xA3
    READ_PEER = 0xA4
    WRITE_PEER = 0xA5
    REMOVE_PEER = 0xA6
    ENABLE_RECOVER = 0xA8
    DISABLE_RECOVER = 0xA9
    GET_VDI_COPIES = 0xAB
    COMPLETE_RECOVERY = 0xAC
    NOTIFY_VDI_ADD = 0xAF
    DELETE_CACHE = 0xB0
    MD_INFO = 0xB1
    MD_PLUG = 0xB2
    MD_UNPLUG = 0xB3
    GET_HASH = 0xB4
    REWEIGHT = 0xB5
    CACHE_INFO = 0xB6  # these two as in the versions that had an object cache; the answer is JSON
    CACHE_PURGE = 0xB7
    STAT = 0xB8
    GET_LOGLEVEL = 0xB9
    SET_LOGLEVEL = 0xBA
    NFS_CREATE = 0xBB
    NFS_DELETE = 0xBC
    EXIST = 0xBD
    CLUSTER_INFO = 0xBE
    ALTER_CLUSTER_COPY = 0xBF
    ALTER_VDI_COPY = 0xC0
    DECREF_OBJ = 0xC1
    DECREF_PEER = 0xC2
    REPAIR_REPLICA = 0xC5
    OIDS_EXIST = 0xC6
    VDI_STATE_CHECKPOINT_CTL = 0xC7
    INODE_COHERENCE = 0xC8
    READ_DEL_VDIS = 0xC9
    GET_RECOVERY = 0xCA
    SET_RECOVERY = 0xCB
    SET_VNODES = 0xCC
    GET_VNODES = 0xCD
    NODE_DETAILS = 0xE0  # ours, as the next: what a node says of itself, as JSON (core.health)
    OBJECT_DETAILS = 0xE1  # ... and of its copies of one object
    SCRUB = 0xE2  # ... a change of its scrub (WRITE, JSON)
    SCRUB_STATUS = 0xE3  # ... how far that is


OBJECT_IO: Final = frozenset(
    int(op)
    for op in (
        Opcode.CREATE_AND_WRITE_OBJ,
        Opcode.READ_OBJ,
        Opcode.WRITE_OBJ,
        Opcode.REMOVE_OBJ,
        Opcode.DISCARD_OBJ,
        Opcode.ZERO_OBJ,
        Opcode.MAP_OBJ,
        Opcode.CREATE_AND_WRITE_PEER,
        Opcode.READ_PEER,
    )
)
"""Operations that may carry a whole object; everything else is limited to an inode's size."""

SERVED_WHILE_WAITING: Final = frozenset(
    int(op)
    for op in (
        Opcode.READ_VDIS,
        Opcode.GET_CLUSTER_DEFAULT,
        Opcode.GET_NODE_LIST,
        Opcode.MAKE_FS,
        Opcode.SHUTDOWN,
        Opcode.STAT_CLUSTER,
        Opcode.FORCE_RECOVER,
        Opcode.GET_STORE_LIST,
        Opcode.CLEANUP,
        Opcode.TRACE_STATUS,
        Opcode.TRACE_READ_BUF,
        Opcode.NOTIFY_VDI_DEL,
        Opcode.KILL_NODE,
        Opcode.TRACE_ENABLE,
        Opcode.TRACE_DISABLE,
        Opcode.GET_VDI_COPIES,
        Opcode.COMPLETE_RECOVERY,
        Opcode.NOTIFY_VDI_ADD,
        Opcode.GET_LOGLEVEL,
        Opcode.SET_LOGLEVEL,
        Opcode.EXIST,
        Opcode.CLUSTER_INFO,
        Opcode.OIDS_EXIST,
        Opcode.READ_DEL_VDIS,
        Opcode.GET_RECOVERY,
        Opcode.SET_RECOVERY,
        Opcode.NODE_DETAILS,
    )
)
"""Operations answered although the cluster waits for its format or for members ("F" in protocol.md 3.1)."""

INTERNAL: Final = frozenset(
    int(op)
    for op in (
        Opcode.REMOVE_OBJ,
        Opcode.CLEANUP,
        Opcode.NOTIFY_VDI_DEL,
        Opcode.GET_OBJ_LIST,
        Opcode.GET_EPOCH,
        Opcode.WRITE_PEER,
        Opcode.REMOVE_PEER,
        Opcode.COMPLETE_RECOVERY,
        Opcode.DECREF_OBJ,
        Opcode.DECREF_PEER,
        Opcode.VDI_STATE_CHECKPOINT_CTL,
        Opcode.INODE_COHERENCE,
        Opcode.GET_VNODES,
    )
)
"""Spoken only between the original daemons; ours have a protocol of their own and refuse these."""

_SUCCESS: Final = Result.SUCCESS  # looked up once, not for each request
_SERVED: Final = frozenset(int(op) for op in Opcode) - INTERNAL


class Flags:
    """Bits of a request's flags (protocol.md 5.1); unknown bits are ignored.

    Plain integers: an IntFlag costs more than the whole decoding of a header.
    """

    WRITE: Final = 0x0001  # a payload of data_length bytes follows
    COW: Final = 0x0002  # create as a copy of cow_oid
    CACHE: Final = 0x0004  # durable only after FLUSH_VDI
    DIRECT: Final = 0x0008  # durable when answered
    PIGGYBACK: Final = 0x0010  # the answer of a WRITE request carries payload
    TGT: Final = 0x0020  # from tgt: may be told INODE_INVALIDATED
    ATTR_CREATE: Final = 0x0100  # these three with GET_VDI_ATTR only
    ATTR_EXCLUSIVE: Final = 0x0200
    ATTR_DELETE: Final = 0x0400
    FOLLOWS: Final = 0x0800  # ours, with TGT: the volume that goes on is meant, also if the vid is a snapshot by now


def protocol_version(opcode: int) -> int:
    """The version byte of our own requests: what dog sends."""
    return ADMIN_VERSION if opcode >= ADMINISTRATION else GATEWAY_VERSION


def admit(opcode: int, version: int) -> Result:
    """Whether a request is looked at: SUCCESS, VER_MISMATCH (checked first) or INVALID_PARMS for an unserved opcode.

    A refused request's payload must have been consumed, and its connection stays open (protocol.md 2.8).
    """
    if version != ADMIN_VERSION if opcode >= ADMINISTRATION else version > GATEWAY_VERSION:
        return Result.VER_MISMATCH
    return _SUCCESS if opcode in _SERVED else Result.INVALID_PARMS

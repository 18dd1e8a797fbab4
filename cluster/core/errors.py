"""Two kinds of errors: ours (`UsageError`: a bug or a refused request of a person) and theirs (all others).

No daemon ends because of a peer, a disk or a client; `Result` is what a client is told (protocol.md 4).
"""

from __future__ import annotations

from enum import IntEnum


class Result(IntEnum):
    """Result codes of the wire (protocol.md 4). Codes from 0x81 on never reach QEMU or tgt."""

    SUCCESS = 0x00
    UNKNOWN = 0x01
    NO_OBJ = 0x02
    EIO = 0x03
    VDI_EXIST = 0x04
    INVALID_PARMS = 0x05
    SYSTEM_ERROR = 0x06
    VDI_LOCKED = 0x07
    NO_VDI = 0x08
    NO_BASE_VDI = 0x09
    VDI_READ = 0x0A
    VDI_WRITE = 0x0B
    BASE_VDI_READ = 0x0C
    BASE_VDI_WRITE = 0x0D
    NO_TAG = 0x0E
    STARTUP = 0x0F
    VDI_NOT_LOCKED = 0x10
    SHUTDOWN = 0x11
    NO_MEM = 0x12
    FULL_VDI = 0x13
    VER_MISMATCH = 0x14
    NO_SPACE = 0x15
    WAIT_FOR_FORMAT = 0x16
    WAIT_FOR_JOIN = 0x17
    JOIN_FAILED = 0x18
    HALT = 0x19
    READONLY = 0x1A
    INODE_INVALIDATED = 0x1D
    OLD_NODE_VER = 0x81
    NEW_NODE_VER = 0x82
    NOT_FORMATTED = 0x83
    INVALID_CTIME = 0x84
    INVALID_EPOCH = 0x85
    NETWORK_ERROR = 0x86
    NO_CACHE = 0x87
    BUFFER_SMALL = 0x88
    FORCE_RECOVER = 0x89
    NO_STORE = 0x8A
    NO_SUPPORT = 0x8B
    NODE_IN_RECOVERY = 0x8C
    KILLED = 0x8D
    OID_EXIST = 0x8E
    AGAIN = 0x8F
    STALE_OBJ = 0x90
    CLUSTER_ERROR = 0x91
    VDI_NOT_EMPTY = 0x92
    NOT_FOUND = 0x93
    INCOMPLETE = 0x94
    COLLECTING = 0x95
    GATEWAY_MODE = 0x97
    INVALID_VNODES_STRATEGY = 0x98
    NO_CHECKPOINT_ENTRY = 0x99


class UsageError(Exception):
    """Ours: a broken assertion, or a request that a person must change. The text is for people."""


class PeerError(Exception):
    """Theirs: bytes or behaviour of a client or peer that break the protocol. The connection is closed."""


class StoreError(Exception):
    """Theirs: the store could not do it. `result` is what a client is told."""

    result = Result.EIO


class NoObject(StoreError):
    """This node holds no copy of the object."""

    result = Result.NO_OBJ


class NoSpace(StoreError):
    """The disks are full (their reserve included)."""

    result = Result.NO_SPACE


class ExhaustedResources(StoreError):
    """The system has no descriptors or memory left; nothing is wrong with the disk."""

    result = Result.NO_MEM


class NoWayBack(StoreError):
    """The strip does not know how to get to the version that is wanted: it has to be rebuilt."""

    result = Result.STALE_OBJ


class OutOfRange(StoreError):
    """The range is empty or not inside the object."""

    result = Result.INVALID_PARMS


class Corrupt(StoreError):
    """Bytes that do not match their hash. They are never returned; another copy answers."""

    def __init__(self, text: str, blocks: tuple[int, ...] = (), place: str = "", mended: bool = False) -> None:
        super().__init__(text)
        self.blocks = blocks  # numbers of the 4 KiB blocks that failed
        self.place = place  # directory of the disk
        self.mended = mended  # it was bad, and is right again


class DiskError(StoreError):
    """The operating system reported an I/O error; the disk is out of service."""

"""Names of things: object ids, vdi ids, epochs, versions, nodes (protocol.md 6; design: versions).

Every identifier is a type of its own, so that a vid cannot be passed where an oid is meant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple, NewType

ObjectId = NewType("ObjectId", int)
Vid = NewType("Vid", int)
Epoch = NewType("Epoch", int)

VID_BITS: Final = 24
VID_COUNT: Final = 1 << VID_BITS
NO_VID: Final = Vid(0)
NO_OID: Final = ObjectId(0)

_INODE_SHIFT: Final = 63
_INODE: Final = 1 << _INODE_SHIFT
_VMSTATE: Final = 1 << 62
_ATTRIBUTE: Final = 1 << 61
_BTREE: Final = 1 << 60
_LEDGER: Final = 1 << 59
_KIND_SHIFT: Final = 59  # ids of data have nothing above it, but for the number of a strip
_KIND_MASK: Final = 0x1F
STRIP_SHIFT: Final = 64  # a strip's number + 1 stands above the 64 bits of the object's id
_PLAIN_MASK: Final = (1 << STRIP_SHIFT) - 1


def data_oid(vid: Vid, index: int) -> ObjectId:
    """Data object `index` of a volume."""
    return ObjectId(vid << 32 | index)


def inode_oid(vid: Vid) -> ObjectId:
    return ObjectId(_INODE | vid << 32)


def vmstate_oid(vid: Vid, index: int) -> ObjectId:
    return ObjectId(_VMSTATE | vid << 32 | index)


def attribute_oid(name_vid: Vid, attribute: int) -> ObjectId:
    return ObjectId(_ATTRIBUTE | name_vid << 32 | attribute)


def btree_oid(vid: Vid, node: int) -> ObjectId:
    return ObjectId(_BTREE | vid << 32 | node)


def vid_of(oid: ObjectId) -> Vid:
    return Vid(oid >> 32 & 0xFFFFFF)


def index_of(oid: ObjectId) -> int:
    return oid & 0xFFFFFFFF


def strip_of(oid: ObjectId, index: int) -> ObjectId:
    """Id of one strip of an erasure-coded object: a copy of its own in stores and inventories."""
    return ObjectId(oid | index + 1 << STRIP_SHIFT)


def plain_oid(oid: ObjectId) -> ObjectId:
    """The object that a strip is part of; a plain id as it is."""
    return ObjectId(oid & _PLAIN_MASK) if oid >> STRIP_SHIFT else oid


def strip_index(oid: ObjectId) -> int:
    """Which strip it is; -1 for a plain id."""
    return (oid >> STRIP_SHIFT) - 1


def oid_name(oid: ObjectId) -> str:
    """16 hex digits, with `_INDEX` for a strip: as the file is called (cli.md 1.2)."""
    return f"{oid:016x}" if oid <= _PLAIN_MASK else f"{oid & _PLAIN_MASK:016x}_{(oid >> STRIP_SHIFT) - 1}"


def is_data(oid: ObjectId) -> bool:
    return not oid >> _KIND_SHIFT & _KIND_MASK  # as in `is_inode`: small numbers are dealt with in place where compiled


def is_plain_data(oid: ObjectId) -> bool:
    """Of a volume kept as copies; not a strip."""
    return not oid >> _KIND_SHIFT


def is_inode(oid: ObjectId) -> bool:
    return bool(oid >> _INODE_SHIFT & 1)


def is_vmstate(oid: ObjectId) -> bool:
    return bool(oid & _VMSTATE)


def is_attribute(oid: ObjectId) -> bool:
    return bool(oid & _ATTRIBUTE)


def is_btree(oid: ObjectId) -> bool:
    return bool(oid & _BTREE)


def is_ledger(oid: ObjectId) -> bool:
    return bool(oid & _LEDGER)


class Version(NamedTuple):
    """Write number of an object: equal versions mean equal bytes.

    `epoch` is the membership in which the write was numbered, `term` the start of the cluster
    (raised at every start after a full stop), `counter` counts the writes of the object's home, in steps of
    2^VERSION_STEP_BITS: what lies between belongs to copies of which a power failure cut a large write
    (cluster/host/replay.py), each unlike every other.
    """

    epoch: int
    term: int
    counter: int


NO_VERSION: Final = Version(0, 0, 0)
VERSION_STEP_BITS: Final = 16
_new_tuple: Final = tuple.__new__
_VERSION: Final[type[Version]] = Version


def make_version(epoch: int, term: int, counter: int) -> Version:
    """As `Version(...)`, which costs a Python call more: three times in a replicated write."""
    return _new_tuple(_VERSION, (epoch, term, counter))


def version_of(epoch: int, term: int, sequence: int) -> Version:
    """The version that write number `sequence` of a home gives."""
    return _new_tuple(_VERSION, (epoch, term, sequence << VERSION_STEP_BITS))


class NodeId(NamedTuple):
    """A node's identity: 16 address bytes (IPv4 in the last four) and port; sorts as `dog node list` does."""

    address: bytes
    port: int

    def __str__(self) -> str:
        return f"{format_address(self.address)}:{self.port}"


@dataclass(frozen=True, slots=True)
class Member:
    """One node of an epoch. `space` is the capacity in bytes that weighs it, `vnodes` its points on the ring."""

    id: NodeId
    zone: int
    vnodes: int
    space: int
    incarnation: int = 0


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """One membership. `began_s` is Unix time in seconds; members are in ascending order of id."""

    epoch: Epoch
    began_s: int
    members: tuple[Member, ...]


def format_address(address: bytes) -> str:
    """Text of a 16-byte address (cli.md 2.4): IPv4 when the first twelve bytes are zero and the next is not."""
    if not any(address[:12]) and address[12]:
        return ".".join(str(byte) for byte in address[12:])
    groups = [f"{address[i] << 8 | address[i + 1]:x}" for i in range(0, 16, 2)]
    # The longest run of zero groups becomes "::" (RFC 5952).
    best, best_length, start = -1, 1, 0
    while start < 8:
        end = start
        while end < 8 and groups[end] == "0":
            end += 1
        if end - start > best_length:
            best, best_length = start, end - start
        start = max(end, start + 1)
    if best < 0:
        return ":".join(groups)
    return ":".join(groups[:best]) + "::" + ":".join(groups[best + best_length :])

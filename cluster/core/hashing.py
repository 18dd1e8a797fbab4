"""Hashes that clients compute too, so every bit of them is given (protocol.md 9, 10).

FNV-1a of 64 bits in two dresses: plain for names and attributes, one round more ("next") for what lies on the ring.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sheepdog.cluster.core.ids import NodeId, ObjectId, Vid

if TYPE_CHECKING:
    from mypy_extensions import i64  # for the compiler alone

FNV_BASIS: Final = 0xCBF29CE484222325
_PRIME_REST: Final = 0x1B3  # the prime is this and 1 << 40
_HALF: Final = 32
_HALF_MASK: Final = 0xFFFFFFFF
_VID_MASK: Final = 0xFFFFFF


def fnv1a(data: bytes, basis: int = FNV_BASIS) -> int:
    """FNV-1a, 64 bit; `basis` is the hash of what comes before `data`.

    In two halves, whose products compiled code has in registers: a number of 64 bits would be an object each time.
    """
    high: i64 = basis >> _HALF
    low: i64 = basis & _HALF_MASK
    for byte in data:
        low ^= byte
        product: i64 = low * _PRIME_REST
        high = (high * _PRIME_REST + (low << 8) + (product >> _HALF)) & _HALF_MASK
        low = product & _HALF_MASK
    return int(high) << _HALF | int(low)


def next_hash(value: int) -> int:
    """The hash after `value`: the next point of a node on the ring."""
    return fnv1a(value.to_bytes(8, "little"), value)


def ring_hash(data: bytes) -> int:
    """Where `data` lies on the ring."""
    return next_hash(fnv1a(data))


def object_hash(oid: ObjectId) -> int:
    """Where an object lies on the ring."""
    return ring_hash(oid.to_bytes(8, "little"))


def node_hash(node: NodeId) -> int:
    """Where a node's points start: address and port alone count, not its zone (protocol.md 10.2)."""
    return ring_hash(node.address + node.port.to_bytes(2, "little"))


def vid_of_name(name: bytes) -> Vid:
    """Where the search for a free vid starts (protocol.md 6.3); may be 0, which is no vid: begin at 1 then."""
    return Vid(fnv1a(name) & _VID_MASK)

"""Attributes of VDIs: small named values, each an object of its own (protocol.md 9)."""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import Final

from sheepdog.cluster.core.errors import PeerError, UsageError
from sheepdog.cluster.core.hashing import fnv1a
from sheepdog.cluster.core.limits import ATTRIBUTE_SIZE
from sheepdog.cluster.core.strings import padded, until_nul

VALUE_SIZE: Final = 65_536
_ID_MASK: Final = 0xFFFFFFFF
_ATTRIBUTE: Final = Struct("<256s256sQII256s65536s")


@dataclass(slots=True)
class Attribute:
    """The attribute `key` of the VDI `name` or of one of its snapshots; `ctime` is the VDI's creation time.

    As a request, tag and snap_id say which snapshot, or none. An attribute object without a name is a tombstone.
    """

    name: bytes
    key: bytes
    tag: bytes = b""
    snap_id: int = 0
    ctime: int = 0
    value: bytes = b""

    def pack(self) -> bytes:
        """The 66320 bytes of the object; UsageError for what does not fit."""
        if len(self.value) > VALUE_SIZE:
            raise UsageError(f"a value of {len(self.value)} bytes is too long, {VALUE_SIZE} is the limit")
        return _ATTRIBUTE.pack(
            padded(self.name),
            padded(self.tag),
            self.ctime,
            self.snap_id,
            len(self.value),
            padded(self.key),
            self.value,
        )

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> Attribute:
        """The attribute in an object or a request; PeerError for another size or a value longer than its field."""
        if len(data) != ATTRIBUTE_SIZE:
            raise PeerError(f"attribute of {len(data)} bytes")
        name, tag, ctime, snap_id, length, key, value = _ATTRIBUTE.unpack(data)
        if length > VALUE_SIZE:
            raise PeerError(f"attribute with a value of {length} bytes")
        return cls(until_nul(name), until_nul(key), until_nul(tag), snap_id, ctime, value[:length])

    def id(self) -> int:
        """Where the search for the attribute's id starts; a place taken by another attribute means the next one."""
        value = fnv1a(padded(self.name))
        for field in (padded(self.tag), self.snap_id.to_bytes(4, "little"), padded(self.key)):
            value = fnv1a(field, value)
        return value & _ID_MASK

    def same_place(self, other: Attribute) -> bool:
        """Whether both are the same attribute, whatever their values."""
        return (self.name, self.tag, self.snap_id, self.key) == (other.name, other.tag, other.snap_id, other.key)

"""One declaration per structure of the protocol: a NamedTuple for the fields, a `struct` format for the bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from struct import Struct
from typing import Any, Generic, TypeVar

Fields = TypeVar("Fields", bound=tuple[Any, ...])


class Layout(Generic[Fields]):
    """The fixed layout of one structure, little-endian.

    `struct` is public: loops that run once per request use it directly and skip the NamedTuple.
    """

    __slots__ = ("make", "size", "struct")

    def __init__(self, make: Callable[[Iterable[Any]], Fields], form: str) -> None:
        """`make` is the NamedTuple's `_make`; `form` a format without byte order, fields in the tuple's order."""
        self.struct = Struct("<" + form)
        self.size = self.struct.size
        self.make = make

    def pack(self, fields: Fields) -> bytes:
        """The structure's bytes; struct.error for a value out of its field's range."""
        return self.struct.pack(*fields)

    def unpack(self, buffer: bytes | bytearray | memoryview, offset: int = 0) -> Fields:
        """The fields of the structure at `offset`; struct.error if the buffer ends before it."""
        return self.make(self.struct.unpack_from(buffer, offset))

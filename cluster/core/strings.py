"""Names, tags and keys as the protocol carries them: opaque bytes in NUL-padded fields (protocol.md 1.5)."""

from __future__ import annotations

from sheepdog.cluster.core.errors import UsageError

NAME_SIZE = 256  # of a VDI's name, a snapshot's tag and an attribute's key


def padded(value: bytes, size: int = NAME_SIZE) -> bytes:
    """The field of `size` bytes that holds `value`; UsageError if it does not fit or contains a NUL.

    A value may fill the field: it then has no terminator.
    """
    if len(value) > size:
        raise UsageError(f"{len(value)} bytes do not fit into a field of {size} bytes")
    if b"\0" in value:
        raise UsageError("a NUL byte cannot be part of a name")
    return value.ljust(size, b"\0")


def until_nul(field: bytes | bytearray | memoryview) -> bytes:
    """The value in a field: its bytes up to the first NUL, or all of them."""
    return bytes(field).partition(b"\0")[0]

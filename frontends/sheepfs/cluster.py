"""What sheepfs asks of a cluster. The real body is `gateway.py`; tests put a volume in memory in its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sheepdog.cluster.client.address import Address

Buffer = bytes | bytearray | memoryview


class Volume(Protocol):
    """An open volume. Requests may run at the same time; overlapping ones take effect in any order.

    Failures are OSErrors with the errno that the user is to see. When the gateway goes away requests wait for it,
    bounded, then fail with EIO.
    """

    @property
    def size(self) -> int: ...

    async def read(self, offset: int, length: int) -> Buffer:
        """Exactly `length` bytes; the range is inside the volume."""

    async def write(self, offset: int, data: bytes | memoryview, durable: bool) -> None:
        """`durable`: on the disks of every copy before the return; else after the next `flush`."""

    async def flush(self) -> None:
        """Everything written before is on the disks of every copy, whichever gateway it went through."""

    async def discard(self, offset: int, length: int) -> None:
        """The range reads as zeros afterwards; whole objects are freed."""

    async def extents(self, offset: int, length: int) -> Sequence[tuple[int, int, bool]]:
        """(offset, length, holds data) of the range, ascending, without gaps."""

    def allocated_bytes(self) -> int:
        """How much of the volume has objects of its own or of an ancestor."""

    async def close(self) -> None: ...


class Cluster(Protocol):
    """The way to volumes and reports. `address` may change at any time; what is open stays as it was."""

    address: Address

    async def open(self, name: str, tag: str, object_cache: bool) -> Volume:
        """The working volume of this name, or (`tag` not empty) its snapshot of this tag or id, read-only.

        OSError: ENOENT if there is none, any other if the cluster cannot be asked.
        """

    async def report(self, noun: str, verb: str) -> str:
        """What `dog NOUN VERB` prints; empty if the cluster cannot be reached."""

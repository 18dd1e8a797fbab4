"""What sheepfs asks of a cluster. The real body is `gateway.py`; tests put a volume in memory in its place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from sheepdog.cluster.client.address import Address
from sheepdog.cluster.client.machine import Extent
from sheepdog.cluster.client.volume import ReadDone, WriteDone
from sheepdog.cluster.core.messages import Buffer

__all__ = ["Buffer", "Cluster", "Extent", "ReadDone", "Volume", "WriteDone"]


class Volume(Protocol):
    """An open volume. Requests may run at the same time; overlapping ones take effect in any order.

    Failures are OSErrors with the errno that the user is to see. When the gateway goes away requests wait for it,
    bounded, then fail with EIO. Every range lies inside the volume.
    """

    @property
    def size(self) -> int: ...

    @property
    def read_only(self) -> bool: ...

    def submit_read(self, offset: int, length: int, done: ReadDone) -> None:
        """Exactly `length` bytes; `done` comes once, perhaps before this returns."""

    def submit_write(self, offset: int, data: Buffer, durable: bool, done: WriteDone) -> None:
        """`durable`: on the disks of every copy before `done`; else after the next `flush`. `data` is borrowed."""

    async def read(self, offset: int, length: int) -> Buffer: ...

    async def write(self, offset: int, data: Buffer, durable: bool = False) -> None: ...

    async def flush(self) -> None:
        """Everything written before is on the disks of every copy, whichever gateway it went through."""

    async def zero(self, offset: int, length: int) -> None:
        """The range reads as zeros afterwards; whole objects are freed."""

    async def resize(self, size: int) -> None:
        """Grow to this many bytes."""

    def allocated_bytes(self) -> int:
        """How much of the volume is backed by objects, its own or an ancestor's."""

    def extents(self, offset: int, length: int) -> Iterable[Extent]:
        """What is allocated in a range: ascending, without gaps."""

    async def move(self, address: Address) -> None:
        """Go on through another gateway, requests in flight included. OSError, and no change, if that cannot be."""

    async def close(self) -> None:
        """Flush and end the connection."""


class Cluster(Protocol):
    """The way to volumes and reports. `address` may change at any time; what is open stays as it was."""

    address: Address

    async def open(self, name: str, tag: str, object_cache: bool) -> Volume:
        """The working volume of this name, or (`tag` not empty) its snapshot of this tag or id, read-only.

        OSError: ENOENT if there is none, any other if the cluster cannot be asked.
        """

    async def report(self, noun: str, verb: str) -> str:
        """What `dog NOUN VERB` prints; empty if the cluster cannot be reached."""

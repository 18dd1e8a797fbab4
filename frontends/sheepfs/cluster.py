"""What sheepfs asks of a cluster. The real body is `gateway.py`; tests put a volume in memory in its place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from sheepdog.cluster.client.address import Address
from sheepdog.cluster.client.machine import Extent
from sheepdog.cluster.client.volume import ReadDone, WriteDone
from sheepdog.cluster.core.messages import Buffer

__all__ = [
    "Buffer",
    "Cluster",
    "Extent",
    "NodeSpace",
    "Outcome",
    "ReadDone",
    "Volume",
    "VolumeInfo",
    "WriteDone",
]


@dataclass(frozen=True, slots=True)
class VolumeInfo:
    """One row of `dog vdi list`."""

    vid: int
    name: str
    snap_id: int
    tag: str  # empty: none
    is_snapshot: bool
    size: int  # bytes
    changed_ns: int  # when it was created, or frozen
    redundancy: str  # `3` copies, or `4:2`


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a `dog` command ended with."""

    status: int
    text: str
    complaint: str  # on stderr


@dataclass(frozen=True, slots=True)
class NodeSpace:
    """Capacity of one node, in bytes."""

    node: str
    size: int
    free: int


class Volume(Protocol):
    """An open volume. Requests may run at the same time; overlapping ones take effect in any order.

    Failures are OSErrors with the errno that the user is to see. When the gateway goes away requests wait for it,
    bounded, then fail with EIO. Every range lies inside the volume.
    """

    @property
    def size(self) -> int: ...

    @property
    def read_only(self) -> bool: ...

    @property
    def is_lost(self) -> bool:
        """Somebody else has taken its exclusive lock: every request fails from now on."""

    def submit_read(self, offset: int, length: int, done: ReadDone) -> None:
        """Exactly `length` bytes; `done` comes once, perhaps before this returns."""

    def submit_write(self, offset: int, data: Buffer, durable: bool, done: WriteDone) -> None:
        """`durable`: on the disks of every copy before `done`; else after the next `flush`. `data` is borrowed."""

    def plain_read(self, offset: int, length: int) -> tuple[Address, bytearray] | None:
        """The one request whose successful answer is exactly these bytes, and the gateway to send it to just now.

        None if it takes more than that; `submit_read` always works.
        """

    async def read(self, offset: int, length: int) -> Buffer: ...

    async def write(self, offset: int, data: Buffer, durable: bool = False) -> None: ...

    async def flush(self) -> None:
        """Everything written before is on the disks of every copy, whichever gateway it went through."""

    async def zero(self, offset: int, length: int) -> None:
        """The range reads as zeros afterwards; whole objects are freed."""

    async def resize(self, size: int) -> None:
        """Grow to this many bytes."""

    async def refresh(self) -> None:
        """Learn the size that somebody else has given it."""

    def allocated_bytes(self) -> int:
        """How much of the volume is backed by objects, its own or an ancestor's."""

    def extents(self, offset: int, length: int) -> Iterable[Extent]:
        """What is allocated in a range: ascending, without gaps."""

    async def move(self, address: Address) -> None:
        """Go on through another gateway, requests in flight included. OSError, and no change, if that cannot be."""

    async def settle(self) -> None:
        """Everything written is on the disks and in the volume, as after `close`; it stays open in any case."""

    async def close(self) -> None:
        """`settle`, and end the connection whatever comes of that."""


class Cluster(Protocol):
    """The way to volumes and reports. `address` may change at any time; what is open stays as it was."""

    address: Address

    async def open(self, name: str, snap_id: int, object_cache: bool) -> Volume:
        """The working volume of this name, or with a `snap_id` that snapshot of it, read-only.

        With `object_cache` its gateway may keep what is read.
        OSError: ENOENT if there is none, any other if the cluster cannot be asked.
        """

    async def open_shared(self, name: str) -> Volume:
        """The working volume, which may be open through other gateways too; it stays with this one.

        OSError: EBUSY while somebody has it for himself, else as `open`.
        """

    async def open_exclusive(self, name: str, object_cache: bool) -> Volume:
        """The working volume, which nobody else can lock until it is closed, where the cluster enforces locks.

        If that ends all the same, because the gateway has died and somebody was quicker, every request fails.
        OSError: EBUSY while somebody else has a lock, else as `open`.
        """

    async def dog(self, *words: str) -> Outcome:
        """Run a `dog` command against the cluster. OSError if nobody is there."""

    async def catalog(self) -> list[VolumeInfo]:
        """Every volume and snapshot, by ascending vid. OSError if nobody is there."""

    async def space(self) -> list[NodeSpace]:
        """Every node that stores objects and answers. OSError if nobody is there."""

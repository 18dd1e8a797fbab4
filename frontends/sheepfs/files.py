"""Open volumes as open files: what a byte range of a file means for a volume (cli.md 3.2)."""

from __future__ import annotations

import errno
import os
import time
from dataclasses import dataclass

from sheepdog.cluster.client.address import Address
from sheepdog.frontends.sheepfs.cluster import Buffer, ReadDone, Volume, WriteDone
from sheepdog.frontends.sheepfs.transport import error
from sheepdog.frontends.sheepfs.tree import Node

DURABLE_FLAGS = os.O_SYNC | os.O_DSYNC


class Settings:
    """What `config/` shows and changes; read whenever a file or a volume is opened."""

    def __init__(self, page_cache: bool = False, object_cache: bool = False) -> None:
        self.page_cache = page_cache
        self.object_cache = object_cache


@dataclass(slots=True)
class Counters:
    """What went through the file of a volume. Failures are counted where they are answered."""

    reads: int = 0
    read_bytes: int = 0
    writes: int = 0
    written_bytes: int = 0
    flushes: int = 0
    discards: int = 0
    discarded_bytes: int = 0


class VolumeNode(Node):
    """A file whose bytes are those of a volume."""

    volume: Volume
    size: int

    def __init__(self) -> None:
        self.opened = 0
        self.mtime_ns = time.time_ns()
        self.counters = Counters()

    def released(self) -> None:
        """One of the open files is closed."""
        self.opened -= 1


class VolumeHandle:
    """One open file of a volume.

    `clip`, `submit_read` and `submit_write` are for transports without a coroutine for each request; `read` and `write`
    do the same. At the end reads give less, and so do writes; from there on reads give nothing, writes ENOSPC.
    """

    quick = True

    def __init__(self, node: VolumeNode, durable: bool, direct: bool) -> None:
        self._node = node
        self._counters = node.counters
        self._durable = durable
        self.direct = direct
        node.opened += 1

    def clip(self, offset: int, length: int) -> int:
        """How much of the range lies inside the volume; may be negative beyond its end."""
        size = self._node.size
        return length if offset + length <= size else size - offset

    def plain_read(self, offset: int, length: int) -> tuple[Address, bytearray] | None:
        """The one request that reads a range that lies inside the volume, and whom to ask; None if it takes more."""
        return self._node.volume.plain_read(offset, length)

    def count_read(self, length: int) -> None:
        """A read that did not come by `submit_read`."""
        self._counters.reads += 1
        self._counters.read_bytes += length

    def submit_read(self, offset: int, length: int, done: ReadDone) -> None:
        counters = self._counters
        counters.reads += 1
        counters.read_bytes += length
        self._node.volume.submit_read(offset, length, done)

    def submit_write(self, offset: int, data: Buffer, durable: bool, done: WriteDone) -> None:
        node, counters = self._node, self._counters
        node.mtime_ns = time.time_ns()
        counters.writes += 1
        counters.written_bytes += len(data)
        node.volume.submit_write(offset, data, durable or self._durable, done)

    async def read(self, offset: int, length: int) -> Buffer:
        length = self.clip(offset, length)
        if length <= 0:
            return b""
        self._counters.reads += 1
        self._counters.read_bytes += length
        return await self._node.volume.read(offset, length)

    async def write(self, offset: int, data: Buffer) -> int:
        length = self.clip(offset, len(data))
        if length <= 0 < len(data):
            raise error(errno.ENOSPC)
        self._counters.writes += 1
        self._counters.written_bytes += length
        await self._node.volume.write(offset, data[:length], self._durable)
        self._node.mtime_ns = time.time_ns()
        return length

    async def fsync(self) -> None:
        self._counters.flushes += 1
        await self._node.volume.flush()

    async def zero(self, offset: int, length: int) -> None:
        length = self.clip(offset, length)
        if length > 0:
            self._counters.discards += 1
            self._counters.discarded_bytes += length
            await self._node.volume.zero(offset, length)
            self._node.mtime_ns = time.time_ns()

    def seek(self, offset: int, data: bool) -> int:
        """Start of the next data, or of the next hole (the end of the file counts as one), from `offset` on."""
        node = self._node
        if not 0 <= offset < node.size:
            raise error(errno.ENXIO)
        for extent in node.volume.extents(offset, node.size - offset):
            if extent.allocated == data:
                return extent.offset
        if data:
            raise error(errno.ENXIO)
        return node.size

    def release(self) -> None:
        self._node.released()

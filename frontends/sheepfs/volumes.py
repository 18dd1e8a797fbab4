"""The volumes that are mounted, and what reading and writing their files means (cli.md 3.2).

A mounted volume outlives its connection: the client waits for a gateway that went away, bounded, and an order to use
another gateway carries the requests in flight over to it.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import stat
import time

from sheepdog.cluster.client.address import Address
from sheepdog.frontends.sheepfs.cluster import Buffer, Cluster, Volume, WriteDone
from sheepdog.frontends.sheepfs.transport import NAME_MAX, Attributes, error
from sheepdog.frontends.sheepfs.tree import Node, Tree

log = logging.getLogger("sheepfs")

CLOSE_LIMIT_S = 10.0  # flush of a volume that is being unmounted: an absent cluster must not hold up the unmount
DURABLE_FLAGS = os.O_SYNC | os.O_DSYNC


class MountedVolume(Node):
    """One file in `volume/`. Its size is the volume's at the time of mounting, until it is made larger here."""

    mode = stat.S_IFREG | 0o644
    attribute_seconds = 1

    def __init__(self, settings: Settings, name: str, volume: Volume) -> None:
        self.name = name
        self.size = volume.size
        self.volume = volume
        self.opened = 0
        self.mtime_ns = time.time_ns()
        self._settings = settings

    def attributes(self) -> Attributes:
        described = self._described(self.size, mtime_ns=self.mtime_ns)
        described.blocks = self.volume.allocated_bytes() // 512
        return described

    async def open(self, flags: int) -> VolumeHandle:
        return VolumeHandle(self, durable=bool(flags & DURABLE_FLAGS), direct=not self._settings.page_cache)

    async def truncate(self, size: int) -> None:
        """A larger size resizes the volume; a smaller one succeeds and changes nothing (`cp IMAGE volume/x` says 0)."""
        if size > self.size:
            await self.volume.resize(size)
            self.size = self.volume.size

    async def close(self) -> None:
        """Flush and end the connection, as far as that works in `CLOSE_LIMIT_S`."""
        try:
            async with asyncio.timeout(CLOSE_LIMIT_S):
                await self.volume.close()
        except (OSError, TimeoutError) as problem:
            log.warning("volume %s: not flushed when it was unmounted: %s", self.name, problem)


class VolumeHandle:
    """One open file of a volume.

    `clip`, `submit_read` and `submit_write` are for transports without a coroutine for each request; `read` and `write`
    do the same. At the end reads give less, and so do writes; from there on reads give nothing, writes ENOSPC.
    """

    quick = True

    def __init__(self, node: MountedVolume, durable: bool, direct: bool) -> None:
        self._node = node
        self._durable = durable
        self.direct = direct
        self.submit_read = node.volume.submit_read
        node.opened += 1

    def clip(self, offset: int, length: int) -> int:
        """How much of the range lies inside the volume; may be negative beyond its end."""
        size = self._node.size
        return length if offset + length <= size else size - offset

    def submit_write(self, offset: int, data: Buffer, durable: bool, done: WriteDone) -> None:
        node = self._node
        node.mtime_ns = time.time_ns()
        node.volume.submit_write(offset, data, durable or self._durable, done)

    async def read(self, offset: int, length: int) -> Buffer:
        length = self.clip(offset, length)
        return await self._node.volume.read(offset, length) if length > 0 else b""

    async def write(self, offset: int, data: Buffer) -> int:
        length = self.clip(offset, len(data))
        if length <= 0 < len(data):
            raise error(errno.ENOSPC)
        await self._node.volume.write(offset, data[:length], self._durable)
        self._node.mtime_ns = time.time_ns()
        return length

    async def fsync(self) -> None:
        await self._node.volume.flush()

    async def zero(self, offset: int, length: int) -> None:
        length = self.clip(offset, length)
        if length > 0:
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
        self._node.opened -= 1


class Settings:
    """What `config/` shows and changes; read whenever a file or a volume is opened."""

    def __init__(self, page_cache: bool = False, object_cache: bool = False) -> None:
        self.page_cache = page_cache
        self.object_cache = object_cache


class Volumes:
    """The mounted volumes by name."""

    def __init__(self, cluster: Cluster, settings: Settings) -> None:
        self._cluster = cluster
        self._settings = settings
        self._mounted: dict[str, MountedVolume] = {}
        self._changing = asyncio.Lock()
        self._tree: Tree | None = None

    def attach(self, tree: Tree) -> None:
        """The tree that numbers the volumes (it is built after the files that call this object)."""
        self._tree = tree

    def __contains__(self, node: Node) -> bool:
        return isinstance(node, MountedVolume)

    def by_name(self) -> dict[str, Node]:
        return dict(self._mounted)

    async def mount(self, name: str) -> None:
        """Show the working volume of this name. Already there: no-op. EINVAL if there is none, EIO if none answers."""
        if not name or "/" in name or name in (".", "..") or len(name.encode()) > NAME_MAX:
            raise error(errno.EINVAL)
        async with self._changing:
            if name in self._mounted:
                return
            try:
                volume = await self._cluster.open(name, "", self._settings.object_cache)
            except OSError as problem:
                log.error("volume %s: %s", name, problem)
                raise error(errno.EINVAL if problem.errno == errno.ENOENT else errno.EIO) from None
            node = MountedVolume(self._settings, name, volume)
            if self._tree:
                self._tree.add(node)
            self._mounted[name] = node

    async def unmount(self, name: str) -> None:
        """Take the file away. EINVAL if it is not there, EBUSY while it is open."""
        async with self._changing:
            node = self._mounted.get(name)
            if node is None:
                raise error(errno.EINVAL)
            if node.opened:
                raise error(errno.EBUSY)
            del self._mounted[name]
            if self._tree:
                self._tree.remove(node)
            await node.close()

    async def move(self, address: Address) -> None:
        """Use another gateway, for all volumes. EINVAL if one cannot be opened there; the new setting stays."""
        self._cluster.address = address
        failed = False
        for node in list(self._mounted.values()):
            try:
                await node.volume.move(address)
            except OSError as problem:
                log.error("volume %s: %s", node.name, problem)
                failed = True
        if failed:
            raise error(errno.EINVAL)

    async def close(self) -> None:
        """Flush and close everything; the file system is going away."""
        await asyncio.gather(*(node.close() for node in self._mounted.values()))
        self._mounted.clear()

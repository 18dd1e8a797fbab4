"""The volumes that are mounted, and what reading and writing their files means (cli.md 3.2).

A mounted volume outlives its connection: the client waits for a gateway that went away, bounded, and an order to use
another gateway carries the requests in flight over to it. The size stays that of the time of mounting.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import stat
import time

from sheepdog.cluster.client.address import Address
from sheepdog.frontends.sheepfs.cluster import Buffer, Cluster, Volume
from sheepdog.frontends.sheepfs.transport import NAME_MAX, Attributes, error
from sheepdog.frontends.sheepfs.tree import Node, Tree

log = logging.getLogger("sheepfs")

CLOSE_LIMIT_S = 10.0  # flush of a volume that is being unmounted: an absent cluster must not hold up the unmount
DURABLE_FLAGS = os.O_SYNC | os.O_DSYNC


class MountedVolume(Node):
    """One file in `volume/`."""

    mode = stat.S_IFREG | 0o644
    attribute_seconds = 1

    def __init__(self, cluster: Cluster, settings: Settings, name: str, volume: Volume) -> None:
        self.name = name
        self.size = volume.size
        self.opened = 0
        self._cluster = cluster
        self._settings = settings
        self._volume = volume
        self._mtime_ns = time.time_ns()

    def attributes(self) -> Attributes:
        described = self._described(self.size, mtime_ns=self._mtime_ns)
        described.blocks = -(-self._volume.allocated_bytes() // 512)
        return described

    async def open(self, flags: int) -> VolumeHandle:
        return VolumeHandle(self, durable=bool(flags & DURABLE_FLAGS), direct=not self._settings.page_cache)

    async def read(self, offset: int, length: int) -> Buffer:
        """What there is of the range: less at the end of the volume, nothing from there on."""
        length = min(length, self.size - offset)
        if length <= 0:
            return b""
        volume = self._volume
        try:
            return await volume.read(offset, length)
        except OSError:
            if not self._moved_from(volume):
                raise
        return await self._volume.read(offset, length)

    async def write(self, offset: int, data: bytes | memoryview, durable: bool) -> int:
        """Bytes written: fewer at the end of the volume; ENOSPC from there on."""
        room = self.size - offset
        if len(data) > room:
            if room <= 0:
                raise error(errno.ENOSPC)
            data = data[:room]
        volume = self._volume
        try:
            await volume.write(offset, data, durable)
        except OSError:
            if not self._moved_from(volume):
                raise
            await self._volume.write(offset, data, durable)
        self._mtime_ns = time.time_ns()
        return len(data)

    async def flush(self) -> None:
        volume = self._volume
        try:
            await volume.flush()
        except OSError:
            if not self._moved_from(volume):
                raise
            await self._volume.flush()

    async def discard(self, offset: int, length: int) -> None:
        length = min(length, self.size - offset)
        if length <= 0:
            return
        volume = self._volume
        try:
            await volume.discard(offset, length)
        except OSError:
            if not self._moved_from(volume):
                raise
            await self._volume.discard(offset, length)

    async def seek(self, offset: int, data: bool) -> int:
        """Start of the next data, or of the next hole (the end of the file counts as one), from `offset` on."""
        if not 0 <= offset < self.size:
            raise error(errno.ENXIO)
        for start, _, holds_data in await self._volume.extents(offset, self.size - offset):
            if holds_data == data:
                return start
        if data:
            raise error(errno.ENXIO)
        return self.size

    async def move(self) -> None:
        """Open the volume anew at the address now set; requests in flight are repeated there. OSError if that fails."""
        volume = await self._cluster.open(self.name, "", self._settings.object_cache)
        if volume.size < self.size:
            await volume.close()
            raise OSError(errno.EINVAL, f"the volume is smaller now ({volume.size} bytes) than when it was mounted")
        old, self._volume = self._volume, volume
        await old.close()

    async def close(self) -> None:
        """Flush, as far as that works in `CLOSE_LIMIT_S`, and close the connection."""
        try:
            async with asyncio.timeout(CLOSE_LIMIT_S):
                await self._volume.flush()
        except (OSError, TimeoutError) as problem:
            log.warning("volume %s: not flushed when it was unmounted: %s", self.name, problem)
        await self._volume.close()

    def _moved_from(self, volume: Volume) -> bool:
        """Whether a request failed only because its connection was closed by `move`."""
        return volume is not self._volume


class VolumeHandle:
    """One open file of a volume."""

    def __init__(self, volume: MountedVolume, durable: bool, direct: bool) -> None:
        self._volume = volume
        self._durable = durable
        self.direct = direct
        # The hot call goes to the volume without a frame in between.
        self.read = volume.read
        self.fsync = volume.flush
        self.discard = volume.discard
        self.seek = volume.seek
        volume.opened += 1

    async def write(self, offset: int, data: bytes | memoryview) -> int:
        return await self._volume.write(offset, data, self._durable)

    def release(self) -> None:
        self._volume.opened -= 1


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
            node = MountedVolume(self._cluster, self._settings, name, volume)
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
                await node.move()
            except OSError as problem:
                log.error("volume %s: %s", node.name, problem)
                failed = True
        if failed:
            raise error(errno.EINVAL)

    async def close(self) -> None:
        """Flush and close everything; the file system is going away."""
        await asyncio.gather(*(node.close() for node in self._mounted.values()))
        self._mounted.clear()

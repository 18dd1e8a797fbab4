"""The volumes that are mounted: the files of `volume/`.

A mounted volume outlives its connection: the client waits for a gateway that went away, bounded, and an order to use
another gateway carries the requests in flight over to it.
"""

from __future__ import annotations

import asyncio
import enum
import errno
import logging
import os
import stat

from sheepdog.cluster.client.address import Address
from sheepdog.frontends.sheepfs.cluster import Cluster, Volume
from sheepdog.frontends.sheepfs.files import DURABLE_FLAGS, Settings, VolumeHandle, VolumeNode
from sheepdog.frontends.sheepfs.transport import NAME_MAX, Attributes, error
from sheepdog.frontends.sheepfs.tree import Directory, Node, Numbers

log = logging.getLogger("sheepfs")

COPIES_ATTRIBUTE = "user.sheepdog.copies"
READ_ONLY_MODE = stat.S_IFREG | 0o444
CLOSE_LIMIT_S = 10.0  # last flush of a volume: an absent cluster must not hold up whoever shuts a host down for longer


class Use(enum.Enum):
    """Who else may have a volume open while it is here."""

    UNGUARDED = enum.auto()  # nobody looks
    SHARED = enum.auto()  # others that share it
    EXCLUSIVE = enum.auto()  # nobody who looks for locks


class MountedVolume(VolumeNode):
    """One file in `volume/`. Its size is the volume's as of the last order to mount it, or larger if it grew here.

    A snapshot (`NAME:TAG`) can only be read.
    """

    mode = stat.S_IFREG | 0o644
    attribute_seconds = 1

    def __init__(
        self, cluster: Cluster, settings: Settings, name: str, volume: Volume, use: Use = Use.UNGUARDED
    ) -> None:
        super().__init__()
        self.use = use
        self.leaving = False
        """It is being unmounted: nobody opens it any more."""
        self._cluster = cluster
        self.name = name
        self.size = volume.size
        self.volume = volume
        self._settings = settings
        if volume.read_only:
            self.mode = READ_ONLY_MODE

    def attributes(self) -> Attributes:
        described = self._described(self.size, mtime_ns=self.mtime_ns)
        described.blocks = self.volume.allocated_bytes() // 512
        return described

    async def open(self, flags: int) -> VolumeHandle:
        if self.volume.read_only and flags & os.O_ACCMODE != os.O_RDONLY:
            raise error(errno.EROFS)
        if self.leaving:
            raise error(errno.EBUSY)
        return VolumeHandle(self, durable=bool(flags & DURABLE_FLAGS), direct=not self._settings.page_cache)

    async def truncate(self, size: int) -> None:
        """A larger size resizes the volume; a smaller one succeeds and changes nothing (`cp IMAGE volume/x` says 0)."""
        if self.volume.read_only:
            raise error(errno.EROFS)
        if size > self.size:
            await self.volume.resize(size)
            self.size = self.volume.size

    async def refresh(self) -> None:
        """Somebody else may have made the volume larger."""
        await self.volume.refresh()
        self.size = self.volume.size

    def attribute_names(self) -> list[str]:
        return [COPIES_ATTRIBUTE]

    async def get_attribute(self, name: str) -> bytes:
        """The redundancy as `dog vdi list` shows it: `3`, or `4:2`."""
        if name != COPIES_ATTRIBUTE:
            raise error(errno.ENODATA)
        for info in await self._cluster.catalog():
            if info.name == self.name and not info.is_snapshot:
                return info.redundancy.encode()
        raise error(errno.ENODATA)

    async def set_attribute(self, name: str, value: bytes) -> None:
        """Another number of copies, as `dog vdi alter-copy` sets it. EINVAL for what is refused."""
        copies = value.decode(errors="replace").strip()
        if name != COPIES_ATTRIBUTE:
            raise error(errno.EOPNOTSUPP)
        if not (copies.isascii() and copies.isdigit()):
            raise error(errno.EINVAL)
        outcome = await self._cluster.dog("vdi", "alter-copy", "-f", "-c", copies, "--", self.name)
        if outcome.status:
            log.error("volume %s: %s", self.name, outcome.complaint.strip())
            raise error(errno.EINVAL)

    async def settle(self) -> None:
        """What was written is durable afterwards; EIO if that cannot be had in `CLOSE_LIMIT_S`."""
        try:
            async with asyncio.timeout(CLOSE_LIMIT_S):
                await self.volume.settle()
        except OSError as problem:  # a TimeoutError is one
            log.error("volume %s cannot be flushed: %s", self.name, _words(problem))
            raise error(errno.EIO) from None

    async def close(self) -> None:
        """Flush and end the connection, as far as that works in `CLOSE_LIMIT_S`."""
        try:
            async with asyncio.timeout(CLOSE_LIMIT_S):
                await self.volume.close()
        except OSError as problem:
            log.warning("volume %s: not flushed when it was closed: %s", self.name, _words(problem))


def _words(problem: OSError) -> str:
    return str(problem) or f"no answer within {CLOSE_LIMIT_S:g} s"


class VolumeDirectory(Directory):
    """`volume/`."""

    def __init__(self, volumes: Volumes) -> None:
        super().__init__({}, live=volumes.by_name)
        self._volumes = volumes

    async def unlink(self, name: str) -> None:
        """Deletes the volume where that was allowed; else EPERM, as for snapshots."""
        if self.child(name) is None:
            raise error(errno.ENOENT)
        if not self._volumes.may_remove:
            log.error("volume %s is not deleted: sheepfs was started without --allow-remove", name)
            raise error(errno.EPERM)
        await self._volumes.delete(name)


class Volumes:
    """The mounted volumes by name."""

    def __init__(self, cluster: Cluster, settings: Settings, numbers: Numbers, may_remove: bool) -> None:
        self.may_remove = may_remove  # volumes, by removing their files
        self._cluster = cluster
        self._settings = settings
        self._numbers = numbers
        self._mounted: dict[str, MountedVolume] = {}
        self._changing = asyncio.Lock()

    def by_name(self) -> dict[str, Node]:
        return dict(self._mounted)

    def mounted(self) -> list[MountedVolume]:
        return list(self._mounted.values())

    async def mount(self, name: str) -> None:
        """Show the working volume of this name, with the size that it has now, or the snapshot `NAME:TAG`.

        EINVAL if there is none, EIO if no node answers.
        """
        await self._show(name, Use.UNGUARDED)

    async def share(self, name: str) -> None:
        """The same for a volume that other hosts write, too. EBUSY if it is here, or open elsewhere, not shared."""
        await self._show(name, Use.SHARED)

    async def lock(self, name: str) -> None:
        """The same for a volume that nobody else shall have. EBUSY if it is here, not locked, or locked elsewhere."""
        await self._show(name, Use.EXCLUSIVE)

    async def _show(self, name: str, use: Use) -> None:
        if not name or "/" in name or name in (".", "..") or len(name.encode()) > NAME_MAX:
            raise error(errno.EINVAL)
        async with self._changing:
            try:
                if name in self._mounted:
                    if self._mounted[name].use is not use:
                        raise error(errno.EBUSY)
                    await self._mounted[name].refresh()
                    return
                volume = await self._open(name, use)
            except OSError as problem:
                log.error("volume %s: %s", name, problem)
                told = {errno.ENOENT: errno.EINVAL, errno.EBUSY: errno.EBUSY}
                raise error(told.get(problem.errno or 0, errno.EIO)) from None
            node = MountedVolume(self._cluster, self._settings, name, volume, use)
            self._numbers.add(node)
            self._mounted[name] = node

    async def _open(self, name: str, use: Use) -> Volume:
        """A volume's own name may have a colon in it: that one is meant first."""
        cache = self._settings.object_cache
        if use is Use.SHARED:
            return await self._cluster.open_shared(name)
        if use is Use.EXCLUSIVE:
            return await self._cluster.open_exclusive(name, cache)
        try:
            return await self._cluster.open(name, 0, cache)
        except OSError as problem:
            family, colon, tag = name.rpartition(":")
            if problem.errno != errno.ENOENT or not colon:
                raise
        for info in await self._cluster.catalog():
            if info.is_snapshot and info.name == family and tag in (info.tag, str(info.snap_id)):
                return await self._cluster.open(family, info.snap_id, cache)
        raise error(errno.ENOENT)

    async def unmount(self, name: str) -> None:
        """Flush the volume and take its file away. EINVAL if it is not there, EBUSY while it is open.

        EIO if it cannot be flushed: it stays, so that this can be tried again, unless somebody else has taken its lock.
        """
        async with self._changing:
            node = self._mounted.get(name)
            if node is None:
                raise error(errno.EINVAL)
            if node.opened:
                raise error(errno.EBUSY)
            try:
                node.leaving = True
                if not node.volume.read_only:
                    await node.settle()
            except OSError:
                node.leaving = False
                if node.volume.is_lost:
                    await self._drop(node)
                raise
            await self._drop(node)

    async def _drop(self, node: MountedVolume) -> None:
        del self._mounted[node.name]
        self._numbers.remove(node)
        await node.close()

    async def delete(self, name: str) -> None:
        """Take the file away and delete the volume. EBUSY while it is open, EPERM for a snapshot that is shown here."""
        node = self._mounted.get(name)
        if node is not None and node.volume.read_only:
            raise error(errno.EPERM)
        await self.unmount(name)
        outcome = await self._cluster.dog("vdi", "delete", "--", name)
        if outcome.status:
            log.error("dog vdi delete %s: %s", name, outcome.complaint.strip())
            raise error(errno.EIO)

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

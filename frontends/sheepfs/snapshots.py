"""`snapshot/NAME/TAG-or-ID`: the snapshots of every volume as read-only files, there without mounting anything.

A directory for each volume, in it a file for each snapshot, listed under its tag, or under its id where it has no tag;
both names are found. `mkdir snapshot/NAME/TAG` takes one (as other file systems with snapshots do it); `rm` of one
is refused unless it was allowed at the start.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import time
from collections.abc import Iterable

from sheepdog.frontends.sheepfs.cluster import Cluster, VolumeInfo
from sheepdog.frontends.sheepfs.files import Settings, VolumeHandle, VolumeNode
from sheepdog.frontends.sheepfs.transport import Attributes, error, log
from sheepdog.frontends.sheepfs.tree import Directory, Node, Numbers

CATALOG_MEMORY_S = 2.0  # one look at the cluster serves a listing with all its look-ups
IDLE_S = 5.0  # a snapshot's connection stays open this long after the last close
DOG_EXISTS, DOG_MISSING = 3, 5  # exit statuses of `dog` (cli.md 2.1)


class SnapshotFile(VolumeNode):
    """One snapshot. Its volume is open while the file is, and a little longer."""

    mode = stat.S_IFREG | 0o444
    attribute_seconds = 60  # a snapshot never changes

    def __init__(self, cluster: Cluster, settings: Settings, info: VolumeInfo) -> None:
        super().__init__()
        self.info = info
        self.size = info.size
        self.mtime_ns = info.changed_ns
        self._cluster = cluster
        self._settings = settings
        self._opening = asyncio.Lock()
        self._is_open = False

    def attributes(self) -> Attributes:
        return self._described(self.size, mtime_ns=self.info.changed_ns)

    async def open(self, flags: int) -> VolumeHandle:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise error(errno.EROFS)
        async with self._opening:
            if not self._is_open:
                self.volume = await self._cluster.open(self.info.name, self.info.snap_id, self._settings.object_cache)
                self._is_open = True
            return VolumeHandle(self, durable=False, direct=not self._settings.page_cache)

    async def truncate(self, size: int) -> None:
        raise error(errno.EROFS)

    def released(self) -> None:
        super().released()
        if not self.opened:
            asyncio.get_running_loop().call_later(IDLE_S, self._close_if_idle)

    def _close_if_idle(self) -> None:
        if not self.opened:
            self._closing = asyncio.get_running_loop().create_task(self.close())

    async def close(self) -> None:
        async with self._opening:
            if self._is_open and not self.opened:
                self._is_open = False
                await self.volume.close()


class _Taken(Directory):
    """What mkdir answers with, since that must be a directory. The next look-up of the name finds the file."""

    entry_seconds = attribute_seconds = 0


class SnapshotsOf(Directory):
    """`snapshot/NAME`."""

    entry_seconds = 1  # volumes come and go

    def __init__(self, snapshots: Snapshots, name: str) -> None:
        super().__init__({})
        self.name = name
        self._snapshots = snapshots

    async def refresh(self) -> None:
        await self._snapshots.refresh()

    def child(self, name: str) -> Node | None:
        return self._snapshots.find(self.name, name)

    def entries(self) -> Iterable[tuple[str, Node]]:
        return self._snapshots.listing(self.name)

    async def make_directory(self, name: str) -> Node:
        return await self._snapshots.take(self.name, name)

    async def unlink(self, name: str) -> None:
        await self._snapshots.remove(self.name, name)


class Snapshots(Directory):
    """`snapshot/`: knows every snapshot of the cluster as of a moment ago."""

    def __init__(self, cluster: Cluster, settings: Settings, numbers: Numbers, may_remove: bool) -> None:
        super().__init__({})
        self._cluster = cluster
        self._settings = settings
        self._numbers = numbers
        self._may_remove = may_remove
        self._families: dict[str, SnapshotsOf] = {}
        self._files: dict[int, SnapshotFile] = {}  # by vid
        self._refreshing = asyncio.Lock()
        self._known_at = float("-inf")

    async def refresh(self) -> None:
        """Look at the cluster unless that was only just done. EIO if it cannot be reached."""
        async with self._refreshing:
            if time.monotonic() - self._known_at < CATALOG_MEMORY_S:
                return
            try:
                self._learn(await self._cluster.catalog())
            except OSError as problem:
                log.error("cannot list the volumes: %s", problem)
                raise error(errno.EIO) from None
            self._known_at = time.monotonic()

    def _learn(self, catalog: list[VolumeInfo]) -> None:
        snapshots = {info.vid: info for info in catalog if info.is_snapshot}
        for vid in [vid for vid in self._files if vid not in snapshots]:
            self._numbers.remove(self._files.pop(vid))
        for vid, info in snapshots.items():
            known = self._files.get(vid)
            if known is None or known.info != info:
                if known is not None:
                    self._numbers.remove(known)
                self._files[vid] = SnapshotFile(self._cluster, self._settings, info)
                self._numbers.add(self._files[vid])
        names = {info.name: None for info in catalog}
        for name in [name for name in self._families if name not in names]:
            self._numbers.remove(self._families.pop(name))
        for name in names:
            if name not in self._families:
                self._families[name] = SnapshotsOf(self, name)
                self._numbers.add(self._families[name])

    def child(self, name: str) -> Node | None:
        return self._families.get(name)

    def entries(self) -> Iterable[tuple[str, Node]]:
        return [(name, node) for name, node in self._families.items() if _can_be_a_name(name)]

    def listing(self, family: str) -> list[tuple[str, SnapshotFile]]:
        """Each snapshot once, in the order in which they were taken."""
        found: dict[str, SnapshotFile] = {}
        for file in self._of(family):
            tag = file.info.tag
            name = tag if _can_be_a_name(tag) and tag not in found else str(file.info.snap_id)
            found[name] = file
        return list(found.items())

    def find(self, family: str, name: str) -> SnapshotFile | None:
        return next((file for file in self._of(family) if name in (file.info.tag, str(file.info.snap_id))), None)

    def _of(self, family: str) -> list[SnapshotFile]:
        return sorted(
            (file for file in self._files.values() if file.info.name == family), key=lambda file: file.info.snap_id
        )

    async def take(self, family: str, tag: str) -> Node:
        """A new snapshot. EEXIST for a tag in use, EINVAL for one that is a number."""
        if not _can_be_a_name(tag) or tag.isdigit():
            raise error(errno.EINVAL)
        await self._order("snapshot", "-s", tag, "--", family)
        return self._numbers.passing(_Taken({}))

    async def remove(self, family: str, name: str) -> None:
        file = self.find(family, name)
        if file is None:
            raise error(errno.ENOENT)
        if not self._may_remove:
            log.error("snapshot %s of %s is not removed: sheepfs was started without --allow-remove", name, family)
            raise error(errno.EPERM)
        if file.opened:
            raise error(errno.EBUSY)
        await self._order("delete", "-s", str(file.info.snap_id), "--", family)

    async def _order(self, *words: str) -> None:
        outcome = await self._cluster.dog("vdi", *words)
        self._known_at = float("-inf")
        if outcome.status:
            log.error("dog vdi %s: %s", " ".join(words), outcome.complaint.strip())
            raise error({DOG_EXISTS: errno.EEXIST, DOG_MISSING: errno.ENOENT}.get(outcome.status, errno.EIO))

    async def close(self) -> None:
        await asyncio.gather(*(file.close() for file in self._files.values()), return_exceptions=True)


def _can_be_a_name(text: str) -> bool:
    return bool(text) and "/" not in text and text not in (".", "..")

"""Requests of the kernel, free of how they arrive: names to nodes, open files to bytes.

Every method raises OSError with the errno of the answer.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from sheepdog.frontends.sheepfs.cluster import Cluster
from sheepdog.frontends.sheepfs.control import root_directory
from sheepdog.frontends.sheepfs.files import Settings
from sheepdog.frontends.sheepfs.snapshots import Snapshots
from sheepdog.frontends.sheepfs.statistics import statistics_directory
from sheepdog.frontends.sheepfs.transport import Attributes, Opened, error
from sheepdog.frontends.sheepfs.tree import ControlFile, Handle, Link, Numbers
from sheepdog.frontends.sheepfs.volumes import Volumes


@dataclass(frozen=True, slots=True)
class Entry:
    """One name of a directory. `cookie` continues a listing after it."""

    name: bytes
    attributes: Attributes
    cookie: int


class FileSystem:
    """One mount's tree and its open files."""

    def __init__(self, cluster: Cluster, settings: Settings, may_remove: bool = False) -> None:
        self._numbers = Numbers()
        self.volumes = Volumes(cluster, settings, self._numbers, may_remove)
        self._snapshots = Snapshots(cluster, settings, self._numbers, may_remove)
        statistics = statistics_directory(cluster, self.volumes, self._numbers)
        self._numbers.plant(root_directory(cluster, settings, self.volumes, self._snapshots, statistics))
        self.handles: dict[int, Handle] = {}
        self._next_handle = 1
        self._listings: dict[int, list[Entry]] = {}

    # -- names. The `_now` forms answer only what nobody has to be asked for; None means: ask the other form.

    def lookup_now(self, parent: int, name: bytes) -> Attributes | None:
        directory = self._numbers.directory(parent)
        if directory.asks:
            return None
        if name == b".":
            return directory.attributes()
        node = directory.child(os.fsdecode(name))
        if node is None:
            raise error(errno.ENOENT)
        return node.attributes()

    async def lookup(self, parent: int, name: bytes) -> Attributes:
        await self._numbers.directory(parent).refresh()
        directory = self._numbers.directory(parent)
        node = directory if name == b"." else directory.child(os.fsdecode(name))
        if node is None:
            raise error(errno.ENOENT)
        return node.attributes()

    def attributes_now(self, inode: int) -> Attributes | None:
        node = self._numbers.node(inode)
        return None if isinstance(node, ControlFile) else node.attributes()

    async def attributes(self, inode: int) -> Attributes:
        return await self._numbers.node(inode).fresh_attributes()

    async def truncate(self, inode: int, size: int) -> Attributes:
        node = self._numbers.node(inode)
        await node.truncate(size)
        return node.attributes()

    async def get_attribute(self, inode: int, name: bytes) -> bytes:
        return await self._numbers.node(inode).get_attribute(os.fsdecode(name))

    async def set_attribute(self, inode: int, name: bytes, value: bytes) -> None:
        await self._numbers.node(inode).set_attribute(os.fsdecode(name), value)

    def attribute_names(self, inode: int) -> list[bytes]:
        return [os.fsencode(name) for name in self._numbers.node(inode).attribute_names()]

    def readlink(self, inode: int) -> bytes:
        node = self._numbers.node(inode)
        if not isinstance(node, Link):
            raise error(errno.EINVAL)
        return os.fsencode(node.target)

    async def unlink(self, parent: int, name: bytes) -> None:
        directory = self._numbers.directory(parent)
        await directory.refresh()
        await directory.unlink(os.fsdecode(name))

    async def make_directory(self, parent: int, name: bytes) -> Attributes:
        return (await self._numbers.directory(parent).make_directory(os.fsdecode(name))).attributes()

    # -- directories

    async def open_directory(self, inode: int) -> int:
        """A listing as of now: names that come and go while it is read neither repeat nor hide others."""
        directory = self._numbers.directory(inode)
        await directory.refresh()
        handle = self._new_handle()
        self._listings[handle] = [
            Entry(os.fsencode(name), node.attributes(), cookie)
            for cookie, (name, node) in enumerate(directory.entries(), 1)
        ]
        return handle

    def listing(self, handle: int, cookie: int) -> list[Entry]:
        """What follows the entry with this cookie; 0 for all."""
        return self._listings[handle][cookie:]

    def close_directory(self, handle: int) -> None:
        self._listings.pop(handle, None)

    # -- files

    async def open(self, inode: int, flags: int) -> Opened:
        file = await self._numbers.node(inode).open(flags)
        handle = self._new_handle()
        self.handles[handle] = file
        return Opened(handle, file.direct)

    def file(self, handle: int) -> Handle:
        try:
            return self.handles[handle]
        except KeyError:
            raise error(errno.EBADF) from None

    def release(self, handle: int) -> None:
        file = self.handles.pop(handle, None)
        if file is not None:
            file.release()

    async def close(self) -> None:
        """The mount is gone: flush and close the volumes."""
        self.handles.clear()
        await self.volumes.close()
        await self._snapshots.close()

    def _new_handle(self) -> int:
        handle = self._next_handle
        self._next_handle += 1
        return handle

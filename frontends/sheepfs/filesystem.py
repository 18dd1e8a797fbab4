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
from sheepdog.frontends.sheepfs.transport import Attributes, Opened, error
from sheepdog.frontends.sheepfs.tree import ControlFile, Handle, Link, Tree
from sheepdog.frontends.sheepfs.volumes import Volumes


@dataclass(frozen=True, slots=True)
class Entry:
    """One name of a directory. `cookie` continues a listing after it."""

    name: bytes
    attributes: Attributes
    cookie: int


class FileSystem:
    """One mount's tree and its open files."""

    def __init__(self, cluster: Cluster, settings: Settings) -> None:
        self.volumes = Volumes(cluster, settings)
        self._tree = Tree(root_directory(cluster, settings, self.volumes))
        self.volumes.attach(self._tree)
        self.handles: dict[int, Handle] = {}
        self._next_handle = 1
        self._listings: dict[int, list[Entry]] = {}

    # -- names

    def lookup(self, parent: int, name: bytes) -> Attributes:
        if name == b".":
            return self._tree.directory(parent).attributes()
        return self._tree.lookup(parent, os.fsdecode(name)).attributes()

    async def attributes(self, inode: int) -> Attributes:
        return await self._tree.node(inode).fresh_attributes()

    def attributes_now(self, inode: int) -> Attributes | None:
        """The same, if nobody has to be asked for them; else None."""
        node = self._tree.node(inode)
        return None if isinstance(node, ControlFile) else node.attributes()

    async def truncate(self, inode: int, size: int) -> Attributes:
        node = self._tree.node(inode)
        await node.truncate(size)
        return node.attributes()

    def readlink(self, inode: int) -> bytes:
        node = self._tree.node(inode)
        if not isinstance(node, Link):
            raise error(errno.EINVAL)
        return os.fsencode(node.target)

    def unlink(self, parent: int, name: bytes) -> None:
        """Removing a volume's file succeeds and does nothing (`vdi/unmount` takes it away); all else is refused."""
        node = self._tree.lookup(parent, os.fsdecode(name))
        if node in self.volumes:
            return
        raise error(errno.EPERM)

    # -- directories

    def open_directory(self, inode: int) -> int:
        """A listing as of now: names that come and go while it is read neither repeat nor hide others."""
        found = self._tree.directory(inode).entries()
        handle = self._new_handle()
        self._listings[handle] = [
            Entry(os.fsencode(name), node.attributes(), cookie) for cookie, (name, node) in enumerate(found, 1)
        ]
        return handle

    def listing(self, handle: int, cookie: int) -> list[Entry]:
        """What follows the entry with this cookie; 0 for all."""
        return self._listings[handle][cookie:]

    def close_directory(self, handle: int) -> None:
        self._listings.pop(handle, None)

    # -- files

    async def open(self, inode: int, flags: int) -> Opened:
        file = await self._tree.node(inode).open(flags)
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

    def _new_handle(self) -> int:
        handle = self._next_handle
        self._next_handle += 1
        return handle

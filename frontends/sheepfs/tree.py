"""Names, kinds and modes of everything under the mount point. Knows nothing of FUSE and nothing of the cluster.

A directory has fixed children, and perhaps live ones (the mounted volumes). A control file is a text made when the
file is opened, and an action done when it is written; a missing one fails with EIO.
"""

from __future__ import annotations

import errno
import stat
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Protocol

from sheepdog.cluster.core.messages import Buffer
from sheepdog.frontends.sheepfs.transport import BLOCK_SIZE, Attributes, error

ROOT_INODE = 1  # the kernel's name of the root
FIRST_LIVE_INODE = 1 << 16  # above every fixed node; numbers of live nodes are never used twice

STATUS_MEMORY_S = 1.0  # a text made for `stat` serves the `stat`s that follow at once (`ls -l`), nothing else


class Handle(Protocol):
    """An open file. Every method may raise OSError; `release` is the last call."""

    direct: bool
    quick: bool  # has `submit_read` and `submit_write` too: a `VolumeHandle`

    async def read(self, offset: int, length: int) -> Buffer: ...

    async def write(self, offset: int, data: Buffer) -> int: ...

    async def fsync(self) -> None: ...

    async def zero(self, offset: int, length: int) -> None: ...

    def seek(self, offset: int, data: bool) -> int: ...

    def release(self) -> None: ...


class Node:
    """Anything that has a name. `mode` includes the kind; `inode` is given by the tree."""

    mode = 0
    entry_seconds = 0  # how long the kernel may remember the name
    attribute_seconds = 0
    inode = 0

    def attributes(self) -> Attributes:
        """Without asking anybody: for look-ups and directory listings."""
        raise NotImplementedError

    async def fresh_attributes(self) -> Attributes:
        """What `stat` shows."""
        return self.attributes()

    async def open(self, flags: int) -> Handle:
        raise error(errno.EISDIR if stat.S_ISDIR(self.mode) else errno.EINVAL)

    async def get_attribute(self, name: str) -> bytes:
        """An extended attribute."""
        raise error(errno.ENODATA)

    async def set_attribute(self, name: str, value: bytes) -> None:
        raise error(errno.EOPNOTSUPP)

    def attribute_names(self) -> list[str]:
        return []

    async def truncate(self, size: int) -> None:
        """Succeeds and changes nothing: shells truncate what they write to, and a volume keeps its size."""

    def _described(self, size: int, links: int = 1, mtime_ns: int = 0) -> Attributes:
        return Attributes(
            inode=self.inode,
            mode=self.mode,
            size=size,
            links=links,
            blocks=-(-size // 512),
            mtime_ns=mtime_ns,
            attribute_seconds=self.attribute_seconds,
            entry_seconds=self.entry_seconds,
        )


class Directory(Node):
    """Fixed children, given at the start, and live ones, asked for at every look-up.

    One whose children the cluster knows overrides `refresh`, which is awaited before they are looked at.
    """

    mode = stat.S_IFDIR | 0o755
    entry_seconds = 60
    attribute_seconds = 1

    def __init__(self, children: Mapping[str, Node], live: Callable[[], Mapping[str, Node]] = dict) -> None:
        self.children = dict(children)
        self._live = live
        self._mtime_ns = time.time_ns()

    async def refresh(self) -> None:
        """Learn what children there are."""

    @property
    def asks(self) -> bool:
        """Whether `refresh` does anything."""
        return type(self).refresh is not Directory.refresh

    async def make_directory(self, name: str) -> Node:
        raise error(errno.ENOSYS)

    async def unlink(self, name: str) -> None:
        raise error(errno.EPERM)

    def child(self, name: str) -> Node | None:
        return self.children.get(name) or self._live().get(name)

    def entries(self) -> Iterable[tuple[str, Node]]:
        yield from self.children.items()
        yield from list(self._live().items())

    def attributes(self) -> Attributes:
        directories = sum(isinstance(node, Directory) for node in self.children.values())
        return self._described(BLOCK_SIZE, links=2 + directories, mtime_ns=self._mtime_ns)


class Link(Node):
    mode = stat.S_IFLNK | 0o777
    entry_seconds = 60
    attribute_seconds = 60

    def __init__(self, target: str) -> None:
        self.target = target
        self._mtime_ns = time.time_ns()

    def attributes(self) -> Attributes:
        return self._described(len(self.target), mtime_ns=self._mtime_ns)


Reader = Callable[[], Awaitable[str]]
Writer = Callable[[str], Awaitable[None]]


async def nothing() -> str:
    return ""


class ControlFile(Node):
    """A text for the reader, an order from the writer.

    `read` makes the text; it is asked once for each open file, and for `stat` unless `size` gives the size. `write`
    gets what was written less one trailing newline; without it writing fails with EIO.
    """

    mode = stat.S_IFREG | 0o644
    entry_seconds = 60

    def __init__(
        self, read: Reader = nothing, write: Writer | None = None, size: Callable[[], int] | None = None
    ) -> None:
        self._read = read
        self._write = write
        self._size = size
        self._remembered: bytes = b""
        self._remembered_at = float("-inf")

    def attributes(self) -> Attributes:
        return self._described(self._size() if self._size else len(self._remembered), mtime_ns=time.time_ns())

    async def fresh_attributes(self) -> Attributes:
        if self._size is None and time.monotonic() - self._remembered_at > STATUS_MEMORY_S:
            await self.text()
        return self.attributes()

    async def text(self) -> bytes:
        self._remembered = (await self._read()).encode()
        self._remembered_at = time.monotonic()
        return self._remembered

    async def order(self, data: bytes) -> None:
        if self._write is None:
            raise error(errno.EIO)
        try:
            text = data.decode()
        except UnicodeDecodeError:
            raise error(errno.EINVAL) from None
        await self._write(text.removesuffix("\n"))

    async def open(self, flags: int) -> Handle:
        del flags
        return ControlHandle(self, await self.text())


class ControlHandle:
    """One open control file: the text as of the open, whatever changes meanwhile."""

    quick = False
    direct = True  # the size shown may be older than the text: the page cache would cut it

    def __init__(self, node: ControlFile, text: bytes) -> None:
        self._node = node
        self._text = text

    async def read(self, offset: int, length: int) -> bytes:
        return self._text[offset : offset + length]

    async def write(self, offset: int, data: Buffer) -> int:
        del offset  # `echo X >> FILE` writes at the end
        await self._node.order(bytes(data))
        return len(data)

    async def fsync(self) -> None:
        """Orders are done when written."""

    async def zero(self, offset: int, length: int) -> None:
        raise error(errno.EOPNOTSUPP)

    def seek(self, offset: int, data: bool) -> int:
        """A text has no holes: data everywhere, the one hole at its end."""
        if offset >= len(self._text):
            raise error(errno.ENXIO)
        return offset if data else len(self._text)

    def release(self) -> None:
        """Nothing is held."""


class Numbers:
    """Inode numbers: every node that can be reached, by its number. None is used twice."""

    def __init__(self) -> None:
        self._nodes: dict[int, Node] = {}
        self._next_live = FIRST_LIVE_INODE

    def plant(self, root: Directory) -> None:
        """Number the root and its fixed children."""
        self._plant(root, ROOT_INODE)

    def _plant(self, node: Node, inode: int) -> int:
        """Depth first; returns the next free number."""
        node.inode = inode
        self._nodes[inode] = node
        inode += 1
        if isinstance(node, Directory):
            for child in node.children.values():
                inode = self._plant(child, inode)
        return inode

    def add(self, node: Node) -> None:
        """Number a live node."""
        self.passing(node)
        self._nodes[node.inode] = node

    def passing(self, node: Node) -> Node:
        """Number a node that is only mentioned once: asking for it again gives ENOENT."""
        node.inode = self._next_live
        self._next_live += 1
        return node

    def remove(self, node: Node) -> None:
        """Forget a live node: what the kernel still knows of it fails with ENOENT."""
        del self._nodes[node.inode]

    def node(self, inode: int) -> Node:
        try:
            return self._nodes[inode]
        except KeyError:
            raise error(errno.ENOENT) from None

    def directory(self, inode: int) -> Directory:
        node = self.node(inode)
        if not isinstance(node, Directory):
            raise error(errno.ENOTDIR)
        return node

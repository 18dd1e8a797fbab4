"""The transport through libfuse: runs without privileges (fusermount3), on every kernel.

What libfuse's Python binding cannot carry: FALLOCATE and LSEEK (discards never arrive, files have no visible holes),
the flags of a single write, and connection limits, which are set through fusectl after the mount where permitted.
The binding keeps its session in module globals: one mount for each process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import pyfuse3
import pyfuse3.asyncio
from pyfuse3 import (
    EntryAttributes,
    FileHandleT,
    FileInfo,
    FileNameT,
    FlagT,
    InodeT,
    ModeT,
    ReaddirToken,
    RequestContext,
    SetattrFields,
    StatvfsData,
    XAttrNameT,
)

from sheepdog.frontends.sheepfs.connection import raise_limits
from sheepdog.frontends.sheepfs.filesystem import FileSystem
from sheepdog.frontends.sheepfs.transport import (
    BLOCK_SIZE,
    FSNAME,
    NAME_MAX,
    Attributes,
    MountError,
    MountOptions,
    errno_of,
    log,
)

P = ParamSpec("P")
T = TypeVar("T")

MAX_TASKS = 160  # requests handled at a time: the background ones and room for the others
USER_ALLOW_OTHER = "user_allow_other"  # in fuse.conf: whether a user may let root in
FUSE_CONF = Path("/etc/fuse.conf")


class Pyfuse3Transport:
    """`Transport` over libfuse's session."""

    name = "pyfuse3"

    def __init__(self) -> None:
        self._operations = _Operations()
        self._mountpoint = ""

    def mount(self, options: MountOptions) -> None:
        pyfuse3.asyncio.enable()
        chosen = set(pyfuse3.default_options) | {f"fsname={FSNAME}"}
        if os.getuid() and _may_let_root_in():
            chosen.add("allow_root")
        if options.debug:
            chosen.add("debug")
        try:
            pyfuse3.init(self._operations, options.mountpoint, chosen)
        except RuntimeError as problem:  # libfuse has said on stderr what the matter is
            raise MountError(f"cannot mount on {options.mountpoint}: {problem}") from None
        self._mountpoint = options.mountpoint

    async def serve(self, files: FileSystem) -> None:
        self._operations.files = files
        raise_limits(self._mountpoint)
        log.info("discards do not reach the cluster: this transport cannot carry them")
        await pyfuse3.main(max_tasks=MAX_TASKS)

    def stop(self) -> None:
        pyfuse3.terminate()

    def close(self) -> None:
        pyfuse3.close(unmount=True)


def _may_let_root_in() -> bool:
    try:
        lines = FUSE_CONF.read_text().splitlines()
    except OSError:
        return False
    return any(line.strip() == USER_ALLOW_OTHER for line in lines)


def _answered(method: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Whatever a handler raises becomes an errno: any other exception would end the session, request unanswered."""

    async def handler(*arguments: P.args, **named: P.kwargs) -> T:
        try:
            return await method(*arguments, **named)
        except Exception as problem:
            raise pyfuse3.FUSEError(errno_of(problem)) from None

    return handler


class _Operations(pyfuse3.Operations):
    """One method for each kind of request. Names and arguments are the binding's."""

    supports_dot_lookup = False
    enable_writeback_cache = False  # acknowledged data would sit in the kernel, out of fsync's and our sight
    enable_acl = False

    files: FileSystem

    def __init__(self) -> None:
        super().__init__()
        self._uid, self._gid = os.getuid(), os.getgid()

    def _entry(self, found: Attributes) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = InodeT(found.inode)
        entry.generation = 0
        entry.entry_timeout = found.entry_seconds
        entry.attr_timeout = found.attribute_seconds
        entry.st_mode = ModeT(found.mode)
        entry.st_nlink = found.links
        entry.st_uid, entry.st_gid = self._uid, self._gid
        entry.st_rdev = 0
        entry.st_size = found.size
        entry.st_blksize = BLOCK_SIZE
        entry.st_blocks = found.blocks
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = found.mtime_ns
        return entry

    @_answered
    async def lookup(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> EntryAttributes:
        return self._entry(await self.files.lookup(parent_inode, name))

    @_answered
    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        return self._entry(await self.files.attributes(inode))

    @_answered
    async def setattr(
        self, inode: InodeT, attr: EntryAttributes, fields: SetattrFields, fh: FileHandleT | None, ctx: RequestContext
    ) -> EntryAttributes:
        """Sizes go to the node; owners, modes and times are accepted and not kept."""
        if fields.update_size:
            return self._entry(await self.files.truncate(inode, attr.st_size))
        return self._entry(await self.files.attributes(inode))

    @_answered
    async def readlink(self, inode: InodeT, ctx: RequestContext) -> FileNameT:
        return FileNameT(self.files.readlink(inode))

    @_answered
    async def unlink(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        await self.files.unlink(parent_inode, name)

    @_answered
    async def mkdir(self, parent_inode: InodeT, name: FileNameT, mode: ModeT, ctx: RequestContext) -> EntryAttributes:
        return self._entry(await self.files.make_directory(parent_inode, name))

    @_answered
    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        opened = await self.files.open(inode, flags)
        return pyfuse3.FileInfo(fh=FileHandleT(opened.handle), direct_io=opened.direct, keep_cache=False)

    @_answered
    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        return cast(bytes, await self.files.file(fh).read(off, size))  # any buffer will do

    @_answered
    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        return await self.files.file(fh).write(off, buf)

    @_answered
    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        await self.files.file(fh).fsync()

    async def flush(self, fh: FileHandleT) -> None:
        """A close of one descriptor: durability is asked for by fsync, not by this."""

    @_answered
    async def release(self, fh: FileHandleT) -> None:
        self.files.release(fh)

    @_answered
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        return FileHandleT(await self.files.open_directory(inode))

    @_answered
    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        for entry in self.files.listing(fh, start_id):
            if not pyfuse3.readdir_reply(token, FileNameT(entry.name), self._entry(entry.attributes), entry.cookie):
                break

    @_answered
    async def releasedir(self, fh: FileHandleT) -> None:
        self.files.close_directory(fh)

    @_answered
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        found = pyfuse3.StatvfsData()
        found.f_bsize = found.f_frsize = BLOCK_SIZE
        found.f_namemax = NAME_MAX
        return found

    async def access(self, inode: InodeT, mode: ModeT, ctx: RequestContext) -> bool:
        return True

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        """Nodes live as long as their volume is mounted, whatever the kernel remembers."""

    @_answered
    async def getxattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> bytes:
        return await self.files.get_attribute(inode, name)

    @_answered
    async def setxattr(self, inode: InodeT, name: XAttrNameT, value: bytes, ctx: RequestContext) -> None:
        await self.files.set_attribute(inode, name, value)

    @_answered
    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> Sequence[XAttrNameT]:
        return [XAttrNameT(name) for name in self.files.attribute_names(inode)]

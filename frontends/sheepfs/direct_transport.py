"""The transport that speaks the kernel's protocol on /dev/fuse itself: root only, no C library.

It carries what libfuse's binding cannot (FALLOCATE, so that discards reach the cluster; LSEEK; the synchronous flag of
a single write) and costs a quarter of its CPU: reads and writes of volumes are answered by callbacks, look-ups inline,
and only the rest runs as tasks.

Every request is answered: by its handler's result, by the errno of its exception, or by the kernel itself when the
connection is closed at the end.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
from collections.abc import Awaitable, Callable
from enum import Enum
from functools import partial

from sheepdog.cluster.core.messages import Buffer
from sheepdog.frontends.sheepfs import fuse_wire as wire
from sheepdog.frontends.sheepfs.bulk import BULK_BYTES, BulkReads
from sheepdog.frontends.sheepfs.files import DURABLE_FLAGS, VolumeHandle
from sheepdog.frontends.sheepfs.filesystem import FileSystem
from sheepdog.frontends.sheepfs.fuse_wire import IN_HEADER, IN_SIZE, OUT_HEADER, OUT_SIZE, Opcode
from sheepdog.frontends.sheepfs.transport import (
    CONGESTION_THRESHOLD,
    FSNAME,
    MAX_BACKGROUND,
    MAX_REQUEST_BYTES,
    MountError,
    MountOptions,
    errno_of,
    error,
    log,
)

DEVICE = "/dev/fuse"
MS_NOSUID, MS_NODEV = 2, 4
MNT_DETACH = 2
REQUESTS_PER_TURN = 64  # then the loop's other sockets (the answers of the cluster) get their turn
BUFFER_BYTES = MAX_REQUEST_BYTES + 4096  # the kernel asks for room for the largest write and its header
COPY_BYTES = 64 * 1024  # payloads up to here are copied (3 us) rather than pinning a whole buffer
MAX_LENT = MAX_BACKGROUND  # buffers under large writes at a time; beyond it the kernel is read no further
KEPT_BUFFERS = 16  # of those given back: enough for a steady stream, 16 MiB at most
DRAIN_LIMIT_S = 5.0  # requests in flight when sheepfs is told to stop


class Verdict(Enum):
    """What an inline handler says when it has no answer."""

    LATER = 1  # its callback or task will answer
    ASK = 2  # the cluster has to be asked: the slow handler's turn


Answer = bytes | Verdict
Inline = Callable[[int, int, memoryview], Answer]  # (unique, node, body)
Slow = Callable[[int, memoryview], Awaitable[bytes]]  # (node, body)


class DirectTransport:
    """`Transport` over /dev/fuse."""

    name = "direct"

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._mountpoint = ""
        self._debug = False
        self._device = -1
        self._owner = os.getuid(), os.getgid()
        self._files: FileSystem
        self._loop: asyncio.AbstractEventLoop
        self._ended: asyncio.Future[None]
        self._bulk: BulkReads
        self._buffer = bytearray(BUFFER_BYTES)
        self._spare: list[bytearray] = []
        self._lent = 0
        self._unanswered = 0
        self._paused = False
        self._attached = False  # to the mount point; once it is not, what is mounted there belongs to somebody else
        self._tasks: set[asyncio.Task[None]] = set()
        self._inline: dict[int, Inline] = {
            Opcode.READ: self._read,
            Opcode.WRITE: self._write,
            Opcode.LOOKUP: self._lookup_now,
            Opcode.GETATTR: self._get_attributes_now,
            Opcode.READLINK: self._readlink,
            Opcode.READDIR: self._read_directory,
            Opcode.RELEASEDIR: self._release_directory,
            Opcode.RELEASE: self._release,
            Opcode.STATFS: self._statfs,
            Opcode.LSEEK: self._seek,
            Opcode.INIT: self._init,
            Opcode.FLUSH: self._nothing,
            Opcode.ACCESS: self._nothing,
            Opcode.FSYNCDIR: self._nothing,
            Opcode.DESTROY: self._nothing,
            Opcode.LISTXATTR: self._list_attributes,
        }
        self._slow: dict[int, Slow] = {
            Opcode.LOOKUP: self._lookup,
            Opcode.UNLINK: self._unlink,
            Opcode.MKDIR: self._make_directory,
            Opcode.OPENDIR: self._open_directory,
            Opcode.GETXATTR: self._get_attribute,
            Opcode.SETXATTR: self._set_attribute,
            Opcode.GETATTR: self._get_attributes,
            Opcode.SETATTR: self._set_attributes,
            Opcode.OPEN: self._open,
            Opcode.FSYNC: self._fsync,
            Opcode.FALLOCATE: self._fallocate,
        }

    # -- life

    def mount(self, options: MountOptions) -> None:
        try:
            self._device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as problem:
            missing = problem.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO)
            advice = "; FUSE has to be in the kernel: modprobe fuse" if missing else ""
            raise MountError(f"cannot open {DEVICE}: {problem.strerror}{advice}") from None
        data = (
            f"fd={self._device},rootmode=40000,user_id={self._owner[0]},group_id={self._owner[1]},"
            f"default_permissions,max_read={MAX_REQUEST_BYTES}"
        )
        place = os.fsencode(options.mountpoint)
        if self._libc.mount(FSNAME.encode(), place, b"fuse", MS_NOSUID | MS_NODEV, data.encode()):
            problem_text = os.strerror(ctypes.get_errno())
            os.close(self._device)
            self._device = -1
            raise MountError(f"cannot mount on {options.mountpoint}: {problem_text}")
        self._mountpoint = options.mountpoint
        self._attached = True
        self._debug = options.debug

    async def serve(self, files: FileSystem) -> None:
        self._files = files
        self._loop = asyncio.get_running_loop()
        self._ended = self._loop.create_future()
        self._loop.add_reader(self._device, self._readable)
        self._bulk = BulkReads(self._device, self._loop)
        try:
            await self._ended
            await self._drain()
        finally:
            self._loop.remove_reader(self._device)
            self._bulk.close()
            for task in self._tasks:
                task.cancel()

    def stop(self) -> None:
        # New users see the empty mount point at once; those who still have files open lose them when we are gone.
        self._detach()
        self._end()

    def close(self) -> None:
        if self._device < 0:
            return
        self._detach()
        os.close(self._device)  # the kernel fails whatever still waits
        self._device = -1

    def _detach(self) -> None:
        if not self._attached:
            return
        self._attached = False
        if self._libc.umount2(os.fsencode(self._mountpoint), MNT_DETACH):
            log.warning("unmount %s: %s", self._mountpoint, os.strerror(ctypes.get_errno()))

    def _end(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)

    async def _drain(self) -> None:
        """Let requests in flight finish, for a while."""
        deadline = self._loop.time() + DRAIN_LIMIT_S
        while self._unanswered and self._loop.time() < deadline and not self._paused:
            await asyncio.sleep(0.01)

    # -- requests in

    def _readable(self) -> None:
        for _ in range(REQUESTS_PER_TURN):
            try:
                length = os.readv(self._device, (self._buffer,))
            except BlockingIOError:
                return
            except OSError as problem:
                if problem.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                    continue  # interrupted before it was read
                if problem.errno == errno.ENODEV:
                    self._attached = False
                else:
                    log.critical("reading %s: %s", DEVICE, problem)
                self._loop.remove_reader(self._device)
                self._end()
                return
            self._take(memoryview(self._buffer)[:length])
            if self._paused:
                return

    def _take(self, request: memoryview) -> None:
        """Answer one request, now or by its task. Nothing raised here may escape: the request would hang."""
        _, opcode, unique, node, *_ = IN_HEADER.unpack_from(request)
        body = request[IN_SIZE:]
        if self._debug:
            log.debug("%s %d: node %d, %d bytes", _name(opcode), unique, node, len(body))
        if opcode in wire.UNANSWERED:
            return
        self._unanswered += 1
        try:
            inline = self._inline.get(opcode)
            if inline is not None:
                answer = inline(unique, node, body)
                if isinstance(answer, bytes):
                    self._answer(unique, answer)
                    return
                if answer is Verdict.LATER:
                    return
            slow = self._slow.get(opcode)
            if slow is None:
                self._fail(unique, errno.ENOSYS)
                return
            # The body is in the buffer that the next request is read into.
            task = self._loop.create_task(self._run(unique, slow(node, memoryview(bytes(body)))))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        except Exception as problem:
            self._fail(unique, errno_of(problem))

    async def _run(self, unique: int, work: Awaitable[bytes]) -> None:
        try:
            answer = await work
        except Exception as problem:
            self._fail(unique, errno_of(problem))
        except asyncio.CancelledError:
            self._fail(unique, errno.EIO)
            raise
        else:
            self._answer(unique, answer)

    # -- answers out

    def _answer(self, unique: int, body: Buffer) -> None:
        self._send(unique, (OUT_HEADER.pack(OUT_SIZE + len(body), 0, unique), body))

    def _fail(self, unique: int, code: int) -> None:
        if self._debug:
            log.debug("%d: %s", unique, os.strerror(code))
        self._send(unique, (OUT_HEADER.pack(OUT_SIZE, -code, unique),))

    def _send(self, unique: int, parts: tuple[Buffer, ...]) -> None:
        self._unanswered -= 1
        try:
            os.writev(self._device, parts)
        except OSError as problem:
            # ENOENT: the caller was killed meanwhile. ENODEV: unmounted. Neither waits for us any more.
            if problem.errno in (errno.ENOENT, errno.ENODEV):
                return
            log.error("answering request %d: %s", unique, problem)
            if len(parts) > 1:
                self._unanswered += 1
                self._fail(unique, errno.EIO)

    # -- bytes

    def _read(self, unique: int, node: int, body: memoryview) -> Answer:
        handle, offset, size, *_ = wire.READ_IN.unpack_from(body)
        file = self._files.file(handle)
        if not isinstance(file, VolumeHandle):
            self._later(unique, file.read(offset, size))
            return Verdict.LATER
        size = file.clip(offset, size)
        if size <= 0:
            return b""
        if size >= BULK_BYTES:
            ended = partial(self._have_spliced, unique, file, offset, size)
            if self._bulk.take(unique, file, offset, size, ended):
                return Verdict.LATER
        file.submit_read(offset, size, partial(self._have_read, unique))
        return Verdict.LATER

    def _have_spliced(self, unique: int, file: VolumeHandle, offset: int, size: int, answered: bool) -> None:
        if answered:
            self._unanswered -= 1
            file.count_read(size)
            return
        try:
            file.submit_read(offset, size, partial(self._have_read, unique))
        except Exception as problem:  # nothing may escape: the request would hang
            self._fail(unique, errno_of(problem))

    def _have_read(self, unique: int, problem: OSError | None, data: Buffer) -> None:
        if problem is None:
            self._answer(unique, data)
        else:
            self._fail(unique, errno_of(problem))

    def _write(self, unique: int, node: int, body: memoryview) -> Answer:
        handle, offset, size, _, _, flags, _ = wire.WRITE_IN.unpack_from(body)
        file = self._files.file(handle)
        data = body[wire.WRITE_IN.size : wire.WRITE_IN.size + size]
        if not isinstance(file, VolumeHandle):
            self._later(unique, self._write_control(handle, offset, bytes(data)))
            return Verdict.LATER
        size = file.clip(offset, size)
        if size <= 0:
            raise error(errno.ENOSPC)
        durable = bool(flags & DURABLE_FLAGS)
        lent = None
        if size <= COPY_BYTES:
            payload: Buffer = bytes(data[:size])
        else:
            payload, lent = data[:size], self._lend()
        try:
            file.submit_write(offset, payload, durable, partial(self._have_written, unique, size, lent))
        except BaseException:
            if lent is not None:
                self._give_back(lent)
            raise
        return Verdict.LATER

    def _have_written(self, unique: int, size: int, lent: bytearray | None, problem: OSError | None) -> None:
        if problem is None:
            self._answer(unique, wire.WRITE_OUT.pack(size, 0))
        else:
            self._fail(unique, errno_of(problem))
        if lent is not None:
            self._give_back(lent)

    async def _write_control(self, handle: int, offset: int, data: bytes) -> bytes:
        return wire.WRITE_OUT.pack(await self._files.file(handle).write(offset, data), 0)

    def _lend(self) -> bytearray:
        """The buffer of the request at hand goes to whoever writes its payload; the next is read into another."""
        lent = self._buffer
        self._buffer = self._spare.pop() if self._spare else bytearray(BUFFER_BYTES)
        self._lent += 1
        if self._lent >= MAX_LENT and not self._paused:
            self._paused = True
            self._loop.remove_reader(self._device)
        return lent

    def _give_back(self, buffer: bytearray) -> None:
        self._lent -= 1
        if len(self._spare) < KEPT_BUFFERS:
            self._spare.append(buffer)
        if self._paused and not self._ended.done():
            self._paused = False
            self._loop.add_reader(self._device, self._readable)

    def _later(self, unique: int, work: Awaitable[Buffer]) -> None:
        async def run() -> bytes:
            return bytes(await work)

        task = self._loop.create_task(self._run(unique, run()))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _fsync(self, node: int, body: memoryview) -> bytes:
        await self._files.file(_handle(body)).fsync()
        return b""

    async def _fallocate(self, node: int, body: memoryview) -> bytes:
        """Holes and zeros; room set aside in advance is not promised (EOPNOTSUPP), volumes are thin."""
        handle, offset, length, mode, _ = wire.FALLOCATE_IN.unpack_from(body)
        file = self._files.file(handle)
        if mode not in _ZEROING:
            raise error(errno.EOPNOTSUPP)
        await file.zero(offset, length)
        return b""

    def _seek(self, unique: int, node: int, body: memoryview) -> Answer:
        handle, offset, whence, _ = wire.LSEEK_IN.unpack_from(body)
        if whence not in (wire.SEEK_DATA, wire.SEEK_HOLE):
            raise error(errno.EINVAL)
        return wire.LSEEK_OUT.pack(self._files.file(handle).seek(offset, whence == wire.SEEK_DATA))

    # -- names and attributes

    def _lookup_now(self, unique: int, node: int, body: memoryview) -> Answer:
        found = self._files.lookup_now(node, wire.name_of(body))
        return Verdict.ASK if found is None else wire.entry(found, self._owner)

    async def _lookup(self, node: int, body: memoryview) -> bytes:
        return wire.entry(await self._files.lookup(node, wire.name_of(body)), self._owner)

    def _get_attributes_now(self, unique: int, node: int, body: memoryview) -> Answer:
        found = self._files.attributes_now(node)
        return Verdict.ASK if found is None else wire.attributes_answer(found, self._owner)

    async def _get_attributes(self, node: int, body: memoryview) -> bytes:
        return wire.attributes_answer(await self._files.attributes(node), self._owner)

    async def _set_attributes(self, node: int, body: memoryview) -> bytes:
        """Sizes go to the node; owners, modes and times are accepted and not kept."""
        valid, _, _, size = wire.SETATTR_IN.unpack_from(body)
        if valid & wire.SETATTR_SIZE:
            found = await self._files.truncate(node, size)
        else:
            found = await self._files.attributes(node)
        return wire.attributes_answer(found, self._owner)

    def _readlink(self, unique: int, node: int, body: memoryview) -> Answer:
        return self._files.readlink(node)

    async def _unlink(self, node: int, body: memoryview) -> bytes:
        await self._files.unlink(node, wire.name_of(body))
        return b""

    async def _make_directory(self, node: int, body: memoryview) -> bytes:
        name = wire.name_of(body[wire.MKDIR_IN.size :])
        return wire.entry(await self._files.make_directory(node, name), self._owner)

    async def _get_attribute(self, node: int, body: memoryview) -> bytes:
        room, _ = wire.GETXATTR_IN.unpack_from(body)
        value = await self._files.get_attribute(node, wire.name_of(body[wire.GETXATTR_IN.size :]))
        return wire.sized_answer(value, room)

    async def _set_attribute(self, node: int, body: memoryview) -> bytes:
        length, _ = wire.SETXATTR_IN.unpack_from(body)
        name = wire.name_of(body[wire.SETXATTR_IN.size :])
        start = wire.SETXATTR_IN.size + len(name) + 1
        await self._files.set_attribute(node, name, bytes(body[start : start + length]))
        return b""

    def _list_attributes(self, unique: int, node: int, body: memoryview) -> Answer:
        room, _ = wire.GETXATTR_IN.unpack_from(body)
        return wire.sized_answer(b"".join(name + b"\0" for name in self._files.attribute_names(node)), room)

    def _statfs(self, unique: int, node: int, body: memoryview) -> Answer:
        return wire.statfs_answer()

    def _nothing(self, unique: int, node: int, body: memoryview) -> Answer:
        return b""

    # -- opening and closing

    async def _open(self, node: int, body: memoryview) -> bytes:
        flags, _ = wire.OPEN_IN.unpack_from(body)
        opened = await self._files.open(node, flags)
        answer = wire.Open.NOFLUSH | (wire.Open.DIRECT_IO | wire.Open.PARALLEL_DIRECT_WRITES if opened.direct else 0)
        return wire.OPEN_OUT.pack(opened.handle, answer, 0)

    def _release(self, unique: int, node: int, body: memoryview) -> Answer:
        self._files.release(_handle(body))
        return b""

    async def _open_directory(self, node: int, body: memoryview) -> bytes:
        return wire.OPEN_OUT.pack(await self._files.open_directory(node), 0, 0)

    def _read_directory(self, unique: int, node: int, body: memoryview) -> Answer:
        handle, cookie, room, *_ = wire.READ_IN.unpack_from(body)
        listing = bytearray()
        for entry in self._files.listing(handle, cookie):
            part = wire.directory_entry(entry.name, entry.attributes.inode, entry.cookie, entry.attributes.mode)
            if len(listing) + len(part) > room:
                break
            listing += part
        return bytes(listing)

    def _release_directory(self, unique: int, node: int, body: memoryview) -> Answer:
        self._files.close_directory(_handle(body))
        return b""

    def _init(self, unique: int, node: int, body: memoryview) -> Answer:
        major, minor, readahead, flags = wire.INIT_IN.unpack_from(body.tobytes().ljust(wire.INIT_IN.size, b"\0"))[:4]
        if major != wire.MAJOR or minor < wire.MINOR_MINIMUM:
            log.critical("the kernel speaks version %d.%d of FUSE; 7.%d is needed", major, minor, wire.MINOR_MINIMUM)
            raise error(errno.EPROTO)
        if flags & wire.Init.INIT_EXT and len(body) >= wire.INIT_IN.size:
            flags |= wire.INIT_IN.unpack_from(body)[4] << 32
        answer, agreed = wire.init_answer(
            minor, readahead, flags, MAX_BACKGROUND, CONGESTION_THRESHOLD, MAX_REQUEST_BYTES
        )
        log.debug("kernel speaks %d.%d, agreed: %s", major, minor, agreed)
        return answer


_ZEROING = (
    wire.Falloc.PUNCH_HOLE | wire.Falloc.KEEP_SIZE,
    wire.Falloc.ZERO_RANGE,
    wire.Falloc.ZERO_RANGE | wire.Falloc.KEEP_SIZE,
)


def _handle(body: memoryview) -> int:
    handle: int = wire.HANDLE_IN.unpack_from(body)[0]
    return handle


def _name(opcode: int) -> str:
    try:
        return Opcode(opcode).name
    except ValueError:
        return f"request {opcode}"

"""fdatasync by a thread of the kernel, which tells an eventfd: nothing of this process waits.

In a thread of ours the same costs some 15 futex calls, because the interpreter is handed over and back around each
system call, and while the loop is busy it begins up to a turn late. The way is Linux's io_submit(2) with
IOCB_CMD_FDSYNC; where that is missing or refused, threads do it as ever.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
from asyncio import AbstractEventLoop
from collections.abc import Callable
from struct import Struct
from typing import Final

from sheepdog.cluster.host.disk import Disk
from sheepdog.cluster.host.system_call import system_call
from sheepdog.cluster.host.workers import CallSoon, ThreadWorkers

# Numbers of io_setup, io_destroy, io_getevents, io_submit.
_ALL_CALLS: Final = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2), "riscv64": (0, 1, 4, 2)}
_FDSYNC: Final = 3  # IOCB_CMD_FDSYNC of <linux/aio_abi.h>
_TELL_EVENTFD: Final = 1  # IOCB_FLAG_RESFD
# struct iocb: data, key, flags, opcode, priority, fildes, buf, nbytes, offset, reserved, flags, resfd
_REQUEST: Final = Struct("<QIiHhIQQqQII")
_EVENT: Final = Struct("<QQqq")  # struct io_event: data, obj, res, res2

Synced = Callable[[OSError | None], None]


class KernelSync:
    """One sync at a time. OSError when the system has no such thing."""

    def __init__(self) -> None:
        if platform.machine() not in _ALL_CALLS:
            raise OSError("the numbers of the system calls are not known")
        self._setup, self._destroy, self._getevents, self._submit = _ALL_CALLS[platform.machine()]
        self._request = ctypes.create_string_buffer(_REQUEST.size)
        self._requests = (ctypes.c_void_p * 1)(ctypes.addressof(self._request))
        self._event = ctypes.create_string_buffer(_EVENT.size)
        context = ctypes.c_ulong()
        system_call(self._setup, 1, ctypes.addressof(context))
        self._context = context.value
        self.eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def begin(self, fd: int) -> None:
        """Readable `eventfd` tells the end; none other may be under way. OSError: it was not begun."""
        _REQUEST.pack_into(self._request, 0, 0, 0, 0, _FDSYNC, 0, fd, 0, 0, 0, 0, _TELL_EVENTFD, self.eventfd)
        system_call(self._submit, self._context, 1, ctypes.addressof(self._requests))

    def result(self) -> OSError | None:
        """How the sync ended; when `eventfd` is readable."""
        os.eventfd_read(self.eventfd)
        got = system_call(self._getevents, self._context, 1, 1, ctypes.addressof(self._event), None)
        if got != 1:
            raise OSError(errno.EIO, "a sync ended without a result")
        code = -_EVENT.unpack(self._event)[2]
        return OSError(code, os.strerror(code)) if code else None

    def close(self) -> None:
        """Waits for a sync that is under way."""
        system_call(self._destroy, self._context)
        os.close(self.eventfd)


class LoopWorkers(ThreadWorkers):
    """The workers of a daemon: the kernel syncs, threads do the rest."""

    def __init__(self, loop: AbstractEventLoop, call_soon: CallSoon) -> None:
        super().__init__(call_soon)
        self._loop = loop
        self._waiting: Synced | None = None  # for the kernel's sync
        self._kernel: KernelSync | None = None
        with contextlib.suppress(OSError):
            self._kernel = KernelSync()
            loop.add_reader(self._kernel.eventfd, self._ended)

    def sync(self, disk: Disk, fd: int, done: Synced) -> None:
        if self._kernel is not None and self._waiting is None:
            # Not begun is no error of the disk: a thread will find out.
            with contextlib.suppress(OSError):
                self._kernel.begin(fd)
                self._waiting = done
                return
        super().sync(disk, fd, done)

    def _ended(self) -> None:
        assert self._kernel is not None
        assert self._waiting is not None
        done, self._waiting = self._waiting, None
        try:
            result = self._kernel.result()
        except OSError as error:
            result = error
        done(result)

    def stop(self) -> None:
        if self._kernel is not None:
            self._loop.remove_reader(self._kernel.eventfd)
            self._kernel.close()
            self._kernel = None
        super().stop()

"""fdatasync, and writes that end on the disk, by the kernel, which tells an eventfd: nothing of this process waits.

In a thread of ours the same costs some 15 futex calls, because the interpreter is handed over and back around each
system call, and while the loop is busy it begins up to a turn late. The way is Linux's io_submit(2) with
IOCB_CMD_FDSYNC, or with IOCB_CMD_PWRITE and RWF_DSYNC; where that is missing or refused, threads do it as ever.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
from asyncio import AbstractEventLoop
from struct import Struct
from typing import Final

from sheepdog.cluster.core.limits import FILE_SYNCS
from sheepdog.cluster.host.aligned import AlignedMemory
from sheepdog.cluster.host.disk import Disk
from sheepdog.cluster.host.system_call import system_call
from sheepdog.cluster.host.workers import CallSoon, Synced, ThreadWorkers

# Numbers of io_setup, io_destroy, io_getevents, io_submit.
ALL_CALLS: Final = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2), "riscv64": (0, 1, 4, 2)}
_PWRITE: Final = 1  # IOCB_CMD_PWRITE of <linux/aio_abi.h>
_FDSYNC: Final = 3  # IOCB_CMD_FDSYNC
_DSYNC: Final = 2  # RWF_DSYNC of <linux/fs.h>
_TELL_EVENTFD: Final = 1  # IOCB_FLAG_RESFD
# struct iocb: data, key, RWF_* flags, opcode, priority, fildes, buf, nbytes, offset, reserved, flags, resfd
_REQUEST: Final = Struct("<QIiHhIQQqQII")
_EVENT: Final = Struct("<QQqq")  # struct io_event: data, obj, res, res2

KERNEL_SYNCS: Final = FILE_SYNCS + 2  # those of the journal, and of META/undo before it, find a place


class KernelSync:
    """Up to `KERNEL_SYNCS` syncs and writes at a time, by their slots. OSError when the system has no such thing."""

    def __init__(self) -> None:
        if platform.machine() not in ALL_CALLS:
            raise OSError("the numbers of the system calls are not known")
        self._setup, self._destroy, self._getevents, self._submit = ALL_CALLS[platform.machine()]
        self._request = ctypes.create_string_buffer(_REQUEST.size)
        self._requests = (ctypes.c_void_p * 1)(ctypes.addressof(self._request))
        self._events = ctypes.create_string_buffer(_EVENT.size * KERNEL_SYNCS)
        self._free = list(range(KERNEL_SYNCS - 1, -1, -1))  # slots, the next one last
        self._lengths = [0] * KERNEL_SYNCS  # what a slot's write has to say at its end, a sync 0
        self._told = 0  # ends that `eventfd` has told of and `ended` has not returned
        context = ctypes.c_ulong()
        system_call(self._setup, KERNEL_SYNCS, ctypes.addressof(context))
        self._context = context.value
        self.eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def has_room(self) -> bool:
        return bool(self._free)

    def begin(self, fd: int) -> int:
        """The slot of a sync that is under way now; readable `eventfd` tells its end. OSError: it was not begun."""
        return self._begin(fd, _FDSYNC, 0, 0, 0, 0)

    def begin_write(self, fd: int, address: int, length: int, offset: int) -> int:
        """The same of a write that ends when it is on the disk. `fd` is one of `Disk.open_direct`."""
        return self._begin(fd, _PWRITE, _DSYNC, address, length, offset)

    def _begin(self, fd: int, command: int, flags: int, address: int, length: int, offset: int) -> int:
        slot, request = self._free[-1], self._request
        told = _TELL_EVENTFD, self.eventfd
        _REQUEST.pack_into(request, 0, slot, 0, flags, command, 0, fd, address, length, offset, 0, *told)
        system_call(self._submit, self._context, 1, ctypes.addressof(self._requests))
        self._lengths[slot] = length
        return self._free.pop()

    def ended(self) -> list[tuple[int, OSError | None]]:
        """The slots whose syncs have ended, and how. OSError: that is not known of any that is under way."""
        with contextlib.suppress(BlockingIOError):
            self._told += os.eventfd_read(self.eventfd)
        got = system_call(self._getevents, self._context, 0, KERNEL_SYNCS, ctypes.addressof(self._events), None)
        self._told -= got  # an end may be seen before it is told of
        found = []
        for slot, _, result, _ in _EVENT.iter_unpack(self._events.raw[: got * _EVENT.size]):
            found.append((slot, None if result == self._lengths[slot] else _error(result)))
        if self._told > 0 or any(slot in self._free for slot, _ in found):
            raise OSError(errno.EIO, "a sync ended without a result")
        self._free += [slot for slot, _ in found]
        return found

    def close(self) -> None:
        """Waits for the syncs that are under way."""
        system_call(self._destroy, self._context)
        os.close(self.eventfd)


def _error(result: int) -> OSError:
    return OSError(-result, os.strerror(-result)) if result < 0 else OSError(errno.EIO, "written in part")


class LoopWorkers(ThreadWorkers):
    """The workers of a daemon: the kernel syncs, threads do the rest."""

    def __init__(self, loop: AbstractEventLoop, call_soon: CallSoon) -> None:
        super().__init__(call_soon)
        self._loop = loop
        self._waiting: dict[int, Synced] = {}  # for the kernel's syncs, by slot
        self._kernel: KernelSync | None = None
        with contextlib.suppress(OSError):
            self._kernel = KernelSync()
            loop.add_reader(self._kernel.eventfd, self._ended)

    def sync(self, disk: Disk, fd: int, done: Synced) -> None:
        if self._kernel is not None and self._kernel.has_room():
            # Not begun is no error of the disk: a thread will find out.
            with contextlib.suppress(OSError):
                self._waiting[self._kernel.begin(fd)] = done
                return
        super().sync(disk, fd, done)

    def write_durably(self, disk: Disk, fd: int, memory: AlignedMemory, length: int, offset: int, done: Synced) -> None:
        if self._kernel is not None and self._kernel.has_room():
            with contextlib.suppress(OSError):
                self._waiting[self._kernel.begin_write(fd, memory.address, length, offset)] = done
                return
        super().write_durably(disk, fd, memory, length, offset, done)

    def _ended(self) -> None:
        assert self._kernel is not None
        ended: list[tuple[Synced, OSError | None]]
        try:
            ended = [(self._waiting.pop(slot), error) for slot, error in self._kernel.ended() if slot in self._waiting]
        except OSError as error:  # they count as failed, also should their ends be known later
            ended = [(done, error) for done in self._waiting.values()]
            self._waiting.clear()
        for done, result in ended:
            done(result)

    def stop(self) -> None:
        if self._kernel is not None:
            self._loop.remove_reader(self._kernel.eventfd)
            self._kernel.close()
            self._kernel = None
        super().stop()

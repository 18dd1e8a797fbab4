"""Large reads that pass from a gateway's connection to /dev/fuse without a copy in this process.

The answer's bytes are spliced from the socket into a pipe, behind the header that the kernel wants, and from there into
the waiting reader's pages: that takes half of the CPU time of receiving them and writing them out again. It needs a
connection of its own for each read under way, to a gateway on this host: a network's pieces are too small for a pipe.
Whatever is not the plain case (an answer that is no success, a
gateway that goes away or hangs) is left to the volume's own way, which knows what to do: the read is then made anew.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
from collections.abc import Callable
from struct import Struct
from typing import Protocol, TypeAlias

from sheepdog.cluster.client.address import Address, describe
from sheepdog.cluster.client.session import dial
from sheepdog.cluster.wire.header import HEADER_SIZE
from sheepdog.frontends.sheepfs.fuse_wire import OUT_HEADER, OUT_SIZE
from sheepdog.frontends.sheepfs.transport import MAX_REQUEST_BYTES, log

BULK_BYTES = 128 << 10  # smaller reads are no cheaper so, and together on one connection cost the gateway less
CARRIERS = 16  # connections: reads under way at a time; the others go the usual way
PIPE_BYTES = MAX_REQUEST_BYTES  # the most that everybody may have: slots for 256 pieces, which are larger than pages
WATCH_S = 2.0
STALL_S = 5.0  # a read that takes so long goes the usual way
IDLE_S = 60.0  # connections that are not needed for so long are closed

_ANSWER = Struct("<12xII28x")  # data_length, result
_SPLICE_NONBLOCK = 2  # SPLICE_F_NONBLOCK: the pipe must not wait either

Ended: TypeAlias = Callable[[bool], None]
"""Told once, never within `take`: whether the kernel has its answer; if not, the read is to be made anew."""


class Plain(Protocol):
    """What can say by which single request a range is read."""

    def plain_read(self, offset: int, length: int) -> tuple[Address, bytearray] | None: ...


class BulkReads:
    """Of one mount. All methods belong to the loop's thread."""

    def __init__(self, device: int, loop: asyncio.AbstractEventLoop) -> None:
        self._device = device
        self._loop = loop
        self._carriers: set[_Carrier] = set()
        self._idle: dict[Address, list[_Carrier]] = {}
        self._connecting: dict[Address, asyncio.Task[None]] = {}
        self._remote: set[Address] = set()  # gateways on other hosts
        self._watching: asyncio.TimerHandle | None = None
        self._closed = False

    def take(self, unique: int, file: Plain, offset: int, length: int, ended: Ended) -> bool:
        """Answers request `unique` with these bytes. False, and nothing happens, if it has to go the usual way."""
        found = None if self._closed else file.plain_read(offset, length)
        if found is None:
            return False
        address, header = found
        idle = self._idle.get(address)
        if not idle:
            self._connect(address)
            return False
        return idle.pop().start(unique, header, length, ended, self._loop.time())

    def close(self) -> None:
        """Ends all connections; reads under way get no answer."""
        self._closed = True
        if self._watching is not None:
            self._watching.cancel()
        for task in self._connecting.values():
            task.cancel()
        for carrier in list(self._carriers):
            carrier.close()

    # -- for carriers

    def rest(self, carrier: _Carrier) -> None:
        """It is free for another read."""
        carrier.since = self._loop.time()
        self._idle.setdefault(carrier.address, []).append(carrier)

    def forget(self, carrier: _Carrier) -> None:
        self._loop.remove_reader(carrier.socket)
        self._carriers.discard(carrier)
        idle = self._idle.get(carrier.address, [])
        if carrier in idle:
            idle.remove(carrier)

    def give_up(self, problem: OSError) -> None:
        """The kernel does not take answers in this way."""
        log.warning("large reads are copied: %s", problem)
        self._closed = True

    @property
    def device(self) -> int:
        return self._device

    # -- connections

    def _connect(self, address: Address) -> None:
        """One connection more, in the background."""
        if address in self._connecting or address in self._remote or len(self._carriers) >= CARRIERS:
            return
        task = self._loop.create_task(self._connected(address))
        self._connecting[address] = task
        task.add_done_callback(lambda _: self._connecting.pop(address, None))

    async def _connected(self, address: Address) -> None:
        try:
            sock = await dial(self._loop, address)
        except OSError as problem:
            log.debug("no connection for large reads to %s: %s", describe(address), problem)
            return
        if not _is_local(sock):
            self._remote.add(address)
            sock.close()
            return
        try:
            carrier = _Carrier(self, address, sock)
        except OSError as problem:
            sock.close()
            self.give_up(problem)
            return
        self._carriers.add(carrier)
        self._loop.add_reader(sock, carrier.readable)
        self.rest(carrier)
        if self._watching is None:
            self._watching = self._loop.call_later(WATCH_S, self._watch)

    def _watch(self) -> None:
        now = self._loop.time()
        for carrier in list(self._carriers):
            if now > carrier.since + (STALL_S if carrier.is_busy else IDLE_S):
                carrier.fail()
        self._watching = self._loop.call_later(WATCH_S, self._watch) if self._carriers else None


class _Carrier:
    """One connection and one pipe, for one read at a time."""

    __slots__ = (
        "_ended",
        "_head",
        "_left",
        "_length",
        "_owner",
        "_sink",
        "_source",
        "_unique",
        "address",
        "since",
        "socket",
    )

    def __init__(self, owner: BulkReads, address: Address, sock: socket.socket) -> None:
        """OSError if there can be no pipe that is large enough."""
        self.address = address
        self.socket = sock
        self.since = 0.0  # when the read under way began, or the rest
        self._owner = owner
        self._ended: Ended | None = None  # of the read under way
        self._unique = 0
        self._length = 0  # of its data
        self._head = b""  # of the answer, as far as it is here
        self._left = 0  # data that is not in the pipe yet
        self._source, self._sink = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.fcntl(self._sink, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        except OSError:
            self._close_pipe()
            raise

    @property
    def is_busy(self) -> bool:
        return self._ended is not None

    def start(self, unique: int, header: bytearray, length: int, ended: Ended, now: float) -> bool:
        """False if the connection is broken."""
        try:
            whole = self.socket.send(header) == HEADER_SIZE  # nothing else is in its way
        except OSError:
            whole = False
        if not whole:
            self.close()
            return False
        self._unique, self._length, self._ended = unique, length, ended
        self._head, self._left = b"", length
        self.since = now
        return True

    def readable(self) -> None:
        try:
            if not self.is_busy or not self._move():
                self.fail()
        except BlockingIOError:
            pass  # the rest is on its way
        except OSError:
            self.fail()

    def _move(self) -> bool:
        """What has arrived goes into the pipe, and to the kernel once it is whole. False if that cannot be."""
        moved = False
        if len(self._head) < HEADER_SIZE:
            part = self.socket.recv(HEADER_SIZE - len(self._head))
            self._head += part
            if len(self._head) < HEADER_SIZE:
                return bool(part)
            if _ANSWER.unpack(self._head) != (self._length, 0):
                return False
            os.write(self._sink, OUT_HEADER.pack(OUT_SIZE + self._length, 0, self._unique))
            moved = True
        while self._left:
            try:
                count = os.splice(self.socket.fileno(), self._sink, self._left, flags=_SPLICE_NONBLOCK)
            except BlockingIOError:
                if not moved:  # although there was something to read: the pipe has no slot left
                    self._owner.give_up(OSError(errno.ENOBUFS, "answers come in too many pieces for a pipe"))
                return moved
            if not count:
                return False
            self._left -= count
            moved = True
        self._deliver()
        return True

    def _deliver(self) -> None:
        ended, self._ended = self._ended, None
        assert ended is not None
        size = OUT_SIZE + self._length
        try:
            if os.splice(self._source, self._owner.device, size) != size:
                raise OSError(errno.EIO, "only a part of an answer was taken")
        except OSError as problem:
            # ENOENT: the caller was killed meanwhile. ENODEV: unmounted. Neither waits for us any more.
            answered = problem.errno in (errno.ENOENT, errno.ENODEV)
            if not answered:
                self._owner.give_up(problem)
            self.close()  # what is in the pipe belongs to nobody
            ended(answered)
            return
        self._owner.rest(self)
        ended(True)

    def fail(self) -> None:
        """Ends; a read under way is made anew."""
        ended, self._ended = self._ended, None
        self.close()
        if ended is not None:
            ended(False)

    def close(self) -> None:
        self._owner.forget(self)
        self.socket.close()
        self._close_pipe()

    def _close_pipe(self) -> None:
        os.close(self._source)
        os.close(self._sink)


def _is_local(sock: socket.socket) -> bool:
    """Both ends are on this host."""
    return sock.family == socket.AF_UNIX or sock.getpeername()[0] == sock.getsockname()[0]

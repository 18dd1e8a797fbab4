"""A hyper volume (up to 16 PB) as sheepfs wants its volumes: the client for threads, on a few threads of its own.

It keeps to the gateway that it was opened through: requests wait for that one, bounded, and then fail with EIO.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from sheepdog.cluster.client.address import Address
from sheepdog.cluster.client.connection import Dial
from sheepdog.cluster.client.exclusive import VolumeLock
from sheepdog.cluster.client.hyper import HyperVolume
from sheepdog.cluster.core.errors import PeerError
from sheepdog.cluster.core.messages import Buffer
from sheepdog.frontends.sheepfs.cluster import Extent, ReadDone, WriteDone
from sheepdog.frontends.sheepfs.transport import errno_of, error

THREADS = 16  # requests under way at a time

T = TypeVar("T")


class ThreadedHyperVolume:
    """`cluster.Volume`; made by `open`."""

    read_only = False

    def __init__(self, volume: HyperVolume, name: str, pool: ThreadPoolExecutor, lock: VolumeLock | None) -> None:
        self._volume = volume
        self._name = name
        self._pool = pool
        self._lock = lock
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def open(cls, address: Address, name: str, lock: VolumeLock | None = None) -> ThreadedHyperVolume:
        """`lock` is released when the volume has been closed."""
        pool = ThreadPoolExecutor(THREADS, "hyper")
        try:
            volume = await _in(pool, lambda: HyperVolume.open(address, name.encode(), dial=_dial(lock)))
        except BaseException:
            pool.shutdown(wait=False)
            raise
        return cls(volume, name, pool, lock)

    @property
    def size(self) -> int:
        return self._volume.size

    @property
    def is_lost(self) -> bool:
        return self._lock is not None and self._lock.is_lost

    def submit_read(self, offset: int, length: int, done: ReadDone) -> None:
        def ended(work: asyncio.Future[Buffer]) -> None:
            problem = _problem(work)
            done(problem, b"" if problem else work.result())

        self._start(lambda: self._volume.read(offset, length)).add_done_callback(ended)

    def submit_write(self, offset: int, data: Buffer, durable: bool, done: WriteDone) -> None:
        work = self._start(lambda: self._volume.write(offset, data, durable))
        work.add_done_callback(lambda work: done(_problem(work)))

    def plain_read(self, offset: int, length: int) -> None:
        """Its maps are looked up in threads."""

    async def read(self, offset: int, length: int) -> Buffer:
        return await self._run(lambda: self._volume.read(offset, length))

    async def write(self, offset: int, data: Buffer, durable: bool = False) -> None:
        await self._run(lambda: self._volume.write(offset, data, durable))

    async def flush(self) -> None:
        await self._run(self._volume.flush)

    async def zero(self, offset: int, length: int) -> None:
        await self._run(lambda: self._volume.zero(offset, length))

    async def resize(self, size: int) -> None:
        await self._run(lambda: self._volume.resize(size))

    async def refresh(self) -> None:
        await self._run(self._volume.refresh)

    def allocated_bytes(self) -> int:
        return self._volume.allocated_bytes()

    def extents(self, offset: int, length: int) -> Iterable[Extent]:
        return self._volume.extents(offset, length)

    async def move(self, address: Address) -> None:
        """What is under way ends at the old gateway."""
        fresh = await self._run(
            lambda: HyperVolume.open(address, self._name.encode(), patience_s=0, dial=_dial(self._lock))
        )
        old, self._volume = self._volume, fresh
        await self._run(old.close)

    async def settle(self) -> None:
        await self.flush()

    async def close(self) -> None:
        try:
            await self._run(self._volume.close)
            if self._lock is not None:
                await self._run(self._lock.release)
        finally:
            self._pool.shutdown(wait=False)

    def _start(self, call: Callable[[], T]) -> asyncio.Future[T]:
        return self._loop.run_in_executor(self._pool, call)

    async def _run(self, call: Callable[[], T]) -> T:
        return await _in(self._pool, call)


def _dial(lock: VolumeLock | None) -> Dial | None:
    return lock.dial if lock is not None else None


async def _in(pool: ThreadPoolExecutor, call: Callable[[], T]) -> T:
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, call)
    except PeerError as problem:
        raise error(errno_of(problem)) from problem


def _problem(work: asyncio.Future[T]) -> OSError | None:
    """What a request ended with, as the OSError that the user is to see."""
    if work.cancelled():
        return error(errno_of(asyncio.CancelledError()))
    problem = work.exception()
    if problem is None or isinstance(problem, OSError):
        return problem
    return error(errno_of(problem))

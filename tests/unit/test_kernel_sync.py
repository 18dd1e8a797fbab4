"""The kernel's own asynchronous sync: no thread of ours, no error lost, and threads where it cannot be had."""

from __future__ import annotations

import asyncio
import errno
import os
import struct
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from sheepdog.cluster.host import kernel_sync
from sheepdog.cluster.host.aligned import AlignedMemory
from sheepdog.cluster.host.disk import RealDisk
from sheepdog.cluster.host.kernel_sync import KERNEL_SYNCS, KernelSync, LoopWorkers
from sheepdog.cluster.host.loop import TurnLoop, new_loop
from sheepdog.cluster.host.system_call import system_call
from sheepdog.cluster.host.workers import write_and_sync

SECONDS = 20


class _Watched(RealDisk):
    """Knows which of its syncs ran in this process."""

    def __init__(self) -> None:
        self.synced: list[int] = []

    def fdatasync(self, fd: int, /) -> None:  # type: ignore[override]
        self.synced.append(threading.get_ident())
        os.fdatasync(fd)


class World:
    def __init__(self, path: Path) -> None:
        self.logged: list[str] = []
        self.loop: TurnLoop = new_loop(lambda level, text: self.logged.append(text))
        self.disk = _Watched()
        self.workers = LoopWorkers(self.loop, lambda call: void(self.loop.call_soon_threadsafe(call)))
        self.fd = self.disk.open(str(path / "file"), os.O_RDWR | os.O_CREAT)
        self.results: list[OSError | None] = []

    def wait(self, count: int) -> list[OSError | None]:
        self.wait_until(lambda: len(self.results) >= count)
        return self.results

    def wait_until(self, arrived: Callable[[], bool]) -> None:
        async def wait() -> None:
            while not arrived():
                await asyncio.sleep(0.001)

        self.loop.run_until_complete(asyncio.wait_for(wait(), SECONDS))

    def sync(self) -> None:
        self.workers.sync(self.disk, self.fd, self.results.append)

    def through(self, path: Path) -> int:
        """A descriptor of the same file whose writes go around the page cache, where the file system can do that."""
        name = str(path / "file")
        fd = self.disk.open_direct(name)
        return fd if fd >= 0 else os.open(name, os.O_WRONLY)

    def close(self) -> None:
        self.workers.stop()
        self.loop.close()


def void(_: object) -> None:
    pass


def reporting(world: World, result: int | None) -> Callable[..., int]:
    """System calls among which the one that tells ends tells this of the first; None: that there is none."""
    kernel = world.workers._kernel
    assert kernel is not None

    def reported(number: int, *arguments: int | None) -> int:
        got = system_call(number, *arguments)
        if number != kernel._getevents:
            return got
        if result is None:
            return 0
        struct.pack_into("<q", kernel._events, 16, result)
        return got

    return reported


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    try:
        KernelSync().close()
    except OSError as error:
        pytest.skip(f"no io_submit here: {error}")
    world = World(tmp_path)
    yield world
    world.close()
    assert not world.logged


def test_the_kernel_syncs_without_a_thread_of_ours(world: World) -> None:
    threads = threading.active_count()
    for count in range(1, 6):
        os.pwrite(world.fd, b"x" * 4096, 4096 * count)
        world.sync()
        assert world.results == [None] * (count - 1)  # it is never done within the call
        assert world.wait(count)[-1] is None
    assert not world.disk.synced
    assert threading.active_count() == threads


def test_the_kernel_writes_what_is_durable_then_without_a_thread_of_ours(world: World, tmp_path: Path) -> None:
    through = world.through(tmp_path)
    threads = threading.active_count()
    memory = AlignedMemory(3 * 4096)
    for count in range(1, 4):
        data = os.urandom(2 * 4096)
        memory.view[: len(data)] = data
        world.workers.write_durably(world.disk, through, memory, len(data), 4096 * count, world.results.append)
        assert world.wait(count)[-1] is None
        assert os.pread(world.fd, len(data), 4096 * count) == data
    assert not world.disk.synced
    assert threading.active_count() == threads


@pytest.mark.parametrize("result", [4096, 0, -errno.EIO])
def test_a_write_that_is_not_whole_has_failed(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result: int
) -> None:
    monkeypatch.setattr(kernel_sync, "system_call", reporting(world, result))
    memory = AlignedMemory(8192)
    world.workers.write_durably(world.disk, world.through(tmp_path), memory, 8192, 0, world.results.append)
    (error,) = world.wait(1)
    assert isinstance(error, OSError)
    assert error.errno == errno.EIO
    assert not world.disk.synced  # never tried again


def test_the_kernel_is_asked_for_a_write_that_ends_on_the_disk(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = world.workers._kernel
    assert kernel is not None
    asked: list[tuple[int, ...]] = []

    def noting(number: int, *arguments: int | None) -> int:
        if number == kernel._submit:
            asked.append(struct.unpack_from("<QIi", kernel._request))  # data, key, RWF_* flags
        return system_call(number, *arguments)

    monkeypatch.setattr(kernel_sync, "system_call", noting)
    world.workers.write_durably(world.disk, world.through(tmp_path), AlignedMemory(4096), 4096, 0, world.results.append)
    world.sync()
    assert world.wait(2) == [None, None]
    assert [flags for _, _, flags in asked] == [os.RWF_DSYNC, 0]


def test_a_thread_that_has_written_a_part_has_failed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.disk, "pwrite", lambda fd, data, offset: len(data) - 512)
    with pytest.raises(OSError, match="written in part"):
        write_and_sync(world.disk, world.fd, AlignedMemory(4096).view, 0)
    assert not world.disk.synced


def test_what_the_kernel_does_not_begin_a_thread_writes(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(number: int, *arguments: int | None) -> int:
        raise OSError(errno.EAGAIN, "busy")

    through = world.through(tmp_path)
    monkeypatch.setattr(kernel_sync, "system_call", refused)
    memory = AlignedMemory(4096)
    memory.view[:] = b"y" * 4096
    world.workers.write_durably(world.disk, through, memory, 4096, 0, world.results.append)
    assert world.wait(1) == [None]
    monkeypatch.undo()
    assert os.pread(world.fd, 4096, 0) == b"y" * 4096
    assert len(world.disk.synced) == 1


def test_as_many_as_the_kernel_takes_run_at_the_same_time_and_threads_do_the_rest(world: World) -> None:
    for _ in range(KERNEL_SYNCS + 2):
        world.sync()
    assert world.wait(KERNEL_SYNCS + 2) == [None] * (KERNEL_SYNCS + 2)
    assert len(world.disk.synced) == 2
    assert threading.get_ident() not in world.disk.synced
    world.sync()  # the kernel's way is free again
    world.wait(KERNEL_SYNCS + 3)
    assert len(world.disk.synced) == 2


def test_the_failure_of_one_of_several_is_told_to_its_caller(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = world.workers._kernel
    assert kernel is not None

    def reported(number: int, *arguments: int | None) -> int:
        got = system_call(number, *arguments)
        if number == kernel._getevents:
            for index in range(got):
                (slot,) = struct.unpack_from("<Q", kernel._events, 32 * index)
                if slot == 2:
                    struct.pack_into("<q", kernel._events, 32 * index + 16, -errno.EIO)
        return got

    monkeypatch.setattr(kernel_sync, "system_call", reported)
    results: dict[int, OSError | None] = {}
    for number in range(5):
        world.workers.sync(world.disk, world.fd, partial(results.__setitem__, number))
    world.wait_until(lambda: len(results) == 5)
    assert {number: None if error is None else error.errno for number, error in results.items()} == {
        0: None, 1: None, 2: errno.EIO, 3: None, 4: None,
    }  # fmt: skip


def test_what_cannot_be_begun_fails_as_it_does_in_a_thread(world: World) -> None:
    os.close(world.fd)
    world.sync()
    (error,) = world.wait(1)
    assert isinstance(error, OSError)
    assert error.errno == errno.EBADF
    world.fd = world.disk.open("/dev/null", os.O_RDWR)
    world.sync()  # the kernel's way is free again
    assert isinstance(world.wait(2)[1], OSError | None)


@pytest.mark.parametrize(
    ("result", "code"), [(-errno.EIO, errno.EIO), (-errno.ENOSPC, errno.ENOSPC), (None, errno.EIO)]
)
def test_what_the_kernel_reports_is_the_result(
    world: World, monkeypatch: pytest.MonkeyPatch, result: int | None, code: int
) -> None:
    """`None`: it says that something has ended, and has nothing."""
    monkeypatch.setattr(kernel_sync, "system_call", reporting(world, result))
    world.sync()
    (error,) = world.wait(1)
    assert isinstance(error, OSError)
    assert error.errno == code
    assert not world.disk.synced  # never tried again


def test_where_the_system_has_none_threads_sync(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("platform.machine", lambda: "pdp11")
    world = World(tmp_path)
    world.sync()
    assert world.wait(1) == [None]
    assert len(world.disk.synced) == 1
    world.close()


def test_an_end_waits_for_what_is_under_way(world: World) -> None:
    for index in range(64):
        os.pwrite(world.fd, os.urandom(1 << 16), index << 16)
    world.sync()
    world.workers.stop()
    assert world.results == []
    assert world.workers._kernel is None

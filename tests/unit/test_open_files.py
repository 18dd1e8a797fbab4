"""Which object files stay open, what closing and reopening them costs."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from tests.support.stores import StoreDriver

from sheepdog.cluster.core.errors import Corrupt, StoreError
from sheepdog.cluster.core.ids import ObjectId, Version, Vid, data_oid
from sheepdog.cluster.host.disk import FileInfo, RealDisk
from sheepdog.cluster.host.object_file import CROWD, SHRINK_LOOK, Copy, OpenFiles
from sheepdog.cluster.host.object_store import ignore
from sheepdog.cluster.host.workers import CallSoon, ThreadWorkers

SIZE = 1 << 20
OIDS = [data_oid(Vid(1), index) for index in range(40)]
V1 = Version(1, 1, 1)
_T = TypeVar("_T")


class CountingWorkers(ThreadWorkers):
    jobs = 0

    def run(self, call: Callable[[], _T], done: Callable[[_T | OSError], None]) -> None:
        self.jobs += 1
        super().run(call, done)


def test_a_file_that_the_caches_know_is_reopened_without_a_thread(tmp_path: Path) -> None:
    driver = StoreDriver(str(tmp_path), nosync=True)
    files = driver.store.copies.files
    files._limit = 2
    for number, oid in enumerate(OIDS):
        driver.create(oid, SIZE, 0, bytes([number]) * 4096, V1)
    driver.flush()
    while len(files) > 2:
        driver.step()
    workers = CountingWorkers(driver.call_soon)
    driver.store.copies.workers = workers
    for number, oid in enumerate(OIDS):
        assert driver.read(oid, 0, 4096) == bytes([number]) * 4096
    assert workers.jobs == 0
    assert len(files) <= 2 + 2, "those that were open at first may be on their way to the disk"
    driver.crash()


def test_another_object_in_the_place_is_noticed(tmp_path: Path) -> None:
    driver = StoreDriver(str(tmp_path), nosync=True)
    for number, oid in enumerate(OIDS[:3]):
        driver.create(oid, SIZE, 0, bytes([number]) * 4096, V1)
    driver.flush()
    files = driver.store.copies.files
    files._limit = 1
    while len(files) > 1:
        files.shrink()
        driver.step()
    one, other = [copy for copy in map(driver.store.copies.find, OIDS[:3]) if copy.fd < 0]
    os.replace(other.path, one.path)
    with pytest.raises(Corrupt):
        driver.read(one.oid, 0, 4096)
    driver.crash()


class SlowSyncs(ThreadWorkers):
    """Nothing is synced until it is told to."""

    def __init__(self, call_soon: CallSoon) -> None:
        super().__init__(call_soon)
        self.waiting: list[Callable[[], None]] | None = []

    def run(self, call: Callable[[], _T], done: Callable[[_T | OSError], None]) -> None:
        start = functools.partial(super().run, call, done)
        if self.waiting is None:
            start()
        else:
            self.waiting.append(start)

    def go(self) -> None:
        starts, self.waiting = self.waiting or [], None
        for start in starts:
            start()


def test_more_new_files_than_the_disk_can_sync_wait_for_it(tmp_path: Path) -> None:
    """The process would be out of descriptors instead, and its clients' requests would fail."""
    driver = StoreDriver(str(tmp_path), nosync=True)
    workers = driver.store._syncs._workers = driver.store.copies.workers = SlowSyncs(driver.call_soon)
    files = driver.store.copies.files
    files._limit = 4
    answers: list[StoreError | None] = []
    for number, oid in enumerate(OIDS):
        driver.store.create(oid, SIZE, 0, bytes([number + 1]) * 4096, V1, False, answers.append)
        driver.settle()
    assert 0 < len(answers) <= CROWD * 4 + 1
    reads: list[object] = []
    driver.store.read(OIDS[0], 0, 4096, reads.append)
    workers.go()
    while len(answers) < len(OIDS) or len(files) > 4 or not reads:
        driver.step()
    assert answers == [None] * len(OIDS)
    assert reads == [b"\1" * 4096]
    for number, oid in enumerate(OIDS):
        assert driver.read(oid, 0, 4096) == bytes([number + 1]) * 4096
    driver.crash()


def test_a_closed_file_is_not_opened_where_too_many_wait_for_a_sync(tmp_path: Path) -> None:
    driver = StoreDriver(str(tmp_path), nosync=True)
    files = driver.store.copies.files
    files._limit = 2
    for number, oid in enumerate(OIDS):
        driver.create(oid, SIZE, 0, bytes([number + 1]) * 4096, V1)
    driver.flush()
    while len(files) > 2:
        driver.step()
    workers = driver.store._syncs._workers = SlowSyncs(driver.call_soon)
    answers: list[StoreError | None] = []
    for oid in OIDS:
        driver.store.write(oid, 4096, b"new" * 100, Version(1, 1, 2), False, answers.append)
        driver.settle()
    assert len(files) <= CROWD * 2 + 2
    assert len(answers) < len(OIDS)
    workers.go()
    while len(answers) < len(OIDS):
        driver.step()
    for oid in OIDS:
        assert driver.read(oid, 4096, 300) == b"new" * 100
    driver.crash()


def test_a_checkpoint_ends_whose_files_others_have_closed_meanwhile(tmp_path: Path) -> None:
    """However many of them: each was a call inside of the last one's once, and after a thousand nothing went on."""
    many = [data_oid(Vid(3), index) for index in range(700)]
    driver = StoreDriver(str(tmp_path), nosync=True)
    for oid in many:
        driver.create(oid, 4096, 0, b"x" * 4096, V1)
    slow = driver.store._syncs._workers = SlowSyncs(driver.call_soon)
    driver.store._journal.switch()
    driver.store._checkpoints.begin(driver.store._pipeline)
    driver.settle()
    assert slow.waiting
    own = len(slow.waiting)  # what the checkpoint waits for; the rest is settled, and closed, before that
    files = driver.store.copies.files
    files._limit = 2
    for _ in many:
        files.shrink()
    slow.waiting = slow.waiting[own:] + slow.waiting[:own]
    slow.go()
    while driver.store._checkpoints.running:
        driver.step()
    assert driver.store._checkpoints.count == 1
    assert driver.read(many[-1], 0, 4096) == b"x" * 4096
    driver.crash()


def test_what_waits_for_a_file_of_an_object_that_is_replaced_meets_the_new_one(tmp_path: Path) -> None:
    driver = StoreDriver(str(tmp_path), nosync=True)
    files = driver.store.copies.files
    files._limit = 1
    for oid in OIDS[:3]:
        driver.create(oid, SIZE, 0, b"old" * 4096, V1)
    driver.flush()
    while len(files) > 1:
        driver.step()
    workers = driver.store._syncs._workers = SlowSyncs(driver.call_soon)
    for oid in OIDS[3:8]:
        driver.store.create(oid, SIZE, 0, b"a" * 4096, V1, False, ignore)
    driver.settle()
    target = next(oid for oid in OIDS[:3] if driver.store.copies.find(oid).fd < 0)
    reads: list[object] = []
    written: list[StoreError | None] = []
    driver.store.read(target, 0, 3, reads.append)
    driver.store.write(target, 1, b"x", Version(1, 1, 2), False, written.append)
    assert not reads
    driver.store.create(target, SIZE, 0, b"new" * 4096, Version(1, 1, 3), False, ignore)
    driver.settle()
    workers.go()
    while not reads or not written:
        driver.step()
    assert (reads, written) == ([b"new"], [None])
    driver.settle()
    assert driver.read(target, 0, 6) == b"newnew"
    driver.crash()


class Dirty(Copy):
    """Counts how often it is looked at."""

    looks = 0

    @property
    def pins(self) -> int:
        Dirty.looks += 1
        return 0

    @pins.setter
    def pins(self, value: int) -> None:
        pass


def test_a_burst_of_dirty_files_is_not_looked_through_for_each_new_one(tmp_path: Path) -> None:
    driver = StoreDriver(str(tmp_path), nosync=True)
    settled: list[ObjectId] = []
    files = OpenFiles(driver.disk, lambda copy: settled.append(copy.oid), limit=10)
    count = 1000
    for index in range(count):
        copy = Dirty(data_oid(Vid(2), index), SIZE, V1, driver.store.copies.homes[0])
        copy.dirty = True
        files.add(copy)
    assert Dirty.looks <= 2 * SHRINK_LOOK * count
    assert len(set(settled)) > count / 2, "each is asked to become clean, not always the same ones"
    driver.crash()


def test_the_file_whose_use_is_longest_ago_is_closed_first(tmp_path: Path) -> None:
    driver = StoreDriver(str(tmp_path), nosync=True)
    files = OpenFiles(driver.disk, lambda copy: None, limit=4)
    copies = [Copy(oid, SIZE, V1, driver.store.copies.homes[0]) for oid in OIDS[:6]]
    for index, copy in enumerate(copies):
        if index == 4:
            files.used(copies[0].oid)
        copy.attach(os.open(os.devnull, os.O_RDONLY), bytearray(8))
        files.add(copy)
    assert [copy.fd >= 0 for copy in copies] == [True, False, False, True, True, True]
    files.close_all()
    driver.crash()


def test_an_open_that_would_wait_does_not(tmp_path: Path) -> None:
    disk = RealDisk()
    path = tmp_path / "file"
    path.write_bytes(b"content")
    fd = disk.open_cached(str(path), os.O_RDWR)
    assert disk.info(fd) == FileInfo(7, disk.info(fd).allocated)
    assert not os.get_inheritable(fd)
    disk.close(fd)
    with pytest.raises(BlockingIOError):
        disk.open_cached(str(tmp_path / "missing"), os.O_RDWR)

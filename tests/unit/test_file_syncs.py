"""Syncs of object files: so many at a time, in turn, and none that is lost when a disk fails."""

from __future__ import annotations

import errno
from collections.abc import Callable

from tests.support.sim_disk import SimDisk

from sheepdog.cluster.core.errors import DiskError, StoreError
from sheepdog.cluster.core.ids import Version, Vid, data_oid
from sheepdog.cluster.core.limits import FILE_SYNCS
from sheepdog.cluster.core.ports import Done
from sheepdog.cluster.host.directory import ObjectDirectory
from sheepdog.cluster.host.disk import Disk
from sheepdog.cluster.host.object_file import Copy
from sheepdog.cluster.host.syncs import FileSyncs
from sheepdog.cluster.host.workers import ThreadWorkers

SIZE = 1 << 20
MANY = 3000  # more than calls may be inside of one another


class Waiting(ThreadWorkers):
    """Syncs end when the test says so."""

    def __init__(self) -> None:
        super().__init__(lambda call: None)
        self.files: list[tuple[int, Callable[[OSError | None], None]]] = []

    def sync(self, disk: Disk, fd: int, done: Callable[[OSError | None], None]) -> None:
        self.files.append((fd, done))


class World:
    def __init__(self) -> None:
        disk = SimDisk()
        self.home = ObjectDirectory(disk, "/disk", lambda level, text: None)
        self.workers = Waiting()
        self.syncs = FileSyncs(disk, self.workers, self.fail, lambda copy: None, lambda copy, intents: None)
        self.ended: list[tuple[int, StoreError | None]] = []

    def fail(self, home: ObjectDirectory, error: OSError) -> StoreError:
        home.failed = True
        return DiskError(str(error))

    def copy(self, number: int) -> Copy:
        copy = Copy(data_oid(Vid(1), number), SIZE, Version(1, 1, 1), self.home)
        copy.fd = number
        return copy

    def done(self, number: int) -> Done:
        return lambda error: self.ended.append((number, error))

    def take(self) -> list[tuple[int, Callable[[OSError | None], None]]]:
        files, self.workers.files = self.workers.files, []
        return files


def test_a_bounded_number_is_under_way_and_the_others_follow_in_turn() -> None:
    world = World()
    copies = [world.copy(number) for number in range(3 * FILE_SYNCS)]
    for copy in copies:
        world.syncs.sync(copy, world.done(copy.fd))
    order = []
    while files := world.take():
        assert len(files) <= FILE_SYNCS
        order += [fd for fd, _ in files]
        assert all(copy.pins for copy in copies if copy.fd not in order), "a file was left to be closed before its sync"
        for _, done in files:
            done(None)
    assert order == list(range(3 * FILE_SYNCS))
    assert world.ended == [(number, None) for number in order]
    assert not any(copy.pins for copy in copies)


def test_who_asks_while_a_sync_waits_for_its_turn_shares_it_and_who_asks_later_does_not() -> None:
    world = World()
    others = [world.copy(number) for number in range(FILE_SYNCS)]
    for copy in others:
        world.syncs.sync(copy, world.done(copy.fd))
    last = world.copy(100)
    world.syncs.mark_dirty(last)
    world.syncs.sync(last, world.done(1))
    world.syncs.cover(last, world.done(2))
    begun = world.take()
    for _, done in begun:
        done(None)
    ((fd, synced),) = world.take()
    assert fd == 100
    world.syncs.mark_dirty(last)
    world.syncs.cover(last, world.done(3))
    world.ended.clear()
    synced(None)
    assert world.ended == [(1, None), (2, None)]
    assert world.syncs.dirty(None) == [last]
    ((fd, synced),) = world.take()
    synced(None)
    assert (fd, world.ended[-1]) == (100, (3, None))
    assert world.syncs.dirty(None) == []


def test_a_disk_that_fails_fails_all_that_wait_for_it() -> None:
    world = World()
    for number in range(MANY):
        world.syncs.sync(world.copy(number), world.done(number))
    files = world.take()
    for _, done in files:
        done(OSError(errno.EIO, "input/output error"))
    assert not world.take(), "something of a failed disk was synced"
    assert sorted(number for number, _ in world.ended) == list(range(MANY))
    assert all(isinstance(error, DiskError) for _, error in world.ended)

"""Durable records go around the page cache, and everything else stays in its order with them."""

from __future__ import annotations

import errno

import pytest
from tests.support.sim_disk import SimDisk, Sync, Write
from tests.support.stores import JOURNAL_BYTES, StoreDriver

from sheepdog.cluster.core.errors import DiskError, StoreError
from sheepdog.cluster.core.ids import Version, Vid, data_oid
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.ports import Buffer
from sheepdog.cluster.host.journal import AHEAD_BYTES, THROUGH_BYTES, THROUGH_RECORD_BYTES
from sheepdog.cluster.host.pipeline import LOOKS_BEFORE_SYNC

SIZE = 1 << 20
BLOCKS = SIZE // BLOCK_SIZE
OID, OTHER = data_oid(Vid(1), 0), data_oid(Vid(2), 0)
PIECE = THROUGH_RECORD_BYTES


def v(counter: int) -> Version:
    return Version(1, 1, counter << 16)


def block(counter: int) -> bytes:
    return b"%08d" % counter * (BLOCK_SIZE // 8)


class Disk(SimDisk):
    """Counts what is written around its page cache."""

    def __init__(self) -> None:
        super().__init__()
        self.written_through = 0
        self.full = ""  # the file that has no room
        self._through: list[int] = []

    def open_direct(self, path: str) -> int:
        self._through.append(super().open_direct(path))
        return self._through[-1]

    def pwrite(self, fd: int, data: Buffer, offset: int, /) -> int:
        if self._open[fd] is self.names.get(self.full):
            raise OSError(errno.ENOSPC, "full")
        self.written_through += fd in self._through
        return super().pwrite(fd, data, offset)


class World:
    """A store on a simulated disk, with one object."""

    def __init__(self) -> None:
        self.disk = Disk()
        self.driver = StoreDriver("/meta", disk=self.disk)
        self.driver.create(OID, SIZE, 0, bytes(SIZE), v(1), durable=True)
        self.driver.flush()
        self.counter = 1
        self.answers: list[StoreError | None] = []

    def write(self, durable: bool) -> None:
        """The next block, without waiting."""
        self.counter += 1
        data, place = block(self.counter), self.counter % BLOCKS * BLOCK_SIZE
        self.driver.store.write(OID, place, data, v(self.counter), durable, self.answers.append)

    def wait(self, count: int) -> None:
        while len(self.answers) < count:
            self.driver.step()
        assert self.answers == [None] * count
        self.driver.settle()

    def journal(self, since: int) -> list[Write | Sync]:
        """What happened to the journal."""
        number = self.disk.names["/meta/journal_file1"].number
        return [
            effect for effect in self.disk.log[since:] if isinstance(effect, Write | Sync) and effect.inode == number
        ]

    def check_after_a_start(self) -> None:
        driver = StoreDriver("/meta", disk=self.disk)
        for counter in range(max(2, self.counter - BLOCKS + 1), self.counter + 1):
            assert driver.read(OID, counter % BLOCKS * BLOCK_SIZE, BLOCK_SIZE) == block(counter)


def test_durable_records_of_a_turn_are_one_write_of_whole_blocks_and_its_sync() -> None:
    world = World()
    for group in range(1, 5):
        since = len(world.disk.log)
        for _ in range(3):
            world.write(durable=True)
        world.wait(3 * group)
        (written, synced) = world.journal(since)
        assert isinstance(written, Write)
        assert isinstance(synced, Sync)
        assert written.offset % BLOCK_SIZE == len(written.data) % BLOCK_SIZE == 0
    world.check_after_a_start()


def test_who_comes_before_a_sync_begins_shares_it() -> None:
    world = World()
    since = len(world.disk.log)
    world.write(durable=True)
    for _ in range(LOOKS_BEFORE_SYNC):
        world.driver.step()  # the end of a turn
        world.write(durable=True)
    world.wait(1 + LOOKS_BEFORE_SYNC)
    assert len(world.journal(since)) == 2
    world.check_after_a_start()


def test_what_comes_while_records_are_written_through_goes_behind_them() -> None:
    world = World()
    world.write(durable=True)
    world.driver.settle()  # its write is handed over, and not done
    world.write(durable=False)
    world.write(durable=False)
    world.driver.settle()
    assert not world.answers
    world.wait(3)
    world.check_after_a_start()


def test_what_the_page_cache_has_is_synced_before_records_go_around_it() -> None:
    world = World()
    for durable in (True, False, True, True, False, False, True, True):
        since = len(world.disk.log)
        unsynced = world.driver.store._journal.synced < world.driver.store._journal.written
        world.write(durable)
        world.wait(len(world.answers) + 1)
        effects = world.journal(since)
        assert isinstance(effects[0], Write)
        assert any(isinstance(effect, Sync) for effect in effects) == durable
        # Behind blocks that the page cache does not have whole blocks are written, so that nothing need be read.
        assert (effects[0].offset % BLOCK_SIZE == 0) != unsynced
    world.check_after_a_start()


def test_what_waits_for_a_sync_of_the_page_cache_goes_around_it() -> None:
    world = World()
    world.write(durable=False)
    world.wait(1)
    world.write(durable=True)
    world.driver.settle()  # both are in the page cache, and being synced
    since = len(world.disk.log)
    world.write(durable=True)
    world.wait(3)
    _, written, _ = world.journal(since)
    assert isinstance(written, Write)
    assert written.offset % BLOCK_SIZE == 0
    world.check_after_a_start()


def test_the_journal_does_not_go_on_in_its_other_segment_while_records_are_written_through() -> None:
    world = World()
    number = world.driver.store._journal.number
    world.write(durable=True)
    world.driver.settle()
    count = JOURNAL_BYTES // 2 // BLOCK_SIZE + 100
    for _ in range(count):
        world.write(durable=False)
    assert world.driver.store._journal.number == number
    world.wait(1 + count)
    assert world.driver.store._journal.number == number + 1
    world.check_after_a_start()


def test_nothing_is_refused_for_lack_of_room_while_there_is_another_segment() -> None:
    """A change of another object waits for room, and the present segment is half full."""
    world = World()
    driver = world.driver
    driver.write(OID, 0, b"a" * SIZE, v(2), durable=True)  # changes of what has its place on the disk need no room
    world.counter = 2
    driver.create(OTHER, SIZE, 0, bytes(SIZE), v(1), durable=True)
    driver.flush()
    world.disk.full = f"/meta/obj/{OTHER:016x}"
    driver.write(OTHER, 0, block(0), v(2), durable=True)
    while not driver.store._journal.is_half_full():
        world.write(durable=True)
        world.wait(len(world.answers) + 1)
    assert driver.store._no_room.waiting
    assert driver.store._journal.other_is_free()
    before = len(world.answers)
    for _ in range(4):
        world.write(durable=True)
        driver.settle()  # the first is being written through meanwhile
    world.wait(before + 4)


def test_a_store_that_does_not_sync_writes_nothing_through() -> None:
    disk = Disk()
    driver = StoreDriver("/meta", nosync=True, disk=disk)
    driver.create(OID, SIZE, 0, bytes(SIZE), v(1), durable=True)
    for counter in range(2, 6):
        driver.write(OID, 0, block(counter), v(counter), durable=True)
        driver.store._pipeline.want_sync()  # as before a file is closed
        driver.settle()
    driver.close()
    assert disk.written_through == 0


def test_a_turn_with_more_than_is_written_through_at_once() -> None:
    world = World()
    pieces = SIZE // PIECE
    count = (THROUGH_BYTES + AHEAD_BYTES) // PIECE + 1
    for index in range(count):
        data = bytes([index + 1]) * PIECE
        world.driver.store.write(OID, index % pieces * PIECE, data, v(2 + index), True, world.answers.append)
    world.wait(count)
    driver = StoreDriver("/meta", disk=world.disk)
    for index in range(count - pieces, count):
        assert driver.read(OID, index % pieces * PIECE, PIECE) == bytes([index + 1]) * PIECE


def test_a_turn_with_a_large_record_goes_to_the_page_cache() -> None:
    world = World()
    through = world.disk.written_through
    world.driver.write(OID, SIZE - PIECE, bytes(PIECE), v(2), durable=True)
    assert world.disk.written_through == through + 1
    world.driver.write(OID, SIZE - 2 * PIECE, bytes(PIECE + BLOCK_SIZE), v(3), durable=True)
    assert world.disk.written_through == through + 1
    world.counter = 3
    world.write(durable=True)  # its block has begun in the page cache
    world.wait(1)
    assert world.disk.written_through == through + 2
    world.driver = StoreDriver("/meta", disk=world.disk)
    assert world.driver.read(OID, 4 * BLOCK_SIZE, BLOCK_SIZE) == block(4)
    assert world.driver.store.version(OID) == v(4)


def test_the_journal_goes_on_in_its_other_segment() -> None:
    """More than both segments hold, written through all the while, and zeros ahead only in the first pass."""
    world = World()
    zeros = 0
    for count in range(1, 4 * JOURNAL_BYTES // BLOCK_SIZE):
        since = len(world.disk.log)
        world.write(durable=True)
        world.wait(count)
        zeros += sum(isinstance(effect, Write) and len(effect.data) > AHEAD_BYTES for effect in world.disk.log[since:])
    assert world.driver.store._journal.number > 4
    assert JOURNAL_BYTES // (2 * AHEAD_BYTES) <= zeros <= JOURNAL_BYTES // AHEAD_BYTES + 2
    world.check_after_a_start()


def test_an_error_of_such_a_write_ends_the_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()

    def failing(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(world.disk, "pwrite", failing)
    world.write(durable=True)
    while not world.answers:
        world.driver.step()
    assert isinstance(world.answers[0], DiskError)
    assert len(world.driver.failed) == 1

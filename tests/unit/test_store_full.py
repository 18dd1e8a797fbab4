"""Full disks: refused before anything breaks, and what is in the journal waits for room instead of failing the disk."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest
from tests.support.stores import StoreDriver

from sheepdog.cluster.core.errors import NoSpace, StoreError, UsageError
from sheepdog.cluster.core.ids import ObjectId, Version, Vid, data_oid, inode_oid
from sheepdog.cluster.core.ports import Buffer
from sheepdog.cluster.host.disk import RealDisk
from sheepdog.cluster.host.journal import MOST_INTENTS
from sheepdog.cluster.host.store_options import StoreOptions

BLOCK = 4096
SIZE = 1 << 20
OID, OTHER = data_oid(Vid(1), 0), data_oid(Vid(2), 0)
JOURNAL_BYTES = 1 << 20
LARGE = 300_000  # written by another thread


def v(counter: int) -> Version:
    return Version(1, 1, counter << 16)


class FullDisk(RealDisk):
    """While `full`, nothing can be put into object files or their directories; the journal has what it needs."""

    def __init__(self) -> None:
        self.full = False
        self.partly = False  # the first half of a write still fits
        self.code = errno.ENOSPC

    def _check(self, path: str) -> None:
        if self.full and "/obj" in path:
            raise OSError(self.code, os.strerror(self.code))

    def open(self, path: str, flags: int) -> int:
        if flags & os.O_CREAT:
            self._check(path)
        return super().open(path, flags)

    def pwrite(self, fd: int, data: Buffer, offset: int, /) -> int:  # type: ignore[override]
        path = os.readlink(f"/proc/self/fd/{fd}")
        if self.full and self.partly and "/obj" in path and len(data) > 512:
            return os.pwrite(fd, memoryview(data)[: len(data) // 2], offset)
        self._check(path)
        return os.pwrite(fd, data, offset)

    def punch(self, fd: int, offset: int, length: int) -> None:
        self._check(os.readlink(f"/proc/self/fd/{fd}"))
        super().punch(fd, offset, length)

    def rename(self, old: str, new: str, /) -> None:  # type: ignore[override]
        self._check(new)
        os.rename(old, new)


@pytest.fixture
def disk() -> FullDisk:
    return FullDisk()


def opened(path: Path, disk: FullDisk) -> StoreDriver:
    return StoreDriver(str(path), disk=disk, options=StoreOptions(journal_bytes=JOURNAL_BYTES))


@pytest.fixture
def driver(tmp_path: Path, disk: FullDisk) -> StoreDriver:
    made = opened(tmp_path, disk)
    made.create(OID, SIZE, 0, b"a" * SIZE, v(1), durable=True)
    made.create(OTHER, SIZE, 0, b"o" * SIZE, v(1), durable=True)
    return made


def room_again(driver: StoreDriver, disk: FullDisk) -> None:
    disk.full = False
    driver.clock.fire()
    driver.flush()
    assert driver.failed == []
    assert "there is room again" in driver.logged[-1]


@pytest.mark.parametrize("partly", [False, True], ids=["at once", "half way"])
def test_what_was_acknowledged_waits_for_room(
    driver: StoreDriver, disk: FullDisk, tmp_path: Path, partly: bool
) -> None:
    disk.full, disk.partly = True, partly
    driver.write(OID, 2 * BLOCK, b"b" * BLOCK, v(2), durable=True)
    driver.flush()  # from here on the applier has met the full disk
    expected = b"a" * 2 * BLOCK + b"b" * BLOCK + b"a" * (SIZE - 3 * BLOCK)
    assert driver.read(OID, 0, SIZE) == expected
    with pytest.raises(NoSpace):
        driver.write(OID, 0, b"c" * BLOCK, v(3))
    with pytest.raises(NoSpace):
        driver.punch(OID, 0, BLOCK, v(3))
    with pytest.raises(NoSpace):
        driver.create(data_oid(Vid(3), 0), SIZE, 0, b"c", v(1))
    assert driver.store.version(OID) == v(2)
    driver.clock.fire()  # still no room
    assert driver.read(OID, 0, SIZE) == expected
    room_again(driver, disk)
    with open(tmp_path / "obj" / f"{OID:016x}", "rb") as file:
        assert file.read(SIZE) == expected
    driver.write(OID, 0, b"c" * BLOCK, v(3), durable=True)
    driver.close()
    again = opened(tmp_path, disk)
    assert again.store.version(OID) == v(3)
    assert again.read(OID, 0, SIZE) == b"c" * BLOCK + expected[BLOCK:]
    again.close()


def test_memory_that_lacks_is_no_excuse_for_what_was_acknowledged(driver: StoreDriver, disk: FullDisk) -> None:
    """A write that does not reach its file takes the disk out: the journal would be emptied without it."""
    disk.code, disk.full = errno.ENOMEM, True
    driver.write(OID, 0, b"b" * BLOCK, v(2), durable=True)
    driver.flush()
    assert driver.failed == [f"{driver.store.copies.homes[0].path}: {os.strerror(errno.ENOMEM)}"]
    driver.crash()


def test_a_restore_that_finds_no_room_for_its_holes_costs_no_disk(driver: StoreDriver, disk: FullDisk) -> None:
    driver.store.restore_begin(OID, SIZE)
    driver.settle()
    driver.flush()
    disk.full = True
    driver.store.restore_punch(OID, BLOCK, 2 * BLOCK)
    with pytest.raises(NoSpace):
        driver.restore_finish(OID, v(2))
    assert driver.failed == []
    disk.full = False
    driver.store.restore_begin(OID, SIZE)
    assert any(driver.store.table(OID)[8:24]), "what is there shows again"
    driver.store.restore_punch(OID, BLOCK, 2 * BLOCK)
    driver.restore_finish(OID, v(3))
    assert driver.read(OID, 0, 4 * BLOCK) == b"a" * BLOCK + bytes(2 * BLOCK) + b"a" * BLOCK
    driver.close()


@pytest.mark.parametrize("replaced", [False, True], ids=["removed", "replaced"])
def test_a_copy_that_goes_in_such_a_restore_leaves_nothing_behind(
    driver: StoreDriver, disk: FullDisk, replaced: bool
) -> None:
    driver.store.restore_begin(OID, SIZE)
    driver.restore_write(OID, 0, b"a" * BLOCK)
    disk.full = True
    driver.store.restore_punch(OID, BLOCK, 2 * BLOCK)
    driver.settle()
    assert driver.store._restores._unpunched
    disk.full = False
    if replaced:
        driver.store.restore_begin(OID, SIZE // 2)
        driver.flush()
    else:
        driver.remove(OID)
    assert not driver.store._restores._unpunched
    driver.crash()


@pytest.mark.parametrize("length", [100_000, LARGE])
def test_a_large_write_is_answered_when_there_is_room(driver: StoreDriver, disk: FullDisk, length: int) -> None:
    disk.full, disk.partly = True, True
    answers: list[StoreError | None] = []
    driver.store.write(OID, 0, b"b" * length, v(2), True, answers.append)
    driver.flush(frozenset({Vid(2)}))
    while not driver.store.copies.homes[0].full:
        driver.step()
    assert driver.read(OID, 0, length) == b"b" * length
    assert answers == []
    disk.full = False
    driver.clock.fire()
    while not answers:
        driver.step()
    assert answers == [None]
    assert driver.read(OID, 0, SIZE) == b"b" * length + b"a" * (SIZE - length)
    driver.close()


@pytest.mark.parametrize("length", [BLOCK, LARGE])
def test_a_creation_and_a_hole_wait_too(driver: StoreDriver, disk: FullDisk, tmp_path: Path, length: int) -> None:
    """A small creation is answered as soon as the journal has it, a large one when it has its name."""
    made = data_oid(Vid(3), 0)
    answers: list[StoreError | None] = []
    driver.store.create(made, SIZE, 0, b"c" * length, v(1), True, answers.append)
    driver.store.punch(OID, BLOCK, 2 * BLOCK, v(2), True, lambda error: None)
    disk.full = True
    driver.flush()
    driver.clock.fire()
    assert answers == ([None] if length == BLOCK else [])
    assert driver.read(made, 0, SIZE) == b"c" * length + bytes(SIZE - length)
    with pytest.raises(NoSpace):
        driver.write(made, 10, b"d", v(2))
    assert driver.read(OID, 0, 4 * BLOCK) == b"a" * BLOCK + bytes(2 * BLOCK) + b"a" * BLOCK
    room_again(driver, disk)
    assert answers == [None]
    driver.crash()
    again = opened(tmp_path, disk)
    assert again.read(made, 0, SIZE) == b"c" * length + bytes(SIZE - length)
    assert again.read(OID, 0, 4 * BLOCK) == b"a" * BLOCK + bytes(2 * BLOCK) + b"a" * BLOCK
    again.close()


def test_a_disk_that_takes_hardly_a_file_more_is_full(driver: StoreDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told before the journal answers for a file; removals make room."""

    def statvfs(path: str) -> os.statvfs_result:
        return os.statvfs_result((BLOCK, BLOCK, 1 << 30, 1 << 29, 1 << 29, files, left, left, 0, 255))

    monkeypatch.setattr(os, "statvfs", statvfs)
    home = driver.store.copies.homes[0]
    for files, left, refused in ((1 << 20, 4095, True), (1 << 20, 4096, False), (6400, 99, True), (0, 0, False)):
        home._allowance = 0
        made: StoreError | None = driver.wait(
            lambda done: driver.store.create(data_oid(Vid(3), 0), SIZE, 0, b"c", v(1), False, done)
        )
        assert isinstance(made, NoSpace) == refused, (files, left)
    driver.crash()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EMFILE, errno.ENOMEM])
def test_a_file_that_cannot_be_made_is_made_later(
    driver: StoreDriver, disk: FullDisk, tmp_path: Path, code: int
) -> None:
    """Its creation has been answered; no disk is out of service for want of descriptors."""
    made, disk.code, disk.full = data_oid(Vid(3), 0), code, True
    driver.create(made, SIZE, BLOCK, b"c" * BLOCK, v(1), durable=True)
    assert not (tmp_path / "obj" / f"{made:016x}").exists()
    assert driver.read(made, 0, SIZE) == bytes(BLOCK) + b"c" * BLOCK + bytes(SIZE - 2 * BLOCK)
    assert driver.wait(lambda done: driver.store.verify(made, 0, SIZE, done)) is None
    with pytest.raises(NoSpace):
        driver.write(made, 0, b"d", v(2))
    room_again(driver, disk)
    driver.write(made, 10, b"d", v(2), durable=True)
    driver.close()
    again = opened(tmp_path, disk)
    assert again.read(made, 0, 2 * BLOCK) == bytes(10) + b"d" + bytes(BLOCK - 11) + b"c" * BLOCK
    again.close()


def test_removals_need_no_room(driver: StoreDriver, disk: FullDisk, tmp_path: Path) -> None:
    disk.full = True
    driver.write(OID, 0, b"b" * BLOCK, v(2), durable=True)
    driver.flush()
    driver.remove(OID)
    driver.remove(OTHER)
    assert sorted(path.name for path in (tmp_path / "obj").glob("0*")) == []
    disk.full = False
    driver.clock.fire()
    driver.create(OID, SIZE, 0, b"n", v(3), durable=True)
    assert driver.read(OID, 0, BLOCK) == b"n" + bytes(BLOCK - 1)
    driver.close()


def test_writers_never_hang_on_a_journal_that_cannot_be_emptied(driver: StoreDriver, disk: FullDisk) -> None:
    """One change waits for room; others go on until the journal has only what removals and inodes need."""
    inode = inode_oid(Vid(2))
    driver.create(inode, SIZE, 0, b"i" * BLOCK, v(1), durable=True)
    disk.full = True
    driver.write(OID, 0, b"b" * BLOCK, v(2), durable=True)
    driver.flush()
    disk.full = False  # there is room for the others' overwrites, as on a real full disk
    written = 0
    with pytest.raises(NoSpace):
        for counter in range(2, 1000):
            written = counter
            driver.write(OTHER, 0, b"%04d" % counter * 1024, v(counter), durable=True)
    assert 100 < written < 400  # of segments of 512 KiB
    driver.write(inode, 0, b"j" * BLOCK, v(2), durable=True)
    driver.remove(OTHER)
    assert driver.read(OID, 0, BLOCK) == b"b" * BLOCK
    driver.clock.fire()
    driver.flush()
    for counter in range(1000, 1250):
        driver.write(OID, 0, b"%04d" % counter * 1024, v(counter), durable=True)
    assert driver.failed == []
    driver.close()


def test_nor_do_writers_of_whose_bytes_the_journal_has_hashes(tmp_path: Path, disk: FullDisk) -> None:
    """Their records are so small that it is the number of them that ends a segment."""
    driver = StoreDriver(str(tmp_path), disk=disk, options=StoreOptions(nosync=True))
    driver.create(OTHER, SIZE, 0, b"a" * BLOCK, v(1))
    disk.full = True
    driver.create(OID, SIZE, 0, b"a" * BLOCK, v(1))
    disk.full = False
    driver.store._journal._intents = MOST_INTENTS
    driver.write(OTHER, 0, b"b" * BLOCK, v(2))
    assert not driver.store._journal.other_is_free()
    driver.write(OTHER, 0, b"c" * BLOCK, v(3))
    driver.store._journal._intents = 2 * MOST_INTENTS
    with pytest.raises(NoSpace):
        driver.write(OTHER, 0, b"d" * BLOCK, v(4))
    driver.store._journal._intents = 2 * MOST_INTENTS - 1
    driver.remove(OTHER)
    driver.clock.fire()
    driver.write(OID, 0, b"c" * BLOCK, v(2))
    driver.close()


@pytest.mark.parametrize("end", ["close", "crash"])
def test_a_restart_without_room_says_so_and_loses_nothing(
    driver: StoreDriver, disk: FullDisk, tmp_path: Path, end: str
) -> None:
    disk.full = True
    driver.write(OID, 0, b"b" * BLOCK, v(2), durable=True)
    driver.flush()
    getattr(driver, end)()
    for _ in range(2):
        with pytest.raises(UsageError, match="no room for what is in the journal"):
            opened(tmp_path, disk)
    disk.full = False
    again = opened(tmp_path, disk)
    assert again.store.version(OID) == v(2)
    assert again.read(OID, 0, 2 * BLOCK) == b"b" * BLOCK + b"a" * BLOCK
    again.close()


@pytest.mark.parametrize("seed", range(6))
def test_a_disk_that_is_full_now_and_then(tmp_path: Path, disk: FullDisk, seed: int) -> None:
    """Every acknowledged change is there, every refused one never was; also after a crash at the end."""
    rng = random.Random(seed)
    driver = opened(tmp_path, disk)
    oids = [data_oid(Vid(1), index) for index in range(4)]
    model: dict[ObjectId, bytearray] = {}
    for counter in range(1, 400):
        oid = oids[rng.randrange(4)]
        if rng.random() < 0.1:
            disk.full, disk.partly = not disk.full, rng.random() < 0.5
        if rng.random() < 0.2:
            driver.clock.fire()
        offset = rng.randrange(60) * BLOCK
        data = rng.randbytes(rng.choice((BLOCK, 3 * BLOCK)))
        try:
            if oid not in model:
                if not disk.full:  # its first bytes would wait for the name
                    driver.create(oid, SIZE, offset, data, v(counter))
                    model[oid] = bytearray(SIZE)
                    model[oid][offset : offset + len(data)] = data
            elif rng.random() < 0.05:
                driver.remove(oid)
                del model[oid]
            elif rng.random() < 0.2:
                driver.store.punch(oid, offset, BLOCK, v(counter), True, lambda error: None)
                if driver.store.version(oid) == v(counter):
                    model[oid][offset : offset + BLOCK] = bytes(BLOCK)
            else:
                driver.write(oid, offset, data, v(counter), durable=rng.random() < 0.5)
                model[oid][offset : offset + len(data)] = data
        except NoSpace:
            pass
        if rng.random() < 0.3:
            driver.flush()
        if oid in model:
            assert driver.read(oid, offset, 4 * BLOCK) == model[oid][offset : offset + 4 * BLOCK], counter
    for one, content in model.items():
        assert driver.read(one, 0, SIZE) == content
    assert driver.failed == []
    driver.crash()
    disk.full = False
    again = opened(tmp_path, disk)
    assert {oid for oid, _ in again.store.inventory()} == set(model)
    for one, content in model.items():
        assert again.read(one, 0, SIZE) == content
    again.close()


@pytest.mark.parametrize("blocks", [1, 3])
def test_only_what_needs_room_is_refused(driver: StoreDriver, blocks: int) -> None:
    driver.create(OID, SIZE, 0, b"a" * (2 * BLOCK), v(2), durable=True)  # holes from the third block on
    driver.store.copies.homes[0].full = True
    with pytest.raises(NoSpace):
        driver.write(OID, 2 * BLOCK if blocks == 1 else 0, b"b" * (blocks * BLOCK), v(3))
    driver.write(OID, BLOCK, b"c" * BLOCK, v(3))
    driver.write(OTHER, 0, b"d" * (blocks * BLOCK), v(2))


def test_a_restore_that_has_no_room_to_begin_says_so(driver: StoreDriver, disk: FullDisk) -> None:
    """Whoever waits for room must know that this is what lacks."""
    driver.store.copies.homes[0].full = True
    new = data_oid(Vid(3), 0)
    assert isinstance(driver.store.restore_begin(new, SIZE), NoSpace)
    assert driver.store.version(new) is None
    assert driver.store.restore_begin(OID, SIZE) is None, "its file is there"
    driver.store.copies.homes[0].full = False
    assert driver.store.restore_begin(new, SIZE) is None
    driver.restore_finish(new, v(2))
    assert driver.read(new, 0, BLOCK) == bytes(BLOCK)
    driver.close()

"""The object store against a model: what it holds is what was written, also after a stop and after a kill."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from tests.support.sim_disk import SimDisk
from tests.support.stores import StoreDriver, flip

from sheepdog.cluster.core.errors import Corrupt, DiskError, NoObject, NoSpace, Result, StoreError
from sheepdog.cluster.core.ids import NO_VERSION, ObjectId, Version, Vid, data_oid, inode_oid, oid_name, strip_of
from sheepdog.cluster.host.disk import Disk, RealDisk, Space
from sheepdog.cluster.host.journal import AHEAD_BYTES, AHEAD_LEAST_BYTES

SIZE = 64 * 4096
OID = data_oid(Vid(0x123456), 7)
STRIP = strip_of(OID, 1)


def v(counter: int) -> Version:
    return Version(1, 1, counter)


@pytest.fixture(params=[False, True], ids=["sync", "nosync"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StoreDriver]:
    driver = StoreDriver(str(tmp_path), nosync=request.param)
    yield driver
    driver.crash()


def reopened(driver: StoreDriver, path: Path, crash: bool = False, disk: Disk | None = None) -> StoreDriver:
    if crash:
        driver.crash()
    else:
        driver.close()
    return StoreDriver(str(path), disk=disk)


def test_create_write_read(store: StoreDriver) -> None:
    store.create(OID, SIZE, 100, b"hello", v(1))
    assert store.store.version(OID) == v(1)
    assert store.store.size(OID) == SIZE
    assert store.read(OID, 98, 9) == b"\0\0hello\0\0"
    store.write(OID, 5000, b"x" * 9000, v(2), durable=True)
    assert store.read(OID, 4999, 9002) == b"\0" + b"x" * 9000 + b"\0"
    assert store.store.version(OID) == v(2)
    assert store.read(OID, 0, SIZE)[:105] == bytes(100) + b"hello"


def test_large_reads_use_memory_again_that_nobody_looks_at(store: StoreDriver) -> None:
    store.create(OID, SIZE, 0, b"a" * SIZE, v(1), durable=True)
    store.settle()

    def read() -> memoryview:
        found: list[object] = []
        store.store.read(OID, 0, SIZE, found.append)
        while not found:
            store.step()
        assert isinstance(found[0], memoryview)
        return found[0]

    kept = read()
    store.write(OID, 0, b"b" * SIZE, v(2), durable=True)
    store.settle()
    memory = read().obj
    assert read().obj is memory is not kept.obj
    assert memory == b"b" * SIZE
    assert bytes(kept) == b"a" * SIZE


def test_answers_leave_before_the_file_gets_the_bytes(store: StoreDriver, tmp_path: Path) -> None:
    """What an answer asks for at the end of its turn, its sending, comes before the work that nobody waits for.

    (With `nosync` the journal has no bytes of plain objects, and their writes are answered by the file.)
    """
    store.create(STRIP, SIZE, 0, b"a" * 4096, v(1), durable=True)
    file = tmp_path / "obj" / oid_name(STRIP)
    when_sent: list[bytes] = []

    def answered(error: StoreError | None) -> None:
        assert error is None
        store.call_soon(lambda: when_sent.append(file.read_bytes()[:4096]))

    store.store.write(STRIP, 0, b"b" * 4096, v(2), True, answered)
    while not when_sent:
        store.step()
    assert when_sent == [b"a" * 4096]
    assert store.read(STRIP, 0, 4096) == b"b" * 4096
    store.settle()
    assert file.read_bytes()[:4096] == b"b" * 4096


def test_an_object_is_whole_before_its_file_is_made(store: StoreDriver, tmp_path: Path) -> None:
    file = tmp_path / "obj" / f"{OID:016x}"
    errors: list[StoreError | None] = []
    store.store.create(OID, SIZE, 4096, b"a" * 4096, v(1), True, errors.append)
    store.store.write(OID, 100, b"b", v(2), True, errors.append)
    store.store.write(OID, 4096 + 100, b"b", v(3), True, errors.append)
    store.store.punch(OID, 8000, 1000, v(4), True, errors.append)
    store.store.stamp(OID, v(5), True, errors.append)
    store.store.verify(OID, 0, SIZE, errors.append)
    table = store.store.table(OID)
    assert [block for block in range(64) if table[8 * block : 8 * block + 8] != bytes(8)] == [0, 1]
    expected = bytes(100) + b"b" + bytes(3995) + b"a" * 100 + b"b" + b"a" * 3803 + bytes(SIZE - 8000)
    assert store.read(OID, 0, SIZE) == expected
    assert store.read(OID, SIZE - 5, 5) == bytes(5)
    assert not file.exists()
    while len(errors) < 6:
        store.step()
    store.flush()
    assert errors == [None] * 6
    assert file.exists()
    assert store.read(OID, 0, SIZE) == expected
    assert store.store.version(OID) == v(5)


def test_an_object_may_be_restored_before_its_file_is_made(store: StoreDriver, tmp_path: Path) -> None:
    store.store.create(OID, SIZE, 4096, b"a" * 8192, v(1), True, lambda error: None)
    store.store.restore_begin(OID, SIZE)
    assert not (tmp_path / "obj" / f"{OID:016x}").exists()
    store.restore_write(OID, 4096, b"r" * 4096)
    store.restore_finish(OID, v(2))
    assert store.read(OID, 0, 16384) == bytes(4096) + b"r" * 4096 + b"a" * 4096 + bytes(4096)


def test_the_file_is_what_the_format_says(store: StoreDriver, tmp_path: Path) -> None:
    store.create(OID, 10_000, 4096, b"a" * 4096, Version(3, 2, 9), durable=True)
    data = (tmp_path / "obj" / f"{OID:016x}").read_bytes()
    assert len(data) == 12_288 + 512 + 3 * 8
    assert data[:10_000] == bytes(4096) + b"a" * 4096 + bytes(10_000 - 8192)
    assert data[12_288:12_296] == b"SHEEPOBJ"
    assert [data[12_800 + 8 * i : 12_808 + 8 * i] != bytes(8) for i in range(3)] == [False, True, False]
    assert os.stat(tmp_path / "obj").st_mode & 0o777 == 0o750


def test_zero_blocks_of_a_creation_are_holes(store: StoreDriver, tmp_path: Path) -> None:
    store.create(OID, SIZE, 0, bytes(8192) + b"z" * 4096 + bytes(SIZE - 3 * 4096), v(1))
    table = store.store.table(OID)
    assert len(table) == 64 * 8
    assert [i for i in range(64) if table[8 * i : 8 * i + 8] != bytes(8)] == [2]
    assert (tmp_path / "obj" / f"{OID:016x}").stat().st_blocks * 512 < 20_000
    assert store.store.usage()[0] == 8192


def test_missing_objects_and_ranges(store: StoreDriver) -> None:
    with pytest.raises(NoObject):
        store.read(OID, 0, 4096)
    with pytest.raises(NoObject):
        store.write(OID, 0, b"x", v(1))
    assert store.store.version(OID) is None
    store.remove(OID)
    store.create(OID, SIZE, 0, b"", v(1))
    for offset, length in ((SIZE, 1), (SIZE - 1, 2), (0, SIZE + 1)):
        with pytest.raises(StoreError) as caught:
            store.read(OID, offset, length)
        assert caught.value.result == Result.INVALID_PARMS
        with pytest.raises(StoreError):
            store.write(OID, offset, bytes(length), v(2))


def test_remove_and_replace(store: StoreDriver, tmp_path: Path) -> None:
    store.create(OID, SIZE, 0, b"a" * SIZE, v(1))
    store.create(OID, SIZE, 0, b"b" * 4096, v(2))
    assert store.read(OID, 0, 8192) == b"b" * 4096 + bytes(4096)
    store.remove(OID)
    assert store.store.version(OID) is None
    assert not (tmp_path / "obj" / f"{OID:016x}").exists()
    assert store.store.usage()[0] == 0
    assert os.listdir(tmp_path / "obj" / ".new") == []


def test_calls_without_waiting_take_effect_in_order(store: StoreDriver) -> None:
    errors: list[StoreError | None] = []
    store.store.create(OID, SIZE, 0, b"a" * 4096, v(1), True, errors.append)
    store.store.write(OID, 0, b"b" * 4096, v(2), True, errors.append)
    assert store.read(OID, 0, 4096) == b"b" * 4096
    store.store.remove(OID, errors.append)
    assert store.store.version(OID) is None
    store.store.create(OID, SIZE, 4096, b"c" * 4096, v(3), True, errors.append)
    store.store.write(OID, 100, b"d", v(4), True, errors.append)
    assert store.read(OID, 0, 8192) == bytes(100) + b"d" + bytes(3995) + b"c" * 4096
    while len(errors) < 5:
        store.step()
    assert errors == [None] * 5
    assert store.store.version(OID) == v(4)


def test_punch(store: StoreDriver) -> None:
    store.create(OID, SIZE - 100, 0, b"a" * (SIZE - 100), v(1))
    used = store.store.usage()[0]
    store.punch(OID, 4000, 4096 * 3, v(2), durable=True)
    assert store.read(OID, 0, 20_000) == b"a" * 4000 + bytes(4096 * 3) + b"a" * (20_000 - 4000 - 4096 * 3)
    assert store.store.usage()[0] == used - 2 * 4096
    store.punch(OID, 10, 20, v(3))
    assert store.read(OID, 0, 40) == b"a" * 10 + bytes(20) + b"a" * 10
    store.punch(OID, 0, SIZE - 100, v(4), durable=True)
    assert not any(store.store.table(OID))
    assert store.read(OID, 0, SIZE - 100) == bytes(SIZE - 100)


@pytest.mark.parametrize("nosync", [False, True], ids=["sync", "nosync"])
def test_an_unused_store_ends_at_once(tmp_path: Path, nosync: bool) -> None:
    StoreDriver(str(tmp_path), nosync).close()
    StoreDriver(str(tmp_path), nosync).close()


def test_a_durable_write_out_of_a_callback_is_answered(tmp_path: Path) -> None:
    driver = StoreDriver(str(tmp_path))
    driver.create(OID, SIZE, 0, b"a", v(1))
    answers: list[StoreError | None] = []

    def again(error: StoreError | None) -> None:
        if len(answers) < 5:
            driver.store.write(OID, 0, b"b" * 4096, v(len(answers) + 10), True, again)
        answers.append(error)

    driver.store.write(OID, 0, b"c" * 4096, v(2), False, again)
    driver.store.write(OID, 0, b"c" * 4096, v(3), True, again)
    while len(answers) < 7:
        driver.step()
    assert answers == [None] * 7
    driver.close()


@pytest.mark.parametrize("crash", [False, True], ids=["stop", "kill"])
def test_a_restart_finds_everything(tmp_path: Path, crash: bool) -> None:
    driver = StoreDriver(str(tmp_path))
    driver.create(OID, SIZE, 0, b"a" * 5000, v(1))
    driver.write(OID, 4096, b"b" * 100, v(2))
    driver.create(inode_oid(Vid(5)), 12_587_576, 0, b"i" * 5000, v(3))
    used = driver.store.usage()[0]
    driver = reopened(driver, tmp_path, crash)
    assert list(driver.store.inventory()) == [(OID, v(2)), (inode_oid(Vid(5)), v(3))]
    assert not any("restore" in line for line in driver.logged)
    assert driver.read(OID, 0, SIZE) == b"a" * 4096 + b"b" * 100 + b"a" * 804 + bytes(SIZE - 5000)
    assert driver.store.size(inode_oid(Vid(5))) == 12_587_576
    assert abs(driver.store.usage()[0] - used) <= 3 * 4096
    driver.crash()


def test_the_index_is_believed_once_and_only_for_files_that_are_there(tmp_path: Path) -> None:
    driver = StoreDriver(str(tmp_path))
    for index in range(4):
        driver.create(data_oid(Vid(1), index), SIZE, 0, b"a", v(index + 1))
    driver.close()
    assert (tmp_path / "obj" / ".index").exists()
    names = sorted(name for name in os.listdir(tmp_path / "obj") if not name.startswith("."))
    os.unlink(tmp_path / "obj" / names[0])
    driver = StoreDriver(str(tmp_path))
    assert not (tmp_path / "obj" / ".index").exists()
    assert [oid for oid, _ in driver.store.inventory()] == [data_oid(Vid(1), index) for index in (1, 2, 3)]
    driver.close()
    index_file = tmp_path / "obj" / ".index"
    index_file.write_bytes(index_file.read_bytes()[:-20] + bytes(20))
    driver = StoreDriver(str(tmp_path))
    assert len(list(driver.store.inventory())) == 3
    assert any("reading all objects" in line for line in driver.logged)
    driver.crash()


def test_rotten_blocks_are_never_returned(store: StoreDriver, tmp_path: Path) -> None:
    store.create(OID, SIZE, 0, b"a" * (8 * 4096), v(1))
    path = tmp_path / "obj" / f"{OID:016x}"
    with path.open("r+b") as file:
        file.seek(2 * 4096 + 17)
        file.write(b"?")
        file.seek(20 * 4096)  # where a hole is
        file.write(b"?")
    with pytest.raises(Corrupt) as caught:
        store.read(OID, 0, 4 * 4096)
    assert caught.value.blocks == (2,)
    for rotten in (2, 20):
        for inside, length in ((0, 4096), (512, 512)):
            with pytest.raises(Corrupt):
                store.read(OID, rotten * 4096 + inside, length)
    with pytest.raises(Corrupt):
        store.write(OID, 2 * 4096 + 5, b"part", v(2))
    assert store.store.version(OID) == v(1)
    store.write(OID, 2 * 4096, b"b" * 4096, v(2))
    assert store.read(OID, 0, 4 * 4096) == b"a" * 8192 + b"b" * 4096 + b"a" * 4096


@pytest.mark.parametrize("at", [3, 50, 512, 600], ids=["magic", "version", "first entry", "table"])
def test_a_rotten_trailer_of_an_open_file_is_written_again(store: StoreDriver, tmp_path: Path, at: int) -> None:
    store.create(OID, SIZE, 0, b"a" * SIZE, v(1), durable=True)
    store.write(OID, 0, b"b" * 8192, v(2), durable=True)
    store.close()
    again = StoreDriver(str(tmp_path))
    assert again.read(OID, 0, 4096) == b"b" * 4096
    path = tmp_path / "obj" / f"{OID:016x}"
    good = path.read_bytes()
    assert again.wait(lambda done: again.store.verify(OID, 0, SIZE, done)) is None
    with open(path, "r+b") as file:
        file.seek(SIZE + at)
        file.write(bytes([good[SIZE + at] ^ 1]))
    error = again.wait(lambda done: again.store.verify(OID, 0, SIZE, done))
    assert isinstance(error, Corrupt)
    assert error.mended
    assert str(tmp_path / "obj") in str(error)
    assert path.read_bytes() == good
    assert again.wait(lambda done: again.store.verify(OID, 0, SIZE, done)) is None
    assert again.store.copies.rot.counts() == {"found": 1, "repaired": 1, "bad": 0}
    again.close()


def test_rot_is_counted_once_until_it_is_right(store: StoreDriver, tmp_path: Path) -> None:
    store.create(OID, SIZE, 0, b"a" * SIZE, v(1), durable=True)
    with open(tmp_path / "obj" / f"{OID:016x}", "r+b") as file:
        for block in (1, 3):
            file.seek(4096 * block)
            file.write(b"rotten")
    for _ in range(2):
        with pytest.raises(Corrupt, match=f"{OID:016x}: blocks .* in {tmp_path}/obj are corrupt"):
            store.read(OID, 0, SIZE)
    assert store.store.copies.rot.counts() == {"found": 2, "repaired": 0, "bad": 2}
    store.write(OID, 4096, b"n" * 4096, v(2), durable=True)
    store.flush()
    assert store.store.copies.rot.counts() == {"found": 2, "repaired": 1, "bad": 1}
    store.remove(OID)
    assert store.store.copies.rot.counts() == {"found": 2, "repaired": 2, "bad": 0}


def test_a_rotten_header_leaves_a_copy_without_version(tmp_path: Path) -> None:
    driver = StoreDriver(str(tmp_path))
    driver.create(OID, SIZE, 0, b"a" * SIZE, v(1))
    driver.close()
    (tmp_path / "obj" / ".index").unlink()
    flip(tmp_path / "obj" / f"{OID:016x}", SIZE + 40)
    driver = StoreDriver(str(tmp_path))
    assert driver.store.version(OID) == NO_VERSION
    with pytest.raises(Corrupt):
        driver.read(OID, 0, 4096)
    driver.store.restore_begin(OID, SIZE)
    driver.restore_write(OID, 0, b"r" * SIZE)
    driver.restore_finish(OID, v(2))
    driver = reopened(driver, tmp_path)
    assert driver.store.version(OID) == v(2)
    assert driver.read(OID, 0, SIZE) == b"r" * SIZE
    driver.crash()


def test_restore_of_a_new_and_of_an_old_copy(store: StoreDriver, tmp_path: Path) -> None:
    store.store.restore_begin(OID, SIZE)
    assert store.store.version(OID) == NO_VERSION
    store.restore_write(OID, 4096, b"r" * 8192)
    store.restore_finish(OID, v(7))
    assert store.store.version(OID) == v(7)
    assert store.read(OID, 0, 16384) == bytes(4096) + b"r" * 8192 + bytes(4096)
    store.store.restore_begin(OID, SIZE)
    assert store.store.version(OID) == NO_VERSION
    with pytest.raises(NoObject):
        store.write(OID, 0, b"x", v(8))
    store.store.restore_punch(OID, 4096, 4096)
    store.restore_write(OID, SIZE - 4096, b"e" * 4096)
    store.restore_finish(OID, v(9))
    assert store.read(OID, 0, 12288) == bytes(8192) + b"r" * 4096
    assert store.read(OID, SIZE - 4096, 4096) == b"e" * 4096


def test_holes_of_a_restore_show_in_the_table_at_once(store: StoreDriver, tmp_path: Path) -> None:
    store.create(OID, SIZE, 0, b"a" * SIZE, v(1))
    store.store.copies.files._limit = 1
    store.create(data_oid(Vid(1), 1), SIZE, 0, b"a", v(1))
    store.flush()
    store.store.restore_begin(OID, SIZE)
    store.store.restore_punch(OID, 8192, SIZE - 8192)
    assert not any(store.store.table(OID)[16:])
    store.restore_finish(OID, v(2))
    assert store.read(OID, 0, SIZE) == b"a" * 8192 + bytes(SIZE - 8192)
    assert (tmp_path / "obj" / f"{OID:016x}").stat().st_blocks * 512 < 20_000


def test_a_crash_in_a_restore_leaves_no_version(tmp_path: Path) -> None:
    driver = StoreDriver(str(tmp_path))
    driver.create(OID, SIZE, 0, b"a" * SIZE, v(1))
    driver.store.restore_begin(OID, SIZE)
    driver.restore_write(OID, 0, b"r" * 4096)
    driver = reopened(driver, tmp_path, crash=True)
    assert driver.store.version(OID) == NO_VERSION
    assert list(driver.store.inventory()) == [(OID, NO_VERSION)]
    driver.store.restore_begin(OID, SIZE)
    driver.restore_finish(OID, v(2))
    assert driver.read(OID, 0, 8192) == b"r" * 4096 + b"a" * 4096
    driver.crash()


class FailingDisk(RealDisk):
    """Fails the sync, or has only so much space."""

    def __init__(self) -> None:
        self.sync_error = self.file_sync_error = 0
        self.free = 1 << 40
        self.syncs = 0

    def fdatasync(self, fd: int, /) -> None:  # type: ignore[override]
        self.syncs += 1
        error = self.error_of(os.readlink(f"/proc/self/fd/{fd}"))
        if error:
            raise OSError(error, os.strerror(error))
        os.fdatasync(fd)

    def error_of(self, path: str) -> int:
        """What a sync of this file fails with; 0: it does not."""
        return self.sync_error or (0 if "journal" in path else self.file_sync_error)

    def space(self, path: str) -> Space:
        return Space(1 << 40, self.free)


def test_a_failed_sync_of_the_journal_ends_the_store(tmp_path: Path) -> None:
    disk = FailingDisk()
    driver = StoreDriver(str(tmp_path), disk=disk)
    driver.create(OID, SIZE, 0, b"a" * 4096, v(1))
    disk.sync_error = 5
    with pytest.raises(DiskError):
        driver.write(OID, 0, b"b" * 4096, v(2), durable=True)
    disk.sync_error = 0
    assert len(driver.failed) == 1
    assert "journal" in driver.failed[0]
    with pytest.raises(DiskError):
        driver.write(OID, 0, b"c" * 4096, v(3))
    with pytest.raises(DiskError):
        driver.remove(OID)
    with pytest.raises(DiskError):
        driver.flush()
    driver.crash()


class CachingDisk(RealDisk):
    """Takes no writes around the page cache."""

    def open_direct(self, path: str) -> int:
        return -1


@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("nosync", [False, True])
def test_the_journal_is_written_once_before_its_records_come(tmp_path: Path, nosync: bool, through: bool) -> None:
    """A record in a place that was only allocated costs its sync another one of the file system's journal."""
    driver = StoreDriver(str(tmp_path), nosync=nosync, disk=RealDisk() if through else CachingDisk())
    driver.create(STRIP, SIZE, 0, b"a" * SIZE, v(1))
    syncs, steps = 200, set()
    with open(tmp_path / "journal_file1", "rb") as file:
        for counter in range(2, 2 + syncs):
            driver.write(STRIP, 0, b"b" * 8192, v(counter), durable=True)
            laid = os.lseek(file.fileno(), 0, os.SEEK_HOLE)
            steps.add(laid)
            if not nosync and not through:  # else the zeros come with the records
                assert laid >= (driver.store._journal.written & 0xFFFFFFFF) + AHEAD_LEAST_BYTES - 8400
    if nosync:
        assert len(steps) > syncs // 4  # nobody waits for a sync: nothing is written twice
    else:
        assert len(steps) <= 1 + syncs * 8400 // AHEAD_BYTES + 1
    driver.crash()
    again = StoreDriver(str(tmp_path))
    assert again.read(STRIP, 0, 8192) == b"b" * 8192
    again.crash()


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.ENOMEM])
def test_a_failed_sync_of_a_file_takes_the_disk_out_and_is_not_retried(tmp_path: Path, code: int) -> None:
    disk = FailingDisk()
    driver = StoreDriver(str(tmp_path), disk=disk, disks=[str(tmp_path / name) for name in ("d1", "d2")])
    oids = [data_oid(Vid(1), index) for index in range(20)]
    for oid in oids:
        driver.create(oid, SIZE, 0, b"a" * 4096, v(1))
    homes = {oid: driver.store.copies.by_oid[oid].home for oid in oids}
    first, second = driver.store.copies.homes
    mine = [oid for oid in oids if homes[oid] is first]
    assert 3 < len(mine) < 17
    driver.write(mine[0], 0, b"b" * (SIZE // 2), v(2))
    disk.file_sync_error = code
    with pytest.raises(DiskError):
        driver.flush()
    disk.file_sync_error = 0
    assert driver.failed == [f"{first.path}: {os.strerror(code)}"]
    with pytest.raises(DiskError):
        driver.read(mine[0], 0, 4096)
    with pytest.raises(DiskError):
        driver.write(mine[1], 0, b"c" * 4096, v(3))
    other = next(oid for oid in oids if homes[oid] is second)
    driver.write(other, 0, b"d" * 4096, v(3), durable=True)
    assert driver.read(other, 0, 4096) == b"d" * 4096
    driver.create(data_oid(Vid(2), 1), SIZE, 0, b"e", v(1))
    driver.create(mine[0], SIZE, 0, b"f", v(4))
    assert driver.read(mine[0], 0, 2) == b"f\0"
    driver.crash()


def test_waiting_writes_share_a_sync(tmp_path: Path) -> None:
    disk = FailingDisk()
    driver = StoreDriver(str(tmp_path), disk=disk)
    driver.create(OID, SIZE, 0, b"a" * 4096, v(1))
    before = disk.syncs
    errors: list[StoreError | None] = []
    for counter in range(50):
        driver.store.write(OID, 4096, bytes([counter]) * 4096, v(counter + 2), True, errors.append)
    while len(errors) < 50:
        driver.step()
    assert errors == [None] * 50
    assert disk.syncs - before <= 2
    driver.flush()
    assert disk.syncs - before <= 2
    driver.crash()


def test_flush_syncs_only_what_the_volumes_need(tmp_path: Path) -> None:
    disk = FailingDisk()
    driver = StoreDriver(str(tmp_path), disk=disk)
    oids = [data_oid(Vid(vid), 0) for vid in (1, 2, 3)]
    for oid in oids:
        driver.create(oid, SIZE, 0, b"a" * 4096, v(1))
    before = disk.syncs
    driver.write(oids[0], 0, b"b", v(2))
    driver.flush(frozenset({Vid(2), Vid(3)}))
    assert disk.syncs == before
    driver.flush(frozenset({Vid(1)}))
    assert disk.syncs - before == 1  # the journal
    driver.write(oids[1], 0, b"l" * 100_000, v(2))  # its record is synced before its bytes are written
    assert disk.syncs - before == 2
    driver.flush(frozenset({Vid(1), Vid(3)}))
    assert disk.syncs - before == 2
    driver.flush(frozenset({Vid(2)}))
    assert disk.syncs - before == 4  # the file, and the note of that in the journal
    driver.flush()
    assert disk.syncs - before == 4
    driver.crash()


@pytest.mark.parametrize("flushed", [1, 2])
@pytest.mark.parametrize("order", [(1, 2), (2, 1), (1, 2, 1), (2, 1, 2)])
def test_a_flush_covers_its_volume_wherever_others_were_written(
    tmp_path: Path, order: tuple[int, ...], flushed: int
) -> None:
    disk = FailingDisk()
    driver = StoreDriver(str(tmp_path), disk=disk)
    for vid in sorted({*order}):
        driver.create(data_oid(Vid(vid), 0), SIZE, 0, b"a" * 4096, v(1))
    driver.flush()
    before = disk.syncs
    for counter, vid in enumerate(order):
        driver.write(data_oid(Vid(vid), 0), 0, b"b" * 4096, v(counter + 2))
    driver.flush(frozenset({Vid(flushed)}))
    assert disk.syncs - before == 1
    driver.crash()


def test_a_full_disk_refuses_new_blocks_and_keeps_the_rest(tmp_path: Path) -> None:
    disk = FailingDisk()
    driver = StoreDriver(str(tmp_path), disk=disk)
    driver.create(OID, SIZE, 0, b"a" * 4096, v(1))
    disk.free = (256 << 20) + 10_000
    driver.store.copies.homes[0]._allowance = 0
    with pytest.raises(NoSpace):
        driver.create(data_oid(Vid(2), 1), SIZE, 0, b"a" * SIZE, v(1))
    with pytest.raises(NoSpace):
        driver.write(OID, 4096, b"b" * 100_000, v(2))
    driver.write(OID, 0, b"c" * 4096, v(3))
    assert driver.read(OID, 0, 8192) == b"c" * 4096 + bytes(4096)
    driver.remove(OID)
    disk.free = 1 << 40
    driver.create(OID, SIZE, 0, b"a" * SIZE, v(1))
    assert driver.failed == []
    driver.crash()


def test_more_objects_than_open_files(store: StoreDriver) -> None:
    store.store.copies.files._limit = 4
    oids = [data_oid(Vid(9), index) for index in range(40)]
    for number, oid in enumerate(oids):
        store.create(oid, SIZE, 0, bytes([number]) * 4096, v(1), durable=True)
    for number, oid in enumerate(oids):
        assert store.read(oid, 0, 4096) == bytes([number]) * 4096
        store.write(oid, 4096, bytes([number]) * 10, v(2))
    store.flush()
    for number, oid in enumerate(oids):
        assert store.read(oid, 4096, 10) == bytes([number]) * 10
    for _ in range(200):
        if len(store.store.copies.files) > 4:
            store.step()
    assert len(store.store.copies.files) <= 4


@pytest.mark.parametrize("simulated", [False, True], ids=["real", "simulated"])
@pytest.mark.parametrize("seed", (*range(6), 19))
def test_random_operations_equal_the_model(tmp_path: Path, seed: int, simulated: bool) -> None:
    """On a real disk and on the one whose crashes tests/unit/test_store_crash.py looks through."""
    rng = random.Random(seed)
    place, disk = (Path("/meta"), SimDisk(seed, miss_rate=0.2)) if simulated else (tmp_path, None)
    driver = StoreDriver(str(place), nosync=bool(seed & 1), disk=disk)
    driver.store.copies.files._limit = 3
    model: dict[ObjectId, tuple[bytearray, Version]] = {}
    oids = [data_oid(Vid(vid), index) for vid in (1, 2) for index in range(4)]
    sizes = {oid: rng.choice((4096, 10_000, SIZE, SIZE - 1)) for oid in oids}
    pending: list[StoreError | None] = []
    expected = 0
    for counter in range(1, 400):
        oid = rng.choice(oids)
        size = sizes[oid]
        offset = rng.randrange(size)
        length = rng.randint(1, min(size - offset, 20_000))
        durable = rng.random() < 0.1
        kind = rng.random()
        if oid not in model or kind < 0.05:
            data = rng.choice((rng.randbytes(length), bytes(length)))
            driver.store.create(oid, size, offset, data, v(counter), durable, pending.append)
            model[oid] = (bytearray(size), v(counter))
            model[oid][0][offset : offset + length] = data
        elif kind < 0.5:
            data = rng.randbytes(length)
            driver.store.write(oid, offset, data, v(counter), durable, pending.append)
            model[oid][0][offset : offset + length] = data
            model[oid] = (model[oid][0], v(counter))
        elif kind < 0.6:
            driver.store.punch(oid, offset, length, v(counter), durable, pending.append)
            model[oid][0][offset : offset + length] = bytes(length)
            model[oid] = (model[oid][0], v(counter))
        elif kind < 0.65:
            driver.store.remove(oid, pending.append)
            del model[oid]
        elif kind < 0.95:
            assert driver.read(oid, offset, length) == model[oid][0][offset : offset + length]
            expected -= 1
        else:
            while len(pending) < expected:
                driver.step()
            driver = reopened(driver, place, crash=kind < 0.98, disk=disk)
            driver.store.copies.files._limit = 3
            expected -= 1
        expected += 1
    while len(pending) < expected:
        driver.step()
    assert not any(pending)
    driver.crash()
    driver = StoreDriver(str(place), disk=disk)
    assert dict(driver.store.inventory()) == {oid: version for oid, (_, version) in model.items()}
    for oid, (content, _) in model.items():
        assert driver.read(oid, 0, len(content)) == content
    driver.crash()


def test_a_replay_reads_no_holes(tmp_path: Path) -> None:
    """A start after a crash takes as long as what was written, not as the objects are large: there may be many."""
    driver = StoreDriver(str(tmp_path), nosync=True)
    objects = [data_oid(Vid(9), index) for index in range(4)]
    for oid in objects:
        driver.create(oid, 4 << 20, 8192, b"x" * 5000, Version(1, 1, 1))
    driver.crash()
    stale = tmp_path / "obj" / f"{objects[1]:016x}"  # whatever is in the way of a hole is found and removed
    with stale.open("r+b") as file:
        file.seek(1 << 20)
        file.write(b"stale" * 1000)
    disk = CountingDisk()
    again = StoreDriver(str(tmp_path), nosync=True, disk=disk)
    assert disk.block_reads <= len(objects) * 8 + 1024, "1,024 blocks of each, instead of those of one"
    for oid in objects:
        assert again.read(oid, 0, 4 << 20) == bytes(8192) + b"x" * 5000 + bytes((4 << 20) - 13192)
    again.crash()


class CountingDisk(RealDisk):
    """Counts the single blocks that are read."""

    block_reads = 0

    def preadv(self, fd: int, buffers: Sequence[bytearray | memoryview], offset: int, /) -> int:  # type: ignore[override]
        self.block_reads += len(buffers) == 1 and len(buffers[0]) == 4096
        return os.preadv(fd, buffers, offset)

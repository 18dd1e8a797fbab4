"""The journal's files: where they are and how large, what a start says of them, and what nobody waits for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.support.stores import StoreDriver, flip
from tests.unit.test_open_files import SlowSyncs

from sheepdog.cluster.core.errors import StoreError, UsageError
from sheepdog.cluster.core.ids import Version, Vid, data_oid, strip_of
from sheepdog.cluster.host.directory import read_header
from sheepdog.cluster.host.disk import RealDisk, Space
from sheepdog.cluster.host.journal import CACHED_BYTES, MOST_INTENTS, SEGMENT_HEADER
from sheepdog.cluster.host.store_check import check
from sheepdog.cluster.host.store_options import StoreOptions
from sheepdog.cluster.host.trailer import block_hash

SIZE = 1 << 20
BLOCK = 4096
OID = data_oid(Vid(1), 0)
STRIP = strip_of(OID, 0)
MIB, GIB = 1 << 20, 1 << 30
SMALL = StoreOptions(journal_bytes=MIB)


def v(counter: int) -> Version:
    return Version(1, 1, counter << 16)


class SparseDisk(RealDisk):
    """Takes no room for a journal; says what is free, and counts what is synced."""

    def __init__(self, free: int = 1 << 40) -> None:
        self.free = free
        self.synced: list[str] = []

    def allocate(self, fd: int, length: int) -> None:
        pass

    def space(self, path: str) -> Space:
        return Space(1 << 40, self.free)

    def fdatasync(self, fd: int, /) -> None:  # type: ignore[override]
        self.synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        os.fdatasync(fd)


def journal_bytes(directory: Path) -> int:
    return sum((directory / f"journal_file{index}").stat().st_size for index in (0, 1))


@pytest.mark.parametrize(("free", "expected"), [(16 * MIB, 8 * MIB), (GIB, 64 * MIB), (1 << 40, 512 * MIB)])
def test_without_options_it_takes_a_part_of_the_free_space(tmp_path: Path, free: int, expected: int) -> None:
    StoreDriver(str(tmp_path), disk=SparseDisk(free), options=StoreOptions()).close()
    assert journal_bytes(tmp_path) == expected
    StoreDriver(str(tmp_path), disk=SparseDisk(2 * free), options=StoreOptions()).close()
    assert journal_bytes(tmp_path) == expected, "it stays what it was"


def test_places_in_a_segment_fit_into_32_bits(tmp_path: Path) -> None:
    """Behind 4 GiB a record would pass for one of another segment, and for a durable one."""
    driver = StoreDriver(str(tmp_path), disk=SparseDisk(), options=StoreOptions(journal_bytes=20 * GIB))
    assert 7 * GIB < journal_bytes(tmp_path) < 8 * GIB
    driver.crash()


def test_a_journal_in_a_place_of_its_own(tmp_path: Path) -> None:
    meta, fast = tmp_path / "meta", tmp_path / "fast"
    options = StoreOptions(journal_bytes=MIB, journal_directory=str(fast))
    driver = StoreDriver(str(meta), options=options)
    driver.create(OID, SIZE, 0, b"a" * BLOCK, v(1), durable=True)
    driver.write(OID, 0, b"b" * BLOCK, v(2))  # only the journal has it
    driver.crash()
    assert journal_bytes(fast) == MIB
    assert not list(meta.glob("journal_file*"))
    assert check(str(meta), print, str(fast)).clean
    with pytest.raises(UsageError, match=f"{fast}/journal_file1 belongs to another node"):
        StoreDriver(str(tmp_path / "other"), options=options, seed=1)
    driver = StoreDriver(str(meta), options=options)
    assert driver.read(OID, 0, BLOCK) == b"b" * BLOCK
    driver.close()


def test_a_replay_says_what_it_did_and_does_nothing_the_second_time(tmp_path: Path) -> None:
    gone = data_oid(Vid(2), 0)
    driver = StoreDriver(str(tmp_path), options=SMALL)
    for oid in (OID, gone):
        driver.create(oid, SIZE, 0, b"a" * SIZE, v(1), durable=True)
    driver.close()
    driver = StoreDriver(str(tmp_path), options=SMALL)
    for oid in (OID, gone):
        driver.write(oid, 0, b"b" * 3 * BLOCK, v(2))
    driver.crash()
    (tmp_path / "obj" / f"{gone:016x}").unlink()
    driver = StoreDriver(str(tmp_path), options=SMALL)
    said = "journal: 2 records replayed into 1 objects, 3 blocks written, 1 for objects that are gone, 0 objects"
    assert any(line.startswith(said) for line in driver.logged), driver.logged
    assert driver.store.version(gone) is None
    driver.crash()
    driver = StoreDriver(str(tmp_path), options=SMALL)
    assert not any("replayed" in line for line in driver.logged)
    assert driver.read(OID, 0, 4 * BLOCK) == b"b" * 3 * BLOCK + b"a" * BLOCK
    driver.crash()


@pytest.mark.parametrize(("length", "syncs"), [(BLOCK, 1), (SIZE, 2)], ids=["in the journal", "in the file"])
def test_a_replay_syncs_a_file_once_unless_its_bytes_are_nowhere_else(tmp_path: Path, length: int, syncs: int) -> None:
    driver = StoreDriver(str(tmp_path), options=SMALL)
    driver.create(OID, SIZE, 0, b"a" * SIZE, v(1), durable=True)
    driver.close()
    driver = StoreDriver(str(tmp_path), options=SMALL)
    driver.write(OID, 0, b"b" * length, v(2))
    driver.crash()
    disk = SparseDisk()
    driver = StoreDriver(str(tmp_path), options=SMALL, disk=disk)
    assert disk.synced.count(f"{OID:016x}") == syncs
    assert driver.read(OID, 0, length) == b"b" * length
    driver.crash()


def switched(tmp_path: Path) -> StoreDriver:
    """A journal that has gone on in its other segment, while the object files cannot be synced."""
    driver = StoreDriver(str(tmp_path), options=SMALL)
    driver.create(OID, SIZE, 0, b"a" * BLOCK, v(1), durable=True)
    driver.store._syncs._workers = SlowSyncs(driver.call_soon)
    number, counter = driver.store._journal._number, 1
    while driver.store._journal._number == number:
        counter += 1
        driver.write(OID, 0, b"%08d" % counter * 512, v(counter), durable=True)
    return driver


def test_writers_do_not_wait_for_a_checkpoint(tmp_path: Path) -> None:
    driver = switched(tmp_path)
    version = driver.store.version(OID)
    assert version is not None
    counter = version.counter >> 16
    for further in range(100):  # there is room for 110 of them
        driver.write(OID, 0, b"%08d" % further * 512, v(counter + 1 + further), durable=True)
    assert driver.store._checkpoints.running
    slow = driver.store._syncs._workers
    assert isinstance(slow, SlowSyncs)
    answers: list[StoreError | None] = []
    for further in range(100, 200):  # and not for these: they wait, and are not lost
        driver.store.write(OID, 0, b"%08d" % further * 512, v(counter + 1 + further), True, answers.append)
    slow.go()
    while len(answers) < 100:
        driver.step()
    assert answers == [None] * 100
    driver.crash()
    driver = StoreDriver(str(tmp_path), options=SMALL)
    assert driver.read(OID, 0, BLOCK) == b"00000199" * 512
    driver.crash()


def test_a_segment_ends_when_the_page_cache_has_enough_of_it(tmp_path: Path) -> None:
    """Long before it is full: the other one's pages are there already. Unless a checkpoint still needs that."""
    driver = StoreDriver(str(tmp_path), disk=SparseDisk(), options=StoreOptions(nosync=True, journal_bytes=512 * MIB))
    driver.create(STRIP, SIZE, 0, b"a" * BLOCK, v(1))
    journal, checkpoints = driver.store._journal, driver.store._checkpoints
    written = 4 * BLOCK  # what a record of a strip carries with `nosync`
    counter = 1

    def write_on(megabytes: int) -> int:
        """How many segments have been begun by then."""
        nonlocal counter
        number = journal.number
        for _ in range(megabytes * MIB // written):
            counter += 1
            driver.write(STRIP, 0, b"%016d" % counter * (written // 16), v(counter))
        return journal.number - number

    enough = CACHED_BYTES // MIB
    assert write_on(enough - 2) == 0
    driver.store._syncs._workers = slow = SlowSyncs(driver.call_soon)
    assert write_on(3) == 1
    assert checkpoints.running
    count = checkpoints.count
    assert write_on(enough + 8) == 0
    slow.go()
    while checkpoints.count == count:
        driver.step()
    assert write_on(1) == 1
    driver.crash()
    again = StoreDriver(str(tmp_path), options=StoreOptions(nosync=True))
    assert again.read(STRIP, 0, written) == b"%016d" % counter * (written // 16)
    again.crash()


def test_with_nosync_plain_objects_are_written_once(tmp_path: Path) -> None:
    """The journal has hashes of their bytes. Its segment ends before a start would have to look at too many blocks."""
    driver = StoreDriver(str(tmp_path), disk=SparseDisk(), options=StoreOptions(nosync=True, journal_bytes=512 * MIB))
    driver.create(OID, SIZE, 0, b"a" * SIZE, v(1))
    journal, checkpoints = driver.store._journal, driver.store._checkpoints
    number, position = journal.number, journal.position
    for counter in range(2, 34):
        driver.write(OID, (counter & 7) * BLOCK, b"%08d" % counter * 512, v(counter), durable=True)
    assert journal.position - position < 32 * 128
    driver.store._syncs._workers = slow = SlowSyncs(driver.call_soon)
    journal._intents = MOST_INTENTS
    driver.write(OID, 0, b"next" * 1024, v(34), durable=True)
    assert journal.number == number + 1
    assert checkpoints.running
    journal._intents = 2 * MOST_INTENTS - 1
    driver.write(OID, 0, b"last" * 1024, v(35), durable=True)
    waits: list[StoreError | None] = []
    driver.store.write(OID, BLOCK, b"wait" * 1024, v(36), True, waits.append)
    driver.settle()
    assert (journal.number, waits) == (number + 1, [])
    slow.go()
    while not waits:
        driver.step()
    assert (journal.number, waits) == (number + 2, [None])
    driver.crash()
    again = StoreDriver(str(tmp_path), options=StoreOptions(nosync=True))
    assert again.store.version(OID) == v(36)
    assert again.read(OID, 0, 3 * BLOCK) == b"last" * 1024 + b"wait" * 1024 + b"%08d" % 26 * 512
    again.crash()


def test_rot_at_the_end_of_a_segment_is_told_by_the_next(tmp_path: Path) -> None:
    driver = switched(tmp_path)
    older = driver.store._journal._number - 1 & 1
    driver.write(OID, 0, b"last" * 1024, v(1000), durable=True)
    driver.crash()
    path = tmp_path / f"journal_file{older}"
    position = path.read_bytes().rfind(b"JREC") - 8
    flip(path, position + 20)
    summary = check(str(tmp_path), print)
    assert [damage.path for damage in summary.damaged] == [str(path)]
    again = StoreDriver(str(tmp_path), options=SMALL)
    told = f"{path}: it is damaged at byte {position}: later writes of this node are lost here"
    assert told in again.logged
    assert again.store.version(OID) != v(1000)
    again.crash()


def crashed(directory: Path) -> Path:
    """A segment of the journal of a store that holds an object and has crashed."""
    driver = StoreDriver(str(directory), options=SMALL)
    driver.create(OID, SIZE, 0, b"a" * BLOCK, v(1), durable=True)
    driver.crash()
    return directory / "journal_file1"


def test_a_rotten_header_of_a_segment_is_told(tmp_path: Path) -> None:
    path = crashed(tmp_path)
    flip(path, 30)
    assert [damage.path for damage in check(str(tmp_path), print).damaged] == [str(path)]
    again = StoreDriver(str(tmp_path), options=SMALL)
    assert any(line.startswith(f"{path}: it is damaged at byte 0") for line in again.logged)
    again.crash()


def test_a_newer_format_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = crashed(tmp_path)
    data = bytearray(path.read_bytes())
    data[8:12] = (3).to_bytes(4, "little")
    data[SEGMENT_HEADER - 8 : SEGMENT_HEADER] = block_hash(data[: SEGMENT_HEADER - 8]).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(UsageError, match=f"{path}: format 3, this version reads 2"):
        StoreDriver(str(tmp_path), options=SMALL)
    assert path.read_bytes() == data


def test_with_nosync_only_checkpoints_and_the_end_sync(tmp_path: Path) -> None:
    disk = SparseDisk()
    driver = StoreDriver(str(tmp_path), disk=disk, options=StoreOptions(nosync=True, journal_bytes=MIB))
    disk.synced.clear()
    driver.create(OID, SIZE, 0, b"a" * SIZE, v(1), durable=True)
    for counter in range(2, 20):
        driver.write(OID, 0, b"b" * BLOCK, v(counter), durable=True)
        driver.write(OID, 0, b"c" * (SIZE // 2), v(counter), durable=True)
        driver.flush()
    assert disk.synced == []
    number = driver.store._journal._number
    while driver.store._journal._number == number:
        driver.write(OID, 0, b"d" * BLOCK, v(30), durable=True)
    while driver.store._checkpoints.running:
        driver.step()
    assert disk.synced.count(f"{OID:016x}") == 1
    disk.synced.clear()
    driver.write(OID, 0, b"e" * BLOCK, v(31))
    driver.close()
    assert f"{OID:016x}" in disk.synced
    assert any(name.startswith("journal") for name in disk.synced)


@pytest.mark.parametrize("changed", [None, "write", "stamp", "punch", "restore"])
def test_a_file_that_is_as_it_was_made_has_its_trailer_already(tmp_path: Path, changed: str | None) -> None:
    driver = StoreDriver(str(tmp_path), options=SMALL)
    driver.create(OID, SIZE, 0, b"a" * BLOCK, v(1))
    driver.flush()
    copy = driver.store.copies.find(OID)
    if changed == "write":
        driver.write(OID, BLOCK, b"b" * BLOCK, v(2), durable=True)
    elif changed == "stamp":
        driver.done(lambda done: driver.store.stamp(OID, v(2), True, done))
    elif changed == "punch":
        driver.punch(OID, 0, BLOCK, v(2), durable=True)
    elif changed == "restore":
        assert driver.store.restore_begin(OID, SIZE) is None
        driver.restore_finish(OID, v(2))
    driver.settle()
    writes = copy.trailer_writes
    driver.done(lambda done: driver.store._checkpoints.settle(copy, done))
    assert copy.trailer_writes == writes + (changed is not None)
    assert not copy.touched
    header = read_header(driver.disk, copy.fd, driver.disk.info(copy.fd).length, OID)
    assert header.version == (v(1) if changed is None else v(2))
    with open(copy.path, "rb") as file:
        file.seek(copy.table)
        assert file.read() == copy.trailer
    driver.crash()

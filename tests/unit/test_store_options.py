"""What a sheep's options change in its store."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from tests.support.stores import StoreDriver

from sheepdog.cluster.core.ids import Version, Vid, data_oid
from sheepdog.cluster.host.store_options import StoreOptions
from sheepdog.cluster.host.uncached import DROPS

SIZE = 1 << 20
OID = data_oid(Vid(1), 0)
JOURNAL_BYTES = 1 << 20


def v(counter: int) -> Version:
    return Version(1, 1, counter << 16)


def opened(path: Path, skip: bool = False) -> StoreDriver:
    return StoreDriver(str(path), options=StoreOptions(journal_bytes=JOURNAL_BYTES, journal_skip=skip))


@pytest.mark.parametrize("skip", [False, True])
def test_a_skipped_journal_is_named_in_the_log_and_its_writes_are_gone(tmp_path: Path, skip: bool) -> None:
    first = opened(tmp_path)
    first.create(OID, SIZE, 0, b"a" * SIZE, v(1), durable=True)
    first.close()
    second = opened(tmp_path)
    second.write(OID, 0, b"b" * 4096, v(2))  # only the journal has it
    second.crash()
    third = opened(tmp_path, skip)
    skipped = "1 records of the journal are skipped, as -j skip asks"
    assert (skipped in third.logged) == skip
    assert third.read(OID, 0, 4096) == (b"a" if skip else b"b") * 4096
    third.close()


def cached_blocks(path: Path) -> int:
    """Blocks of the object that the page cache holds."""
    block = bytearray(4096)
    found = 0
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # asking for a block brings no others
    try:
        for offset in range(0, SIZE, len(block)):
            try:
                found += os.preadv(fd, (block,), offset, os.RWF_NOWAIT) == len(block)
            except BlockingIOError:
                pass
            except OSError:
                pytest.skip("a file system in memory")
    finally:
        os.close(fd)
    return found


def sweep(driver: StoreDriver, path: Path) -> None:
    """A second passes, and the disk has written what it was asked to write."""
    assert driver.clock.calls
    driver.clock.fire()
    while not driver.clock.calls:
        driver.step()
    fd = os.open(path, os.O_RDONLY)
    os.fdatasync(fd)
    os.close(fd)


def leaves(driver: StoreDriver, path: Path) -> bool:
    """The page cache holds nothing of the object after its last use, or after another one: the machine may be busy."""
    for _ in range(3):
        sweep_all(driver, path)
        if not cached_blocks(path):
            return True
        assert driver.read(OID, 0, 4096) == b"a" * 4096
    return False


def sweep_all(driver: StoreDriver, path: Path) -> None:
    """As often as a file is dropped after its last use: the kernel keeps a page that it is busy with."""
    for _ in range(DROPS):
        time.sleep(0.2)  # a sheep lets a second pass: what the kernel reads ahead is there by then
        sweep(driver, path)


def test_with_direct_io_objects_leave_the_page_cache(tmp_path: Path) -> None:
    for direct in (False, True):
        place = tmp_path / str(direct)
        place.mkdir()
        options = StoreOptions(nosync=True, journal_bytes=JOURNAL_BYTES, direct_io=direct)
        driver = StoreDriver(str(place), options=options)
        path = place / "obj" / f"{OID:016x}"
        driver.create(OID, SIZE, 0, b"a" * SIZE, v(1))
        assert cached_blocks(path) > 0
        if direct:
            assert leaves(driver, path)
            assert driver.read(OID, 4096, 4096) == b"a" * 4096
            assert cached_blocks(path) > 0
            assert leaves(driver, path)
        driver.write(OID, 0, b"b" * 4096, v(2))
        assert driver.read(OID, 0, 4096) == b"b" * 4096
        driver.close()
        assert driver.failed == []

"""Copies that are removed or replaced while their changes are still on their way."""

from __future__ import annotations

import random

import pytest
from tests.support.sim_disk import Crashes, SimDisk
from tests.support.stores import StoreDriver

from sheepdog.cluster.core.errors import StoreError
from sheepdog.cluster.core.ids import Version, Vid, data_oid
from sheepdog.cluster.core.limits import JOURNALED_BYTES
from sheepdog.cluster.host.applier import SLOW_WRITE_BYTES
from sheepdog.cluster.host.store_options import StoreOptions

OID, OTHER = data_oid(Vid(1), 0), data_oid(Vid(2), 0)
SIZE = 2 * SLOW_WRITE_BYTES
SMALL_JOURNAL = StoreOptions(journal_bytes=320 << 10)
CRASHES = 8


def v(counter: int) -> Version:
    return Version(1, 1, counter << 16)


def finish(driver: StoreDriver) -> None:
    """Until nothing happens any more."""
    try:
        while True:
            driver.step()
    except TimeoutError:
        pass


@pytest.mark.parametrize("nosync", [False, True], ids=["sync", "nosync"])
def test_a_removal_during_a_slow_write_leaves_the_next_object_alone(nosync: bool) -> None:
    disk = SimDisk()
    driver = StoreDriver("/meta", disk=disk, nosync=nosync)
    driver.create(OID, SIZE, 0, b"first", v(1), durable=True)
    answers: list[StoreError | None] = []
    driver.store.write(OID, 0, b"w" * SLOW_WRITE_BYTES, v(2), False, answers.append)
    while driver.store.copies.find(OID).later is None:
        driver.step()
    driver.store.remove(OID, answers.append)
    driver.store.create(OID, SIZE, 0, b"second", v(3), False, answers.append)
    finish(driver)
    assert answers == [None] * 3
    assert driver.read(OID, 0, 6) == b"second"
    driver.close()
    again = StoreDriver("/meta", disk=disk)
    assert again.store.version(OID) == v(3)
    assert again.read(OID, 0, 6) == b"second"


def test_a_flush_covers_what_waits_to_be_removed() -> None:
    """The removal waits for room in the journal: until it is there, the object may come back, with all of its bytes."""
    disk = SimDisk()
    driver = StoreDriver("/meta", disk=disk, options=SMALL_JOURNAL)
    for oid in (OID, OTHER):
        driver.create(oid, SIZE, 0, b"first", v(1), durable=True)
    large = b"w" * (2 * JOURNALED_BYTES)
    driver.write(OID, 0, large, v(2))
    answers: list[StoreError | None] = []
    for counter in range(2, 8):  # more than both halves of the journal take
        driver.store.write(OTHER, 0, b"x" * (JOURNALED_BYTES - 4096), v(counter), False, answers.append)
    driver.store.remove(OID, answers.append)
    flushed: list[StoreError | None] = []
    driver.store.flush(frozenset({Vid(1)}), flushed.append)
    while not flushed:
        driver.step()
    assert flushed == [None]
    crashes = Crashes(disk.log, disk.directories)
    while crashes.position < len(disk.log):
        crashes.advance()
    for seed in range(CRASHES):
        image = crashes.powerless(random.Random(seed))
        after = StoreDriver("/meta", disk=image, options=SMALL_JOURNAL)
        assert after.store.version(OID) is None or after.read(OID, 0, len(large)) == large

"""Crash enumeration: after every effect of a random workload the process is killed or the power fails, then the store
is opened again and must hold what was promised.

For an object whose version after the crash is that of some operation, its bytes are exactly what that operation left
(equal versions mean equal bytes), and no durable operation comes after it. A version between two operations says that
the later one was cut, a large write, and perhaps others behind it: then each block is as some operation since the
block's last durable one left it, or has 512-byte sectors of several such.
"""

from __future__ import annotations

import contextlib
import os
import random

import pytest
from tests.support.sim_disk import ATOM, Crashes, SimDisk
from tests.support.stores import StoreDriver
from tests.unit.test_open_files import SlowSyncs

from sheepdog.cluster.core.errors import Corrupt, StoreError
from sheepdog.cluster.core.ids import NO_VERSION, ObjectId, Version, Vid, data_oid
from sheepdog.cluster.core.limits import JOURNALED_BYTES, JOURNALED_NOSYNC_BYTES
from sheepdog.cluster.core.ports import Done
from sheepdog.cluster.host.replay import VERSION_GAP
from sheepdog.cluster.host.store_options import StoreOptions

BLOCK = 4096
SIZE = 24 * BLOCK - 100
BLOCKS = 24
JOURNAL_BYTES = 640 << 10
FULL_JOURNAL_BYTES = 320 << 10  # of which 64 KiB of each half are reserved: what waits for room piles up
CROWD = 30  # operations that are under way before a crowded workload waits for any
OPERATIONS = 45
OIDS = [data_oid(Vid(vid), 0) for vid in (1, 2, 3)]
NEVER = 1 << 60
WORKLOADS = int(os.environ.get("STORE_CRASH_WORKLOADS", "24"))  # each makes about 460 images
SOAK_WORKLOADS = 120  # 50,000 images
SUBSET_WORKLOADS, SUBSET_OPERATIONS, SUBSETS = 4, 12, 256
REPLAY_WORKLOADS, REPLAYS = 3, 6
CROWDED_WORKLOADS = 12
BOTH_SEGMENTS = (1402, 1802)  # were needed when the crash came
SEED = int(os.environ.get("STORE_CRASH_SEED", "0"))


class Operation:
    """One call, and from which position of the disk's log on it is what."""

    def __init__(self, version: Version | None, content: bytes | None, first: int, last: int, large: bool) -> None:
        self.version = version  # None: removed
        self.content = content  # of the whole object after it
        self.first, self.last = first, last  # blocks touched
        self.large = large  # its bytes do not go through the journal
        self.restore_began = NEVER
        self.acked = NEVER
        self.exists = NEVER  # on the disk as an operation, if not all of its bytes
        self.durable = NEVER  # on the disk with its bytes


class Workload:
    """Random operations on a few objects, and what was promised when. `crowded`: the journal is mostly full.

    `direct`: may durable records go around the page cache? Two of three seeds do.
    """

    def __init__(
        self, seed: int, nosync: bool, operations: int = OPERATIONS, crowded: bool = False, direct: bool = True
    ) -> None:
        self._journal_bytes = FULL_JOURNAL_BYTES if crowded else JOURNAL_BYTES
        self.rng = random.Random(seed)
        self.disk = SimDisk(seed, miss_rate=0.2, direct=direct and seed % 3 > 0)
        options = StoreOptions(nosync=nosync, journal_bytes=self._journal_bytes)
        self._journaled = JOURNALED_NOSYNC_BYTES if nosync else JOURNALED_BYTES  # of a new object
        self._overwrites = -1 if nosync else JOURNALED_BYTES - 8192
        self.driver = StoreDriver("/meta", disk=self.disk, options=options, seed=seed)
        self.started = len(self.disk.log)
        self.history: dict[ObjectId, list[Operation]] = {oid: [] for oid in OIDS}
        self.restoring: dict[ObjectId, None] = {}
        self.waiting = 0
        for counter in range(1, operations):
            self._operate(counter)
            for _ in range(self.rng.choice((0, 0, 1, 3, 10))):
                if not (crowded and self.waiting < CROWD and self.rng.random() < 0.6):
                    self._step()
        while self.waiting:
            self._step()
        for _ in range(self.rng.choice((0, 20, 200))):
            self._step()

    def _step(self) -> None:
        try:
            self.driver.step()
        except TimeoutError:
            self.driver.clock.fire()

    def _operate(self, counter: int) -> None:
        rng, store = self.rng, self.driver.store
        oid = rng.choice(OIDS)
        if oid in self.restoring:
            return
        operations = self.history[oid]
        content = operations[-1].content if operations else None
        version = Version(1, 1, counter * VERSION_GAP)
        durable = rng.random() < 0.3
        offset = rng.choice((0, rng.randrange(SIZE), rng.randrange(SIZE)))
        length = rng.randint(1, min(SIZE - offset, rng.choice((6000, 6000, SIZE))))
        data = bytes(length) if rng.random() < 0.1 else rng.randbytes(length)
        first, last = offset // BLOCK, (offset + length - 1) // BLOCK
        kind = rng.random()
        if kind < 0.1:
            self._flush(oid)
        elif kind < 0.16:
            self._restore(oid, version, content)
        elif content is None or kind < 0.24:
            after = bytearray(SIZE)
            after[offset : offset + length] = data
            widened = (last + 1) * BLOCK - first * BLOCK
            operation = Operation(version, bytes(after), 0, BLOCKS - 1, widened > self._journaled)
            operations.append(operation)
            store.create(oid, SIZE, offset, data, version, durable, self._done(operation, durable, True))
        elif kind < 0.3:
            operation = Operation(None, None, 0, BLOCKS - 1, False)
            operations.append(operation)
            store.remove(oid, self._done(operation, True, True))
        else:
            punch = kind < 0.42
            changed = bytearray(content)
            changed[offset : offset + length] = bytes(length) if punch else data
            operation = Operation(version, bytes(changed), first, last, not punch and length > self._overwrites)
            operations.append(operation)
            done = self._done(operation, durable, durable)
            if punch:
                store.punch(oid, offset, length, version, durable, done)
            else:
                store.write(oid, offset, data, version, durable, done)

    def _restore(self, oid: ObjectId, version: Version, content: bytes | None) -> None:
        """Another node's bytes come in pieces, as the puller brings them."""
        if any(operation.acked == NEVER for operation in self.history[oid]):
            return  # as core does: restores wait for writes
        store, rng = self.driver.store, self.rng
        changed = bytearray(content or bytes(SIZE))
        pieces = sorted(rng.sample(range(BLOCKS), rng.randint(1, BLOCKS)))
        operation = Operation(version, None, 0, BLOCKS - 1, True)
        operation.restore_began = len(self.disk.log)
        self.restoring[oid] = None
        store.restore_begin(oid, SIZE)
        left = len(pieces)
        done = self._done(operation, True, True)

        def finished(error: StoreError | None) -> None:
            del self.restoring[oid]
            done(error)

        def arrived(error: StoreError | None) -> None:
            nonlocal left
            assert error is None
            left -= 1
            if left == 0:
                store.restore_finish(oid, version, finished)

        for block in pieces:
            start = block * BLOCK
            length = min(BLOCK, SIZE - start)
            if rng.random() < 0.2:
                changed[start : start + length] = bytes(length)
                store.restore_punch(oid, start, length)
                self.driver.call_soon(lambda: arrived(None))
            else:
                changed[start : start + length] = data = rng.randbytes(length)
                store.restore_write(oid, start, data, arrived)
        operation.content = bytes(changed)
        self.history[oid].append(operation)

    def _done(self, operation: Operation, durable: bool, exists: bool) -> Done:
        self.waiting += 1

        def done(error: StoreError | None) -> None:
            assert error is None
            self.waiting -= 1
            operation.acked = len(self.disk.log)
            if exists:
                operation.exists = operation.acked
            if durable or (exists and not operation.large):
                operation.durable = operation.acked

        return done

    def _flush(self, oid: ObjectId) -> None:
        covered = [operation for operation in self.history[oid] if operation.acked != NEVER]
        self.waiting += 1

        def done(error: StoreError | None) -> None:
            assert error is None
            self.waiting -= 1
            for operation in covered:
                operation.exists = min(operation.exists, len(self.disk.log))
                operation.durable = min(operation.durable, len(self.disk.log))

        self.driver.store.flush(frozenset({Vid(oid >> 32)}), done)

    # After the crash

    def check(self, image: SimDisk, at: int, killed: bool) -> None:
        driver = StoreDriver("/meta", disk=image, options=StoreOptions(journal_bytes=self._journal_bytes), seed=at)
        assert not driver.failed
        for oid, operations in self.history.items():
            self._check_object(driver, oid, operations, at, killed)

    def _check_object(
        self, driver: StoreDriver, oid: ObjectId, operations: list[Operation], at: int, killed: bool
    ) -> None:
        def holds(operation: Operation, position: int) -> bool:
            return (operation.acked if killed else position) <= at

        floor = max((i for i, operation in enumerate(operations) if holds(operation, operation.exists)), default=-1)
        version = driver.store.version(oid)
        if version is None:
            possible = [-1, *(i for i, operation in enumerate(operations) if operation.version is None)]
            assert max(possible) >= floor, "an object is gone"
            return
        if version == NO_VERSION:
            begun = [i for i, operation in enumerate(operations) if operation.restore_began <= at]
            assert max(begun, default=-1) > floor, "a copy without version that nobody was restoring"
            return
        exact = [i for i, operation in enumerate(operations) if operation.version == version]
        got = driver.read(oid, 0, SIZE)
        if exact:
            assert exact[0] >= floor, "an old version came back"
            content = operations[exact[0]].content
            assert content is not None
            wrong = [
                b for b in range(BLOCKS) if got[b * BLOCK : (b + 1) * BLOCK] != content[b * BLOCK : (b + 1) * BLOCK]
            ]
            assert not wrong, f"blocks {wrong} are not those of their version"
            return
        cut = next(i for i, operation in enumerate(operations) if operation.version and operation.version > version)
        assert cut >= floor
        last = cut if killed else len(operations) - 1  # a loss of power takes an older one and leaves a newer one
        for block in range(BLOCKS):
            touching = [i for i, o in enumerate(operations[: last + 1]) if o.first <= block <= o.last]
            oldest = max((i for i in touching if holds(operations[i], operations[i].durable)), default=-1)
            self._check_block(got, block, [operations[i] for i in touching if i >= oldest], oldest < 0)

    def _check_block(self, got: bytes, block: int, operations: list[Operation], may_be_zero: bool) -> None:
        """Every sector is one of those that the operations left."""
        for start in range(block * BLOCK, min((block + 1) * BLOCK, SIZE), ATOM):
            stop = min(start + ATOM, SIZE)
            allowed = [operation.content[start:stop] for operation in operations if operation.content is not None]
            if may_be_zero or any(operation.version is None or operation.large for operation in operations):
                allowed.append(bytes(stop - start))
            assert got[start:stop] in allowed, f"block {block} was never so"


IMAGES: list[int] = []  # of each workload that has run


def run(number: int, nosync: bool, crowded: bool = False) -> int:
    """How many images held what was promised."""
    images = 0
    workload = Workload(SEED + number, nosync, crowded=crowded)
    crashes = Crashes(workload.disk.log, workload.disk.directories)
    rng = random.Random(SEED + number)
    while crashes.position < len(workload.disk.log):
        crashes.advance()
        if crashes.position < workload.started:
            continue
        workload.check(crashes.killed(), crashes.position, killed=True)
        images += 1 if nosync else 3
        if not nosync:  # with -n a power failure may take anything
            workload.check(crashes.powerless(rng), crashes.position, killed=False)
            workload.check(crashes.powerless(rng), crashes.position, killed=False)
    return images


@pytest.mark.parametrize("number", range(SUBSET_WORKLOADS))
def test_every_subset_of_what_was_not_synced(number: int) -> None:
    """Wherever there are few enough of them."""
    # Around the page cache blocks are written whole: they have too many sectors.
    workload = Workload(SEED + number, False, SUBSET_OPERATIONS, direct=False)
    crashes = Crashes(workload.disk.log, workload.disk.directories)
    images = 0
    while crashes.position < len(workload.disk.log):
        crashes.advance()
        if crashes.position < workload.started:
            continue
        for image in crashes.every_subset(SUBSETS):
            workload.check(image, crashes.position, killed=False)
            images += 1
    assert images > SUBSETS


@pytest.mark.parametrize("nosync", [False, True], ids=["sync", "nosync"])
@pytest.mark.parametrize("number", [*range(REPLAY_WORKLOADS), *BOTH_SEGMENTS])
def test_a_crash_in_a_replay_loses_nothing(number: int, nosync: bool) -> None:
    """After any effect of a replay, it begins again with what is there then."""
    workload = Workload(SEED + number, nosync)
    rng = random.Random(SEED + number)
    crashes = Crashes(workload.disk.log, workload.disk.directories)
    places = sorted(rng.sample(range(workload.started, len(workload.disk.log) + 1), REPLAYS))
    for place in places:
        while crashes.position < place:
            crashes.advance()
        killed = nosync or rng.random() < 0.5
        image = crashes.killed() if killed else crashes.powerless(rng)
        again = Crashes(image.log, image.directories, image)
        workload.check(image, place, killed)
        assert image.log, "it was a replay"
        while again.position < len(image.log):
            again.advance()
            workload.check(again.killed(), place, killed)
            workload.check(again.powerless(rng), place, killed)


@pytest.mark.parametrize("nosync", [False, True], ids=["sync", "nosync"])
def test_a_copy_that_lacks_a_write_is_older_than_one_that_has_it(nosync: bool) -> None:
    """Its journal may have been on the disk already, with a write that no other copy has: that makes it no newer."""
    length = BLOCK if nosync else JOURNALED_BYTES + BLOCK
    size = 3 * length
    contents = [bytes([letter]) * length for letter in b"abc"]
    disk, options = SimDisk(1), StoreOptions(journal_bytes=JOURNAL_BYTES, nosync=nosync)
    driver = StoreDriver("/meta", disk=disk, options=options)
    versions = [Version(1, 1, counter * VERSION_GAP) for counter in range(1, 5)]
    driver.create(OIDS[0], size, 0, b"0" * size, versions[0])
    driver.close()
    driver = StoreDriver("/meta", disk=disk, options=options)
    for number, content in enumerate(contents):
        driver.write(OIDS[0], number * length, content, versions[number + 1])
    crashes = Crashes(disk.log, disk.directories)
    while crashes.position < len(disk.log):
        crashes.advance()
    lacking = 0
    for seed in range(100):
        again = StoreDriver("/meta", disk=crashes.powerless(random.Random(seed)), options=options)
        version = again.store.version(OIDS[0])
        assert version is not None
        for number, content in enumerate(contents):
            with contextlib.suppress(Corrupt):  # with `-n` of those whose record is lost: another copy answers
                if again.read(OIDS[0], number * length, length) != content:
                    assert version < versions[number + 1]
                    lacking += version > versions[0]
    assert lacking


@pytest.mark.parametrize("again_bytes", [JOURNAL_BYTES, 2 * JOURNAL_BYTES], ids=["same size", "larger"])
def test_a_crash_when_the_journal_begins_anew_leaves_a_torn_copy_torn(again_bytes: int) -> None:
    """The replay has given it a version of its own. The newer segment alone, without the large write that was cut,
    would give it that of its last write again, which other copies have with other bytes."""
    disk, options = SimDisk(1), StoreOptions(journal_bytes=again_bytes)
    driver = StoreDriver("/meta", disk=disk, options=StoreOptions(journal_bytes=JOURNAL_BYTES))
    cut, other = OIDS[:2]
    whole, large, last = (Version(1, 1, counter * VERSION_GAP) for counter in (1, 2, 3))
    for oid in (cut, other):
        driver.create(oid, SIZE, 0, b"a" * BLOCK, whole, durable=True)
    driver.store._syncs._workers = SlowSyncs(driver.call_soon)
    driver.write(cut, 0, b"b" * (JOURNALED_BYTES + BLOCK), large)
    begun = driver.store._journal.number
    while driver.store._journal.number == begun:
        driver.write(other, 0, b"a" * BLOCK, large, durable=True)
    driver.write(cut, SIZE - BLOCK, b"c" * BLOCK, last, durable=True)
    crashes = Crashes(disk.log, disk.directories)
    while crashes.position < len(disk.log):
        crashes.advance()
    image = crashes.synced()
    replays = Crashes(image.log, image.directories, image)
    torn = StoreDriver("/meta", disk=image, options=options)
    version = torn.store.version(cut)
    assert version is not None
    assert large < version < last
    while replays.position < len(image.log):
        replays.advance()
        version = StoreDriver("/meta", disk=replays.killed(), options=options).store.version(cut)
        assert version is not None
        assert large < version < last


@pytest.mark.parametrize("nosync", [False, True], ids=["sync", "nosync"])
@pytest.mark.parametrize("number", range(WORKLOADS))
def test_every_crash_leaves_what_was_promised(number: int, nosync: bool) -> None:
    IMAGES.append(run(number, nosync))


@pytest.mark.parametrize("nosync", [False, True], ids=["sync", "nosync"])
@pytest.mark.parametrize("number", range(CROWDED_WORKLOADS))
def test_what_waits_for_room_in_the_journal_changes_nothing_yet(number: int, nosync: bool) -> None:
    """What is removed, replaced or restored is as it was until the journal says so, whatever a checkpoint does."""
    run(number, nosync, crowded=True)


def test_a_large_write_is_not_answered_before_what_replaced_its_object() -> None:
    """Answered when it was applied, it found its object replaced by what was not in the journal yet."""
    run(21, True)


@pytest.mark.soak
@pytest.mark.parametrize("nosync", [False, True], ids=["sync", "nosync"])
@pytest.mark.parametrize("number", range(WORKLOADS, SOAK_WORKLOADS))
def test_many_more_crashes_leave_what_was_promised(number: int, nosync: bool) -> None:
    IMAGES.append(run(number, nosync))


def test_there_were_as_many_images_as_promised() -> None:
    if len(IMAGES) < 2 * WORKLOADS:
        pytest.skip("only some of the workloads have run")
    assert sum(IMAGES) >= 10_000 * WORKLOADS // 24

"""What waits for its neighbours on its way to the object files: what leaves together, and what never leaves."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from tests.support.stores import StoreDriver

from sheepdog.cluster.core.errors import StoreError
from sheepdog.cluster.core.ids import Version, Vid, data_oid
from sheepdog.cluster.core.limits import BEHIND_BYTES, BEHIND_NS
from sheepdog.cluster.core.ports import Buffer
from sheepdog.cluster.host.directory import WRITE_PIECE_BYTES
from sheepdog.cluster.host.disk import RealDisk
from sheepdog.cluster.host.store_options import StoreOptions

BLOCK = 4096
SIZE = 4 << 20
OID = data_oid(Vid(1), 0)


def v(counter: int) -> Version:
    return Version(1, 1, counter << 16)


class NotedDisk(RealDisk):
    """Notes what goes to the object's file, as (first block, bytes)."""

    def __init__(self) -> None:
        self.writes: list[tuple[int, int]] = []

    def pwrite(self, fd: int, data: Buffer, offset: int, /) -> int:  # type: ignore[override]
        self._note(fd, offset, len(data))
        return os.pwrite(fd, data, offset)

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int, /) -> int:  # type: ignore[override]
        self._note(fd, offset, sum(map(len, buffers)))
        return os.pwritev(fd, buffers, offset)

    def _note(self, fd: int, offset: int, size: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").endswith(f"{OID:016x}") and offset < SIZE:
            self.writes.append((offset // BLOCK, size))


class Behind(StoreDriver):
    """A store with one object of zeros in its file."""

    def __init__(self, path: Path, nosync: bool) -> None:
        self.noted = NotedDisk()
        super().__init__(str(path), disk=self.noted, options=StoreOptions(nosync=nosync, journal_bytes=32 << 20))
        self.create(OID, SIZE, 0, bytes(BLOCK), v(1))
        self.file = path / "obj" / f"{OID:016x}"
        self.counter = 1
        self.noted.writes.clear()

    def put(self, block: int, letter: bytes, count: int = 1, durable: bool = True) -> None:
        """The write is answered; its file has not been looked at since."""
        self.counter += 1
        data = letter * (count * BLOCK)
        assert (
            self.wait(lambda done: self.store.write(OID, block * BLOCK, data, v(self.counter), durable, done)) is None
        )
        self.settle()

    def make(self, counter: int) -> None:
        """A new object, with this number in all bytes of its first block."""
        self.counter, data = counter, bytes([counter]) * BLOCK
        assert self.wait(lambda done: self.store.create(OID, SIZE, 0, data, v(counter), True, done)) is None
        self.settle()

    def letters(self, count: int) -> bytes:
        """The first byte of each of the file's blocks."""
        return self.file.read_bytes()[: count * BLOCK : BLOCK]

    def is_as_its_file(self) -> None:
        """Everything is in place, and the table says what is there."""
        self.put_in_place()
        copy = self.store.copies.find(OID)
        assert not copy.pending
        assert not copy.pins
        assert copy.applied == copy.version == v(self.counter)
        assert self.read(OID, 0, SIZE) == self.file.read_bytes()[:SIZE]


@pytest.fixture(params=[False, True], ids=["sync", "nosync"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Behind]:
    driver = Behind(tmp_path, request.param)
    yield driver
    driver.crash()


def test_neighbours_leave_together(store: Behind) -> None:
    for block in (3, 4, 5, 9, 6):
        store.put(block, b"a")
    store.put(10, b"b", 2)
    assert store.noted.writes == []
    assert store.read(OID, 4 * BLOCK, BLOCK) == b"a" * BLOCK
    store.is_as_its_file()
    assert store.noted.writes == [(3, 4 * BLOCK), (9, 3 * BLOCK)]
    assert store.letters(12) == bytes(3) + b"aaaa" + bytes(2) + b"abb"


def test_no_more_of_them_than_a_piece(store: Behind) -> None:
    blocks = WRITE_PIECE_BYTES // BLOCK
    for block in range(blocks + 1):
        store.put(block, b"a")
    store.is_as_its_file()
    assert store.noted.writes == [(0, WRITE_PIECE_BYTES), (blocks, BLOCK)]


def test_what_is_written_over_does_not_leave(store: Behind) -> None:
    for letter in b"a", b"b", b"c":
        store.put(3, letter)
    store.put(7, b"d", 3)
    store.put(8, b"e")
    store.is_as_its_file()
    assert store.noted.writes == [(3, BLOCK), (7, BLOCK), (9, BLOCK), (8, BLOCK)]
    assert store.letters(10) == bytes(3) + b"c" + bytes(3) + b"ded"


def test_what_came_with_a_neighbour_stays(store: Behind) -> None:
    """An older record of the same block comes behind it, and is not written over it."""
    store.put(3, b"a")
    store.put(4, b"o")
    store.put(4, b"n")
    store.is_as_its_file()
    assert store.letters(5) == bytes(3) + b"an"
    assert store.noted.writes == [(3, 2 * BLOCK)]


def test_a_neighbour_may_be_written_over_in_part(store: Behind) -> None:
    store.put(3, b"a")
    store.put(4, b"b", 3)
    store.put(5, b"c")
    store.put(6, b"d")
    store.is_as_its_file()
    assert store.letters(8) == bytes(3) + b"abcd" + bytes(1)


def test_a_hole_is_not_overtaken(store: Behind) -> None:
    store.put(3, b"a")
    store.counter += 1
    errors: list[StoreError | None] = []
    store.store.punch(OID, 4 * BLOCK, 2 * BLOCK, v(store.counter), False, errors.append)
    store.put(4, b"b")
    store.is_as_its_file()
    assert errors == [None]
    assert store.letters(6) == bytes(3) + b"ab" + bytes(1)


def test_who_waits_for_the_file_does_not_wait_for_neighbours(store: Behind) -> None:
    store.put(3, b"a")
    store.put(8, b"L", WRITE_PIECE_BYTES // BLOCK + 1)
    assert store.letters(4) == bytes(3) + b"a"


def test_a_new_file_is_made_at_once(store: Behind) -> None:
    """Also in the place of one that was removed just now."""
    store.put(3, b"a")
    errors: list[StoreError | None] = []
    for counter in (50, 51):
        store.store.remove(OID, errors.append)
        store.make(counter)
        assert store.letters(2) == bytes([counter, 0])
        store.put(1, b"b")
    assert errors == [None, None]
    store.is_as_its_file()


def test_so_much_waits_and_no_more(store: Behind) -> None:
    blocks = BEHIND_BYTES // BLOCK
    for block in range(blocks):
        store.put(2 * (block % 500), b"a")
    assert store.noted.writes == []
    store.put(1001, b"b")
    store.put(1003, b"b")
    assert len(store.noted.writes) <= 2
    store.is_as_its_file()


def test_nothing_waits_long(store: Behind) -> None:
    store.put(3, b"a")
    for _ in range(2):
        store.clock.fire(BEHIND_NS)
        store.settle()
    assert store.letters(4) == bytes(3) + b"a"


def test_a_write_that_is_not_durable_takes_no_durable_ones_place(tmp_path: Path) -> None:
    """A crash could take it, when the journal has forgotten the other."""
    store = Behind(tmp_path, False)
    store.put(3, b"a", durable=True)
    store.put(3, b"b", durable=False)
    store.put_in_place()
    assert store.letters(4) == bytes(3) + b"a"
    assert store.read(OID, 3 * BLOCK, BLOCK) == b"b" * BLOCK
    store.flush()
    store.is_as_its_file()
    assert store.letters(4) == bytes(3) + b"b"
    store.crash()


def test_a_full_journal_brings_everything_into_place(tmp_path: Path) -> None:
    store = StoreDriver(str(tmp_path), options=StoreOptions(journal_bytes=1 << 20))
    store.store._pipeline.behind_max = SIZE
    store.create(OID, SIZE, 0, bytes(BLOCK), v(1))
    first = store.store._journal.number
    for counter in range(2, 1000):
        errors: list[StoreError | None] = []
        store.store.write(OID, (counter % 7) * BLOCK, b"x" * BLOCK, v(counter), True, errors.append)
        while not errors:
            store.step()
        assert errors == [None]
    assert store.store._journal.number > first + 2
    store.close()

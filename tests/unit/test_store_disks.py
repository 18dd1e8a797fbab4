"""Several disks of one node: shares, plug and unplug, foreign disks."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.stores import StoreDriver
from tests.unit.test_store import FailingDisk

from sheepdog.cluster.core.errors import DiskError, StoreError, UsageError
from sheepdog.cluster.core.ids import NO_VERSION, ObjectId, Version, Vid, data_oid, oid_name
from sheepdog.cluster.host import replay
from sheepdog.cluster.host.copies import Copies
from sheepdog.cluster.host.disk import RealDisk, Space

SIZE = 64 * 4096
OIDS = [data_oid(Vid(1), index) for index in range(60)]


def v(counter: int) -> Version:
    return Version(1, 1, counter)


def paths(tmp_path: Path, *names: str) -> list[str]:
    return [str(tmp_path / name) for name in names]


def filled(tmp_path: Path, *names: str) -> StoreDriver:
    driver = StoreDriver(str(tmp_path / "meta"), disks=paths(tmp_path, *names))
    for number, oid in enumerate(OIDS):
        driver.create(oid, SIZE, 0, bytes([number]) * 4096, v(1))
    return driver


def files(path: Path) -> int:
    return sum(1 for entry in path.iterdir() if len(entry.name) == 16)


def test_objects_are_spread_and_found_again(tmp_path: Path) -> None:
    driver = filled(tmp_path, "d1", "d2", "d3")
    shares = [files(tmp_path / name) for name in ("d1", "d2", "d3")]
    assert sum(shares) == len(OIDS)
    assert min(shares) >= 8
    assert files(tmp_path / "meta" / "obj") == 0
    assert [path for path, _, _ in driver.store.disks.listed()] == paths(tmp_path, "d1", "d2", "d3")
    driver.close()
    # Another order, and one more: everything stays where it is and is found.
    driver = StoreDriver(str(tmp_path / "meta"), disks=paths(tmp_path, "d4", "d3", "d2", "d1"))
    for number, oid in enumerate(OIDS):
        assert driver.read(oid, 0, 4096) == bytes([number]) * 4096
    driver.crash()


def test_unplug_and_plug(tmp_path: Path) -> None:
    driver = filled(tmp_path, "d1", "d2")
    lost = driver.store.disks.unplug(str(tmp_path / "d1"))
    kept = files(tmp_path / "d1")
    assert len(lost) == kept > 5
    for oid in OIDS:
        assert driver.store.version(oid) == (NO_VERSION if oid in lost else v(1))
    with pytest.raises(DiskError):
        driver.read(lost[0], 0, 4096)
    for oid in lost:  # as recovery does
        driver.store.restore_begin(oid, SIZE)
        driver.restore_write(oid, 0, b"r" * 4096)
        driver.restore_finish(oid, v(2))
        assert driver.read(oid, 0, 4096) == b"r" * 4096
    assert files(tmp_path / "d1") == kept
    assert files(tmp_path / "d2") == len(OIDS)
    with pytest.raises(UsageError, match="not in service"):
        driver.store.disks.unplug(str(tmp_path / "d1"))
    with pytest.raises(UsageError, match="already"):
        driver.store.disks.plug(str(tmp_path / "d2"))
    driver.store.disks.plug(str(tmp_path / "d1"))
    assert files(tmp_path / "d1") == 0
    more = [data_oid(Vid(2), index) for index in range(40)]
    for oid in more:
        driver.create(oid, SIZE, 0, b"m", v(1))
    assert 5 < files(tmp_path / "d1") < 35
    driver.close()
    driver = StoreDriver(str(tmp_path / "meta"), disks=paths(tmp_path, "d1", "d2"))
    assert {oid: version for oid, version in driver.store.inventory() if version != v(1)} == dict.fromkeys(lost, v(2))
    assert not driver.failed
    assert driver.store.disks.unplug(str(tmp_path / "d1"))
    assert not driver.failed
    driver.store.disks.unplug(str(tmp_path / "d2"))
    assert driver.failed == ["the last disk was unplugged"]
    driver.crash()


def test_a_new_file_that_has_a_large_write_counts_before_an_old_one(tmp_path: Path) -> None:
    """Both are found at the next start; the large write is in the new one alone."""
    driver = filled(tmp_path, "d1", "d2")
    mine = next(oid for oid in OIDS if driver.store.copies.by_oid[oid].home.path == str(tmp_path / "d1"))
    driver.store.disks.unplug(str(tmp_path / "d1"))
    driver.create(mine, SIZE, 0, b"n" * 4096, v(2), durable=True)
    driver.write(mine, 4096, b"l" * (SIZE - 4096), v(3), durable=True)
    driver.crash()
    driver = StoreDriver(str(tmp_path / "meta"), disks=paths(tmp_path, "d1", "d2"))
    assert driver.store.version(mine) == v(3)
    assert driver.read(mine, 0, SIZE) == b"n" * 4096 + b"l" * (SIZE - 4096)
    driver.close()


def test_a_disk_may_go_before_a_new_file_is_made(tmp_path: Path) -> None:
    driver = filled(tmp_path, "d1", "d2")
    new = [data_oid(Vid(2), index) for index in range(20)]
    answers: list[StoreError | None] = []
    for oid in new:
        driver.store.create(oid, SIZE, 0, b"n" * 4096, v(1), True, answers.append)
    lost = driver.store.disks.unplug(str(tmp_path / "d1"))
    gone = [oid for oid in new if oid in lost]
    assert gone
    while len(answers) < len(new):
        driver.step()
    driver.settle()
    assert not any(answers)  # those of the disk that went are restored from other nodes
    for oid in new:
        assert driver.store.version(oid) == (NO_VERSION if oid in gone else v(1))
        if oid in gone:
            with pytest.raises(DiskError):
                driver.read(oid, 0, 4096)
        else:
            assert driver.read(oid, 0, 4096) == b"n" * 4096
    driver.close()


def test_a_directory_that_has_vanished_is_no_riddle(tmp_path: Path) -> None:
    """Until somebody looks: what asks for its space gets an answer, what needs it takes it out of service."""
    driver = StoreDriver(str(tmp_path), disks=[str(tmp_path / name) for name in ("d1", "d2")])
    oids = [data_oid(Vid(1), index) for index in range(20)]
    for oid in oids:
        driver.create(oid, 1 << 20, 0, b"a" * 4096, Version(1, 1, 1 << 16))
    first = driver.store.copies.homes[0]
    mine = next(oid for oid in oids if driver.store.copies.by_oid[oid].home is first)
    shutil.rmtree(first.path)
    assert driver.store.disks.listed()[0] == (first.path, first.used, 0)
    driver.write(mine, 1 << 19, b"b" * 4096, Version(1, 1, 2 << 16))
    new = (data_oid(Vid(2), index) for index in range(20))
    while not first.failed:  # a creation in the journal is answered, and lost with its disk
        oid = next(new)
        driver.create(oid, 1 << 20, 0, b"c", Version(1, 1, 1 << 16))
    with pytest.raises(DiskError):
        driver.read(oid, 0, 1)
    driver.create(next(new), 1 << 20, 0, b"c", Version(1, 1, 1 << 16))
    driver.crash()


def test_a_foreign_disk_is_refused_and_left_alone(tmp_path: Path) -> None:
    filled(tmp_path, "d1").close()
    before = sorted(entry.name for entry in (tmp_path / "d1").iterdir())
    with pytest.raises(UsageError, match="belongs to the store of another node"):
        StoreDriver(str(tmp_path / "other"), disks=paths(tmp_path, "d1"), seed=1)
    driver = StoreDriver(str(tmp_path / "third"), disks=paths(tmp_path, "d9"), seed=2)
    with pytest.raises(UsageError, match="belongs to the store of another node"):
        driver.store.disks.plug(str(tmp_path / "d1"))
    assert sorted(entry.name for entry in (tmp_path / "d1").iterdir()) == before
    driver.crash()


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    from xxhash import xxh3_64_intdigest

    filled(tmp_path, "d1").close()
    for name in ("meta/superblock", "d1/.disk"):
        path = tmp_path / name
        data = path.read_bytes()
        newer = data[:8] + (2).to_bytes(4, "little") + data[12:-8]
        path.write_bytes(newer + xxh3_64_intdigest(newer).to_bytes(8, "little"))
        with pytest.raises(UsageError, match="format 2, this version reads 1"):
            StoreDriver(str(tmp_path / "meta"), disks=paths(tmp_path, "d1"))
        path.write_bytes(data)


def test_what_ends_after_the_disk_is_out_is_answered(tmp_path: Path) -> None:
    """A large durable write whose sync ends only then has failed; so has a removal, of which the journal knows."""
    driver = filled(tmp_path, "d1", "d2")
    lost = driver.store.disks.unplug(str(tmp_path / "d1"))
    copy = driver.store.copies.by_oid[lost[0]]
    answers: list[object] = []
    driver.store._pipeline.note_done(copy, 0, answers.append)
    assert isinstance(answers.pop(), DiskError)
    driver.store._pipeline.note_done(copy, 0)
    with pytest.raises(DiskError):
        driver.remove(lost[1])
    assert driver.store.version(lost[1]) is None
    assert not driver.failed
    driver.close()
    driver = StoreDriver(str(tmp_path / "meta"), disks=paths(tmp_path, "d2"))
    assert lost[1] not in dict(driver.store.inventory())
    driver.crash()


@pytest.mark.parametrize("unplugged", [False, True])
def test_what_a_missing_disk_held_is_not_made_up_from_the_journal(tmp_path: Path, unplugged: bool) -> None:
    """Where the journal has all bytes of an object it comes back; where it has only their hashes, without a version."""
    driver = StoreDriver(str(tmp_path / "meta"), disks=paths(tmp_path, "d1", "d2"))
    large, small = OIDS[::2], OIDS[1::2]
    for oid in large:
        driver.create(oid, SIZE, 0, b"l" * SIZE, v(1))
    for oid in small:
        driver.create(oid, SIZE, 0, b"s" * 4096, v(1))
    driver.flush()
    gone = {entry.name for entry in (tmp_path / "d1").iterdir()}
    if unplugged:
        driver.store.disks.on_lost = lambda oids, told: told()
        driver.store.disks.unplug(str(tmp_path / "d1"))
    driver.crash()
    shutil.rmtree(tmp_path / "d1")
    driver = StoreDriver(str(tmp_path / "meta"), disks=paths(tmp_path, "d2"))
    lost = [oid for oid in large if oid_name(oid) in gone]
    assert 5 < len(lost) < len(large)
    assert [driver.store.version(oid) for oid in lost] == [NO_VERSION] * len(lost)
    for oid in large:
        if oid not in lost:
            assert driver.read(oid, 0, SIZE) == b"l" * SIZE
    for oid in small:
        assert driver.read(oid, 0, 4096) == b"s" * 4096
    driver.crash()


class Cut(Exception):
    """The process ends here."""


class Starts:
    """Starts with the named disks; `forgets` of each says whether META/settled was made to prove nothing."""

    def __init__(self, tmp_path: Path) -> None:
        self._path = tmp_path
        self._cut = False
        self._forgot = False

    def __call__(self, *names: str) -> tuple[StoreDriver, bool]:
        self._forgot = False
        driver = StoreDriver(str(self._path / "meta"), disks=paths(self._path, *names), forget_proven=self._forget)
        return driver, self._forgot

    def forgets(self, *names: str) -> bool:
        driver, forgot = self(*names)
        driver.crash()
        return forgot

    def cut_off(self, *names: str) -> None:
        """One that ends before META/settled is written."""
        self._cut = True
        with pytest.raises(Cut):
            self(*names)
        self._cut = False

    def _forget(self) -> None:
        self._forgot = True
        if self._cut:
            raise Cut


@pytest.mark.parametrize("left", [("d3", "d4"), ("d1", "d2", "d3", "d4")])
def test_a_restart_before_the_state_says_that_a_disk_went(tmp_path: Path, left: tuple[str, ...]) -> None:
    """What was on it counts as proven in META/settled: the next start that comes so far makes it prove nothing."""
    pending: list[Callable[[], None]] = []

    def unplug(driver: StoreDriver, *names: str) -> None:
        driver.store.disks.on_lost = lambda oids, told: pending.append(told)
        for path in paths(tmp_path, *names):
            driver.store.disks.unplug(path)

    driver = filled(tmp_path, "d1", "d2", "d3", "d4")
    unplug(driver, "d1", "d2")
    pending[1]()
    driver.crash()
    start = Starts(tmp_path)
    start.cut_off(*left)
    assert start.forgets(*left)
    assert not start.forgets(*left)
    driver, _ = start(*left)
    unplug(driver, "d3")
    pending[2]()
    driver.crash()
    assert not start.forgets(*left), "the state says it"


def test_a_start_without_a_disk_is_cut_off(tmp_path: Path) -> None:
    filled(tmp_path, "d1", "d2").crash()
    shutil.rmtree(tmp_path / "d1")
    start = Starts(tmp_path)
    start.cut_off("d2")
    assert start.forgets("d2")
    assert not start.forgets("d2")


def test_a_disk_that_fails_at_the_start_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path, "d1", "d2").crash()
    real = replay.replay

    def failing(copies: Copies, *rest: Any, **options: Any) -> object:
        copies.fail(copies.homes[0], OSError(errno.EIO, "broken"))
        return real(copies, *rest, **options)

    monkeypatch.setattr(replay, "replay", failing)
    assert Starts(tmp_path).forgets("d1", "d2")


class NotSyncing(FailingDisk):
    """Syncs nothing below one directory."""

    broken = ""

    def error_of(self, path: str) -> int:
        return errno.EIO if self.broken and path.startswith(self.broken) else 0


def test_what_went_with_a_disk_is_told_once_and_ends_no_later_flush_of_everything(tmp_path: Path) -> None:
    """What a node answers for all its copies does not wait until lost ones are made anew, which may be never."""
    disk, told = NotSyncing(), set[ObjectId]()
    driver = StoreDriver(str(tmp_path / "meta"), disks=paths(tmp_path, "d1", "d2"), disk=disk)
    for oid in OIDS:
        driver.create(oid, SIZE, 0, b"a" * SIZE, v(1))  # not in the journal: a flush syncs the files
    driver.store.disks.on_lost = lambda oids, done: told.update(oids)
    disk.broken = str(tmp_path / "d1")
    for _ in range(2):
        with contextlib.suppress(StoreError):
            driver.flush()
    lost = [oid for oid in OIDS if driver.store.version(oid) == NO_VERSION]
    assert 0 < len(lost) < len(OIDS)
    assert told == set(lost)
    driver.flush()
    driver.crash()


class BrokenDisk(RealDisk):
    """Nothing can be opened below one directory; directories have the sizes that they are given."""

    def __init__(self, broken: str = "", sizes: dict[str, int] | None = None) -> None:
        self._broken = broken
        self._sizes = sizes or {}

    def open(self, path: str, flags: int) -> int:
        if self._broken and path.startswith(self._broken):
            raise OSError(errno.EIO, "broken")
        return super().open(path, flags)

    def space(self, path: str) -> Space:
        return Space(self._sizes.get(path, 1 << 40), 1 << 39)


def test_a_node_starts_without_a_disk_that_cannot_be_read(tmp_path: Path) -> None:
    """One of several; what was on it is restored, and is not trusted when the disk can be read again."""
    driver = filled(tmp_path, "d1", "d2")
    on_first = [oid for oid in OIDS if driver.store.copies.by_oid[oid].home.path == str(tmp_path / "d1")]
    driver.close()
    meta, places, forgot = str(tmp_path / "meta"), paths(tmp_path, "d1", "d2"), [0]

    def forget() -> None:
        forgot[0] += 1

    driver = StoreDriver(meta, disk=BrokenDisk(places[0]), disks=places, forget_proven=forget)
    assert driver.failed == [f"{places[0]}: broken"]
    assert forgot == [1], "what was on it is not taken for deleted"
    assert [path for path, _, _ in driver.store.disks.listed()] == places[1:]
    assert dict(driver.store.inventory()) == {oid: v(1) for oid in OIDS if oid not in on_first}
    driver.create(on_first[0], SIZE, 0, b"new", v(2))
    driver.close()
    driver = StoreDriver(meta, disks=places)
    assert driver.store.version(on_first[0]) == v(2)
    assert {driver.store.version(oid) for oid in on_first[1:]} == {NO_VERSION}
    driver.close()
    with pytest.raises(UsageError, match="no disk of this node can be used"):
        StoreDriver(meta, disk=BrokenDisk(places[0]), disks=places[:1])


def test_larger_disks_get_more_and_keep_their_weight(tmp_path: Path) -> None:
    places = paths(tmp_path, "d1", "d2")
    disk = BrokenDisk(sizes={places[0]: 1 << 40, places[1]: 3 << 40})
    driver = StoreDriver(str(tmp_path / "meta"), disk=disk, disks=places)
    for oid in OIDS:
        driver.create(oid, SIZE, 0, b"x", v(1))
    share = files(tmp_path / "d2")
    assert 35 < share < 55  # of 60
    driver.close()
    disk = BrokenDisk(sizes={places[0]: 1 << 40, places[1]: 1 << 40})
    driver = StoreDriver(str(tmp_path / "meta"), disk=disk, disks=places)
    homes = {oid: driver.store.copies.home_for(oid) for oid in OIDS}
    assert all(driver.store.copies.by_oid[oid].home is home for oid, home in homes.items())
    driver.crash()

"""Configuration, epoch log and lock of a metadata directory."""

from __future__ import annotations

import errno
import os
import struct
from functools import partial
from pathlib import Path

import pytest
from tests.support.stores import Driver

from sheepdog.cluster.core.errors import DiskError, StoreError, UsageError
from sheepdog.cluster.core.ids import Epoch, EpochRecord, Member, NodeId
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.ports import Buffer, Proven
from sheepdog.cluster.host.directory import write_file
from sheepdog.cluster.host.disk import RealDisk
from sheepdog.cluster.host.node_state import DirectoryLock, NodeStateFiles
from sheepdog.cluster.host.reserve import RESERVE_BYTES
from sheepdog.cluster.host.workers import ThreadWorkers


class StateDriver(Driver):
    def __init__(self, path: Path, disk: RealDisk | None = None) -> None:
        super().__init__()
        self.logged: list[str] = []
        self.state = NodeStateFiles(
            str(path), disk or RealDisk(), ThreadWorkers(self.call_soon), lambda level, text: self.logged.append(text)
        )
        self.state.open()


def record(number: int) -> EpochRecord:
    members = tuple(
        Member(NodeId(bytes(12) + bytes([127, 0, 0, i]), 7000 + i), i, 128, i << 30, 5) for i in range(1, number)
    )
    return EpochRecord(Epoch(number), 1_700_000_000 + number, members)


def test_state_survives_a_restart(tmp_path: Path) -> None:
    driver = StateDriver(tmp_path)
    assert driver.state.load_config() is None
    assert driver.state.load_epochs() == []
    assert driver.state.load_proven() == Proven()
    errors: list[StoreError | None] = []
    driver.state.save_config(b"one", errors.append)
    driver.state.save_config(b"\0two\xff", errors.append)
    for number in (1, 2, 10):
        driver.state.append_epoch(record(number), errors.append)
    driver.state.save_proven(Proven(2, 1, 5, 1), errors.append)
    while len(errors) < 6:
        driver.step()
    assert errors == [None] * 6
    assert sorted(path.name for path in (tmp_path / "epoch").iterdir()) == ["00000001", "00000002", "00000010"]
    again = StateDriver(tmp_path)
    assert again.state.load_config() == b"\0two\xff"
    assert again.state.load_epochs() == [record(1), record(2), record(10)]
    assert again.state.load_proven() == (2, 1, 5, 1)
    assert again.wait(lambda done: again.state.drop_epochs(2, done)) is None
    assert again.state.load_epochs() == [record(1), record(2)]
    assert again.wait(again.state.clear_epochs) is None
    assert again.state.load_epochs() == []


class SmallDisk(RealDisk):
    """A disk of so many blocks, for the files in one directory and for those of others."""

    def __init__(self, path: Path, blocks: int) -> None:
        self._path = path
        self._blocks = blocks
        self.others = 0  # blocks that somebody else has
        self.snatches = 0  # so often others take at once what has been given up

    def left(self) -> int:
        files = (path.stat().st_size for path in self._path.rglob("*") if path.is_file())
        return self._blocks - self.others - sum(-(-size // BLOCK_SIZE) for size in files)

    def fill(self) -> None:
        """Others take what is left."""
        self.others += self.left()

    def _need(self, fd: int, end: int) -> None:
        if -(-end // BLOCK_SIZE) - -(-os.fstat(fd).st_size // BLOCK_SIZE) > self.left():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def pwrite(self, fd: int, data: Buffer, offset: int, /) -> int:  # type: ignore[override]
        self._need(fd, offset + len(data))
        return os.pwrite(fd, data, offset)

    def allocate(self, fd: int, length: int) -> None:
        self._need(fd, length)
        super().allocate(fd, length)

    def truncate(self, fd: int, length: int, /) -> None:
        os.ftruncate(fd, length)
        if self.snatches:
            self.snatches -= 1
            self.fill()


def test_a_full_disk_has_room_for_the_state(tmp_path: Path) -> None:
    disk = SmallDisk(tmp_path, 100)
    driver = StateDriver(tmp_path, disk)
    saved = 0
    while (error := driver.wait(partial(driver.state.append_epoch, record(saved + 1)))) is None:
        saved += 1
        disk.fill()
    assert isinstance(error, DiskError)
    assert saved > RESERVE_BYTES // BLOCK_SIZE
    assert driver.state.load_epochs() == [record(number) for number in range(1, saved + 1)]
    disk.others = 0
    assert driver.wait(partial(driver.state.append_epoch, record(saved + 1))) is None
    assert (tmp_path / "reserve").stat().st_size == RESERVE_BYTES


def test_what_is_replaced_on_a_full_disk_costs_no_room(tmp_path: Path) -> None:
    """Whoever wants room, restores for one, has got all that there is each time."""
    disk = SmallDisk(tmp_path, 100)
    driver = StateDriver(tmp_path, disk)
    for epoch in range(1, 100):
        assert driver.wait(partial(driver.state.save_proven, Proven(epoch))) is None
        disk.fill()
    assert driver.state.load_proven() == Proven(99)
    assert (tmp_path / "reserve").stat().st_size == RESERVE_BYTES


def test_what_others_snatch_is_given_up_once_more(tmp_path: Path) -> None:
    disk = SmallDisk(tmp_path, 100)
    driver = StateDriver(tmp_path, disk)
    assert driver.wait(lambda done: driver.state.save_proven(Proven(1), done)) is None
    disk.fill()
    disk.snatches = 5
    assert driver.wait(lambda done: driver.state.save_proven(Proven(2), done)) is None
    assert not disk.snatches
    assert driver.state.load_proven() == Proven(2)


@pytest.mark.parametrize("name", ["config", "epoch/00000001"])
def test_damage_is_refused_by_name(tmp_path: Path, name: str) -> None:
    driver = StateDriver(tmp_path)
    driver.wait(lambda done: driver.state.save_config(b"one", done))
    driver.wait(lambda done: driver.state.append_epoch(record(1), done))
    path = tmp_path / name
    data = bytearray(path.read_bytes())
    data[14] ^= 1
    path.write_bytes(data)
    with pytest.raises(UsageError, match=name):
        (driver.state.load_config if name == "config" else driver.state.load_epochs)()


def test_a_damaged_settled_epoch_is_forgotten(tmp_path: Path) -> None:
    driver = StateDriver(tmp_path)
    driver.wait(lambda done: driver.state.save_proven(Proven(7, 0), done))
    (tmp_path / "settled").write_bytes(b"rubbish")
    assert driver.state.load_proven() == (0, 0, 0, 0)
    assert driver.logged


def test_what_was_proven_before_disks_could_be_forgotten_is_read(tmp_path: Path) -> None:
    """A node of a former version had all its disks, as far as is known; one that lost them all knows nothing."""
    driver = StateDriver(tmp_path)
    write_file(RealDisk(), str(tmp_path), "settled", struct.pack("<8sIQQ", b"SHEEPSET", 2, 9, 4))
    assert driver.state.load_proven() == (9, 4, 0, 0)
    driver.state.forget_settled()
    assert driver.state.load_proven() == (0, 0, -1, 0)


def test_one_daemon_a_directory(tmp_path: Path) -> None:
    path = str(tmp_path / "store")
    lock = DirectoryLock(path)
    assert (tmp_path / "store").stat().st_mode & 0o777 == 0o750
    with pytest.raises(UsageError) as caught:
        DirectoryLock(path)
    assert str(caught.value) == f"another sheep daemon is using {path}\nlocking directory: {path} failed"
    lock.release()
    DirectoryLock(path).release()
    with pytest.raises(UsageError) as caught:
        DirectoryLock(str(tmp_path / "a" / "b"))
    assert str(caught.value) == f"cannot create the directory {tmp_path}/a/b (No such file or directory)"


def test_the_marks_of_stale_strips_have_a_format(tmp_path: Path) -> None:
    entries = bytes(range(72))
    driver = StateDriver(tmp_path)
    assert driver.wait(lambda done: driver.state.save_stale(entries, done)) is None
    assert (tmp_path / "stale").read_bytes()[:12] == b"SHEEPSTL\2\0\0\0"
    assert StateDriver(tmp_path).state.load_stale() == entries
    write_file(RealDisk(), str(tmp_path), "stale", entries)  # as before there was one
    assert driver.state.load_stale() == entries
    write_file(RealDisk(), str(tmp_path), "stale", b"SHEEPSTL\3\0\0\0" + entries)
    with pytest.raises(UsageError, match="stale: format 3, this version reads 2"):
        driver.state.load_stale()


def test_undo_has_a_format(tmp_path: Path) -> None:
    path = tmp_path / "undo"
    undo = StateDriver(tmp_path).state.undo
    undo.append(b"one")
    undo.write_out()
    undo.append(b"two")
    assert undo.load() == [b"", b"onetwo"]
    undo.replace(b"three")
    undo.append(b"four")
    assert undo.load() == [b"onetwo", b"threefour"]
    assert path.read_bytes() == b"SHEEPUND\3\0\0\0threefour"
    path.write_bytes(b"five")  # as before there was one
    again = StateDriver(tmp_path).state.undo
    assert again.load() == [b"onetwo", b"five"]
    path.write_bytes(b"SHEEPUND\2\0\0\0five")  # only its records are sealed otherwise
    assert again.load() == [b"onetwo", b"five"]
    path.write_bytes(b"SHEEPUND\4\0\0\0five")
    with pytest.raises(UsageError, match="undo: format 4, this version reads 3"):
        again.load()


def test_undo_on_a_full_disk_stays_as_it_was(tmp_path: Path) -> None:
    disk = SmallDisk(tmp_path, 100)
    driver = StateDriver(tmp_path, disk)
    undo = driver.state.undo
    undo.append(b"one")
    undo.write_out()
    disk.fill()
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        undo.replace(b"two")
    assert len(os.listdir("/proc/self/fd")) == files
    assert len(driver.logged) == 5
    disk.others = 0
    undo.append(b"four")
    assert undo.load() == [b"", b"onefour"]

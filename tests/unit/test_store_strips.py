"""Strips in the store: copies of their own beside each other, named `_INDEX`; versions without bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from tests.support.stores import Driver, StoreDriver

from sheepdog.cluster.core.errors import NoObject
from sheepdog.cluster.core.ids import NO_VERSION, Version, Vid, data_oid, oid_name, plain_oid, strip_index, strip_of
from sheepdog.cluster.core.ports import Buffer
from sheepdog.cluster.host.disk import RealDisk
from sheepdog.cluster.host.node_state import NodeStateFiles
from sheepdog.cluster.host.workers import ThreadWorkers

OID = data_oid(Vid(0x123456), 7)
SIZE = 256 * 1024
V1, V2 = Version(1, 1, 1 << 16), Version(1, 1, 2 << 16)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StoreDriver]:
    driver = StoreDriver(str(tmp_path))
    yield driver
    driver.close()


def test_ids() -> None:
    strip = strip_of(OID, 5)
    assert (plain_oid(strip), strip_index(strip), strip_index(OID)) == (OID, 5, -1)
    assert oid_name(strip) == f"{OID:016x}_5"
    assert oid_name(OID) == f"{OID:016x}"


def test_strips_are_copies_of_their_own(store: StoreDriver, tmp_path: Path) -> None:
    for index in (0, 3, 15, 30):
        store.create(strip_of(OID, index), SIZE, 0, bytes([index + 1]) * 4096, V1)
    store.create(OID, SIZE, 0, b"whole" * 100, V1)
    store.flush()
    for index in (0, 3, 15, 30):
        assert store.read(strip_of(OID, index), 0, 4096) == bytes([index + 1]) * 4096
        assert (tmp_path / "obj" / f"{OID:016x}_{index}").exists()
    store.remove(strip_of(OID, 3))
    assert [oid_name(oid) for oid, _ in store.store.inventory()] == [
        f"{OID:016x}", f"{OID:016x}_0", f"{OID:016x}_15", f"{OID:016x}_30",
    ]  # fmt: skip


@pytest.mark.parametrize("crash", [True, False])
def test_a_restart_finds_strips_and_stamps(tmp_path: Path, crash: bool) -> None:
    store = StoreDriver(str(tmp_path))
    for index in (0, 5):
        store.create(strip_of(OID, index), SIZE, 4096, bytes([index + 1]) * 4096, V1)
    store.done(lambda done: store.store.stamp(strip_of(OID, 5), V2, True, done))
    if crash:
        store.crash()
    else:
        store.close()
    store = StoreDriver(str(tmp_path))
    assert list(store.store.inventory()) == [(strip_of(OID, 0), V1), (strip_of(OID, 5), V2)]
    assert store.read(strip_of(OID, 5), 0, 8192) == bytes(4096) + b"\x06" * 4096
    store.close()


def test_stamp_of_nothing_and_of_a_restore(store: StoreDriver) -> None:
    with pytest.raises(NoObject):
        store.done(lambda done: store.store.stamp(strip_of(OID, 1), V1, False, done))
    store.store.restore_begin(strip_of(OID, 1), SIZE)
    with pytest.raises(NoObject):
        store.done(lambda done: store.store.stamp(strip_of(OID, 1), V1, False, done))
    assert store.store.version(strip_of(OID, 1)) == NO_VERSION


def test_stamps_keep_their_place_among_writes(store: StoreDriver) -> None:
    strip = strip_of(OID, 2)
    store.create(strip, SIZE, 0, b"", V1)
    store.write(strip, 0, b"a" * 4096, V2)
    later = Version(1, 1, 3 << 16)
    store.done(lambda done: store.store.stamp(strip, later, False, done))
    assert store.store.version(strip) == later
    assert store.read(strip, 0, 4096) == b"a" * 4096


class _Recording(RealDisk):
    """Knows the order of syncs and writes."""

    def __init__(self) -> None:
        self.synced: list[str] = []
        self.written: list[str] = []

    def fdatasync(self, fd: int, /) -> None:  # type: ignore[override]
        self.synced.append(name_of(fd))
        super().fdatasync(fd)

    def pwrite(self, fd: int, data: Buffer, offset: int, /) -> int:  # type: ignore[override]
        self.written.append(name_of(fd))
        return super().pwrite(fd, data, offset)

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int, /) -> int:  # type: ignore[override]
        self.written.append(name_of(fd))
        return super().pwritev(fd, buffers, offset)


def name_of(fd: int) -> str:
    return os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))


def test_what_leads_back_is_durable_before_the_write_is(tmp_path: Path) -> None:
    disk = _Recording()
    state = NodeStateFiles(str(tmp_path), disk, ThreadWorkers(Driver().call_soon), lambda level, text: None)
    state.open()
    store = StoreDriver(str(tmp_path), disk=disk, before=state.undo)
    strip = strip_of(OID, 2)
    store.create(strip, SIZE, 0, b"", V1)
    disk.synced.clear()
    state.append_undo(b"the way back")
    store.done(lambda done: store.store.write(strip, 0, b"a" * 4096, V2, True, done))
    assert disk.synced[0] == "undo"
    assert disk.synced[1].startswith("journal")
    disk.synced.clear()
    store.done(lambda done: store.store.write(strip, 0, b"b" * 4096, V2, True, done))
    assert "undo" not in disk.synced
    state.replace_undo(b"less")
    state.append_undo(b" and more")
    assert state.load_undo() == [b"the way back", b"less and more"]
    state.replace_undo(b"")
    assert state.load_undo() == [b"less and more", b""]
    store.close()


def test_with_nosync_nobody_waits_for_the_way_back(tmp_path: Path) -> None:
    disk = _Recording()
    workers = ThreadWorkers(Driver().call_soon)
    state = NodeStateFiles(str(tmp_path), disk, workers, lambda level, text: None, nosync=True)
    state.open()
    disk.synced.clear()
    state.append_undo(b"one")
    state.replace_undo(b"two")
    assert disk.synced == []
    assert state.load_undo() == [b"one", b"two"]


def test_what_leads_back_is_written_at_once_and_before_the_journal(tmp_path: Path) -> None:
    """One write for all strips of a turn; a kill -9 between the two leaves no strip that cannot go back."""
    disk = _Recording()
    state = NodeStateFiles(str(tmp_path), disk, ThreadWorkers(Driver().call_soon), lambda level, text: None)
    state.open()
    store = StoreDriver(str(tmp_path), disk=disk, before=state.undo)
    store.create(strip_of(OID, 2), SIZE, 0, b"", V1)
    disk.written.clear()
    state.append_undo(b"one")
    state.append_undo(b"two")
    assert disk.written == []
    store.done(lambda done: store.store.write(strip_of(OID, 2), 0, b"a" * 4096, V2, False, done))
    assert disk.written[0] == "undo"
    assert disk.written[1].startswith("journal")
    assert disk.written.count("undo") == 1
    store.close()

"""The object cache's directory: when its contents may be trusted, and when they count as lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.stores import Driver, StoppedClock

from sheepdog.cluster.core.cache_space import CACHED
from sheepdog.cluster.core.errors import StoreError, UsageError
from sheepdog.cluster.core.extents import MARKS_BYTES
from sheepdog.cluster.core.ids import Vid, data_oid
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.ports import Buffer
from sheepdog.cluster.host import cache_files
from sheepdog.cluster.host.cache_files import CacheFiles
from sheepdog.cluster.host.disk import RealDisk
from sheepdog.cluster.host.workers import ThreadWorkers

OID = data_oid(Vid(0x123456), 5)
OBJECT, SIZE = 4 << 20, 64 << 20
DATA = b"dirty and here only " * 200


class Opened(Driver):
    """A sheep's cache, from its start to its end."""

    def __init__(self, directory: Path, size: int = SIZE) -> None:
        super().__init__()
        self.logged: list[str] = []
        self.workers = ThreadWorkers(self.call_soon)
        try:
            self.files = CacheFiles(
                str(directory),
                size,
                RealDisk(),
                self.workers,
                StoppedClock(),
                self.call_soon,
                lambda level, text: self.logged.append(text),
            )
        except UsageError:
            self.workers.stop()
            raise
        self.store = self.files.disk.store

    def fill(self) -> None:
        self.wait(lambda done: self.store.create(OID, OBJECT + MARKS_BYTES, 0, b"", CACHED, False, done))
        assert self.wait(lambda done: self.store.write(OID, 8192, DATA, CACHED, False, done)) is None

    def content(self) -> bytes | None:
        return None if self.store.version(OID) is None else self.read(8192, len(DATA))

    def read(self, offset: int, length: int = BLOCK_SIZE) -> bytes:
        found: list[Buffer | StoreError] = []
        self.store.read(OID, offset, length, found.append)
        while not found:
            self.step()
        assert not isinstance(found[0], StoreError)
        return bytes(found[0])

    def end(self) -> None:
        self.wait(lambda done: self.files.close(lambda: done(None)))
        self.files.closed()
        self.die()

    def die(self) -> None:
        """As by kill -9."""
        self.workers.stop()
        self.files.release()


@pytest.fixture
def boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the kernel says to tell one boot from the next."""
    file = tmp_path / "boot_id"
    file.write_text("first\n")
    monkeypatch.setattr(cache_files, "_BOOT_ID", file)
    monkeypatch.setattr("os.sync", lambda: None)  # of the whole machine: slow while it is busy
    return file


def test_contents_survive_the_death_of_the_process(tmp_path: Path, boot: Path) -> None:
    first = Opened(tmp_path / "cache")
    first.fill()
    first.die()
    again = Opened(tmp_path / "cache")
    assert (again.content(), again.files.disk.identity) == (DATA, first.files.disk.identity)
    again.end()


def test_contents_survive_an_orderly_end_and_a_reboot(tmp_path: Path, boot: Path) -> None:
    first = Opened(tmp_path / "cache")
    first.fill()
    first.end()
    boot.write_text("second\n")
    again = Opened(tmp_path / "cache")
    assert (again.content(), again.files.disk.identity) == (DATA, first.files.disk.identity)
    again.die()
    boot.write_text("third\n")
    third = Opened(tmp_path / "cache")
    assert third.content() is None, "closed in the first boot, but used again in the second"
    third.end()


def test_two_sheep_never_share_a_cache(tmp_path: Path, boot: Path) -> None:
    first = Opened(tmp_path / "cache")
    with pytest.raises(UsageError, match="another sheep daemon is using"):
        Opened(tmp_path / "cache")
    first.end()
    Opened(tmp_path / "cache").end()


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path, boot: Path) -> None:
    """`-w dir=` of the store's own directory: what is not the cache's is no rest of a cache."""
    for name in ("obj", "journal_file0", "epoch"):
        (tmp_path / "store" / name).mkdir(parents=True)
    with pytest.raises(UsageError, match="holds something else"):
        Opened(tmp_path / "store")
    assert sorted(entry.name for entry in (tmp_path / "store").iterdir()) == ["epoch", "journal_file0", "obj"]


BLOCK = b"kept".ljust(BLOCK_SIZE)


@pytest.mark.parametrize("killed", [True, False])
def test_what_was_kept_survives_an_orderly_end_alone(tmp_path: Path, boot: Path, killed: bool) -> None:
    """Without its hash it is nothing: what the table does not name is not here."""
    first = Opened(tmp_path / "cache")
    first.fill()
    first.settle()
    assert first.store.keep(OID, 64 * BLOCK_SIZE, BLOCK) and first.store.keep(OID, BLOCK_SIZE, BLOCK)
    assert first.read(64 * BLOCK_SIZE) == BLOCK
    if killed:
        first.die()
    else:
        first.end()
    again = Opened(tmp_path / "cache")
    hashes = memoryview(again.store.table(OID)).cast("Q")
    assert (bool(hashes[64]), again.read(64 * BLOCK_SIZE)) == ((False, bytes(BLOCK_SIZE)) if killed else (True, BLOCK))
    assert again.content() == DATA
    again.end()


def test_nothing_is_kept_where_a_write_is_on_its_way(tmp_path: Path, boot: Path) -> None:
    opened = Opened(tmp_path / "cache")
    opened.fill()
    opened.settle()
    newer = b"newer".ljust(BLOCK_SIZE)
    opened.store.write(OID, 64 * BLOCK_SIZE, newer, CACHED, False, lambda _: None)
    assert not opened.store.keep(OID, 64 * BLOCK_SIZE, BLOCK)
    assert opened.store.keep(OID, 65 * BLOCK_SIZE, BLOCK), "beside it there is nothing in the way"
    assert not opened.store.keep(data_oid(Vid(0x123456), 6), 0, BLOCK), "no such object"
    opened.settle()
    assert (opened.read(64 * BLOCK_SIZE), opened.read(65 * BLOCK_SIZE)) == (newer, BLOCK)
    opened.end()


def test_the_end_counts_as_orderly_only_once_all_is_on_the_disk(
    tmp_path: Path, boot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[str] = []
    opened = Opened(tmp_path / "cache")
    monkeypatch.setattr("os.sync", lambda: noted.append((tmp_path / "cache/identity").read_text()))
    opened.fill()
    opened.end()
    assert [json.loads(text)["boot"] for text in noted] == ["first"], "synced once, before the note"
    assert json.loads((tmp_path / "cache/identity").read_text())["boot"] == "closed"


def test_a_failure_of_the_host_voids_what_was_not_closed(tmp_path: Path, boot: Path) -> None:
    first = Opened(tmp_path / "cache")
    first.fill()
    first.die()
    boot.write_text("second\n")
    again = Opened(tmp_path / "cache")
    assert again.content() is None and not list(again.store.inventory())
    assert again.files.disk.identity != first.files.disk.identity, "so that nobody takes it for what it was"
    assert any("begins empty" in line for line in again.logged)
    again.end()


def test_without_a_name_of_the_boot_nothing_is_trusted_that_was_not_closed(tmp_path: Path, boot: Path) -> None:
    boot.unlink()
    first = Opened(tmp_path / "cache")
    first.fill()
    first.die()
    again = Opened(tmp_path / "cache")
    assert again.content() is None
    again.fill()
    again.end()
    third = Opened(tmp_path / "cache")
    assert third.content() == DATA
    third.end()


@pytest.mark.parametrize(
    "content", ["", "{", '{"id": "x"}', '{"boot": "first"}', "[]"], ids=["empty", "torn", "no boot", "no id", "a list"]
)
def test_an_identity_that_makes_no_sense_voids_the_contents(tmp_path: Path, boot: Path, content: str) -> None:
    first = Opened(tmp_path / "cache")
    first.fill()
    first.die()
    (tmp_path / "cache/identity").write_text(content)
    again = Opened(tmp_path / "cache")
    assert again.content() is None and again.files.disk.identity not in ("x", first.files.disk.identity)
    assert json.loads((tmp_path / "cache/identity").read_text()) == {"id": again.files.disk.identity, "boot": "first"}
    again.end()


def test_the_journal_comes_on_top_of_the_size(tmp_path: Path, boot: Path) -> None:
    """An eighth of the size, 8 to 128 MiB."""
    for name, size, journal in (("small", 10 << 20, 8 << 20), ("middle", 256 << 20, 32 << 20)):
        opened = Opened(tmp_path / name, size)
        sizes = [path.stat().st_size for path in (tmp_path / name).glob("journal_file*")]
        assert journal <= sum(sizes) < 1.1 * journal, sizes
        assert opened.files.disk.size_bytes == size
        opened.end()


def test_a_directory_that_is_a_file(tmp_path: Path, boot: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(UsageError, match=r"the object cache in .* cannot be used"):
        Opened(tmp_path / "cache")

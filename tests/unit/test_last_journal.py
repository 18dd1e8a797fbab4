"""The journal that counts is the last one, wherever it is: one that is missing, older, or back again is none of it."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.support.sim_disk import Crashes, SimDisk
from tests.support.stores import StoreDriver, flip

from sheepdog.cluster.core.errors import Corrupt, UsageError
from sheepdog.cluster.core.ids import Version, Vid, data_oid
from sheepdog.cluster.host.disk import Disk, RealDisk
from sheepdog.cluster.host.journal import SEGMENT_HEADER
from sheepdog.cluster.host.store_check import check
from sheepdog.cluster.host.store_options import StoreOptions
from sheepdog.cluster.host.trailer import block_hash

BLOCK = 4096
SIZE = 4 * BLOCK
OID = data_oid(Vid(1), 0)
OLD, NEW, NEWEST = b"o" * BLOCK, b"n" * BLOCK, b"N" * BLOCK


def v(counter: int) -> Version:
    return Version(1, 1, counter << 16)


@dataclass
class Node:
    """A store in `root`/meta whose journal lies where each start says."""

    root: str
    disk: Disk
    forgotten: list[None] = field(default_factory=list)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def start(self, journal: str | None, skip: bool = False) -> StoreDriver:
        options = StoreOptions(False, 1 << 20, journal and self.path(journal), skip)
        return StoreDriver(
            self.path("meta"),
            disk=self.disk,
            options=options,
            seed=len(self.forgotten),
            forget_proven=lambda: self.forgotten.append(None),
        )

    def refusal(self, journal: str | None) -> str:
        with pytest.raises(UsageError) as raised:
            self.start(journal)
        return str(raised.value)

    def read(self, journal: str | None, skip: bool = False) -> bytes | None:
        """What a start finds, ended as by kill -9; None: the bytes do not match their hash."""
        driver = self.start(journal, skip)
        try:
            return driver.read(OID, 0, BLOCK)
        except Corrupt:
            return None
        finally:
            driver.crash()

    def crash_with(self, journal: str | None, data: bytes, counter: int, durable: bool = True) -> None:
        """A run that ends with bytes that the journal has. Those before them were OLD, and that is in the file's table;
        also in the file itself, unless they were durable."""
        driver = self.start(journal)
        if driver.store.version(OID) is None:
            driver.create(OID, SIZE, 0, OLD, v(1), durable=True)
            driver.close()
            driver = self.start(journal)
        driver.write(OID, 0, data, v(counter), durable)
        driver.crash()

    def move(self, old: str, new: str) -> None:
        """A directory's files go elsewhere: its disk is not mounted any more, or is again."""
        self.disk.mkdir(self.path(new))
        for name in self.disk.listdir(self.path(old)):
            self.disk.rename(f"{self.path(old)}/{name}", f"{self.path(new)}/{name}")

    def copy(self, old: str, new: str) -> None:
        self.disk.mkdir(self.path(new))
        for name in self.disk.listdir(self.path(old)):
            source = self.disk.open(f"{self.path(old)}/{name}", os.O_RDONLY)
            target = self.disk.open(f"{self.path(new)}/{name}", os.O_RDWR | os.O_CREAT)
            data = bytearray(self.disk.info(source).length)
            self.disk.preadv(source, [data], 0)
            self.disk.pwrite(target, data, 0)
            self.disk.close(source)
            self.disk.close(target)


@pytest.fixture(params=[False, True], ids=["real", "simulated"])
def node(request: pytest.FixtureRequest, tmp_path: Path) -> Node:
    if not request.param:
        return Node(str(tmp_path), RealDisk())
    disk = SimDisk()
    disk.mkdir("/node")
    return Node("/node", disk)


def test_a_journal_that_is_missing_is_not_begun_anew(node: Node) -> None:
    node.crash_with("fast", NEW, 2)
    node.move("fast", "elsewhere")
    told = f"{node.path('fast')}: the last journal of this node is not there, and may hold what its disks do not"
    for journal in ("fast", None):
        assert node.refusal(journal) == f"{told}; bring it back (is it mounted?), or give it up with -j size=SIZE,skip"
    assert not node.forgotten
    node.move("elsewhere", "fast")
    assert node.read("fast") == NEW


def test_a_journal_that_was_given_up_does_not_come_back(node: Node) -> None:
    """Its records are older than what was written since."""
    node.crash_with("fast", NEW, 2, durable=False)
    node.move("fast", "elsewhere")
    assert node.read("fast", skip=True) == OLD
    assert node.forgotten, "what it created or removed is not known"
    node.move("fast", "under")
    node.move("elsewhere", "fast")
    assert "not there" in node.refusal("fast"), "that is another one"
    node.move("fast", "elsewhere")
    node.move("under", "fast")
    node.crash_with("fast", NEWEST, 3)
    node.move("fast", "under")
    node.move("elsewhere", "fast")
    assert "not there" in node.refusal("fast")


def test_a_journal_that_was_given_up_may_have_had_more_segments_than_the_next(node: Node) -> None:
    driver = node.start("fast")
    driver.create(OID, SIZE, 0, OLD, v(1), durable=True)
    begun = driver.store._journal.number
    counter = 1
    while driver.store._journal.number < begun + 4:
        counter += 1
        driver.write(OID, 0, NEW, v(counter), durable=True)
    driver.crash()
    node.move("fast", "elsewhere")
    node.start("fast", skip=True).crash()
    node.move("fast", "under")
    node.move("elsewhere", "fast")
    assert "not there" in node.refusal("fast")


def test_a_journal_is_found_where_it_was_and_where_it_is_named(node: Node) -> None:
    node.crash_with("fast", NEW, 2)
    assert node.read(None) == NEW, "in the old place"
    node.crash_with(None, NEWEST, 3)
    assert node.read("fast") == NEWEST, "what had been left here is older"
    node.crash_with("fast", NEW, 4)
    node.move("fast", "faster")
    assert node.read("faster") == NEW, "its disk is mounted elsewhere"


def test_an_older_state_of_the_journal_is_refused(node: Node) -> None:
    node.crash_with("fast", NEW, 2)
    node.copy("fast", "before")
    node.crash_with("fast", NEWEST, 3)
    node.move("before", "fast")
    assert "not there" in node.refusal("fast")


def test_nothing_is_missing_after_an_orderly_end(node: Node) -> None:
    node.crash_with("fast", NEW, 2)
    node.start("fast").close()
    node.move("fast", "elsewhere")
    node.crash_with("fast", NEWEST, 3)
    assert node.read("fast") == NEWEST
    assert not node.forgotten
    node.move("elsewhere", "fast")
    assert "not there" in node.refusal("fast")


def test_a_store_without_a_note_is_of_an_earlier_version(node: Node) -> None:
    """Format 1 of a segment has no id; its journal is where the start says."""
    node.crash_with("fast", NEW, 2)
    for name in node.disk.listdir(node.path("fast")):
        fd = node.disk.open(f"{node.path('fast')}/{name}", os.O_RDWR)
        head = bytearray(SEGMENT_HEADER)
        node.disk.preadv(fd, [head], 0)
        if any(head):
            head[8:12] = (1).to_bytes(4, "little")
            head[40:56] = bytes(16)
            head[-8:] = block_hash(head[:-8]).to_bytes(8, "little")
            node.disk.pwrite(fd, head, 0)
        node.disk.close(fd)
    node.disk.unlink(f"{node.path('meta')}/journal")
    assert node.read("fast") == NEW
    node.move("fast", "elsewhere")
    assert "not there" in node.refusal("fast"), "now it has one"


def test_a_damaged_note_is_not_guessed(tmp_path: Path) -> None:
    node = Node(str(tmp_path), RealDisk())
    node.crash_with("fast", NEW, 2)
    path = tmp_path / "meta" / "journal"
    flip(path, 30)
    assert [damage.path for damage in check(node.path("meta"), print, node.path("fast")).damaged] == [str(path)]
    said = f"{path}: file does not match its checksum; if the last journal is in {node.path('fast')}, remove this file"
    assert node.refusal("fast").startswith(said)
    path.unlink()
    assert node.read("fast") == NEW
    flip(path, 30)
    assert node.read(None, skip=True) == NEW, "the files have it since the last start"


def test_offline_tools_find_it_and_tell_when_it_is_missing(tmp_path: Path) -> None:
    node = Node(str(tmp_path), RealDisk())
    node.crash_with("fast", NEW, 2)
    assert check(node.path("meta"), print).clean
    node.move("fast", "elsewhere")
    damage, *_ = check(node.path("meta"), print).damaged
    assert damage.path == node.path("fast") and "not there" in damage.problem
    assert check(node.path("meta"), print, node.path("elsewhere")).clean


def _images(crashes: Crashes, rng: random.Random) -> list[SimDisk]:
    return [crashes.killed(), crashes.powerless(rng), crashes.powerless(rng)]


@pytest.mark.parametrize("skip", [False, True], ids=["replayed", "skipped"])
@pytest.mark.parametrize(("before", "after"), [("fast", None), (None, "fast"), ("fast", "faster"), ("fast", "fast")])
def test_a_crash_while_the_journal_moves_loses_nothing(before: str | None, after: str | None, skip: bool) -> None:
    """After any effect of the start that moves it, of the first writes in the new place, and of an orderly end."""
    disk = SimDisk()
    disk.mkdir("/node")
    Node("/node", disk).crash_with(before, NEW, 2)
    begun = len(disk.log)
    moving = Node("/node", disk).start(after, skip)
    served = len(disk.log)
    moving.write(OID, 0, NEWEST, v(3), durable=True)
    written = len(disk.log)
    moving.close()
    kept: tuple[bytes | None, ...] = (OLD, None) if skip else (NEW,)
    rng = random.Random(0)
    crashes = Crashes(disk.log, disk.directories)
    images = 0
    while crashes.position < len(disk.log):
        crashes.advance()
        if crashes.position < begun:
            continue
        if crashes.position >= written:
            allowed: set[bytes | None] = {NEWEST}
        elif crashes.position >= served:
            allowed = {*kept, NEWEST}
        else:
            allowed = {*kept, NEW}
        for image in _images(crashes, rng):
            image.directories |= {"/node": None}
            assert Node("/node", image).read(after) in allowed
            images += 1
    assert images > 60

"""Offline tools over bare stores: every planted damage is found, a volume comes back from what is left."""

from __future__ import annotations

import os
import random
import shutil
from array import array
from pathlib import Path

import pytest
from tests.support.stores import StoreDriver, flip

from sheepdog.cluster.client.btree import Leaf, Tree
from sheepdog.cluster.core.errors import UsageError
from sheepdog.cluster.core.ids import ObjectId, Version, Vid, data_oid, inode_oid, strip_of
from sheepdog.cluster.core.inode import MAP_OFFSET, InodeHeader, pack_map
from sheepdog.cluster.core.limits import BTREE_NODE_SIZE, INODE_SIZE
from sheepdog.cluster.core.strip_undo import Undo, encode
from sheepdog.cluster.host.directory import write_file
from sheepdog.cluster.host.disk import RealDisk
from sheepdog.cluster.host.salvage import Salvage
from sheepdog.cluster.host.store_check import check
from sheepdog.cluster.host.trailer import block_hash
from sheepdog.cluster.host.undo_file import UndoFile
from sheepdog.tools.dog.standard import OutputLost
from sheepdog.tools.dog.store import StreamImage

SIZE = 1 << 20
VID = Vid(0x42)
VOLUME_BYTES = 5 * SIZE - 1000


def v(counter: int) -> Version:
    return Version(1, 1, counter)


def contents(path: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file() and file.name != "lock"}


@pytest.mark.parametrize("crash", [False, True], ids=["stopped", "killed"])
def test_a_check_finds_planted_damage_and_changes_nothing(tmp_path: Path, crash: bool) -> None:
    driver = StoreDriver(str(tmp_path))
    rng = random.Random(1)
    for index in range(6):
        driver.create(data_oid(VID, index), SIZE, 0, rng.randbytes(SIZE // 2), v(index + 1))
    for index in range(6):
        driver.write(data_oid(VID, index), 4096 * index, rng.randbytes(3 * 4096), v(index + 10))
    if crash:
        driver.flush()
        driver.settle()
        driver.crash()
    else:
        driver.close()
    before = contents(tmp_path)
    said: list[str] = []
    summary = check(str(tmp_path), said.append)
    assert summary.clean
    assert (summary.objects, summary.blocks) == (6, 6 * SIZE // 4096)
    assert contents(tmp_path) == before
    obj = tmp_path / "obj"
    flip(obj / f"{data_oid(VID, 1):016x}", 100 * 4096 + 7)
    flip(obj / f"{data_oid(VID, 1):016x}", 101 * 4096)
    flip(obj / f"{data_oid(VID, 2):016x}", 200 * 4096)  # in a hole
    flip(obj / f"{data_oid(VID, 3):016x}", SIZE + 512 + 8 * 50)  # an entry of the table
    flip(obj / f"{data_oid(VID, 4):016x}", SIZE + 33)  # the header
    summary = check(str(tmp_path), said.append)
    found = {damage.object_name: damage.problem for damage in summary.damaged}
    assert found[f"{data_oid(VID, 1):016x}"] == "blocks 100-101 do not match their hashes"
    if crash:  # holes, tables and headers are made anew by the journal
        assert len(found) == 1
        return
    assert found[f"{data_oid(VID, 2):016x}"] == "blocks 200 do not match their hashes"
    assert found[f"{data_oid(VID, 3):016x}"] == "blocks 50 do not match their hashes"
    assert f"{data_oid(VID, 4):016x}" in found
    assert len(found) == 4


@pytest.mark.parametrize("crash", [False, True], ids=["stopped", "killed"])
def test_what_strips_need_to_go_back_is_checked(tmp_path: Path, crash: bool) -> None:
    """After a crash its end may be torn: a start takes what is before that."""
    undo = UndoFile(str(tmp_path), RealDisk(), lambda level, text: None, False)
    driver = StoreDriver(str(tmp_path), before=undo)
    strip = strip_of(data_oid(VID, 0), 2)
    records = [encode(strip, Undo(v(number), v(number + 1), 0, b"old")) for number in range(1, 4)]
    for record in records:
        undo.append(record)
    driver.create(strip, SIZE, 0, b"a" * 4096, v(4), durable=True)
    if crash:
        driver.crash()
    else:
        driver.close()
    assert check(str(tmp_path), print).clean
    flip(tmp_path / "undo", 12 + len(records[0]) + 30)
    found = [(damage.path, damage.problem) for damage in check(str(tmp_path), print).damaged]
    damage = (str(tmp_path / "undo"), f"damaged behind {len(records[0])} bytes of records")
    assert found == ([] if crash else [damage])


def test_disks_that_are_not_named_are_told(tmp_path: Path) -> None:
    """What was plugged is on no command line: a check of the rest must not look like one of everything."""
    disks = [str(tmp_path / name) for name in ("d1", "d2")]
    StoreDriver(str(tmp_path / "meta"), disks=disks).close()
    said: list[str] = []
    assert check(f"{tmp_path}/meta,{disks[0]}", said.append).clean
    assert said == [f"{tmp_path}/meta: 1 disks that its sheep had last are not named: they are left out"]
    said.clear()
    assert check(",".join([f"{tmp_path}/meta", *disks]), said.append).clean
    assert said == []


def test_a_store_in_use_or_none_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not the metadata directory"):
        check(str(tmp_path), print)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OSError, match="loop/superblock"):  # as a directory into which this user may not look
        check(str(tmp_path / "loop"), print)


def volume(driver: StoreDriver, content: bytes, owners: list[int]) -> None:
    header = InodeHeader(name=b"web", vdi_size=VOLUME_BYTES, nr_copies=3, block_size_shift=20, vdi_id=VID)
    driver.create(inode_oid(VID), INODE_SIZE, 0, header.pack(), v(1))
    driver.write(inode_oid(VID), MAP_OFFSET, pack_map(array("I", owners)), v(2))
    for index, vid in enumerate(owners):
        if vid:
            data = content[index * SIZE : (index + 1) * SIZE]
            driver.create(data_oid(Vid(vid), index), SIZE, 0, data, v(3))


def write_image(salvage: Salvage, path: Path) -> bool:
    with path.open("wb") as file:
        image = StreamImage(file.fileno())
        header = salvage.find(b"web")
        complete = salvage.write_volume(header, image)
        image.finish(header.vdi_size)
    return complete


def test_a_volume_is_rebuilt_from_damaged_stores(tmp_path: Path) -> None:
    rng = random.Random(2)
    content = bytearray(rng.randbytes(5 * SIZE))
    content[2 * SIZE : 3 * SIZE] = bytes(SIZE)
    owners = [VID, VID, 0, 0x17, VID]
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for number, path in enumerate(paths):
        driver = StoreDriver(str(path))
        volume(driver, bytes(content), owners)
        if number == 0:
            driver.write(data_oid(VID, 1), 0, b"new" * 1000, v(9), durable=True)
        driver.flush()
        driver.settle()
        driver.crash()
    content[SIZE : SIZE + 3000] = b"new" * 1000

    def file(store: int, oid: ObjectId) -> Path:
        return paths[store] / "obj" / f"{oid:016x}"

    flip(file(0, data_oid(VID, 0)), 5 * 4096)
    flip(file(1, data_oid(VID, 0)), 6 * 4096)
    file(2, data_oid(VID, 0)).unlink()
    flip(file(0, inode_oid(VID)), INODE_SIZE // 4096 * 4096 + 4096 + 10)
    said: list[str] = []
    salvage = Salvage([str(path) for path in paths], said.append)
    assert [(header.name, header.vdi_size) for header in salvage.volumes()] == [(b"web", VOLUME_BYTES)]
    with pytest.raises(UsageError, match="no volume other"):
        salvage.find(b"other")
    assert write_image(salvage, tmp_path / "image"), said
    assert (tmp_path / "image").read_bytes() == bytes(content[:VOLUME_BYTES])
    salvage.close()


def test_what_no_store_has_is_named(tmp_path: Path) -> None:
    driver = StoreDriver(str(tmp_path))
    content = random.Random(3).randbytes(5 * SIZE)
    volume(driver, content, [VID] * 5)
    driver.close()
    flip(tmp_path / "obj" / f"{data_oid(VID, 3):016x}", 9 * 4096)
    (tmp_path / "obj" / f"{data_oid(VID, 4):016x}").unlink()
    salvage = Salvage([str(tmp_path)], lambda text: None)
    assert not write_image(salvage, tmp_path / "image")
    assert len(salvage.lost) == 2
    assert f"{data_oid(VID, 3):016x} (from byte {3 * SIZE}): blocks 9 are lost" in salvage.lost[0]
    salvage.close()
    expected = bytearray(content[: 4 * SIZE]) + bytes(SIZE - 1000)
    expected[3 * SIZE + 9 * 4096 : 3 * SIZE + 10 * 4096] = bytes(4096)
    assert (tmp_path / "image").read_bytes() == bytes(expected)


@pytest.mark.parametrize("lost", ["d1/.disk", "meta/superblock", "meta"])
def test_what_says_whose_a_directory_is_may_be_lost(tmp_path: Path, lost: str) -> None:
    """Rotten it is a finding; without META the disks are enough."""
    meta, disks = str(tmp_path / "meta"), [str(tmp_path / name) for name in ("d1", "d2")]
    driver = StoreDriver(meta, disks=disks)
    content = random.Random(3).randbytes(5 * SIZE)
    volume(driver, content, [VID] * 5)
    driver.close()
    path = ",".join([meta, *disks])
    if lost == "meta":
        shutil.rmtree(meta)
        path = ",".join(disks)
    else:
        flip(tmp_path / lost, 20)
    before = contents(tmp_path)
    summary = check(path, print)
    assert summary.objects == 6
    assert [damage.path for damage in summary.damaged] == ([] if lost == "meta" else [str(tmp_path / lost)])
    salvage = Salvage([path], lambda text: None)
    assert write_image(salvage, tmp_path / "image")
    salvage.close()
    assert (tmp_path / "image").read_bytes() == content[:VOLUME_BYTES]
    (tmp_path / "image").unlink()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["superblock", "obj/.disk"])
def test_a_newer_format_is_not_read(tmp_path: Path, name: str) -> None:
    StoreDriver(str(tmp_path)).close()
    data = (tmp_path / name).read_bytes()
    newer = data[:8] + (2).to_bytes(4, "little") + data[12:-8]
    (tmp_path / name).write_bytes(newer + block_hash(newer).to_bytes(8, "little"))
    with pytest.raises(UsageError, match="format 2, this version reads 1"):
        check(str(tmp_path), print)


@pytest.mark.parametrize("name", ["config", "settled", "stale", "disks", "scrub", "epoch/00000001"])
def test_every_sealed_file_is_looked_at(tmp_path: Path, name: str) -> None:
    StoreDriver(str(tmp_path)).close()
    (tmp_path / "epoch").mkdir()
    write_file(RealDisk(), str((tmp_path / name).parent), Path(name).name, b"sealed" * 10)
    assert check(str(tmp_path), print).clean
    flip(tmp_path / name, 9)
    assert [damage.path for damage in check(str(tmp_path), print).damaged] == [str(tmp_path / name)]


@pytest.mark.parametrize("limit", [100, 3], ids=["in the inode", "leaves of their own"])
def test_a_hyper_volume_is_rebuilt(tmp_path: Path, limit: int) -> None:
    driver = StoreDriver(str(tmp_path))
    indexes = [0, 1, 4, 7, 8, 11, 19]
    size = 20 * SIZE - 1000
    header = InodeHeader(name=b"web", vdi_size=size, nr_copies=3, block_size_shift=20, store_policy=1, vdi_id=VID)
    inode = inode_oid(VID)
    driver.create(inode, INODE_SIZE, 0, header.pack(), v(1))
    tree = Tree(VID, [Leaf(ObjectId(0), [])], 0, limit)
    rng = random.Random(5)
    content = bytearray(20 * SIZE)
    leaves: dict[ObjectId, None] = {}
    for counter, index in enumerate(indexes, 2):
        content[index * SIZE : (index + 1) * SIZE] = data = rng.randbytes(SIZE)
        driver.create(data_oid(VID, index), SIZE, 0, data, v(counter))
        for write in tree.add([index]):
            if write.create:
                leaves[write.oid] = None
                driver.create(write.oid, BTREE_NODE_SIZE, write.offset, write.data, v(counter))
            else:
                driver.write(write.oid, write.offset, write.data, v(counter))
    driver.close()
    assert bool(leaves) == (limit == 3)
    salvage = Salvage([str(tmp_path)], lambda text: None)
    assert write_image(salvage, tmp_path / "image"), salvage.lost
    assert (tmp_path / "image").read_bytes() == content[:size]
    salvage.close()
    if leaves:
        (tmp_path / "obj" / f"{next(iter(leaves)):016x}").unlink()
        salvage = Salvage([str(tmp_path)], lambda text: None)
        assert not write_image(salvage, tmp_path / "image")
        assert f"object {next(iter(leaves)):016x} (the index of objects up to" in salvage.lost[0]
        salvage.close()
        image = (tmp_path / "image").read_bytes()
        for start in range(0, size, SIZE):
            part = image[start : start + SIZE]
            assert part == content[start : min(start + SIZE, size)] or not any(part)


def test_a_reader_of_the_image_who_leaves_is_no_failure_of_the_stores() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(OutputLost) as caught:
        StreamImage(writer).put(0, b"data")
    os.close(writer)
    assert caught.value.reader_left

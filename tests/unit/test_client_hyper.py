"""A hyper volume of several threads, and an index that could not be told of a new object."""

from __future__ import annotations

import errno
import threading
from dataclasses import replace

import pytest
from tests.support.fake_sheep import FakeSheep

from sheepdog.cluster.client.btree import NodeWrite
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.client.hyper import HyperVolume
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import Vid, inode_oid
from sheepdog.cluster.core.inode import HEADER_SIZE, MAP_OFFSET, empty_btree

MIB = 1 << 20
OBJECT = 4 * MIB
SIZE = 1 << 50


def new_volume(sheep: FakeSheep) -> None:
    vid = sheep.create("v", OBJECT)
    content = sheep.objects[inode_oid(Vid(vid))]
    content[:HEADER_SIZE] = replace(sheep.inode(vid), store_policy=1, vdi_size=SIZE).pack()
    root = empty_btree()
    content[MAP_OFFSET : MAP_OFFSET + len(root)] = root


def opened(sheep: FakeSheep, read_only: bool = False) -> HyperVolume:
    return HyperVolume.open(sheep.address, b"v", read_only)


def test_threads_make_objects_side_by_side() -> None:
    with FakeSheep() as sheep:
        new_volume(sheep)
        volume = opened(sheep)

        def work(me: int) -> None:
            for number in range(8):  # every object is wanted by all
                volume.write(number * 1000 * OBJECT + me * 5000, bytes([me + 1]) * 5000)

        threads = [threading.Thread(target=work, args=(me,)) for me in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        volume.write(SIZE - 3, b"end", durable=True)
        with pytest.raises(OSError) as caught:
            volume.write(SIZE - 2, b"end")
        assert caught.value.errno == errno.ENOSPC
        volume.close()
        again = opened(sheep, read_only=True)
        expected = b"".join(bytes([me + 1]) * 5000 for me in range(6)) + bytes(5)
        for number in range(8):
            assert again.read(number * 1000 * OBJECT, len(expected)) == expected
        assert again.read(SIZE - 4, 100) == b"\0end"
        assert again.allocated_bytes() == 9 * OBJECT
        assert [(e.offset, e.allocated) for e in again.extents(OBJECT, 1000 * OBJECT)] == [
            (OBJECT, False),
            (1000 * OBJECT, True),
        ]
        with pytest.raises(OSError) as caught:
            again.write(0, b"x")
        assert caught.value.errno == errno.EROFS
        again.close()


@pytest.mark.parametrize("told", (0, 1))
def test_an_index_that_was_told_in_part(told: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write fails, and what comes later goes by what the cluster knows: nothing is written beside the index."""
    with FakeSheep() as sheep:
        new_volume(sheep)
        volume = opened(sheep)
        volume.write(0, b"first")
        whole = HyperVolume._write_nodes

        def part(self: HyperVolume, writes: list[NodeWrite]) -> None:
            whole(self, writes[:told])
            raise SheepError(Result.EIO)

        with monkeypatch.context() as patch:
            patch.setattr(HyperVolume, "_write_nodes", part)
            with pytest.raises(OSError):
                volume.write(9 * OBJECT, b"lost")
        volume.write(9 * OBJECT + 100, b"kept")
        volume.close()
        again = opened(sheep)
        assert again.read(9 * OBJECT + 100, 5) == b"kept\0"
        assert again.read(0, 5) == b"first"
        again.close()

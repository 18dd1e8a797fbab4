"""Writes next to one another in a map become one while another is under way; all others do not wait."""

from __future__ import annotations

import pytest

from sheepdog.cluster.core.ids import ObjectId, Vid, inode_oid
from sheepdog.cluster.core.limits import MAP_WRITE_BYTES
from sheepdog.cluster.core.map_writes import Ended, MapWrites
from sheepdog.cluster.core.ports import Buffer

OID, OTHER = inode_oid(Vid(1)), inode_oid(Vid(2))


class Inodes:
    """Takes writes, and ends them when it is told to; with `refusal` at once."""

    def __init__(self) -> None:
        self.writes = MapWrites(self._begin)
        self.begun: list[tuple[int, bytes, bool]] = []
        self.answers: list[tuple[str, int]] = []
        self.refusal = 0
        self._ends: list[Ended] = []

    def _begin(self, oid: int, offset: int, data: Buffer, durable: bool, ended: Ended) -> None:
        self.begun.append((offset, bytes(data), durable))
        if self.refusal:
            ended(self.refusal)
        else:
            self._ends.append(ended)

    def write(self, name: str, offset: int, data: bytes, durable: bool = False, oid: ObjectId = OID) -> None:
        self.writes.write(oid, offset, data, durable, lambda result: self.answers.append((name, result)))

    def end(self, result: int = 0) -> None:
        """Of the oldest one under way."""
        self._ends.pop(0)(result)


def test_what_comes_while_one_is_under_way_goes_together() -> None:
    inodes = Inodes()
    inodes.write("a", 100, b"aaaa")
    inodes.write("b", 108, b"bbbb")
    inodes.write("c", 200, b"cccc")
    inodes.write("d", 112, b"dddd", durable=True)
    assert inodes.begun == [(100, b"aaaa", False)]
    inodes.end()
    assert inodes.answers == [("a", 0)]
    assert inodes.begun[1:] == [(200, b"cccc", False), (108, b"bbbbdddd", True)]  # nothing in between
    inodes.write("e", 104, b"eeee")
    inodes.end()
    assert len(inodes.begun) == 3
    inodes.end(5)
    assert inodes.answers[1:] == [("c", 0), ("b", 5), ("d", 5)]
    assert inodes.begun[3:] == [(104, b"eeee", False)]


@pytest.mark.parametrize(
    ("waiting", "written"),
    [
        ([(100, b"bbbb"), (108, b"cccc"), (104, b"dddd")], (100, b"bbbbddddcccc")),
        ([(98, b"bbbb"), (100, b"cccc"), (94, b"dddd")], (94, b"ddddbbcccc")),
    ],
    ids=["what fills a gap makes one of both sides", "the last one written counts"],
)
def test_what_waits_becomes_one_write(waiting: list[tuple[int, bytes]], written: tuple[int, bytes]) -> None:
    inodes = Inodes()
    inodes.write("first", 100, b"aaaa")
    for number, (offset, data) in enumerate(waiting):
        inodes.write(str(number), offset, data)
    inodes.end()
    assert inodes.begun[1:] == [(*written, False)]


def test_what_lies_elsewhere_does_not_wait() -> None:
    inodes = Inodes()
    inodes.write("a", 100, b"aaaa")
    inodes.write("b", 2 * MAP_WRITE_BYTES, b"bbbb")
    inodes.write("c", 104, b"cccc", oid=OTHER)
    assert [offset for offset, _, _ in inodes.begun] == [100, 2 * MAP_WRITE_BYTES, 104]


def test_no_write_grows_beyond_the_limit() -> None:
    inodes = Inodes()
    inodes.write("a", 0, b"a" * 4)
    inodes.write("b", 4, b"b" * MAP_WRITE_BYTES)
    inodes.write("c", 4 + MAP_WRITE_BYTES, b"c" * 4)
    assert [offset for offset, _, _ in inodes.begun] == [0, 4 + MAP_WRITE_BYTES]
    inodes.end()
    assert len(inodes.begun) == 2  # it is near the one that goes on
    inodes.end()
    assert inodes.begun[2] == (4, b"b" * MAP_WRITE_BYTES, False)


def test_refused_ones_do_not_hold_up_the_others() -> None:
    inodes = Inodes()
    for number in range(0, 8, 2):
        inodes.write(str(number), number * MAP_WRITE_BYTES, b"a" * MAP_WRITE_BYTES)
        inodes.write(str(number + 1), (number + 1) * MAP_WRITE_BYTES, b"b" * MAP_WRITE_BYTES)
    inodes.refusal = 7
    for _ in range(4):
        inodes.end(7)
    assert sorted(inodes.answers) == [(str(number), 7) for number in range(8)]
    inodes.refusal = 0
    inodes.write("again", 0, b"a")
    inodes.end()
    assert inodes.answers[-1] == ("again", 0)

"""Map writes of clients that do not know that the volume's objects were moved (core.moves)."""

from __future__ import annotations

from array import array

from sheepdog.cluster.core.ids import Vid
from sheepdog.cluster.core.moves import MOVED_TAG, went_back
from sheepdog.cluster.core.vdi import VdiRecord, VdiTable

BASE, OLD, NEW = Vid(1), Vid(2), Vid(3)


def table(tag: bytes) -> VdiTable:
    vdis = VdiTable()
    vdis.put(VdiRecord(BASE, b"base", snap_ctime=5))
    vdis.put(VdiRecord(OLD, b"v", tag, snap_ctime=7, parent=BASE))
    vdis.put(VdiRecord(NEW, b"v", create_time=7, parent=OLD))
    return vdis


def test_an_object_that_was_moved_is_not_given_up() -> None:
    vdis = table(MOVED_TAG)
    record = vdis.get(NEW)
    assert record is not None
    old = array("I", [NEW, NEW, NEW, OLD, 0, NEW])
    new = array("I", [OLD, BASE, 0, NEW, NEW, NEW])
    assert went_back(vdis, record, old, new) == [0, 1]


def test_other_volumes_may_go_back_to_what_they_were() -> None:
    vdis = table(b"a snapshot")
    record = vdis.get(NEW)
    assert record is not None
    assert went_back(vdis, record, array("I", [NEW, NEW]), array("I", [OLD, BASE])) == []

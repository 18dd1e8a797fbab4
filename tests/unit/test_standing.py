"""What a node says of its copies after a start (core.standing)."""

from __future__ import annotations

from sheepdog.cluster.core.ids import Version, Vid, data_oid
from sheepdog.cluster.core.peering import UNSETTLED, Holding
from sheepdog.cluster.core.standing import Standing

OID = data_oid(Vid(1), 0)


def test_what_was_written_since_all_was_proven_equal_may_be_lacking_elsewhere() -> None:
    standing = Standing(settled=5)
    assert not list(standing.unsettled(OID, Version(4, 1, 1 << 16)))
    written = Version(5, 1, 1 << 16)
    assert list(standing.unsettled(OID, written)) == [Holding(OID, written, 5, UNSETTLED)]


def test_what_was_proven_in_epochs_that_never_were_was_proven_before_them() -> None:
    standing = Standing(settled=5)
    standing.step_back(3)
    written = Version(4, 1, 1 << 16)
    assert list(standing.unsettled(OID, written)) == [Holding(OID, written, 3, UNSETTLED)]
    assert standing.as_of(OID, Version(2, 1, 1 << 16)) == 3

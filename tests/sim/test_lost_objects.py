"""Objects of which no current copy is left among the nodes that are here (`regressions.jsonl` has one that nobody can
bring back, and that nobody wants any more: it goes)."""

from __future__ import annotations

import pytest
from tests.sim.test_directed import fresh, holders, only_an_old_copy, read, settle, write

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.gateway import Gateway
from sheepdog.cluster.core.ids import NO_VID, data_oid, inode_oid
from sheepdog.cluster.core.inode import map_offset
from sheepdog.cluster.sim.clients import block_of
from sheepdog.cluster.sim.world import SECOND


def test_a_lost_object_that_may_come_back_is_not_removed() -> None:
    """The node with the newer copy would bring it back."""
    cluster, volume = fresh(2, 2)
    here, away = only_an_old_copy(cluster, volume)
    results: list[int] = []
    here.node.gateway.remove(data_oid(volume.vid, 0), lambda result, _: results.append(int(result)))
    cluster.world.run_until(lambda: bool(results), SECOND, "an answer")
    assert results == [Result.EIO]
    away.start()
    settle(cluster, here, away)
    assert read(here, volume) == (Result.SUCCESS, block_of(2))


def test_nor_is_it_given_back_by_one_of_several_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would come back with its bytes, and another client that makes it again would take it for new."""
    monkeypatch.setattr(Gateway, "is_among_others", lambda self, oid: True)
    monkeypatch.setattr(Gateway, "zero", lambda self, oid, offset, length, durable, done: done(Result.EIO, b""))
    cluster, volume = fresh(2, 2)
    home, replica = holders(cluster, volume)
    assert write(home, volume, 1) == Result.SUCCESS
    results: list[int] = []
    place, zero = map_offset(0), NO_VID.to_bytes(4, "little")
    replica.node.gateway.write(inode_oid(volume.vid), place, zero, True, lambda result, _: results.append(int(result)))
    cluster.world.run_until(lambda: bool(results), SECOND, "an answer")
    assert results == [Result.EIO]
    assert read(replica, volume) == (Result.SUCCESS, block_of(1))

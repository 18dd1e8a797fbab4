"""Objects of which no current copy is left among the nodes that are here (`regressions.jsonl` has one that nobody can
bring back, and that nobody wants any more: it goes)."""

from __future__ import annotations

from tests.sim.test_directed import fresh, holders, read, settle, write

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import data_oid
from sheepdog.cluster.sim.clients import block_of
from sheepdog.cluster.sim.world import SECOND


def test_a_lost_object_that_may_come_back_is_not_removed() -> None:
    """Only an old copy is here: the node with the newer one would bring it back."""
    cluster, volume = fresh(2, 2)
    home, replica = holders(cluster, volume)
    assert write(home, volume, 1) == Result.SUCCESS
    replica.kill()
    settle(cluster, home)
    assert write(home, volume, 2) == Result.SUCCESS
    cluster.fabric.break_link((min(home.id, replica.id), max(home.id, replica.id)), SECOND // 2)
    replica.start()
    cluster.world.run_until(lambda: replica.serves() and len(replica.node.cluster.members) == 2, SECOND, "join")
    home.kill()
    cluster.world.run_until(lambda: len(replica.node.cluster.members) == 1, SECOND, "death noticed")
    results: list[int] = []
    replica.node.gateway.remove(data_oid(volume.vid, 0), lambda result, _: results.append(int(result)))
    cluster.world.run_until(lambda: bool(results), SECOND, "an answer")
    assert results == [Result.EIO]
    home.start()
    settle(cluster, home, replica)
    assert read(replica, volume) == (Result.SUCCESS, block_of(2))

"""Holes through any gateway: zeroing a range, and the map of an object's blocks, in the simulated world."""

from __future__ import annotations

from typing import Any

import pytest
from tests.sim.test_late_map_writes import create, new_vdi, running, wait_for, write_map

from sheepdog.cluster.core.blocks import runs
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import data_oid
from sheepdog.cluster.sim.audit import copies_equal
from sheepdog.cluster.sim.cluster import HEALTH_LIMIT_NS, SimCluster


def ask(cluster: SimCluster, node: int, call: str, *arguments: Any) -> tuple[int, bytes]:
    gateway = cluster.machines[node].node.gateway
    result, data = wait_for(cluster.world, lambda done: getattr(gateway, call)(*arguments, done))
    return result, bytes(data)


@pytest.mark.parametrize("seed", range(4))
def test_every_gateway_sees_the_holes(seed: int) -> None:
    cluster = running(seed)
    vid = new_vdi(cluster)
    create(cluster, vid, 0)
    write_map(cluster, vid, 0, vid)
    oid = data_oid(vid, 0)
    _, whole = ask(cluster, 0, "read", oid, 0, 1)
    size = cluster.machines[0].node.context.size_of(oid)
    blocks = size // 4096
    data = bytes(range(1, 256)) * (8 * 4096 // 255 + 1)
    assert whole == b"x"
    for node in range(3):
        start = 4096 * (1 + node * 8)
        assert ask(cluster, node, "write", oid, start, data[: 6 * 4096], True) == (0, b"")
        # A block and a half: the whole one becomes a hole, of the half ones the rest stays.
        assert ask(cluster, node, "zero", oid, start + 2048, 3 * 4096, False) == (0, b"")
        expected = data[:2048] + bytes(3 * 4096) + data[3 * 4096 + 2048 : 6 * 4096]
        for other in range(3):
            assert ask(cluster, other, "read", oid, start, 6 * 4096) == (0, expected)
    answers = [ask(cluster, node, "block_map", oid) for node in range(3)]
    assert answers[0][0] == 0 and answers == answers[:1] * 3
    found = {
        place for first, count, full in runs(answers[0][1], blocks) if full for place in range(first, first + count)
    }
    assert found == {0} | {1 + node * 8 + block for node in range(3) for block in (0, 3, 4, 5)}
    assert ask(cluster, 1, "block_map", data_oid(vid, 1))[0] == Result.NO_OBJ
    assert ask(cluster, 1, "zero", data_oid(vid, 1), 0, 4096, True)[0] == Result.NO_OBJ
    new_vdi(cluster, vid, snapshot=True)
    assert ask(cluster, 2, "zero", oid, 0, 4096, True)[0] == Result.READONLY
    cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
    copies_equal(cluster)

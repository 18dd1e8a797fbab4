"""Nodes lose disks under load, alone and together with deaths: no client sees an error, and all copies come back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from sheepdog.cluster.core.erasure import Policy
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import data_oid
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.sim.clients import block_of, make_volume
from sheepdog.cluster.sim.cluster import HEALTH_LIMIT_NS, SimCluster
from sheepdog.cluster.sim.nemesis import Faults
from sheepdog.cluster.sim.run import Run, Scenario
from sheepdog.cluster.sim.world import MILLISECOND, SECOND, World

SEEDS = 12
OBJECTS = 8


@pytest.mark.parametrize("seed", range(SEEDS))
def test_disks_fail(seed: int) -> None:
    faults = Faults(mean_ns=60 * MILLISECOND, kill=0, disk=1)
    run = Run(Scenario("disks", faults=faults), seed)
    run.execute()
    assert run.cluster.probes()["node.copies_lost"] > 3


@pytest.mark.parametrize("seed", range(SEEDS))
def test_disks_fail_and_nodes_die(seed: int) -> None:
    """A disk and a node are two zones: with three copies nothing may be lost."""
    faults = Faults(mean_ns=80 * MILLISECOND, kill=1, link=0.5, disk=2, max_down=1, max_outage_ns=300 * MILLISECOND)
    Run(Scenario("disks and kills", machines=4, clients=3, owners=1, faults=faults), seed).execute()


@pytest.mark.parametrize("seed", range(SEEDS // 2))
def test_disks_with_strips_fail(seed: int) -> None:
    faults = Faults(mean_ns=60 * MILLISECOND, kill=0, disk=1)
    Run(Scenario("strips", machines=5, policy=Policy(2, 2).to_byte(), faults=faults), seed).execute()


@pytest.mark.parametrize("gone", [True, False])
def test_a_node_dies_before_its_state_says_what_its_disk_took_along(gone: bool) -> None:
    """It was the only one that had the last write. What is not here any more was not deleted, and is not what it was.

    `gone`: it starts without the disk; else what is on it is not trusted.
    """
    cluster = SimCluster(World(3), 3)
    cluster.start_all()
    cluster.format(3)
    volume = make_volume(cluster, "v", OBJECTS, (0,))
    alone = cluster.machines[0]
    for machine in cluster.machines[1:]:
        machine.kill()
    cluster.world.run_until(lambda: alone.serves() and alone.state.proven.settled > 1, HEALTH_LIMIT_NS, "settled alone")
    oids = [data_oid(volume.vid, index) for index in range(OBJECTS)]
    for oid in oids:
        assert wait(cluster, partial(alone.node.gateway.write, oid, 0, block_of(7), True)) == 0
    took = alone.lose_disk()
    lost = [oid for oid in oids if oid in took]
    assert 0 < len(lost) < OBJECTS
    alone.kill()
    if gone:
        alone.disk.take_away_lost()
    cluster.start_all()
    cluster.world.run_until(cluster.all_joined, HEALTH_LIMIT_NS, "all")
    cluster.world.run_for(2 * SECOND)
    for oid in oids:
        result = wait(cluster, partial(cluster.machines[1].node.gateway.read, oid, 0, BLOCK_SIZE))
        assert result == (Result.EIO if oid in lost else Result.SUCCESS), f"{oid:x}"


def wait(cluster: SimCluster, request: Callable[[Callable[[int, Any], None]], None]) -> int:
    results: list[int] = []
    request(lambda result, _: results.append(result))
    cluster.world.run_until(lambda: bool(results), HEALTH_LIMIT_NS, "an answer")
    return results[0]

"""A durable write of a coded object does not rest on unflushed ones: power fails everywhere, and it is still there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.sim.test_directed import holders, settle

from sheepdog.cluster.core.ids import data_oid
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.loose_strips import LooseStrips
from sheepdog.cluster.sim.clients import block_of, make_volume
from sheepdog.cluster.sim.cluster import HEALTH_LIMIT_NS, SimCluster
from sheepdog.cluster.sim.world import SECOND, World

UNIT = 64 * 1024
SEEDS = 6


def what_is_left(seed: int) -> bytes:
    """4:2, one node away. Unflushed writes of two strips, a durable one of a third; then power fails everywhere."""
    cluster = SimCluster(World(seed), 6)
    cluster.start_all()
    cluster.format(3)
    volume = make_volume(cluster, "coded", 1, (), policy=0x22)
    world, oid = cluster.world, data_oid(volume.vid, 0)
    world.run_until(cluster.healthy, SECOND, "strips are level")
    placed = holders(cluster, volume)
    placed[0].kill()
    settle(cluster, *(machine for machine in cluster.machines if machine is not placed[0]))
    gateway = placed[1].node.gateway

    def wait(act: Callable[[Callable[[int, object], None]], None]) -> None:
        results: list[int] = []
        act(lambda result, _: results.append(result))
        world.run_until(lambda: bool(results), SECOND, "an answer")
        assert results == [0]

    for strip, durable, value in ((3, True, 10), (1, False, 11), (2, False, 12), (3, True, 13)):
        wait(lambda done: gateway.write(oid, strip * UNIT, block_of(value), durable, done))  # noqa: B023
    for machine in cluster.machines:
        machine.kill(power=True)
    cluster.start_all()
    world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
    answers: list[bytes] = []
    cluster.machines[0].node.gateway.read(oid, 3 * UNIT, BLOCK_SIZE, lambda _, data: answers.append(bytes(data)))
    world.run_until(lambda: bool(answers), SECOND, "read")
    return answers[0]


def test_a_durable_write_stays() -> None:
    assert all(what_is_left(seed) == block_of(13) for seed in range(SEEDS))


def test_without_the_strips_before_it_it_would_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: only the strips that the write changes are made durable."""
    monkeypatch.setattr(LooseStrips, "changed", lambda self, oid, flags, touched: touched)
    assert any(what_is_left(seed) != block_of(13) for seed in range(SEEDS))

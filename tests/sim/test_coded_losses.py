"""Every code that fits on six nodes: as many nodes as parity strips are lost, one by one, with writes in between."""

from __future__ import annotations

from functools import partial
from random import Random

import pytest
from tests.sim.test_late_map_writes import wait_for

from sheepdog.cluster.core.erasure import policy_of
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import ObjectId, data_oid, plain_oid, strip_of
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.messages import Buffer
from sheepdog.cluster.sim.audit import audit
from sheepdog.cluster.sim.clients import OBJECT_BYTES, Volume, make_volume
from sheepdog.cluster.sim.cluster import Machine, SimCluster
from sheepdog.cluster.sim.world import SECOND, World

NODES = 6
FITTING = [0x11, 0x12, 0x13, 0x14, 0x21, 0x22]  # 2:1 to 2:4, 4:1, 4:2
WRITES = 12
SIZES = (1, 100, 4096, 65_536, 70_000, OBJECT_BYTES // 2)


class Model:
    """A volume of two objects and what it must hold."""

    def __init__(self, cluster: SimCluster, volume: Volume, random: Random) -> None:
        self.cluster = cluster
        self.volume = volume
        self.random = random
        self.data = [bytearray(OBJECT_BYTES) for _ in range(2)]

    def scribble(self, machine: Machine) -> None:
        for _ in range(WRITES):
            index, length = self.random.randrange(2), self.random.choice(SIZES)
            offset = self.random.randrange(OBJECT_BYTES - length + 1)
            data = self.random.randbytes(length)
            results: list[int] = []
            oid = data_oid(self.volume.vid, index)
            machine.node.gateway.write(oid, offset, data, False, lambda result, _: results.append(result))  # noqa: B023
            self.cluster.world.run_until(partial(bool, results), 20 * SECOND, "write")
            assert results == [0]
            self.data[index][offset : offset + length] = data

    def check(self, machine: Machine) -> None:
        for index, expected in enumerate(self.data):
            answers: list[tuple[int, bytes]] = []

            def done(result: int, data: Buffer) -> None:
                answers.append((int(result), bytes(data)))  # noqa: B023

            machine.node.gateway.read(data_oid(self.volume.vid, index), 0, OBJECT_BYTES, done)
            self.cluster.world.run_until(partial(bool, answers), 20 * SECOND, "read")
            assert answers == [(0, bytes(expected))]


@pytest.mark.parametrize("byte", FITTING, ids=lambda byte: str(policy_of(byte)))
def test_as_many_as_there_are_parity_strips(byte: int) -> None:
    policy = policy_of(byte)
    assert policy is not None
    cluster = SimCluster(World(byte), NODES)
    cluster.start_all()
    cluster.format(3)
    random = cluster.world.stream("losses")
    model = Model(cluster, make_volume(cluster, "v", 2, (0,), policy=byte), random)
    for _ in range(2):
        dying = random.sample(cluster.machines, policy.parity)
        staying = next(machine for machine in cluster.machines if machine not in dying)
        for machine in dying:
            model.scribble(staying)
            machine.kill()
            model.scribble(staying)
            model.check(staying)
        cluster.start_all()
        cluster.world.run_until(cluster.healthy, 60 * SECOND, "health")
        model.check(dying[0])
        audit(cluster)


def test_discards_give_the_space_back() -> None:
    """Of data and parity; what was not discarded stays, and the strips fit each other."""
    cluster = SimCluster(World(6), NODES)
    cluster.start_all()
    cluster.format(3)
    model = Model(cluster, make_volume(cluster, "v", 2, (), policy=0x22), cluster.world.stream("discards"))
    gateway, kept = cluster.machines[1].node.gateway, 65_536 + BLOCK_SIZE
    for index, content in enumerate(model.data):
        oid, data = data_oid(model.volume.vid, index), model.random.randbytes(OBJECT_BYTES)
        content[:kept] = data[:kept]
        done = wait_for(cluster.world, partial(gateway.write, oid, 0, data, False))
        before = used_blocks(cluster, oid)
        discarded = wait_for(cluster.world, partial(gateway.zero, oid, kept, OBJECT_BYTES - kept, False))
        assert (done[0], discarded[0]) == (Result.SUCCESS, Result.SUCCESS)
        assert before == OBJECT_BYTES * 6 // 4 // BLOCK_SIZE
        # 64 KiB on the first strip, a block on the second, and the parity of both
        assert used_blocks(cluster, oid) == 16 + 1 + 2 * 16
    cluster.world.run_until(cluster.healthy, 60 * SECOND, "health")
    model.check(cluster.machines[2])
    audit(cluster)


def used_blocks(cluster: SimCluster, oid: ObjectId) -> int:
    return sum(
        len(copy.blocks)
        for machine in cluster.machines
        for strip, copy in machine.disk.copies().items()
        if plain_oid(strip) == oid
    )


def test_the_map_of_a_coded_object_tells_where_data_is() -> None:
    """Blocks of all data strips, in the object's order; what a lost strip does not tell counts as data."""
    cluster = SimCluster(World(5), NODES)
    cluster.start_all()
    cluster.format(3)
    volume = make_volume(cluster, "v", 1, (), policy=0x22)
    oid, gateway = data_oid(volume.vid, 0), cluster.machines[1].node.gateway
    written = (3, 17, 16 * 5, 255)
    maps: list[bytes] = []

    def ask() -> set[int]:
        maps.clear()
        gateway.block_map(oid, lambda result, data: maps.append(bytes(data)))
        cluster.world.run_until(lambda: bool(maps), SECOND, "map")
        bits = int.from_bytes(maps[0], "little")
        return {block for block in range(OBJECT_BYTES // BLOCK_SIZE) if bits >> block & 1}

    before = ask()
    for block in written:
        results: list[int] = []
        gateway.write(oid, block * BLOCK_SIZE, b"x" * BLOCK_SIZE, False, lambda result, _: results.append(result))  # noqa: B023
        cluster.world.run_until(partial(bool, results), SECOND, "write")
    assert len(maps[0]) == OBJECT_BYTES // BLOCK_SIZE // 8
    assert len(before) < 4
    assert ask() == before | set(written)
    placement = cluster.machines[1].node.context.placement
    third = cluster.machine(placement.nodes[placement.replicas(oid)[2]])
    third.node.replica.missing[strip_of(oid, 2)] = None
    known = {block for block in before | set(written) if block // 16 % 4 != 2}
    assert ask() == known | {block for block in range(OBJECT_BYTES // BLOCK_SIZE) if block // 16 % 4 == 2}

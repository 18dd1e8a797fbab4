"""A write that was under way when nodes died, and that they lack, is read only when it cannot be taken back any more.

Who is given the object in the next epoch would witness, once those that have the write are gone, too, that nothing
happened in it: then the older copies count when their nodes are back.
"""

from __future__ import annotations

import pytest
from tests.sim.test_directed import holders, read, settle

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import NodeId, data_oid
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.messages import Kind
from sheepdog.cluster.core.ports import Buffer
from sheepdog.cluster.sim.clients import Volume, block_of, make_volume
from sheepdog.cluster.sim.cluster import Machine, SimCluster
from sheepdog.cluster.sim.world import MILLISECOND, SECOND, World


def kill_at(cluster: SimCluster, kind: Kind, receivers: list[Machine], doomed: list[Machine]) -> None:
    """`doomed` die when such a message is sent to one of `receivers`."""
    ids = {machine.id for machine in receivers}

    def trap(sender: NodeId, receiver: NodeId, seen: int) -> None:
        if seen == kind and receiver in ids:
            cluster.fabric.trap = None
            for machine in doomed:
                cluster.world.after(0, machine.kill)

    cluster.fabric.trap = trap


def write_and_die(cluster: SimCluster, volume: Volume, staying: list[Machine], dying: list[Machine]) -> None:
    """A write by a gateway that dies, as all of `dying`, before it has come to them; `staying` have it."""
    kill_at(cluster, Kind.APPLY, dying, dying)
    oid = data_oid(volume.vid, 0)
    dying[0].node.gateway.write(oid, 0, block_of(2), False, lambda result, _: pytest.fail("answered"))
    cluster.world.run_until(lambda: not dying[0].up, SECOND, "a write")
    survivors = [machine for machine in cluster.machines if machine not in dying]

    def noticed() -> bool:
        return all(len(machine.node.cluster.members) == len(survivors) for machine in survivors)

    cluster.world.run_until(noticed, SECOND, "deaths noticed")


@pytest.mark.parametrize("restart", [False, True], ids=["", "restart"])
@pytest.mark.parametrize(
    ("policy", "places"),
    [(0, (0,)), (0x12, (0, 3)), (0x12, (0, 1))],
    ids=["copies", "strips, parity", "strips, no parity"],
)
def test_what_was_read_is_not_taken_back(policy: int, places: tuple[int, ...], restart: bool) -> None:
    """The nodes at these places in the object's layout have the write."""
    cluster = SimCluster(World(1), 6 if policy else 3)
    cluster.start_all()
    cluster.format(2)
    volume = make_volume(cluster, "v", 1, (0,), policy=policy)
    world, oid = cluster.world, data_oid(volume.vid, 0)
    replicas = holders(cluster, volume)
    staying = [replicas[place] for place in places]
    dying = [machine for machine in replicas if machine not in staying]
    newcomers = [machine for machine in cluster.machines if machine not in replicas]
    old = read(replicas[0], volume)
    assert old[0] == Result.SUCCESS
    seen: list[bytes] = []

    def noted(result: int, data: Buffer) -> None:
        if result == Result.SUCCESS:
            seen.append(bytes(data))
            end()

    def end() -> None:
        for machine in staying:
            world.after(0, machine.kill)

    def trap(sender: NodeId, receiver: NodeId, seen: int) -> None:
        if seen == Kind.FETCH and sender in {machine.id for machine in newcomers}:
            cluster.fabric.trap = None
            staying[0].node.gateway.read(oid, 0, BLOCK_SIZE, noted)
            world.after(MILLISECOND, end)

    write_and_die(cluster, volume, staying, dying)
    if restart:  # and nothing in memory tells any more what was under way
        for machine in staying:
            machine.kill()
        world.run_for(50 * MILLISECOND)
        cluster.fabric.trap = trap
        for machine in staying:
            machine.start()
    else:
        cluster.fabric.trap = trap
    world.run_until(lambda: cluster.fabric.trap is None, SECOND, "a restore")
    world.run_until(lambda: not any(machine.up for machine in staying), SECOND, "the end of those that have it")
    for machine in dying:
        machine.start()
    settle(cluster, *newcomers, *dying)
    after = read(dying[0], volume)
    if after[0] == Result.EIO:  # too few strips of the newer state are here
        for machine in staying:
            machine.start()
        settle(cluster, *cluster.machines)
        after = read(dying[0], volume)
    assert after[0] == Result.SUCCESS
    assert seen in ([], [after[1]])

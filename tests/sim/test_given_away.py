"""A node that gave a copy away, because it belongs elsewhere now, is no witness that the object was deleted."""

from __future__ import annotations

import pytest
from tests.sim.test_directed import fresh, settle

from sheepdog.cluster.core.copies import Copies
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import NO_OID, Epoch, Member, ObjectId, data_oid
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.messages import Flag
from sheepdog.cluster.core.placement import Placement
from sheepdog.cluster.sim.clients import block_of, make_volume
from sheepdog.cluster.sim.cluster import HEALTH_LIMIT_NS, Machine, SimCluster
from sheepdog.cluster.sim.world import MILLISECOND, SECOND

OBJECTS = 24


def that_moves(cluster: SimCluster, oids: list[ObjectId], newcomer: Machine) -> tuple[ObjectId, Machine, Machine]:
    """An object that the newcomer will hold, the node that keeps it, and the one that gives it away."""
    node = cluster.machines[0].node
    members = node.cluster.weighted([*node.cluster.members, Member(newcomer.id, newcomer.zone, 128, newcomer.space)])
    now, then = node.context.placement, Placement(Epoch(99), members, node.context.me, node.context.copies_of)
    for oid in oids:
        before = {now.nodes[index] for index in now.replicas(oid)}
        after = {then.nodes[index] for index in then.replicas(oid)}
        if newcomer.id in after and len(before & after) == 1:
            (keeps,), (gives,) = before & after, before - after
            return oid, cluster.machine(keeps), cluster.machine(gives)
    pytest.fail("nothing moves")


def story() -> tuple[int, bytes]:
    """What is read in the end."""
    cluster, _ = fresh(4, 2)
    world = cluster.world
    volume = make_volume(cluster, "many", OBJECTS, ())
    oids = [data_oid(volume.vid, index) for index in range(OBJECTS)]
    results: list[int] = []
    for oid in oids:
        cluster.machines[0].node.gateway.write(oid, 0, block_of(7), True, lambda result, _: results.append(result))
    world.run_until(lambda: results == [0] * OBJECTS, 5 * SECOND, "writes")
    cluster.machines[3].kill()  # so that epochs pass, which all know whole
    settle(cluster, *cluster.machines[:3])
    cluster.machines[3].start()
    world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")

    newcomer = cluster.add_machine()
    oid, keeps, gives = that_moves(cluster, oids, newcomer)
    other = next(machine for machine in cluster.machines[:4] if machine not in (keeps, gives))
    cluster.fabric.break_link(
        (min(gives.id, other.id), max(gives.id, other.id)), 4 * SECOND
    )  # it never knows all again
    newcomer.start()

    def restored() -> bool:
        copy = newcomer.disk.copies().get(oid)
        return copy is not None and bool(copy.version.epoch)

    world.run_until(restored, 2 * SECOND, "the newcomer has it")
    world.run_for(50 * MILLISECOND)
    newcomer.kill()
    newcomer.start()  # at once: nobody else gets the object
    epoch = gives.node.context.epoch
    world.run_until(lambda: newcomer.serves() and gives.node.context.epoch > epoch, SECOND, "join")
    keeps.kill()
    world.run_for(5 * SECOND)  # the link is whole again
    keeps.start()
    world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
    answers: list[tuple[int, bytes]] = []
    gives.node.gateway.read(oid, 0, BLOCK_SIZE, lambda result, data: answers.append((int(result), bytes(data))))
    world.run_until(lambda: bool(answers), SECOND, "read")
    return answers[0]


def test_nothing_is_lost() -> None:
    assert story() == (Result.SUCCESS, block_of(7))


def test_with_copies_that_go_at_once_it_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Copies, "drop", lambda self, oid, flags: self._remove(oid))
    assert story()[0] == Result.NO_OBJ


def test_an_object_that_is_made_anew_where_a_copy_was_to_go_stays() -> None:
    """The copy goes when that is safe, some milliseconds later; an inode may have got more copies by then."""
    cluster, volume = fresh(2, 2)
    oid, gateway = data_oid(volume.vid, 0), cluster.machines[0].node.gateway
    results: list[int] = []
    gateway.write(oid, 0, block_of(1), True, lambda result, _: results.append(result))
    cluster.world.run_until(lambda: results == [0], SECOND, "write")
    epoch = cluster.machines[0].node.context.epoch
    machine = cluster.machines[0]
    cluster.machines[1].kill()  # so that what is proven is of an older epoch
    cluster.world.run_until(lambda: machine.node.context.epoch > epoch, SECOND, "epoch")
    cluster.world.run_until(machine.node.copies.replica.all_settled, SECOND, "peering")
    machine.node.copies.drop(oid, Flag.SURPLUS)
    assert machine.node.context.store.version(oid), "not yet"
    gateway.create(oid, NO_OID, 0, block_of(2), True, lambda result, _: results.append(result))
    cluster.world.run_until(lambda: results == [0, 0], SECOND, "creation")
    cluster.world.run_for(SECOND)
    assert machine.node.context.probes.get("copies.surplus_made_anew") == 1
    gateway.read(oid, 0, BLOCK_SIZE, lambda result, data: results.append(int(bytes(data) != block_of(2)) or result))
    cluster.world.run_until(lambda: results == [0, 0, 0], SECOND, "read")

"""Volumes in the simulated world: redundancy that changes under load, and space that comes back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from struct import pack
from typing import Any

import pytest
from tests.sim.test_late_map_writes import create, new_vdi, running, wait_for, write_map

from sheepdog.cluster.core.attributes import Attribute
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import (
    NO_OID,
    ObjectId,
    Vid,
    btree_oid,
    data_oid,
    inode_oid,
    is_inode,
    vid_of,
    vmstate_oid,
)
from sheepdog.cluster.core.inode import BTREE_MAGIC, INNER_DEPTH, LEAF_DEPTH, map_offset
from sheepdog.cluster.core.vdi import VdiRecord, VdiTable
from sheepdog.cluster.sim.audit import audit
from sheepdog.cluster.sim.clients import LOST, NOT_NOW, BlockClient, Door, make_volume
from sheepdog.cluster.sim.cluster import HEALTH_LIMIT_NS, SimCluster
from sheepdog.cluster.sim.history import History
from sheepdog.cluster.sim.world import MILLISECOND, SECOND, World

SEEDS = 8


def stored(cluster: SimCluster) -> list[ObjectId]:
    """Every object that is on some disk."""
    return sorted({oid for machine in cluster.machines for oid in machine.disk.copies()})


def ask(cluster: SimCluster, request: Any, node: int = 0) -> Any:
    return wait_for(cluster.world, lambda done: request(cluster.machines[node].node, done))


def set_attribute(cluster: SimCluster, name: bytes, key: bytes, **flags: bool) -> Result:
    fields = {"create": True, "exclusive": False, "delete": False, **flags}
    payload = Attribute(name, key=key, value=b"v").pack()
    result, _, _ = ask(cluster, lambda node, done: node.operations.attribute(payload, 0, *fields.values(), done))
    return Result(result)


def delete(cluster: SimCluster, name: bytes, snap_id: int = 0) -> None:
    result, _ = ask(cluster, lambda node, done: node.operations.delete_vdi(name, b"", snap_id, done))
    assert result == Result.SUCCESS
    cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")


@pytest.mark.parametrize("kills", [False, True])
def test_redundancy_changes_under_load(kills: bool) -> None:
    for seed in range(SEEDS):
        world = World(seed)
        cluster = SimCluster(world, 4)
        cluster.start_all()
        cluster.format(2)
        volume = make_volume(cluster, "shared", 3, (0, 1))
        history, errors, values = History(), dict[int, int](), [0]
        doors = [Door(cluster, f"client{number}", number) for number in range(3)]
        clients = [BlockClient(door, volume, history, values, errors) for door in doors]
        for client in clients:
            client.start()

        def live(duration_ns: int) -> None:
            end_ns = world.now_ns + duration_ns  # noqa: B023
            while world.now_ns < end_ns:  # noqa: B023
                world.run_for(5 * MILLISECOND)  # noqa: B023
                for door in doors:  # noqa: B023
                    door.watch()

        chance = world.stream("administrator")
        for copies in (3, 1, 4, 2):
            live(chance.randrange(1, 100 * MILLISECOND))
            answers: list[int] = []
            operations = cluster.machines[0].node.operations
            operations.alter_copies(volume.vid, copies, answers.append)
            if kills and copies > 2:
                machine = cluster.machines[chance.randrange(1, 4)]
                world.after(chance.randrange(20 * MILLISECOND), machine.kill)
                world.after(chance.randrange(100, 200) * MILLISECOND, machine.start)
            live(300 * MILLISECOND)
            world.run_until(partial(bool, answers), HEALTH_LIMIT_NS, "the answer")
            assert answers == [Result.SUCCESS]
            deadline_ns = world.now_ns + HEALTH_LIMIT_NS
            while kills and not cluster.healthy():
                assert world.now_ns < deadline_ns, cluster.unhealthy()
                live(10 * MILLISECOND)
        for client in clients:
            client.stopped = True
        world.run_until(lambda: all(client.idle for client in clients), HEALTH_LIMIT_NS, "answers")  # noqa: B023
        world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
        # With a single copy an object is out of reach while its node is away, and there again afterwards.
        allowed = (*NOT_NOW, LOST, *([Result.EIO] if kills else []))
        assert not {result for result in errors if result not in allowed}, f"seed {seed}: {errors}"
        history.check()
        audit(cluster)


def test_the_default_redundancy_changes_for_later_volumes() -> None:
    cluster = running(1)
    vid = new_vdi(cluster)
    assert set_attribute(cluster, b"guest", b"key") == Result.SUCCESS
    assert ask(cluster, lambda node, done: node.operations.new_epoch(done, 2)) == (Result.SUCCESS,)
    cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
    later = new_vdi(cluster, name=b"later")
    holders = {v: [m.name for m in cluster.machines if inode_oid(v) in m.disk.copies()] for v in (vid, later)}
    assert [len(holders[vid]), len(holders[later])] == [3, 2]
    cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
    audit(cluster)


def test_attributes_live_as_long_as_anything_of_their_name() -> None:
    cluster = running(2)
    first = new_vdi(cluster)
    for key in (b"one", b"two", b"three"):
        assert set_attribute(cluster, b"guest", key) == Result.SUCCESS
    assert set_attribute(cluster, b"guest", b"two", create=False, delete=True) == Result.SUCCESS
    new_vdi(cluster, first, snapshot=True)
    delete(cluster, b"guest")
    for machine in cluster.machines:
        machine.kill(power=True)
    cluster.start_all()
    cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health after a cold start")
    delete(cluster, b"guest", 1)
    assert [oid for oid in stored(cluster) if not is_inode(oid)] == []
    new_vdi(cluster)
    assert set_attribute(cluster, b"guest", b"one", create=False) == Result.NO_OBJ


def test_vmstate_goes_with_its_snapshot() -> None:
    """Also that of a savevm which never came to tell its size."""
    cluster = running(3)
    vid = new_vdi(cluster)
    gateway = cluster.machines[0].node.gateway
    for index in range(5):
        oid = vmstate_oid(vid, index)
        result, _ = wait_for(
            cluster.world,
            partial(gateway.create, oid, NO_OID, 0, b"ram", False),
        )
        assert not result
    delete(cluster, b"guest")
    assert stored(cluster) == [inode_oid(vid)]


def hyper_vdi(cluster: SimCluster, name: bytes) -> Vid:
    result, record = ask(
        cluster, lambda node, done: node.operations.create_vdi(name, 1 << 54, Vid(0), 0, 0, 1, 22, 0, done)
    )
    assert not result, Result(result)
    vid: Vid = record.vid
    return vid


def tree_node(depth: int, entries: Sequence[tuple[int, int]]) -> bytes:
    layout = "<II" if depth == LEAF_DEPTH else "<I4xQ"
    return pack("<HHI", BTREE_MAGIC, depth, len(entries)) + b"".join(pack(layout, *entry) for entry in entries)


@pytest.mark.parametrize("deep", [False, True])
def test_all_space_of_a_hyper_volume_comes_back(deep: bool) -> None:
    cluster = running(4)
    keeper = new_vdi(cluster, name=b"keeper")
    create(cluster, keeper, 0)
    write_map(cluster, keeper, 0, keeper)
    vid = hyper_vdi(cluster, b"hyper")
    indexes = [0, 7, 1 << 21, (1 << 32) - 1]
    create(cluster, vid, *indexes)
    gateway = cluster.machines[0].node.gateway
    # A malicious tree also names what belongs to others.
    leaves = [(index, vid) for index in indexes] + [(0, keeper)]
    root = tree_node(LEAF_DEPTH, leaves)
    if deep:
        node = btree_oid(vid, 1)
        others = [(5, inode_oid(keeper)), (6, data_oid(keeper, 0))]
        result, _ = wait_for(
            cluster.world,
            lambda done: gateway.create(node, ObjectId(0), 0, tree_node(LEAF_DEPTH, leaves), True, done),
        )
        assert not result
        root = tree_node(INNER_DEPTH, [(indexes[-1], node), *others])
    result, _ = wait_for(cluster.world, lambda done: gateway.write(inode_oid(vid), map_offset(0), root, True, done))
    assert not result
    for snapshot in (0, 1):
        result, _ = ask(
            cluster,
            lambda node, done, s=snapshot: node.operations.create_vdi(
                b"hyper" if s else b"clone", 1 << 54, vid, 0, 0, 1, 22, s, done
            ),
        )
        assert result == Result.INVALID_PARMS
    delete(cluster, b"hyper")
    assert [oid for oid in stored(cluster) if vid_of(oid) == vid] == [inode_oid(vid)]
    assert data_oid(keeper, 0) in stored(cluster)
    delete(cluster, b"keeper")
    assert all(is_inode(oid) for oid in stored(cluster))
    assert cluster.world.now_ns < 100 * SECOND


def test_ids_are_found_past_a_thousand_snapshots() -> None:
    table = VdiTable()
    first = table.allocate(b"name")
    assert first is not None
    for number in range(1000):
        table.put(VdiRecord(Vid(first + number), b"name", snap_ctime=1, snap_id=number + 1))
    assert table.allocate(b"name") == first + 1000
    for vid in range(1, 1 << 24):
        if vid % 8 == 0:
            table._in_use[vid >> 3] = 0xFF
    assert table.allocate(b"name") in range(1, 8)
    table._in_use[0] = 0xFF
    assert table.allocate(b"name") is None

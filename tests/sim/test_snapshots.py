"""Snapshots that are asked for at the same time as others, and as other changes of the volume."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from tests.sim.test_directed import settle
from tests.sim.test_late_map_writes import NAME, OBJECTS, create, new_vdi, running, wait_for, write_map
from tests.sim.test_volumes import stored

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.executor import Executor
from sheepdog.cluster.core.ids import NO_OID, NO_VID, NodeId, ObjectId, data_oid, inode_oid, vmstate_oid
from sheepdog.cluster.core.inode import InodeHeader, map_offset
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.part import frozen_by
from sheepdog.cluster.sim.clients import OBJECT_BYTES, block_of
from sheepdog.cluster.sim.cluster import HEALTH_LIMIT_NS, SimCluster
from sheepdog.cluster.sim.world import SECOND, World

SIZE = OBJECTS * OBJECT_BYTES


def snapshot(cluster: SimCluster, tag: bytes, answers: list[Any], by: int = 0, copies: int = 0) -> None:
    """Asks for one; what is answered comes into `answers`."""
    node = cluster.machines[by].node
    node.operations.snapshot_vdi(NAME, tag, copies, 0, lambda result, record: answers.append((tag, result, record)))


def line(cluster: SimCluster, by: int = 0) -> list[tuple[bytes, int]]:
    """Tag and size from the oldest snapshot to the working volume; each is the parent of the next."""
    records = cluster.machines[by].node.cluster.vdis.named(NAME)
    for parent, child in pairwise(records):
        assert child.parent == parent.vid, "the volume went back"
    return [(record.tag, record.size) for record in records]


def cold_start(cluster: SimCluster) -> None:
    for machine in cluster.machines:
        machine.kill(power=True)
    cluster.start_all()
    cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health after a cold start")


def test_everybody_gets_the_snapshot_that_was_asked_for() -> None:
    """Through different gateways at the same time: none of them names a base that is old by then."""
    cluster = running(5)
    new_vdi(cluster)
    answers: list[Any] = []
    tags = [b"one", b"two", b"three", b"two", b""]
    for number, tag in enumerate(tags):
        snapshot(cluster, tag, answers, number % 3)
    cluster.world.run_until(lambda: len(answers) == len(tags), HEALTH_LIMIT_NS, "answers")
    assert sorted(result for _, result, _ in answers) == [0, 0, 0, 0, Result.VDI_EXIST]
    assert {tag for tag, result, _ in answers if result} == {b"two"}
    before = line(cluster)
    assert sorted(before) == [(tag, SIZE) for tag in (b"", b"", b"one", b"three", b"two")]
    cold_start(cluster)
    assert line(cluster, 1) == before


@pytest.mark.parametrize("explicit", [False, True], ids=["snapshot", "flush"])
def test_what_was_written_before_a_snapshot_is_durable_with_it(explicit: bool) -> None:
    """Unflushed writes of several gateways; so does a flush of the volume that goes on, which depends on them."""
    cluster = running(9)
    world, gateways = cluster.world, [machine.node.gateway for machine in cluster.machines]
    vid = new_vdi(cluster)
    create(cluster, vid, 0, 1, 2)
    write_map(cluster, vid, 0, vid, vid, vid)
    for index, gateway in enumerate(gateways):
        result, _ = wait_for(world, partial(gateway.write, data_oid(vid, index), 0, block_of(index + 7), False))
        assert not result
    answers: list[Any] = []
    snapshot(cluster, b"one", answers)
    world.run_until(lambda: bool(answers), HEALTH_LIMIT_NS, "the snapshot")
    if explicit:
        heir = cluster.machines[1].node.cluster.vdis.named(NAME)[-1].vid
        assert heir != vid
        assert not wait_for(world, partial(gateways[1].flush, heir))[0]
    cold_start(cluster)
    gateway = cluster.machines[2].node.gateway
    for index in range(3):
        oid = data_oid(vid, index)
        result, data = wait_for(world, partial(gateway.raw_read, oid, 0, BLOCK_SIZE))
        assert (result, bytes(data)) == (0, block_of(index + 7)), index


def test_a_flush_covers_what_was_written_to_the_volumes_snapshots() -> None:
    """Their VM state may still be written: whoever flushes the volume that goes on has written that, too."""
    cluster = running(10)
    world, gateways = cluster.world, [machine.node.gateway for machine in cluster.machines]
    vid = new_vdi(cluster)
    states = [vmstate_oid(vid, index) for index in range(40)]  # each has a chance of 1 in 8 to be lost
    for state in states:
        assert not wait_for(world, partial(gateways[0].create, state, NO_OID, 0, b"x", True))[0]
    answers: list[Any] = []
    snapshot(cluster, b"one", answers)
    world.run_until(lambda: bool(answers), HEALTH_LIMIT_NS, "the snapshot")
    heir = cluster.machines[0].node.cluster.vdis.named(NAME)[-1].vid
    assert heir != vid
    for state in states:
        assert not wait_for(world, partial(gateways[0].write, state, 0, block_of(5), False))[0]
    assert not wait_for(world, partial(gateways[1].flush, heir))[0]
    cold_start(cluster)
    gateway = cluster.machines[2].node.gateway
    for state in states:
        result, data = wait_for(world, partial(gateway.raw_read, state, 0, BLOCK_SIZE))
        assert (result, bytes(data)) == (0, block_of(5))


def test_a_node_that_joins_meanwhile_holds_writes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """All were asked to hold them before it came; what it let through would be missing in the volume that goes on."""
    cluster = running(4)
    vid = new_vdi(cluster)
    world, late = cluster.world, cluster.machines[2]
    late.kill()
    settle(cluster, *cluster.machines[:2])
    waiting: list[Any] = []
    monkeypatch.setattr(Executor, "_flush", lambda *_: waiting.append)  # comes when all hold their writes
    answers: list[Any] = []
    snapshot(cluster, b"one", answers)
    world.run_until(lambda: bool(waiting), HEALTH_LIMIT_NS, "the freeze")
    late.start()
    settle(cluster, *cluster.machines)
    written: list[int] = []
    late.node.gateway.write(
        inode_oid(vid), map_offset(3), vid.to_bytes(4, "little"), True, lambda result, _: written.append(result)
    )
    world.run_for(SECOND)
    assert not written
    waiting[0](0)
    world.run_until(lambda: bool(answers and written), HEALTH_LIMIT_NS, "the snapshot, then the write")
    assert [result for _, result, _ in answers] == written == [Result.SUCCESS]
    heir = late.node.cluster.vdis.working(NAME)
    assert heir is not None
    assert heir.vid != vid
    _, entry = wait_for(world, lambda done: late.node.gateway.read(inode_oid(heir.vid), map_offset(3), 4, done))
    assert int.from_bytes(entry, "little") == vid


def test_a_volume_that_grows_meanwhile_stays_grown() -> None:
    cluster = running(6)
    vid = new_vdi(cluster)
    header = InodeHeader(name=NAME, vdi_size=2 * SIZE, vdi_id=vid).pack()
    answers: list[Any] = []
    grown: list[int] = []
    gateway = cluster.machines[0].node.gateway
    gateway.write(inode_oid(vid), 0, header, True, lambda result, _: grown.append(int(result)))
    snapshot(cluster, b"t", answers)
    cluster.world.run_until(lambda: bool(answers and grown), HEALTH_LIMIT_NS, "answers")
    assert (answers[0][1], grown) in ((0, [0]), (0, [Result.READONLY])), "done, or told that it was not"
    size = SIZE if grown[0] else 2 * SIZE
    assert line(cluster) == [(b"t", size), (b"", size)]
    cold_start(cluster)
    assert line(cluster) == [(b"t", size), (b"", size)]


def test_what_is_frozen_keeps_its_tag_and_size() -> None:
    """A client that read the header before still writes it back."""
    cluster = running(7)
    vid = new_vdi(cluster)
    answers: list[Any] = []
    snapshot(cluster, b"t", answers)
    cluster.world.run_until(lambda: bool(answers), HEALTH_LIMIT_NS, "the snapshot")
    gateway = cluster.machines[1].node.gateway
    for tag, size, expected in ((b"", SIZE, Result.READONLY), (b"t", 2 * SIZE, Result.READONLY), (b"t", SIZE, 0)):
        header = InodeHeader(name=NAME, tag=tag, vdi_size=size, vdi_id=vid).pack()
        result, _ = wait_for(cluster.world, partial(gateway.write, inode_oid(vid), 0, header, True))
        assert result == expected
    assert line(cluster) == [(b"t", SIZE), (b"", SIZE)]


def test_the_volume_goes_on_with_other_copies_if_asked() -> None:
    cluster = running(8)
    new_vdi(cluster)
    answers: list[Any] = []
    snapshot(cluster, b"t", answers, copies=2)
    cluster.world.run_until(lambda: bool(answers), HEALTH_LIMIT_NS, "the snapshot")
    snapshot(cluster, b"u", answers)
    cluster.world.run_until(lambda: len(answers) == 2, HEALTH_LIMIT_NS, "the snapshot")
    assert [record.copies for record in cluster.machines[0].node.cluster.vdis.named(NAME)] == [3, 2, 2]


@pytest.mark.parametrize("seed", range(4))
def test_an_inode_that_another_node_makes_again_has_no_copies_too_many(seed: int) -> None:
    """Recovery gave it as many as are usual, for the VDI table did not name it."""
    cluster = SimCluster(World(seed), 4)
    cluster.start_all()
    cluster.format(3)
    world, (first, *others) = cluster.world, cluster.machines
    new_vdi(cluster)
    snapshot(cluster, b"t", [], copies=2)
    before = stored(cluster)

    def holders() -> list[tuple[ObjectId, NodeId]]:
        up = [machine for machine in cluster.machines if machine.up]
        return [(oid, machine.id) for machine in up for oid in machine.disk.copies() if oid not in before]

    world.run_until(lambda: len(holders()) == 2, HEALTH_LIMIT_NS, "the new inode")
    first.kill()
    world.run_until(lambda: len(others[0].node.cluster.vdis.named(NAME)) == 2, HEALTH_LIMIT_NS, "the snapshot")
    world.run_for(SECOND)
    assert "home.inode_made_again" in cluster.probes()
    placement = others[0].node.context.placement
    oid = inode_oid(others[0].node.cluster.vdis.named(NAME)[-1].vid)
    belongs = sorted(placement.nodes[index] for index in placement.replicas(oid))
    assert len(belongs) == 2
    assert holders() == [(oid, node) for node in belongs]


def test_which_volume_an_operation_holds() -> None:
    cluster = running(8)
    vid = new_vdi(cluster)
    answers: list[Any] = []
    snapshot(cluster, b"one", answers)
    cluster.world.run_until(lambda: bool(answers), HEALTH_LIMIT_NS, "the snapshot")
    vdis = cluster.machines[0].node.cluster.vdis
    heir = vdis.heir(vid)
    assert heir is not None
    name = NAME.decode()
    held: dict[int, list[dict[str, Any]]] = {
        heir.vid: [
            {"op": "create", "snapshot": True, "name": name},
            {"op": "delete", "name": name, "tag": "", "snap_id": 0},
            {"op": "move", "vid": heir.vid},
            {"op": "late", "vid": vid},
        ],
        vid: [{"op": "delete", "name": name, "tag": "one", "snap_id": 0}],
        NO_VID: [
            {"op": "create", "snapshot": False, "name": name},
            {"op": "delete", "name": "unknown", "tag": "", "snap_id": 0},
            {"op": "late", "vid": heir.vid + 1},
            {"op": "sweep"},
        ],
    }
    for held_vid, operations in held.items():
        for operation in operations:
            assert frozen_by(operation, vdis) == held_vid, operation

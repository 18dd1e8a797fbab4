"""Space comes back whatever died in between: in the end exactly what something names exists, then tombstones only."""

from __future__ import annotations

import pytest
from tests.sim.test_late_map_writes import create, new_vdi, running, write_map
from tests.sim.test_volumes import ask, delete, set_attribute, stored

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.executor import Executor, Values
from sheepdog.cluster.core.ids import Vid, attribute_oid, data_oid, inode_oid, is_attribute, is_inode
from sheepdog.cluster.core.inode import HEADER_SIZE
from sheepdog.cluster.core.messages import Flag
from sheepdog.cluster.core.script import Script
from sheepdog.cluster.sim.audit import audit, audit_all_but_leaks
from sheepdog.cluster.sim.cluster import HEALTH_LIMIT_NS, SimCluster
from sheepdog.cluster.sim.nemesis import Faults
from sheepdog.cluster.sim.run import Run, Scenario
from sheepdog.cluster.sim.world import MILLISECOND

FAULTS = {
    "kills": Faults(kill=2, link=0.5, mean_ns=80 * MILLISECOND),
    "full stops": Faults(kill=1, everybody=0.4, blackout=0.2, mean_ns=200 * MILLISECOND),
}
SEEDS = 8


def delete_everything(cluster: SimCluster) -> None:
    """All volumes and snapshots, in the order of the table, through gateways in turn."""
    for turn, record in enumerate(list(cluster.machines[0].node.cluster.vdis.records())):
        if record.deleted:
            continue
        snap_id = record.snap_id if record.is_snapshot else 0

        def asked(node: object, done: object, name: bytes = record.name, snap_id: int = snap_id) -> None:
            node.operations.delete_vdi(name, b"", snap_id, done)  # type: ignore[attr-defined]

        result, _ = ask(cluster, asked, turn % len(cluster.machines))
        assert result == Result.SUCCESS
    cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")


@pytest.mark.parametrize("faults", list(FAULTS))
def test_nothing_is_left_of_what_is_deleted(faults: str) -> None:
    """Owners write, discard, snapshot, clone, delete; gateways and whole clusters die under it."""
    swept = 0
    for seed in range(SEEDS):
        scenario = Scenario(
            f"reclaim {faults}", clients=0, owners=3, objects=3, faults=FAULTS[faults], durable_chance=1.0
        )
        run = Run(scenario, seed)
        run.execute()
        cluster = run.cluster
        audit_all_but_leaks(cluster)  # also: nothing that a deleted volume made is left without a name
        delete_everything(cluster)
        left = stored(cluster)
        tombstones = [record.vid for record in cluster.machines[0].node.cluster.vdis.records()]
        assert left == [inode_oid(vid) for vid in tombstones], f"seed {seed}"
        blocks = [copy.blocks for machine in cluster.machines for copy in machine.disk.copies().values()]
        assert all(max(found, default=0) <= HEADER_SIZE // 4096 for found in blocks), "the map is not empty"
        swept += cluster.probes().get("sweep.orphans", 0)
    assert swept, "no seed left anything behind: nothing was tested"


def test_an_object_that_its_client_never_named() -> None:
    """It may be named yet, as long as its volume lives. With the volume it goes."""
    cluster = running(5)
    vid = new_vdi(cluster)
    create(cluster, vid, 0, 1, 2)
    write_map(cluster, vid, 0, vid)
    cluster.machines[2].kill()
    cluster.machines[2].start()
    cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health, and a sweep")
    assert [oid for oid in stored(cluster) if not is_inode(oid)] == [data_oid(vid, index) for index in range(3)]
    write_map(cluster, vid, 1, vid)
    delete(cluster, b"guest")
    assert stored(cluster) == [inode_oid(vid)]


def test_what_a_clone_still_names_stays() -> None:
    cluster = running(6)
    vid = new_vdi(cluster)
    create(cluster, vid, 0, 1, 2)
    write_map(cluster, vid, 0, vid, vid)
    heir = new_vdi(cluster, vid, snapshot=True)
    clone = new_vdi(cluster, vid, name=b"clone")
    delete(cluster, b"guest")
    delete(cluster, b"guest", 1)
    assert [oid for oid in stored(cluster) if not is_inode(oid)] == [data_oid(vid, 0), data_oid(vid, 1)]
    audit(cluster)
    delete(cluster, b"clone")
    assert stored(cluster) == sorted(map(inode_oid, (vid, heir, clone)))


def test_attributes_of_nothing_go() -> None:
    """Their object was made, and nobody committed it; or its name has gone while the deletion was interrupted."""
    cluster = running(9)
    vid = new_vdi(cluster)
    assert set_attribute(cluster, b"guest", b"key") == Result.SUCCESS
    (kept,) = [oid for oid in stored(cluster) if is_attribute(oid)]
    stray = attribute_oid(Vid(77), 5)
    result, _ = ask(
        cluster, lambda node, done: node.gateway.change(stray, Flag.CREATE | Flag.DURABLE, 0, 4096, b"a", 0, done)
    )
    assert result == Result.SUCCESS
    cluster.machines[1].kill()
    cluster.machines[1].start()
    cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health, and a sweep")
    assert [oid for oid in stored(cluster) if is_attribute(oid)] == [kept]
    delete(cluster, b"guest")
    assert stored(cluster) == [inode_oid(vid)]


def test_a_deletion_that_a_cold_start_could_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes that had the inode were away. The next sweep ends it."""
    cluster = running(7)
    vid = new_vdi(cluster)
    create(cluster, vid, 0, 1)
    write_map(cluster, vid, 0, vid, vid)
    nameless = bytes(256)
    result, _ = ask(
        cluster, lambda node, done: node.gateway.change(inode_oid(vid), Flag.DURABLE, 0, 0, nameless, 0, done)
    )
    assert result == Result.SUCCESS
    for machine in cluster.machines:
        machine.kill()
    monkeypatch.setattr(Executor, "_bury", lambda self, operation: out_of_reach())
    cluster.start_all()
    cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health, and a sweep")
    assert stored(cluster) == [inode_oid(vid)]
    audit(cluster)
    record = cluster.machines[0].node.cluster.vdis.get(vid)
    assert record is not None
    assert not record.is_unburied


def out_of_reach() -> Script[Values]:
    yield from ()
    return {"result": int(Result.VDI_WRITE)}

"""Short stories, each for something that random runs found wrong once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from sheepdog.cluster.core import membership
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import NodeId, data_oid
from sheepdog.cluster.core.join_rules import join_command
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.messages import PEER_VERSION, Kind
from sheepdog.cluster.core.ports import Buffer, Proven
from sheepdog.cluster.core.recovery_jobs import Job
from sheepdog.cluster.sim.clients import Volume, block_of, make_volume
from sheepdog.cluster.sim.cluster import HEALTH_LIMIT_NS, Machine, SimCluster
from sheepdog.cluster.sim.world import MILLISECOND, SECOND, WALL_START_NS, World


def fresh(machines: int, copies: int, seed: int = 1) -> tuple[SimCluster, Volume]:
    """A formatted cluster with a volume of two objects."""
    cluster = SimCluster(World(seed), machines)
    cluster.start_all()
    cluster.format(copies)
    return cluster, make_volume(cluster, "v", 2, (0,))


def write(machine: Machine, volume: Volume, value: int, durable: bool = False) -> int:
    """Writes block 0 of object 0 and waits for the answer."""
    results: list[int] = []
    oid = data_oid(volume.vid, 0)
    machine.node.gateway.write(oid, 0, block_of(value), durable, lambda result, _: results.append(result))
    machine.cluster.world.run_until(lambda: bool(results), 5 * SECOND, "write")
    return results[0]


def read(machine: Machine, volume: Volume) -> tuple[int, bytes]:
    answers: list[tuple[int, bytes]] = []

    def done(result: int, data: Buffer) -> None:
        answers.append((int(result), bytes(data)))

    machine.node.gateway.read(data_oid(volume.vid, 0), 0, BLOCK_SIZE, done)
    machine.cluster.world.run_until(lambda: bool(answers), 5 * SECOND, "read")
    return answers[0]


def holders(cluster: SimCluster, volume: Volume) -> list[Machine]:
    """Machines that object 0 belongs on in the present epoch, its home first."""
    up = next(machine for machine in cluster.machines if machine.up)
    placement = up.node.context.placement
    return [cluster.machine(placement.nodes[index]) for index in placement.replicas(data_oid(volume.vid, 0))]


def settle(cluster: SimCluster, *machines: Machine) -> None:
    """Until these machines alone are a cluster that has recovered."""

    def settled() -> bool:
        nodes = [machine.node for machine in machines]
        return all(
            node.context.epoch == nodes[0].context.epoch
            and len(node.cluster.members) == len(nodes)
            and node.home is not None
            and node.home.active
            and not node.home.recovery.unfinished
            for node in nodes
        )

    cluster.world.run_until(settled, HEALTH_LIMIT_NS, "recovery")


@contextmanager
def killed_at_fetch(cluster: SimCluster, copier: Machine, *doomed: Machine) -> Iterator[None]:
    """The body starts the machines; when `copier` begins to fetch what it lacks, `doomed` die."""

    def trap(sender: NodeId, receiver: NodeId, kind: int) -> None:
        if kind == Kind.FETCH and sender == copier.id and doomed[0].up:
            for machine in doomed:
                cluster.world.after(0, machine.kill)

    cluster.fabric.trap = trap
    yield
    cluster.world.run_until(lambda: doomed[0].up, SECOND, "start")
    cluster.world.run_until(lambda: not doomed[0].up, 5 * SECOND, "a fetch")
    cluster.fabric.trap = None


def test_a_node_that_leaves_answers_nothing_any_more() -> None:
    cluster, volume = fresh(3, 3)
    leaving, other, _ = cluster.machines
    assert write(other, volume, 1) == Result.SUCCESS
    answers: list[int] = []
    leaving.node.stop(lambda: None)  # the process stays: its disk is slow
    settle(cluster, *cluster.machines[1:])
    assert write(other, volume, 2) == Result.SUCCESS
    leaving.node.gateway.read(data_oid(volume.vid, 0), 0, BLOCK_SIZE, lambda result, _: answers.append(result))
    cluster.world.run_for(SECOND)
    assert not answers


@pytest.mark.parametrize("seed", range(5))
def test_a_restart_before_the_death_is_noticed(seed: int) -> None:
    """The leave of the old process must not strike out the new one."""
    cluster, _ = fresh(3, 3, seed)
    for machine in cluster.machines:
        machine.kill()
        cluster.world.run_for(seed * MILLISECOND)
        machine.start()
        cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")


def test_a_node_of_another_version_is_refused_and_the_others_serve_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """They could not hear what it holds, and would wait for that for ever."""
    cluster, volume = fresh(3, 3)
    *others, last = cluster.machines
    last.kill()
    settle(cluster, *others)

    def another(*words: Any) -> dict[str, Any]:
        return join_command(*words) | {"protocol": PEER_VERSION + 1}

    with monkeypatch.context() as patch:
        patch.setattr(membership, "join_command", another)
        last.start()
        cluster.world.run_until(lambda: bool(last.exits), SECOND, "a refusal")
        status, reason = last.exits[0]
        assert (status, reason.split(";")[0]) == (
            1,
            f"failed to join Sheepdog: it speaks version {PEER_VERSION + 1} of the protocol between sheep, "
            f"the cluster {PEER_VERSION}",
        )
        assert write(others[0], volume, 1) == Result.SUCCESS
        assert read(others[1], volume) == (Result.SUCCESS, block_of(1))
    cluster.world.run_until(lambda: last.up, SECOND, "a start of the right version")
    settle(cluster, *cluster.machines)
    assert read(last, volume) == (Result.SUCCESS, block_of(1))


@pytest.mark.parametrize("seed", range(5))
def test_a_format_is_durable_when_it_is_answered(seed: int) -> None:
    """Then power fails everywhere: it must not come back as a cluster that was never formatted."""
    cluster = SimCluster(World(seed), 3)
    cluster.start_all()
    cluster.world.run_until(cluster.all_joined, HEALTH_LIMIT_NS, "all nodes join")
    results: list[int] = []
    cluster.machines[0].node.operations.format(WALL_START_NS, 2, 0, 4, 20, "plain", results.append)
    cluster.world.run_until(lambda: bool(results), HEALTH_LIMIT_NS, "format")
    assert results == [Result.SUCCESS]
    for machine in cluster.machines:
        machine.kill(power=True)
    cluster.start_all()
    cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
    assert all(machine.node.cluster.ctime == WALL_START_NS for machine in cluster.machines)


def only_an_old_copy(cluster: SimCluster, volume: Volume) -> tuple[Machine, Machine]:
    """Of two machines the one that is up has 1 in object 0, and the one that is down, which comes second, has 2."""
    home, replica = holders(cluster, volume)
    assert write(home, volume, 1) == Result.SUCCESS
    replica.kill()
    settle(cluster, home)
    assert write(home, volume, 2) == Result.SUCCESS
    # The replica is back, and before it is restored the only node with the newer bytes is gone.
    cluster.fabric.break_link((min(home.id, replica.id), max(home.id, replica.id)), SECOND // 2)
    replica.start()
    cluster.world.run_until(lambda: replica.serves() and len(replica.node.cluster.members) == 2, SECOND, "join")
    home.kill()
    cluster.world.run_until(lambda: len(replica.node.cluster.members) == 1, SECOND, "death noticed")
    return replica, home


def test_old_copies_are_not_shown_when_all_newer_ones_are_away() -> None:
    cluster, volume = fresh(2, 2)
    replica, home = only_an_old_copy(cluster, volume)
    assert read(replica, volume)[0] == Result.EIO
    assert replica.node.context.probes["home.object_lost"]
    home.start()
    settle(cluster, home, replica)
    assert read(replica, volume) == (Result.SUCCESS, block_of(2))


def test_a_node_with_new_disks_is_no_witness() -> None:
    """What it held when a node was away, it does not know any more: that node's older copy must not be shown."""
    cluster, volume = fresh(3, 2)
    world = cluster.world
    newer, older = holders(cluster, volume)
    third = next(machine for machine in cluster.machines if machine not in (newer, older))
    assert write(newer, volume, 1) == Result.SUCCESS
    older.kill()
    settle(cluster, newer, third)
    assert write(newer, volume, 2) == Result.SUCCESS
    cluster.fabric.break_link((min(newer.id, older.id), max(newer.id, older.id)), 4 * SECOND)  # nothing is restored
    older.start()
    world.run_until(lambda: older.serves() and len(older.node.cluster.members) == 3, SECOND, "join")
    third.kill(power=True)
    third.replace_disk()
    world.run_until(lambda: len(older.node.cluster.members) == 2, SECOND, "death noticed")
    third.start()
    world.run_until(lambda: third.serves() and len(older.node.cluster.members) == 3, SECOND, "join")
    newer.kill()
    world.run_until(lambda: len(older.node.cluster.members) == 2, SECOND, "death noticed")
    assert read(older, volume)[0] == Result.EIO
    newer.start()
    settle(cluster, *cluster.machines)
    assert read(older, volume) == (Result.SUCCESS, block_of(2))


def test_an_object_that_nobody_here_has_heard_of_is_not_absent() -> None:
    """Its copies are on nodes that are down: that is an error, not a hole."""
    cluster, volume = fresh(4, 2)
    wanted = holders(cluster, volume)
    others = [machine for machine in cluster.machines if machine not in wanted]
    assert write(wanted[0], volume, 1) == Result.SUCCESS
    for machine in wanted:
        machine.kill()
    settle(cluster, *others)
    assert read(others[0], volume)[0] == Result.EIO
    for machine in wanted:
        machine.start()
    cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
    assert read(others[0], volume) == (Result.SUCCESS, block_of(1))


def test_forced_recovery_takes_what_is_there() -> None:
    """The node with the newest bytes is gone for good: an administrator says so."""
    cluster, volume = fresh(2, 2)
    home, replica = holders(cluster, volume)
    assert write(home, volume, 1) == Result.SUCCESS
    replica.kill()
    settle(cluster, home)
    assert write(home, volume, 2) == Result.SUCCESS
    home.kill()
    replica.start()
    cluster.world.run_for(SECOND)
    results: list[Result] = []
    replica.node.gateway.read(data_oid(volume.vid, 0), 0, 1, lambda result, _: results.append(Result(result)))
    assert results.pop() == Result.WAIT_FOR_JOIN
    replica.node.operations.force_recover(results.append)
    cluster.world.run_until(lambda: bool(results), SECOND, "force")
    assert results == [Result.SUCCESS]
    settle(cluster, replica)
    assert read(replica, volume) == (Result.SUCCESS, block_of(1))


def test_a_client_that_missed_a_snapshot_and_its_deletion_goes_on() -> None:
    """It writes to a VDI that was frozen and deleted since: READONLY makes it look for the one that goes on."""
    cluster, volume = fresh(3, 3)
    operations = cluster.machines[0].node.operations
    done: list[Result] = []
    size = volume.objects << 20
    operations.create_vdi(b"v", size, volume.vid, 0, 0, 0, 20, 1, lambda result, _: done.append(result))
    cluster.world.run_until(lambda: bool(done), SECOND, "snapshot")
    operations.delete_vdi(b"v", b"", 1, lambda result, _: done.append(result))
    cluster.world.run_until(lambda: len(done) == 2, SECOND, "deletion of the snapshot")
    assert done == [Result.SUCCESS, Result.SUCCESS]
    assert write(cluster.machines[1], volume, 1) == Result.READONLY


def silenced(cluster: SimCluster) -> tuple[Machine, Machine, Machine]:
    """The coordinator, which is stopped now, another member, and one that is killed; nobody asks for anything, and what
    was asked is known to be everywhere: else the coordinator might have what no other node has."""
    coordinator = next(machine for machine in cluster.machines if machine.node.machine.is_coordinator())
    other, victim = (machine for machine in cluster.machines if machine is not coordinator)
    cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
    cluster.world.run_for(SECOND)
    coordinator.pause(HEALTH_LIMIT_NS)
    victim.kill()
    cluster.world.run_for(SECOND)
    return coordinator, other, victim


def test_a_newcomer_does_not_wait_for_a_stopped_coordinator() -> None:
    """Nobody has a request open there, and it counts as alive: the others have to look after it all the same."""
    cluster, _ = fresh(3, 3)
    coordinator, other, victim = silenced(cluster)
    victim.start()
    cluster.world.run_until(lambda: victim.node.machine.joined, 10 * SECOND, "the newcomer joins")
    settle(cluster, other, victim)
    cluster.world.run_until(cluster.healthy, 2 * HEALTH_LIMIT_NS, "health when it goes on")
    assert coordinator.up


def test_a_death_does_not_wait_for_a_stopped_coordinator() -> None:
    cluster, volume = fresh(3, 3)
    _, other, _ = silenced(cluster)
    cluster.world.run_until(lambda: len(other.node.cluster.members) == 1, 10 * SECOND, "both are struck out")
    settle(cluster, other)
    assert write(other, volume, 1) == Result.SUCCESS


def test_a_stopped_coordinator_stays_if_it_may_hold_the_only_copy() -> None:
    """Of two copies, one is on a node that is gone."""
    cluster, _ = fresh(3, 2)
    _, other, victim = silenced(cluster)
    victim.start()
    cluster.world.run_for(20 * SECOND)
    assert not victim.node.machine.joined
    assert len(other.node.cluster.members) == 3
    cluster.world.run_until(cluster.healthy, 2 * HEALTH_LIMIT_NS, "health when it goes on")


def test_a_strip_that_was_to_be_made_anew_stays_so_after_a_restart() -> None:
    """2:1. The other strips become one state with a new version, then all are killed, and one of those is away."""
    cluster = SimCluster(World(3), 3)
    cluster.start_all()
    cluster.format(2)
    volume = make_volume(cluster, "coded", 1, (0,), policy=0x11)
    world, second_unit = cluster.world, 64 * 1024
    world.run_until(cluster.healthy, SECOND, "strips are level")
    first, stale, parity = holders(cluster, volume)  # strips 0, 1 and 2
    stale.kill()
    settle(cluster, first, parity)
    results: list[int] = []
    gateway = first.node.gateway
    gateway.write(data_oid(volume.vid, 0), second_unit, block_of(2), False, lambda result, _: results.append(result))
    world.run_until(lambda: bool(results), SECOND, "write")
    assert results == [Result.SUCCESS]

    killed: list[Machine] = []

    def trap(sender: NodeId, receiver: NodeId, kind: int) -> None:
        if kind == Kind.PULL and not killed:  # the others have agreed
            killed.extend(cluster.machines)
            for machine in killed:
                world.after(0, machine.kill)

    cluster.fabric.trap = trap
    stale.start()
    world.run_until(lambda: bool(killed), SECOND, "a strip is to be made anew")
    world.run_for(MILLISECOND)
    cluster.fabric.trap = None
    for other in (first, stale):
        cluster.fabric.break_link((min(other.id, parity.id), max(other.id, parity.id)), SECOND)
    cluster.start_all()
    world.run_until(cluster.all_joined, SECOND, "a cold start")
    parity.kill()
    settle(cluster, first, stale)

    def look() -> tuple[int, bytes]:
        answers: list[tuple[int, bytes]] = []
        first.node.gateway.read(
            data_oid(volume.vid, 0), second_unit, BLOCK_SIZE, lambda result, data: answers.append((result, bytes(data)))
        )
        world.run_until(lambda: bool(answers), 5 * SECOND, "read")
        return answers[0]

    assert look()[0] == Result.EIO
    parity.start()
    world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
    assert look() == (Result.SUCCESS, block_of(2))


@pytest.mark.parametrize("planted", [False, True], ids=["as it is", "read while another replica is stale"])
def test_what_was_read_is_not_taken_back(planted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that nobody heard of is on the home only, when an epoch ends; then the home dies, too."""
    if planted:
        monkeypatch.setattr(Job, "holds_read", lambda self, me: me in self.targets)
    cluster, volume = fresh(3, 2)
    world, oid = cluster.world, data_oid(volume.vid, 0)
    home, replica = holders(cluster, volume)
    third = next(machine for machine in cluster.machines if machine not in (home, replica))
    pair = min(home.id, replica.id), max(home.id, replica.id)
    assert write(home, volume, 1) == Result.SUCCESS
    cluster.fabric.break_link(pair, SECOND // 10)
    home.node.gateway.write(oid, 0, block_of(2), False, lambda result, _: None)
    world.run_for(5 * MILLISECOND)

    def trap(sender: NodeId, receiver: NodeId, kind: int) -> None:
        if kind == Kind.PULL:
            cluster.fabric.break_link(pair, 4 * SECOND)

    cluster.fabric.trap = trap
    third.kill()
    world.run_until(lambda: home.node.home is not None and bool(home.node.home.recovery.unfinished), SECOND, "peering")
    answers: list[bytes] = []
    home.node.gateway.read(oid, 0, BLOCK_SIZE, lambda _, data: answers.append(bytes(data)))
    world.run_for(20 * MILLISECOND)
    home.kill()
    world.run_until(lambda: len(replica.node.cluster.members) == 1, SECOND, "death noticed")
    later = read(replica, volume)
    assert later == (Result.SUCCESS, block_of(1))
    assert answers == ([block_of(2)] if planted else [])


def test_a_node_that_began_to_copy_an_object_is_told_that_it_exists() -> None:
    """Its own disk cannot tell after a restart. What the others said must count when it is alone with its word."""
    cluster, volume = fresh(3, 3)
    world = cluster.world
    assert write(cluster.machines[0], volume, 1) == Result.SUCCESS
    home, last, other = holders(cluster, volume)
    home.kill()
    other.kill()
    settle(cluster, last)
    assert write(last, volume, 2) == Result.SUCCESS
    last.kill()

    with killed_at_fetch(cluster, home, last):  # the node with the only current copy
        for machine in (home, other):
            machine.start()
            world.run_for(100 * MILLISECOND)
        last.start()
    settle(cluster, home, other)
    home.kill()
    settle(cluster, other)
    home.start()
    settle(cluster, home, other)
    world.run_for(SECOND)  # both have heard
    other.kill()
    settle(cluster, home)
    assert read(home, volume)[0] == Result.EIO
    other.start()
    settle(cluster, home, other)
    last.start()
    world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
    assert read(other, volume) == (Result.SUCCESS, block_of(2))


def test_a_node_that_began_to_make_a_strip_is_told_that_the_object_exists() -> None:
    """As with whole copies; here the object is lost to two nodes of 2:1, since one of them was making its strip."""
    cluster = SimCluster(World(1), 3)
    cluster.start_all()
    cluster.format(3)
    volume = make_volume(cluster, "v", 2, (0,), policy=0x11)
    world = cluster.world
    assert write(cluster.machines[0], volume, 1) == Result.SUCCESS
    unsure, source, other = holders(cluster, volume)
    unsure.kill()
    settle(cluster, source, other)
    assert write(source, volume, 2) == Result.SUCCESS
    source.kill()
    other.kill()

    with killed_at_fetch(cluster, unsure, unsure, source):
        cluster.start_all()
    settle(cluster, other)
    unsure.start()
    settle(cluster, other, unsure)
    world.run_for(SECOND)  # both have heard
    other.kill()
    settle(cluster, unsure)
    assert read(unsure, volume)[0] == Result.EIO
    source.start()
    settle(cluster, unsure, source)
    other.start()
    world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
    assert read(unsure, volume) == (Result.SUCCESS, block_of(2))


@pytest.mark.parametrize("loses", [True, False], ids=["disk lost", "disk kept"])
def test_a_node_that_lost_a_disk_while_it_was_down_vouches_for_no_older_copy(loses: bool) -> None:
    """Nobody else has the last write: an I/O error, until a disk with it is there; what is still here is served."""
    cluster, volume = fresh(2, 2)
    first, second = cluster.machines
    oid, other = data_oid(volume.vid, 0), data_oid(volume.vid, 1)
    for value, machine in ((1, first), (2, second)):
        assert write(machine, volume, value) == Result.SUCCESS
        if machine is first:
            first.kill()
            settle(cluster, second)
    results: list[int] = []
    second.node.gateway.write(other, 0, block_of(3), False, lambda result, _: results.append(result))
    cluster.world.run_until(lambda: bool(results), SECOND, "write")
    second.kill()
    if loses:
        del second.disk.objects[oid]
        second.state.proven = Proven()
    for machine in (second, first):
        machine.start()
        cluster.world.run_until(lambda: machine.up, SECOND, "start")  # noqa: B023
    settle(cluster, first, second)
    assert read(first, volume) == ((Result.EIO, b"") if loses else (Result.SUCCESS, block_of(2)))
    first.kill()
    settle(cluster, second)
    copy = second.node.context.store.version(other)
    assert copy is not None
    answers: list[int] = []
    second.node.gateway.read(other, 0, BLOCK_SIZE, lambda result, data: answers.append(result))
    cluster.world.run_until(lambda: bool(answers), SECOND, "read")
    assert answers == [Result.SUCCESS]


def test_a_node_that_lost_a_disk_while_it_was_down_takes_nothing_for_deleted() -> None:
    """With one copy of each object: those that were on the disk are known by nobody, and are no zeros."""
    cluster, volume = fresh(2, 1)
    assert write(cluster.machines[0], volume, 1) == Result.SUCCESS
    (holder,) = holders(cluster, volume)
    (other,) = [machine for machine in cluster.machines if machine is not holder]
    holder.kill()
    settle(cluster, other)
    del holder.disk.objects[data_oid(volume.vid, 0)]
    holder.state.proven = Proven()
    holder.start()
    cluster.world.run_until(lambda: holder.up, SECOND, "start")
    settle(cluster, holder, other)
    assert read(other, volume)[0] == Result.EIO
    assert write(other, volume, 2) == Result.EIO

"""Writes and creations whose gateway holds a copy: it counts the copies itself, and its home hears of that later."""

from __future__ import annotations

from typing import Any

import pytest
from tests.sim.test_directed import fresh, holders, read, settle, write

import sheepdog.cluster.core.router as router_module
from sheepdog.cluster.core.errors import NoSpace, Result
from sheepdog.cluster.core.ids import NO_OID, NodeId, data_oid
from sheepdog.cluster.core.limits import BLOCK_SIZE, LATE_NS
from sheepdog.cluster.core.messages import Flag, Kind, Message
from sheepdog.cluster.core.ports import Buffer
from sheepdog.cluster.core.router import Request, Router
from sheepdog.cluster.sim.clients import Volume, block_of
from sheepdog.cluster.sim.cluster import Machine, SimCluster
from sheepdog.cluster.sim.world import SECOND

ALL = 3  # copies


def quiet() -> tuple[SimCluster, Volume, list[Machine]]:
    """A cluster that sends nothing by itself, with the home of object 0 and the two other replicas."""
    cluster, volume = fresh(ALL, ALL)
    cluster.world.run_for(SECOND)
    return cluster, volume, holders(cluster, volume)


def is_writing(home: Machine, volume: Volume) -> bool:
    assert home.node.home is not None
    return home.node.home.is_writing(data_oid(volume.vid, 0))


@pytest.mark.parametrize("durable", [False, True])
def test_the_answer_does_not_wait_for_the_home(durable: bool) -> None:
    cluster, volume, (home, gateway, _) = quiet()
    assert write(gateway, volume, 1, durable) == Result.SUCCESS
    assert is_writing(home, volume)
    cluster.world.run_for(4 * LATE_NS)
    assert not is_writing(home, volume)
    assert not gateway.node.context.peers.busy()
    assert not home.node.context.peers.busy()


def test_each_write_is_answered_once() -> None:
    cluster, volume, (_, gateway, _) = quiet()
    answers: list[int] = []
    oid = data_oid(volume.vid, 0)
    for value in range(8):
        gateway.node.gateway.write(oid, 0, block_of(value), False, lambda result, _: answers.append(result))
    cluster.world.run_for(SECOND)
    assert answers == [Result.SUCCESS] * 8


def test_what_is_not_told_the_home_tells() -> None:
    cluster, volume, (home, gateway, third) = quiet()
    cluster.fabric.hold((third.id, gateway.id), SECOND)
    before = cluster.world.now_ns
    assert write(gateway, volume, 1) == Result.SUCCESS
    assert not is_writing(home, volume)
    assert cluster.world.now_ns - before < SECOND // 2


def test_a_replica_that_refuses_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    _, volume, (_, gateway, third) = quiet()

    def refuse(*words: Any) -> bool:
        words[-1](NoSpace("full"))
        return False

    monkeypatch.setattr(third.node.context.store, "write", refuse)
    assert write(gateway, volume, 1) == Result.NO_SPACE


def test_a_read_of_it_elsewhere_does_not_wait_for_the_next_message() -> None:
    cluster, volume, (home, gateway, third) = quiet()
    for reader in (home, third):
        assert write(gateway, volume, 1) == Result.SUCCESS
        assert is_writing(home, volume)
        before = cluster.world.now_ns
        assert read(reader, volume) == (Result.SUCCESS, block_of(1))
        assert cluster.world.now_ns - before < LATE_NS // 2
        cluster.world.run_for(SECOND)


def test_its_gateway_reads_it_from_its_own_copy() -> None:
    cluster, volume, (_, gateway, _) = quiet()
    kinds: list[int] = []

    def trap(sender: NodeId, _: NodeId, kind: int) -> None:
        if sender == gateway.id:
            kinds.append(kind)

    assert write(gateway, volume, 1) == Result.SUCCESS
    cluster.fabric.trap = trap
    assert read(gateway, volume) == (Result.SUCCESS, block_of(1))
    assert Kind.READ not in kinds


def test_what_waits_to_be_sent_again_is_sent_once_in_a_new_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice, a creation would undo what was written after the first."""
    monkeypatch.setattr(router_module, "RETRY_DELAY_NS", 2 * SECOND)
    cluster, volume, (home, gateway, third) = quiet()
    router = gateway.node.gateway.router
    request = Request(router, 1 << 40, False, data_oid(volume.vid, 0), 0, 0, 0, b"", 0, lambda *_: None)
    route, epochs = Router._route, list[int]()

    def routed(self: Router, one: Request) -> None:
        if one is request:
            epochs.append(self.context.epoch)
        else:
            route(self, one)

    monkeypatch.setattr(Router, "_route", routed)
    router.pending[request.number] = request
    router.later(request)
    third.kill()
    settle(cluster, home, gateway)
    cluster.world.run_for(3 * SECOND)
    assert epochs == [gateway.node.context.epoch]


def unmade() -> tuple[SimCluster, Volume, list[Machine]]:
    """As `quiet`, and object 0 is not there."""
    cluster, volume, machines = quiet()
    removed: list[int] = []
    machines[0].node.gateway.remove(data_oid(volume.vid, 0), lambda result, _: removed.append(result))
    cluster.world.run_until(lambda: bool(removed), SECOND, "removal")
    cluster.world.run_for(SECOND)
    return cluster, volume, machines


def create(gateway: Machine, volume: Volume, value: int, durable: bool = False) -> int:
    """Makes object 0 with this in its block 0, and waits for the answer."""
    results: list[int] = []
    oid = data_oid(volume.vid, 0)
    gateway.node.gateway.create(oid, NO_OID, 0, block_of(value), durable, lambda result, _: results.append(result))
    gateway.cluster.world.run_until(lambda: bool(results), 5 * SECOND, "creation")
    return results[0]


@pytest.mark.parametrize("durable", [False, True])
def test_a_creation_does_not_wait_for_the_home(durable: bool) -> None:
    cluster, volume, (home, gateway, third) = unmade()
    assert create(gateway, volume, 1, durable) == Result.SUCCESS
    assert is_writing(home, volume)
    assert read(gateway, volume) == (Result.SUCCESS, block_of(1))
    assert is_writing(home, volume), "its gateway reads its own copy"
    assert read(third, volume) == (Result.SUCCESS, block_of(1))
    assert not is_writing(home, volume)
    cluster.world.run_for(SECOND)
    assert not gateway.node.context.peers.busy()
    assert not home.node.context.peers.busy()


def test_what_follows_a_creation_does_not_wait_for_the_next_message() -> None:
    """A write of an object that may yet be unmade waits until its home knows that it is not."""
    cluster, volume, (home, gateway, _) = unmade()
    assert create(gateway, volume, 1) == Result.SUCCESS
    assert is_writing(home, volume)
    before = cluster.world.now_ns
    assert write(gateway, volume, 2) == Result.SUCCESS
    assert cluster.world.now_ns - before < LATE_NS // 2
    assert cluster.probes()["home.waits_for_creation"] == 1
    assert read(gateway, volume) == (Result.SUCCESS, block_of(2))


def test_what_its_gateway_has_counted_outlives_its_home() -> None:
    cluster, volume, (home, gateway, third) = unmade()
    assert create(gateway, volume, 1) == Result.SUCCESS
    assert is_writing(home, volume)
    home.kill()
    settle(cluster, gateway, third)
    assert read(third, volume) == (Result.SUCCESS, block_of(1))
    assert read(gateway, volume) == (Result.SUCCESS, block_of(1))


@pytest.mark.parametrize("full", [0, 1, 2])
def test_a_creation_that_one_copy_refuses_is_undone(full: int) -> None:
    cluster, volume, machines = unmade()
    disk = machines[full].disk
    disk.fault_chance, disk.fault = 1.0, NoSpace
    assert create(machines[1], volume, 1) == Result.NO_SPACE
    disk.heal()
    cluster.world.run_for(SECOND)
    assert not any(data_oid(volume.vid, 0) in machine.disk.copies() for machine in machines)


def test_a_copy_that_takes_the_place_of_a_bad_one_is_not_counted() -> None:
    """Whoever could not tell what was here before lets the home decide."""
    cluster, volume, (_, gateway, third) = unmade()
    third.node.replica.missing[data_oid(volume.vid, 0)] = None
    kinds: list[int] = []

    def trap(sender: NodeId, receiver: NodeId, kind: int) -> None:
        if (sender, receiver) == (third.id, gateway.id):
            kinds.append(kind)

    cluster.fabric.trap = trap
    assert create(gateway, volume, 1) == Result.SUCCESS
    assert Kind.APPLIED not in kinds
    assert read(third, volume) == (Result.SUCCESS, block_of(1))


def test_what_makes_nothing_is_answered_at_once() -> None:
    """Of an object that is there already, and stays as it is, no copy tells anything."""
    cluster, volume, (_, gateway, _) = quiet()
    results: list[int] = []
    flags, size = Flag.CREATE | Flag.ONLY_NEW, BLOCK_SIZE
    before = cluster.world.now_ns
    gateway.node.gateway.change(data_oid(volume.vid, 0), flags, 0, size, b"", 0, lambda r, _: results.append(r))
    cluster.world.run_until(lambda: bool(results), SECOND, "an answer")
    assert results == [Result.SUCCESS]
    assert cluster.world.now_ns - before < LATE_NS // 2


class _Counted:
    """A write at a gateway that was sent to its home, and what it is told of it."""

    def __init__(self) -> None:
        _, volume, (home, gateway, third) = quiet()
        self.home, self.gateway, self.third = home.id, gateway, third.id
        self.answers: list[int] = []
        self.router = gateway.node.gateway.router
        self.number = 1 << 40
        self.router.pending[self.number] = Request(
            self.router, self.number, False, data_oid(volume.vid, 0), 0, 0, 0, b"", 0, self._answered
        )

    def _answered(self, result: int, _: Buffer) -> None:
        self.answers.append(result)

    def told(self, node: NodeId, sequence: int, replicas: int = 0) -> None:
        index_of = self.gateway.node.context.placement.index_of
        self.router.applied(index_of[node], self.number, sequence, replicas)


def test_only_one_attempt_is_counted() -> None:
    """What an earlier one brought to a copy may be gone."""
    write = _Counted()
    write.told(write.home, 5)
    write.told(write.third, 5)
    write.told(write.gateway.id, 6, ALL)
    write.told(write.home, 6)
    write.told(write.home, 6)
    write.told(write.third, 5)
    assert not write.answers
    write.told(write.third, 6)
    write.told(write.third, 6)
    assert write.answers == [Result.SUCCESS]


def test_what_an_epoch_that_is_over_told_is_not_counted() -> None:
    write = _Counted()
    context, dispatch = write.gateway.node.context, write.gateway.node.dispatch
    write.told(write.gateway.id, 5, ALL)
    write.told(write.home, 5)
    dispatch.on_applied(write.third, context.fence - 1, [write.number, 5])
    dispatch.on_applied(NodeId(bytes(16), 1), context.fence, [write.number, 5])
    dispatch.on_message(write.third, Message(Kind.APPLIED, context.fence - 1, origin=write.number, sequence=5))
    assert not write.answers
    dispatch.on_applied(write.third, context.fence, [write.number, 5])
    assert write.answers == [Result.SUCCESS]

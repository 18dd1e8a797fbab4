"""Strips that are well by themselves and do not fit each other: one pass of the scrub makes the right ones anew."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from sheepdog.cluster.core.erasure import PlainCoder, Policy
from sheepdog.cluster.core.ids import ObjectId, data_oid, strip_of
from sheepdog.cluster.core.messages import Buffer
from sheepdog.cluster.core.strip_check import Checked, StripCheck, misfits
from sheepdog.cluster.sim.audit import audit
from sheepdog.cluster.sim.clients import OBJECT_BYTES, Volume, make_volume
from sheepdog.cluster.sim.cluster import Machine, SimCluster
from sheepdog.cluster.sim.world import SECOND, World

NODES = 6
P42, P41 = 0x22, 0x21
OBJECTS = 2


def written(policy: int, seed: int = 0) -> tuple[SimCluster, Volume, list[bytes]]:
    cluster = SimCluster(World(seed or policy), NODES)
    cluster.start_all()
    cluster.format(3)
    volume = make_volume(cluster, "v", OBJECTS, (), policy=policy)
    contents = [Random(index).randbytes(OBJECT_BYTES) for index in range(OBJECTS)]
    for index, data in enumerate(contents):
        write(cluster.machines[0], data_oid(volume.vid, index), 0, data)
    cluster.world.run_for(SECOND)
    return cluster, volume, contents


def write(machine: Machine, oid: ObjectId, offset: int, data: bytes) -> None:
    results: list[int] = []
    machine.node.gateway.write(oid, offset, data, True, lambda result, _: results.append(int(result)))
    machine.cluster.world.run_until(lambda: bool(results), 20 * SECOND, "write")
    assert results == [0]


def read(machine: Machine, oid: ObjectId) -> bytes:
    answers: list[tuple[int, bytes]] = []

    def done(result: int, data: Buffer) -> None:
        answers.append((int(result), bytes(data)))

    machine.node.gateway.read(oid, 0, OBJECT_BYTES, done)
    machine.cluster.world.run_until(lambda: bool(answers), 20 * SECOND, "read")
    assert answers[0][0] == 0
    return answers[0][1]


def spoil(cluster: SimCluster, oid: ObjectId, strip: int, block: int) -> None:
    """Other bytes, as they would be after a lost write: with the hash that fits them."""
    placement = cluster.machines[0].node.context.placement
    machine = cluster.machine(placement.nodes[placement.replicas(oid)[strip]])
    machine.disk.copies()[strip_of(oid, strip)].blocks[block] = bytes([block + 1]) * 4096


def scrub(cluster: SimCluster) -> int:
    """One pass of all nodes; how many strips did not fit."""
    passes = [machine.node.scrub.passes for machine in cluster.machines]
    for machine in cluster.machines:
        assert machine.node.scrub.schedule(0, 1 << 30)
        machine.node.scrub.start()

    def ended() -> bool:
        return [machine.node.scrub.passes - 1 for machine in cluster.machines] == passes

    cluster.world.run_until(ended, 600 * SECOND, "one pass")
    cluster.world.run_until(cluster.healthy, 60 * SECOND, "health")
    assert all(machine.node.scrub.found == 0 for machine in cluster.machines), "every hash is right"
    return sum(machine.node.scrub.misfits for machine in cluster.machines)


@pytest.mark.parametrize("strips", [(4,), (5,), (4, 5), (2,)], ids=str)
def test_a_pass_makes_the_strip_anew_that_is_wrong(strips: tuple[int, ...]) -> None:
    cluster, volume, contents = written(P42)
    oid = data_oid(volume.vid, 1)
    assert scrub(cluster) == 0, "nothing is wrong yet"
    for strip in strips:
        spoil(cluster, oid, strip, 20)
    assert scrub(cluster) == len(strips)
    audit(cluster)  # all strips fit now
    assert read(cluster.machines[0], oid) == contents[1]
    assert scrub(cluster) == 0


def test_with_one_parity_strip_the_data_count() -> None:
    cluster, volume, contents = written(P41)
    spoil(cluster, data_oid(volume.vid, 0), 4, 3)
    assert scrub(cluster) == 1
    audit(cluster)
    assert [read(cluster.machines[1], data_oid(volume.vid, index)) for index in range(OBJECTS)] == contents


@pytest.mark.parametrize("seed", [1, 7])
def test_writes_meanwhile_are_never_taken_for_misfits(seed: int) -> None:
    """Also where a strip's read ends only when the next write is on its way."""
    cluster, volume, _ = written(P42, seed)
    random = Random(7)
    for machine in cluster.machines:
        assert machine.node.scrub.schedule(0, 64 << 20)
        machine.node.scrub.start()
    under_way: list[None] = []
    done = 0

    def ended(result: int, _: Buffer) -> None:
        nonlocal done
        assert result == 0
        under_way.pop()
        done += 1

    while any(machine.node.scrub.state == "running" for machine in cluster.machines):
        while len(under_way) < 8:
            under_way.append(None)
            length = random.choice((100, 4096, 70_000))
            oid = data_oid(volume.vid, random.randrange(OBJECTS))
            offset = random.randrange(OBJECT_BYTES - length)
            random.choice(cluster.machines).node.gateway.write(oid, offset, random.randbytes(length), False, ended)
        cluster.world.run_for(SECOND // 1000)
    cluster.world.run_until(lambda: not under_way, 20 * SECOND, "the last writes")
    assert done > 100
    assert sum(machine.node.scrub.misfits for machine in cluster.machines) == 0
    cluster.world.run_until(cluster.healthy, 60 * SECOND, "health")
    audit(cluster)


def test_an_epoch_that_ends_meanwhile_ends_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A home that has asked for strips and is not answered goes on after a while."""
    cluster, _, _ = written(P42)
    waiting: dict[int, Machine] = {}
    check = StripCheck.check

    def watched(self: StripCheck, oid: ObjectId, offset: int, size: int, done: Callable[[Checked], None]) -> None:
        number = len(waiting)
        waiting[number] = next(
            one for one in cluster.machines if one.process is not None and one.node.context is self._context
        )

        def answered(found: Checked) -> None:
            del waiting[number]
            done(found)

        check(self, oid, offset, size, answered)

    monkeypatch.setattr(StripCheck, "check", watched)
    for machine in cluster.machines:
        machine.node.scrub.start()
    while not waiting:
        cluster.world.run_for(SECOND // 100_000)
    asking = waiting[0]
    next(machine for machine in cluster.machines if machine is not asking).kill()
    cluster.world.run_for(5 * SECOND)
    cluster.start_all()
    cluster.world.run_until(lambda: asking.node.scrub.state == "idle", 900 * SECOND, "the pass")
    assert 0 in waiting, "it was never answered"
    cluster.world.run_until(cluster.healthy, 60 * SECOND, "health")
    audit(cluster)


@pytest.mark.parametrize("policy", [Policy(2, 1), Policy(4, 2), Policy(4, 3), Policy(16, 4)], ids=str)
def test_which_strip_is_wrong(policy: Policy) -> None:
    coder, random = PlainCoder(), Random(policy.strips)
    data = [random.randbytes(64) for _ in range(policy.data)]
    right = dict(enumerate([*data, *(bytes(unit) for unit in coder.encode(policy, data))]))
    parity = tuple(range(policy.data, policy.strips))
    assert misfits(coder, policy, right) == ()
    for strip in right:
        one_wrong = {**right, strip: bytes(64)}
        expected = (strip,) if strip >= policy.data or policy.parity > 1 else parity
        assert misfits(coder, policy, one_wrong) == expected
    assert misfits(coder, policy, {**right, **{strip: bytes(64) for strip in parity}}) == parity

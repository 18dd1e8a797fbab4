"""One copy cannot be read: another one answers, and the bad one is made anew; the client never sees the error."""

from __future__ import annotations

import pytest
from tests.sim.test_directed import fresh, holders, read, write

from sheepdog.cluster.core.errors import Corrupt, DiskError, NoSpace, Result, StoreError
from sheepdog.cluster.core.ids import NodeId, ObjectId, data_oid
from sheepdog.cluster.core.limits import BLOCK_SIZE, RECOVERY_RETRY_NS, REPAIR_TRIES
from sheepdog.cluster.core.messages import Flag, Kind, Message
from sheepdog.cluster.core.peers import Answered
from sheepdog.cluster.core.ports import Buffer, ReadDone
from sheepdog.cluster.sim.audit import audit
from sheepdog.cluster.sim.clients import block_of
from sheepdog.cluster.sim.cluster import HEALTH_LIMIT_NS, Machine
from sheepdog.cluster.sim.world import SECOND

FAR = 200  # a block of the same object


class Rotten(Corrupt):
    """What an unaligned write finds where it needs the rest of a block."""

    def __init__(self, text: str) -> None:
        super().__init__(text, (0,))


def break_reads(machine: Machine, oid: ObjectId, error: StoreError, times: int) -> list[int]:
    """The next `times` reads of an object on this machine fail; returns what is counted."""
    store = machine.node.context.store
    real, failed = store.read, [0]

    def failing(one: ObjectId, offset: int, length: int, done: ReadDone) -> None:
        if one == oid and failed[0] < times:
            failed[0] += 1
            machine.cluster.world.after(0, lambda: done(error))
        else:
            real(one, offset, length, done)

    store.read = failing  # type: ignore[assignment]
    return failed


@pytest.mark.parametrize("error", [DiskError("no such sector"), Corrupt("rotten", (0,))], ids=["disk", "rot"])
@pytest.mark.parametrize("which", ["home", "replica"])
def test_another_copy_answers(which: str, error: StoreError) -> None:
    cluster, volume = fresh(3, 3)
    home, replica, _ = holders(cluster, volume)
    assert write(home, volume, 7) == Result.SUCCESS
    cluster.world.run_for(100_000_000)  # the replicas know that all have it: they read their own copies
    machine = home if which == "home" else replica
    failed = break_reads(machine, data_oid(volume.vid, 0), error, times=1)
    assert read(machine, volume) == (Result.SUCCESS, block_of(7))
    assert failed == [1]
    cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "repair")
    audit(cluster)


def test_a_copy_that_is_written_while_it_is_fetched_is_old_whatever_became_of_the_read() -> None:
    cluster, volume = fresh(2, 2)
    home, replica = holders(cluster, volume)
    oid = data_oid(volume.vid, 0)
    assert write(home, volume, 7) == Result.SUCCESS
    context, store = replica.node.context, home.node.context.store
    version = store.version(oid)
    assert version is not None

    def written_first(one: ObjectId, offset: int, length: int, done: ReadDone) -> None:
        assert write(home, volume, 8) == Result.SUCCESS
        done(DiskError("no such sector"))

    answers: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "read", written_first)
        fetch = Message(Kind.FETCH, context.fence, oid=oid, length=BLOCK_SIZE, version=version)
        context.peers.request(home.id, fetch, lambda answer: answers.append(answer.result))
        cluster.world.run_until(lambda: bool(answers), SECOND, "an answer")
    assert answers == [Result.STALE_OBJ]


def rot(machine: Machine, oid: ObjectId, block: int) -> None:
    """The bytes of a block change on the disk, whatever was written to it."""
    machine.disk.copies()[oid].rotten[block] = None


def write_at(machine: Machine, oid: ObjectId, start: int, value: int) -> int:
    results: list[int] = []
    machine.node.gateway.write(oid, start, block_of(value), True, lambda result, _: results.append(int(result)))
    machine.cluster.world.run_until(lambda: bool(results), SECOND, "write")
    return results[0]


def read_at(machine: Machine, oid: ObjectId, start: int) -> tuple[int, bytes]:
    answers: list[tuple[int, bytes]] = []

    def done(result: int, data: Buffer) -> None:
        answers.append((int(result), bytes(data)))

    machine.node.gateway.read(oid, start, BLOCK_SIZE, done)
    machine.cluster.world.run_until(lambda: bool(answers), 5 * SECOND, "read")
    return answers[0]


def test_two_copies_heal_each_other() -> None:
    """Each is rotten where the other one is good."""
    cluster, volume = fresh(2, 2)
    oid = data_oid(volume.vid, 0)
    for start, value in ((0, 1), (FAR * BLOCK_SIZE, 2)):
        assert write_at(cluster.machines[0], oid, start, value) == Result.SUCCESS
    cluster.world.run_for(SECOND)
    home, replica = holders(cluster, volume)
    rot(home, oid, 0)
    rot(replica, oid, FAR)
    for machine in (home, replica):
        for start, value in ((0, 1), (FAR * BLOCK_SIZE, 2)):
            assert read_at(machine, oid, start) == (Result.SUCCESS, block_of(value))
    cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "repair")
    audit(cluster)
    assert cluster.probes()["repair.blocks"] == 2
    assert sum(machine.node.copies.puller.bytes_pulled for machine in cluster.machines) == 0, "no copy was made anew"


def test_no_copy_can_be_read() -> None:
    """An error then, and never zeros."""
    cluster, volume = fresh(3, 3)
    assert write(cluster.machines[0], volume, 7) == Result.SUCCESS
    for machine in cluster.machines:
        break_reads(machine, data_oid(volume.vid, 0), DiskError("no such sector"), times=1000)
    for machine in cluster.machines:
        assert read(machine, volume)[0] == Result.EIO


def test_an_epoch_that_ends_with_a_repair_under_way_ends_no_scrub() -> None:
    """What the home was asked for is never answered then; the scrub asks again, in the next epoch."""
    cluster, volume = fresh(4, 3)
    oid = data_oid(volume.vid, 0)
    assert write(cluster.machines[0], volume, 7) == Result.SUCCESS
    cluster.world.run_for(SECOND)
    home, replica, _ = holders(cluster, volume)
    rot(replica, oid, 0)
    peers = replica.node.context.peers
    asked: list[ObjectId] = []
    request = peers.request

    def unanswered(node: NodeId, message: Message, answered: Answered, late: bool = False) -> None:
        if message.kind == Kind.READ and message.flags & Flag.REPAIR and not asked:
            asked.append(message.oid)
        else:
            request(node, message, answered, late)

    peers.request = unanswered  # type: ignore[method-assign]
    assert replica.node.scrub.schedule(0, 1 << 30)
    replica.node.scrub.start()
    cluster.world.run_until(lambda: bool(asked), 10 * SECOND, "an order")
    next(machine for machine in cluster.machines if machine not in (home, replica)).kill()
    cluster.world.run_until(lambda: replica.node.scrub.state == "idle", 15 * SECOND, "the pass")
    assert asked == [oid]
    assert (replica.node.scrub.found, replica.node.scrub.repaired) == (1, 1)
    cluster.start_all()
    cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
    audit(cluster)


def test_the_only_copy_is_bad() -> None:
    """An error, each time, and at once."""
    cluster, volume = fresh(1, 1)
    (machine,) = cluster.machines
    assert write(machine, volume, 7) == Result.SUCCESS
    rot(machine, data_oid(volume.vid, 0), 0)
    for _ in range(2):
        assert read(machine, volume)[0] == Result.EIO
    assert write(machine, volume, 8) == Result.SUCCESS
    assert read(machine, volume) == (Result.SUCCESS, block_of(8))


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("error", [DiskError, Rotten, NoSpace])
def test_a_write_that_no_copy_took_has_failed(error: type[StoreError], copies: int) -> None:
    """It is not answered as if it had been made good: there was nothing to make it good from."""
    cluster, volume = fresh(3, copies)
    home = holders(cluster, volume)[0]
    assert write(home, volume, 7) == Result.SUCCESS
    cluster.world.run_for(SECOND)
    for machine in cluster.machines:
        machine.disk.fault, machine.disk.fault_chance = error, 1.0
    assert write(home, volume, 8) == (Result.NO_SPACE if error is NoSpace else Result.EIO)
    for machine in cluster.machines:
        machine.disk.heal()
    cluster.world.run_for(SECOND)
    assert read(home, volume) == (Result.SUCCESS, block_of(7))
    assert write(home, volume, 9) == Result.SUCCESS


def test_the_only_copy_stays_what_it_is_when_its_disk_is_full() -> None:
    """A write that it could not take leaves it what it was: in the next epoch it counts."""
    cluster, volume = fresh(3, 1)
    oid = data_oid(volume.vid, 0)
    home = holders(cluster, volume)[0]
    assert write(home, volume, 7) == Result.SUCCESS
    home.disk.fault, home.disk.fault_chance = NoSpace, 1.0
    assert write(home, volume, 8) == Result.NO_SPACE
    assert oid not in home.node.copies.replica.missing
    other = next(machine for machine in cluster.machines if machine is not home)
    other.kill()
    home.disk.heal()
    cluster.start_all()
    cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
    assert read(home, volume) == (Result.SUCCESS, block_of(7))


@pytest.mark.parametrize("which", ["home", "replica"])
def test_a_disk_that_takes_nothing_costs_no_other_copy(which: str) -> None:
    """The others answer, writes fail without a word of a missing object, and it is made anew without being asked."""
    cluster, volume = fresh(3, 3)
    home, replica, _ = holders(cluster, volume)
    assert write(home, volume, 7) == Result.SUCCESS
    bad = home if which == "home" else replica
    bad.disk.fault, bad.disk.fault_chance = DiskError, 1.0
    assert write(home, volume, 8) == Result.EIO
    cluster.world.run_for(REPAIR_TRIES * RECOVERY_RETRY_NS)
    seen = {read(machine, volume) for machine in cluster.machines}
    assert seen in ({(Result.SUCCESS, block_of(7))}, {(Result.SUCCESS, block_of(8))})
    assert write(replica, volume, 9) == Result.EIO
    bad.disk.heal()
    cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "repair")
    audit(cluster)
    assert read(bad, volume) in seen
    assert write(replica, volume, 9) == Result.SUCCESS


@pytest.mark.parametrize("first", [Result.NO_OBJ, Result.EIO])
def test_one_that_takes_nothing_is_made_anew_whatever_another_one_says(
    first: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other's bad copy alone would be given up; what is said last does not decide."""
    cluster, volume = fresh(3, 3)
    home, *replicas = holders(cluster, volume)
    oid = data_oid(volume.vid, 0)
    assert write(home, volume, 7) == Result.SUCCESS
    cluster.world.run_for(SECOND)
    assert home.node.home is not None
    recovery = home.node.home.recovery
    members = home.node.context.placement.replicas(oid)[1:]
    results = first, Result.EIO if first == Result.NO_OBJ else Result.NO_OBJ

    def pulls(machine: Machine, result: Result, delay_ns: int) -> None:
        monkeypatch.setattr(
            machine.node.copies, "pull", lambda _, done: cluster.world.after(delay_ns, lambda: done(result))
        )

    for machine, member, result, delay_ns in zip(replicas, members, results, (SECOND // 20, SECOND // 10), strict=True):
        pulls(machine, result, delay_ns)
        recovery.suspect(oid, member)
    cluster.world.run_for(2 * REPAIR_TRIES * RECOVERY_RETRY_NS)
    assert recovery.knows(oid)

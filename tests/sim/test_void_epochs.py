"""Everybody stops at a change of members, and some have recorded an epoch that others never saw."""

from __future__ import annotations

import re
from functools import partial

import pytest
from tests.sim import test_directed as directed
from tests.sim.test_directed import fresh, read, settle

from sheepdog.cluster.core import join_rules
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import data_oid, is_data
from sheepdog.cluster.sim.clients import Volume, block_of, make_volume
from sheepdog.cluster.sim.cluster import HEALTH_LIMIT_NS, Machine, SimCluster
from sheepdog.cluster.sim.world import MILLISECOND, SECOND

write = partial(directed.write, durable=True)
LONG_NS = 20 * SECOND  # a disk that takes nothing for so long takes nothing more before the power fails


def newest(machine: Machine) -> int:
    """The newest epoch on the machine's disk."""
    return max(machine.state.epochs)


def stop_recording(*machines: Machine) -> None:
    for machine in machines:
        assert machine.process is not None
        machine.process.state.stall(LONG_NS)


def power_fails(cluster: SimCluster) -> None:
    for machine in cluster.machines:
        machine.kill(power=True)


def start(*machines: Machine) -> None:
    for machine in machines:
        machine.start()


def join(cluster: SimCluster, machine: Machine) -> None:
    """The machine joins, and has recorded the epoch that began with it."""
    before = newest(machine) if machine.state.epochs else 0
    machine.start()
    cluster.world.run_until(lambda: machine.up and machine.serves(), SECOND, "a join")
    epoch = machine.node.context.epoch
    assert epoch > before
    cluster.world.run_until(lambda: epoch in machine.state.epochs, SECOND, "the newcomer's record")


def alone_with_an_epoch(away: int = 1, absent: int = 0) -> tuple[SimCluster, Volume, list[Machine], list[Machine]]:
    """Power failed when `away` machines had come back, one after the other, and no other had recorded that.

    (cluster, volume, those who were there all the time, those who were coming); the machines behind are down.
    """
    cluster, volume = fresh(3 + away + absent, 2)
    stayed, coming = cluster.machines[:3], cluster.machines[3 : 3 + away]
    assert write(stayed[0], volume, 1) == Result.SUCCESS
    for machine in cluster.machines[3:]:
        machine.kill()
    settle(cluster, *stayed)
    assert write(stayed[0], volume, 2) == Result.SUCCESS
    cluster.world.run_for(SECOND)
    before = newest(stayed[0])
    stop_recording(*stayed)
    for number, machine in enumerate(coming, 1):
        join(cluster, machine)
        assert newest(machine) == before + number
    power_fails(cluster)
    assert [newest(machine) for machine in stayed] == [before] * 3
    return cluster, volume, stayed, coming


def check(cluster: SimCluster, volume: Volume, value: int) -> None:
    """All are together, say the same of the past, and have what was written last."""
    cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
    for machine in cluster.machines:
        assert not machine.exits
        assert read(machine, volume) == (Result.SUCCESS, block_of(value))
        assert list(machine.state.epochs.values()) == cluster.machines[0].node.cluster.epochs


@pytest.mark.parametrize("away", [1, 2])
def test_who_alone_has_recorded_an_epoch_is_let_in(away: int) -> None:
    cluster, volume, stayed, coming = alone_with_an_epoch(away)
    start(*stayed)
    settle(cluster, *stayed)
    assert write(stayed[0], volume, 3) == Result.SUCCESS
    for machine in reversed(coming):
        machine.start()
        cluster.world.run_until(machine.serves, SECOND, "a join")
        assert machine.node.context.probes["node.void_epochs"] == 1
        cluster.world.run_for(100 * MILLISECOND)
        assert newest(machine) == machine.node.context.epoch
    check(cluster, volume, 3)


def test_an_epoch_of_the_same_number_has_begun_meanwhile() -> None:
    """Of two histories with the same numbers the one that everybody lived through is remembered."""
    cluster, volume, stayed, (late,) = alone_with_an_epoch()
    start(*stayed)
    settle(cluster, *stayed)
    stayed[2].kill()
    settle(cluster, *stayed[:2])
    assert write(stayed[0], volume, 3) == Result.SUCCESS
    assert newest(stayed[0]) == newest(late)
    late.start()
    cluster.world.run_until(late.serves, SECOND, "a join")
    stayed[2].start()
    check(cluster, volume, 3)
    power_fails(cluster)
    for machine in (late, *stayed):  # whose log comes first counts until a newer one comes
        machine.start()
        cluster.world.run_for(100 * MILLISECOND)
    check(cluster, volume, 3)


def alone_and_active() -> tuple[SimCluster, Volume, Machine, list[Machine]]:
    """Who had just joined was the only one that did not die: it went on alone, and took a write.

    (cluster, a volume that nobody else has heard of, that node, the others)
    """
    cluster, _ = fresh(4, 2)
    last, *others = cluster.machines
    last.kill()
    settle(cluster, *others)
    cluster.world.run_for(SECOND)
    before = newest(others[0])
    stop_recording(*others)
    join(cluster, last)
    for machine in others:
        machine.kill(power=True)
    settle(cluster, last)
    volume = make_volume(cluster, "w", 1, (0,))
    assert write(last, volume, 7) == Result.SUCCESS
    last.kill(power=True)
    assert [newest(machine) for machine in others] == [before] * 3
    assert newest(last) == before + 2
    return cluster, volume, last, others


def refusals(machine: Machine) -> list[str]:
    return [reason for status, reason in machine.exits if status]


def all_or_nothing() -> str:
    """Is what was acknowledged by a node that had gone on alone still there in the end? How it was refused before."""
    cluster, volume, last, others = alone_and_active()
    start(*others)
    settle(cluster, *others)
    last.start()
    cluster.world.run_for(3 * SECOND)
    refused = refusals(last)
    power_fails(cluster)
    cluster.world.run_for(SECOND)
    start(*cluster.machines)
    cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
    assert read(last, volume) == (Result.SUCCESS, block_of(7))
    return refused[0]


def test_who_went_on_alone_is_refused_and_leads_when_all_start_together() -> None:
    refused = all_or_nothing()
    assert re.fullmatch(
        r"failed to join Sheepdog: its epoch (\d+) is newer than the cluster's (\d+); "
        "it may hold what the others lack: "
        "shut them down and start all nodes together",
        refused,
    )


def test_letting_in_a_node_whose_newer_epoch_was_active_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join_rules, "are_void", lambda state, join: True)
    with pytest.raises((AssertionError, IndexError)):
        all_or_nothing()


def emptied() -> None:
    """Of the three that were active last two get empty disks, and start with one who had left before. The third is
    not let in, though the others have restarted since and their logs go back beyond the parting."""
    cluster, volume = fresh(4, 2)
    late, first, second, gone = cluster.machines
    late.kill()
    settle(cluster, first, second, gone)
    cluster.world.run_for(SECOND)
    stop_recording(gone)
    join(cluster, late)
    gone.kill(power=True)
    settle(cluster, late, first, second)
    assert write(late, volume, 5) == Result.SUCCESS
    cluster.world.run_for(SECOND)
    power_fails(cluster)
    for machine in (first, second):
        machine.replace_disk()
    start(gone, first, second)
    settle(cluster, gone, first, second)
    for machine in (first, second):
        machine.kill()
        settle(cluster, *(other for other in (gone, first, second) if other is not machine))
        machine.start()
        settle(cluster, gone, first, second)
        cluster.world.run_for(SECOND)
    assert newest(gone) > newest(late)
    late.start()
    cluster.world.run_for(SECOND)
    assert late.exits
    assert all("if nothing that was written there since is needed" in reason for reason in refusals(late))


def test_the_word_of_a_node_counts_only_since_it_has_its_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied()
    log_since = "sheepdog.cluster.core.copies.Copies.log_since"
    monkeypatch.setattr(log_since, property(lambda copies: 1))  # planted: whoever has an epoch log is believed
    with pytest.raises(AssertionError):
        emptied()


@pytest.mark.parametrize("away", [1, 2])
@pytest.mark.parametrize("first", ["those who came", "one who stayed"])
def test_of_two_histories_the_void_one_is_forgotten_by_all_who_start(away: int, first: str) -> None:
    """The nodes with the void epochs have not met the others when power fails once more."""
    cluster, volume, stayed, coming = alone_with_an_epoch(away)
    start(*stayed)
    settle(cluster, *stayed)
    stayed[2].kill()
    settle(cluster, *stayed[:2])
    assert write(stayed[0], volume, 3) == Result.SUCCESS
    lived = newest(stayed[0])
    power_fails(cluster)
    for machine in [*coming, *stayed] if first == "those who came" else [stayed[0], *coming, *stayed[1:]]:
        machine.start()
        cluster.world.run_for(100 * MILLISECOND)
    check(cluster, volume, 3)
    record = cluster.machines[0].node.cluster.record(lived)
    assert record is not None
    assert [member.id for member in record.members] == sorted(machine.id for machine in stayed[:2])


def test_a_longer_void_history_does_not_replace_the_one_that_was_lived_through() -> None:
    """Who is still awaited has no word in it, since it was no member when the histories parted."""
    cluster, volume, stayed, coming = alone_with_an_epoch(away=2, absent=1)
    absent = cluster.machines[-1]
    start(*stayed)
    settle(cluster, *stayed)
    absent.start()
    settle(cluster, *stayed, absent)
    assert write(absent, volume, 3) == Result.SUCCESS
    lived = newest(absent)
    assert lived < newest(coming[-1])
    power_fails(cluster)
    for machine in [*stayed, *coming, absent]:
        machine.start()
        cluster.world.run_for(100 * MILLISECOND)
    check(cluster, volume, 3)
    record = cluster.machines[0].node.cluster.record(lived)
    assert record is not None
    assert [member.id for member in record.members] == sorted(machine.id for machine in [*stayed, absent])


def test_what_was_noted_in_a_void_epoch_was_so_in_the_one_before() -> None:
    """A disk went in it, and an object that was on it is deleted by the others meanwhile: it is gone for good."""
    cluster, _ = fresh(4, 3)
    *stayed, late = cluster.machines
    late.kill()
    settle(cluster, *stayed)
    cluster.world.run_for(SECOND)
    stop_recording(*stayed)
    join(cluster, late)
    oid = next(oid for oid in late.lose_disk() if is_data(oid))
    cluster.world.run_for(100 * MILLISECOND)
    assert late.state.proven.broken == late.node.context.epoch
    power_fails(cluster)
    start(*stayed)
    settle(cluster, *stayed)
    results: list[int] = []
    stayed[0].node.gateway.remove(oid, lambda result, _: results.append(result))
    cluster.world.run_until(lambda: bool(results), SECOND, "a removal")
    assert results == [Result.SUCCESS]
    late.start()
    cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
    assert not any(oid in machine.disk.copies() for machine in cluster.machines)


def ends_late(machine: Machine) -> None:
    """Its process goes on for a while when it has been told to end, and hears of more epochs."""
    assert machine.process is not None
    end, told = machine.process.node.on_exit, []

    def exited(status: int, reason: str) -> None:
        told.append(reason)
        if len(told) == 1:
            machine.cluster.world.after(SECOND, lambda: end(status, reason))

    machine.process.node.on_exit = exited


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("position", [1, 2, 3])
def test_of_two_histories_that_were_lived_through_none_is_dropped_unseen(position: int, late: bool) -> None:
    """The others have gone further meanwhile, and all start together: who holds what they lack is not one of them."""
    cluster, volume, last, others = alone_and_active()
    start(*others)
    settle(cluster, *others)
    others[2].kill()
    settle(cluster, *others[:2])
    others[2].start()
    settle(cluster, *others)
    cluster.world.run_for(SECOND)
    assert newest(others[0]) >= newest(last)
    power_fails(cluster)
    oid = data_oid(volume.vid, 0)
    kept = last.disk.copies()[oid].version
    epochs = dict(last.state.epochs)
    order = list(others)
    order.insert(position, last)
    for machine in order:
        machine.start()
        if late and machine is last:
            ends_late(machine)
        cluster.world.run_for(100 * MILLISECOND)
    if late:
        others[2].kill()
        cluster.world.run_for(500 * MILLISECOND)
        others[2].start()
    settle(cluster, *others)
    cluster.world.run_for(3 * SECOND)
    assert refusals(last)
    assert all("are not the cluster's" in reason for reason in refusals(last))
    assert last.disk.copies()[oid].version == kept
    assert last.state.epochs == epochs

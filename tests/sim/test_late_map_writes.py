"""A client that has not noticed a snapshot yet writes the frozen map: nothing acknowledged is lost."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import (
    NO_OID,
    NO_VID,
    ObjectId,
    Vid,
    data_oid,
    inode_oid,
)
from sheepdog.cluster.core.inode import map_offset, unpack_map
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.script import Script, run
from sheepdog.cluster.core.vdi import VdiRecord
from sheepdog.cluster.sim.clients import LOST, NOT_NOW, OBJECT_BYTES, RETRY_NS, SHIFT, Door, block_of
from sheepdog.cluster.sim.cluster import HEALTH_LIMIT_NS, SimCluster
from sheepdog.cluster.sim.world import MILLISECOND, SECOND, World

NAME = b"guest"
OBJECTS = 5
SNAPSHOTS = 4
SEEDS = 60


class Guest:
    """What QEMU does with an image: a map of its own, one worker an object, the map entry written after the object."""

    def __init__(self, cluster: SimCluster, vid: Vid) -> None:
        self.cluster = cluster
        self.vid = vid
        self.entries = [0] * OBJECTS
        self.acknowledged = [0] * OBJECTS
        self.attempted = [0] * OBJECTS
        self.stopped = False
        self.running = 0
        self.doors: list[Door] = []

    def start(self) -> None:
        for index in range(OBJECTS):
            door = Door(self.cluster, f"worker{index}", index % len(self.cluster.machines))
            self.doors.append(door)
            self.running += 1
            run(self._work(door, index), self._ended)

    def _ended(self, _: None) -> None:
        self.running -= 1

    def _pause(self, door: Door, limit_ns: int) -> Callable[[Callable[..., None]], None]:
        return lambda done: void(self.cluster.world.after(door.random.randrange(limit_ns), lambda: done(None)))

    def _ask(self, door: Door, request: Callable[[Any, Any], None]) -> Script[tuple[int, Any]]:
        """Asks until some gateway answers; a request whose gateway died is sent again, as QEMU does."""
        while True:
            result, value = yield lambda done: door.ask(request, done)
            if result != LOST and result not in NOT_NOW:
                return result, value
            yield self._pause(door, RETRY_NS)

    def _work(self, door: Door, index: int) -> Script[None]:
        while not self.stopped:
            yield self._pause(door, 10 * MILLISECOND)
            self.attempted[index] += 1
            yield from self._write(door, index, self.attempted[index])
            self.acknowledged[index] = self.attempted[index]

    def _write(self, door: Door, index: int, value: int) -> Script[None]:
        while not (yield from self._try_to_write(door, index, block_of(index << 32 | value))):
            # NO_VDI: this gateway has not heard of a new vid yet. Its look-ups are in the order of all events.
            result, record = yield from self._ask(door, lambda p, done: p.node.operations.find_vdi(NAME, b"", 0, done))
            assert not result, Result(result)
            self.vid = record.vid

    def _try_to_write(self, door: Door, index: int, data: bytes) -> Script[bool]:
        """Once; False if the volume has been frozen."""
        vid, owner = self.vid, self.entries[index]
        oid = data_oid(vid, index)
        if owner == vid:
            result, _ = yield from self._ask(door, lambda p, done: p.node.gateway.write(oid, 0, data, True, done))
        else:
            source = data_oid(Vid(owner), index) if owner else ObjectId(0)
            result, _ = yield from self._ask(
                door, lambda p, done: p.node.gateway.create(oid, source, 0, data, True, done)
            )
        if result in (Result.READONLY, Result.NO_VDI):
            return False
        assert not result, Result(result)
        if owner != vid:
            self.entries[index] = vid
            yield self._pause(door, 30 * MILLISECOND)
            entry, inode = vid.to_bytes(4, "little"), inode_oid(vid)
            result, _ = yield from self._ask(
                door, lambda p, done: p.node.gateway.write(inode, map_offset(index), entry, True, done)
            )
            assert not result, Result(result)
        return True


def void(_: object) -> None:
    """For callbacks whose value nobody wants."""


def wait_for(world: World, request: Callable[[Callable[..., None]], None]) -> Any:
    answers: list[Any] = []
    request(lambda *values: answers.append(values))
    world.run_until(lambda: bool(answers), HEALTH_LIMIT_NS, "an answer")
    return answers[0]


def new_vdi(cluster: SimCluster, base: Vid = NO_VID, snapshot: bool = False, name: bytes = NAME, by: int = 0) -> Vid:
    node = cluster.machines[by].node
    result, record = wait_for(
        cluster.world,
        lambda done: node.operations.create_vdi(
            name, OBJECTS * OBJECT_BYTES, base, 0, 0, 0, SHIFT, int(snapshot), done
        ),
    )
    assert not result, Result(result)
    assert isinstance(record, VdiRecord)
    return record.vid


def write_map(cluster: SimCluster, vid: Vid, first: int, *entries: int, by: int = 1) -> None:
    data = b"".join(entry.to_bytes(4, "little") for entry in entries)
    gateway = cluster.machines[by].node.gateway
    result, _ = wait_for(cluster.world, lambda done: gateway.write(inode_oid(vid), map_offset(first), data, True, done))
    assert not result, Result(result)


def create(cluster: SimCluster, vid: Vid, *indexes: int) -> None:
    gateway = cluster.machines[0].node.gateway
    for index in indexes:
        result, _ = wait_for(
            cluster.world,
            partial(gateway.create, data_oid(vid, index), NO_OID, 0, b"x", True),
        )
        assert not result, Result(result)


def read_map(cluster: SimCluster, vid: Vid) -> list[int]:
    gateway = cluster.machines[2].node.gateway
    result, data = wait_for(cluster.world, lambda done: gateway.read(inode_oid(vid), map_offset(0), 4 * OBJECTS, done))
    assert not result, Result(result)
    return list(unpack_map(data))


def running(seed: int) -> SimCluster:
    cluster = SimCluster(World(seed), 3)
    cluster.start_all()
    cluster.format(3)
    return cluster


def test_late_entries_reach_the_volume_that_goes_on() -> None:
    cluster = running(1)
    first = new_vdi(cluster)
    create(cluster, first, 0, 1, 2, 3)
    write_map(cluster, first, 0, first)
    second = new_vdi(cluster, first, snapshot=True)
    clone = new_vdi(cluster, first, name=b"clone")
    write_map(cluster, first, 0, first, first)  # entry 1 is late, entry 0 known
    assert read_map(cluster, second) == [first, first, 0, 0, 0]
    third = new_vdi(cluster, second, snapshot=True)
    create(cluster, third, 2)
    write_map(cluster, third, 2, third)
    write_map(cluster, first, 1, first, first, first)  # the heir has its own 2 already
    assert read_map(cluster, third) == [first, first, third, first, 0]
    assert read_map(cluster, second) == [first, first, 0, 0, 0]  # complete since it was taken
    assert read_map(cluster, clone) == [first, 0, 0, 0, 0]
    gateway = cluster.machines[0].node.gateway
    result, _ = wait_for(cluster.world, lambda done: gateway.read(data_oid(first, 3), 0, 1, done))
    assert not result


def test_late_zeros_stay_where_they_are() -> None:
    """`dog vdi delete -s` clears the map of a snapshot; the volume that goes on keeps what it shares with it."""
    cluster = running(2)
    first = new_vdi(cluster)
    create(cluster, first, 0, 1)
    write_map(cluster, first, 0, first, first)
    second = new_vdi(cluster, first, snapshot=True)
    write_map(cluster, first, 0, 0, 0)
    assert read_map(cluster, first) == [0] * OBJECTS
    assert read_map(cluster, second) == [first, first, 0, 0, 0]
    gateway = cluster.machines[0].node.gateway
    for index in (0, 1):
        result, data = wait_for(
            cluster.world,
            partial(gateway.read, data_oid(first, index), 0, 1),
        )
        assert (result, bytes(data)) == (0, b"x")


@pytest.mark.parametrize("kills", [False, True])
def test_a_guest_under_snapshots_loses_nothing(kills: bool) -> None:
    late = held = 0
    for seed in range(SEEDS):
        cluster = running(seed)
        world = cluster.world
        guest = Guest(cluster, new_vdi(cluster))
        guest.start()
        chance = world.stream("snapshots")
        for _ in range(SNAPSHOTS):
            live(guest, chance.randrange(1, 40 * MILLISECOND))
            if kills and chance.random() < 0.5:
                machine = cluster.machines[chance.randrange(1, 3)]
                machine.kill()
                world.after(chance.randrange(300 * MILLISECOND), machine.start)
            node = cluster.machines[0].node
            working = node.cluster.vdis.working(NAME)
            assert working is not None
            answers: list[Any] = []
            node.operations.create_vdi(
                NAME,
                OBJECTS * OBJECT_BYTES,
                working.vid,
                0,
                0,
                0,
                SHIFT,
                1,
                lambda *a: answers.append(a),  # noqa: B023
            )
            world.run_until(lambda: watch(guest) or bool(answers), HEALTH_LIMIT_NS, "a snapshot")  # noqa: B023
            assert answers[0][0] == Result.SUCCESS
        live(guest, 50 * MILLISECOND)
        guest.stopped = True
        world.run_until(lambda: watch(guest) or not guest.running, HEALTH_LIMIT_NS, "the guest ends")  # noqa: B023
        world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
        check(cluster, guest, seed)
        probes = cluster.probes()
        late += probes.get("inode.late_map_write", 0)
        held += probes.get("inode.frozen_while_read", 0) + probes.get("inode.frozen_while_waiting", 0)
    assert late > SEEDS, "hardly any map write came late"
    assert held, "no map write was overtaken by a snapshot"


def live(guest: Guest, duration_ns: int) -> None:
    end_ns = guest.cluster.world.now_ns + duration_ns
    while guest.cluster.world.now_ns < end_ns:
        guest.cluster.world.run_for(MILLISECOND)
        watch(guest)


def watch(guest: Guest) -> bool:
    for door in guest.doors:
        door.watch()
    return False


def check(cluster: SimCluster, guest: Guest, seed: int) -> None:
    """Opens the volume anew: every block holds what was written last."""
    working = cluster.machines[0].node.cluster.vdis.working(NAME)
    assert working is not None
    entries = read_map(cluster, working.vid)
    gateway = cluster.machines[1].node.gateway
    for index, owner in enumerate(entries):
        assert owner, f"seed {seed}: entry {index} is lost"
        oid = data_oid(Vid(owner), index)
        result, data = wait_for(cluster.world, partial(gateway.read, oid, 0, BLOCK_SIZE))
        assert not result, f"seed {seed}: object {oid:016x}: {Result(result)!r}"
        assert bytes(data) == block_of(index << 32 | guest.acknowledged[index]), f"seed {seed}: entry {index} is old"
    assert cluster.world.now_ns < 600 * SECOND

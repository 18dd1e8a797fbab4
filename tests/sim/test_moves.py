"""A volume gets another redundancy while a guest writes it and nodes die: objects that are copied in several pieces."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from tests.sim.test_late_map_writes import NAME, OBJECTS, Guest, live, read_map, void, wait_for, watch, write_map
from tests.sim.test_volumes import stored

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.gateway import Gateway
from sheepdog.cluster.core.ids import NO_OID, NO_VID, ObjectId, Vid, data_oid, index_of, is_data, plain_oid, vid_of
from sheepdog.cluster.core.limits import BLOCK_SIZE, COPY_CHUNK_BYTES
from sheepdog.cluster.core.moves import MOVED_TAG
from sheepdog.cluster.core.script import Script, run
from sheepdog.cluster.core.vdi import VdiRecord
from sheepdog.cluster.sim.clients import LOST, NOT_NOW, RETRY_NS, Door, block_of
from sheepdog.cluster.sim.cluster import HEALTH_LIMIT_NS, SimCluster
from sheepdog.cluster.sim.world import MILLISECOND, World

SHIFT = 23
LAST_BLOCK = (1 << SHIFT) - BLOCK_SIZE  # in the last piece of an object
CODED = 0x11  # 2:1
SEEDS = 6


def running(seed: int, cache_bytes: int = 0) -> SimCluster:
    assert 1 << SHIFT > COPY_CHUNK_BYTES
    cluster = SimCluster(World(seed), 4, cache_bytes=cache_bytes)
    cluster.start_all()
    cluster.format(3)
    return cluster


def large_vdi(cluster: SimCluster, policy: int = 0) -> Vid:
    """All its objects exist; the last block of each tells which it is."""
    result, record = wait_for(
        cluster.world,
        lambda done: cluster.machines[0].node.operations.create_vdi(
            NAME, OBJECTS << SHIFT, NO_VID, 0, policy, 0, SHIFT, 0, done
        ),
    )
    assert not result, Result(result)
    assert isinstance(record, VdiRecord)
    gateway = cluster.machines[0].node.gateway
    for index in range(OBJECTS):
        oid = data_oid(record.vid, index)
        result, _ = wait_for(
            cluster.world, partial(gateway.create, oid, NO_OID, LAST_BLOCK, block_of(1000 + index), True)
        )
        assert not result, Result(result)
    write_map(cluster, record.vid, 0, *[record.vid] * OBJECTS)
    return record.vid


class Administrator:
    """`dog vdi alter-copy`: goes on through another node when its own dies."""

    def __init__(self, cluster: SimCluster) -> None:
        self.door = Door(cluster, "administrator", 0)
        self.cluster = cluster
        self.finished = False

    def start(self, policy: int, copies: int) -> None:
        run(self._alter(policy, copies), lambda _: setattr(self, "finished", True))

    def _ask(self, request: Callable[[Any, Any], None]) -> Script[tuple[int, Any]]:
        while True:
            result, value = yield lambda done: self.door.ask(request, done)
            if result != LOST and result not in NOT_NOW:
                return result, value
            yield lambda done: void(self.cluster.world.after(RETRY_NS, lambda: done(None)))

    def _alter(self, policy: int, copies: int) -> Script[None]:
        result, _ = yield from self._ask(
            lambda p, done: p.node.operations.snapshot_vdi(NAME, MOVED_TAG, copies, policy, done)
        )
        assert not result, Result(result)
        for _ in range(3 * OBJECTS):
            yield from self._move()

    def _move(self) -> Script[None]:
        _, record = yield from self._ask(lambda p, done: p.node.operations.find_vdi(NAME, b"", 0, done))
        result, _ = yield from self._ask(lambda p, done: p.node.operations.move_objects(record.vid, done))
        assert not result, Result(result)


def altered(cluster: SimCluster, policy: int, copies: int, kills: bool) -> None:
    """A guest works all the while, and finds what it wrote; the old objects are gone afterwards."""
    world = cluster.world
    old = large_vdi(cluster, CODED - policy if policy in (0, CODED) else 0)
    guest, administrator = Guest(cluster, old), Administrator(cluster)
    guest.entries = [int(old)] * OBJECTS
    guest.start()
    chance = world.stream("kills")
    live(guest, 10 * MILLISECOND)
    administrator.start(policy, copies)
    while not administrator.finished:
        live(guest, chance.randrange(1, 30 * MILLISECOND))
        administrator.door.watch()
        if kills and chance.random() < 0.2 and cluster.healthy():
            machine = cluster.machines[chance.randrange(4)]
            machine.kill()
            world.after(chance.randrange(1, 300) * MILLISECOND, machine.start)
        assert world.now_ns < HEALTH_LIMIT_NS
    live(guest, 50 * MILLISECOND)
    guest.stopped = True
    world.run_until(lambda: watch(guest) or not guest.running, HEALTH_LIMIT_NS, "the guest ends")
    check(cluster, policy, [block_of(index << 32 | value) for index, value in enumerate(guest.acknowledged)])


def check(cluster: SimCluster, policy: int, first_blocks: list[bytes]) -> None:
    """All objects are whole, the volume's own, and nothing else is left."""
    world = cluster.world
    world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
    node = cluster.machines[1].node
    result, _ = wait_for(world, lambda done: node.operations.delete_vdi(NAME, MOVED_TAG, 0, done))
    assert not result, Result(result)
    world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
    working = node.cluster.vdis.working(NAME)
    assert working is not None
    assert working.policy == policy
    assert read_map(cluster, working.vid) == [working.vid] * OBJECTS
    assert {vid_of(oid) for oid in stored(cluster) if is_data(oid)} == {working.vid}
    for index in range(OBJECTS):
        expected = {0: first_blocks[index], LAST_BLOCK: block_of(1000 + index)}
        for offset, block in expected.items():
            result, data = wait_for(world, partial(node.gateway.read, data_oid(working.vid, index), offset, BLOCK_SIZE))
            assert (result, bytes(data)) == (Result.SUCCESS, block), f"object {index} at {offset}"


@pytest.mark.parametrize("kills", [False, True])
@pytest.mark.parametrize(("policy", "copies"), [(CODED, 3), (0, 3)], ids=["coded", "copied"])
def test_large_objects_get_another_redundancy(policy: int, copies: int, kills: bool) -> None:
    first = 0
    for seed in range(SEEDS):
        cluster = running(seed)
        altered(cluster, policy, copies, kills)
        first += cluster.probes().get("gateway.moved_first", 0)
    assert first, "the guest never wrote to an object that was not moved yet"


def test_a_copy_that_was_interrupted_is_made_anew() -> None:
    """The node that copies dies between the first piece and the last. Nobody may take what is there for the object."""
    cluster = running(7)
    world, old = cluster.world, large_vdi(cluster)
    administrator = Administrator(cluster)
    administrator.start(CODED, 3)

    def is_begun() -> bool:
        return any(is_data(oid) and vid_of(oid) != old for oid in stored(cluster))

    world.run_until(is_begun, HEALTH_LIMIT_NS, "the first piece")
    dead = cluster.machines[0]
    dead.kill()
    working = cluster.machines[1].node.cluster.vdis.working(NAME)
    assert working is not None
    assert read_map(cluster, working.vid) == [old] * OBJECTS
    world.after(300 * MILLISECOND, dead.start)
    while not administrator.finished:
        world.run_for(MILLISECOND)
        administrator.door.watch()
        assert world.now_ns < HEALTH_LIMIT_NS
    check(cluster, CODED, [bytes(BLOCK_SIZE)] * OBJECTS)


def test_what_is_discarded_while_it_is_copied_stays_away() -> None:
    cluster = running(8)
    world, old = cluster.world, large_vdi(cluster)
    administrator = Administrator(cluster)
    administrator.start(CODED, 3)

    def copied() -> list[ObjectId]:
        return [oid for oid in stored(cluster) if is_data(oid) and vid_of(oid) != old]

    world.run_until(lambda: bool(copied()), HEALTH_LIMIT_NS, "the first piece")
    oid = plain_oid(copied()[0])
    write_map(cluster, vid_of(oid), index_of(oid), NO_VID)
    world.run_until(lambda: administrator.finished, HEALTH_LIMIT_NS, "the moves")
    world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
    assert cluster.probes()["moves.discarded"] == 1
    assert oid not in map(plain_oid, stored(cluster))


def test_a_gateway_that_caches_the_volume_does_not_wait_for_itself() -> None:
    """An operation on the volume waits until nothing uses its cache; a creation there waits for an operation."""
    cluster = running(9, 64 << 20)
    world, old = cluster.world, large_vdi(cluster)
    node = cluster.machines[0].node
    result, record = wait_for(world, partial(node.operations.snapshot_vdi, NAME, MOVED_TAG, 3, CODED))
    assert not result, Result(result)
    new: Vid = record.vid
    cache = node.cache
    assert cache is not None
    cache.volumes.wanted(data_oid(new, 0), True)
    world.run_until(lambda: node.claims.mine(new) is not None, HEALTH_LIMIT_NS, "the cache")
    answers: list[int] = []
    for index in range(OBJECTS):
        oid, source = data_oid(new, index), data_oid(old, index)
        cache.create(oid, source, 0, block_of(index), False, lambda result, _: answers.append(int(result)))
        cluster.machines[1].node.operations.move_objects(new, lambda result: answers.append(int(result)))
    world.run_until(lambda: len(answers) == 2 * OBJECTS, HEALTH_LIMIT_NS, "answers")
    assert answers == [Result.SUCCESS] * len(answers)
    result, _ = wait_for(world, partial(cache.flush, new))
    assert not result, Result(result)
    check(cluster, CODED, [block_of(index) for index in range(OBJECTS)])


def test_they_would_be_torn_if_clients_copied_them_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gateway, "moved_first", lambda *_: False)
    with pytest.raises(AssertionError):
        for seed in range(4 * SEEDS):
            altered(running(seed), CODED, 3, False)


def test_large_objects_are_moved_only_while_the_redundancy_changes() -> None:
    """Nobody else would copy them in the order of operations."""
    cluster = running(10)
    vid = large_vdi(cluster)
    answers: list[int] = []
    cluster.machines[0].node.operations.move_objects(vid, answers.append)
    cluster.world.run_until(lambda: bool(answers), HEALTH_LIMIT_NS, "an answer")
    assert answers == [Result.NO_SUPPORT]

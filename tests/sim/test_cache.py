"""Object caches in the simulated world: histories stay linearizable while gateways with dirty data die and return."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.sim.test_late_map_writes import wait_for

from sheepdog.cluster.core.cache import Cache
from sheepdog.cluster.core.errors import Corrupt, DiskError, NoSpace, Result, StoreError
from sheepdog.cluster.core.ids import ObjectId, Vid, data_oid
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.sim.clients import Volume, block_of, make_volume, value_of
from sheepdog.cluster.sim.cluster import HEALTH_LIMIT_NS, SimCluster
from sheepdog.cluster.sim.nemesis import Faults
from sheepdog.cluster.sim.run import Run, Scenario
from sheepdog.cluster.sim.world import MILLISECOND, World

SEEDS = 3
MIB = 1 << 20
OWNER, OTHER = 0, 1


def cached(name: str, **faults: float) -> Scenario:
    return Scenario(
        name,
        faults=Faults(**{"kill": 0.0, **faults}),  # type: ignore[arg-type]
        cache_bytes=16 * MIB,
        tolerated=(Result.VDI_LOCKED,),  # while a gateway with dirty data is down
    )


@pytest.mark.parametrize(
    "scenario",
    [
        cached("cache"),
        cached("cache, kills", kill=1.0),
        cached("cache, links and leaves", kill=0.5, link=1.0, leave=0.5),
        cached("cache, kills of everybody", kill=0.5, everybody=1.0),
        replace(cached("cache, one gateway, kills", kill=1.0), doors=1, roam_chance=0.001, think_ns=MILLISECOND // 2),
    ],
    ids=lambda scenario: scenario.name,
)
def test_histories_are_linearizable(scenario: Scenario) -> None:
    writes = hits = 0
    for seed in range(SEEDS):
        run = Run(scenario, seed)
        run.execute()
        caches = [machine.node.cache for machine in run.cluster.machines if machine.node.cache is not None]
        writes += sum(cache.local_writes for cache in caches)
        hits += sum(cache.reads.hits for cache in caches)
    assert writes and (hits or not scenario.doors)


class Owner:
    """A cluster of which one gateway has a volume in its cache."""

    def __init__(self, seed: int, cache_bytes: int = 16 * MIB) -> None:
        self.world = World(seed)
        self.cluster = SimCluster(self.world, 3, cache_bytes=cache_bytes)
        self.cluster.cache_times_ns = (60_000 * MILLISECOND, 50 * MILLISECOND)  # nothing is pushed by its age
        self.cluster.start_all()
        self.cluster.format(3)
        self.volume: Volume = make_volume(self.cluster, "guest", 2, (0, 1))

    def cache(self, node: int = OWNER) -> Cache:
        cache = self.cluster.machines[node].node.cache
        assert cache is not None
        return cache

    def ask(self, request: Any) -> Any:
        return wait_for(self.world, request)

    def write(self, index: int, block: int, value: int, node: int = OWNER, durable: bool = False) -> int:
        oid = data_oid(self.volume.vid, index)
        cache = self.cache(node)
        if not durable:
            cache.volumes.wanted(oid, True)
        result, _ = self.ask(lambda done: cache.write(oid, block * BLOCK_SIZE, block_of(value), durable, done))
        return int(result)

    def read(self, index: int, block: int, node: int = OWNER) -> int:
        """The value, or a negative result."""
        oid = data_oid(self.volume.vid, index)
        result, data = self.ask(lambda done: self.cache(node).read(oid, block * BLOCK_SIZE, BLOCK_SIZE, done))
        return -int(result) if result else value_of(data, "read")

    def flush(self, node: int = OWNER) -> int:
        result, _ = self.ask(lambda done: self.cache(node).flush(self.volume.vid, done))
        return int(result)

    def become_owner(self) -> None:
        """Every object has been written through once; from now on writes stay here."""
        for _ in range(2):
            for index in range(2):
                assert not self.write(index, 5, 1)
            self.world.run_for(100 * MILLISECOND)
        assert self.cluster.machines[OWNER].node.claims.mine(self.volume.vid) is not None
        assert not self.flush()

    def restart(self, power: bool = False) -> None:
        machine = self.cluster.machines[OWNER]
        machine.kill(power)
        self.world.run_for(300 * MILLISECOND)
        machine.start()
        self.world.run_until(self.cluster.healthy, HEALTH_LIMIT_NS, "health")

    def in_cluster(self, index: int, block: int) -> int:
        """What the copies say, whatever is cached."""
        oid = data_oid(self.volume.vid, index)
        gateway = self.cluster.machines[2].node.gateway
        result, data = self.ask(lambda done: gateway.raw_read(oid, block * BLOCK_SIZE, BLOCK_SIZE, done))
        assert not result
        return value_of(data, "copies")


@pytest.mark.parametrize("seed", range(4))
def test_writes_stay_here_until_a_flush(seed: int) -> None:
    world = Owner(seed)
    world.become_owner()
    assert not world.write(0, 0, 7)
    assert (world.read(0, 0), world.in_cluster(0, 0)) == (7, 0)
    assert world.cache().volumes.dirty_blocks() == 1
    assert not world.flush()
    assert world.in_cluster(0, 0) == 7 and not world.cache().volumes.dirty_blocks()
    assert not world.write(0, 0, 8, durable=True)
    assert world.in_cluster(0, 0) == 8
    assert not world.write(1, 1, 9)
    assert not world.flush(OTHER)  # through any gateway
    assert world.in_cluster(1, 1) == 9


@pytest.mark.parametrize("seed", range(4))
def test_a_killed_gateway_returns_with_its_dirty_data(seed: int) -> None:
    world = Owner(seed)
    world.become_owner()
    for index in range(2):
        for block in range(3):
            assert not world.write(index, block, 10 + 3 * index + block)
    world.cluster.machines[OWNER].kill()
    world.world.run_for(300 * MILLISECOND)
    assert world.read(0, 0, OTHER) == -Result.VDI_LOCKED
    assert world.write(0, 0, 99, OTHER, durable=True) == Result.VDI_LOCKED
    assert world.flush(OTHER) == Result.VDI_LOCKED
    world.cluster.machines[OWNER].start()
    world.world.run_until(world.cluster.healthy, HEALTH_LIMIT_NS, "health")
    assert [world.read(index, block, OTHER) for index in range(2) for block in range(3)] == list(range(10, 16))


@pytest.mark.parametrize("seed", range(4))
def test_a_lost_cache_loses_what_was_not_flushed_and_nothing_else(seed: int) -> None:
    """P2 holds; P3 does not, and nobody is shown old data before an administrator has agreed."""
    world = Owner(seed)
    world.become_owner()
    assert not world.write(0, 0, 7) and not world.write(1, 0, 8) and not world.flush()
    assert not world.write(0, 0, 9)
    world.restart(power=True)
    for node in (OWNER, OTHER):
        assert world.read(0, 0, node) == -Result.VDI_LOCKED
        assert world.flush(node) == Result.VDI_LOCKED
    claims = world.cluster.machines[OTHER].node.claims
    assert world.ask(lambda done: claims.purge(world.volume.vid, done)) == (Result.SUCCESS,)
    assert [world.read(0, 0, OTHER), world.read(1, 0, OWNER)] == [7, 8]


@pytest.mark.parametrize("fault", [NoSpace, DiskError])
@pytest.mark.parametrize("seed", range(4))
def test_a_cache_disk_that_takes_no_more(seed: int, fault: type[StoreError]) -> None:
    """Writes go to the cluster; what was acknowledged before is there, also beside what is not."""
    world = Owner(seed)
    world.become_owner()
    assert not world.write(0, 0, 7) and not world.write(1, 0, 8)
    disk = world.cluster.machines[OWNER].cache_disk
    disk.fault, disk.fault_chance = fault, 1.0
    cache, oid = world.cache(), data_oid(world.volume.vid, 1)
    result, data = world.ask(lambda done: cache.read(oid, 0, 2 * BLOCK_SIZE, done))  # of the second nothing is here
    assert not result and [value_of(data[start:][:BLOCK_SIZE], "read") for start in (0, BLOCK_SIZE)] == [8, 0]
    assert not world.write(0, 0, 9) and not world.write(0, 1, 10)
    assert (world.in_cluster(0, 0), world.in_cluster(0, 1)) == (9, 10)
    assert [world.read(0, 0), world.read(0, 1), world.read(1, 0)] == [9, 10, 8]
    disk.fault = None
    assert not world.flush()
    assert world.in_cluster(1, 0) == 8


@pytest.mark.parametrize("error", [DiskError, Corrupt])
@pytest.mark.parametrize("seed", range(4))
def test_dirty_data_that_cannot_be_read(seed: int, error: type[StoreError], monkeypatch: pytest.MonkeyPatch) -> None:
    """An error for it and for the flush, never the older bytes of the cluster; the rest is served. A write mends it."""
    world = Owner(seed)
    world.become_owner()
    assert not world.write(0, 0, 7) and not world.write(1, 0, 8) and not world.flush()
    assert not world.write(0, 0, 9)
    store = world.cache().entries.store
    bad, read = data_oid(world.volume.vid, 0), store.read

    def failing(oid: ObjectId, offset: int, length: int, done: Any) -> None:
        if oid == bad and offset < BLOCK_SIZE:
            done(Corrupt("rotten", (0,)) if error is Corrupt else error("unreadable"))
        else:
            read(oid, offset, length, done)

    monkeypatch.setattr(store, "read", failing)
    assert world.read(0, 0) == -Result.EIO
    assert world.flush() == Result.EIO and world.flush(OTHER) == Result.EIO
    assert world.read(0, 0, OTHER) < 0, "the cluster's bytes are older"
    assert (world.read(0, 5), world.read(1, 0)) == (1, 8)
    assert world.cache().volumes.dirty_blocks() == 1
    monkeypatch.undo()
    assert not world.write(0, 0, 10) and not world.flush()
    assert (world.in_cluster(0, 0), world.read(0, 0, OTHER)) == (10, 10)


def test_a_flush_while_the_same_block_is_written_again() -> None:
    """It waits for that write, not for the next push by age."""
    world = Owner(1)
    world.become_owner()
    assert not world.write(0, 0, 7)
    oid, results = data_oid(world.volume.vid, 0), list[int]()
    world.cache().write(oid, 0, block_of(8), False, lambda result, _: results.append(result))
    assert world.cache().volumes.by_vid[Vid(world.volume.vid)].objects[ObjectId(oid)].writing
    begun_ns = world.world.now_ns
    assert not world.flush()
    assert world.world.now_ns - begun_ns < world.cache().volumes.age_ns // 100
    assert results == [0] and world.in_cluster(0, 0) == 8


def test_many_dirty_blocks_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is tried once for a flush, also by a store that answers at once."""
    world = Owner(1)
    world.become_owner()
    for block in range(0, 250, 2):
        assert not world.write(0, block, block + 1)
    tried: list[int] = []

    def failing(oid: ObjectId, offset: int, length: int, done: Any) -> None:
        tried.append(offset)
        done(Corrupt("rotten"))

    with monkeypatch.context() as broken:
        broken.setattr(world.cache().entries.store, "read", failing)
        assert world.flush() == Result.EIO
    assert len(tried) == len(set(tried)) == 125
    assert not world.flush() and world.in_cluster(0, 248) == 249


@pytest.mark.parametrize("error", [DiskError, Corrupt])
def test_clean_data_that_cannot_be_read_is_fetched_again(
    error: type[StoreError], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = Owner(1)
    world.become_owner()
    assert not world.write(0, 0, 7) and not world.flush()
    store = world.cache().entries.store
    hits = world.cache().reads.hits
    with monkeypatch.context() as broken:
        broken.setattr(
            store, "read", lambda *args: args[-1](Corrupt("rotten", (0,)) if error is Corrupt else error(""))
        )
        assert world.read(0, 0) == 7
    world.world.run_for(5 * MILLISECOND)  # it is kept after it was answered
    assert world.read(0, 0) == 7 and world.cache().reads.hits >= hits + 2
    assert world.cluster.probes()["cache.unreadable_clean"] == 1


@pytest.mark.parametrize("seed", range(6))
def test_an_epoch_changes_during_a_push(seed: int) -> None:
    world = Owner(seed)
    world.become_owner()
    for block in range(0, 60, 2):
        assert not world.write(0, block, 100 + block)
    results: list[int] = []
    world.cache().flush(world.volume.vid, lambda result, _: results.append(result))
    world.world.run_for(seed * MILLISECOND // 2)
    world.cluster.machines[2].kill()
    world.world.run_for(200 * MILLISECOND)
    world.cluster.machines[2].start()
    world.world.run_until(lambda: bool(results) and world.cluster.healthy(), HEALTH_LIMIT_NS, "the flush")
    assert results == [Result.SUCCESS]
    assert [world.in_cluster(0, block) for block in range(0, 60, 2)] == [100 + block for block in range(0, 60, 2)]


def test_a_snapshot_has_what_was_dirty() -> None:
    world = Owner(1)
    world.become_owner()
    assert not world.write(0, 0, 7)
    operations = world.cluster.machines[OTHER].node.operations
    result, record = world.ask(
        lambda done: operations.create_vdi(b"guest", 2 * MIB, world.volume.vid, 0, 0, 0, 20, 1, done)
    )
    assert not result and record is not None
    assert world.in_cluster(0, 0) == 7
    assert world.write(0, 0, 8) == Result.READONLY
    assert world.read(0, 0) == 7


def test_the_cache_keeps_to_its_size() -> None:
    """Clean objects go; dirty data beyond half of the size waits for its push."""
    world = Owner(2, cache_bytes=MIB)
    world.become_owner()
    for round_number in range(2):
        for block in range(256):
            assert not world.write(round_number, block, 1000 * round_number + block + 1)
            assert world.cache().volumes.dirty_blocks() * BLOCK_SIZE <= MIB // 2
            assert world.cache().entries.space.used_blocks * BLOCK_SIZE <= MIB + MIB // 2
    for index in range(2):
        assert [world.read(index, block) for block in range(256)] == [1000 * index + n + 1 for n in range(256)]


def test_a_small_read_fetches_little_and_a_sequential_reader_more() -> None:
    world = Owner(3)
    world.become_owner()
    entry = world.cache().volumes.by_vid[Vid(world.volume.vid)].objects[ObjectId(data_oid(world.volume.vid, 0))]
    world.read(0, 100)
    world.world.run_for(50 * MILLISECOND)
    assert entry.present.bit_count() == 2  # this one, and what was written
    world.read(0, 101)
    world.world.run_for(50 * MILLISECOND)
    assert entry.present.bit_count() >= 2 + 16
    misses = world.cache().reads.misses
    for block in range(102, 118):
        world.read(0, block)
        world.world.run_for(5 * MILLISECOND)
    assert world.cache().reads.misses <= misses + 1


def test_what_a_read_brought_is_kept_when_its_answer_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Owner(3)
    world.become_owner()
    world.world.run_for(50 * MILLISECOND)
    cache = world.cache()
    answers, kept = list[int](), list[int]()
    keep = cache.entries.keep

    def counted(*block: Any) -> None:
        kept.append(len(answers))
        keep(*block)

    monkeypatch.setattr(cache.entries, "keep", counted)
    for block in (100, 50, 150, 20):
        oid = data_oid(world.volume.vid, 0)
        cache.read(oid, block * BLOCK_SIZE, BLOCK_SIZE, lambda result, _: answers.append(result))
    assert not kept
    world.world.run_for(50 * MILLISECOND)
    assert answers == [0] * 4 and len(kept) == 4 and all(kept)


@pytest.mark.parametrize("seed", range(12))
def test_a_write_overtakes_what_is_about_to_be_kept(seed: int) -> None:
    """The bytes of a read wait for their answer to leave; a write of the same block in between is newer."""
    world = Owner(seed)
    world.become_owner()
    cache, oid = world.cache(), data_oid(world.volume.vid, 0)
    results: list[int] = []
    cache.read(oid, 0, BLOCK_SIZE, lambda result, _: results.append(result))
    world.world.run_until(lambda: bool(results), 1000 * MILLISECOND, "the read")
    cache.write(oid, 0, block_of(8), False, lambda result, _: results.append(result))
    world.world.run_for(50 * MILLISECOND)
    assert results == [0, 0] and world.read(0, 0) == 8
    assert not world.flush() and world.in_cluster(0, 0) == 8


@pytest.mark.parametrize("seed", range(4))
def test_what_was_kept_may_be_gone_after_a_restart(seed: int) -> None:
    """Some of it has no journal; what was written here has, and is not older for that."""
    world = Owner(seed)
    world.become_owner()
    for block in range(0, 40, 2):
        assert not world.write(0, block, 100 + block)
    assert not world.flush()
    for block in range(1, 40, 2):
        world.read(0, block)
    world.world.run_for(50 * MILLISECOND)
    assert not world.write(0, 0, 7) and not world.write(0, 1, 8)
    world.restart()
    values = {0: 7, 1: 8, 5: 1, **{block: 100 + block for block in range(2, 40, 2)}}
    assert [world.read(0, block) for block in range(40)] == [values.get(block, 0) for block in range(40)]

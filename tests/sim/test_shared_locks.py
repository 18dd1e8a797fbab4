"""Several gateways with one volume open: no client goes on with an old map (protocol.md 8.5, 8.6)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
from tests.sim.test_late_map_writes import create, new_vdi, read_map, running, wait_for, write_map
from tests.sim.test_volumes import stored

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.gateway import Gateway
from sheepdog.cluster.core.ids import NO_OID, ObjectId, Vid, data_oid, inode_oid
from sheepdog.cluster.core.inode import HEADER_SIZE, MAP_END, InodeHeader, map_offset, unpack_map
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.messages import Flag
from sheepdog.cluster.core.script import Script, run
from sheepdog.cluster.core.state import ClusterFlag, node_key
from sheepdog.cluster.core.vdi import LockState, Sharing
from sheepdog.cluster.sim.clients import block_of
from sheepdog.cluster.sim.cluster import HEALTH_LIMIT_NS, SimCluster
from sheepdog.cluster.sim.world import MILLISECOND, World

NAME = b"guest"
LOCKS = ClusterFlag.AUTO_VNODES | ClusterFlag.LOCKS
ROUNDS, SEEDS = 12, 40
LATE_NS = 200 * MILLISECOND  # of events; a write without them takes a twentieth of it


def enforcing(seed: int) -> SimCluster:
    cluster = SimCluster(World(seed), 3)
    cluster.start_all()
    cluster.format(3, flags=LOCKS)
    return cluster


def lock(cluster: SimCluster, node: int, shared: bool, expected: Result = Result.SUCCESS) -> None:
    operations = cluster.machines[node].node.operations
    result, _ = wait_for(cluster.world, lambda done: operations.lock_vdi(NAME, b"", 0, shared, done))
    assert result == expected, Result(result)


def release(cluster: SimCluster, node: int, vid: Vid, shared: bool) -> None:
    operations = cluster.machines[node].node.operations
    wait_for(cluster.world, lambda done: operations.release_vdi(vid, shared, done))


def sharing(cluster: SimCluster, vid: Vid) -> dict[int, int]:
    """State of each participant, as the last node sees it."""
    cluster.world.run_for(100 * MILLISECOND)
    machine = next(machine for machine in reversed(cluster.machines) if machine.up)
    record = machine.node.cluster.vdis.get(vid)
    assert record is not None
    assert len(record.owners) == len(record.sharing) or record.lock == LockState.LOCKED
    keys = [node_key(machine.id) for machine in cluster.machines]
    return {keys.index(owner): state for owner, state in zip(record.owners, record.sharing, strict=False)}


def tgt_read(cluster: SimCluster, node: int, oid: ObjectId, length: int) -> tuple[int, Any]:
    """A read with the flag TGT."""
    gateway = cluster.machines[node].node.gateway

    def ask(done: Any) -> None:
        if not gateway.read_invalidated(oid, 0, length, done):
            gateway.read(oid, 0, length, done)

    answer: tuple[int, Any] = wait_for(cluster.world, ask)
    return answer


def test_states_of_the_participants() -> None:
    cluster = enforcing(1)
    vid = new_vdi(cluster)
    create(cluster, vid, 0, 1)
    lock(cluster, 0, shared=True)
    assert sharing(cluster, vid) == {0: Sharing.MODIFIED}
    lock(cluster, 1, shared=True)
    lock(cluster, 1, shared=True)  # tgt does so when it reloads
    assert sharing(cluster, vid) == {0: Sharing.MODIFIED, 1: Sharing.INVALIDATED}
    lock(cluster, 2, shared=False, expected=Result.VDI_LOCKED)
    assert tgt_read(cluster, 0, data_oid(vid, 0), 1)[0] == Result.SUCCESS
    assert tgt_read(cluster, 1, data_oid(vid, 0), 1)[0] == Result.INODE_INVALIDATED
    assert tgt_read(cluster, 1, inode_oid(vid), 1)[0] == Result.INODE_INVALIDATED
    result, data = tgt_read(cluster, 1, inode_oid(vid), MAP_END)
    assert (result, len(data)) == (0, MAP_END)
    assert sharing(cluster, vid) == {0: Sharing.SHARED, 1: Sharing.SHARED}
    write_map(cluster, vid, 0, vid, by=1)
    assert sharing(cluster, vid) == {0: Sharing.INVALIDATED, 1: Sharing.MODIFIED}
    assert tgt_read(cluster, 0, data_oid(vid, 0), 1)[0] == Result.INODE_INVALIDATED
    write_map(cluster, vid, 1, vid, by=2)  # dog, through a node that does not take part
    assert sharing(cluster, vid) == {0: Sharing.INVALIDATED, 1: Sharing.INVALIDATED}
    release(cluster, 0, vid, shared=True)
    assert sharing(cluster, vid) == {1: Sharing.INVALIDATED}
    cluster.machines[1].kill()
    cluster.world.run_until(lambda: not sharing(cluster, vid), HEALTH_LIMIT_NS, "the lock of the dead node ends")
    lock(cluster, 2, shared=False)


def test_nothing_is_invalidated_unless_locks_are_enforced() -> None:
    cluster = running(2)
    vid = new_vdi(cluster)
    create(cluster, vid, 0)
    for node in range(3):
        lock(cluster, node, shared=True)
        lock(cluster, node, shared=False)
    write_map(cluster, vid, 0, vid, by=0)
    for node in range(3):
        assert tgt_read(cluster, node, data_oid(vid, 0), 1)[0] == Result.SUCCESS
    assert sharing(cluster, vid) == {}


def test_the_lock_goes_with_the_volume() -> None:
    """A snapshot moves the lock; a client that has not noticed it releases the vid that it locked."""
    cluster = enforcing(3)
    vid = new_vdi(cluster)
    lock(cluster, 0, shared=False)
    heir = new_vdi(cluster, vid, snapshot=True, by=1)
    lock(cluster, 1, shared=False, expected=Result.VDI_LOCKED)
    operations = cluster.machines[1].node.operations
    for shared in (False, True):  # the snapshot is nobody's
        result, record = wait_for(
            cluster.world,
            partial(operations.lock_vdi, NAME, b"", 1, shared),
        )
        assert (result, record.vid) == (0, vid)
    # `qemu-img info image#tag` beside the guest: what it opens and releases is not the guest's.
    guest = cluster.machines[0].node.operations
    wait_for(cluster.world, lambda done: guest.lock_vdi(NAME, b"", 1, False, done))
    release(cluster, 0, vid, shared=False)
    lock(cluster, 1, shared=False, expected=Result.VDI_LOCKED)
    release(cluster, 0, vid, shared=False)
    lock(cluster, 1, shared=False)
    release(cluster, 1, heir, shared=False)
    lock(cluster, 2, shared=False)


def test_a_lock_ends_with_the_incarnation_that_took_it() -> None:
    """Also when its node is back before anybody has noticed that it was gone."""
    cluster = enforcing(4)
    new_vdi(cluster)
    lock(cluster, 0, shared=False)
    cluster.machines[0].kill()
    cluster.machines[0].start()
    cluster.world.run_until(cluster.healthy, HEALTH_LIMIT_NS, "health")
    lock(cluster, 1, shared=False)


def test_paths_follow_a_snapshot() -> None:
    """A path that has not noticed a snapshot reads nothing old; a client of the snapshot itself is left alone."""
    cluster = enforcing(5)
    vid = new_vdi(cluster)
    create(cluster, vid, 0)
    for node in (0, 1):
        lock(cluster, node, shared=True)
    write_map(cluster, vid, 0, vid, by=0)
    heir = new_vdi(cluster, vid, snapshot=True, by=2)
    assert sharing(cluster, heir) == {0: Sharing.INVALIDATED, 1: Sharing.INVALIDATED}
    for node in (0, 1):
        assert tgt_read(cluster, node, data_oid(vid, 0), 1)[0] == Result.INODE_INVALIDATED
        assert tgt_read(cluster, node, inode_oid(heir), HEADER_SIZE)[0] == Result.SUCCESS
    operations = cluster.machines[1].node.operations
    result, record = wait_for(cluster.world, lambda done: operations.lock_vdi(NAME, b"", 1, True, done))
    assert (result, record.vid) == (0, vid)
    assert tgt_read(cluster, 1, data_oid(vid, 0), 1)[0] == Result.SUCCESS
    release(cluster, 1, vid, shared=True)  # of the snapshot
    assert sharing(cluster, heir) == {0: Sharing.INVALIDATED, 1: Sharing.INVALIDATED}
    release(cluster, 1, vid, shared=True)  # of what it was when it was opened first
    assert sharing(cluster, heir) == {0: Sharing.INVALIDATED}
    result, data = tgt_read(cluster, 0, inode_oid(vid), MAP_END)
    assert InodeHeader.unpack(data).vdi_id == heir
    assert sharing(cluster, heir) == {0: Sharing.SHARED}


class Path:
    """A tgtd of its own on each gateway, all with the same volume open: it believes its map until it is told not to."""

    def __init__(self, cluster: SimCluster, vid: Vid, node: int) -> None:
        self.cluster = cluster
        self.vid = vid
        self.node = node
        self.entries: list[int] = []

    def _ask(self, what: str, oid: ObjectId, *arguments: Any, length: int = 0) -> Script[tuple[int, Any]]:
        gateway = self.cluster.machines[self.node].node.gateway
        while True:

            def ask(done: Any) -> None:
                if not gateway.read_invalidated(oid, 0, length, done):
                    getattr(gateway, what)(oid, *arguments, done)

            result, data = yield ask
            if result != Result.INODE_INVALIDATED:
                return result, data
            result, data = yield lambda done: self._reload(gateway, done)
            assert not result
            self.entries = list(unpack_map(bytes(data)[map_offset(0) :]))[:5]
            return Result.INODE_INVALIDATED, b""

    def _reload(self, gateway: Gateway, done: Any) -> None:
        if not gateway.read_invalidated(inode_oid(self.vid), 0, MAP_END, done):
            gateway.read(inode_oid(self.vid), 0, MAP_END, done)

    def write(self, index: int, value: int) -> Script[None]:
        oid, data = data_oid(self.vid, index), block_of(value)
        while True:
            known = self.entries[index] == self.vid
            if known:
                result, _ = yield from self._ask("write", oid, 0, data, True)
            else:
                result, _ = yield from self._ask("create", oid, ObjectId(0), 0, data, True)
            if result == Result.INODE_INVALIDATED:
                continue
            assert not result, Result(result)
            if not known:
                entry = self.vid.to_bytes(4, "little")
                self.entries[index] = self.vid
                result, _ = yield from self._ask("write", inode_oid(self.vid), map_offset(index), entry, True)
                if result == Result.INODE_INVALIDATED:
                    continue
            return

    def read(self, index: int) -> Script[bytes]:
        while True:
            if self.entries[index]:
                result, data = yield from self._ask("read", data_oid(self.vid, index), 0, BLOCK_SIZE, length=BLOCK_SIZE)
            else:  # tgt asks for one byte of the inode before it says that there is a hole
                result, data = yield from self._ask("read", inode_oid(self.vid), 0, 1, length=1)
                data = bytes(BLOCK_SIZE)
            if result != Result.INODE_INVALIDATED:
                assert not result, Result(result)
                return bytes(data)


def shared_by_three(seed: int) -> tuple[SimCluster, Vid, list[Path]]:
    """A new volume, and a path to it through each node."""
    cluster = enforcing(seed)
    vid = new_vdi(cluster)
    paths = [Path(cluster, vid, node) for node in range(3)]
    for path in paths:
        lock(cluster, path.node, shared=True)
        path.entries = read_map(cluster, vid)
    return cluster, vid, paths


def test_what_one_path_has_written_the_others_read() -> None:
    """An initiator that uses its paths in turn sees what it wrote, whichever way it went."""
    invalidated = 0
    for seed in range(SEEDS):
        cluster, vid, paths = shared_by_three(seed)
        chance = cluster.world.stream("initiator")
        for value in range(1, ROUNDS):
            index = chance.randrange(5)
            ended: list[None] = []
            run(chance.choice(paths).write(index, value), ended.append)
            cluster.world.run_until(partial(bool, ended), HEALTH_LIMIT_NS, "a write")
            found: list[bytes] = []
            run(chance.choice(paths).read(index), found.append)
            cluster.world.run_until(partial(bool, found), HEALTH_LIMIT_NS, "a read")
            assert found[0] == block_of(value), f"seed {seed}, value {value}"
        invalidated += cluster.machines[0].node.coherence.is_invalidated(vid)
    assert invalidated, "nobody was ever invalidated in the end"


def _write_together(seed: int) -> None:
    cluster, _, paths = shared_by_three(seed)
    chance = cluster.world.stream("initiator")
    content: dict[int, int] = {}
    ended: list[None] = []
    for indices in ((0, 1), (2, 3, 4)):
        for index, path in zip(indices, chance.sample(paths, len(indices)), strict=True):
            content[index] = index + 1
            begin = partial(run, path.write(index, content[index]), ended.append)
            cluster.world.after(chance.randrange(MILLISECOND), begin)
        cluster.world.run_until(lambda: len(ended) == len(content), HEALTH_LIMIT_NS, "the writes")
        for path, index in product(paths, content):
            found: list[bytes] = []
            run(path.read(index), found.append)
            cluster.world.run_until(partial(bool, found), HEALTH_LIMIT_NS, "a read")
            assert found[0] == block_of(content[index]), f"seed {seed}: object {index} through node {path.node}"


def test_what_several_paths_have_written_at_a_time_all_read() -> None:
    """Two that change the map together both have an old one afterwards: neither may be taken for the newest."""
    for seed in range(SEEDS):
        _write_together(seed)


class Late:
    """Three paths of one volume; what is ordered comes late to one node."""

    def __init__(self) -> None:
        self.cluster, self.vid, self.paths = shared_by_three(1)
        for path in self.paths:
            assert self.wait(path.read(0)) == bytes(BLOCK_SIZE)

    def begin(self, script: Script[Any]) -> list[Any]:
        """Its result will be in what is returned."""
        ended: list[Any] = []
        run(script, ended.append)
        return ended

    def until(self, ended: list[Any]) -> Any:
        self.cluster.world.run_until(partial(bool, ended), HEALTH_LIMIT_NS, "a path")
        return ended[0]

    def wait(self, script: Script[Any]) -> Any:
        return self.until(self.begin(script))

    def fall_behind(self, node: int) -> None:
        process = self.cluster.machines[node].process
        assert process is not None
        process.attachment.fall_behind(LATE_NS)


def is_read_after_all_writers_know() -> bool:
    """Whether a reader, whose map read began before a writer had heard of it, finds both of that one's writes."""
    late = Late()
    writer, reader = late.paths[:2]
    late.wait(writer.write(0, 1))
    late.fall_behind(writer.node)
    reading = late.begin(reader.read(0))
    late.cluster.world.run_for(LATE_NS // 4)
    late.wait(writer.write(1, 2))
    return [late.until(reading), late.wait(reader.read(1))] == [block_of(1), block_of(2)]


def test_a_map_is_read_after_all_writers_know_of_it() -> None:
    """Else one that has not heard of the reader thinks that nobody has to be told."""
    assert is_read_after_all_writers_know()


def test_a_second_map_write_waits_for_those_that_have_not_heard_of_the_first() -> None:
    """The first one's event says at this node that the others know; they may not."""
    late = Late()
    writer, reader = late.paths[:2]
    late.fall_behind(reader.node)
    first = late.begin(writer.write(0, 1))
    late.cluster.world.run_for(LATE_NS // 4)
    late.wait(writer.write(1, 2))
    assert late.wait(reader.read(1)) == block_of(2)
    late.until(first)
    assert late.wait(reader.read(0)) == block_of(1)


def is_told_after_a_map_write() -> bool:
    """Whether a reader finds what was written, though it read the map anew just before the entry came into it."""
    late, held = Late(), list[Callable[[], None]]()
    writer, reader = late.paths[:2]
    gateway, inode = late.cluster.machines[writer.node].node.gateway, inode_oid(late.vid)
    change = gateway.change

    def later(which: ObjectId, *rest: Any) -> None:
        if which == inode:
            held.append(partial(change, which, *rest))
        else:
            change(which, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gateway, "change", later)
        writing = late.begin(writer.write(0, 1))
        late.cluster.world.run_until(partial(bool, held), HEALTH_LIMIT_NS, "the entry")
        assert late.wait(reader.read(0)) == bytes(BLOCK_SIZE)
    for call in held:
        call()
    late.until(writing)
    found: bytes = late.wait(reader.read(0))
    return found == block_of(1)


def test_others_are_told_after_a_map_write() -> None:
    """Who has read the map since they were told before it goes on with an old one else."""
    assert is_told_after_a_map_write()


def test_who_shares_the_volume_while_its_map_is_written_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody had to be told before: nobody else had it open."""
    cluster, held, answers = enforcing(6), list[Callable[[], None]](), list[int]()
    vid = new_vdi(cluster)
    create(cluster, vid, 0)
    gateway, inode, entry = cluster.machines[0].node.gateway, inode_oid(vid), vid.to_bytes(4, "little")
    change = gateway.change
    monkeypatch.setattr(gateway, "change", lambda *rest: held.append(partial(change, *rest)))
    gateway.write(inode, map_offset(0), entry, True, lambda result, _: answers.append(int(result)))
    assert held
    for node in (0, 1):
        lock(cluster, node, shared=True)
    result, data = tgt_read(cluster, 1, inode, MAP_END)
    assert (result, unpack_map(bytes(data)[map_offset(0) :])[0]) == (Result.SUCCESS, 0)
    held.pop()()
    cluster.world.run_until(lambda: bool(answers), HEALTH_LIMIT_NS, "the entry")
    assert answers == [Result.SUCCESS]
    assert tgt_read(cluster, 1, data_oid(vid, 0), 1)[0] == Result.INODE_INVALIDATED


def test_what_was_given_back_does_not_come_back_when_its_gateway_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has taken the object out of the map, and not yet removed it, when another client makes that object anew."""
    cluster, vid, (first, second, _) = shared_by_three(1)
    world, oid = cluster.world, data_oid(vid, 0)
    ended: list[None] = []
    run(first.write(0, 7), ended.append)
    world.run_until(partial(bool, ended), HEALTH_LIMIT_NS, "a write")
    machine = cluster.machines[first.node]
    change = machine.node.gateway.change

    def dies_before_the_removal(which: ObjectId, flags: int, *rest: Any) -> None:
        if flags & Flag.REMOVE:
            machine.kill()
        else:
            change(which, flags, *rest)

    monkeypatch.setattr(machine.node.gateway, "change", dies_before_the_removal)
    inode = inode_oid(vid)
    machine.node.gateway.write(inode, map_offset(0), bytes(4), True, lambda result, _: None)
    world.run_until(lambda: not machine.up, HEALTH_LIMIT_NS, "a death")
    gateway = cluster.machines[second.node].node.gateway
    world.run_until(lambda: len(cluster.machines[second.node].node.cluster.members) == 2, HEALTH_LIMIT_NS, "its end")
    assert read_map(cluster, vid)[0] == 0
    (result, _) = wait_for(world, lambda done: gateway.create(oid, ObjectId(0), BLOCK_SIZE, block_of(8), True, done))
    assert result == Result.SUCCESS
    (result, data) = wait_for(world, lambda done: gateway.read(oid, 0, BLOCK_SIZE, done))
    assert (result, bytes(data)) == (Result.SUCCESS, bytes(BLOCK_SIZE))


@pytest.mark.parametrize("delay_us", [0, 200, 500, 1000, 2000, 4000])
def test_no_snapshot_comes_between_the_two_parts_of_a_creation(delay_us: int) -> None:
    """A client among others makes an object, and writes its range behind that. If the snapshot took the first part
    only, the client would go on with the volume's heir, and no map would name the object."""
    cluster = enforcing(1)
    world, vid = cluster.world, new_vdi(cluster)
    oid, answers, snapshots = data_oid(vid, 0), list[int](), list[int]()
    for node in range(2):
        lock(cluster, node, True)
    gateway, operations = cluster.machines[0].node.gateway, cluster.machines[1].node.operations
    gateway.create(oid, NO_OID, 0, block_of(1), True, lambda result, _: answers.append(int(result)))
    world.after(
        delay_us * 1000,
        lambda: operations.snapshot_vdi(NAME, b"tag", 0, 0, lambda result, _: snapshots.append(int(result))),
    )
    world.run_until(lambda: bool(answers and snapshots), HEALTH_LIMIT_NS, "answers")
    assert snapshots == [Result.SUCCESS]
    assert answers == [Result.SUCCESS if oid in stored(cluster) else Result.READONLY]

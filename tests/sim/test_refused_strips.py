"""Writes of coded objects that strips refuse for want of space: what was answered stays, and the object goes on."""

from __future__ import annotations

import pytest
from tests.sim.test_directed import holders

from sheepdog.cluster.core.copies import Copies
from sheepdog.cluster.core.errors import DiskError, NoSpace, Result, StoreError
from sheepdog.cluster.core.home import Home
from sheepdog.cluster.core.ids import NodeId, ObjectId, Version, data_oid, strip_of
from sheepdog.cluster.core.limits import BLOCK_SIZE, RECOVERY_RETRY_NS
from sheepdog.cluster.core.messages import Kind
from sheepdog.cluster.core.ports import Buffer, Done, ReadDone
from sheepdog.cluster.sim.audit import audit
from sheepdog.cluster.sim.clients import Volume, block_of, make_volume
from sheepdog.cluster.sim.cluster import HEALTH_LIMIT_NS, Machine, SimCluster
from sheepdog.cluster.sim.store import SimStore
from sheepdog.cluster.sim.world import MILLISECOND, SECOND, World

UNIT = 64 * 1024
SEEDS = 8


class Story:
    """One object, 2:1 on three nodes: two data strips and a parity strip, the home first; on four 2:2, on six 4:2."""

    def __init__(self, seed: int, nodes: int = 3, policy: int = 0) -> None:
        self.cluster = SimCluster(World(seed), nodes)
        self.cluster.start_all()
        self.cluster.format(nodes // 2 + 1)
        self.volume: Volume = make_volume(
            self.cluster, "coded", 1, (), policy=policy or {3: 0x11, 4: 0x12, 6: 0x22}[nodes]
        )
        self.oid = data_oid(self.volume.vid, 0)
        self.settle()
        self.home, self.second, self.parity, *self.more = holders(self.cluster, self.volume)

    def settle(self) -> None:
        self.cluster.world.run_until(self.cluster.healthy, HEALTH_LIMIT_NS, "health")

    def write(self, offset: int, value: int, durable: bool = True, by: Machine | None = None) -> list[int]:
        """Begins a write of one block through the home or another node; its result comes into the list."""
        results: list[int] = []
        (by or self.home).node.gateway.write(
            self.oid, offset, block_of(value), durable, lambda result, _: results.append(int(result))
        )
        return results

    def wait(self, *answers: list[int]) -> list[int]:
        self.cluster.world.run_until(lambda: all(answers), 5 * SECOND, "answers")
        return [answer[0] for answer in answers]

    def read(self, machine: Machine, offset: int) -> tuple[int, bytes]:
        answers: list[tuple[int, bytes]] = []
        machine.node.gateway.read(
            self.oid, offset, BLOCK_SIZE, lambda result, data: answers.append((int(result), bytes(data)))
        )
        self.cluster.world.run_until(lambda: bool(answers), 5 * SECOND, "read")
        return answers[0]

    def blocks(self, *offsets: int) -> list[bytes]:
        """What every node reads at these offsets: the same, without an error."""
        found = []
        for offset in offsets:
            answers = {self.read(machine, offset) for machine in self.cluster.machines}
            assert len(answers) == 1
            result, data = answers.pop()
            assert result == Result.SUCCESS
            found.append(data)
        return found


def fill(*machines: Machine) -> None:
    for machine in machines:
        machine.disk.fault, machine.disk.fault_chance = NoSpace, 1.0


def empty(*machines: Machine) -> None:
    for machine in machines:
        machine.disk.fault = None


def answered_and_gone(seed: int, offset: int) -> bool:
    """Two writes at once, while the disk of the parity is full, and then power fails everywhere: is one gone that was
    answered?"""
    story = Story(seed)
    story.wait(story.write(0, 1))
    story.wait(story.write(offset, 1))
    fill(story.parity)
    results = story.wait(story.write(0, 2), story.write(offset, 3))
    for machine in story.cluster.machines:
        machine.kill(power=True)
    empty(story.parity)
    story.cluster.start_all()
    story.settle()
    found = story.blocks(0, offset)
    return any(
        not result and data != block_of(value) for result, data, value in zip(results, found, (2, 3), strict=True)
    )


@pytest.mark.parametrize("offset", [BLOCK_SIZE, UNIT])
def test_what_is_answered_behind_a_refused_write_stays(offset: int) -> None:
    assert not any(answered_and_gone(seed, offset) for seed in range(SEEDS))


@pytest.mark.parametrize("offset", [BLOCK_SIZE, UNIT])
def test_it_would_not_if_it_were_answered_at_once(offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: the write is where it must be, as long as somebody remembers that the parity is bad."""
    monkeypatch.setattr(Home, "_waits_for_repair", lambda self, write: False)
    assert any(answered_and_gone(seed, offset) for seed in range(SEEDS))


def fill_after(machine: Machine, writes: int) -> None:
    """The disk takes so many writes, and then no more."""
    left = iter([None] * writes)
    machine.disk.fault, machine.disk.fault_chance = lambda text: next(left, NoSpace(text)), 1.0


def both_full(story: Story, taken: int, *writes: tuple[int, int]) -> list[int]:
    """Writes at once while the disks are full: of the three strips' two, of which the parity may take some first."""
    fill(story.second)
    fill_after(story.parity, taken)
    results = story.wait(*(story.write(offset, value) for offset, value in writes))
    story.cluster.world.run_for(SECOND)
    return results


CASES = {
    "parity refuses, and the strip that is not written cannot be stamped": (0, [(0, 2)]),
    "all refuse": (0, [(UNIT, 2)]),
    "one strip takes its write": (0, [(0, 2), (UNIT, 2), (BLOCK_SIZE, 2)]),
    "parity has what another refused": (1, [(UNIT, 2), (0, 2)]),
}


@pytest.mark.parametrize(("taken", "writes"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("seed", range(3))
def test_two_full_disks(seed: int, taken: int, writes: list[tuple[int, int]]) -> None:
    """More than the parity can stand: it is read meanwhile, and is written and repaired when there is space."""
    story = Story(seed)
    offsets = (0, BLOCK_SIZE, UNIT)
    story.wait(*(story.write(offset, 1) for offset in offsets))
    results = both_full(story, taken, *writes)
    assert set(results) <= {Result.SUCCESS, Result.NO_SPACE, Result.EIO}
    assert Result.NO_SPACE in results
    assert story.wait(story.write(0, 3)) == [Result.NO_SPACE]
    seen = story.blocks(*offsets)
    assert set(seen) <= {block_of(1), block_of(2)}
    for (offset, value), result in zip(writes, results, strict=True):
        assert result or seen[offsets.index(offset)] == block_of(value), "answered as written"
    empty(story.second, story.parity)
    story.settle()
    assert story.blocks(*offsets) == seen
    assert story.wait(*(story.write(offset, 4) for offset in offsets)) == [0, 0, 0]
    assert story.blocks(*offsets) == [block_of(4)] * 3
    story.settle()
    audit(story.cluster)


def refuse_writes(patch: pytest.MonkeyPatch, machine: Machine) -> None:
    """The disk has no space for bytes, but it takes versions; it says so when more has been asked meanwhile."""
    store = machine.node.context.store
    assert isinstance(store, SimStore)

    def write(oid: ObjectId, offset: int, data: Buffer, version: Version, durable: bool, done: Done) -> bool:
        machine.cluster.world.after(MILLISECOND, lambda: done(NoSpace("full")))
        return False

    patch.setattr(store, "write", write)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_what_was_answered_is_there_when_the_data_strips_are_taken_as_they_are(seed: int) -> None:
    """Both data strips are full, the parity is not: a tolerated write that only the parity took is not a success."""
    story = Story(seed)
    offsets = (0, BLOCK_SIZE, UNIT)
    story.wait(*(story.write(offset, 1) for offset in offsets))
    asked = [(0, 2), (BLOCK_SIZE, 3), (UNIT, 4)]
    with pytest.MonkeyPatch.context() as patch:
        for machine in (story.home, story.second):
            refuse_writes(patch, machine)
        answers = [story.write(offset, value) for offset, value in asked]
        story.cluster.world.run_for(SECOND)
    story.settle()
    results = story.wait(*answers)
    found = story.blocks(*offsets)
    for (_, value), result, data in zip(asked, results, found, strict=True):
        assert result or data == block_of(value), "answered as written"


def disagree(story: Story, *full: Machine) -> None:
    """A cold start with strips of different versions, some of which have no space."""
    story.wait(*(story.write(offset, 1) for offset in (0, BLOCK_SIZE, UNIT)))
    story.settle()
    story.wait(story.write(0, 2))  # which the second strip does not hear of before all end
    for machine in story.cluster.machines:
        machine.kill()
    fill(*full)
    story.cluster.start_all()
    machines = story.cluster.machines
    story.cluster.world.run_until(lambda: all(one.serves() for one in machines), 10 * SECOND, "a cold start")


def agreements(story: Story, retries: int) -> int:
    """How many strips are asked to become one state with the others, in the time of so many retries."""
    asked = [0]

    def trap(sender: NodeId, receiver: NodeId, kind: int) -> None:
        asked[0] += kind == Kind.ROLLBACK

    story.cluster.fabric.trap = trap
    story.cluster.world.run_for(retries * RECOVERY_RETRY_NS)
    story.cluster.fabric.trap = None
    return asked[0]


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_strip_has_no_space_for_the_version_that_all_agree_upon(seed: int) -> None:
    """The others have it: they are read, and it is asked again now and then, however many come to read."""
    story, offsets = Story(seed), (0, BLOCK_SIZE, UNIT)
    disagree(story, story.second)
    for _ in range(4):
        assert story.blocks(*offsets) == [block_of(2), block_of(1), block_of(1)]
    assert story.wait(story.write(0, 3)) == [Result.NO_SPACE]
    assert 0 < agreements(story, 20) <= 21
    empty(story.second)
    story.settle()
    assert story.blocks(*offsets) == [block_of(2), block_of(1), block_of(1)]
    assert story.wait(story.write(0, 3)) == [Result.SUCCESS]
    audit(story.cluster)


@pytest.mark.parametrize("seed", range(3))
def test_more_strips_have_no_space_than_may_be_lost(seed: int) -> None:
    """It is not read before some of them have: after further losses nobody might know what was read."""
    story, answers = Story(seed), list[tuple[int, bytes]]()
    disagree(story, story.second, story.parity)
    for _ in range(10):
        story.cluster.world.run_for(RECOVERY_RETRY_NS // 3)
        story.home.node.gateway.read(
            story.oid, 0, BLOCK_SIZE, lambda result, data: answers.append((int(result), bytes(data)))
        )
    assert agreements(story, 20) <= 2 * 21, "each read is no chain of tries of its own"
    assert not answers
    empty(story.second)
    story.cluster.world.run_until(lambda: len(answers) == 10, 2 * SECOND, "reads")
    assert set(answers) == {(0, block_of(2))}
    empty(story.parity)
    story.settle()
    audit(story.cluster)


def read_slowly(patch: pytest.MonkeyPatch, machine: Machine) -> None:
    """The disk takes its time, so that what is asked of a strip queues."""
    store, world = machine.node.context.store, machine.cluster.world
    read = store.read

    def later(oid: ObjectId, offset: int, length: int, done: ReadDone) -> None:
        def now() -> None:
            if machine.up and machine.node.context.store is store:  # else its process has ended
                read(oid, offset, length, done)

        world.after(MILLISECOND, now)

    patch.setattr(store, "read", later)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_write_behind_one_that_is_refused_makes_no_bytes_of_its_own(seed: int) -> None:
    """It looks at the old bytes while the one before it waits at the strip, which then refuses both; the parity takes
    them. That a strip lacks a write is no rot."""
    story = Story(seed)
    offsets = (UNIT, UNIT + BLOCK_SIZE)
    story.wait(*(story.write(offset, 1) for offset in offsets))
    story.settle()
    with pytest.MonkeyPatch.context() as patch:
        read_slowly(patch, story.second)
        refuse_writes(patch, story.second)
        answers = [story.write(offset, value) for offset, value in ((UNIT, 2), (UNIT + BLOCK_SIZE, 3), (UNIT, 4))]
        story.cluster.world.run_for(SECOND)
    story.settle()
    story.wait(*answers)
    assert {block[0] for block in story.blocks(UNIT)} <= {1, 2, 4}
    assert "strips.corrupt" not in story.cluster.probes()
    audit(story.cluster)


@pytest.mark.parametrize("seed", range(3))
def test_a_strip_that_was_made_anew_counts_again(seed: int) -> None:
    """Of two parity strips that lack a write one is restored, the other one cannot be; then a data strip rots."""
    story, offsets = Story(seed, 4), (0, UNIT)
    story.wait(*(story.write(offset, 1) for offset in offsets))
    (broken,) = story.more
    fill(story.parity)
    broken.disk.fault, broken.disk.fault_chance = DiskError, 1.0
    assert story.wait(story.write(0, 2)) == [Result.NO_SPACE]
    empty(story.parity)
    home = story.home.node.copies.at_home()
    story.cluster.world.run_until(lambda: not home.recovery.knows(story.oid), 10 * SECOND, "giving the other one up")
    empty(broken)
    story.second.disk.copies()[strip_of(story.oid, 1)].rotten[0] = None
    assert story.blocks(*offsets) == [block_of(2), block_of(1)]
    story.settle()
    assert story.blocks(*offsets) == [block_of(2), block_of(1)]
    audit(story.cluster)


def refused_by_the_parity(seed: int, error: type[StoreError]) -> tuple[Story, list[tuple[int, bytes]]]:
    """A write that the parity does not take, and what all nodes read for a while then."""
    story, seen = Story(seed), list[tuple[int, bytes]]()
    story.wait(story.write(0, 1), story.write(UNIT, 1))
    story.settle()
    story.parity.disk.fault, story.parity.disk.fault_chance = error, 1.0
    story.write(UNIT, 2)
    for _ in range(20):
        story.cluster.world.run_for(10 * MILLISECOND)
        for machine in story.cluster.machines:
            machine.node.gateway.read(
                story.oid, UNIT, BLOCK_SIZE, lambda result, data: seen.append((int(result), bytes(data)))
            )
    story.cluster.world.run_for(10 * MILLISECOND)
    return story, seen


@pytest.mark.parametrize("error", [NoSpace, DiskError])
@pytest.mark.parametrize("seed", range(4))
def test_a_write_that_was_read_though_a_strip_lacks_it_stays(seed: int, error: type[StoreError]) -> None:
    """Power fails everywhere before the strip is made anew."""
    story, seen = refused_by_the_parity(seed, error)
    for machine in story.cluster.machines:
        machine.kill(power=True)
    empty(story.parity)
    story.cluster.start_all()
    story.settle()
    assert set(seen) == {(0, block_of(2))}
    assert story.blocks(UNIT) == [block_of(2)]
    audit(story.cluster)


@pytest.mark.parametrize("error", [NoSpace, DiskError])
def test_it_is_not_read_before_the_strip_is_known_to_lack_it(
    error: type[StoreError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither through the home nor from the strip that has it."""
    monkeypatch.setattr(Copies, "note_bad", lambda self, strip, noted: None)
    _, seen = refused_by_the_parity(2, error)
    assert not seen

"""Coded objects of which only D strips are here, and one of these refuses a write: it is taken back from the others."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

import pytest
from tests.sim.test_directed import settle
from tests.sim.test_refused_strips import UNIT, Story, empty, fill, refuse_writes
from tests.sim.test_strip_sends import at_answer

from sheepdog.cluster.core.copies import Copies
from sheepdog.cluster.core.errors import DiskError, NoSpace, Result, StoreError
from sheepdog.cluster.core.home_writes import Submission, Write
from sheepdog.cluster.core.ids import NodeId, ObjectId, Version, strip_of
from sheepdog.cluster.core.limits import BLOCK_SIZE, LEVEL_TICK_NS, RECOVERY_RETRY_NS, STABLE_DELAY_NS
from sheepdog.cluster.core.messages import Buffer, Kind, Message
from sheepdog.cluster.core.peering import Verdict
from sheepdog.cluster.core.ports import Done
from sheepdog.cluster.core.recovery_jobs import StripJob
from sheepdog.cluster.core.replica import Replica
from sheepdog.cluster.core.strip_levels import StripLevels
from sheepdog.cluster.core.strip_sends import Sending, StripSends
from sheepdog.cluster.core.strip_undo import UndoLog
from sheepdog.cluster.core.take_back import TakeBack
from sheepdog.cluster.sim.audit import audit
from sheepdog.cluster.sim.clients import block_of
from sheepdog.cluster.sim.cluster import Machine
from sheepdog.cluster.sim.history import Violation
from sheepdog.cluster.sim.store import SimStore
from sheepdog.cluster.sim.world import MILLISECOND, SECOND, Stuck

SEEDS = 4
OFFSETS = tuple(strip * UNIT for strip in range(4))  # one of each data strip


class Short(Story):
    """4:2 on six nodes, of which those of two data strips go away: strips 0 (the home's), 3, 4 and 5 are left."""

    def __init__(self, seed: int, *written: int) -> None:
        """`written`: offsets, in the epoch with four nodes, but not durably: that would go to all strips."""
        super().__init__(seed, 6)
        self.wait(*(self.write(offset, 1) for offset in OFFSETS))
        self.settle()
        self.away = [self.second, self.parity]
        self.left = [self.home, *self.more]
        for machine in self.away:
            machine.kill()
        settle(self.cluster, *self.left)
        self.wait(*(self.write(offset, 1, durable=False) for offset in written))

    def seen(self) -> list[int]:
        """What every node that runs reads: the same, without an error."""
        found = []
        for offset in OFFSETS:
            answers = {self.read(machine, offset) for machine in self.cluster.machines if machine.up}
            assert len(answers) == 1
            result, data = answers.pop()
            assert result == Result.SUCCESS
            found.append(data[0])
        return found

    def come_back(self, *machines: Machine) -> None:
        """Nodes start while others may be full."""
        for machine in machines:
            machine.start()
        up = [machine for machine in self.cluster.machines if machine.up]
        self.cluster.world.run_until(lambda: all(one.serves() for one in up), 10 * SECOND, "an epoch")
        self.cluster.world.run_for(SECOND)

    def ends_well(self) -> list[int]:
        """When all nodes are here and have space: what is read then, and that it can be written."""
        empty(*self.cluster.machines)
        for machine in self.cluster.machines:
            if not machine.up:
                machine.start()
        self.settle()
        found = self.seen()
        assert self.wait(*(self.write(offset, 9) for offset in OFFSETS)) == [0] * len(OFFSETS)
        assert self.seen() == [9] * len(OFFSETS)
        self.settle()
        audit(self.cluster)
        return found


def refused(seed: int, full: int, offset: int) -> None:
    """Some writes at once, then the others come back."""
    story = Short(seed, OFFSETS[3])
    fill(story.left[full])
    offsets = (offset, offset + BLOCK_SIZE, OFFSETS[0], OFFSETS[3] + BLOCK_SIZE)
    results = story.wait(*(story.write(at, 2, durable=bool(seed & 1)) for at in offsets))
    assert Result.NO_SPACE in results
    taken = [at for at, result in zip(offsets, results, strict=True) if not result]  # none of the full strip
    expected = [2 if at in taken else 1 for at in OFFSETS]
    assert story.seen() == expected
    story.come_back(*story.away)
    assert story.seen() == expected
    assert story.ends_well() == expected


@pytest.mark.parametrize("offset", [OFFSETS[1], OFFSETS[3]], ids=["of a strip that is away", "of one that is here"])
@pytest.mark.parametrize("full", range(4))
@pytest.mark.parametrize("seed", range(SEEDS))
def test_what_too_few_strips_took_is_taken_back(seed: int, full: int, offset: int) -> None:
    refused(seed, full, offset)


@pytest.mark.parametrize("full", range(4))
@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_disk_that_takes_versions_takes_every_write_that_others_take(seed: int, full: int) -> None:
    """A full disk as they are: the journal has room. The object is read and written to all the while."""
    story = Short(seed, OFFSETS[3])
    with pytest.MonkeyPatch.context() as patch:
        refuse_writes(patch, story.left[full])
        for value in (2, 3):
            results = story.wait(*(story.write(offset, value) for offset in OFFSETS))
            assert Result.NO_SPACE in results
            story.cluster.world.run_for(4 * LEVEL_TICK_NS)
            assert set(story.seen()) <= {1, 2, 3}
        seen = story.seen()
        story.come_back(*story.away)
        assert story.seen() == seen
    assert story.ends_well() == seen


def cut_short(seed: int, after_ns: int, *dying: int) -> None:
    """The others come back in the middle of that; a node goes, and comes back later. If its disk is full all the while
    some strips may lack a common version, and reads wait."""
    story = Short(seed, *([OFFSETS[3]] if seed & 2 else []))
    fill(story.left[-1])
    for offset in OFFSETS:
        story.write(offset, 2)
    story.cluster.world.run_for(after_ns)
    for number in dying:
        story.left[number].kill(power=bool(seed & 1))
    story.come_back(*story.away)
    story.come_back(*(story.left[number] for number in dying))
    assert set(story.ends_well()) <= {1, 2}


@pytest.mark.parametrize("after_ns", [MILLISECOND // 2, 2 * MILLISECOND, 4 * MILLISECOND, 10 * MILLISECOND, 2 * SECOND])
@pytest.mark.parametrize("dying", [(), (0,), (2,), (3,)], ids=["nobody", "home", "parity", "full"])
@pytest.mark.parametrize("seed", range(SEEDS))
def test_the_epoch_ends_meanwhile(seed: int, after_ns: int, dying: tuple[int, ...]) -> None:
    cut_short(seed, after_ns, *dying)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_strip_that_has_the_write_has_no_space_to_go_back(seed: int) -> None:
    """Until it has, nobody reads."""
    story = Short(seed, OFFSETS[3])
    fill(story.left[-1])
    answers = [story.write(offset, 2) for offset in OFFSETS]
    story.cluster.world.run_until(lambda: any(answers), SECOND, "a refusal")
    fill(story.left[-2])
    seen: list[bytes] = []
    story.home.node.gateway.read(story.oid, OFFSETS[3], BLOCK_SIZE, lambda _, data: seen.append(bytes(data)))
    story.cluster.world.run_for(5 * RECOVERY_RETRY_NS)
    assert set(seen) <= {block_of(1)}
    empty(story.left[-2])
    story.wait(*answers)
    assert story.seen() == [1] * 4
    assert story.ends_well() == [1] * 4


def not_told(seed: int, patch: pytest.MonkeyPatch) -> None:
    """The epoch ends before the strips hear that they are to go back. The one that has refused the write has had no
    other in it, in which some other object is not recovered yet; the ones that come back lack some."""
    consider = Copies._consider_settled

    def unless_four(self: Copies) -> None:
        if len(self._context.placement.members) != 4:
            consider(self)

    patch.setattr(Copies, "_consider_settled", unless_four)
    story = Short(seed, *OFFSETS[1:3])
    fabric = story.cluster.fabric

    def trap(sender: NodeId, receiver: NodeId, kind: int) -> None:
        if kind == Kind.ROLLBACK:
            fabric.trap = None
            for machine in story.left[1:]:
                fabric.hold((story.home.id, machine.id), SECOND)

    fabric.trap = trap
    fill(story.left[1])
    story.write(OFFSETS[3], 2, durable=False)
    story.cluster.world.run_until(lambda: fabric.trap is None, SECOND, "the first to be told")
    story.come_back(*story.away)
    story.cluster.world.run_for(SECOND)
    assert story.ends_well() == [1] * 4


@pytest.mark.parametrize("seed", range(SEEDS))
def test_the_epoch_ends_before_any_strip_goes_back(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    not_told(seed, monkeypatch)


def uneven(seed: int, left_out: int) -> None:
    """All strips that a write touches have it; then one of the others cannot get its version."""
    story = Short(seed, OFFSETS[3])
    assert story.wait(story.write(OFFSETS[0 if left_out else 3], 2, durable=False)) == [0]
    fill(story.left[left_out])
    story.cluster.world.run_for(4 * LEVEL_TICK_NS)
    seen = story.seen()
    story.come_back(*story.away)
    assert story.seen() == seen
    assert 2 in seen
    assert story.ends_well() == seen


@pytest.mark.parametrize("left_out", [0, 1])
@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_strip_that_cannot_get_the_version_of_a_write_counts(seed: int, left_out: int) -> None:
    uneven(seed, left_out)


def refuses_late(patch: pytest.MonkeyPatch, machine: Machine, after_ns: int, error: StoreError) -> None:
    """The disk takes one write, and says later that it has failed."""
    store, world = machine.node.context.store, machine.cluster.world
    assert isinstance(store, SimStore)
    write = store.write

    def fail(oid: ObjectId, offset: int, data: Buffer, version: Version, durable: bool, done: Done) -> bool:
        patch.undo()
        taken = write(oid, offset, data, version, durable, lambda error: None)
        world.after(after_ns, lambda: done(error))
        return taken

    patch.setattr(store, "write", fail)


def late(seed: int, patch: pytest.MonkeyPatch) -> None:
    """Others of the same strip, and of others, come behind it. Before anybody has noted anything, the processes of the
    strip and of the home end; others take their place before they are missed."""
    story = Story(seed, 6)
    offsets = (UNIT, UNIT + BLOCK_SIZE, 2 * UNIT, 2 * UNIT + BLOCK_SIZE)
    story.wait(*(story.write(offset, 1) for offset in offsets))
    story.settle()
    for machine in story.cluster.machines:
        machine.disk.nosync = machine.node.context.store.nosync = True
    refuses_late(patch, story.second, 3 * MILLISECOND, DiskError("late"))
    doomed, world = (story.second, story.home), story.cluster.world

    def end() -> None:
        for machine in doomed:
            machine.kill()
        for machine in doomed:
            machine.start()

    def end_soon() -> None:
        world.after((1 + seed % 8) * MILLISECOND // 4, end)

    at_answer(story, story.second, end_soon, 2)
    answers = [story.write(offset, 2, False, story.more[-1]) for offset in offsets]
    assert story.wait(*answers) == [0] * len(answers)
    story.settle()
    assert [block[0] for block in story.blocks(*offsets)] == [2] * 4
    audit(story.cluster)


@pytest.mark.parametrize("seed", range(4 * SEEDS))
def test_a_data_strip_refuses_late_with_others_behind(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    late(seed, monkeypatch)


def late_and_full(seed: int, patch: pytest.MonkeyPatch) -> None:
    """All strips are at the version of a write when one of them says that it has no space for it. Soon after it is
    taken back the epoch ends."""
    story = Short(seed, OFFSETS[3])
    refuses_late(patch, story.left[-1], 2 * LEVEL_TICK_NS + 10 * MILLISECOND, NoSpace("late"))
    assert story.wait(story.write(OFFSETS[3], 2, durable=False)) == [Result.NO_SPACE]
    story.cluster.world.run_for(STABLE_DELAY_NS + 10 * MILLISECOND)
    story.come_back(*story.away)
    assert story.seen() == [1] * 4
    assert story.ends_well() == [1] * 4


@pytest.mark.parametrize("seed", range(SEEDS))
def test_strips_are_not_level_when_they_have_gone_back(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    late_and_full(seed, monkeypatch)


def refuse_strips(patch: pytest.MonkeyPatch, machine: Machine) -> None:
    """There is no space to make strips anew."""
    pull = Copies.pull

    def refuse(self: Copies, message: Message, pulled: Callable[[int], None]) -> None:
        if self is machine.node.copies:
            pulled(Result.NO_SPACE)
        else:
            pull(self, message, pulled)

    patch.setattr(Copies, "pull", refuse)


def lacks_earlier(seed: int, power: bool) -> None:
    """A parity strip refuses a write that stays. A small one behind it is taken back: its data strip refuses it late.
    What is read then is what is there when all have gone and come back, also if the strips that took the first write
    go once more, as many as there is parity."""
    story = Story(seed, 6)
    story.wait(*(story.write(offset, 1) for offset in OFFSETS))
    story.settle()
    with pytest.MonkeyPatch.context() as patch:
        refuse_writes(patch, story.more[-1])
        refuse_strips(patch, story.more[-1])
        refuse_writes(patch, story.second)
        story.wait(story.write(OFFSETS[0], 2), story.write(OFFSETS[1], 3, durable=False))
        seen = [story.read(story.home, offset) for offset in OFFSETS]
        assert {result for result, _ in seen} == {Result.SUCCESS}
        for machine in story.cluster.machines:
            machine.kill(power=power)
    story.cluster.start_all()
    story.settle()
    assert [story.read(story.home, offset) for offset in OFFSETS] == seen
    for machine in (story.home, story.second):
        machine.kill()
    settle(story.cluster, story.parity, *story.more)
    assert [story.read(story.parity, offset) for offset in OFFSETS] == seen


@pytest.mark.parametrize("power", [False, True])
@pytest.mark.parametrize("seed", range(2 * SEEDS))
def test_a_strip_that_lacks_an_earlier_write_stays_bad(seed: int, power: bool) -> None:
    lacks_earlier(seed, power)


def test_a_strip_that_cannot_be_read_is_not_right_when_more_is_taken_back() -> None:
    """First the later write, then the one that the strip lacks, too: some bytes of it may be rotten as before."""
    story = Story(0, 6)
    home = story.home.node.copies.at_home()
    refusals, write = home.strips.refusals, Submission(story.oid, 0, 0, BLOCK_SIZE, block_of(2), 0, nobody, 0, 0, 0)
    earlier, later = [Write(home, write, home.sequence + count, 0, False) for count in (1, 2)]
    earlier.strips = 0b110001
    refusals.failed(earlier, home.me, Result.EIO)
    refusals.ended(earlier)
    assert refusals.taken_back(story.oid, later.version, []) == []
    assert refusals.taken_back(story.oid, earlier.version, []) == []


def nobody(result: int, data: Buffer) -> None:
    """Waits for the answer."""


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_home_that_is_over_tells_nobody_that_strips_are_uneven(seed: int) -> None:
    """Its own store says in the next epoch, in which members have other numbers, that it has no space for a version."""
    story, late = Story(seed, 6), list[Done]()
    store, fabric, told = story.home.node.context.store, story.cluster.fabric, list[int]()

    def stamp(oid: ObjectId, version: Version, durable: bool, done: Done) -> None:
        patch.undo()
        late.append(done)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "stamp", stamp)
        assert story.wait(story.write(OFFSETS[1], 2, durable=False)) == [0]
        story.cluster.world.run_for(4 * LEVEL_TICK_NS)
    story.second.kill()
    settle(story.cluster, story.home, story.parity, *story.more)
    fabric.trap = lambda sender, receiver, kind: told.append(kind)
    late.pop()(NoSpace("late"))
    assert not told


@pytest.mark.parametrize("refused_first", [False, True])
def test_a_strip_that_is_bad_in_another_way_too_does_not_count(refused_first: bool) -> None:
    """When the epoch ends one that only refused a write is what it was."""
    story = Short(0)
    strip, replica = strip_of(story.oid, 0), story.home.node.copies.replica
    version = story.home.node.context.store.version(strip)
    assert version is not None
    behind = version._replace(counter=version.counter + 1)
    replica.refuse(strip, behind)
    replica.reconsider()
    assert strip not in replica.broken
    replica.restored(strip)
    for call in [partial(replica.refuse, strip, behind), partial(replica.doubt, strip)][:: 1 if refused_first else -1]:
        call()
    replica.refuse(strip, behind)
    replica.reconsider()
    assert strip in replica.broken


def passed_by(patch: pytest.MonkeyPatch) -> None:
    """The write is ended as if it could stay."""
    patch.setattr(TakeBack, "begin", lambda self, job: False)


def told_level(patch: pytest.MonkeyPatch) -> None:
    """How strips came to their version is forgotten, though one is not there."""
    patch.setattr(StripLevels, "_tell_uneven", lambda self, batch: self._home.close_number(batch.sequence))


def bad_for_good(patch: pytest.MonkeyPatch) -> None:
    """A strip that has refused a write does not count in the next epoch."""
    patch.setattr(Replica, "reconsider", lambda self: None)


def one_by_one(patch: pytest.MonkeyPatch) -> None:
    """What is behind a write that its data strip refused goes to the parity strips."""
    give_up = StripSends._give_up

    def only_the_first(self: StripSends, oid: ObjectId, first: Sending) -> None:
        waiting = self._waiting[oid]
        self._waiting[oid] = deque([first])
        give_up(self, oid, first)
        self._waiting[oid] = waiting

    patch.setattr(StripSends, "_give_up", only_the_first)


def forgotten_too_soon(patch: pytest.MonkeyPatch) -> None:
    """A strip that went back behind a version forgets with it how it came where it is."""
    level = UndoLog.level

    def forget(self: UndoLog, strip: ObjectId, version: Version) -> None:
        chain = self._chains.get(strip)
        reached = [undo.after for undo in chain.steps if undo.after <= version] if chain is not None else []
        level(self, strip, reached[-1] if reached else version)

    patch.setattr(UndoLog, "level", forget)


def all_asked(patch: pytest.MonkeyPatch) -> None:
    """A strip that lacks an earlier write has nothing to take back, and is right."""
    patch.setattr(StripJob, "able_to_go_back", lambda self, cut: self.strips())


def try_refusals(seed: int, patch: pytest.MonkeyPatch) -> None:
    for full in (2, 3):
        refused(seed, full, OFFSETS[1])


def try_levels(seed: int, patch: pytest.MonkeyPatch) -> None:
    uneven(seed, seed & 1)


def try_earlier(seed: int, patch: pytest.MonkeyPatch) -> None:
    lacks_earlier(seed, bool(seed & 1))


@pytest.mark.parametrize(
    ("plant", "tried"),
    [
        (passed_by, try_refusals),
        (told_level, try_levels),
        (bad_for_good, not_told),
        (one_by_one, late),
        (forgotten_too_soon, late_and_full),
        (all_asked, try_earlier),
    ],
)
def test_planted_bugs_are_found(
    plant: Callable[[pytest.MonkeyPatch], None],
    tried: Callable[[int, pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    for seed in range(4 * SEEDS):
        try:
            with pytest.MonkeyPatch.context() as patch:
                tried(seed, patch)
        except (AssertionError, Violation, Stuck):
            return
    pytest.fail(f"not found in {4 * SEEDS} seeds")


def test_a_strip_that_is_to_become_one_state_with_others_counts_though_it_is_to_move() -> None:
    """A strip on a node that it does not belong on any more is one of the D that are left. Before it has the version
    that they agree upon, the epoch ends, or its node is started again. (Seed 3028 of the swarm.)"""
    story = Short(0)
    strip, replica = strip_of(story.oid, 0), story.home.node.copies.replica
    home = story.home.node.context.placement.me
    known: list[None] = []
    story.home.node.copies.settled(home, Verdict([strip], [], [strip], [strip], True), lambda: known.append(None))
    story.cluster.world.run_until(lambda: bool(known), SECOND, "a verdict")
    assert strip in replica.missing
    story.home.node.copies.end_epoch()
    assert strip not in dict(story.home.node.copies._standing.lacking)
    story.home.kill()
    story.home.start()
    assert strip not in dict(story.home.node.copies.lacking())

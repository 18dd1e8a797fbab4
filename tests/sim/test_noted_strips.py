"""Strips of which it is noted that they do not count, also if power fails and the disk has kept less than it said."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.sim.test_directed import fresh, write
from tests.sim.test_refused_strips import Story
from tests.sim.test_taken_back import OFFSETS, refuse_strips

from sheepdog.cluster.core.errors import DiskError, Result, StoreError
from sheepdog.cluster.core.ids import NO_VERSION, ObjectId, Version, strip_of
from sheepdog.cluster.core.messages import Buffer
from sheepdog.cluster.core.ports import Done, Proven
from sheepdog.cluster.core.stale_strips import StaleStrips
from sheepdog.cluster.core.standing import Lack
from sheepdog.cluster.sim.cluster import Machine
from sheepdog.cluster.sim.state import SimNodeState, SimStateDisk
from sheepdog.cluster.sim.store import SimDisk, SimStore
from sheepdog.cluster.sim.world import MILLISECOND, SECOND, Life, World

STRIP = strip_of(ObjectId(1 << 32), 5)
BEFORE, NOTED, AFTER = (Version(3, 1, number) for number in (1, 2, 3))


class Notes:
    """Of one node: what it remembers of a strip when it starts again."""

    def __init__(self) -> None:
        self._world = World(0)
        disk = SimStateDisk(self._world, "node", SimDisk(self._world, "node"))
        self._state = SimNodeState(disk, self._world, Life(self._world.stream("life")))
        self.stale = StaleStrips(self._state)

    def wait(self, save: Callable[[Done], None]) -> None:
        ended: list[StoreError | None] = []
        save(ended.append)
        self._world.run_until(lambda: bool(ended), SECOND, "notes")
        assert ended == [None]

    def note(self, lacks_write: bool, version: Version | None = NOTED) -> None:
        """In epoch 3."""
        if lacks_write:
            self.wait(lambda done: self.stale.lacks_write(STRIP, 3, lambda _: version, done))
        else:
            self.wait(lambda done: self.stale.settle(lambda _: False, [STRIP], 3, lambda _: version, done))

    def lose(self, lack: Lack, epoch: int = 3) -> None:
        """Nobody has a current strip; the one here has no version."""
        lost = {STRIP: lack}
        self.wait(lambda done: self.stale.settle(lambda _: False, [], epoch, lambda _: NO_VERSION, done, lost))

    def lack(self, version: Version = NO_VERSION, settled: int = 2) -> Lack | None:
        """What is known of the strip after a start."""
        self.stale = StaleStrips(self._state)
        self.stale.load(lambda _: version, settled)
        return self.stale.losses(lambda _: version).get(STRIP)

    def start(self, version: Version | None) -> bool:
        """With the strip at this version; is it still to be made anew?"""
        self.stale = StaleStrips(self._state)
        return STRIP in self.stale.load(lambda _: version, 2)


@pytest.mark.parametrize("lacks_write", [False, True])
@pytest.mark.parametrize(("version", "still"), [(BEFORE, True), (NOTED, True), (AFTER, False), (None, False)])
def test_one_with_an_earlier_version_is_no_other_one(version: Version | None, still: bool, lacks_write: bool) -> None:
    notes = Notes()
    notes.note(lacks_write)
    assert notes.start(version) == still


def test_what_is_being_made_anew_may_be_what_it_was_again() -> None:
    """Power fails before the disk has taken anything of it; meanwhile something else was noted."""
    notes = Notes()
    notes.note(True)
    assert not notes.start(NO_VERSION)  # it has no version: that tells enough
    notes.note(False, NO_VERSION)
    assert notes.start(BEFORE)


def test_what_was_made_anew_counts_though_it_has_the_same_version() -> None:
    notes = Notes()
    notes.note(True)
    notes.wait(lambda done: notes.stale.made_anew(STRIP, lambda _: NOTED, done))
    assert not notes.start(NOTED)


def test_what_was_made_anew_with_a_later_version_is_not_noted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """All notes are saved as one: a node that was away over many objects would spend its time with that."""
    notes = Notes()
    notes.note(True)

    def save(state: SimNodeState, data: bytes, done: Done) -> None:
        raise AssertionError("saved")

    monkeypatch.setattr(SimNodeState, "save_stale", save)
    notes.stale.made_anew(STRIP, lambda _: AFTER, lambda _: None)
    assert not notes.start(AFTER)


KNOWN = Lack(known=2, blind=1, maybe=0)


def test_what_was_known_of_a_lost_object_is_known_after_a_start() -> None:
    notes = Notes()
    notes.note(True)
    notes.lose(KNOWN)
    assert notes.lack() == KNOWN
    assert notes.start(NOTED), "a note of the version that the strip had is another one"
    notes.lose(KNOWN._replace(known=3), epoch=4)
    assert notes.lack() == KNOWN._replace(known=3)


@pytest.mark.parametrize(("version", "settled"), [(AFTER, 2), (NO_VERSION, 3)], ids=["made", "all was current since"])
def test_it_does_not_count_when_the_strip_was_current_since(version: Version, settled: int) -> None:
    notes = Notes()
    notes.lose(KNOWN)
    assert notes.lack(version, settled) is None


def test_nor_when_it_was_made_anew_and_went_bad() -> None:
    """As a client does in the epoch in which it was lost: then this node cannot tell any more what was written."""
    notes = Notes()
    notes.lose(KNOWN)
    notes.wait(lambda done: notes.stale.went_bad([STRIP], done))
    assert notes.lack() is None


def test_nor_when_it_was_decided_anew() -> None:
    notes = Notes()
    notes.lose(KNOWN)
    notes.wait(lambda done: notes.stale.settle(lambda _: True, [STRIP], 4, lambda _: NO_VERSION, done))
    assert notes.lack() is None


def test_what_goes_with_a_disk_says_no_more_that_nobody_had_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before that node notes that it has lost something: between the two it would be believed again."""
    cluster, volume = fresh(3, 3)
    machine = cluster.machines[0]
    assert write(machine, volume, 1) == Result.SUCCESS
    copies = machine.node.copies
    epoch = machine.node.context.epoch
    oids = [oid for oid, _ in machine.node.context.store.inventory()]
    noted: list[StoreError | None] = []
    copies._stale.settle(lambda _: False, [], epoch, lambda _: NO_VERSION, noted.append, dict.fromkeys(oids, KNOWN))
    cluster.world.run_for(SECOND)
    assert noted == [None]
    saved: list[str] = []
    disk = copies._disk
    stale, proven = disk.save_stale, disk.save_proven

    def save_stale(data: bytes, done: Done) -> None:
        saved.append("stale")
        stale(data, done)

    def save_proven(what: Proven, done: Done) -> None:
        saved.append("proven")
        proven(what, done)

    monkeypatch.setattr(disk, "save_stale", save_stale)
    monkeypatch.setattr(disk, "save_proven", save_proven)
    machine.lose_disk()
    cluster.world.run_for(SECOND)
    assert saved[:2] == ["stale", "proven"]


def fails_late(patch: pytest.MonkeyPatch, machine: Machine) -> None:
    """The disk takes writes, says later that they have failed, and does not keep them."""
    store, world = machine.node.context.store, machine.cluster.world
    assert isinstance(store, SimStore)
    write = store.write

    def fail(oid: ObjectId, offset: int, data: Buffer, version: Version, durable: bool, done: Done) -> bool:
        taken = write(oid, offset, data, version, False, lambda error: None)
        world.after(3 * MILLISECOND, lambda: done(DiskError("late")))
        return taken

    patch.setattr(store, "write", fail)


@pytest.mark.parametrize("seed", range(8))
def test_what_was_read_stays_though_the_strip_that_lacks_it_once_had_its_version(seed: int) -> None:
    """A parity strip cannot be made anew before power fails everywhere."""
    story = Story(seed, 6)
    story.wait(*(story.write(offset, 1) for offset in OFFSETS))
    story.settle()
    with pytest.MonkeyPatch.context() as patch:
        fails_late(patch, story.more[-1])
        refuse_strips(patch, story.more[-1])
        story.wait(story.write(OFFSETS[0], 2))
        seen = [story.read(story.home, offset) for offset in OFFSETS]
        assert [(result, data[0]) for result, data in seen] == [(Result.SUCCESS, value) for value in (2, 1, 1, 1)]
        for machine in story.cluster.machines:
            machine.kill(power=True)
    story.cluster.start_all()
    story.settle()
    assert [story.read(story.home, offset) for offset in OFFSETS] == seen

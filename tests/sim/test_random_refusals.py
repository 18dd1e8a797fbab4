"""Coded objects of which some strips refuse writes, at once or late, or rot, drawn at random: what was answered or read
stays, whoever ends then, and also with as many nodes away as there is parity."""

from __future__ import annotations

from functools import partial
from random import Random

import pytest
from tests.sim.test_directed import settle
from tests.sim.test_refused_strips import UNIT, Story, empty, fill, refuse_writes
from tests.sim.test_taken_back import refuses_late

from sheepdog.cluster.core.errors import DiskError, NoSpace, Result
from sheepdog.cluster.core.ids import strip_of
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.messages import Buffer
from sheepdog.cluster.sim.audit import audit
from sheepdog.cluster.sim.world import MILLISECOND, SECOND

PARITY = 2
FOUND = (204, 251, 752)  # something that has been mended
OFFSETS = tuple(strip * UNIT + block * BLOCK_SIZE for strip in range(4) for block in range(2))  # of each data strip


class Draw:
    """One object, 4:2 on six nodes, each block of `OFFSETS` written with 1; what comes then is drawn from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.story = Story(seed, 6)
        self.story.wait(*(self.story.write(offset, 1) for offset in OFFSETS))
        self.story.settle()
        self.world = self.story.cluster.world
        self.holders = [self.story.home, self.story.second, self.story.parity, *self.story.more]  # by strip
        self.said = list[str]()  # for who looks at a failure
        self.is_rotten = False
        self.writes: dict[int, tuple[int, bool, list[int]]] = {}  # by offset: value, durable?, the answer
        self.seen: dict[int, int] = {}

    def trouble(self, patch: pytest.MonkeyPatch) -> None:
        """Until `patch` is undone, and the disks have space again."""
        for strip in self.random.sample(range(6), self.random.choice((1, 2, 2, 3))):
            machine = self.holders[strip]
            kind = self.random.choice(("refuses", "is full", "refuses late"))
            self.said.append(f"strip {strip} {kind}")
            if kind == "refuses":
                refuse_writes(patch, machine)
            elif kind == "is full":
                fill(machine)
            else:
                error = self.random.choice((NoSpace, DiskError))("late")
                refuses_late(pytest.MonkeyPatch(), machine, self.random.choice((1, 3, 20)) * MILLISECOND, error)
        if len(self.said) < PARITY and self.random.random() < 0.5:
            strip = self.random.randrange(4)
            self.said.append(f"strip {strip} rots")
            self.is_rotten = True
            self.holders[strip].disk.rot(strip_of(self.story.oid, strip), self.random.randrange(2))

    def write(self) -> None:
        for value in range(2, 2 + self.random.choice((2, 4, 6))):
            offset, durable = self.random.choice(OFFSETS), self.random.random() < 0.5
            if offset not in self.writes:
                answer = self.story.write(offset, value, durable, self.random.choice(self.holders))
                self.writes[offset] = value, durable, answer
            if self.random.random() < 0.3:
                self.world.run_for(self.random.randrange(3 * MILLISECOND))
        if self.random.random() < 0.4:
            self.said.append("in the middle")
            self.world.run_for(self.random.randrange(4 * MILLISECOND))
            return
        answers = [answer for _, _, answer in self.writes.values()]
        self.world.run_until(lambda: all(answers), 8 * SECOND, "answers")
        self.world.run_for(self.random.choice((0, 10, 150, 400)) * MILLISECOND)
        if self.random.random() < 0.6:
            for offset in OFFSETS:
                self.story.home.node.gateway.read(self.story.oid, offset, BLOCK_SIZE, partial(self.look, offset))
            self.world.run_for(200 * MILLISECOND)  # not all may be read as long as disks are full

    def look(self, offset: int, result: int, data: Buffer) -> None:
        if not result:
            self.seen[offset] = data[0]

    def end(self, patch: pytest.MonkeyPatch) -> bool:
        """Some processes end, or all, and come back when there is no trouble any more. True: all lost their power.

        A strip that does not count is as good as lost: what was not flushed stays as long as these, and those of which
        the power fails, are no more than there is parity. Nor can rotten blocks be made anew beyond that.
        """
        doomed = self.random.choice((0, 1, 2, 6, 6))
        if doomed <= PARITY < doomed + len(self.said) and self.is_rotten:
            doomed = 0
        power = self.random.random() < 0.5 and (doomed == len(self.holders) or doomed + len(self.said) <= PARITY)
        self.said.append(f"{doomed} end, {power=}")
        for machine in self.random.sample(self.holders, doomed):
            machine.kill(power=power)
        patch.undo()
        empty(*self.holders)
        if doomed <= PARITY:
            self.world.run_for(SECOND)
        for machine in self.holders:
            if not machine.up:
                machine.start()
        self.story.settle()
        return power and doomed == len(self.holders)

    def check(self, found: dict[int, tuple[int, bytes]], all_lost_power: bool) -> None:
        for offset, (result, data) in found.items():
            value, durable, answer = self.writes.get(offset, (1, True, [0]))
            told = f"block at {offset:#x}: {result=}, {data[:1]!r}, {value} {durable=} {answer=}, {self.said}"
            assert result == Result.SUCCESS, told
            assert data[0] in (1, value), told
            if durable or not all_lost_power:
                assert answer != [Result.SUCCESS] or data[0] == value, told
                assert self.seen.get(offset, 1) == 1 or data[0] == value, told
            if not all_lost_power:
                assert data[0] == self.seen.get(offset, data[0]), told


def drawn(seed: int) -> None:
    draw = Draw(seed)
    with pytest.MonkeyPatch.context() as patch:
        draw.trouble(patch)
        draw.write()
        all_lost_power = draw.end(patch)
    story = draw.story
    found = {offset: story.read(story.home, offset) for offset in OFFSETS}
    draw.check(found, all_lost_power)
    story.settle()  # what was found to be rotten is made anew
    audit(story.cluster)
    for machine in draw.random.sample(draw.holders, PARITY):
        machine.kill()
    left = [machine for machine in draw.holders if machine.up]
    settle(story.cluster, *left)
    then = {offset: story.read(left[0], offset) for offset in OFFSETS}
    assert then == found, draw.said


@pytest.mark.parametrize("seed", [*range(30), *FOUND])
def test_what_was_answered_or_read_stays(seed: int) -> None:
    drawn(seed)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(30, 2000))
def test_it_stays_in_many_more(seed: int) -> None:
    drawn(seed)

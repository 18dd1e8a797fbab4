"""A coded object over several losses of power, drawn at random: nodes go and come back between them, disks refuse
writes, messages come late. What was acknowledged as durable is there as soon as all are back, on any D strips."""

from __future__ import annotations

from random import Random

import pytest
from tests.sim.test_directed import settle
from tests.sim.test_random_refusals import OFFSETS, PARITY
from tests.sim.test_refused_strips import UNIT, Story, empty, fill, refuse_writes
from tests.sim.test_taken_back import refuses_late

from sheepdog.cluster.core.errors import DiskError, NoSpace, Result
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.sim.audit import audit
from sheepdog.cluster.sim.clients import block_of
from sheepdog.cluster.sim.cluster import Machine
from sheepdog.cluster.sim.world import MILLISECOND

RANGES = ((0, 4 * UNIT), (0, 2 * UNIT), (2 * UNIT, 2 * UNIT), (UNIT // 2, UNIT), (UNIT, 8192), (3 * UNIT, 8192))
BLOCKS = tuple((offset, BLOCK_SIZE) for offset in OFFSETS)


class Rounds:
    """4:2 on six to eight nodes. `said`: what was drawn, for who looks at a failure."""

    def __init__(self, seed: int) -> None:
        self.random = random = Random(seed)
        self.story = Story(seed, random.choice((6, 6, 7, 8)), 0x22)
        self.cluster, self.world = self.story.cluster, self.story.cluster.world
        self.machines = self.cluster.machines
        self.past = {offset: [1] for offset in OFFSETS}  # values of each block: the last durable one, and those since
        self.writes: dict[int, tuple[int, bool, list[int]]] = {}  # since: value, durable?, the answer
        self.value = 1
        self.said = list[str]()
        self.story.wait(*(self.story.write(offset, 1) for offset in OFFSETS))
        if random.random() < 0.5:
            self.story.settle()

    def up(self) -> list[Machine]:
        return [machine for machine in self.machines if machine.up]

    def pause(self) -> None:
        """From nothing to so long that those that are left have recovered; or until one of them has noted that."""
        if self.random.random() < 0.3:
            settled = max(machine.state.proven.settled for machine in self.machines)
            for _ in range(2000):
                if any(machine.state.proven.settled > settled for machine in self.machines):
                    self.said.append("noted")
                    return
                self.world.run_for(MILLISECOND // 2)
            return
        self.world.run_for(self.random.choice((0, 1, 5, 50, 200, 700, 3000)) * self.random.randrange(1, MILLISECOND))

    def loss(self) -> None:
        """Of a node, as long as enough are left."""
        if len(self.machines) - len(self.up()) < PARITY:
            machine, power = self.random.choice(self.up()), self.random.random() < 0.5
            self.said.append(f"{machine.name} {'loses power' if power else 'is killed'}")
            machine.kill(power=power)

    def trouble(self, patch: pytest.MonkeyPatch) -> None:
        """Until `patch` is undone, and the disks have space again."""
        kind, machine = (
            self.random.choice(("refuses", "is full", "refuses late", "hears late")),
            self.random.choice(self.up()),
        )
        self.said.append(f"{machine.name} {kind}")
        if kind == "refuses":
            refuse_writes(patch, machine)
        elif kind == "is full":
            fill(machine)
        elif kind == "refuses late":
            error = self.random.choice((NoSpace, DiskError))("late")
            refuses_late(pytest.MonkeyPatch(), machine, self.random.choice((1, 3, 20)) * MILLISECOND, error)
        else:
            link = self.random.choice(self.up()).id, machine.id
            self.cluster.fabric.hold(link, self.random.choice((20, 150, 300, 600)) * MILLISECOND)

    def write(self) -> None:
        offset, length = self.random.choice(RANGES if self.random.random() < 0.3 else BLOCKS)
        covered = [one for one in OFFSETS if offset <= one < offset + length]
        if any(one in self.writes for one in covered):
            return
        self.value += 1
        durable, answer, gateway = self.random.random() < 0.6, list[int](), self.random.choice(self.up()).node.gateway
        data = block_of(self.value) * (length // BLOCK_SIZE)
        gateway.write(self.story.oid, offset, data, durable, lambda result, _: answer.append(int(result)))
        self.writes.update((one, (self.value, durable, answer)) for one in covered)

    def round(self) -> None:
        """Some of all that, then power fails everywhere, or all processes end, or none, and all come back."""
        self.said.append("|")
        with pytest.MonkeyPatch.context() as patch:
            for _ in range(self.random.choice((0, 0, 1, 2))):
                self.loss()
                self.pause()
            for _ in range(self.random.choice((0, 1, 2))):
                self.trouble(patch)
            for _ in range(self.random.choice((1, 3, 6))):
                self.write()
                if self.random.random() < 0.3:
                    self.world.run_for(self.random.randrange(3 * MILLISECOND))
            self.pause()
            if self.random.random() < 0.3:
                self.loss()
                self.pause()
            ends = self.random.choice(("power fails", "power fails", "all are killed", "go on"))
            self.said.append(ends)
            if ends != "go on":
                for machine in self.up():
                    machine.kill(power=ends == "power fails")
        empty(*self.machines)
        self.come_back()

    def come_back(self) -> None:
        back = [machine for machine in self.machines if not machine.up]
        self.random.shuffle(back)
        for machine in back:
            if self.random.random() < 0.3:
                self.pause()
            machine.start()
        if back and self.random.random() < 0.3:  # before they have recovered
            self.world.run_for(self.random.randrange(500 * MILLISECOND))
            self.said.append("power fails again")
            for machine in self.up():
                machine.kill(power=True)
            self.cluster.start_all()

    def check(self) -> None:
        self.story.settle()
        for offset in OFFSETS:
            result, data = self.story.read(self.random.choice(self.machines), offset)
            value, durable, answer = self.writes.get(offset, (0, False, []))
            if durable and answer == [Result.SUCCESS]:
                self.past[offset] = [value]
            elif value:
                self.past[offset].append(value)
            assert result == Result.SUCCESS, (hex(offset), result, self.past, self.writes, self.said)
            assert data[0] in self.past[offset], (hex(offset), data[0], self.past, self.writes, self.said)
        self.writes.clear()

    def check_any(self) -> None:
        """As many nodes go as there is parity."""
        self.story.settle()
        audit(self.cluster)
        found = {offset: self.story.read(self.machines[0], offset) for offset in OFFSETS}
        for machine in self.random.sample(self.machines, PARITY):
            machine.kill()
        left = self.up()
        settle(self.cluster, *left)
        then = {offset: self.story.read(left[0], offset) for offset in OFFSETS}
        assert then == found, self.said


def drawn(seed: int) -> None:
    rounds = Rounds(seed)
    for _ in range(rounds.random.choice((1, 2, 4))):
        rounds.round()
        rounds.check()
    rounds.check_any()


@pytest.mark.parametrize("seed", range(30))
def test_what_is_durable_stays(seed: int) -> None:
    drawn(seed)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(30, 2000))
def test_it_stays_in_many_more(seed: int) -> None:
    drawn(seed)

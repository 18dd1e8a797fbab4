"""A write that was under way when nodes died, and that they lack, is read only when it cannot be taken back any more.

Who is given the object in the next epoch would witness, once those that have the write are gone, too, that nothing
happened in it: then the older copies count when their nodes are back.
"""

from __future__ import annotations

import pytest
from tests.sim.test_degraded_reads import held_restores
from tests.sim.test_directed import holders, read, settle
from tests.sim.test_refused_strips import empty, fill

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import NodeId, data_oid
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.messages import Kind
from sheepdog.cluster.core.ports import Buffer
from sheepdog.cluster.sim.clients import block_of, make_volume
from sheepdog.cluster.sim.cluster import Machine, SimCluster
from sheepdog.cluster.sim.world import MILLISECOND, SECOND, World


def kill_at(cluster: SimCluster, kind: Kind, receivers: list[Machine], doomed: list[Machine]) -> None:
    """`doomed` die when such a message is sent to one of `receivers`."""
    ids = {machine.id for machine in receivers}

    def trap(sender: NodeId, receiver: NodeId, seen: int) -> None:
        if seen == kind and receiver in ids:
            cluster.fabric.trap = None
            for machine in doomed:
                cluster.world.after(0, machine.kill)

    cluster.fabric.trap = trap


class Story:
    """A volume of one object. The nodes at these `places` of its layout stay, the others are to die in a write."""

    def __init__(self, policy: int, places: tuple[int, ...], nodes: int, copies: int = 2) -> None:
        self.cluster = SimCluster(World(1), nodes)
        self.cluster.start_all()
        self.cluster.format(copies)
        self.volume = make_volume(self.cluster, "v", 1, (0,), policy=policy)
        self.oid = data_oid(self.volume.vid, 0)
        replicas = holders(self.cluster, self.volume)
        self.staying = [replicas[place] for place in places]
        self.dying = [machine for machine in replicas if machine not in self.staying]
        self.newcomers = [machine for machine in self.cluster.machines if machine not in replicas]
        assert read(replicas[0], self.volume)[0] == Result.SUCCESS

    def write_and_die(self) -> None:
        """A write by a gateway that dies, as all of `dying`, before it has come to them; `staying` have it."""
        kill_at(self.cluster, Kind.APPLY, self.dying, self.dying)
        gateway = self.dying[0].node.gateway
        gateway.write(self.oid, 0, block_of(2), False, lambda result, _: pytest.fail("answered"))
        self.cluster.world.run_until(lambda: not self.dying[0].up, SECOND, "a write")
        survivors = [machine for machine in self.cluster.machines if machine not in self.dying]

        def noticed() -> bool:
            return all(len(machine.node.cluster.members) == len(survivors) for machine in survivors)

        self.cluster.world.run_until(noticed, SECOND, "deaths noticed")

    def begin_read(self) -> list[tuple[int, bytes]]:
        """By one of `staying`; the answer comes into the list."""
        answers: list[tuple[int, bytes]] = []
        gateway = self.staying[0].node.gateway
        gateway.read(self.oid, 0, BLOCK_SIZE, lambda result, data: answers.append((int(result), bytes(data))))
        return answers

    def is_read(self, answers: list[tuple[int, bytes]]) -> None:
        """The answer comes, and is what was written."""
        self.cluster.world.run_until(lambda: bool(answers), 5 * SECOND, "read")
        assert answers == [(Result.SUCCESS, block_of(2))]

    def exchange(self) -> None:
        """Those that have the write go, and those that died come back."""
        for machine in self.staying:
            machine.kill()
        for machine in self.dying:
            machine.start()
        settle(self.cluster, *self.newcomers, *self.dying)


@pytest.mark.parametrize("restart", [False, True], ids=["", "restart"])
@pytest.mark.parametrize(
    ("policy", "places"),
    [(0, (0,)), (0x12, (0, 3)), (0x12, (0, 1))],
    ids=["copies", "strips, parity", "strips, no parity"],
)
def test_what_was_read_is_not_taken_back(policy: int, places: tuple[int, ...], restart: bool) -> None:
    story = Story(policy, places, 6 if policy else 3)
    cluster, volume, staying, newcomers = story.cluster, story.volume, story.staying, story.newcomers
    world = cluster.world
    seen: list[bytes] = []

    def noted(result: int, data: Buffer) -> None:
        if result == Result.SUCCESS:
            seen.append(bytes(data))
            end()

    def end() -> None:
        for machine in staying:
            world.after(0, machine.kill)

    def trap(sender: NodeId, receiver: NodeId, seen: int) -> None:
        if seen == Kind.FETCH and sender in {machine.id for machine in newcomers}:
            cluster.fabric.trap = None
            staying[0].node.gateway.read(story.oid, 0, BLOCK_SIZE, noted)
            world.after(MILLISECOND, end)

    story.write_and_die()
    if restart:  # and nothing in memory tells any more what was under way
        for machine in staying:
            machine.kill()
        world.run_for(50 * MILLISECOND)
        cluster.fabric.trap = trap
        for machine in staying:
            machine.start()
    else:
        cluster.fabric.trap = trap
    world.run_until(lambda: cluster.fabric.trap is None, SECOND, "a restore")
    world.run_until(lambda: not any(machine.up for machine in staying), SECOND, "the end of those that have it")
    story.exchange()
    after = read(story.dying[0], volume)
    if after[0] == Result.EIO:  # too few strips of the newer state are here
        for machine in staying:
            machine.start()
        settle(cluster, *cluster.machines)
        after = read(story.dying[0], volume)
    assert after[0] == Result.SUCCESS
    assert seen in ([], [after[1]])


def test_it_is_read_when_the_newcomer_is_full() -> None:
    """It would wait until somebody makes room. But then the newcomer is no witness."""
    story = Story(0, (0,), 3)
    fill(*story.newcomers)
    story.write_and_die()
    assert read(story.staying[0], story.volume) == (Result.SUCCESS, block_of(2))
    empty(*story.newcomers)
    story.exchange()
    assert read(story.dying[0], story.volume) == (Result.EIO, b"")
    for machine in story.staying:
        machine.start()
    settle(story.cluster, *story.cluster.machines)
    assert read(story.dying[0], story.volume) == (Result.SUCCESS, block_of(2))


def test_a_full_newcomer_tells_nothing_of_another_one() -> None:
    story = Story(0, (0,), 5, copies=3)
    full, slow = (machine for machine in story.newcomers)
    fill(full)
    with pytest.MonkeyPatch.context() as patch:
        held = held_restores(patch)
        story.write_and_die()
        answers = story.begin_read()
        story.cluster.world.run_until(lambda: bool(held), 5 * SECOND, "a restore")
        story.cluster.world.run_for(SECOND)
        assert not answers
    for end in held:
        end()
    story.is_read(answers)
    assert slow.disk.copies()[story.oid].version == story.staying[0].disk.copies()[story.oid].version


@pytest.mark.parametrize("places", [(0, 3), (0, 1)], ids=["parity", "no parity"])
def test_strips_wait_for_newcomers_that_are_full(places: tuple[int, ...]) -> None:
    """Of no more strips than may be lost. Nodes that start again do not know what was current when they ended: together
    with strips that were away theirs count no more than these."""
    story = Story(0x12, places, 6)
    fill(*story.newcomers)
    story.write_and_die()
    answers = story.begin_read()
    story.cluster.world.run_for(5 * SECOND)
    assert not answers
    empty(*story.newcomers)
    story.is_read(answers)


def test_it_is_not_read_elsewhere_when_the_home_has_lost_its_copy() -> None:
    """While its copy is made anew others answer, but not what nobody may see yet."""
    story = Story(0, (0, 1), 4, copies=3)
    home = story.staying[0]
    with pytest.MonkeyPatch.context() as patch:
        held = held_restores(patch)
        story.write_and_die()
        story.cluster.world.run_until(lambda: bool(held), 5 * SECOND, "a restore")
        home.node.copies.at_home().recovery.suspect(story.oid, home.node.context.placement.me)
        answers = story.begin_read()
        story.cluster.world.run_for(SECOND)
        assert not answers
    for end in held:
        end()
    story.is_read(answers)

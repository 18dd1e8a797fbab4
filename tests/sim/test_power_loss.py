"""P3: what was acknowledged without a flush survives power loss of one node fewer than there are copies, of as many as
there are parity strips."""

from __future__ import annotations

import random

import pytest
from tests.sim.test_directed import fresh, holders, read, settle, write
from tests.sim.test_refused_strips import UNIT, Story

from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.sim.audit import audit
from sheepdog.cluster.sim.clients import block_of
from sheepdog.cluster.sim.cluster import Machine
from sheepdog.cluster.sim.world import MILLISECOND

SEEDS = 40
WRITES = 6
OFFSETS = (0, BLOCK_SIZE, UNIT, 3 * UNIT, 9 * UNIT)  # of several data strips; two are blocks of one stripe's unit


@pytest.mark.parametrize("copies", [2, 3])
@pytest.mark.parametrize("seed", range(SEEDS))
def test_unflushed_writes_survive_where_one_copy_keeps_its_power(seed: int, copies: int) -> None:
    """Whichever copies go, the moment after the answer, the gateway or the home among them; and then the one that had
    kept it, when the others have recovered."""
    cluster, volume = fresh(4, copies, seed)
    rng = random.Random(seed)
    for value in range(1, WRITES + 1):
        assert write(rng.choice(cluster.machines), volume, value) == 0
    here = holders(cluster, volume)
    lost = rng.sample(here, copies - 1)
    (kept,) = (machine for machine in here if machine not in lost)
    for machine in lost:
        machine.kill(power=True)
    settle(cluster, *(machine for machine in cluster.machines if machine.up))
    assert read(kept, volume) == (0, block_of(WRITES))
    for machine in lost:
        machine.start()
    settle(cluster, *cluster.machines)
    kept.kill(power=True)
    settle(cluster, *(machine for machine in cluster.machines if machine.up))
    assert read(lost[0], volume) == (0, block_of(WRITES))


def power_off(story: Story, *lost: Machine) -> None:
    for machine in lost:
        machine.kill(power=True)
    settle(story.cluster, *(machine for machine in story.cluster.machines if machine.up))


def shows(story: Story, expected: dict[int, int]) -> bool:
    up = [machine for machine in story.cluster.machines if machine.up]
    return all(
        story.read(machine, offset) == (0, block_of(value)) for offset, value in expected.items() for machine in up
    )


def written(seed: int, nodes: int, policy: int) -> tuple[Story, dict[int, int]]:
    """A story after many writes, mostly unflushed, all of them answered; and the last value at each offset."""
    story = Story(seed, nodes, policy)
    rng = random.Random(seed)
    expected: dict[int, int] = {}
    for value in range(1, 3 * WRITES):
        batch = rng.sample(OFFSETS, rng.randint(1, len(OFFSETS)))
        gateway = rng.choice(story.cluster.machines)
        answers = story.wait(*(story.write(offset, value, rng.random() < 0.2, gateway) for offset in batch))
        assert not any(answers)
        expected |= dict.fromkeys(batch, value)
    return story, expected


coded = pytest.mark.parametrize(
    ("nodes", "policy"), [(3, 0x11), (4, 0x12), (6, 0x22), (8, 0x22)], ids=["2:1", "2:2", "4:2", "spare"]
)


@coded
@pytest.mark.parametrize("seed", range(SEEDS))
def test_unflushed_writes_survive_where_as_many_strips_as_data_keep_their_power(
    seed: int, nodes: int, policy: int
) -> None:
    """Whichever strips go, the moment after the answers, the gateway's or the home's among them; and then others, when
    all have recovered."""
    story, expected = written(seed, nodes, policy)
    rng = random.Random(seed)
    here, parity = holders(story.cluster, story.volume), policy & 0xF
    lost = rng.sample(here, parity)
    power_off(story, *lost)
    assert shows(story, expected)
    for machine in lost:
        machine.start()
    story.settle()
    audit(story.cluster)
    power_off(story, *rng.sample([machine for machine in here if machine not in lost], parity))
    assert shows(story, expected)


@coded
@pytest.mark.parametrize("delay_ns", [0, 100 * MILLISECOND])
@pytest.mark.parametrize("seed", range(SEEDS // 4))
def test_they_survive_where_the_others_are_back_before_they_are_missed(
    seed: int, delay_ns: int, nodes: int, policy: int
) -> None:
    """What their strips lack must not be taken for a write that did not get everywhere, which is undone."""
    story, expected = written(seed, nodes, policy)
    lost = random.Random(seed).sample(holders(story.cluster, story.volume), policy & 0xF)
    for machine in lost:
        machine.kill(power=True)
    story.cluster.world.run_for(delay_ns)
    for machine in lost:
        machine.start()
    story.settle()
    assert shows(story, expected)
    audit(story.cluster)

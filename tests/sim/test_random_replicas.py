"""Volumes kept as copies, under faults drawn at random (tests.support.ordeal): whatever was answered or read stays."""

from __future__ import annotations

from random import Random

import pytest
from tests.sim.test_planted_bugs import (
    Patch,
    acknowledged_after_the_first_copy,
    recovery_trusts_the_first_copy,
    replica_ignores_durability,
)
from tests.support.ordeal import Ordeal, Trials

from sheepdog.cluster.core.errors import Corrupt, Result, StoreError
from sheepdog.cluster.core.ids import ObjectId
from sheepdog.cluster.core.state import ClusterFlag
from sheepdog.cluster.sim.clients import OBJECT_BYTES, Volume
from sheepdog.cluster.sim.run import Failure, Run, Scenario
from sheepdog.cluster.sim.store import SimStore
from sheepdog.cluster.sim.world import MILLISECOND

MIB = 1 << 20
SEEDS = 60
OPEN = (90, 723, 833, 1721, 2059)  # that fail yet (docs/promises.md, "known to be open")
LOSSES = ("power", "shot", "full", "late", "rot", "disk", "new_disk")  # what a machine does not have afterwards
PASSING = ("kill", "leave", "stop", "hold", "cut_off", "aim", "everybody", "link", "slow", "join")
STOPS = ("everybody", "blackout")


def trials(random: Random, copies: int) -> Trials:
    faults = Trials(kill=0, max_down=6, unflushed=copies - 1)
    losses = random.sample(LOSSES, random.choice((1, 2, 3, 4)))
    chosen = losses + random.sample(PASSING, random.choice((0, 1, 2, 4)))
    if random.random() < 0.5:
        chosen.append("blackout")
    if random.random() < 0.5:
        chosen.append("relief")
    for name in chosen:
        setattr(faults, name, random.choice((0.3, 1.0, 3.0)) * (0.2 if name in STOPS else 1.0))
    faults.mean_ns = random.choice((20, 50, 100)) * MILLISECOND
    faults.max_outage_ns = random.choice((100, 600)) * MILLISECOND
    return faults


def scenario_of(seed: int) -> Scenario:
    random = Random(f"ordeal {seed}")
    copies = random.choice((1, 2, 2, 2, 3, 3, 4))
    faults = trials(random, copies)
    scenario = Scenario(
        f"ordeal {seed}",
        machines=max(copies, 3) + random.choice((0, 0, 1, 2)),
        copies=copies,
        clients=random.choice((1, 2, 4)),
        objects=random.choice((1, 2, 3)),
        blocks=random.choice(((0,), (0, 1), (0, 1, OBJECT_BYTES // 4096 - 1))),
        gateways=random.choice((0, 0, 0, 1)),
        duration_ns=random.choice((300, 800, 1500)) * MILLISECOND,
        think_ns=random.choice((1, 2, 8)) * MILLISECOND // 2,
        durable_chance=random.choice((0.0, 0.3, 0.7)),
        hang_up_chance=random.choice((0.0, 0.05)),
        roam_chance=random.choice((0.02, 0.3)),
        nosync=random.random() < 0.2,
        tolerated=(Result.EIO, Result.NO_SPACE) if faults.full or faults.late else (),
        faults=faults,
    )
    if random.random() < 0.3:
        scenario.owners, scenario.snapshotters = 1, random.randrange(2)
        scenario.altering_owners = random.random() < 0.3
        if random.random() < 0.3:
            scenario.flags |= ClusterFlag.RECYCLE
    if random.random() < 0.15 and not faults.blackout:  # a sharer asks again: its write would reach over one (History)
        scenario.sharers = 2
    if random.random() < 0.2 and not (faults.power or faults.shot or faults.new_disk):
        scenario.cache_bytes = 16 * MIB  # what its gateway has not flushed goes with its power
        scenario.tolerated = (*scenario.tolerated, Result.VDI_LOCKED)
    return scenario


class Drawn(Run):
    """A seed's scenario and its ordeal."""

    def __init__(self, seed: int) -> None:
        scenario = scenario_of(seed)
        super().__init__(scenario, seed)
        assert isinstance(scenario.faults, Trials)
        self.nemesis = Ordeal(self.cluster, scenario.faults, lambda: self.history.blackouts.append(self.world.now_ns))

    def _judge(self) -> None:
        """With paths of one volume an object without a name may be left without any fault (docs/promises.md)."""
        self.nemesis.count += bool(self.sharers)
        super()._judge()

    def _read_all(self, volume: Volume) -> None:
        """There is no trouble any more: nobody may see any."""
        before = dict(self.errors)
        super()._read_all(volume)
        assert self.errors == before, f"results {self.errors} instead of {before}"


@pytest.mark.parametrize("seed", range(SEEDS))
def test_what_was_answered_or_read_stays(seed: int) -> None:
    Drawn(seed).execute()


@pytest.mark.soak
@pytest.mark.parametrize("seed", [seed for seed in range(SEEDS, 3000) if seed not in OPEN])
def test_it_stays_in_many_more(seed: int) -> None:
    Drawn(seed).execute()


def rot_is_read_as_zeros(patch: pytest.MonkeyPatch) -> None:
    read = SimStore._read

    def careless(self: SimStore, oid: ObjectId, offset: int, length: int) -> bytes | StoreError:
        found = read(self, oid, offset, length)
        return bytes(length) if isinstance(found, Corrupt) else found

    patch.setattr(SimStore, "_read", careless)


@pytest.mark.parametrize(
    "plant",
    [
        pytest.param(recovery_trusts_the_first_copy, id="P1"),
        pytest.param(replica_ignores_durability, id="P2"),
        pytest.param(acknowledged_after_the_first_copy, id="P3"),
        pytest.param(rot_is_read_as_zeros, id="P5"),
    ],
)
def test_a_broken_promise_is_found(plant: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(Failure) as failure:
        for seed in range(SEEDS):
            Drawn(seed).execute()
    assert isinstance(failure.value.__cause__, AssertionError)

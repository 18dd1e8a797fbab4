"""P3: what was acknowledged without a flush survives power loss of one node fewer than there are copies."""

from __future__ import annotations

import random

import pytest
from tests.sim.test_directed import fresh, holders, read, settle, write

from sheepdog.cluster.sim.clients import block_of

SEEDS = 40
WRITES = 6


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

"""Volumes with snapshots, clones, discards and deletions while nodes die: contents exact, nothing leaks."""

from __future__ import annotations

import pytest

from sheepdog.cluster.sim.nemesis import Faults
from sheepdog.cluster.sim.run import Run, Scenario

SEEDS = 6


def test_without_faults() -> None:
    run = Run(Scenario("owners calm", clients=1, owners=2, faults=Faults(kill=0)), seed=1)
    run.execute()
    assert all(owner.operations > 50 for owner in run.owners)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_snapshot_is_one_instant_of_its_volume(seed: int) -> None:
    """Taken while the owner writes: it holds the volume after some change between call and return, and for ever."""
    run = Run(Scenario("snapshots", clients=1, owners=1, snapshotters=1), seed)
    run.execute()
    assert run.snapshotters[0].images

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


@pytest.mark.parametrize("seed", range(SEEDS))
def test_full_stops_in_the_middle_of_operations(seed: int) -> None:
    """Every volume is whole after any cold start: deletions are finished, snapshots there or not."""
    faults = Faults(kill=1, link=0.5, everybody=0.4)
    Run(Scenario("cold starts", clients=1, owners=2, faults=faults), seed).execute()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_what_was_durable_survives_power_loss_of_all(seed: int) -> None:
    faults = Faults(kill=0.5, power=1, everybody=0.2, blackout=0.4)
    Run(Scenario("blackouts", clients=2, owners=1, durable_chance=1.0, faults=faults), seed).execute()

"""Nodes lose disks under load, alone and together with deaths: no client sees an error, and all copies come back."""

from __future__ import annotations

import pytest

from sheepdog.cluster.core.erasure import Policy
from sheepdog.cluster.sim.nemesis import Faults
from sheepdog.cluster.sim.run import Run, Scenario
from sheepdog.cluster.sim.world import MILLISECOND

SEEDS = 12


@pytest.mark.parametrize("seed", range(SEEDS))
def test_disks_fail(seed: int) -> None:
    faults = Faults(mean_ns=80 * MILLISECOND, kill=0, disk=1)
    run = Run(Scenario("disks", faults=faults), seed)
    run.execute()
    assert run.cluster.probes()["node.copies_lost"] > 3


@pytest.mark.parametrize("seed", range(SEEDS))
def test_disks_fail_and_nodes_die(seed: int) -> None:
    """A disk and a node are two zones: with three copies nothing may be lost."""
    faults = Faults(mean_ns=80 * MILLISECOND, kill=1, link=0.5, disk=2, max_down=1, max_outage_ns=300 * MILLISECOND)
    Run(Scenario("disks and kills", machines=4, clients=3, owners=1, faults=faults), seed).execute()


@pytest.mark.parametrize("seed", range(SEEDS // 2))
def test_disks_with_strips_fail(seed: int) -> None:
    faults = Faults(mean_ns=80 * MILLISECOND, kill=0, disk=1)
    Run(Scenario("strips", machines=5, policy=Policy(2, 2).to_byte(), faults=faults), seed).execute()

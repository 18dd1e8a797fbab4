"""The shipped core in a simulated world: three nodes, killed and started again at random."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sheepdog.cluster.sim.nemesis import Faults
from sheepdog.cluster.sim.run import Run, Scenario
from sheepdog.cluster.sim.world import SECOND

SEEDS = 40
SEEDS_PER_TEST = 20


@pytest.mark.parametrize("machines", [1, 3])
def test_calm(machines: int) -> None:
    run = Run(Scenario("calm", machines=machines, copies=machines, faults=Faults(kill=0), duration_ns=SECOND), seed=1)
    run.execute()
    assert run.history.operations > 500
    assert not run.errors


@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS_PER_TEST))
def test_nodes_are_killed_and_started_again(first: int) -> None:
    """Every acknowledged write is readable, no read goes back, and in the end all copies are equal."""
    for seed in range(first, first + SEEDS_PER_TEST):
        run = Run(Scenario("kills"), seed)
        run.execute()
        assert run.history.operations > 200, f"seed {seed}: nothing was tested"


@pytest.mark.parametrize(
    "scenario",
    [
        Scenario("links", faults=Faults(kill=0.5, link=2, mean_ns=SECOND // 10)),
        Scenario("leaves", faults=Faults(kill=1, link=1, leave=1)),
        Scenario("full stops", faults=Faults(kill=1, everybody=0.5)),
        Scenario("five nodes, two copies", machines=5, copies=2, faults=Faults(kill=1, link=0.5)),
        Scenario("two nodes", machines=2, copies=2, faults=Faults(kill=1, max_down=1)),
    ],
    ids=lambda scenario: scenario.name.replace(" ", "-"),
)
def test_other_faults(scenario: Scenario) -> None:
    for seed in range(12):
        Run(scenario, seed).execute()


def trace(seed: int) -> str:
    """Hash of everything that happens in a world, with faults of all kinds and all kinds of clients."""
    faults = Faults(everybody=0.2, link=1, leave=1, stop=1, hold=1, slow=1, cut_off=1, aim=1, full=1, rot=1, join=1)
    faults.new_disk, faults.mean_ns = 1, SECOND // 20
    scenario = Scenario("everything", 5, 3, policy=0x12, gateways=1, owners=2, snapshotters=1, session_ns=3 * SECOND)
    scenario.faults, scenario.duration_ns, scenario.hang_up_chance = faults, SECOND // 2, 0.05
    run = Run(scenario, seed)
    run.execute()
    return run.world.trace_hash()


def test_a_seed_gives_the_same_run_in_every_process() -> None:
    program = "from tests.sim.test_three_nodes import trace; print(trace(7), trace(8))"
    hashes = []
    for hash_seed in ("0", "1", "4711"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=True
        )
        hashes.append(done.stdout.split())
    assert hashes[0] == hashes[1] == hashes[2] == [trace(7), trace(8)]
    assert trace(7) != trace(8)

"""A scenario for every seed, with all kinds of faults: nothing promised is broken, and the rare paths are taken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sheepdog.cluster.sim.probes import known_probes, never_reached
from sheepdog.cluster.sim.run import Run
from sheepdog.cluster.sim.shrink import Regression, load
from sheepdog.cluster.sim.soak import Figures, main, try_seeds

SEEDS = 300
OPERATIONS = 150_000
SOAK_SEEDS, SOAK_OPERATIONS, SOAK_FAULTS = 2_000, 1_000_000, 15_000
REGRESSIONS = Path(__file__).parent / "regressions.jsonl"
SOAK_FIRST = 10_000  # other seeds than those of every day
# Reached only by what no scenario of the swarm does; these tests take them.
ELSEWHERE = {
    "cache.claim_refused": "tests/sim/test_cache.py",
    "cache.dirty_again": "tests/sim/test_cache.py",
    "cache.let_go": "tests/sim/test_cache.py",
    "cache.overflow": "tests/sim/test_cache.py",
    "cache.read_pushed": "tests/sim/test_cache.py",
    "cache.unreadable_clean": "tests/sim/test_cache.py",
    "claims.revoke": "tests/sim/test_cache.py",
    "gateway.moved_first": "tests/sim/test_moves.py",
    "inode.old_map_written": "tests/sim/test_old_maps.py",
    "moves.discarded": "tests/sim/test_moves.py",
    "moves.in_doubt": "tests/sim/test_old_maps.py",
    "recovery.delay_ended": "tests/sim/test_recovery_delay.py",
    "recovery.skipped": "tests/sim/test_full_nodes.py",
    "replica.old_bytes_gone": "tests/sim/test_strip_sends.py",
    "replica.own_bytes_gone": "tests/sim/test_own_bytes.py",
    "scrub.found": "tests/sim/test_bad_copies.py",
    "strips.misfit": "tests/sim/test_strip_check.py",
    "sweep.buried": "tests/sim/test_reclaim.py",
}
# With real processes, or a context made for the test: nobody counts there.
UNCOUNTED = {
    "cache.pushed_to_nothing": "tests/unit/test_cache_push.py",
}


@pytest.mark.parametrize("regression", load(REGRESSIONS), ids=lambda regression: regression.scenario.name)
def test_what_was_found_once(regression: Regression) -> None:
    Run(regression.scenario, regression.seed).execute()


@pytest.fixture(scope="module")
def figures() -> Figures:
    return try_seeds(range(SEEDS))


@pytest.mark.timeout(1800)  # a minute or two of work, beside whatever else the machine does
def test_nothing_promised_is_broken(figures: Figures, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print("\n" + "\n".join(figures.lines()))
    assert not figures.failures
    assert figures.seeds == SEEDS
    assert figures.operations >= OPERATIONS


def test_every_kind_of_fault_happened(figures: Figures) -> None:
    kinds = "kill power everybody blackout link leave stop hold slow cut_off aim full rot new_disk join disk"
    assert sorted(figures.faults) == sorted(kinds.split())
    assert min(figures.faults.values()) > 10, figures.faults


def test_probes_are_found_in_the_source() -> None:
    assert {"home.object_lost", "vigil.expel", "node.stale_message"} <= set(known_probes())
    assert never_reached({"home.object_lost": 1}) == [name for name in known_probes() if name != "home.object_lost"]


def test_a_failing_seed_is_kept(tmp_path: Path) -> None:
    """What the file says is what was run."""
    (known,) = [one for one in load(REGRESSIONS) if one.seed == 84]
    assert Regression.from_json(known.to_json()) == known


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_soak(capsys: pytest.CaptureFixture[str]) -> None:
    figures = try_seeds(range(SOAK_FIRST, SOAK_FIRST + SOAK_SEEDS))
    with capsys.disabled():
        print("\n" + "\n".join(figures.lines()))
    assert not figures.failures
    assert figures.operations >= SOAK_OPERATIONS
    assert sum(figures.faults.values()) >= SOAK_FAULTS
    assert not [name for name in never_reached(figures.probes) if name not in {**ELSEWHERE, **UNCOUNTED}]


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_what_the_swarm_does_not_reach_other_tests_do(tmp_path: Path) -> None:
    probed = tmp_path / "probed"
    options = ["-q", "-m", "not soak", "-p", "tests.support.probed", "--probed", str(probed)]
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", *options, *sorted(set(ELSEWHERE.values()))]
    subprocess.run(command, cwd=root, check=True, timeout=1800)
    assert sorted(ELSEWHERE.keys() - probed.read_text().split()) == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "4", "--jobs", "2", "--regressions", str(tmp_path / "kept")]) == 0
    said = capsys.readouterr().out
    assert said.startswith("4 seeds, ")
    assert "never reached, of " in said
    assert not (tmp_path / "kept").exists()

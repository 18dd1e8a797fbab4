"""Many seeds, in as many processes as wanted, and what they found.

    python -m sheepdog.cluster.sim.soak --seeds 2000 --jobs 2 --regressions FILE

Every seed is a scenario of its own (cluster.sim.swarm). One that fails is made small (cluster.sim.shrink) and kept in
the file of regressions, whose entries tests run first for ever after. Ends with status 1 if anything failed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path

from sheepdog.cluster.sim.probes import known_probes, never_reached
from sheepdog.cluster.sim.run import Failure, Run, Scenario
from sheepdog.cluster.sim.shrink import keep, shrink
from sheepdog.cluster.sim.swarm import scenario_of

SEEDS_PER_TASK = 5  # handed to a process at a time: half a second of work


@dataclass(slots=True)
class Figures:
    """What was done, and what was found."""

    seeds: int = 0
    operations: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    probes: dict[str, int] = field(default_factory=dict)
    events: int = 0
    simulated_ns: int = 0
    failures: list[tuple[int, str]] = field(default_factory=list)

    def add(self, other: Figures) -> None:
        self.seeds += other.seeds
        self.operations += other.operations
        self.events += other.events
        self.simulated_ns += other.simulated_ns
        self.failures += other.failures
        for mine, theirs in ((self.faults, other.faults), (self.probes, other.probes)):
            for name, number in theirs.items():
                mine[name] = mine.get(name, 0) + number

    def note(self, run: Run) -> None:
        """Adds one run."""
        self.seeds += 1
        self.operations += run.operations
        self.events += run.world.events
        self.simulated_ns += run.world.now_ns
        for mine, theirs in ((self.faults, run.nemesis.counts), (self.probes, run.cluster.probes())):
            for name, number in theirs.items():
                mine[name] = mine.get(name, 0) + number

    def lines(self) -> Iterator[str]:
        """For people."""
        yield (
            f"{self.seeds} seeds, {self.operations:,} client operations, {sum(self.faults.values()):,} faults, "
            f"{len(self.failures)} violations"
        )
        yield f"{self.events:,} events in {self.simulated_ns / 1e9:,.0f} simulated seconds"
        yield "faults: " + ", ".join(f"{name} {number}" for name, number in sorted(self.faults.items()))
        yield "rare paths: " + ", ".join(f"{name} {number}" for name, number in sorted(self.probes.items()))
        missed = never_reached(self.probes)
        yield f"never reached, of {len(known_probes())}: " + (", ".join(missed) or "none")
        for seed, text in self.failures:
            yield f"seed {seed}: {text}"


def try_seed(seed: int, figures: Figures, scenario: Scenario | None = None) -> None:
    """Runs one seed and adds what came of it."""
    run = Run(scenario or scenario_of(seed), seed)
    try:
        run.execute()
    except Failure as failure:
        figures.failures.append((seed, str(failure)))
    figures.note(run)


def try_seeds(seeds: Iterable[int]) -> Figures:
    """In this process, one after the other."""
    figures = Figures()
    for seed in seeds:
        try_seed(seed, figures)
    return figures


def soak(first: int, seeds: int | None, jobs: int, deadline: float, tell: Callable[[Figures], None]) -> Figures:
    """Runs `seeds` seeds from `first` on (None: without end), or until `deadline` (time.monotonic)."""
    figures = Figures()
    numbers = iter(range(first, first + seeds)) if seeds is not None else count(first)
    tasks = iter(lambda: list(islice(numbers, SEEDS_PER_TASK)), [])
    with ProcessPoolExecutor(jobs) as pool:
        under_way = [pool.submit(try_seeds, task) for task in islice(tasks, 2 * jobs)]
        while under_way:
            figures.add(under_way.pop(0).result())
            tell(figures)
            if time.monotonic() < deadline:
                under_way += [pool.submit(try_seeds, task) for task in islice(tasks, 1)]
    return figures


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sheepdog.cluster.sim.soak", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, help="how many seeds (default: as many as the time allows)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="ends after so long")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--regressions", type=Path, help="file that failing seeds are kept in, made small")
    options = parser.parse_args(arguments)
    told = time.monotonic()

    def tell(figures: Figures) -> None:
        nonlocal told
        if time.monotonic() > told + 30:
            told = time.monotonic()
            print(f"... {next(figures.lines())}", flush=True)

    deadline = time.monotonic() + 60 * options.minutes
    figures = soak(options.first, options.seeds, options.jobs, deadline, tell)
    print("\n".join(figures.lines()), flush=True)
    if options.regressions is not None:
        for seed, _ in figures.failures:
            entry = shrink(scenario_of(seed), seed)
            if entry is not None:
                keep(options.regressions, entry)
                print(f"seed {seed}: {entry.scenario}", flush=True)
    return 1 if figures.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Makes a failing seed small, with fewer faults, clients and objects and in less time, and keeps it in a file.

Each fault has chance of its own, so leaving one out leaves the others as they were. What is kept is one line of JSON:
the seed and what differs from an ordinary scenario.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.sim.nemesis import Faults
from sheepdog.cluster.sim.run import Failure, Run, Scenario

MAX_RUNS = 300  # of one shrinking: a minute or two
Attempt = Callable[[Scenario], Scenario]


@dataclass(slots=True)
class Regression:
    """A seed that failed once."""

    seed: int
    scenario: Scenario
    reason: str

    def to_json(self) -> str:
        plain, ordinary = asdict(replace(self.scenario, make_node=None)), asdict(Scenario("", make_node=None))  # type: ignore[arg-type]
        values = {name: value for name, value in plain.items() if value != ordinary[name]}
        if "faults" in values:
            values["faults"] = {k: v for k, v in values["faults"].items() if v != ordinary["faults"][k]}
        return json.dumps({"seed": self.seed, "reason": self.reason, "scenario": values})

    @classmethod
    def from_json(cls, line: str) -> Regression:
        values = json.loads(line)
        scenario: dict[str, Any] = values["scenario"]
        faults = scenario.pop("faults", {})
        if "skip" in faults:
            faults["skip"] = tuple(faults["skip"])
        for name in ("blocks", "tolerated", "zone_of"):
            if name in scenario:
                scenario[name] = tuple(scenario[name])
        scenario["tolerated"] = tuple(Result(one) for one in scenario.get("tolerated", ()))
        return cls(values["seed"], Scenario(faults=Faults(**faults), **scenario), values["reason"])


def failure_of(scenario: Scenario, seed: int) -> tuple[str, int] | None:
    """Why it fails, and how many faults there were; None if it does not."""
    run = Run(scenario, seed)
    try:
        run.execute()
    except Failure as failure:
        return str(failure), run.nemesis.number
    return None


def shrink(scenario: Scenario, seed: int) -> Regression | None:
    """The smallest scenario found that fails with this seed; None if it does not fail at all."""
    found = failure_of(scenario, seed)
    if found is None:
        return None
    reason, faults = found
    runs = 0

    def fails(smaller: Scenario) -> bool:
        nonlocal runs, reason
        runs += 1
        outcome = failure_of(smaller, seed) if runs <= MAX_RUNS else None
        if outcome is not None:
            reason = outcome[0]
        return outcome is not None

    for smaller in _simpler(scenario):
        if fails(candidate := smaller(scenario)):
            scenario = candidate
    scenario = _without_faults(scenario, faults, fails)
    return Regression(seed, scenario, reason.split("\n")[0])


def _with(name: str, value: Any, scenario: Scenario) -> Scenario:
    return replace(scenario, **{name: value})


def _shorter(part: int, scenario: Scenario) -> Scenario:
    return replace(scenario, duration_ns=scenario.duration_ns // part)


def _without(fault: str, scenario: Scenario) -> Scenario:
    none: dict[str, Any] = {fault: 0.0}
    return replace(scenario, faults=replace(scenario.faults, **none))


def _simpler(scenario: Scenario) -> Iterator[Attempt]:
    for name, value in (
        ("owners", 0),
        ("snapshotters", 0),
        ("gateways", 0),
        ("hang_up_chance", 0.0),
        ("session_ns", 0),
    ):
        if getattr(scenario, name) != value:
            yield partial(_with, name, value)
    for part in (4, 2):
        yield partial(_shorter, part)
    for name in ("clients", "objects"):
        yield partial(_with, name, 1)
    yield lambda one: replace(one, blocks=one.blocks[:1])
    for fault in fields(Faults):
        if fault.type == "float":
            yield partial(_without, fault.name)


def _without_faults(scenario: Scenario, faults: int, fails: Callable[[Scenario], bool]) -> Scenario:
    """Leaves out halves of the faults, then quarters ... then single ones."""
    size = faults // 2
    while size:
        for start in range(0, faults, size):
            skip = tuple(sorted({*scenario.faults.skip, *range(start, min(start + size, faults))}))
            candidate = replace(scenario, faults=replace(scenario.faults, skip=skip))
            if skip != scenario.faults.skip and fails(candidate):
                scenario = candidate
        size //= 2
    return scenario


def keep(path: Path, regression: Regression) -> None:
    """Adds it to the file."""
    with path.open("a") as file:
        file.write(regression.to_json() + "\n")


def load(path: Path) -> list[Regression]:
    """What the file has; comments begin with #."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [Regression.from_json(line) for line in lines if line.strip() and not line.startswith("#")]

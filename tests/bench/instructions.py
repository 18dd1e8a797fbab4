"""Instructions and system calls of each daemon for one operation, counted by callgrind on however busy a machine.

python -m tests.bench.instructions [--redundancy 4:2] [--cell write:4k:16:volatile] [--seconds 20] [--top 30]

As many nodes as the volume has copies or strips run on this machine under valgrind, some fifty times slower; the client
works at node 0, the *gateway*. The *others* are homes and replicas; what they take is given for an average one.
Counted are instructions in user mode, all threads; the kernel's work shows as system calls. At depth 1 the same code
gives the same counts; deeper, a turn that finds fewer requests makes each dearer: compare runs of as many system calls.
By function: its own instructions, without those that it calls; compiled ones are CPyDef_MODULE___CLASS___METHOD.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from shutil import which

from tests.bench import results
from tests.support.cluster import RUNNING, Cluster
from tests.support.processes import wait_until

from sheepdog.cluster.client.workload import Cell, Workload, parse_cell
from sheepdog.tools.dog.values import parse_redundancy

OBJECTS = 16
START_S = 240.0  # of three interpreters under valgrind on a busy machine
COMMAND_S = 60.0  # of callgrind_control
CELLS = ("write:4k:16:volatile", "write:4k:1:volatile", "first:4k:16:volatile", "read:4k:16")
_NAME = re.compile(r"^(fn|cfn)=\((\d+)\)(?: (.*))?$")
_COSTS = re.compile(r"^[+\-*\d]\S*((?: \d+)*)$")


@dataclass
class Counts:
    """Of one process, or of several together."""

    instructions: Counter[str] = field(default_factory=Counter)  # own ones, by function
    system_calls: int = 0

    def add(self, other: Counts) -> None:
        self.instructions += other.instructions
        self.system_calls += other.system_calls


def parse(lines: Iterator[str]) -> Counts:
    """What a dump of callgrind says (its format: valgrind's manual, "Callgrind Format Specification")."""
    counts = Counts()
    names: dict[str, str] = {}
    events: list[str] = []
    function = ""
    inclusive = False  # the next costs are those of a call
    for line in lines:
        if line.startswith("events:"):
            events = line.split()[1:]
        elif line.startswith("calls="):
            inclusive = True
        elif named := _NAME.match(line):
            kind, number, name = named.groups()
            if name is not None:
                names[number] = name
            if kind == "fn":
                function = names[number]
        elif found := _COSTS.match(line):
            if not inclusive:
                costs = dict(zip(events, map(int, found[1].split()), strict=False))  # zeros at the end are left out
                counts.instructions[function] += costs.get("Ir", 0)
                counts.system_calls += costs.get("sysCount", 0)
            inclusive = False
    return counts


class Watched(Cluster):
    """Daemons under callgrind, which counts from `counting` on."""

    def __init__(self, nodes: int, directory: Path, dumps: Path) -> None:
        super().__init__(nodes, directory)
        self._dumps = dumps
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start_watched(self) -> None:
        """Starts all nodes, which take a copy each of what is written."""
        valgrind = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--collect-systime=nsec"]
        for node in range(self.count):  # in the foreground: callgrind_control does not find what has forked
            files = [f"--callgrind-out-file={self._dumps}/node{node}", f"--log-file={self._dumps}/log{node}"]
            self._daemons.append(subprocess.Popen([*valgrind, *files, *self.command(node, ["-f"])]))
            wait_until(self.socket(node).exists, START_S, f"start of node {node}")
        self.wait_members(self.count, range(self.count), START_S)
        self.dog("cluster", "format", "-c", str(self.count))
        self.wait_status(RUNNING, range(self.count), START_S)

    @contextmanager
    def counting(self, counts: list[Counts]) -> Iterator[None]:
        """Appends each node's counts of what is done meanwhile."""
        self._control("--zero")
        yield
        self._control("--dump")
        for node in range(self.count):
            dump = max(self._dumps.glob(f"node{node}.*"), key=lambda path: int(path.suffix[1:]))
            with dump.open() as lines:
                counts.append(parse(lines))

    def translate(self) -> None:
        """From here on all code is translated for counting; what runs first takes its time."""
        self._control("--instr=on")

    def _control(self, order: str) -> None:
        for daemon in self._daemons:
            command = ["callgrind_control", order, str(daemon.pid)]
            subprocess.run(command, check=True, capture_output=True, timeout=COMMAND_S)


def measure(cluster: Watched, cell: Cell, policy: int, seconds: float) -> tuple[int, list[Counts]]:
    """Operations, and by node what they took; `policy`: of a coded volume, else 0."""
    load = Workload(("127.0.0.1", cluster.port(0)), OBJECTS, cluster.count if policy else 0, policy)
    cluster.translate()
    load.run(cell, seconds / 4)
    counts: list[Counts] = []
    with cluster.counting(counts):
        operations = load.run(cell, seconds).operations
    load.close()
    return operations, counts


def roles(counts: list[Counts]) -> dict[str, tuple[Counts, int]]:
    """The counts of each role, and of how many nodes they are the sum."""
    others, everything = Counts(), Counts()
    for node, of_node in enumerate(counts):
        everything.add(of_node)
        if node:
            others.add(of_node)
    return {"gateway": (counts[0], 1), "other node": (others, len(counts) - 1), "all nodes": (everything, 1)}


def show(cell: Cell, operations: int, counts: list[Counts], top: int) -> dict[str, object]:
    """Prints the table of one load; the same as a row of the results."""
    by_role = roles(counts)
    print(f"\n{cell}: {operations} operations; for one of them")
    print(f"{'':60}" + "".join(f"{role:>12}" for role in by_role))
    table = {
        role: {
            "instructions": sum(summed.instructions.values()) / nodes / operations,
            "system_calls": summed.system_calls / nodes / operations,
        }
        for role, (summed, nodes) in by_role.items()
    }
    for figure, form in (("instructions", ",.0f"), ("system_calls", ",.1f")):
        print(f"{figure.replace('_', ' '):60}" + "".join(f"{figures[figure]:12{form}}" for figures in table.values()))
    functions = [
        {"name": name, **{role: one.instructions[name] / n / operations for role, (one, n) in by_role.items()}}
        for name, _ in by_role["all nodes"][0].instructions.most_common(top)
    ]
    for row in functions:
        print(f"{row['name']:60.60}" + "".join(f"{row[role]:12,.0f}" for role in by_role))
    return {"cell": str(cell), "operations": operations, "nodes": table, "functions": functions}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", action="append", default=[], help="OPERATION:SIZE:DEPTH[:volatile|durable|flushN]")
    parser.add_argument("--redundancy", default="3", help="of the volume, as dog vdi create -c takes it")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load while it is counted")
    parser.add_argument("--top", type=int, default=30, help="functions shown")
    parser.add_argument("--dumps", type=Path, help="keep callgrind's own files in this directory (callgrind_annotate)")
    parser.add_argument("--results", type=Path, default=Path("bench-results/instructions.json"))
    options = parser.parse_args()
    if which("callgrind_control") is None:
        print("valgrind is not installed", file=sys.stderr)
        return 1
    about = results.machine()
    nodes, policy = parse_redundancy(options.redundancy)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        cluster = Watched(nodes, Path(directory), options.dumps or Path(directory))
        try:
            cluster.start_watched()
            for cell in map(parse_cell, options.cell or CELLS):
                rows.append(show(cell, *measure(cluster, cell, policy, options.seconds), options.top))
        except Exception:
            print(cluster.logs(), file=sys.stderr)
            raise
        finally:
            cluster.close()
    results.save(options.results, {"machine": about, "command": results.command("instructions"), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())

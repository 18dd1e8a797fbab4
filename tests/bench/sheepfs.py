"""A volume of three nodes as a file of sheepfs, under fio with direct I/O: both transports, plain and on a loop device.

Prints for each workload operations (or bytes) per second and the CPU time of sheepfs alone per operation, medians of
several runs. The second figure is the one to compare: the first drifts with whatever else the machine does.

    python -m tests.bench.sheepfs [--transport NAME] [--runs N] [--seconds S] [--only TEXT]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.support.cluster import Cluster, started
from tests.support.mounts import SheepFs
from tests.support.processes import having_argument, run, wait_until

NODES = 3
KIB, MIB = 1 << 10, 1 << 20
VOLUME_BYTES = 256 * MIB
TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Workload:
    """One row; `pattern` as fio names it."""

    name: str
    pattern: str
    size: int
    depth: int
    loop: bool = False


WORKLOADS = (
    Workload("4k read depth 1", "randread", 4 * KIB, 1),
    Workload("4k read depth 16", "randread", 4 * KIB, 16),
    Workload("4k write depth 1", "randwrite", 4 * KIB, 1),
    Workload("4k write depth 16", "randwrite", 4 * KIB, 16),
    Workload("1M read depth 4", "read", MIB, 4),
    Workload("1M write depth 4", "write", MIB, 4),
    Workload("loop: 4k read depth 16", "randread", 4 * KIB, 16, loop=True),
    Workload("loop: 4k write depth 16", "randwrite", 4 * KIB, 16, loop=True),
)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) * TICK_SECONDS


def once(work: Workload, target: Path, pid: int, seconds: float) -> tuple[float, float]:
    """(operations per second, CPU seconds of sheepfs per operation) of one run."""
    before = cpu_seconds(pid)
    output = run(
        [
            "fio", "--name=bench", f"--filename={target}", "--direct=1", f"--rw={work.pattern}", f"--bs={work.size}",
            "--ioengine=libaio", f"--iodepth={work.depth}", f"--size={VOLUME_BYTES}", "--time_based",
            f"--runtime={seconds}", "--output-format=json",
        ]
    ).stdout  # fmt: skip
    used = cpu_seconds(pid) - before
    job = json.loads(output)["jobs"][0]
    side = job["read"] if "read" in work.pattern else job["write"]
    return side["iops"], used / max(1, side["total_ios"])


def measure(transport: str, cluster: Cluster, directory: Path, arguments: argparse.Namespace) -> None:
    """Mount, print every row, unmount."""
    with ExitStack() as stack:
        mount = SheepFs(cluster, directory / "dir", 0, f"--transport={transport}")
        stack.callback(mount.close)
        (pid,) = having_argument(str(mount.place))
        volume = mount.volume("bench")
        device = Path(run(["losetup", "--find", "--show", "--direct-io=on", volume]).stdout.decode().strip())
        stack.callback(_detach, device, volume)
        for work in WORKLOADS:
            if arguments.only in work.name:
                target = device if work.loop else volume
                results = [once(work, target, pid, arguments.seconds) for _ in range(arguments.runs)]
                rate = statistics.median(result[0] for result in results)
                speed, unit = (rate * work.size / 1e6, "MB/s") if work.size >= MIB else (rate, "IOPS")
                cpu_us = 1e6 * statistics.median(result[1] for result in results)
                print(f"{transport:10}{work.name:28}{speed:>10.0f} {unit}{cpu_us:>10.1f}", flush=True)


def _detach(device: Path, volume: Path) -> None:
    run(["losetup", "-d", device])
    wait_until(lambda: not run(["losetup", "-j", volume]).stdout, 20, "end of the loop device")


def main() -> int:
    parser = argparse.ArgumentParser(prog="sheepfs", description="Measure sheepfs over three nodes.")
    parser.add_argument("--transport", choices=("direct", "pyfuse3"), help="only this one")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2, help="length of one run")
    parser.add_argument("--only", default="", help="only workloads whose name contains this")
    arguments = parser.parse_args()
    if os.geteuid() or shutil.which("fio") is None:
        print("needs root and fio", file=sys.stderr)
        return 1
    directory = Path(tempfile.mkdtemp(prefix="sheepdog-bench-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        cluster = Cluster(NODES, directory)
        stack.callback(cluster.close)
        started(cluster).format("-c", "3")
        cluster.dog("vdi", "create", "bench", str(VOLUME_BYTES))
        cluster.dog("vdi", "write", "bench", "0", str(VOLUME_BYTES), stdin=os.urandom(VOLUME_BYTES), seconds=300)
        print(f"{'transport':10}{'workload':28}{'':>15}{'CPU us':>10}")
        for transport in [arguments.transport] if arguments.transport else ["direct", "pyfuse3"]:
            measure(transport, cluster, directory, arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The doors of one cluster beside each other: the native protocol, NBD, sheepfs, and QEMU's own FUSE export.

Also a plugin of nbdkit's that does nothing (`empty`): what any plugin in Python can reach at most.

Three nodes, three copies, every flush on the disks. Each row is measured through all its doors in turn, several times;
a ratio is the median of the ratios of one turn, so what else the machine does falls on both sides of it. CPU is that of
the door's own process (nbdkit, sheepfs) per operation.

    python -m tests.bench.doors [--only TEXT] [--runs N] [--seconds S] [--results FILE]

The same figures go to bench-results/doors.json (--results).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench import results
from tests.bench.fio import fio_time
from tests.bench.run import QEMU_IMG
from tests.support.cluster import Cluster, started
from tests.support.mounts import SheepFs
from tests.support.nbd import NbdServer, for_plugins
from tests.support.processes import having_argument, run, wait_until

NODES = 3
RESULTS = Path("bench-results/doors.json")
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
VOLUME_BYTES = 256 * MIB
OBJECT = 4 * MIB
TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK")
FIRST_COUNT = 64  # requests of the run that finds out how many fill the wanted time


@dataclass(frozen=True, slots=True)
class Workload:
    """What a client asks for."""

    name: str
    size: int
    depth: int
    write: bool

    @property
    def step(self) -> int:
        """From one request to the next: small ones go to another object each, since QEMU's native driver lets two
        writes to one object wait for each other."""
        return self.size if self.size >= MIB else OBJECT + self.size


READ, WRITE = Workload("4k read depth 16", 4 * KIB, 16, False), Workload("4k write depth 16", 4 * KIB, 16, True)
READ_BIG, WRITE_BIG = Workload("1M read depth 8", MIB, 8, False), Workload("1M write depth 8", MIB, 8, True)
SLOW_READ, SLOW_WRITE = Workload("4k read depth 1", 4 * KIB, 1, False), Workload("4k write depth 1", 4 * KIB, 1, True)


@dataclass(frozen=True, slots=True)
class Door:
    """A way to the volume: `once(work, seconds)` gives operations per second; `pid` is charged for them."""

    name: str
    once: Callable[[Workload, float], tuple[float, int]]  # (operations per second, operations)
    pid: int = 0


@dataclass(frozen=True, slots=True)
class Comparison:
    """One row: a door against another; `wanted` is the ratio that is promised (docs/performance.md)."""

    work: Workload
    door: str
    against: str
    wanted: float = 0.0


COMPARISONS = (
    Comparison(READ, "nbd", "native", 0.6),
    Comparison(READ, "empty", "native"),
    Comparison(READ, "nbd", "empty"),
    Comparison(WRITE, "nbd", "native", 0.4),
    Comparison(WRITE, "empty", "native"),
    Comparison(READ_BIG, "nbd", "native", 0.8),
    Comparison(READ_BIG, "nbd", "native, unix"),
    Comparison(WRITE_BIG, "nbd", "native", 0.8),
    Comparison(SLOW_READ, "nbd", "native"),
    Comparison(SLOW_WRITE, "nbd", "native"),
    Comparison(READ, "sheepfs", "qemu fuse", 1.5),
    Comparison(WRITE, "sheepfs", "qemu fuse", 1.5),
    Comparison(READ_BIG, "sheepfs's file", "native", 0.8),
    Comparison(READ_BIG, "sheepfs's file", "native, unix"),
    Comparison(WRITE_BIG, "sheepfs's file", "native", 0.8),
    Comparison(SLOW_READ, "sheepfs's file", "native"),
    Comparison(SLOW_WRITE, "sheepfs's file", "native"),
    Comparison(READ, "pyfuse3", "sheepfs"),
    Comparison(WRITE, "pyfuse3", "sheepfs"),
    Comparison(READ, "loop", "sheepfs"),
    Comparison(WRITE, "loop", "sheepfs"),
)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    if not pid:
        return 0.0
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) * TICK_SECONDS


def qemu(image: str, *options: str) -> Callable[[Workload, float], tuple[float, int]]:
    """QEMU's client, the same for native protocol, NBD and file: what it costs itself is on both sides."""
    how = options or ("-t", "writeback")

    def bench(work: Workload, count: int) -> float:
        output = run(
            [
                QEMU_IMG, "bench", "-f", "raw", *how, "-c", str(count), "-d", str(work.depth),
                "-s", str(work.size), "-S", str(work.step), *(["-w", "--pattern", "90"] if work.write else []), image,
            ],
            seconds=300,
        ).stdout.decode()  # fmt: skip
        return float(output.split("Run completed in ")[1].split()[0])

    def once(work: Workload, seconds: float) -> tuple[float, int]:
        count = max(FIRST_COUNT, int(FIRST_COUNT * seconds / max(bench(work, FIRST_COUNT), 0.001)))
        return count / bench(work, count), count + FIRST_COUNT

    return once


def fio(target: Path) -> Callable[[Workload, float], tuple[float, int]]:
    """Direct I/O on a file or device; small requests at random places."""

    def once(work: Workload, seconds: float) -> tuple[float, int]:
        pattern = ("" if work.size >= MIB else "rand") + ("write" if work.write else "read")
        output = run(
            [
                "fio", "--name=bench", f"--filename={target}", "--direct=1", f"--rw={pattern}", f"--bs={work.size}",
                "--ioengine=libaio", f"--iodepth={work.depth}", f"--size={VOLUME_BYTES}", "--time_based",
                f"--runtime={fio_time(seconds)}", "--output-format=json",
            ]
        ).stdout  # fmt: skip
        job = json.loads(output)["jobs"][0]
        side = job["write" if work.write else "read"]
        return side["iops"], side["total_ios"]

    return once


class Doors:
    """The doors to a written volume; those that need root or FUSE are there only with it."""

    def __init__(self, cluster: Cluster, directory: Path, stack: ExitStack) -> None:
        self._directory = directory
        self._stack = stack
        self.cluster = cluster
        cluster.dog("vdi", "create", "bench", str(VOLUME_BYTES))
        fill(cluster, "bench", VOLUME_BYTES)
        self.server = NbdServer(cluster, directory)
        stack.callback(self.server.close)
        self.by_name = {
            "native": Door("native", qemu(f"sheepdog://127.0.0.1:{cluster.port(0)}/bench")),
            "native, unix": Door("native, unix", qemu(f"sheepdog+unix:///bench?socket={cluster.socket(0)}")),
            "nbd": Door("nbd", qemu(self.server.uri("bench")), self.server.process.pid),
            "empty": self._empty(),
        }
        if os.geteuid() == 0 and os.path.exists("/dev/fuse") and shutil.which("fio"):
            self._mount("sheepfs", "direct")
            self._mount("pyfuse3", "pyfuse3")
            self._qemu_fuse()

    def _empty(self) -> Door:
        """nbdkit as `dog nbd serve` starts it, with a plugin that does nothing."""
        place = self._directory / "empty.sock"
        process = subprocess.Popen(
            [
                "nbdkit",
                "-f",
                "-U",
                place,
                "python",
                Path(__file__).with_name("empty_plugin.py"),
                f"size={VOLUME_BYTES}",
            ],
            env=for_plugins(),
        )
        self._stack.callback(process.wait, 20)
        self._stack.callback(process.terminate)
        wait_until(place.exists, 20, "nbdkit")
        return Door("empty", qemu(f"nbd+unix:///?socket={place}"), process.pid)

    def _mount(self, name: str, transport: str) -> None:
        mount = SheepFs(self.cluster, self._directory / name, 0, f"--transport={transport}")
        self._stack.callback(mount.close)
        (pid,) = having_argument(str(mount.place))
        volume = mount.volume("bench")
        self.by_name[name] = Door(name, fio(volume), pid)
        if name == "sheepfs":
            direct = qemu(str(volume), "-t", "none", "-i", "native")
            self.by_name["sheepfs's file"] = Door("sheepfs's file", direct, pid)
            device = Path(run(["losetup", "--find", "--show", "--direct-io=on", volume]).stdout.decode().strip())
            self._stack.callback(_detach, device, volume)
            self.by_name["loop"] = Door("loop", fio(device), pid)

    def _qemu_fuse(self) -> None:
        """`qemu-storage-daemon` shows the NBD export as a file."""
        if shutil.which("qemu-storage-daemon") is None:
            return
        place = self._directory / "qemu-fuse"
        place.touch()
        process = subprocess.Popen(
            [
                "qemu-storage-daemon",
                "--blockdev", f"driver=nbd,node-name=d,server.type=unix,server.path={self.server.socket},export=bench",
                "--export", f"type=fuse,id=e,node-name=d,mountpoint={place},writable=on",
            ]
        )  # fmt: skip

        def stop() -> None:
            process.terminate()  # it unmounts
            process.wait(20)

        self._stack.callback(stop)
        wait_until(lambda: place.stat().st_size == VOLUME_BYTES, 20, "qemu-storage-daemon's export")
        self.by_name["qemu fuse"] = Door("qemu fuse", fio(place), process.pid)

    def compare(self, row: Comparison, runs: int, seconds: float) -> dict[str, Any]:
        """Measures, prints and returns one row."""
        door, other = self.by_name[row.door], self.by_name[row.against]
        rates: list[float] = []
        others: list[float] = []
        used: list[float] = []
        for _ in range(runs):
            others.append(other.once(row.work, seconds)[0])
            before = cpu_seconds(door.pid)
            rate, count = door.once(row.work, seconds)
            rates.append(rate)
            used.append((cpu_seconds(door.pid) - before) / count)
        ratio = statistics.median(mine / theirs for mine, theirs in zip(rates, others, strict=True))
        name = f"{row.work.name}: {row.door} against {row.against}"
        figures = [_speed(row.work, statistics.median(side)) for side in (rates, others)]
        wanted = f"{row.wanted:>8.2f}" if row.wanted else f"{'':>8}"
        cpu_us = 1e6 * statistics.median(used)
        print(f"{name:46}{figures[0]:>12}{figures[1]:>12}{ratio:>8.2f}{wanted}{cpu_us:>9.0f} us", flush=True)
        return {
            "name": name, "iops": statistics.median(rates), "against_iops": statistics.median(others),
            "ratio": ratio, "wanted": row.wanted or None, "door_cpu_us": cpu_us,
        }  # fmt: skip

    def thin_copy(self, runs: int) -> dict[str, Any]:
        """nbdcopy of 20 GB with 1 GB of data in it, against 1 GB that is all data."""
        for name, size in (("full", GIB), ("thin", 20 * GIB)):
            self.cluster.dog("vdi", "create", name, str(size))
            for part in range(4):
                fill(self.cluster, name, GIB // 4, part * size // 4)
        times: dict[str, list[float]] = {"full": [], "thin": []}
        for _ in range(runs):
            for name, list_of in times.items():
                begin = time.monotonic()
                run(["nbdcopy", self.server.uri(name), "null:"], seconds=300)
                list_of.append(time.monotonic() - begin)
        ratio = statistics.median(full / thin for full, thin in zip(times["full"], times["thin"], strict=True))
        thin, full = (f"{statistics.median(times[name]):.2f} s" for name in ("thin", "full"))
        name = "nbdcopy: 1 GB in 20 GB against 1 GB"
        print(f"{name:46}{thin:>12}{full:>12}{ratio:>8.2f}{1:>8.2f}", flush=True)
        return {"name": name, "seconds": times, "ratio": ratio, "wanted": 1}


def fill(cluster: Cluster, name: str, length: int, offset: int = 0) -> None:
    cluster.dog("vdi", "write", name, str(offset), str(length), stdin=os.urandom(length), seconds=300)


def _speed(work: Workload, rate: float) -> str:
    return f"{rate * work.size / 1e6:.0f} MB/s" if work.size >= MIB else f"{rate:.0f} IOPS"


def _detach(device: Path, volume: Path) -> None:
    run(["losetup", "-d", device])
    wait_until(lambda: not run(["losetup", "-j", volume]).stdout, 20, "end of the loop device")


def main() -> int:
    parser = argparse.ArgumentParser(prog="doors", description="Measure the doors of three nodes beside each other.")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2, help="length of one run")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the JSON file")
    parser.add_argument("--only", default="", help="only rows that match this regular expression; thin: the thin copy")
    arguments = parser.parse_args()
    missing = [name for name in ("nbdkit", "nbdcopy") if shutil.which(name) is None]
    if missing or not QEMU_IMG.exists():
        print(f"needs {', '.join(missing) or 'make qemu52'}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended in this case too
    directory = Path(tempfile.mkdtemp(prefix="sheepdog-bench-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        cluster = Cluster(NODES, directory, options=())
        stack.callback(cluster.close)
        started(cluster).format("-c", "3")
        doors = Doors(cluster, directory, stack)
        about, rows = results.machine(), []
        print(f"{'':46}{'this':>12}{'that':>12}{'ratio':>8}{'wanted':>8}{'CPU':>12}   load {os.getloadavg()[0]:.1f}")
        for row in COMPARISONS:
            wanted = re.search(arguments.only, f"{row.work.name}: {row.door} against {row.against}")
            if wanted and row.door in doors.by_name and row.against in doors.by_name:
                rows.append(doors.compare(row, arguments.runs, arguments.seconds))
        if re.search(arguments.only, "thin"):
            rows.append(doors.thin_copy(arguments.runs))
    results.save(arguments.results, {"machine": about, "command": results.command("doors"), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())

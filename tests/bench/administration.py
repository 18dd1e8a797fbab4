"""`make bench ARGS=--administration`: what `dog` costs, the whole command and the work of the servers.

Beside it C Sheepdog's figures: the whole command, and the CPU time of its three servers where it was measured.
"""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.support.cluster import Cluster
from tests.support.processes import BIN, run

TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK")
MIB = 1 << 20
MANY = 1000
COMMAND_LIMIT_MS = 150  # of a whole command, interpreter and all
LIST_LIMIT_MS = 300  # of 1,000 volumes
STREAM_LIMIT_MB = 300  # of changed data per second, in a backup and in a restore
ROUNDS = 20
LIST_ROUNDS = 5
STREAM_BYTES = 512 * MIB
C_COMMAND_MS = {"create": 55.0, "snapshot": 107.0, "clone": 110.0, "delete": 84.0, "list": 137.0, "list NAME": 434.0}
C_CPU_MS = {"create": 42.0}


def cpu_seconds(cluster: Cluster) -> float:
    """User and system time of all daemons so far."""
    ticks = 0
    for node in range(cluster.count):
        for pid in cluster.pids(node):
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks * TICK_SECONDS


def commands(cluster: Cluster, every: Iterable[Sequence[str]]) -> tuple[float, float, float]:
    """(median ms of a whole command, its own CPU ms, CPU ms of all servers) for each of `every`."""
    took: list[float] = []
    before, own = cpu_seconds(cluster), resource.getrusage(resource.RUSAGE_CHILDREN)
    for words in every:
        began = time.monotonic()
        cluster.dog(*words)
        took.append(1000 * (time.monotonic() - began))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - own.ru_utime - own.ru_stime
    servers = 1000 * (cpu_seconds(cluster) - before) / len(took)
    return statistics.median(took), 1000 * spent / len(took), servers


def show(name: str, measured: tuple[float, float, float]) -> None:
    command, own, servers = measured
    c_command = f"{C_COMMAND_MS[name]:>8.0f}" if name in C_COMMAND_MS else f"{'-':>8}"
    c_cpu = f"{C_CPU_MS[name]:>8.0f}" if name in C_CPU_MS else f"{'-':>8}"
    print(f"{name:24}{command:>12.0f}{own:>12.0f}{servers:>12.1f}{c_command}{c_cpu}", flush=True)


def measure(cluster: Cluster, only: str = "") -> None:
    """All of it, or what `only` names: the streams alone."""
    stream(cluster)
    if only == "stream":
        return
    print("Administration, three nodes, three copies, -n; ms: medians of whole commands, means of CPU.\n")
    print(f"{'dog vdi ...':24}{'command':>12}{'its CPU':>12}{'servers':>12}{'C':>8}{'C CPU':>8}")
    names = [f"v{number}" for number in range(ROUNDS)]
    show("create", commands(cluster, [("vdi", "create", name, "4G") for name in names]))
    for name in names:
        cluster.dog("vdi", "write", name, "0", str(MIB), stdin=os.urandom(MIB))
    show("snapshot", commands(cluster, [("vdi", "snapshot", "-s", "t", name) for name in names]))
    show("clone", commands(cluster, [("vdi", "clone", "-s", "t", name, f"c{name}") for name in names]))
    show("delete", commands(cluster, [("vdi", "delete", f"c{name}") for name in names]))
    show("node list", commands(cluster, [("node", "list")] * ROUNDS))
    for number in range(len(cluster.dog("vdi", "list", "-r").splitlines()), MANY):
        cluster.dog("vdi", "create", f"many{number}", "4G")
    show("list", commands(cluster, [("vdi", "list")] * LIST_ROUNDS))
    show("list NAME", commands(cluster, [("vdi", "list", "v0")] * LIST_ROUNDS))
    show("create (of 1,001)", commands(cluster, [("vdi", "create", f"one{number}", "4G") for number in range(ROUNDS)]))
    one = [("vdi", "snapshot", "-s", f"s{number}", "many999") for number in range(MANY)]
    show("snapshot, first 20", commands(cluster, one[:ROUNDS]))
    for words in one[ROUNDS:-ROUNDS]:
        cluster.dog(*words)
    show("snapshot, last 20", commands(cluster, one[-ROUNDS:]))
    show("list, 1,000 snapshots", commands(cluster, [("vdi", "list", "many999")] * LIST_ROUNDS))
    print(f"\nAllowed: {COMMAND_LIMIT_MS} ms for a command, {LIST_LIMIT_MS} ms for a list of {MANY:,} volumes")


def stream(cluster: Cluster) -> None:
    """Bytes of a volume whose every object has changed: write, read, backup and restore, from and to files."""
    data, saved = cluster.directory / "data", cluster.directory / "saved"
    data.write_bytes(os.urandom(STREAM_BYTES))
    for name in ("stream", "other", "piped"):
        cluster.dog("vdi", "create", name, str(STREAM_BYTES))
        cluster.dog("vdi", "snapshot", "-s", "old", name)
    show_stream(cluster, "write", f"vdi write stream 0 {STREAM_BYTES} < {data}")
    show_stream(cluster, "read", f"vdi read stream > {saved}")
    cluster.dog("vdi", "snapshot", "-s", "new", "stream")
    show_stream(cluster, "backup", f"vdi backup -F old -s new stream > {saved}")
    show_stream(cluster, "restore", f"vdi restore -s old other < {saved}")
    show_stream(cluster, "restore from a pipe", f"vdi restore -s old piped < {saved}", pipe=True)
    print(f"Wanted: {STREAM_LIMIT_MB} MB/s of changed data in a backup and in a restore\n")
    data.unlink()
    saved.unlink()


def show_stream(cluster: Cluster, title: str, words: str, pipe: bool = False) -> None:
    """MB/s and CPU seconds for each GB of one command line for the shell."""
    noun, verb, rest = words.split(maxsplit=2)
    command = f"{BIN / 'dog'} {noun} {verb} -p {cluster.port(0)} {rest}"
    if pipe:
        command, _, source = command.rpartition(" < ")
        command = f"cat {source} | {command}"
    before, own = cpu_seconds(cluster), resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    run(["sh", "-c", command], seconds=300)
    seconds = time.monotonic() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    gigabytes = STREAM_BYTES / 1e9
    user, system = (after.ru_utime - own.ru_utime) / gigabytes, (after.ru_stime - own.ru_stime) / gigabytes
    servers = (cpu_seconds(cluster) - before) / gigabytes
    rate = 1000 * gigabytes / seconds
    print(f"{title:24}{rate:>6.0f} MB/s; CPU s/GB: dog {user:.2f} + {system:.2f}, servers {servers:.2f}", flush=True)

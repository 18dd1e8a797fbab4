"""`make bench ARGS=--administration`: what `dog` costs, the whole command and the work of the servers.

Beside it C Sheepdog's figures: the whole command, and the CPU time of its three servers where it was measured.
"""

from __future__ import annotations

import mmap
import os
import resource
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.support.cluster import Cluster
from tests.support.processes import BIN, run

from sheepdog.cluster.client import admin
from sheepdog.cluster.client.connection import Connection

Row = dict[str, Any]
TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK")
MIB = 1 << 20
MANY = 1000
COMMAND_LIMIT_MS = 150  # of a whole command, interpreter and all
LIST_LIMIT_MS = 300  # of 1,000 volumes
SERVER_PART = 5  # of what C's servers take, one part in so many is allowed
STREAM_LIMIT_MB = 300  # of changed data per second, in a backup and in a restore
ROUNDS = 20
LIST_ROUNDS = 5
STREAM_BYTES = 256 * MIB  # moved before the host takes back the memory that was touched for it: some 2 s
STREAM_ROUNDS = 3
SETTLE_ROUNDS, SETTLED_CPU_S = 30, 0.02
COPIES, SPARE_BYTES = 3, 768 * MIB
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


def settle(cluster: Cluster) -> None:
    """Waits, for a while at most, until the servers have done with what came before: checkpoints, reclaiming."""
    for _ in range(SETTLE_ROUNDS):
        before = cpu_seconds(cluster)
        time.sleep(1)
        if cpu_seconds(cluster) - before <= SETTLED_CPU_S:
            return


def show(name: str, measured: tuple[float, float, float]) -> Row:
    """Prints, and returns, the figures of one command."""
    command, own, servers = measured
    c_command = f"{C_COMMAND_MS[name]:>8.0f}" if name in C_COMMAND_MS else f"{'-':>8}"
    c_cpu = f"{C_CPU_MS[name]:>8.0f}" if name in C_CPU_MS else f"{'-':>8}"
    print(f"{name:24}{command:>12.0f}{own:>12.0f}{servers:>12.1f}{c_command}{c_cpu}", flush=True)
    return {"name": f"dog vdi {name}", "milliseconds": command, "cpu_ms": own, "servers_cpu_ms": servers}


def measure(cluster: Cluster, only: str = "") -> list[Row]:
    """All of it, or what `only` names: the streams or the commands alone."""
    rows = stream(cluster) if only != "commands" else []
    return rows if only == "stream" else rows + whole_commands(cluster)


def whole_commands(cluster: Cluster) -> list[Row]:
    """Commands that move no bulk, from start to exit."""
    rows = []
    print("Administration, three nodes, three copies, -n; ms: medians of whole commands, means of CPU.\n")
    print(f"{'dog vdi ...':24}{'command':>12}{'its CPU':>12}{'servers':>12}{'C':>8}{'C CPU':>8}")
    names = [f"v{number}" for number in range(ROUNDS)]
    rows.append(show("create", commands(cluster, [("vdi", "create", name, "4G") for name in names])))
    for name in names:
        cluster.dog("vdi", "write", name, "0", str(MIB), stdin=os.urandom(MIB))
    rows.append(show("snapshot", commands(cluster, [("vdi", "snapshot", "-s", "t", name) for name in names])))
    rows.append(show("clone", commands(cluster, [("vdi", "clone", "-s", "t", name, f"c{name}") for name in names])))
    rows.append(show("delete", commands(cluster, [("vdi", "delete", f"c{name}") for name in names])))
    rows.append(show("node list", commands(cluster, [("node", "list")] * ROUNDS)))
    connection = Connection(("127.0.0.1", cluster.port(0)))
    for number in range(len(cluster.dog("vdi", "list", "-r").splitlines()), MANY):
        admin.new_volume(connection, b"many%d" % number, 4 << 30)
    settle(cluster)
    rows.append(show("list", commands(cluster, [("vdi", "list")] * LIST_ROUNDS)))
    rows.append(show("list NAME", commands(cluster, [("vdi", "list", "v0")] * LIST_ROUNDS)))
    more = [("vdi", "create", f"one{number}", "4G") for number in range(ROUNDS)]
    rows.append(show("create (of 1,001)", commands(cluster, more)))
    one = [("vdi", "snapshot", "-s", f"s{number}", "many999") for number in range(2 * ROUNDS)]
    rows.append(show("snapshot, first 20", commands(cluster, one[:ROUNDS])))
    vid = admin.find(connection, b"many999").vid
    for _ in range(MANY - 2 * ROUNDS):
        vid = admin.new_volume(connection, b"many999", 4 << 30, vid, True).vid
    settle(cluster)
    rows.append(show("snapshot, last 20", commands(cluster, one[ROUNDS:])))
    rows.append(show("list, 1,000 snapshots", commands(cluster, [("vdi", "list", "many999")] * LIST_ROUNDS)))
    connection.close()
    print(f"\nAllowed: {COMMAND_LIMIT_MS} ms for a command, {LIST_LIMIT_MS} ms for a list of {MANY:,} volumes")
    print(f"and {C_CPU_MS['create'] / SERVER_PART:.1f} ms CPU of the servers for a create")
    return rows


def stream(cluster: Cluster) -> list[Row]:
    """Bytes of a volume whose every object has changed: write, read, backup and restore, from and to files."""
    data, saved = cluster.directory / "data", cluster.directory / "saved"
    data.write_bytes(os.urandom(STREAM_BYTES))
    rounds = [f"{kind}{number}" for kind in ("file", "pipe", "single") for number in range(STREAM_ROUNDS)]
    for name in ("stream", *rounds):
        copies = ("-c", "1") if name.startswith("single") else ()
        cluster.dog("vdi", "create", *copies, name, str(STREAM_BYTES))
        cluster.dog("vdi", "snapshot", "-s", "old", name)
    rows = [
        show_plain(cluster, "dd, three new files", data, at_hand=False),
        show_plain(cluster, "dd, memory at hand", data, at_hand=True),
        show_streams(cluster, "write", f"vdi write stream 0 {STREAM_BYTES} < {data}"),
        show_streams(cluster, "read", f"vdi read stream > {saved}"),
    ]
    cluster.dog("vdi", "snapshot", "-s", "new", "stream")
    rows += [
        show_streams(cluster, "backup", f"vdi backup -F old -s new stream > {saved}"),
        show_streams(cluster, "restore", f"vdi restore -s old file{{}} < {saved}"),
        show_streams(cluster, "restore from a pipe", f"vdi restore -s old pipe{{}} < {saved}", pipe=True),
        show_streams(cluster, "restore, one copy", f"vdi restore -s old single{{}} < {saved}"),
    ]
    print(f"Wanted: {STREAM_LIMIT_MB} MB/s of changed data in a backup and in a restore\n")
    data.unlink()
    saved.unlink()
    return rows


def show_plain(cluster: Cluster, title: str, data: Path, at_hand: bool) -> Row:
    """What the machine needs for the three files alone: nothing that stores three copies of the data is faster."""
    copies = [cluster.directory / f"plain{number}" for number in range(COPIES)]
    writers = " ".join(f"dd if={data} of={copy} bs=4M status=none &" for copy in copies)
    rate, user, system, _ = streamed(cluster, f"{writers} wait", at_hand)
    print(f"{title:24}{rate:>6.0f} MB/s; CPU s/GB: {user:.2f} + {system:.2f}", flush=True)
    for copy in copies:
        copy.unlink()
    return {"name": title, "megabytes_per_second": rate, "cpu_s_per_gigabyte": user + system}


def touch_memory(size: int) -> None:
    """Makes the host give so much memory, and frees it again."""
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        for place in range(0, size, mmap.PAGESIZE):
            memory[place] = 1


def show_streams(cluster: Cluster, title: str, words: str, pipe: bool = False) -> Row:
    """MB/s and CPU seconds for each GB of a command line for the shell, "{}" in it being the round: the middle one."""
    noun, verb, rest = words.split(maxsplit=2)
    command = f"{BIN / 'dog'} {noun} {verb} -p {cluster.port(0)} {rest}"
    if pipe:
        command, _, source = command.rpartition(" < ")
        command = f"cat {source} | {command}"
    found = sorted(streamed(cluster, command.format(number)) for number in range(STREAM_ROUNDS))
    rate, user, system, servers = found[len(found) // 2]
    print(f"{title:24}{rate:>6.0f} MB/s; CPU s/GB: dog {user:.2f} + {system:.2f}, servers {servers:.2f}", flush=True)
    own = user + system
    return {
        "name": title,
        "megabytes_per_second": rate,
        "cpu_s_per_gigabyte": own,
        "servers_cpu_s_per_gigabyte": servers,
    }


def streamed(cluster: Cluster, command: str, at_hand: bool = True) -> tuple[float, float, float, float]:
    """(MB/s, its own user and system CPU seconds for a GB, those of all servers) of a command that moves STREAM_BYTES.

    What commands before it have left to be written to the disk is not its business. Nor is (`at_hand`) that a virtual
    machine whose free memory goes back to the host pays for the first touch of every page.
    """
    os.sync()
    if at_hand:
        touch_memory(COPIES * STREAM_BYTES + SPARE_BYTES)
    before, own = cpu_seconds(cluster), resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    run(["sh", "-c", command], seconds=300)
    seconds = time.monotonic() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    gigabytes = STREAM_BYTES / 1e9
    user, system = (after.ru_utime - own.ru_utime) / gigabytes, (after.ru_stime - own.ru_stime) / gigabytes
    return 1000 * gigabytes / seconds, user, system, (cpu_seconds(cluster) - before) / gigabytes

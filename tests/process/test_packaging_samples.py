"""The samples under packaging/, with the test's addresses and directories in the place of theirs, make a cluster."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.support import native
from tests.support.machines import Machines
from tests.support.processes import BIN, environment, wait_until

PACKAGING = Path(__file__).parents[2] / "packaging"
SAMPLE_ADDRESSES = ("192.0.2.11", "192.0.2.12", "192.0.2.13")
MACHINES = len(SAMPLE_ADDRESSES)
JOIN_SECONDS = 60.0


def adapted(sample: Path, addresses: Sequence[str], directory: Path) -> str:
    """The sample with our addresses and directories; what it says of the protocol stays."""
    text = sample.read_text()
    for old, new in zip(SAMPLE_ADDRESSES, addresses, strict=True):
        assert old in text
        text = text.replace(old, new)
    return text.replace("/var/lib/zookeeper", f"{directory}/data").replace("/var/lib/sheepdog", str(directory))


def unit(section: str) -> dict[str, str]:
    """A section of sheep.service."""
    text = (PACKAGING / "systemd" / "sheep.service").read_text()
    body = re.split(r"^\[", text, flags=re.MULTILINE)
    lines = next(part for part in body if part.startswith(f"{section}]")).splitlines()[1:]
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def options(addresses: Sequence[str], engine: str) -> list[str]:
    """SHEEP_OPTIONS of the sample for an engine."""
    text = adapted(PACKAGING / "systemd" / "sheep.default", addresses, Path())
    found = [line for line in text.splitlines() if re.match(r"#?SHEEP_OPTIONS=", line) and f"-c {engine}" in line]
    assert len(found) == 1
    return shlex.split(found[0].partition("=")[2])[0].split()


@pytest.mark.parametrize("engine", ["corosync", "zookeeper"])
def test_three_machines_from_the_samples(engine: str, directory: Path, teardown: ExitStack) -> None:
    machines = Machines(engine, directory)
    teardown.callback(machines.close)
    addresses = machines.network.addresses
    for member in machines.members:
        if engine == "corosync":
            conf = adapted(PACKAGING / "corosync" / "corosync.conf", addresses, member.directory)
            state = f"system {{\n state_dir: {member.directory}/state\n sched_rr: no\n move_to_cgroup: no\n}}\n"
            (member.directory / "corosync.conf").write_text(conf + state)
        else:
            conf = adapted(PACKAGING / "zookeeper" / "zoo.cfg", addresses, member.directory)
            # The four-letter words are how the test knows that it talks to its own server.
            (member.directory / "zoo.cfg").write_text(conf + "4lw.commands.whitelist=*\nadmin.enableServer=false\n")
    machines.start_engine()

    command = unit("Service")["ExecStart"]
    processes: list[subprocess.Popen[bytes]] = []

    def end() -> None:
        for process in processes:
            process.kill()
            process.wait(10)

    teardown.callback(end)
    for node in range(MACHINES):
        words: list[str] = []
        for word in command.split():
            if word == "$SHEEP_STORE":
                words.append(str(machines.store(node)))
            elif word == "$SHEEP_OPTIONS":
                words += [*options(addresses, engine), "-z", str(node)]
            else:
                words.append(word)
        assert words[0] == "/usr/bin/sheep" and shutil.which("sheep", path=str(BIN)) is not None
        words[0] = str(BIN / "sheep")
        processes.append(
            subprocess.Popen([*machines.network.nodes[node].enter, *words], stdin=subprocess.DEVNULL, env=environment())
        )
    sockets = [machines.socket(node) for node in range(MACHINES)]
    wait_until(
        lambda: all(native.member_count(socket) == MACHINES for socket in sockets), JOIN_SECONDS, "all are members"
    )
    machines.format()
    listed = machines.dog("node", "list", "-r", node=1)
    assert all(f"{address}:7000" in listed for address in addresses)
    assert machines.pids(0) and f"sheep {machines.store(0)} -f" in " ".join(processes[0].args)  # type: ignore[arg-type]
    processes[2].send_signal(signal.SIGTERM)
    assert processes[2].wait(30) == 0, "an orderly end: systemd does not start it again"
    machines.wait_members(2, [0, 1])
    machines.dog("cluster", "shutdown")
    assert [process.wait(30) for process in processes[:2]] == [0, 0]


def test_the_unit_does_what_the_documentation_says() -> None:
    service = unit("Service")
    assert service["Restart"] == "on-failure"
    assert service["EnvironmentFile"] == "/etc/default/sheep"
    assert unit("Unit")["StartLimitIntervalSec"] == "0"
    words = service["ExecStart"].split()
    assert words[:3] == ["/usr/bin/sheep", "$SHEEP_STORE", "-f"], "cli.md 1.6: tools look for `sheep PATH `"

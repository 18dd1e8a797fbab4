"""A real daemon as its surroundings see it: command line, directories, pid file, logs and their rotation, signals."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.support import needs
from tests.support.cluster import RUNNING, WAIT_FOR_JOIN, Cluster
from tests.support.netns import NetworkNamespace
from tests.support.processes import BIN, alive, environment, run, wait_until

from sheepdog.cluster.drivers import registry

WAIT_S = 30.0
SERVER_LINE = re.compile(r"[A-Z][a-z]{2} \d\d \d\d:\d\d:\d\d [ A-Z]{6} \[[^]]+\] [\w<>]+\(\d+\) .*")
DEFAULT_LINE = re.compile(r"[ A-Z]{6} \[[^]]+\] [\w<>]+\(\d+\) .*")
STARTED, ENDED = "sheepdog daemon (version ", "shutdown"


@pytest.fixture
def single(new_cluster: Callable[..., Cluster]) -> Cluster:
    """One node, not started."""
    return new_cluster(1)


def messages(log: Path) -> str:
    return log.read_text() if log.exists() else ""


def holds(log: Path, part: str) -> Callable[[], bool]:
    return lambda: part in messages(log)


def test_a_daemon_from_its_start_to_its_end(single: Cluster, directory: Path) -> None:
    store, pid_file = single.store(0), directory / "pid"
    began = run(single.command(0, ["-P", str(pid_file)]))
    assert (began.stdout, began.stderr) == (b"", b"")
    single.wait_members(1)

    (pid,) = single.pids(0)  # one process, and no helper beside it
    assert pid_file.read_text() == f"{pid}\n"
    assert pid_file.stat().st_mode & 0o777 == 0o600
    with pid_file.open("r+") as held, pytest.raises(BlockingIOError):
        fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert run(["pgrep", "-f", f"{BIN}/sheep {store} "]).stdout.split() == [str(pid).encode()]
    assert os.readlink(f"/proc/{pid}/cwd") == str(store)
    assert [os.readlink(f"/proc/{pid}/fd/{number}") for number in range(3)] == ["/dev/null"] * 3
    assert os.getsid(pid) not in (pid, os.getsid(0))

    assert store.stat().st_mode & 0o777 == 0o750
    single.format("-c", "1")
    assert {"epoch", "lock", "obj", "sheep.log", "sock"} <= {entry.name for entry in store.iterdir()}
    assert [entry.name for entry in (store / "epoch").iterdir()] == ["00000001"]
    assert (store / "obj" / ".stale").is_dir()
    single.dog("vdi", "create", "a", "1M")
    assert list(single.objects(0)) == ["8001ec8c00000000"]

    second = run([*single.command(0), "-f"], check=False)
    assert (second.returncode, second.stdout) == (1, b"")
    assert second.stderr.decode() == f"another sheep daemon is using {store}\nlocking directory: {store} failed\n"

    single.kill(0, signal.SIGTERM)
    assert not pid_file.exists()
    assert not (store / "sock").exists()
    lines = messages(single.log(0)).splitlines()
    assert all(map(SERVER_LINE.fullmatch, lines)), lines
    assert not any(" select(" in line for line in lines), "the loop is no origin: it was somebody that it called"
    assert STARTED in lines[0] and lines[-1].endswith(f") {ENDED}")


def test_rotation_while_clients_write(single: Cluster, directory: Path) -> None:
    log = single.log(0)
    single.start()
    single.wait_members(1)
    single.format("-c", "1")
    single.dog("vdi", "create", "a", "64M")
    (pid,) = single.pids(0)
    port = str(single.port(0))
    writer = subprocess.Popen(
        [BIN / "dog", "vdi", "write", "-p", port, "a"], stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    assert writer.stdin is not None
    for number in range(8):
        old = log.rename(directory / f"sheep.log.{number}")
        writer.stdin.write(os.urandom(8 << 20))
        os.kill(pid, signal.SIGHUP)
        wait_until(log.exists, WAIT_S, "a new log")
        size = old.stat().st_size
        single.dog("node", "log", "level", "set", "debug")
        single.dog("node", "log", "level", "set", "info")
        assert old.stat().st_size == size, "nothing is written to a log that was taken away"
    _, errors = writer.communicate(timeout=WAIT_S)
    assert (writer.returncode, errors) == (0, b"")
    single.kill(0, signal.SIGTERM)
    assert messages(log).rstrip().endswith(ENDED)


@pytest.mark.parametrize("options", [[], ["-f"]], ids=["daemon", "foreground"])
def test_a_busy_port_is_told(single: Cluster, options: list[str]) -> None:
    with socket.create_server(("", single.port(0))):
        told = run([*single.command(0), *options], check=False)
    where = f"any address port {single.port(0)}"
    said = f"cannot listen on {where}: Address already in use; another program, or sheep, has it"
    assert (told.returncode, told.stderr.decode()) == (1, f"{said}\n")
    assert said in messages(single.log(0))
    assert not single.pids(0)


def test_why_a_daemon_cannot_be_is_told(new_cluster: Callable[..., Cluster], directory: Path) -> None:
    """No way to the pid file; a store of another cluster; a strategy of virtual nodes that is not the cluster's."""
    cluster = new_cluster(2)
    nowhere = f"{directory}/no/where"
    assert cluster.start_fails(0, ["-P", nowhere]).startswith(f"cannot create the pid file {nowhere} (No such file")
    own, cluster.driver = cluster.driver, f"local:{directory}/elsewhere"
    cluster.start(1)
    cluster.dog("cluster", "format", "-c", "1", node=1)
    cluster.kill(1, signal.SIGTERM)
    cluster.driver = own
    cluster.start(0)
    cluster.format("-c", "1")
    assert cluster.start_fails(1).startswith("failed to join Sheepdog: its store belongs to another cluster")
    shutil.rmtree(cluster.store(1))
    assert "its vnodes are fixed" in cluster.start_fails(1, ["-V", "64"])


@pytest.mark.parametrize("options", [[], ["-f"]], ids=["daemon", "foreground"])
def test_a_disk_without_room_is_one_line(single: Cluster, options: list[str]) -> None:
    needs.root()
    single.store(0).mkdir()
    run(["mount", "-t", "tmpfs", "-o", "size=100k", "none", single.store(0)])
    try:
        told = run([*single.command(0), *options], check=False)
    finally:
        run(["umount", single.store(0)])
    assert (told.returncode, told.stderr.decode()) == (1, f"{single.store(0)}: No space left on device\n")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_place_for_other_files(single: Cluster, closed: str) -> None:
    """The lock would be lost, or the log go into it."""
    run(["sh", "-c", f'exec "$@" {closed}', "sh", *single.command(0)])
    (pid,) = single.pids(0)
    assert [os.readlink(f"/proc/{pid}/fd/{number}") for number in range(3)] == ["/dev/null"] * 3
    assert "another sheep daemon is using" in run(single.command(0), check=False).stderr.decode()


@pytest.fixture
def busy_processors() -> Iterator[None]:
    with ExitStack() as ending:
        for _ in range(2 * len(os.sched_getaffinity(0))):
            spinning = subprocess.Popen(["sh", "-c", "while :; do :; done"])
            ending.callback(spinning.wait)
            ending.callback(spinning.kill)
        yield


@pytest.mark.usefixtures("busy_processors")
def test_a_sheep_can_be_asked_as_soon_as_its_command_returns(new_cluster: Callable[..., Cluster]) -> None:
    """It listens, and has joined: what it says is the cluster's word. Nothing here is waited for or tried again."""
    cluster = new_cluster(2)
    for number in range(3):  # alone: a new cluster, and one that starts again
        cluster.start(0)
        socket.create_connection(("127.0.0.1", cluster.port(0))).close()
        if not number:
            cluster.dog("cluster", "format", "-c", "1")
        cluster.dog("vdi", "create", f"alone{number}", "4M")
        if number < 2:
            cluster.kill(0, signal.SIGTERM)
    for number in range(3):  # beside another one
        cluster.start(1)
        socket.create_connection(("127.0.0.1", cluster.port(1))).close()
        assert len(cluster.dog("node", "list", "-r", node=1).splitlines()) == 2
        cluster.dog("vdi", "create", f"second{number}", "4M", node=1)
        cluster.kill(1, signal.SIGTERM)


def test_a_start_does_not_wait_for_the_other_members(new_cluster: Callable[..., Cluster]) -> None:
    """After a shutdown each node waits for all the others, its command does not; nor for one that hangs."""
    cluster = new_cluster(3)
    cluster.start()
    cluster.wait_members(3)
    cluster.format("-c", "1")
    cluster.dog("cluster", "shutdown")
    cluster.wait_stopped()
    for node in (0, 1):  # one that had waited in vain would say so
        assert run(cluster.command(node)).stderr == b""
    cluster.wait_status(WAIT_FOR_JOIN)
    for node in (0, 1):
        cluster.kill(node, signal.SIGSTOP)
    impatient = subprocess.Popen(cluster.command(2), stderr=subprocess.PIPE, env=environment())
    wait_until(lambda: messages(cluster.log(2)).count(STARTED) == 2, WAIT_S, "the second start of node 2")
    impatient.send_signal(signal.SIGINT)
    _, said = impatient.communicate(timeout=WAIT_S)
    assert impatient.returncode == 130
    assert said.startswith(b"interrupted: the daemon goes on by itself\n"), said
    cluster.kill(2)
    late = run(cluster.command(2))
    assert late.stderr.decode() == (f"sheep runs, but has not joined the cluster yet; {cluster.log(2)} may tell why\n")
    for node in (0, 1):
        cluster.kill(node, signal.SIGCONT)
    cluster.wait_status(RUNNING)


@pytest.mark.parametrize(("number", "style"), [(signal.SIGINT, "json"), (signal.SIGTERM, "default")])
def test_in_the_foreground(single: Cluster, number: signal.Signals, style: str) -> None:
    """dst=stdout implies -f; an orderly end has status 0."""
    command = [*single.command(0), "-l", f"dst=stdout,format={style}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    try:
        wait_until(lambda: bool(single.pids(0)), WAIT_S, "the daemon")
        single.wait_members(1)
        single.format("-c", "1")
        process.send_signal(number)
        out, err = process.communicate(timeout=WAIT_S)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, err) == (0, b"")
    lines = out.decode().splitlines()
    if style == "json":
        records = [json.loads(line) for line in lines]
        assert {tuple(record) for record in records} == {("time", "level", "thread", "function", "line", "message")}
        said = [record["message"] for record in records]
    else:
        assert all(map(DEFAULT_LINE.fullmatch, lines)), lines
        said = [line.partition(") ")[2] for line in lines]
    assert said[0].startswith(STARTED) and said[-1] == ENDED
    assert not single.log(0).exists()


def test_the_last_disk_gone_is_status_1_and_one_line(single: Cluster) -> None:
    process = subprocess.Popen([*single.command(0), "-f"], stderr=subprocess.DEVNULL, env=environment())
    try:
        wait_until(lambda: bool(single.pids(0)), WAIT_S, "the daemon")
        single.wait_members(1)
        single.format("-c", "1")
        shutil.rmtree(single.store(0) / "obj")
        assert process.wait(WAIT_S) == 1
    finally:
        process.kill()
        process.wait()
    lines = messages(single.log(0)).splitlines()
    (told,) = [line for line in lines if "leaving the cluster" in line]
    assert f"{single.store(0)}/obj is out of service: " in told
    assert lines[-1].endswith(ENDED)
    assert sum("-n: writes are acknowledged before they are on the disk" in line for line in lines) == 1


@pytest.fixture
def system_log(directory: Path) -> Iterator[socket.socket]:
    """Receives what is sent to /dev/log by those who see this directory's `dev` as /dev."""
    (directory / "dev").mkdir()
    for name in ("null", "zero", "urandom", "random"):
        status = os.stat(f"/dev/{name}")
        os.mknod(directory / "dev" / name, status.st_mode, status.st_rdev)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(directory / "dev" / "log"))
        sock.settimeout(WAIT_S)
        yield sock


def test_the_system_log(new_cluster: Callable[..., Cluster], directory: Path, system_log: socket.socket) -> None:
    needs.root()
    needs.program("unshare")
    inside = ["unshare", "--mount", "sh", "-c", f'mount --bind {directory}/dev /dev && exec "$@"', "sh"]
    cluster = new_cluster(1, prefix=inside, options=("-n", "-l", "dst=syslog"))
    cluster.start()
    cluster.wait_members(1)
    (pid,) = cluster.pids(0)
    cluster.kill(0, signal.SIGTERM)
    lines: list[str] = []
    while not lines or not lines[-1].endswith(f") {ENDED}"):
        lines.append(system_log.recv(65536).decode())
    shape = re.compile(rf"<(\d+)>[A-Z][a-z]{{2}} [ \d]\d \d\d:\d\d:\d\d sheep\[{pid}\]: *([A-Z]+) \[main\] .*")
    levels = {"INFO": 6, "NOTICE": 5, "WARN": 4}
    for line in lines:
        found = shape.fullmatch(line)
        assert found, line
        assert int(found[1]) == 3 * 8 + levels[found[2]], "facility daemon, and the level of the message"
    assert STARTED in lines[0]
    assert not cluster.log(0).exists()


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        (
            "zookeeper:127.0.0.1:9,timeout=1000",
            b"zookeeper driver: 127.0.0.1:9: no server of the ensemble can be reached",
        ),
        ("corosync", b"corosync driver: corosync does not run here\n"),
        ("zookeeper", b"zookeeper driver: the list of servers is missing"),
        ("other", b"Invalid cluster driver 'other'\n"),
    ],
)
@pytest.mark.parametrize("options", [[], ["-f"]])
def test_an_engine_that_is_not_there(
    private_network: NetworkNamespace, directory: Path, engine: str, said: bytes, options: list[str]
) -> None:
    """One line and status 1, also of one that would become a daemon."""
    name = engine.partition(":")[0]
    if name in registry.absent():
        pytest.skip(registry.absent()[name])
    done = run([*private_network.enter, BIN / "sheep", *options, "-c", engine, directory / "store"], check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(said)
    assert done.stderr.count(b"\n") == 1


def test_gateways_end_when_the_last_storing_node_leaves(new_cluster: Callable[..., Cluster]) -> None:
    cluster = new_cluster(2)
    with ExitStack() as ending:
        cluster.start(0)
        gateway = subprocess.Popen([*cluster.command(1, ["-g"]), "-f"], env=environment(), stderr=subprocess.DEVNULL)
        ending.callback(gateway.kill)
        # Until it runs it looks like one that has ended.
        wait_until(lambda: bool(cluster.pids(1)), WAIT_S, "the gateway's process")
        cluster.wait_members(2, (0, 1))
        cluster.format("-c", "1")
        assert [line.split()[2] for line in cluster.dog("node", "list", "-r").splitlines()] == ["128", "0"]
        cluster.kill(0, signal.SIGTERM)
        assert gateway.wait(WAIT_S) == 0
    assert "only gateway nodes are remaining, exiting" in messages(cluster.log(1))
    assert not any(map(alive, cluster.pids(1)))

"""`sheep` as installed, and the birth and end of a daemon as its surroundings see them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support import needs
from tests.support.netns import NetworkNamespace
from tests.support.processes import (
    BIN,
    alive,
    command_line,
    environment,
    having_argument,
    run,
    send_signal,
    wait_until,
)

from sheepdog.cluster.drivers.registry import available

WAIT_S = 20.0
LONG = "9" * 5000  # more digits than Python converts by itself

# A daemon with the life cycle of sheep and nothing else.
_DAEMON = r"""
import asyncio, os, sys, time
from pathlib import Path
from sheepdog.cluster.core.errors import UsageError
from sheepdog.cluster.host import lifecycle
from sheepdog.cluster.host.logs import Logs
from sheepdog.cluster.host.node_state import DirectoryLock
from sheepdog.cluster.host.options import parse

options = parse("sheep", sys.argv[1:], ("local",))
startup = lifecycle.Startup() if options.foreground else lifecycle.detach()
try:
    lock = DirectoryLock(options.metadata)
except UsageError as error:
    print(error, file=sys.stderr)
    sys.exit(1)
logs = Logs(options.log, options.metadata)
if options.upgrade:
    sys.exit("ended before it was ready")
startup.done(options.metadata)
print("nobody reads this", flush=True)
logs.write(6, f"daemon {os.getpid()} of session {os.getsid(0)} in {os.getcwd()} started")
try:
    pid_file = lifecycle.PidFile(options.pid_file) if options.pid_file else None
except UsageError as error:
    logs.write(3, str(error))
    sys.exit(1)

async def main():
    end = asyncio.Event()
    def terminate(name):
        logs.write(5, f"got {name}")
        end.set()
    lifecycle.handle_signals(asyncio.get_running_loop(), terminate, logs.reopen)
    logs.write(7, "waiting")
    await end.wait()

asyncio.run(main())
if pid_file:
    pid_file.remove()
logs.write(6, "shutdown")
logs.close()
"""


@pytest.fixture
def pids() -> Iterator[list[int]]:
    """Ended when the test is over, whatever happened."""
    found: list[int] = []
    yield found
    for pid in found:
        if alive(pid):
            send_signal(pid, signal.SIGKILL)


def start(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return run([sys.executable, "-c", _DAEMON, *arguments], check=False)


def text_of(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def logged(path: Path, part: str) -> Callable[[], bool]:
    return lambda: part in text_of(path)


def pid_from(log: Path) -> int:
    match = re.search(r"daemon (\d+) of session", text_of(log))
    assert match
    return int(match[1])


def test_the_installed_command_refuses_and_explains() -> None:
    wrong = run([BIN / "sheep", "-p", "none"], check=False)
    assert (wrong.returncode, wrong.stdout, wrong.stderr) == (1, b"", b"Invalid port number 'none'\n")
    driver = run([BIN / "sheep", "-c", "none"], check=False)
    assert (driver.returncode, driver.stderr) == (1, b"Invalid cluster driver 'none'\n")
    assert driver.stdout.startswith(b"\nSupported features:\n\tCluster drivers: ") and b" local" in driver.stdout
    missing = run([BIN / "sheep", "-j"], check=False)
    assert missing.returncode == 1 and b"requires an argument -- 'j'" in missing.stderr and b"size=" in missing.stdout
    unknown = run([BIN / "sheep", "--none"], check=False)
    assert unknown.stderr.decode().splitlines()[-1] == "Try 'sheep --help' for more information."
    help_text = run([BIN / "sheep", "--help"])
    assert help_text.stdout.startswith(b"Sheepdog daemon (version ") and help_text.stderr == b""
    assert run([BIN / "sheep", "-v"]).stdout.startswith(b"Sheepdog daemon version ")
    full = run(["sh", "-c", f"{BIN}/sheep --help > /dev/full"], check=False)
    assert (full.returncode, full.stderr) == (1, b"sheep: cannot write the output: No space left on device\n")
    poll = run(["env", "SHEEPDOG_BUSY_POLL_US=x", BIN / "sheep", "/proc/none"], check=False)
    assert (poll.returncode, poll.stderr.count(b"\n")) == (1, 1)
    assert poll.stderr.startswith(b"SHEEPDOG_BUSY_POLL_US='x' is not")
    long = run([BIN / "sheep", "-p", LONG], check=False)
    assert (long.returncode, long.stderr.decode()) == (1, f"Invalid port number '{LONG}'\n")


def test_an_engine_that_is_not_there_is_one_line(directory: Path, private_network: NetworkNamespace) -> None:
    """No daemon of corosync, no server of ZooKeeper: status 1, and nothing is left running."""
    needs.network_namespaces()
    expected = {
        "zookeeper": b"zookeeper driver: the list of servers is missing",
        "zookeeper:127.0.0.1:9": b"zookeeper driver: 127.0.0.1:9: no server of the ensemble can be reached",
        "corosync": b"corosync d",
    }
    for driver, text in expected.items():
        name = driver.partition(":")[0]
        if name not in available():
            text = f"Invalid cluster driver '{driver}': it needs ".encode()
        done = run([*private_network.enter, BIN / "sheep", directory / "store", "-f", "-c", driver], check=False)
        assert done.returncode == 1
        assert done.stderr.startswith(text) and done.stderr.count(b"\n") == 1, done.stderr
    assert not having_argument(str(directory / "store"))


def test_a_mistake_is_told_without_importing_anything_large() -> None:
    code = (
        "import sys; from sheepdog.cluster.host.main import main; main(['-p', 'x']); "
        "print([name for name in ('asyncio', 'logging', 'xxhash', 'click') if name in sys.modules])"
    )
    assert run([sys.executable, "-c", code]).stdout == b"[]\n"


def test_tools_find_a_daemon_by_executable_and_path(tmp_path: Path, pids: list[int]) -> None:
    """`pgrep -f "sheep /store/0 "`: shown as the interpreter, the script, the arguments as typed."""
    # The installed script with the daemon replaced by a sleep, so that only the command line is tested.
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import sys, time, types\n"
        "daemon = types.ModuleType('sheepdog.cluster.host.daemon')\n"
        "daemon.run = lambda options: time.sleep(60) or 0\n"
        "sys.modules[daemon.__name__] = daemon\n"
    )
    store = tmp_path / "store"
    process = subprocess.Popen(
        [BIN / "sheep", store, "-p", "7999", "-f"], env={**environment(), "PYTHONPATH": str(site)}
    )
    pids.append(process.pid)
    wait_until(lambda: len(command_line(process.pid)) == 6, WAIT_S, "the interpreter")
    found = run(["pgrep", "-f", f"{BIN}/sheep {store} "]).stdout.split()
    assert str(process.pid).encode() in found
    process.kill()
    process.wait()


def test_a_daemon_detaches_once_its_directory_is_locked(tmp_path: Path, pids: list[int]) -> None:
    store, pid_file = tmp_path / "store", tmp_path / "pid"
    log = store / "sheep.log"
    started = start(str(store), "-P", str(pid_file))
    assert (started.returncode, started.stdout, started.stderr) == (0, b"", b"")
    wait_until(logged(log, "started"), WAIT_S, "the log")
    pid = pid_from(log)
    pids.append(pid)
    wait_until(logged(pid_file, "\n"), WAIT_S, "the pid file")
    assert pid_file.read_text() == f"{pid}\n" and pid_file.stat().st_mode & 0o777 == 0o600
    assert os.getsid(pid) not in (pid, os.getsid(0))
    assert os.readlink(f"/proc/{pid}/cwd") == str(store)
    assert {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in range(3)} == {"/dev/null"}
    assert f"in {store} started" in log.read_text()

    second = start(str(store))
    assert second.returncode == 1
    assert second.stderr.decode() == (f"another sheep daemon is using {store}\nlocking directory: {store} failed\n")

    third = start(str(tmp_path / "other"), "-P", str(pid_file))  # a busy pid file shows in the log only
    assert third.returncode == 0
    wait_until(logged(tmp_path / "other" / "sheep.log", "is in use by another process"), WAIT_S, "the refusal")
    assert pid_file.read_text() == f"{pid}\n"

    os.kill(pid, signal.SIGTERM)
    wait_until(logged(log, "shutdown"), WAIT_S, "the orderly end")
    wait_until(lambda: not alive(pid), WAIT_S, "the end of the process")
    assert not pid_file.exists()
    lines = log.read_text().splitlines()
    assert re.fullmatch(r"[A-Z][a-z]{2} \d\d \d\d:\d\d:\d\d   INFO \[main\] <module>\(\d+\) shutdown", lines[-1])
    assert re.search(r" NOTICE \[main\] terminate\(\d+\) got SIGTERM$", lines[-2])
    assert "waiting" not in log.read_text()  # debug


def test_a_daemon_that_ends_early_fails_its_start(tmp_path: Path) -> None:
    ended = start(str(tmp_path / "store"), "-u")
    assert (ended.returncode, ended.stderr) == (1, b"ended before it was ready\n")
    nowhere = start(str(tmp_path / "no" / "where"))
    assert nowhere.returncode == 1
    assert nowhere.stderr.decode() == f"cannot create the directory {tmp_path}/no/where (No such file or directory)\n"


def test_the_start_does_not_wait_for_the_daemons_end(tmp_path: Path, pids: list[int]) -> None:
    """Also when its output is a pipe that the daemon inherited."""
    began = time.monotonic()
    assert start(str(tmp_path / "store")).returncode == 0
    assert time.monotonic() - began < WAIT_S / 2
    wait_until(logged(tmp_path / "store" / "sheep.log", "started"), WAIT_S, "the log")
    pids.append(pid_from(tmp_path / "store" / "sheep.log"))


def test_rotation_and_levels(tmp_path: Path, pids: list[int]) -> None:
    log = tmp_path / "sheep.log"
    start(str(tmp_path / "store"), "-l", f"dir={tmp_path},level=debug,format=json")
    wait_until(logged(log, "waiting"), WAIT_S, "the log")
    pids.append(pid_from(log))
    log.rename(tmp_path / "sheep.log.1")
    os.kill(pids[0], signal.SIGHUP)
    wait_until(log.exists, WAIT_S, "the new log")
    os.kill(pids[0], signal.SIGTERM)
    wait_until(logged(log, '"message": "shutdown"'), WAIT_S, "the orderly end")
    assert "shutdown" not in (tmp_path / "sheep.log.1").read_text()
    assert not (tmp_path / "store" / "sheep.log").exists()


def test_interrupted_in_the_foreground(tmp_path: Path, pids: list[int]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _DAEMON, str(tmp_path / "store"), "-l", "dst=stdout,level=debug,format=default"],
        stdout=subprocess.PIPE,
        env=environment(),
        start_new_session=True,
    )
    pids.append(process.pid)
    assert process.stdout is not None
    for line in process.stdout:
        if b"waiting" in line:
            break
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read().decode().splitlines()
    assert [line.rpartition(") ")[2] for line in rest] == ["got SIGINT", "shutdown"]
    assert re.match(r"  INFO \[main\] <module>\(\d+\) ", rest[1])
    assert process.wait(WAIT_S) == 0
    process.stdout.close()

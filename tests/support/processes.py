"""Processes that a test starts: found again by their command line, ended by their id, never by a name."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

BIN = Path(sys.executable).parent  # not resolved: a virtual environment's python is a link
COMMAND_SECONDS = 120.0  # no command of a test takes longer on a loaded two-core machine
END_SECONDS = 20.0  # from SIGTERM to SIGKILL


class CommandFailed(AssertionError):
    """A command ended otherwise than the test expects; the text shows both of its outputs."""


def environment() -> dict[str, str]:
    """The test's own environment, without what would change how the programs under test behave."""
    dropped = ("SHEEPDOG_", "PYTHONDONTWRITEBYTECODE", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    kept["PATH"] = f"{BIN}:{kept.get('PATH', '')}:/usr/sbin:/sbin"
    kept["LC_ALL"] = "C"
    return kept


def run(
    command: Sequence[str | os.PathLike[str]],
    *,
    check: bool = True,
    stdin: bytes = b"",
    seconds: float = COMMAND_SECONDS,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Runs to the end and keeps both outputs; with `check` any exit status but 0 raises CommandFailed."""
    argv = [os.fspath(part) for part in command]
    try:
        done = subprocess.run(
            argv, input=stdin, capture_output=True, timeout=seconds, env=environment(), cwd=cwd, check=False
        )
    except subprocess.TimeoutExpired as late:
        raise CommandFailed(f"{' '.join(argv)}: no end within {seconds:.0f} s\n{shown(late.stderr)}") from late
    if check and done.returncode != 0:
        raise CommandFailed(
            f"{' '.join(argv)}: exit status {done.returncode}\n{shown(done.stdout)}\n{shown(done.stderr)}"
        )
    return done


def which(name: str) -> str | None:
    """The path of a program, also where Debian keeps the administrators' ones."""
    return shutil.which(name, path=environment()["PATH"])


def shown(output: bytes | None) -> str:
    return (output or b"").decode(errors="replace")[-4000:]


def wait_until(condition: Callable[[], bool], seconds: float, what: str, step: float = 0.02) -> float:
    """Seconds until `condition` held; AssertionError naming `what` when it did not in time."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > seconds:
            raise AssertionError(f"{what}: not within {seconds:g} s")
        time.sleep(step)
    return time.monotonic() - start


def command_line(pid: int) -> list[str]:
    """Arguments of a process; empty when it is gone or a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def having_argument(argument: str) -> list[int]:
    """Ids of the living processes with exactly this argument: a directory that only one test has."""
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [pid for pid in pids if pid != os.getpid() and argument in command_line(pid)]


def readable(handle: int | socket.socket) -> bool:
    """Whether there is something to read now; by poll, since select knows only the first 1,024 descriptors."""
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return bool(poll.poll(0))


def alive(pid: int) -> bool:
    """Whether any of the process is left: a dying one loses its command line before its files are closed."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        return not readable(handle)
    finally:
        os.close(handle)


def wait_ended(pids: Sequence[int], seconds: float = END_SECONDS, what: str = "") -> None:
    """Until nothing is left of these processes."""
    wait_until(lambda: not any(map(alive, pids)), seconds, f"end of {what or f'processes {list(pids)}'}")


def send_signal(pid: int, number: signal.Signals) -> None:
    """Signals a process that may be gone already."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def end(pids: Sequence[int]) -> None:
    """SIGTERM, then SIGKILL after END_SECONDS; returns when all are gone."""
    for pid in pids:
        send_signal(pid, signal.SIGCONT)
        send_signal(pid, signal.SIGTERM)
    deadline = time.monotonic() + END_SECONDS
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    for pid in pids:
        if alive(pid):
            send_signal(pid, signal.SIGKILL)
    wait_ended(pids)


def resident_bytes(pid: int) -> int:
    """What a process has in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def locked_bytes(pid: int) -> int:
    """Memory of a process that cannot be taken from it."""
    maps = Path(f"/proc/{pid}/smaps").read_text()
    return sum(int(kib) << 10 for kib in re.findall(r"^Locked: +(\d+) kB$", maps, re.MULTILINE))

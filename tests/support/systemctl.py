"""systemctl for a machine without systemd: the few orders of docs/operations.md, obeyed as the unit files say.

A supervisor for each unit starts its command, starts it again when `Restart=on-failure` wants that, and ends it with
SIGTERM. It stands in /usr/local/bin of the machines of tests.support.hosts. Nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PLACES = [Path("/etc/systemd/system"), Path("/lib/systemd/system")]
STATE = Path("/run/systemctl")
SECONDS = 40.0  # for a start that tells when it is done, and for an end
# Debian's zookeeperd has a start script instead of a unit, which needs more of a system than is here.
SCRIPTS = {"zookeeper": "[Service]\nType=exec\nExecStart=/usr/share/zookeeper/bin/zkServer.sh start-foreground\n"}


def service(unit: str) -> dict[str, str]:
    """The [Service] section."""
    files = [place / f"{unit}.service" for place in PLACES if (place / f"{unit}.service").exists()]
    text = files[0].read_text() if files else SCRIPTS[unit]
    body = next(part for part in re.split(r"^\[", text, flags=re.MULTILINE) if part.startswith("Service]"))
    return dict(line.split("=", 1) for line in body.splitlines()[1:] if "=" in line and not line.startswith("#"))


def command(values: dict[str, str]) -> list[str]:
    """ExecStart with the variables of EnvironmentFile, one word or several for each."""
    variables: dict[str, str] = {}
    file = Path(values.get("EnvironmentFile", "").removeprefix("-"))
    if file.is_file():
        for line in file.read_text().splitlines():
            if "=" in line and not line.startswith("#"):
                name, _, value = line.partition("=")
                variables[name] = "".join(shlex.split(value))
    words: list[str] = []
    for word in values["ExecStart"].split():
        words += variables.get(word[1:], "").split() if word.startswith("$") else [word]
    return words


def supervise(unit: str, values: dict[str, str]) -> None:
    """Until the command ends for good, or SIGTERM."""
    words = command(values)
    ended = False
    child: subprocess.Popen[bytes] | None = None

    def end(*_: object) -> None:
        nonlocal ended
        ended = True
        if child is not None:
            child.terminate()

    signal.signal(signal.SIGTERM, end)
    while True:
        with open(f"/var/log/{unit}.out", "ab") as output:
            child = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd="/")
        if ended:  # in between
            child.terminate()
        if child.wait() == 0 or ended or values.get("Restart") != "on-failure":
            break
        time.sleep(float(values.get("RestartSec", "0.1")))


def start(unit: str) -> None:
    if running(unit):
        return
    values = service(unit)
    STATE.mkdir(exist_ok=True)
    ready = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    ready.settimeout(SECONDS)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(STATE / "notify")
    ready.bind(str(STATE / "notify"))
    pid = os.fork()
    if pid == 0:
        os.setsid()
        if values["Type"] == "notify":
            os.environ["NOTIFY_SOCKET"] = str(STATE / "notify")
        quiet = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(quiet, number)
        supervise(unit, values)
        os._exit(0)
    (STATE / unit).write_text(str(pid))
    while values["Type"] == "notify" and b"READY=1" not in ready.recv(4096):
        pass


def running(unit: str) -> int:
    """The supervisor's process id, or 0."""
    try:
        pid = int((STATE / unit).read_text())
        return pid if b"\0" in Path(f"/proc/{pid}/cmdline").read_bytes() else 0
    except OSError:
        return 0


def stop(unit: str) -> None:
    pid = running(unit)
    if pid:
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + SECONDS
    while running(unit):
        if time.monotonic() > deadline:
            sys.exit(f"{unit} does not end")
        time.sleep(0.05)


def main() -> None:
    match sys.argv[1:]:
        case ["daemon-reload"]:
            pass
        case ["start", unit] | ["enable", "--now", unit]:
            start(unit)
        case ["stop", unit] | ["disable", "--now", unit]:
            stop(unit)
        case ["restart", unit]:
            stop(unit)
            start(unit)
        case words:
            sys.exit(f"systemctl {' '.join(words)}: not known here")


if __name__ == "__main__":
    main()

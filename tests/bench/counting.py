"""What daemons have used: CPU time, memory, system calls."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Protocol

ATTACH_LIMIT_S = 20.0
_TICKS = os.sysconf("SC_CLK_TCK")
_ROW = re.compile(r"^\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)\s+(?:\d+\s+)?(\w+)$", re.M)
WAITING = frozenset(("restart_syscall", "futex"))  # of threads that have nothing to do


class Counted(Protocol):
    """What a run gives."""

    @property
    def operations(self) -> int: ...


def calls(work: Callable[[], None]) -> int:
    """Calls of functions of cluster/core while `work` is done; not those for numbers in bytes, which compiling ends."""
    counted = 0

    def count(frame: FrameType, event: str, _: object) -> None:
        nonlocal counted
        place = frame.f_code.co_filename
        if event == "call" and "/cluster/core/" in place and not place.endswith("/words.py"):
            counted += 1

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return counted


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of the processes so far, all their threads."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS


def system_calls(pids: list[int], run: Callable[[], Counted]) -> float:
    """System calls of these processes per operation of a run, counted by strace."""
    return sum(calls_by_name(pids, run).values())


def calls_by_name(pids: list[int], run: Callable[[], Counted]) -> dict[str, float]:
    """As `system_calls`, by the names of the calls; waiting threads' left out, and a daemon's that looks for work."""
    with tempfile.NamedTemporaryFile("r") as output:
        words = [word for pid in pids for word in ("-p", str(pid))]
        tracer = subprocess.Popen(["strace", "-f", "-c", "-o", output.name, *words], stderr=subprocess.DEVNULL)
        try:
            _wait_until_traced(pids, tracer)
            operations = run().operations
        finally:
            tracer.send_signal(signal.SIGINT)
            tracer.wait(ATTACH_LIMIT_S)
        counted: dict[str, float] = {}
        for count, name in _ROW.findall(Path(output.name).read_text()):
            if name not in WAITING and name != "total":
                counted[name] = counted.get(name, 0.0) + int(count) / operations
        # `host.turn.BusyPoll` offers the processor to others after each look that has found nothing.
        counted["epoll_wait"] = counted.get("epoll_wait", 0.0) - counted.pop("sched_yield", 0.0)
        return counted


def _wait_until_traced(pids: list[int], tracer: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + ATTACH_LIMIT_S
    for pid in pids:
        for status in Path(f"/proc/{pid}/task").glob("*/status"):
            while f"TracerPid:\t{tracer.pid}\n" not in status.read_text():
                if tracer.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"strace cannot trace {pid}")
                time.sleep(0.05)

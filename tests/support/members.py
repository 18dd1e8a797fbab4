"""Members of a membership engine, each in a process of its own: told what to do, they write down every event."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.support.processes import send_signal, wait_until

from sheepdog.cluster.core.ports import Delivery, Event, Leased, Lost, Peer, Suspended, View
from sheepdog.cluster.drivers import cpg, registry

WAIT_SECONDS = 40.0


class Member:
    """One attached process; `lines` are its events so far."""

    def __init__(self, directory: Path, driver: str, name: str, prefix: Sequence[str] = ()) -> None:
        self.name = name
        self.output = directory / f"{name}.{time.monotonic_ns()}.events"
        self.errors = self.output.with_suffix(".errors")
        with open(self.output, "wb") as stdout, open(self.errors, "wb") as stderr:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "tests.support.members", driver, name],
                stdin=subprocess.PIPE,
                stdout=stdout,
                stderr=stderr,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                cwd=Path(__file__).parents[2],
            )

    def lines(self) -> list[str]:
        return [line for line in self.output.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def ordered(self) -> list[str]:
        """The events that are the same on all members."""
        return [line for line in self.lines() if line.startswith(('["view"', '["message"'))]

    def others(self) -> list[str]:
        """Names of the events about this member's own attachment, leases left out."""
        names = [json.loads(line)[0] for line in self.lines() if not line.startswith(('["view"', '["message"'))]
        return [name for name in names if name not in ("leased", "refused")]

    def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command.encode() + b"\n")
        self.process.stdin.flush()

    def views(self) -> list[list[Any]]:
        """[sequence, members, joined, left, grace in s] of each; a peer is [name, incarnation, payload]."""
        return [json.loads(line)[1:] for line in self.lines() if line.startswith('["view"')]

    def members(self) -> list[str]:
        views = self.views()
        return [peer[0] for peer in views[-1][1]] if views else []

    def messages(self) -> list[str]:
        return [json.loads(line)[3] for line in self.lines() if line.startswith('["message"')]

    def leases(self) -> list[float]:
        """How far ahead each lease reached when it was given, in seconds."""
        return [json.loads(line)[1] for line in self.lines() if line.startswith('["leased"')]

    def refused(self) -> int:
        """How often corosync was too busy for a message, when it was last asked for by `tell("refused")`."""
        return max([json.loads(line)[1] for line in self.lines() if line.startswith('["refused"')], default=-1)

    def signal(self, number: signal.Signals) -> None:
        send_signal(self.process.pid, number)

    def since(self, newest: str) -> list[str]:
        """The ordered events from the view on in which `newest` joined."""
        lines = self.ordered()
        for index, line in enumerate(lines):
            if line.startswith('["view"') and newest in [peer[0] for peer in json.loads(line)[3]]:
                return lines[index:]
        return []

    def digest(self, newest: str) -> str:
        return hashlib.sha256("".join(self.since(newest)).encode()).hexdigest()


def agree(members: Sequence[Member]) -> bool:
    """Whether all saw the same events in the same order, from the time on when all were attached."""
    lines = [member.ordered() for member in members]
    start = max(json.loads(one[0])[1] for one in lines)
    return len({tuple(line for line in one if json.loads(line)[1] > start) for one in lines}) == 1


class Members:
    """Members of one engine. Call `close` in every case."""

    def __init__(self, directory: Path, driver: str) -> None:
        self.directory = directory
        self.driver = driver
        self.all: list[Member] = []

    def start(self, name: str, prefix: Sequence[str] = (), driver: str | None = None) -> Member:
        member = Member(self.directory, driver or self.driver, name, prefix)
        self.all.append(member)
        return member

    def together(self, *names: str) -> list[Member]:
        """Started one after the other, so that age is the order of names."""
        started: list[Member] = []
        for name in names:
            started.append(self.start(name))
            wait(lambda: started[-1].members() == list(names[: len(started)]), self)
        wait(lambda: all(member.members() == list(names) for member in started), self)
        return started

    def story(self) -> str:
        return "\n".join(
            f"--- {member.name}\n{''.join(member.lines())[-600:]}{member.errors.read_text()[-600:]}"
            for member in self.all
        )

    def close(self) -> None:
        for member in self.all:
            if member.process.poll() is None:
                member.process.kill()
            member.process.wait()
            if member.process.stdin is not None:
                member.process.stdin.close()


def wait(condition: Callable[[], bool], members: Members, seconds: float = WAIT_SECONDS) -> float:
    """Seconds until it held; shows everybody's events when it did not in time."""
    try:
        return wait_until(condition, seconds, "condition", 0.005)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{members.story()}") from None


# --- the member's side ---------------------------------------------------------------------------------------------


def _text(peer: Peer) -> list[Any]:
    return [peer.id.decode(errors="replace"), peer.incarnation, peer.payload.decode(errors="replace")]


def _show(event: Event) -> None:
    line: list[Any]
    if isinstance(event, View):
        line = ["view", event.sequence, *([_text(peer) for peer in part] for part in event[1:4]), event.grace_ns / 1e9]
    elif isinstance(event, Delivery):
        line = ["message", event.sequence, _text(event.sender), event.data.decode().rstrip(), len(event.data)]
    elif isinstance(event, Leased):
        line = ["leased", (event.until_ns - time.clock_gettime_ns(time.CLOCK_BOOTTIME)) / 1e9]
    elif isinstance(event, (Suspended, Lost)):
        line = [type(event).__name__, event.reason]
    else:
        line = [type(event).__name__]
    print(json.dumps(line), flush=True)


def _count_refusals() -> list[int]:
    """Grows with every message that corosync does not take now."""
    counted: list[int] = []
    send = cpg.Group.send

    def counting(self: cpg.Group, data: bytes) -> None:
        try:
            send(self, data)
        except cpg.CorosyncError as error:
            counted.append(error.code)
            raise

    cpg.Group.send = counting  # type: ignore[method-assign]
    return counted


async def _live(driver_text: str, name: str) -> None:
    refusals = _count_refusals()
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    driver = registry.create(driver_text)
    await driver.open(Peer(name.encode(), 0, b"payload " + name.encode()), _show)
    while words := (await reader.readline()).decode().split():
        if words[0] == "send":
            for index in range(int(words[2])):
                driver.broadcast(f"{name} {words[1]} {index}".ljust(int([*words, "0"][3])).encode())
        elif words[0] == "spread":
            for index in range(int(words[2])):
                driver.broadcast(f"{name} {words[1]} {index}".encode())
                await asyncio.sleep(0.002)
        elif words[0] == "refused":
            print(json.dumps(["refused", len(refusals)]), flush=True)
        elif words[0] == "renew":
            driver.renew()
        elif words[0] == "leave":
            await driver.leave()
            break
    await driver.close()


if __name__ == "__main__":
    asyncio.run(_live(sys.argv[1], sys.argv[2]))

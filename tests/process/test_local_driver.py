"""The local driver in processes of its own: killed, stopped, many at once."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

WAIT_S = 30.0
DETECTION_S = 1.0

# A member: commands on stdin, one line of JSON per event on stdout.
_MEMBER = r"""
import asyncio, json, os, signal, sys
from sheepdog.cluster.core.ports import Delivery, Leased, Peer, View
from sheepdog.cluster.drivers.local import LocalDriver
from sheepdog.cluster.drivers import local_log, local_members, local_watch

def peer_text(peer):
    return [peer.id.decode(), peer.incarnation, peer.payload.decode()]

def show(event):
    if isinstance(event, View):
        line = ["view", event.sequence, *([peer_text(p) for p in part] for part in event[1:4])]
    elif isinstance(event, Delivery):
        line = ["message", event.sequence, peer_text(event.sender), event.data.decode()]
    elif isinstance(event, Leased):
        return  # a process's own affair: not part of the order
    else:
        line = [type(event).__name__]
    print(json.dumps(line), flush=True)

def die_in_append(self, blob, position):
    os.pwrite(self._fd, blob[: len(blob) // 2], position)
    os.kill(os.getpid(), signal.SIGKILL)

def die_before_header(self, header):
    os.kill(os.getpid(), signal.SIGKILL)

def die_in_remove(self, incarnation):
    os.kill(os.getpid(), signal.SIGKILL)

def stop_in_append(self, blob, position):
    os.kill(os.getpid(), signal.SIGSTOP)
    write(self, blob, position)

write = local_log.EventLog._write

async def main():
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    driver = LocalDriver(sys.argv[1])
    name = sys.argv[2].encode()
    if "no-pidfd" in sys.argv:
        local_watch.pid_namespace = lambda: 0
    await driver.open(Peer(name, 0, b"payload " + name), show)
    while line := (await reader.readline()).decode().split():
        if line[0] == "send":
            for i in range(int(line[2])):
                driver.broadcast(f"{sys.argv[2]} {line[1]} {i}".ljust(int((line + [0])[3])).encode())
        elif line[0] == "spread":
            for i in range(int(line[2])):
                driver.broadcast(f"{sys.argv[2]} {line[1]} {i}".encode())
                await asyncio.sleep(0.002)
        elif line[0] == "fault":
            target, fault = {
                "append": ("_write", die_in_append), "header": ("write_header", die_before_header),
                "stop": ("_write", stop_in_append),
            }.get(line[1], ("", None))
            if fault:
                setattr(local_log.EventLog, target, fault)
            else:
                local_members.MemberDirectory.remove = die_in_remove
        elif line[0] == "leave":
            await driver.leave()
            break
    await driver.close()

asyncio.run(main())
"""


class Member:
    """One process; `lines` are its events so far."""

    def __init__(self, path: Path, name: str, *options: str) -> None:
        self.name = name
        self.output = path.parent / f"{name}.{time.monotonic_ns()}.events"
        with open(self.output, "wb") as stdout:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _MEMBER, str(path), name, *options],
                stdin=subprocess.PIPE,
                stdout=stdout,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )

    def lines(self) -> list[str]:
        return [line for line in self.output.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command.encode() + b"\n")
        self.process.stdin.flush()

    def members(self) -> list[str]:
        views = [json.loads(line) for line in self.lines() if line.startswith('["view"')]
        return [peer[0] for peer in views[-1][2]] if views else []

    def messages(self) -> list[str]:
        return [json.loads(line)[3] for line in self.lines() if line.startswith('["message"')]

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)


class Members:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.all: list[Member] = []

    def start(self, name: str, *options: str) -> Member:
        member = Member(self.path, name, *options)
        self.all.append(member)
        return member

    def together(self, *names: str) -> list[Member]:
        """Started one after the other, so that age is the order of names."""
        started: list[Member] = []
        for name in names:
            started.append(self.start(name))
            wait(lambda: started[-1].members() == list(names[: len(started)]))
        wait(lambda: all(member.members() == list(names) for member in started))
        return started

    def close(self) -> None:
        for member in self.all:
            if member.process.poll() is None:
                member.process.kill()
            member.process.wait()
            if member.process.stdin is not None:
                member.process.stdin.close()


@pytest.fixture
def members(tmp_path: Path) -> Iterator[Members]:
    started = Members(tmp_path / "log")
    yield started
    started.close()


def wait(condition: Callable[[], bool], limit_s: float = WAIT_S) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < limit_s, "waited too long"
        time.sleep(0.005)
    return time.monotonic() - began


def from_view_of(newest: str, lines: list[str]) -> list[str]:
    """The events from the view on that a later member's own join made."""
    for i, line in enumerate(lines):
        if line.startswith('["view"') and newest in [peer[0] for peer in json.loads(line)[3]]:
            return lines[i:]
    return []


def digest(lines: list[str]) -> str:
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("options", [(), ("no-pidfd",)])
def test_kill_is_noticed_well_within_a_second(members: Members, options: tuple[str, ...]) -> None:
    watcher = members.start("w", *options)
    victim = members.start("v", *options)
    wait(lambda: sorted(watcher.members()) == ["v", "w"] == sorted(victim.members()))
    victim.signal(signal.SIGKILL)
    assert wait(lambda: watcher.members() == ["w"]) < DETECTION_S
    assert not [name for name in os.listdir(f"{members.path}.d") if name.startswith(f"{victim.name}")]
    assert len(os.listdir(f"{members.path}.d")) == 3  # lock, and file and socket of the survivor


def test_clean_leave_is_seen_at_once(members: Members) -> None:
    a, b, c = members.together("a", "b", "c")
    b.tell("leave")
    assert wait(lambda: a.members() == c.members() == ["a", "c"]) < DETECTION_S
    assert b.process.wait(WAIT_S) == 0


@pytest.mark.parametrize("fault", ["append", "header"])
def test_kill_in_the_middle_of_an_append(members: Members, fault: str) -> None:
    a, b, c = members.together("a", "b", "c")
    b.tell(f"fault {fault}")
    b.tell("send lost 3")
    wait(lambda: a.members() == c.members() == ["a", "c"])
    a.tell("send kept 5")
    c.tell("send kept 5")
    wait(lambda: len(a.messages()) == len(c.messages()) == 10)
    assert not [text for text in a.messages() if "lost" in text]
    assert digest(from_view_of("c", a.lines())) == digest(c.lines())


def test_kill_of_the_one_that_removes_a_dead_member(members: Members) -> None:
    a, b, c, d = members.together("a", "b", "c", "d")
    b.tell("fault remove")
    c.tell("fault remove")
    time.sleep(0.2)  # both have read their orders
    a.signal(signal.SIGSTOP)
    d.signal(signal.SIGKILL)  # b or c appends its leave and dies before it removes the file; then the other does
    wait(lambda: b.process.poll() is not None and c.process.poll() is not None)
    a.signal(signal.SIGCONT)
    wait(lambda: a.members() == ["a"])
    e = members.start("e")
    wait(lambda: e.members() == a.members() == ["a", "e"])
    assert digest(from_view_of("e", a.lines())) == digest(e.lines())


def test_a_stopped_process_counts_as_alive_and_catches_up(members: Members) -> None:
    a, b = members.together("a", "b")
    b.signal(signal.SIGSTOP)
    a.tell("send while 300 20000")  # more than what is trimmed when all have read it
    wait(lambda: len(a.messages()) == 300)
    time.sleep(2 * DETECTION_S)
    assert a.members() == ["a", "b"]
    b.signal(signal.SIGCONT)
    wait(lambda: len(b.messages()) == 300)
    assert digest(from_view_of("b", a.lines())) == digest(b.lines())


def test_death_with_the_lock_in_hand_frees_the_others(members: Members) -> None:
    a, b = members.together("a", "b")
    b.tell("fault stop")
    b.tell("send held 1")
    wait(lambda: Path(f"/proc/{b.process.pid}/stat").read_text().split()[2] == "T")
    a.tell("send waits 2")
    time.sleep(0.3)
    assert a.messages() == []
    b.signal(signal.SIGKILL)
    wait(lambda: a.members() == ["a"] and len(a.messages()) == 2)


def test_sixteen_processes_agree_on_every_event(members: Members) -> None:
    names = [f"m{i:02}" for i in range(16)]
    for name in names:
        members.start(name)
    everyone = members.all[:]
    wait(lambda: all(len(member.members()) == 16 for member in everyone))
    for member in everyone:
        member.tell("spread x 40")
    time.sleep(0.05)
    killed, left = everyone[3:6], everyone[6:8]
    for member in killed:
        member.signal(signal.SIGKILL)
    late = members.start("late")
    for member in left:
        member.tell("leave")
    stay = [member for member in everyone if member not in killed + left] + [late]
    wait(lambda: all(len(member.members()) == 12 for member in stay))
    senders = [member.name for member in stay[:-1]]

    def complete(member: Member) -> bool:
        return all(sum(text.startswith(name) for text in member.messages()) == 40 for name in senders)

    wait(lambda: all(complete(member) for member in stay[:-1]))
    late.tell("send x 1")
    wait(lambda: all("late x 0" in member.messages() for member in stay))
    assert everyone[0].members()[-1] == "late"
    # Everybody has seen all events since its own join; the youngest of the sixteen joined after the other fifteen.
    youngest = max(stay[:-1], key=lambda member: int(json.loads(member.lines()[0])[1]))
    assert len({digest(from_view_of(youngest.name, member.lines())) for member in stay[:-1]}) == 1
    assert len({digest(from_view_of("late", member.lines())) for member in stay}) == 1
    assert from_view_of("late", late.lines()) == late.lines()
    for member in stay[:-1]:  # own messages exactly once and in order
        own = [text for text in member.messages() if text.startswith(member.name)]
        assert own == [f"{member.name} x {i}" for i in range(40)]


def test_files_of_a_dead_cluster_are_used_again(members: Members) -> None:
    first = members.together("a", "b", "c")
    first[0].tell("send old 10")
    wait(lambda: len(first[2].messages()) == 10)
    for member in first:
        member.signal(signal.SIGKILL)
        member.process.wait()
    old = json.loads(first[2].lines()[0])
    again = members.together("c", "a")
    joined = json.loads(again[0].lines()[0])
    assert joined[0] == "view"
    assert joined[1] > json.loads(first[2].lines()[-1])[1]
    assert joined[3][0][0] == old[3][0][0] == "c" and joined[3][0][1] > old[3][0][1]  # a new incarnation
    assert again[0].messages() == []
    assert len(os.listdir(f"{members.path}.d")) == 1 + 2 * 2


def test_idle_members_use_no_processor_time(members: Members) -> None:
    pair = members.together("a", "b")
    time.sleep(0.5)
    before = [_cpu_ticks(member) for member in pair]
    time.sleep(4)
    used = [_cpu_ticks(member) - ticks for member, ticks in zip(pair, before, strict=True)]
    assert max(used) * 1000 / os.sysconf("SC_CLK_TCK") <= 40, used  # 1 % of a core


def _cpu_ticks(member: Member) -> int:
    fields = Path(f"/proc/{member.process.pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])

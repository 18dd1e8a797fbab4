"""The cluster machine over an engine in memory that does everything that an engine may do.

The engine gives one order; each process sees it as late as it likes. Senders are in their own order only. Processes are
killed, thrown out while they live, leave, and start again from what their disks remember, at any moment. Whatever
happens: at the same place of the order all joined machines have the same state, and in the end all are together.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.bench import scale

from sheepdog.cluster.core import membership
from sheepdog.cluster.core.commands import Command
from sheepdog.cluster.core.ids import EpochRecord, Member, NodeId
from sheepdog.cluster.core.membership import ClusterMachine
from sheepdog.cluster.core.ports import Clock, Delivery, Event, Lost, Peer, Resumed, Suspended, Timer, View
from sheepdog.cluster.core.state import ClusterFlag, ClusterState, Status, node_key

NODES = 4
STEPS = 700
COPIES = 2


@dataclass
class Disk:
    """What a node remembers over its processes."""

    config: bytes | None = None
    epochs: list[EpochRecord] = field(default_factory=list)


class Engine:
    """The order, and what is not in it yet."""

    def __init__(self) -> None:
        self.order: list[Event] = []
        self.attached: list[Process] = []
        self.incarnations = 0

    def attach(self, process: Process) -> None:
        self.incarnations += 1
        process.peer = Peer(process.id, self.incarnations, b"")
        process.cursor = len(self.order)
        self.attached.append(process)
        self._view((process.peer,), ())

    def strike(self, process: Process) -> None:
        self.attached.remove(process)
        process.struck = len(self.order)
        self._view((), (process.peer,))

    def accept(self, process: Process) -> bool:
        """The next message of a sender gets its place."""
        if process not in self.attached or not process.outgoing:
            return False
        self.order.append(Delivery(len(self.order) + 1, process.peer, process.outgoing.popleft()))
        return True

    def _view(self, joined: tuple[Peer, ...], left: tuple[Peer, ...]) -> None:
        members = tuple(process.peer for process in self.attached)
        self.order.append(View(len(self.order) + 1, members, joined, left))


class Process(Clock):
    """One machine from its start to its end: its listener, its engine port and its clock."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.number = number
        self.node = NodeId(bytes(15) + bytes([number + 1]), 7000)
        self.id = bytes.fromhex(node_key(self.node))
        self.disk = world.disks[number]
        self.peer = Peer(self.id, 0, b"")
        self.outgoing: deque[bytes] = deque()
        self.due: list[Command] = []
        self.cursor = 0
        self.struck: int | None = None
        self.alive = True
        self.refusal = ""
        self.ended: list[Any] = []
        self.answers = 0
        self.machine = ClusterMachine(
            Member(self.node, number, 128, 1 << 40),
            False,
            ClusterState.from_disk(self.disk.config, list(self.disk.epochs)),
            self,
            self,
            self,
            lambda level, text: None,
        )
        world.engine.attach(self)

    # ports.Engine

    def broadcast(self, data: bytes) -> None:
        self.outgoing.append(data)

    def renew(self) -> None: ...

    def leave(self) -> None: ...

    # ports.Clock

    def now_ns(self) -> int:
        return 0

    def wall_ns(self) -> int:
        return 1_000_000_000

    def after(self, delay_ns: int, call: Callable[[], None]) -> Timer:
        raise AssertionError("the machine needs no timers")

    # membership.Listener

    def _remember(self) -> None:
        state = self.machine.state
        self.disk.config = state.config()
        self.disk.epochs = list(state.epochs)

    def epoch_changed(self) -> None:
        self._remember()

    def formatted(self) -> None:
        self._remember()

    def operation_due(self, operation: Command) -> None:
        self.due.append(operation)

    def operation_ended(self, operation: Command) -> None:
        done = operation["operation"]
        assert (done["owner"], done["number"]) in self.world.executed, "an operation has ended that nobody executed"
        self.ended.append(done)

    def state_changed(self, command: Command) -> None:
        self._remember()

    def refused(self, reason: str) -> None:
        self.refusal = reason

    def expelled(self, member: Member) -> None: ...

    def coordinator_due(self) -> None: ...

    def suspended(self, suspended: bool, reason: str) -> None: ...

    def lost(self, reason: str) -> None:
        self.alive = False

    # what happens

    def step(self) -> bool:
        """Sees the next event."""
        order = self.world.engine.order
        if not self.alive or self.cursor == len(order):
            return False
        if self.struck is not None and self.cursor >= self.struck:
            self.machine.on_event(Lost("thrown out"))
            return True
        event = order[self.cursor]
        self.cursor += 1
        self.machine.on_event(event)
        if self.machine.joined:
            self.world.compare(self, self.cursor)
        return True

    def execute(self) -> bool:
        """Ends an operation that fell to this process."""
        if not self.alive or not self.due:
            return False
        operation = self.due.pop(0)
        name = {key: operation[key] for key in ("owner", "number", "op")}
        outcome: Command = {"t": "commit", "operation": name, "changes": {}, "result": 0}
        if operation["op"] == "load":
            outcome["changes"] = {"table": {"records": [], "attributes": []}, "partial": 0}
        self.world.executed.add((operation["owner"], operation["number"]))
        self.machine.propose(outcome)
        return True


class World:
    def __init__(self, random: Random) -> None:
        self.random = random
        self.engine = Engine()
        self.disks = [Disk() for _ in range(NODES)]
        self.processes: list[Process | None] = [None] * NODES
        self.dying: list[Process] = []  # killed; the engine has not noticed
        self.states: dict[int, str] = {}
        self.numbers = 0
        self.executed: set[tuple[str, int]] = set()
        self.formats = 0
        self.happened: dict[str, int] = {}

    def compare(self, process: Process, position: int) -> None:
        text = process.machine.state.encode()
        digest = hashlib.sha256(text.encode()).hexdigest()
        known = self.states.setdefault(position, digest)
        assert known == digest, f"node {process.number} has another state at {position}"
        epochs = process.machine.state.epochs
        assert (
            [record.epoch for record in epochs] == list(range(epochs[0].epoch, len(epochs) + epochs[0].epoch))
            if epochs
            else True
        )

    def note(self, what: str) -> None:
        self.happened[what] = self.happened.get(what, 0) + 1

    def step(self) -> None:
        random = self.random
        number = random.randrange(NODES)
        process = self.processes[number]
        action = random.choices(
            ("see", "order", "execute", "ask", "start", "kill", "notice", "throw out", "leave", "pause"),
            (100, 60, 12, 12, 8, 1.5, 3, 0.7, 0.7, 2),
        )[0]
        if action == "start" and (process is None or not process.alive):
            self.start(number)
        elif action == "notice" and self.dying:
            self.engine.strike(self.dying.pop(random.randrange(len(self.dying))))
        elif process is None or not process.alive:
            return
        elif action == "see":
            process.step()
        elif action == "order":
            self.engine.accept(process)
        elif action == "execute":
            process.execute()
        elif action == "ask":
            self.ask(process)
        elif action == "kill":
            self.kill(number)
        elif action == "throw out" and process in self.engine.attached:
            self.note("thrown out")
            self.engine.strike(process)
        elif action == "leave" and process in self.engine.attached:
            while self.engine.accept(process):
                pass
            self.engine.strike(process)
            self.processes[number] = None
        elif action == "pause":
            process.machine.on_event(Suspended("a moment"))
            process.machine.on_event(Resumed())

    def start(self, number: int) -> None:
        old = self.processes[number]
        if old is not None and old.refusal:
            self.disks[number] = Disk()  # of another cluster: the administrator wipes it
        for process in [one for one in (*self.dying, old) if one is not None and one.number == number]:
            if process in self.dying:
                self.dying.remove(process)
            if process in self.engine.attached:
                self.engine.strike(process)
        self.processes[number] = Process(self, number)

    def kill(self, number: int) -> None:
        process = self.processes[number]
        assert process is not None
        self.note("killed")
        process.alive = False
        for _ in range(self.random.randrange(3)):
            self.engine.accept(process)
        process.outgoing.clear()
        self.processes[number] = None
        if process in self.engine.attached:
            self.dying.append(process)

    def ask(self, process: Process) -> None:
        """Something that a client or an administrator wants."""
        machine, random = process.machine, self.random
        state = machine.state
        if not machine.joined:
            return
        if not state.ctime:
            if len(state.members) == NODES or random.random() < 0.05:
                self.format(process)
            return
        if state.status != Status.RUNNING:
            return
        kind = random.choice(("op", "op", "find", "add", "recovery", "epoch", "weigh", "expel", "format"))
        self.numbers += 1
        if kind == "op":
            operation = {"op": "test", "owner": node_key(process.node), "number": self.numbers}
            machine.propose({"t": "op", "operation": operation})
        elif kind == "find":
            machine.propose({"t": "find", "name": "x", "tag": "", "snap_id": 0}, lambda _: self.note("answered"))
        elif kind == "add":
            command = {"t": "add", "vid": self.numbers, "copies": 2, "policy": 0, "shift": 22, "use": True}
            machine.propose(command, lambda _: self.note("answered"))
        elif kind == "recovery":
            machine.propose({"t": "recovery", "enabled": random.random() < 0.5})
        elif kind == "epoch":
            machine.propose({"t": "epoch", "time": 1})
        elif kind == "weigh":
            machine.propose({"t": "weigh", "space": random.randrange(1 << 30, 1 << 50), "time": 1})
        elif kind == "expel" and len(state.members) > 1 and random.random() < 0.2:
            victim = random.choice([member for member in state.members if member.id != process.node])
            who = [node_key(victim.id), victim.incarnation]
            machine.propose({"t": "expel", "who": who, "epoch": state.epoch, "time": 1})
            self.note("expelled")
        elif kind == "format" and random.random() < 0.02:
            self.format(process)

    def format(self, process: Process) -> None:
        self.formats += 1
        self.note("formatted")
        process.machine.propose(
            {
                "t": "format",
                "ctime": self.formats,
                "copies": COPIES,
                "policy": 0,
                "flags": int(ClusterFlag.AUTO_VNODES),
                "shift": 22,
                "store_name": "plain",
                "time": 1,
            }
        )

    def settle(self) -> list[Process]:
        """No more faults: everything that is on its way arrives, who is missing starts."""
        for _ in range(20):
            while self.dying:
                self.engine.strike(self.dying.pop())
            for number in range(NODES):
                process = self.processes[number]
                if process is None or not process.alive or process.refusal:
                    self.start(number)
            self.run()
        return [process for process in self.processes if process is not None]

    def run(self) -> None:
        """Everything that is on its way arrives."""
        moved = True
        while moved:
            moved = False
            for process in self.processes:
                moved |= self._move(process)

    def _move(self, process: Process | None) -> bool:
        if process is None:
            return False
        moved = process.step()
        moved |= self.engine.accept(process)
        return process.execute() or moved


def play(seed: int) -> World:
    world = World(Random(seed))
    for number in range(NODES):
        world.start(number)
    for _ in range(STEPS):
        world.step()
    return world


def check_the_end(world: World) -> None:
    present = world.settle()
    assert all(process.machine.joined for process in present)
    assert len({process.machine.state.encode() for process in present}) == 1
    state = present[0].machine.state
    attached = {(process.id, process.peer.incarnation) for process in present}
    assert {(bytes.fromhex(node_key(member.id)), member.incarnation) for member in state.members} == attached
    if not state.ctime:
        world.format(present[0])
        world.settle()
        state = present[0].machine.state
    assert state.status == Status.RUNNING
    assert state.queue == []
    assert state.epochs[-1].members == state.members or state.epochs[-1].epoch == state.epoch
    done: list[Any] = []
    present[-1].machine.propose({"t": "find", "name": "x", "tag": "", "snap_id": 0}, done.append)
    operation = {"op": "test", "owner": node_key(present[-1].node), "number": -1}
    present[0].machine.propose({"t": "op", "operation": operation})
    world.settle()
    assert len(done) == 1
    for process in present:
        assert [one["number"] for one in process.ended].count(-1) == 1, "an operation ends once, everywhere"


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 1 << 40))
def test_all_agree_whatever_happens(seed: int) -> None:
    check_the_end(play(seed))


def test_the_engine_is_rough_enough() -> None:
    total: dict[str, int] = {}
    for seed in range(40):
        for what, times in play(seed).happened.items():
            total[what] = total.get(what, 0) + times
    assert all(total.get(what, 0) > 10 for what in ("killed", "thrown out", "formatted", "answered", "expelled")), total


def forget_the_history(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted bug: what was ordered between the coordinator's snapshot and the joining is left out."""
    enter = ClusterMachine._enter

    def without(self: ClusterMachine, command: Command) -> None:
        self._history.clear()
        enter(self, command)

    monkeypatch.setattr(ClusterMachine, "_enter", without)


def execute_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted bug: a commit is applied whatever operation is at the head of the queue."""
    commit = ClusterMachine._commit

    def careless(self: ClusterMachine, command: Command, quiet: bool) -> None:
        if self.state.queue:
            commit(self, {**command, "operation": self.state.queue[0]}, quiet)

    monkeypatch.setattr(ClusterMachine, "_commit", careless)


@pytest.mark.parametrize("plant", [forget_the_history, execute_twice])
def test_planted_bugs_are_found(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        for seed in range(300):
            check_the_end(play(seed))


def test_the_last_verdict_of_an_expelled_coordinator_counts_alike_for_all() -> None:
    """It lets somebody in, and is expelled before that: who is let in knows nothing of expulsions yet."""
    world = World(Random(1))
    for number in range(NODES):
        world.start(number)
    coordinator, other, *_ = world.settle()
    world.format(other)
    world.run()
    assert coordinator.machine.is_coordinator()
    world.kill(NODES - 1)
    world.engine.strike(world.dying.pop())
    world.run()
    world.start(NODES - 1)
    newcomer = world.processes[NODES - 1]
    assert newcomer is not None
    while newcomer.step():
        pass
    assert world.engine.accept(newcomer)
    while coordinator.step():
        pass
    state = other.machine.state
    who = [node_key(coordinator.node), coordinator.peer.incarnation]
    other.machine.propose({"t": "expel", "who": who, "epoch": state.epoch, "time": 1})
    assert world.engine.accept(other)
    assert world.engine.accept(coordinator), "its verdict about the newcomer comes right after its expulsion"
    world.run()
    assert newcomer.machine.joined
    check_the_end(world)


def test_large_commands_arrive_whole() -> None:
    """Longer than a message of the engine: in parts, which others' messages may come between."""
    world = World(Random(1))
    for number in range(NODES):
        world.start(number)
    present = world.settle()
    world.format(present[0])
    world.settle()
    records: list[Any] = []
    for process in present[:2]:
        big = {"op": "test", "owner": node_key(process.node), "number": process.number, "text": "x" * 2_000_000}
        process.machine.propose({"t": "op", "operation": big})
        assert len(process.outgoing) == 4
        records.append(big)
    world.settle()
    assert [one["number"] for one in present[3].ended] == [0, 1]
    assert json.loads(json.dumps(records[0]))["number"] == 0


def test_a_notification_costs_the_coordinator_the_same_among_many_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has left is looked for when the view or the members change, not with every message."""
    members = [scale.member(number) for number in range(50)]
    machine = scale.Machine(0, members)
    compared: list[Member] = []
    original = membership._member_key

    def counted(one: Member) -> tuple[bytes, int]:
        compared.append(one)
        return original(one)

    monkeypatch.setattr(membership, "_member_key", counted)
    machine.notify()
    assert compared == []
    machine.view((), (scale.peer(members[-1]),))
    assert len(compared) >= len(members)
    assert json.loads(machine.proposed()[-1])["t"] == "leave"


@pytest.mark.parametrize("late", [False, True])
def test_a_table_of_an_epoch_that_is_over_is_collected_again(late: bool) -> None:
    """Who has joined meanwhile was not asked, and may bring what it lacks."""
    world = World(Random(1))
    world.start(0)
    world.run()
    (process,) = [one for one in world.processes if one is not None]
    world.format(process)
    world.run()
    epoch = process.machine.state.epoch
    operation: Command = {"op": "load", "owner": "", "number": 7}
    world.executed.add(("", 7))
    process.machine.propose({"t": "op", "operation": operation})
    if late:
        process.machine.propose({"t": "epoch", "time": 1})
    found = {"table": {"records": [], "attributes": []}, "partial": epoch, "collected": epoch}
    process.machine.propose({"t": "commit", "operation": operation, "changes": found, "result": 0})
    while process.step() or world.engine.accept(process):
        process.due.clear()
    assert [one["op"] for one in process.machine.state.queue] == ["load"] * late
    assert process.machine.state.partial == epoch

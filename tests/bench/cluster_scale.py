"""What a whole cluster pays for the number of nodes: 3 to 1,000 machines of the shipped core in the simulator.

    python -m tests.bench.cluster_scale [NODES...]

Every node runs its own `core.membership` machine over the simulator's ordered broadcast; `tests.bench.scale` has one
among made-up ones. Counted for each event: messages that the engine orders, calls of functions of cluster/core and CPU
time of an average node, and of the coordinator. Rings are not computed here: scale tells what one costs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tests.bench.counting import calls
from tests.bench.scale import Listening, accepted, member

from sheepdog.cluster.core.commands import Command
from sheepdog.cluster.core.ids import Epoch, EpochRecord, Member
from sheepdog.cluster.core.join_rules import join_command
from sheepdog.cluster.core.membership import ClusterMachine
from sheepdog.cluster.core.ports import Clock, Event, Leased, Timer, View
from sheepdog.cluster.core.state import ClusterFlag, ClusterState, Status, node_key
from sheepdog.cluster.sim.engine import SimAttachment, SimEngine
from sheepdog.cluster.sim.world import SECOND, Life, World

NODES = (3, 10, 30, 100, 300, 1000)
NOTIFICATIONS = 10
OPERATIONS = 10
COMPARED = 30  # machines whose whole states are compared; all of them up to so many
COLUMNS = ("nodes", "event", "messages", "kB", "calls/node", "us/node", "coordinator us", "all ms")
ROW = "| " + " | ".join(f"{{:>{max(6, len(name))}}}" for name in COLUMNS) + " |"


class Cost(NamedTuple):
    """Of one event, in all nodes together unless it says otherwise."""

    messages: float
    bytes: float
    calls: float
    cpu_us: float
    coordinator_us: float


class Node(Listening, Clock):
    """One machine, and its ports: the engine is the simulator's, operations end as soon as they are due."""

    def __init__(self, cluster: Cluster, me: Member) -> None:
        self.cluster = cluster
        self.member = me
        self.life = Life(cluster.world.stream(str(me.id)))
        self.cpu_ns = 0
        self.awake = False  # before that it neither hears nor says anything
        self.machine = ClusterMachine(me, False, ClusterState(), self, self, self, lambda level, text: None)
        key = bytes.fromhex(node_key(me.id))
        self.attachment: SimAttachment = cluster.engine.attach(key, b"", self._on_event, self.life)
        self.peer = self.attachment.peer

    def _on_event(self, event: Event) -> None:
        if self.awake and not isinstance(event, Leased):
            self.timed(lambda: self.machine.on_event(event))

    def timed(self, call: Callable[[], None]) -> None:
        begin = time.process_time_ns()
        call()
        self.cpu_ns += time.process_time_ns() - begin

    # ports.Engine and ports.Clock

    def broadcast(self, data: bytes) -> None:
        if self.awake:
            self.cluster.ordered.append(len(data))
            self.attachment.broadcast(data)

    def renew(self) -> None: ...

    def leave(self) -> None: ...

    def now_ns(self) -> int:
        return self.cluster.world.now_ns

    def wall_ns(self) -> int:
        return SECOND

    def after(self, delay_ns: int, call: Callable[[], None]) -> Timer:
        raise AssertionError("the machine needs no timers")

    # core.listener.Listener

    def operation_due(self, operation: Command) -> None:
        name = {key: operation[key] for key in ("owner", "number", "op")}
        self.machine.propose({"t": "commit", "operation": name, "changes": {}, "result": 0})


class Cluster:
    """So many nodes, joined, running, in one epoch; the first one coordinates."""

    def __init__(self, size: int) -> None:
        self.world = World(size)
        self.engine = SimEngine(self.world)
        self.ordered: list[int] = []  # bytes of each message given to the engine
        self.nodes = [Node(self, member(number)) for number in range(size)]
        self.run()
        self._place()
        self.check()

    def _place(self) -> None:
        """All join at once, with a state as if they had joined one by one: that takes size^2 joins, each O(size)."""
        for node in self.nodes:
            node.member = member(node.member.zone, node.peer.incarnation)
        state = ClusterState(ctime=1, flags=ClusterFlag.AUTO_VNODES, status=Status.RUNNING, loaded=True)
        state.members = state.weighted([node.member for node in self.nodes])
        state.epochs = [EpochRecord(Epoch(1), 1, state.members)]
        view = View(1, tuple(node.peer for node in self.nodes), (), ())
        for node in self.nodes:
            node.machine.on_event(view)
            joining = join_command(node.machine.state, node.machine.me, False, 0)
            node.machine._enter({**accepted(node.peer, joining, state), "as_of": self.engine._sequence})
            node.awake = True

    def run(self) -> None:
        """Until nothing is on its way."""
        while self.world.step():
            pass

    def check(self) -> None:
        """All are of one mind."""
        compared = self.nodes[:: max(1, len(self.nodes) // COMPARED)]
        assert all(node.machine.joined for node in self.nodes)
        assert len({node.machine.state.encode() for node in compared}) == 1
        assert len(self.nodes[0].machine.state.members) == len(self.nodes)
        assert [node for node in self.nodes if node.machine.is_coordinator()] == self.nodes[:1]

    def notify(self) -> None:
        """Something that all have to know, and that has no work behind it: recovery is switched off."""
        for number in range(NOTIFICATIONS):
            self.nodes[-1].machine.propose({"t": "recovery", "enabled": bool(number % 2)})
        self.run()

    def operate(self) -> None:
        """An ordered operation, as creating a volume: it is queued, runs at one node, and ends."""
        owner = self.nodes[-1]
        for number in range(OPERATIONS):
            operation = {"op": "test", "owner": node_key(owner.member.id), "number": number}
            owner.machine.propose({"t": "op", "operation": operation})
        self.run()
        assert owner.machine.state.queue == []

    def lose(self) -> None:
        """The youngest node dies; the engine tells, the coordinator strikes it out."""
        victim = self.nodes.pop()
        victim.attachment.die()
        victim.life.end()
        self.run()

    def join(self) -> None:
        """It comes back, through the handshake."""
        number = len(self.nodes)
        newcomer = Node(self, member(number))
        newcomer.awake = True
        self.nodes.append(newcomer)
        self.run()

    def cost(self, event: Callable[[], None], repeated: int = 1) -> Cost:
        """Without its calls, which take time to count."""
        self.ordered.clear()
        for node in self.nodes:
            node.cpu_ns = 0
        event()
        cpu_us = sum(node.cpu_ns for node in self.nodes) / 1000
        messages, size = len(self.ordered), sum(self.ordered)
        self.check()
        coordinator_us = self.nodes[0].cpu_ns / 1000
        return Cost(messages / repeated, size / repeated, 0.0, cpu_us / repeated, coordinator_us / repeated)


def events(cluster: Cluster) -> dict[str, Cost]:
    """What happens to it, with the costs; each twice, once for its time and once for its calls."""
    kinds: dict[str, tuple[Callable[[], None], int]] = {
        "notification": (cluster.notify, NOTIFICATIONS),
        "operation": (cluster.operate, OPERATIONS),
        "node lost": (cluster.lose, 1),
        "node joins": (cluster.join, 1),
    }
    costs = {name: cluster.cost(event, repeated) for name, (event, repeated) in kinds.items()}
    for name, (event, repeated) in kinds.items():
        costs[name] = costs[name]._replace(calls=calls(event) / repeated)
        cluster.check()
    return costs


def main(sizes: Sequence[int]) -> None:
    print(ROW.format(*COLUMNS))
    print(ROW.format(*["---:"] * len(COLUMNS)))
    for size in sizes:
        for name, cost in events(Cluster(size)).items():
            cells = [f"{cost.messages:.0f}", f"{cost.bytes / 1000:.1f}", f"{cost.calls / size:.0f}"]
            cells += [f"{cost.cpu_us / size:.0f}", f"{cost.coordinator_us:.0f}", f"{cost.cpu_us / 1000:.1f}"]
            print(ROW.format(size, name, *cells), flush=True)


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or NODES)

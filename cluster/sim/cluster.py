"""A simulated cluster: machines with disks, on which processes that run the real `core.Node` come and go."""

from __future__ import annotations

from collections.abc import Callable

from sheepdog.cluster.core.ids import Member, NodeId
from sheepdog.cluster.core.messages import Message
from sheepdog.cluster.core.node import Node
from sheepdog.cluster.core.state import Status, node_key
from sheepdog.cluster.sim.engine import SimAttachment, SimEngine
from sheepdog.cluster.sim.network import Fabric, SimNetwork
from sheepdog.cluster.sim.state import SimNodeState, SimStateDisk
from sheepdog.cluster.sim.store import SimDisk, SimStore
from sheepdog.cluster.sim.world import MILLISECOND, SECOND, WALL_START_NS, Event, World

HEALTH_LIMIT_NS = (
    60 * SECOND
)  # after the last fault: far more than detection, peering and recovery of a small world take
NodeFactory = Callable[..., Node]


class SimClock:
    """`ports.Clock` of one process: its timers end with it."""

    def __init__(self, world: World) -> None:
        self.alive = True
        self._world = world

    def now_ns(self) -> int:
        return self._world.now_ns

    def wall_ns(self) -> int:
        return WALL_START_NS + self._world.now_ns

    def after(self, delay_ns: int, call: Callable[[], None]) -> Event:
        def run() -> None:
            if self.alive:
                call()

        return self._world.after(delay_ns, run)


class Process:
    """One sheep from its start to its end."""

    def __init__(self, machine: Machine) -> None:
        world, cluster = machine.cluster.world, machine.cluster
        self.machine = machine
        self.alive = True
        self.clock = SimClock(world)
        self.store = SimStore(machine.disk, world)
        self.state = SimNodeState(machine.state, world)
        self.network: SimNetwork = cluster.fabric.attach(
            machine.id,
            self._on_message,
            self._on_link,
        )
        self.node: Node = cluster.make_node(
            Member(machine.id, machine.zone, machine.vnodes, machine.space),
            self.clock,
            self.network,
            self.store,
            self.state,
            self,
            lambda level, text: world.say(f"{machine.name} <{level}> {text}"),
        )
        self.node.on_exit = self._exited
        self.node.start()
        self._attachment: SimAttachment = cluster.engine.attach(
            bytes.fromhex(node_key(machine.id)), self.node.payload, self.node.on_event
        )

    # The network and the node need each other: calls go through here.

    def _on_message(self, sender: NodeId, message: Message) -> None:
        self.node.on_message(sender, message)

    def _on_link(self, peer: NodeId, up: bool) -> None:
        self.node.on_link(peer, up)

    # The engine port: the attachment exists only after the node.

    def broadcast(self, data: bytes) -> None:
        self._attachment.broadcast(data)

    def renew(self) -> None:
        """Nobody is declared dead who is not: no leases."""

    def leave(self) -> None:
        self._attachment.leave()

    def _exited(self, status: int, reason: str) -> None:
        """The node wants its process to end; the daemon would do so after the present event."""
        self.machine.exits.append((status, reason))
        self.machine.cluster.world.after(0, lambda: self.end(leave=True))

    def end(self, leave: bool = False) -> None:
        if not self.alive:
            return
        self.alive = False
        self.machine.cluster.count_probes(self.node)
        self.clock.alive = self.store.alive = self.state.alive = False
        self.network.die()
        if leave:
            self._attachment.leave()
        else:
            self._attachment.die()
        if self.machine.process is self:
            self.machine.process = None


class Machine:
    """A host: its disks outlive its processes."""

    def __init__(self, cluster: SimCluster, number: int, zone: int) -> None:
        self.cluster = cluster
        self.name = f"node{number}"
        self.number = number
        self.id = NodeId(bytes(12) + bytes([10, 0, 0, number + 1]), 7000)
        self.zone = zone
        self.vnodes = 128
        self.space = 1 << 40
        self.disk = SimDisk(cluster.world, self.name)
        self.state = SimStateDisk(cluster.world, self.name, self.disk)
        self.process: Process | None = None
        self.exits: list[tuple[int, str]] = []

    @property
    def node(self) -> Node:
        assert self.process is not None
        return self.process.node

    @property
    def up(self) -> bool:
        return self.process is not None

    def start(self) -> None:
        if self.process is None:
            self.cluster.world.say(f"{self.name} starts")
            self.process = Process(self)

    def kill(self, power: bool = False) -> None:
        """kill -9, or the power fails."""
        if self.process is not None:
            self.cluster.world.say(f"{self.name} {'loses power' if power else 'is killed'}")
            self.process.end()
            self.disk.crash(power)
            self.state.crash(power)
        elif power:
            self.disk.crash(power)
            self.state.crash(power)

    def lose_disk(self) -> None:
        """A disk fails under the running process."""
        if self.process is not None:
            lost = self.disk.lose()
            self.cluster.world.say(f"{self.name} loses a disk with {len(lost)} objects")
            self.node.copies_lost(lost)

    def serves(self) -> bool:
        """Joined a running cluster, and of its present epoch."""
        return self.process is not None and self.node.context.epoch > 0 and self.node.cluster.status == Status.RUNNING


class SimCluster:
    """See the module. `make_node` lets tests run a changed core (planted bugs)."""

    def __init__(self, world: World, machines: int, make_node: NodeFactory = Node) -> None:
        self.world = world
        self.fabric = Fabric(world)
        self.engine = SimEngine(world)
        self.make_node = make_node
        self._probes: dict[str, int] = {}
        self.machines = [Machine(self, number, number) for number in range(machines)]

    def machine(self, node: NodeId) -> Machine:
        return next(machine for machine in self.machines if machine.id == node)

    def start_all(self, spread_ns: int = 50 * MILLISECOND) -> None:
        """Starts every machine that is down, in random order."""
        random = self.world.stream(f"start {self.world.now_ns}")
        for machine in self.machines:
            if not machine.up:
                self.world.after(random.randrange(spread_ns), machine.start)

    def format(self, copies: int, flags: int = 4, recovery_delay_s: int = 0) -> None:
        """Waits until all machines have joined, then formats."""
        self.world.run_until(self.all_joined, HEALTH_LIMIT_NS, "all nodes join")
        results: list[int] = []
        node = self.machines[0].node
        node.operations.format(WALL_START_NS, copies, 0, flags, 20, "plain", results.append, recovery_delay_s)
        self.world.run_until(lambda: bool(results), HEALTH_LIMIT_NS, "format")
        assert results == [0], results
        self.world.run_until(self.healthy, HEALTH_LIMIT_NS, "health after format")

    def all_joined(self) -> bool:
        return all(
            machine.up and machine.node.machine.joined and len(machine.node.cluster.members) == len(self.machines)
            for machine in self.machines
        )

    def healthy(self) -> bool:
        """All machines are members of one running cluster, every copy is current, nothing is under way."""
        return not self.unhealthy()

    def unhealthy(self) -> str:
        """Why the cluster is not healthy; empty when it is."""
        if not self.all_joined():
            return "not all nodes have joined"
        epochs = {machine.node.context.epoch for machine in self.machines}
        if len(epochs) != 1 or 0 in epochs:
            return f"epochs {sorted(epochs)}"
        for machine in self.machines:
            node = machine.node
            if node.cluster.status != Status.RUNNING or not node.cluster.loaded:
                return f"{machine.name}: not running"
            if node.home is None or not node.home.active:
                return f"{machine.name}: peering, waits for {node.home and node.home.waiting_for()}"
            if node.home.recovery.unfinished:
                return f"{machine.name}: {node.home.recovery.unfinished} objects to recover"
            if not node.home.strips.levels.idle:
                return f"{machine.name}: strips are not level"
            if node.gateway.pending or node.gateway.drains:
                return f"{machine.name}: requests under way"
            if node.cluster.queue:
                return f"{machine.name}: operations queued"
            if node.cluster.swept < node.cluster.sweeps:
                return f"{machine.name}: a sweep is due"
            if machine.state.settled != node.context.epoch:
                return f"{machine.name}: settled in {machine.state.settled} of {node.context.epoch}"
        return ""

    def count_probes(self, node: Node) -> None:
        """A process ends: what it counted is kept."""
        for name, count in node.context.probes.items():
            self._probes[name] = self._probes.get(name, 0) + count

    def probes(self) -> dict[str, int]:
        """Rare paths taken so far by all processes, ascending by name."""
        total = dict(self._probes)
        for machine in self.machines:
            if machine.process is not None:
                for name, count in machine.node.context.probes.items():
                    total[name] = total.get(name, 0) + count
        return dict(sorted(total.items()))

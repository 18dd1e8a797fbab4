"""A simulated cluster: machines with disks, on which processes that run the real `core.Node` come and go."""

from __future__ import annotations

from collections.abc import Callable

from sheepdog.cluster.core.ids import Member, NodeId, ObjectId
from sheepdog.cluster.core.messages import Message
from sheepdog.cluster.core.node import CacheDisk, Node
from sheepdog.cluster.core.ports import Clock, Proven
from sheepdog.cluster.core.state import Status, node_key
from sheepdog.cluster.sim.engine import SimAttachment, SimEngine
from sheepdog.cluster.sim.network import Fabric, SimNetwork
from sheepdog.cluster.sim.state import SimNodeState, SimStateDisk
from sheepdog.cluster.sim.store import SimDisk, SimStore
from sheepdog.cluster.sim.world import MILLISECOND, SECOND, WALL_START_NS, Event, Life, World

HEALTH_LIMIT_NS = (
    60 * SECOND
)  # after the last fault: far more than detection, peering and recovery of a small world take
REJOIN_NS = 300 * MILLISECOND  # a daemon that lost its cluster tries to join again at once, then ever more slowly
RESTART_NS = 200 * MILLISECOND  # of a sheep that ended with an error, by systemd
NodeFactory = Callable[..., Node]


class SimClock(Clock):
    """`ports.Clock` of one process: its timers end with it."""

    def __init__(self, world: World, life: Life) -> None:
        self._life = life
        self._world = world

    def now_ns(self) -> int:
        return self._world.now_ns

    def wall_ns(self) -> int:
        return WALL_START_NS + self._world.now_ns

    def after(self, delay_ns: int, call: Callable[[], None]) -> Event:
        return self._world.after(delay_ns, lambda: self._life.do(self, call))


class Process:
    """One sheep from its start to its end."""

    def __init__(self, machine: Machine) -> None:
        world, cluster = machine.cluster.world, machine.cluster
        self.machine = machine
        self.life = life = Life(machine.random)
        self.clock = SimClock(world, life)
        self.store = SimStore(machine.disk, world, life)
        self.state = SimNodeState(machine.state, world, life)
        self.cache_store = SimStore(machine.cache_disk, world, life)
        self.network: SimNetwork = cluster.fabric.attach(machine.id, self._on_message, self._on_link, life)
        self.node: Node = cluster.make_node(
            Member(machine.id, machine.zone, machine.vnodes, machine.space),
            self.clock,
            self.network,
            self.store,
            self.state,
            self,
            lambda level, text: world.say(f"{machine.name} <{level}> {text}"),
            **self._cache(cluster.cache_bytes),
        )
        if self.node.cache is not None:
            volumes = self.node.cache.volumes
            volumes.age_ns, volumes.quiet_ns = cluster.cache_times_ns
        self.node.on_exit = self._exited
        self.node.on_lost = self._lost
        self.node.start()
        self.attachment: SimAttachment = cluster.engine.attach(
            bytes.fromhex(node_key(machine.id)), self.node.payload, self.node.on_event, life
        )

    @property
    def alive(self) -> bool:
        return self.life.alive

    def _cache(self, size_bytes: int) -> dict[str, CacheDisk]:
        if not size_bytes:
            return {}
        return {"cache_disk": CacheDisk(self.cache_store, self.machine.cache_identity, size_bytes)}

    # The network and the node need each other: calls go through here.

    def _on_message(self, sender: NodeId, message: Message) -> None:
        self.node.dispatch.on_message(sender, message)

    def _on_link(self, peer: NodeId, up: bool) -> None:
        self.node.on_link(peer, up)

    # The engine port: the attachment exists only after the node.

    def broadcast(self, data: bytes) -> None:
        self.attachment.broadcast(data)

    def renew(self) -> None:
        self.attachment.renew()

    def leave(self) -> None:
        self.attachment.leave()

    def _exited(self, status: int, reason: str) -> None:
        """The node wants its process to end; the daemon would do so after the present event.

        One that failed is started again by whoever looks after the machine.
        """
        machine, world = self.machine, self.machine.cluster.world
        machine.exits.append((status, reason))
        world.say(f"{machine.name} exits with {status}: {reason}")
        world.after(0, lambda: self.end(leave=True))
        if status:
            world.after(RESTART_NS + machine.random.randrange(RESTART_NS), machine.start)

    def _lost(self, reason: str) -> None:
        """The others go on without this incarnation: its clients are cut off, and another one begins soon."""
        machine = self.machine
        machine.cluster.world.say(f"{machine.name} lost the cluster: {reason}")
        self.end(leave=True)
        machine.cluster.world.after(machine.random.randrange(REJOIN_NS), machine.start)

    def end(self, leave: bool = False) -> None:
        if not self.alive:
            return
        self.machine.cluster.count_probes(self.node)
        if leave:
            self.attachment.leave()
        else:
            self.attachment.die()
        self.life.end()
        self.network.die()
        if self.machine.process is self:
            self.machine.process = None


class Machine:
    """A host: its disks outlive its processes."""

    def __init__(self, cluster: SimCluster, number: int, zone: int, vnodes: int = 128) -> None:
        self.cluster = cluster
        self.name = f"node{number}"
        self.number = number
        self.id = NodeId(bytes(12) + bytes([10, 0, 0, number + 1]), 7000)
        self.zone = zone
        self.vnodes = vnodes  # 0: a gateway, which stores nothing
        self.random = cluster.world.stream(f"machine {number}")
        self.space = 1 << 40
        self.disk = SimDisk(cluster.world, self.name)
        self.state = SimStateDisk(cluster.world, self.name, self.disk)
        self.cache_disk = SimDisk(cluster.world, f"{self.name} cache")
        self._caches_lost = 0
        self.process: Process | None = None
        self.exits: list[tuple[int, str]] = []
        self._not_before_ns = 0

    @property
    def node(self) -> Node:
        assert self.process is not None
        return self.process.node

    @property
    def up(self) -> bool:
        return self.process is not None

    def hold_off(self, duration_ns: int) -> None:
        """Does not start before this has passed."""
        self._not_before_ns = self.cluster.world.now_ns + duration_ns
        self.cluster.world.after(duration_ns, self.start)

    def start(self) -> None:
        if self.process is None and self.cluster.world.now_ns >= self._not_before_ns:
            self.cluster.world.say(f"{self.name} starts")
            self.state.forget_untold()
            self.process = Process(self)

    def kill(self, power: bool = False) -> None:
        """kill -9, or the power fails."""
        if self.process is not None:
            self.cluster.world.say(f"{self.name} {'loses power' if power else 'is killed'}")
            self.process.end()
            self.disk.crash(power)
            self.state.crash(power)
            self._crash_cache(power)
        elif power:
            self.disk.crash(power)
            self.state.crash(power)
            self._crash_cache(power)

    @property
    def cache_identity(self) -> str:
        """Of the contents of the cache's disk (host.cache_files)."""
        return f"{self.name}.{self._caches_lost}"

    def _crash_cache(self, power: bool) -> None:
        """The cache syncs nothing: a power failure voids it."""
        if power:
            self.lose_cache()
        else:
            self.cache_disk.crash(False)

    def lose_cache(self) -> None:
        """The cache's disk is another one from the next start on."""
        assert self.process is None
        self._caches_lost += 1
        self.cache_disk = SimDisk(self.cluster.world, f"{self.name} cache {self._caches_lost}")

    def lose_disk(self) -> list[ObjectId]:
        """A disk fails under the running process; what was on it."""
        lost = self.disk.lose()
        self.cluster.world.say(f"{self.name} loses a disk with {len(lost)} objects")
        self.state.untold = True
        self.node.copies.lost(lost, self.state.told)
        return lost

    def lose_disk_while_down(self) -> None:
        """It starts again with fewer disks than it had (host.node_state.forget_settled); the machine is down."""
        self.cluster.world.say(f"{self.name} starts without a disk of {self.disk.lose_while_down()} objects")
        self.state.proven = Proven()

    def replace_disk(self) -> None:
        """All its disks are lost, what the node knew of its cluster too; the machine is down."""
        self.cluster.world.say(f"{self.name} gets an empty disk")
        self.disk.wipe()
        self.state.wipe()

    def pause(self, duration_ns: int) -> None:
        """SIGSTOP, and SIGCONT a while later."""
        process = self.process
        if process is None or process.life.stopped:
            return
        self.cluster.world.say(f"{self.name} is stopped for {duration_ns / 1e6:.1f} ms")
        process.life.stop()
        process.attachment.fall_silent(duration_ns)

        def go_on() -> None:
            self.cluster.world.say(f"{self.name} goes on")
            process.life.go_on()

        self.cluster.world.after(duration_ns, go_on)

    def serves(self) -> bool:
        """Joined a running cluster, and of its present epoch."""
        return self.process is not None and self.node.context.epoch > 0 and self.node.cluster.status == Status.RUNNING


class SimCluster:
    """See the module. `make_node` lets tests run a changed core (planted bugs)."""

    def __init__(
        self,
        world: World,
        machines: int,
        make_node: NodeFactory = Node,
        gateways: int = 0,
        session_ns: int = 0,
        zone_of: tuple[int, ...] = (),
        cache_bytes: int = 0,
    ) -> None:
        self.world = world
        self.cache_bytes = cache_bytes  # of each machine's object cache; 0: none
        self.cache_times_ns = (100 * MILLISECOND, 50 * MILLISECOND)  # age of a push, quiet after letting go
        self.fabric = Fabric(world)
        self.engine = SimEngine(world, session_ns)
        self._zone_of = zone_of  # of the first machines; the others are zones of their own
        self.make_node = make_node
        self._probes: dict[str, int] = {}
        self.machines: list[Machine] = []
        for number in range(machines + gateways):
            self.add_machine(gateway=number >= machines)

    def add_machine(self, gateway: bool = False) -> Machine:
        """A new machine, which is off yet."""
        number = len(self.machines)
        zone = self._zone_of[number] if number < len(self._zone_of) else number
        machine = Machine(self, number, zone, 0 if gateway else 128)
        self.machines.append(machine)
        return machine

    def machine(self, node: NodeId) -> Machine:
        return next(machine for machine in self.machines if machine.id == node)

    def start_all(self, spread_ns: int = 50 * MILLISECOND) -> None:
        """Starts every machine that is down, in random order; those that are stopped go on."""
        random = self.world.stream(f"start {self.world.now_ns}")
        for machine in self.machines:
            if machine.process is not None and machine.process.life.stopped:
                machine.process.life.go_on()
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
        unsettled = self.unsettled()
        if unsettled:
            return unsettled
        for machine in self.machines:
            node = machine.node
            if machine.process is None or machine.process.attachment.behind:
                return f"{machine.name}: has not heard of everything"
            if node.gateway.router.pending or node.gateway.router.drains:
                return f"{machine.name}: requests under way"
            if node.cluster.partial:
                return f"{machine.name}: the table of VDIs may lack some"
            if node.cluster.queue:
                return f"{machine.name}: operations queued"
            if node.cluster.swept < node.cluster.sweeps:
                return f"{machine.name}: a sweep is due"
        return ""

    def unsettled(self) -> str:
        """Why not every copy is where it belongs and current; empty when it is. Clients may go on."""
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
            if machine.state.proven.settled != node.context.epoch:
                return f"{machine.name}: settled in {machine.state.proven.settled} of {node.context.epoch}"
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
